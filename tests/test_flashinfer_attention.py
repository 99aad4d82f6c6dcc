"""FlashInfer's decode attention, stood in for by its documented arithmetic: it needs a chip that is not here."""

from collections.abc import Callable
from typing import Any

import flashinfer_arithmetic as arithmetic
import pytest
import torch
from flashinfer_arithmetic import Recorder
from torch import Tensor

from nanoserve.errors import BackendError
from nanoserve.kernels import flashinfer_ops
from nanoserve.kernels.attention import LayerKV, attention
from nanoserve.kernels.flashinfer_attention import attend, workspace_bytes
from nanoserve.kernels.random_inputs import attention_inputs
from nanoserve.kernels.requirements import TOLERANCES

CPU, BF16, FP8 = torch.device("cpu"), torch.bfloat16, torch.float8_e4m3fn


def difference(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


def xqa(record: Recorder) -> Callable[..., None]:
    """`kernel_mha_impl`: of 256 tokens, a softmax in float32 and its weights in BF16; BF16 parts, merged."""
    function = arithmetic.real("flashinfer.xqa", "xqa")

    def run(*args: Any, **kwargs: Any) -> None:
        a = record.bind(function, args, kwargs)
        q, k, v, out = a["q"], a["k_cache"], a["v_cache"], a["output"]
        heads, dim = q.shape[2:]
        assert q.shape == out.shape == (1, 1, heads, dim)
        assert q.dtype == out.dtype == BF16
        assert q.is_contiguous()
        assert out.is_contiguous()
        assert k.shape[1:] == v.shape[1:] == (a["page_size"], a["num_kv_heads"], dim)
        assert k.stride() == v.stride()
        assert (a["page_table"].dtype, len(a["page_table"])) == (torch.int32, 1)
        assert a["page_table"].is_contiguous()
        assert (a["seq_lens"].dtype, a["seq_lens"].shape) == (torch.uint32, (1, 1))
        assert (a["semaphores"].dtype, a["semaphores"].numel()) == (torch.uint32, a["num_kv_heads"])
        assert not a["semaphores"].view(torch.int32).any()
        assert a["workspace_buffer"].dtype == torch.uint8
        assert a["workspace_buffer"].data_ptr() % 4096 == 0
        assert a["workspace_buffer"].numel() >= workspace_bytes(a["num_kv_heads"], a["sm_count"])
        assert (a["kv_layout"], a["q_seq_len"], a["sliding_win_size"], a["enable_pdl"]) == ("NHD", 1, 0, False)
        length = int(a["seq_lens"].view(torch.int32))
        narrow, group = k.dtype == FP8, heads // a["num_kv_heads"]
        pages = a["page_table"][0, : -(-length // a["page_size"])].long()
        keys, values = (m.float()[pages].flatten(0, 1)[:length].repeat_interleave(group, 1) for m in (k, v))
        scale = a["q_scale"] * (a["kv_scale"] if narrow else 1) / dim**0.5
        scores = torch.einsum("hd,lhd->hl", q[0, 0].float(), keys) * scale
        tops, sums, outs = [], [], []
        for start in range(0, length, 256):
            part, mine = scores[:, start : start + 256], values[start : start + 256]
            top = part.amax(-1, keepdim=True)
            weights = (part - top).exp()
            tops.append(top)
            sums.append(weights.sum(-1, keepdim=True))
            mixed = torch.einsum("hl,lhd->hd", weights.bfloat16().float(), mine) / sums[-1]
            outs.append((mixed * (a["kv_scale"] if narrow else 1)).bfloat16().float())
        most = torch.stack(tops).amax(0)
        shares = [total * (top - most).exp() for total, top in zip(sums, tops, strict=True)]
        merged = sum((part * share for part, share in zip(outs, shares, strict=True)), torch.zeros(()))
        out.copy_((merged / sum(shares, torch.zeros(()))).view_as(out))

    return run


@pytest.mark.parametrize("kv", [BF16, FP8])
@pytest.mark.parametrize(("tokens", "length"), [(1, 1), (1, 16), (1, 1000), (3, 300)])
def test_attention_is_the_reference_within_its_tolerance(
    kv: torch.dtype, tokens: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Recorder()
    monkeypatch.setattr(flashinfer_ops, "xqa", lambda: xqa(record))
    q, cache, pages, positions = attention_inputs(tokens, max(length, tokens), (32, 2, 128), kv, CPU)
    got = attend(q, cache, pages, positions)
    assert got.dtype == BF16
    assert difference(got, attention(q, cache, pages, positions)) < TOLERANCES["xqa"]
    assert [int(call["seq_lens"].view(torch.int32)) for call in record.calls["xqa"]] == (positions + 1).tolist()


@pytest.mark.parametrize(
    ("sizes", "page", "dtype", "kv"),
    [
        ((16, 2, 128), 16, BF16, BF16),
        ((32, 2, 64), 16, BF16, BF16),
        ((32, 2, 128), 256, BF16, BF16),
        ((32, 2, 128), 16, torch.float32, BF16),
        ((32, 2, 128), 16, BF16, torch.float32),
    ],
)
def test_attention_is_refused_where_it_was_not_made_for(
    sizes: tuple[int, int, int], page: int, dtype: torch.dtype, kv: torch.dtype
) -> None:
    q, kv_heads, dim = torch.zeros(1, sizes[0], sizes[2], dtype=dtype), sizes[1], sizes[2]
    pool = torch.zeros(2, page, kv_heads, dim, dtype=kv)
    cache = LayerKV(pool, pool)
    with pytest.raises(BackendError, match="xqa"):
        attend(q, cache, torch.zeros(2, dtype=torch.int32), torch.zeros(1, dtype=torch.int64))


def test_the_workspace_holds_what_the_kernel_leaves() -> None:
    """By hand for 188 processors and 2 KV heads: 188 parts of 2 x 128 bytes, then of 4,096."""
    assert workspace_bytes(2, 188) >= -(-188 * 256 // 4096) * 4096 + 188 * 4096
    assert workspace_bytes(8, 1) >= 4096 + 8 * 4096


def test_flashinfer_has_it() -> None:
    assert callable(flashinfer_ops.xqa())
