"""NVFP4 and FP8 weights against an independent reading of the formats."""

import pytest
import torch
from hf_reference import e2m1_values, e4m3_values, expand
from torch import Tensor

from nanoserve.kernels import nvfp4
from nanoserve.kernels.fp8 import widen
from nanoserve.kernels.linear import Fp8, Nvfp4, Plain, Weight, expert, linear, linear_f32


def random_nvfp4(rows: int, width: int, *stack: int) -> Nvfp4:
    """Any bit pattern that a checkpoint may hold: all codes, positive finite scales."""
    data = torch.randint(0, 256, (*stack, rows, width // 2), dtype=torch.uint8)
    scales = torch.randint(0, 0x7F, (*stack, rows, width // 16), dtype=torch.uint8).view(torch.float8_e4m3fn)
    return Nvfp4(data, scales, torch.rand(stack) * 1e-2)


def independent(weight: Weight) -> Tensor:
    match weight:
        case Plain(data):
            tensors = {"w.weight": data}
        case Fp8(data, scale):
            tensors = {"w.weight": data, "w.weight_scale": scale}
        case Nvfp4(data, scales, global_scale):
            tensors = {"w.weight": data, "w.weight_scale": scales, "w.weight_scale_2": global_scale}
    return expand(tensors)["w.weight"]


def random_weight(kind: str, rows: int, width: int) -> Weight:
    match kind:
        case "bf16":
            return Plain(torch.randn(rows, width).bfloat16())
        case "fp8":
            values = (torch.randn(rows, width) * 100).clamp(-448, 448)  # beyond, torch 2.11 gives NaN
            return Fp8(values.to(torch.float8_e4m3fn), torch.rand(()) * 1e-2)
        case _:
            return random_nvfp4(rows, width)


def test_code_tables_are_the_formats() -> None:
    assert torch.equal(torch.tensor(nvfp4.E2M1), torch.from_numpy(e2m1_values()))
    every = torch.arange(256, dtype=torch.uint8)
    theirs, ours = torch.from_numpy(e4m3_values()), every.view(torch.float8_e4m3fn).float()
    torch.testing.assert_close(theirs, ours, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", ["bf16", "fp8", "nvfp4"])
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (64, 64), (37, 48), (1856, 2688)])
def test_rows_expand_exactly(kind: str, rows: int, width: int) -> None:
    weight = random_weight(kind, rows, width)
    assert torch.equal(weight.rows(0, rows), independent(weight))
    assert torch.equal(weight.rows(rows // 2, rows), independent(weight)[rows // 2 :])


@pytest.mark.parametrize("kind", ["bf16", "fp8", "nvfp4"])
@pytest.mark.parametrize("tokens", [1, 3, 17])
def test_linear_in_tiles_equals_the_product(kind: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanoserve.kernels.linear.TILE_BYTES", 4 * 48 * 10)  # ten rows a tile
    weight = random_weight(kind, 37, 48)
    x = torch.randn(tokens, 48)
    torch.testing.assert_close(linear(x, weight), x @ independent(weight).T, rtol=1e-5, atol=1e-5)
    half = linear(x.bfloat16(), weight)
    assert half.dtype == torch.bfloat16
    assert linear_f32(x.bfloat16(), weight).dtype == torch.float32


def test_an_expert_is_a_view_of_its_stack() -> None:
    stack = random_nvfp4(8, 32, 5)
    one = expert(stack, 3)
    assert one.data.data_ptr() == stack.data[3].data_ptr()
    assert torch.equal(one.rows(0, 8), nvfp4.unpack(stack.data[3], stack.scales[3], stack.global_scale[3]))


def test_pack_picks_the_nearest_code_and_keeps_the_nibble_order() -> None:
    weight = torch.randn(40, 64)
    packed, scales, global_scale = nvfp4.pack(weight)
    step = scales.float().repeat_interleave(16, dim=1) * global_scale
    candidates = torch.from_numpy(e2m1_values())[:, None, None] * step
    best = (candidates - weight).abs().min(dim=0).values
    error = (nvfp4.unpack(packed, scales, global_scale) - weight).abs()
    torch.testing.assert_close(error, best, rtol=1e-4, atol=1e-6)
    assert error.norm() / weight.norm() < 0.12


def test_pack_breaks_ties_towards_even_codes() -> None:
    midpoints = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5.0])
    block = torch.cat((midpoints, torch.tensor([6.0, 0.0]))).unsqueeze(0)
    values = nvfp4.unpack(*nvfp4.pack(block * 448)) / 448
    even = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0])
    torch.testing.assert_close(values[0, :14], torch.cat((even, -even)))


def test_widening_is_torchs_own_conversion_of_every_code() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(16, 16)
    for values in (codes, codes.T, codes[3:5]):
        assert torch.equal(widen(values).view(torch.int32), values.float().contiguous().view(torch.int32))
