"""FlashInfer's NVFP4 product of few tokens, by what it documents: it needs a chip that is not here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import flashinfer_arithmetic as arithmetic
import interpreted  # before any kernel
import pytest
import torch
from flashinfer_arithmetic import Recorder
from torch import Tensor

from nanoserve.checkpoint import open_checkpoint
from nanoserve.config import EngineConfig
from nanoserve.dense_scales import dense_scales, prepare_linear, with_dense
from nanoserve.errors import BackendError
from nanoserve.kernels import nvfp4
from nanoserve.kernels.flashinfer_linear import linear
from nanoserve.kernels.linear import Nvfp4, Plain
from nanoserve.kernels.linear import linear as reference
from nanoserve.startup import prepare
from nanoserve.weights import load

assert interpreted


def product(record: Recorder) -> Callable[..., Tensor]:
    """``out = (a @ dequant(b).T) * alpha``, in float32, checked as `check_native_bf16_fp4` does."""
    function = arithmetic.real("flashinfer.gemm.gemm_bf16_fp4", "mm_bf16_fp4")

    def run(*args: Any, **kwargs: Any) -> Tensor:
        a = record.bind(function, args, kwargs)
        rows, columns = a["b"].shape[0], 2 * a["b"].shape[1]
        assert a["backend"] == "cute-dsl-native"
        assert a["a"].dtype == torch.bfloat16
        assert a["a"].is_contiguous()
        assert a["b_descale"].numel() == -(-rows // 128) * -(-columns // 64) * 512
        assert (a["alpha"].dtype, a["alpha"].shape) == (torch.float32, (1,))
        scales = arithmetic.logical(a["b_descale"].view(torch.uint8)[None], rows, columns // 16)[0]
        return (arithmetic.products(a["a"].float(), a["b"], scales) * a["alpha"]).bfloat16()

    return run


@pytest.mark.parametrize(("rows", "columns"), [(130, 96), (256, 192)])
@pytest.mark.parametrize(("tokens", "given"), [(1, 1), (3, 4), (16, 16), (17, None)])
def test_it_is_the_reference(rows: int, columns: int, tokens: int, given: int | None) -> None:
    weight, record = Nvfp4(*nvfp4.pack(torch.randn(rows, columns))), Recorder()
    own = prepare_linear(weight, product(record))
    x = torch.randn(tokens, columns).bfloat16()
    torch.testing.assert_close(linear(x, own), reference(x, weight), rtol=1e-2, atol=1e-2)
    assert [len(call["a"]) for call in record.calls.get("mm_bf16_fp4", [])] == ([given] if given else [])
    assert own.data is weight.data


def test_what_was_not_prepared_is_refused() -> None:
    for weight in (Nvfp4(*nvfp4.pack(torch.randn(16, 16))), Plain(torch.randn(16, 16).bfloat16())):
        with pytest.raises(BackendError, match="not prepared for native"):
            linear(torch.randn(1, 16).bfloat16(), weight)


def test_what_it_may_be_given_is_prepared_and_counted(make_checkpoint: Callable[..., Path]) -> None:
    prepared = prepare(open_checkpoint(make_checkpoint(recipe="nano")), EngineConfig(device="cpu"))
    fields = load(prepared.checkpoint, prepared.manifest, torch.device("cpu"), lambda done, total: None)
    assert with_dense(fields, prepared.manifest, prepared.backends) is fields
    assert dense_scales(prepared.manifest, prepared.backends) == 0
    chosen = {**prepared.backends, "linear_nvfp4": "native"}
    grown = with_dense(fields, prepared.manifest, chosen, lambda: product(Recorder()))
    kept = [w.prepared.scales for w in grown.values() if isinstance(w, Nvfp4) and w.prepared]
    assert len(kept) > 4
    assert sum(scales.nbytes for scales in kept) == dense_scales(prepared.manifest, chosen)
    matrices = [w for w in grown.values() if isinstance(w, Nvfp4) and w.data.dim() == 2]
    assert all(w.prepared for w in matrices)
