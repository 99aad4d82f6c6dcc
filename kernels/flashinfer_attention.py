"""Decode attention over a paged KV cache on FlashInfer's XQA kernel, with BF16 or FP8 pages.

Numerics on SM120 and SM121: keys and values become BF16, which holds every FP8 value; scores and sums are float32;
the weights of the softmax, and each part of a sequence, are rounded to BF16.
Sources, flashinfer-python 0.7.4: `xqa` (xqa.py), `xqa_wrapper` (csrc/xqa/xqa_wrapper.cu), and in csrc/xqa/mha.cu
`launchMHAFlashInfer` and `kernel_mha_impl`, after which `workspace_bytes` counts.
"""

import torch
from torch import Tensor

from nanoserve.errors import BackendError
from nanoserve.kernels import flashinfer_ops, triton_attention
from nanoserve.kernels.attention import LayerKV

GROUP, SIZE, PAGES = 16, 128, (16, 32, 64, 128)
"""Query heads of a KV head, size of a head, and tokens of a page, that it is called for here."""

_ALIGNED = SIZE * GROUP * 2
"""Bytes of a part's output, to a multiple of which the kernel aligns them."""


def attention_decode(
    q: Tensor, k: Tensor, v: Tensor, cache: LayerKV, page_table: Tensor, positions: Tensor
) -> Tensor:
    """As `nanoserve.kernels.attention.attention_decode`; keys and values are added by the Triton column."""
    triton_attention.kv_append(k, v, cache, page_table, positions)
    return attend(q, cache, page_table, positions)


def attend(q: Tensor, cache: LayerKV, page_table: Tensor, positions: Tensor) -> Tensor:
    """As `nanoserve.kernels.attention.attention`, for BF16 queries: a launch a token.

    Raises:
        BackendError: another group, size of a head or page, or type, than what it was made for.
    """
    tokens, heads, size = q.shape
    page, kv_heads = cache.k.shape[1:3]
    _check(q, cache, heads // kv_heads)
    assert cache.k.stride() == cache.v.stride(), "the kernel steps through both as through k"
    processors = _processors(q.device)
    # The kernel's last block of a KV head, which it counts here, sets the count to 0 again.
    semaphores = torch.zeros(kv_heads, dtype=torch.int32, device=q.device).view(torch.uint32)
    raw = torch.empty(workspace_bytes(kv_heads, processors) + _ALIGNED, dtype=torch.uint8, device=q.device)
    workspace = raw[-raw.data_ptr() % _ALIGNED :]
    lengths = (positions + 1).to(torch.int32).view(torch.uint32)
    q = q.contiguous()
    out = torch.empty_like(q)
    run = flashinfer_ops.xqa()
    for t in range(tokens):
        run(
            q[t].view(1, 1, heads, size), cache.k, cache.v, page_table.unsqueeze(0), lengths[t].view(1, 1),
            out[t].view(1, 1, heads, size), workspace, semaphores, kv_heads, page,
            # Scores are multiplied by both scales, FP8 results by the second.
            q_scale=cache.k_scale / cache.v_scale, kv_scale=cache.v_scale,
            kv_layout="NHD", sm_count=processors, enable_pdl=False,
        )  # fmt: skip
    return out


def workspace_bytes(kv_heads: int, processors: int) -> int:
    """What the parts of a sequence leave for the one that ends last.

    There are at most ``processors`` parts, or one a KV head. Each has a maximum and a sum of 32 float32 values,
    and after all of those, aligned to its size, a BF16 output of `GROUP` heads.
    """
    parts = max(processors, kv_heads)
    return parts * 2 * 32 * 4 + _ALIGNED + parts * _ALIGNED


def _check(q: Tensor, cache: LayerKV, group: int) -> None:
    size, page, kv = q.shape[-1], cache.k.shape[1], cache.k.dtype
    if (group, size) != (GROUP, SIZE) or page not in PAGES:
        raise BackendError(
            f"xqa is called here for {GROUP} query heads of {SIZE} values a KV head, in pages of 16 to 128 tokens;"
            f" these are {group} of {size} in pages of {page}: choose another attention_decode"
        )
    if q.dtype != torch.bfloat16 or kv not in (torch.bfloat16, torch.float8_e4m3fn):
        raise BackendError(f"xqa takes bfloat16 queries and bfloat16 or fp8 pages, and these are {q.dtype}, {kv}")


def _processors(device: torch.device) -> int:
    """The chip's, by which a sequence is cut; on a CPU stands a stand-in."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 188
