"""FlashInfer's products, stood in for by their documented arithmetic: they need a chip that is not here."""

import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import flashinfer_arithmetic as arithmetic
import interpreted  # before any kernel
import pytest
import torch
from conftest import DATA
from flashinfer_arithmetic import Recorder
from torch import Tensor

from nanoserve import op_cases
from nanoserve.checkpoint import open_checkpoint
from nanoserve.config import EngineConfig
from nanoserve.dense_scales import DENSE, dense_scales, prepare_dense, with_dense
from nanoserve.errors import BackendError
from nanoserve.kernels import nvfp4
from nanoserve.kernels.flashinfer_linear import linear, linear_fp4, linear_fp8
from nanoserve.kernels.fp8 import narrow
from nanoserve.kernels.linear import Fp8, Nvfp4, Plain
from nanoserve.kernels.linear import linear as reference
from nanoserve.kernels.prepared import MmFp4
from nanoserve.kernels.requirements import TOLERANCES
from nanoserve.kernels.swizzle import swizzle, swizzled_shape
from nanoserve.kernels.table import BACKENDS
from nanoserve.models.config import NemotronHConfig
from nanoserve.models.manifest import Kind, entries
from nanoserve.op_cases import Subject, cases
from nanoserve.op_checks import largest_error, outputs
from nanoserve.quantization import Format
from nanoserve.startup import Examined, prepare
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
    own = prepare_dense("native", weight, product(record))
    assert isinstance(own, Nvfp4)
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
    assert with_dense(fields, prepared.manifest, prepared.backends, prepared.checkpoint) is fields
    assert dense_scales(prepared.manifest, prepared.backends) == 0
    chosen = {**prepared.backends, "linear_nvfp4": "native"}
    library = {"native": lambda: product(Recorder())}
    grown = with_dense(fields, prepared.manifest, chosen, prepared.checkpoint, library)
    kept = [w.prepared.scales for w in grown.values() if isinstance(w, Nvfp4) and w.prepared]
    assert len(kept) > 4
    assert sum(scales.nbytes for scales in kept) == dense_scales(prepared.manifest, chosen)
    matrices = [w for w in grown.values() if isinstance(w, Nvfp4) and w.data.dim() == 2]
    assert all(w.prepared for w in matrices)


def mm_fp8(record: Recorder) -> Callable[..., Tensor]:
    """``out = a @ b.T * alpha``, summed in float32, checked as FlashInfer and cuBLASLt do."""
    function = arithmetic.real("flashinfer.gemm.gemm_base", "mm_fp8")
    check = arithmetic.real("flashinfer.gemm.gemm_base", "_check_mm_fp8_unprocessed_weight")

    def run(*args: Any, **kwargs: Any) -> Tensor:
        a = record.bind(function, args, kwargs)
        check(a["a"], a["b"])
        assert (a["backend"], a["out"], a["out_dtype"]) == ("cublas", None, torch.bfloat16)
        assert (a["alpha"].dtype, a["alpha"].shape) == (torch.float32, (1,))
        assert all(size % 16 == 0 for size in a["b"].shape)
        return (a["a"].float() @ a["b"].float().T * a["alpha"]).bfloat16()

    return run


def mm_fp4(record: Recorder) -> MmFp4:
    """`nvfp4_quantize` in 128 x 4 order, and ``out = dequant(a) @ dequant(b).T * alpha``, summed in float32.

    The codes are packed and swizzled here, and read by the emulation's own layout.
    """
    module = "flashinfer.gemm.gemm_base"
    function, check = (arithmetic.real(module, name) for name in ("mm_fp4", "_check_mm_fp4_problem_size"))
    quantize_real = arithmetic.real("flashinfer.quantization.fp4_quantization", "nvfp4_quantize")
    layout = importlib.import_module("flashinfer.tllm_enums").SfLayout.layout_128x4

    def quantize(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        a = record.bind(quantize_real, args, kwargs)
        x, multiplier = a["a"], a["a_global_sf"]
        assert x.dtype == torch.bfloat16
        assert x.is_contiguous()
        assert (multiplier.dtype, multiplier.numel()) == (torch.float32, 1)
        assert (a["sfLayout"], a["do_shuffle"], a["sf_vec_size"], a["backend"]) == (layout, False, 16, "cuda")
        assert not a["per_token_activation"]
        assert a["nvfp4_4over6"] is None
        blocks = x.float().unflatten(-1, (-1, 16))
        scales = (blocks.abs().amax(-1) / 6 * multiplier).clamp(max=448).to(torch.float8_e4m3fn)
        inverse = torch.where(scales.float() == 0, 0, multiplier / scales.float())
        codes = nvfp4.nearest_code(blocks * inverse[..., None]).flatten(-2).unflatten(-1, (-1, 2))
        return codes[..., 0] | codes[..., 1] << 4, swizzle(scales).view(torch.uint8)

    def multiply(*args: Any, **kwargs: Any) -> Tensor:
        a = record.bind(function, args, kwargs)
        tokens, (half, rows) = len(a["a"]), a["b"].shape
        assert check(a["a"], a["b"], a["a_descale"], a["b_descale"], a["alpha"], a["out_dtype"], backend="b12x")
        assert (a["backend"], a["out"], a["use_8x4_sf_layout"], a["use_nvfp4"]) == ("b12x", None, False, True)
        assert (a["alpha"].dtype, a["alpha"].shape) == (torch.float32, (1,))
        assert a["b"].T.is_contiguous()
        assert half % 16 == 0
        read = []
        for scales, count in ((a["a_descale"], tokens), (a["b_descale"].T, rows)):
            assert scales.is_contiguous()
            assert scales.shape == swizzled_shape(count, half // 8)
            read.append(arithmetic.logical(scales.view(torch.uint8)[None], count, half // 8)[0])
        left = arithmetic.codes(a["a"]) * read[0].repeat_interleave(16, -1)
        return (arithmetic.products(left, a["b"].T, read[1]) * a["alpha"]).bfloat16()

    return MmFp4(quantize, multiply, layout)


LIBRARIES: dict[str, Callable[[Recorder], Any]] = {"native": product, "mm_fp8": mm_fp8, "mm_fp4": mm_fp4}


def difference(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


@pytest.mark.parametrize("tokens", [1, 3, 64])
def test_fp8_times_fp8_is_the_reference_within_its_tolerance(tokens: int) -> None:
    scale, record = torch.tensor(0.01), Recorder()
    weight = Fp8((torch.randn(96, 512) / scale / 20).to(torch.float8_e4m3fn), scale)
    own = prepare_dense("mm_fp8", weight, mm_fp8(record), torch.full((1,), 1 / 64))
    assert isinstance(own, Fp8)
    x = torch.randn(tokens, 512).bfloat16()
    error = difference(linear_fp8(x, own), reference(x, weight))
    assert 0.01 < error < TOLERANCES["mm_fp8"]
    assert own.data is weight.data
    assert len(record.calls["mm_fp8"]) == 1
    # What FP8 holds exactly is multiplied exactly.
    x = torch.randint(-15, 16, (tokens, 512)).bfloat16() / 64
    assert difference(linear_fp8(x, own), reference(x, weight)) < 1e-3


def test_what_is_too_large_for_fp8_is_the_largest_and_not_nan() -> None:
    codes = narrow(torch.tensor([1000.0, -1e9, 0.3, 0.0]), torch.tensor([0.5]))
    assert codes.float().tolist() == [448, -448, 0.625, 0]


def test_what_fp8_times_fp8_cannot_be_given() -> None:
    weight = Fp8(torch.zeros(16, 16).to(torch.float8_e4m3fn), torch.tensor(1.0))
    with pytest.raises(BackendError, match="not prepared for mm_fp8"):
        linear_fp8(torch.randn(1, 16).bfloat16(), weight)
    with pytest.raises(BackendError, match="input_scale of the checkpoint is 0"):
        prepare_dense("mm_fp8", weight, None, torch.zeros(1))
    own = prepare_dense("mm_fp8", weight, mm_fp8(Recorder()), torch.ones(1))
    with pytest.raises(BackendError, match="float32"):
        linear_fp8(torch.randn(1, 16), own)


@pytest.mark.parametrize("tokens", [1, 3, 130])
def test_fp4_times_fp4_is_the_reference_within_its_tolerance(tokens: int) -> None:
    weight, record = Nvfp4(*nvfp4.pack(torch.randn(136, 480))), Recorder()
    own = prepare_dense("mm_fp4", weight, mm_fp4(record), torch.full((1,), 1 / 256))
    assert isinstance(own, Nvfp4)
    x = torch.randn(tokens, 480).bfloat16()
    error = difference(linear_fp4(x, own), reference(x, weight))
    assert 0.05 < error < TOLERANCES["mm_fp4"]
    assert own.data is weight.data
    assert [len(call["a"]) for call in record.calls["mm_fp4"]] == [tokens]
    # Blocks that NVFP4 holds exactly are multiplied exactly: a largest code of 6, and a scale of 1.
    x = torch.tensor(nvfp4.E2M1)[torch.randint(0, 16, (tokens, 480))].view(tokens, -1, 16)
    x[..., 0] = 6
    x = (x.flatten(1) / 256).bfloat16()
    assert difference(linear_fp4(x, own), reference(x, weight)) < 1e-3


def test_what_fp4_times_fp4_cannot_be_given() -> None:
    weight = Nvfp4(*nvfp4.pack(torch.randn(16, 32)))
    for other in (weight, prepare_dense("native", weight, product(Recorder()))):
        with pytest.raises(BackendError, match="not prepared for mm_fp4"):
            linear_fp4(torch.randn(1, 32).bfloat16(), other)


QUANTISING = [name for name, own in DENSE.items() if own.quantises]


@pytest.fixture
def model(make_checkpoint: Callable[..., Path], backend: str) -> Examined:
    """One with matrices for the backend."""
    recipe = {Format.FP8: "super", Format.NVFP4: "nano"}[DENSE[backend].format]
    wide = {"mamba_num_heads": 16}  # so that in_proj's rows are a multiple of 16, as those released are
    return prepare(open_checkpoint(make_checkpoint(recipe=recipe, overrides=wide)), EngineConfig(device="cpu"))


@pytest.mark.parametrize("backend", QUANTISING)
def test_the_checkpoint_says_by_what_activations_are_divided(model: Examined, backend: str) -> None:
    chosen = {**model.backends, DENSE[backend].op: backend}
    fields = load(model.checkpoint, model.manifest, torch.device("cpu"), lambda done, total: None)
    library = {backend: lambda: LIBRARIES[backend](Recorder())}
    grown = with_dense(fields, model.manifest, chosen, model.checkpoint, library)
    weights = [grown[place] for place in grown if grown[place] is not fields[place]]
    assert len(weights) > 4
    for weight in weights:
        own, scale = weight.prepared.activations, weight.scale if isinstance(weight, Fp8) else weight.global_scale
        written = {"mm_fp8": 0.02, "mm_fp4": 0.002}[backend]
        assert own.divisor.tolist() == pytest.approx([written])
        assert own.alpha.tolist() == pytest.approx([written * float(scale)])
        assert float(own.multiplier) == pytest.approx(1 / written)


@pytest.mark.parametrize("backend", QUANTISING)
def test_what_it_cannot_multiply_by_is_refused_before_a_weight_is_read(model: Examined, backend: str) -> None:
    chosen = {**model.backends, DENSE[backend].op: backend}
    silent = replace(model.manifest, unused=())
    with pytest.raises(BackendError, match=rf"{backend} quantises activations, .* it has no .*\.input_scale"):
        dense_scales(silent, chosen)
    odd = [
        replace(item, parts=(replace(item.parts[0], shape=(24, 24)), *item.parts[1:]))
        if item.format is DENSE[backend].format
        else item
        for item in model.manifest.items
    ]
    with pytest.raises(BackendError, match=rf"{backend} needs rows in multiples of .* is 24 × (24|48)"):
        dense_scales(replace(model.manifest, items=tuple(odd)), chosen)


@pytest.mark.parametrize("backend", DENSE)
@pytest.mark.parametrize("config", sorted((DATA / "released").glob("*_config.json")), ids=lambda path: path.name)
def test_every_released_size_is_one_that_it_can_multiply_by(config: Path, backend: str) -> None:
    if config.name.endswith("quant_config.json"):
        return
    released, own = NemotronHConfig.from_json(json.loads(config.read_text())), DENSE[backend]
    for _, _, entry in entries(released):
        if entry.kind is Kind.LINEAR:
            rows, columns = entry.shape(released)
            assert (rows % own.rows, columns % own.columns) == (0, 0), entry.name


@pytest.mark.parametrize("backend", DENSE)
def test_the_doctors_cases_are_within_tolerance(
    model: Examined, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, cpu = DENSE[backend], torch.device("cpu")
    stub = replace(own, load=lambda: LIBRARIES[backend](Recorder()))
    monkeypatch.setattr(op_cases, "DENSE", {backend: stub})
    subject = Subject.of(model.config, model.manifest, cpu, torch.bfloat16, torch.bfloat16)
    target, _, name = BACKENDS[own.op][backend].rpartition(":")
    function = getattr(importlib.import_module(target), name)
    found = [case for case in cases(subject) if case.op == own.op and case.tokens == 1]
    assert found
    for case in found:
        got, want = outputs(case, function, backend, 7, cpu), outputs(case, reference, "torch", 7, cpu)
        assert largest_error(got, want) <= max(case.tolerance, TOLERANCES.get(backend, 0.0))


def test_flashinfer_has_them() -> None:
    for own in DENSE.values():
        assert own.load()
