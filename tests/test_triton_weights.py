"""The Triton kernels that read weights, interpreted, against their references; and their assembly's arithmetic."""

from collections.abc import Callable

import interpreted  # before any kernel
import numpy as np
import ptx
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from nanoserve.errors import BackendError
from nanoserve.kernels import fused, moe, norm, nvfp4, router, triton_experts, triton_linear, triton_tile
from nanoserve.kernels.fused import MoeWeights, Norm
from nanoserve.kernels.linear import Fp8, Nvfp4, Plain, Weight, linear, linear_f32
from nanoserve.kernels.weight_tiles import SHARED, Cut, Tile, fitted, shared_bytes, untuned

assert interpreted
BF16 = torch.bfloat16
FORMATS = ("nvfp4", "fp8", "bf16")


def weight(form: str, *shape: int) -> Weight:
    """A random weight, or a stack of them."""
    values = torch.randn(*shape) / shape[-1] ** 0.5
    match form:
        case "nvfp4":
            packed = [nvfp4.pack(matrix) for matrix in values.view(-1, *shape[-2:])]
            data, scales, global_scale = (torch.stack(parts) for parts in zip(*packed, strict=True))
            leading = shape[:-2]
            return Nvfp4(
                data.view(*leading, *data.shape[-2:]),
                scales.view(*leading, *scales.shape[-2:]),
                global_scale.view(leading),
            )
        case "fp8":
            scale = values.abs().amax(dim=(-1, -2)) / 448
            return Fp8((values / scale[..., None, None]).to(torch.float8_e4m3fn), scale)
        case _:
            return Plain(values.to(BF16))


def tokens(*shape: int) -> Tensor:
    return (torch.randn(*shape) * 3).to(BF16)


def always(tile: Tile) -> Cut:
    """The same tile for every weight."""

    def cut(bits: int, rows: int, columns: int, device: torch.device, *, tokens: int = 1, copies: int = 1) -> Tile:
        return fitted(tile, bits, tokens)

    return cut


def same(got: Tensor, want: Tensor) -> None:
    """Equal but for float32 sums in another order, and for BF16 values that round to the one beside for it."""
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    error = float((got.double() - want.double()).norm() / want.double().norm())
    assert error < (1e-6 if got.dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("count", [1, 3, 8, 16, 17, 70])
def test_linear_and_head_at_odd_sizes(form: str, count: int) -> None:
    w, x = weight(form, 37, 272), tokens(count, 272)
    same(triton_linear.linear(x, w), linear(x, w))
    same(triton_linear.linear_f32(x, w), linear_f32(x, w))


@pytest.mark.parametrize("form", ["fp8", "bf16"])
@pytest.mark.parametrize("count", [1, 5, 33])
def test_a_width_that_nothing_divides(form: str, count: int) -> None:
    w, x = weight(form, 21, 37), tokens(count, 37)
    same(triton_linear.linear_f32(x, w), linear_f32(x, w))


@pytest.mark.parametrize("count", [1, 4, 20])
def test_several_weights_of_other_formats_over_the_same_tokens(count: int) -> None:
    weights = (weight("nvfp4", 40, 96), weight("bf16", 7, 96), weight("fp8", 18, 96))
    arguments = tokens(count, 96), Norm(1 + 0.1 * torch.randn(96), 1e-5), weights
    for got, want in zip(triton_linear.norm_linears(*arguments), fused.norm_linears(*arguments), strict=True):
        same(got, want)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("count", [1, 3, 18])
def test_a_layers_end_adds_to_the_stream(form: str, count: int) -> None:
    w, x, stream = weight(form, 48, 80), tokens(count, 80), tokens(count, 48)
    before, want = stream.clone(), fused.linear_add(x, w, stream)
    for tile in (Tile(slots=2, chunk=64), Tile(slots=1, chunk=64)):
        same(triton_linear.linears_add(x, w, None, None, stream, cut=always(tile)), want)
    assert torch.equal(stream, before)


@pytest.mark.parametrize("count", [1, 2, 30])
def test_norm_and_dense_layers(count: int) -> None:
    x, before = tokens(count, 80), Norm(1 + 0.1 * torch.randn(80), 1e-5)
    same(triton_linear.norm(x, before.weight, before.eps), norm.norm(x, before.weight, before.eps))
    up, down = weight("nvfp4", 112, 80), weight("nvfp4", 80, 112)
    same(triton_linear.mlp_add(x, before, up, down), fused.mlp_add(x, before, up, down))


@pytest.mark.parametrize("gate_type", [torch.float32, BF16])
@pytest.mark.parametrize(("experts", "top_k", "normalize"), [(128, 6, True), (512, 22, True), (11, 3, False)])
def test_router_chooses_as_the_reference(
    experts: int, top_k: int, normalize: bool, gate_type: torch.dtype
) -> None:
    x, gate = tokens(3, 72), (torch.randn(experts, 72) / 24).to(gate_type)
    bias = torch.randn(experts) * 0.2
    ids, weights = triton_experts.router(x, gate, bias, top_k, 2.5, normalize)
    want_ids, want = router.router(x, gate, bias, top_k, 2.5, normalize)
    assert torch.equal(ids, want_ids)
    assert_close(weights, want, rtol=1e-5, atol=1e-6)


def test_of_equal_scores_the_lower_expert_comes_first() -> None:
    """torch.topk promises no order of equals, so the wanted values are compared, and the order told here."""
    x, bias = tokens(2, 32), torch.zeros(20)
    gate = torch.randn(4, 32).repeat(5, 1) / 10
    bias[[3, 7, 11]] = -0.5
    ids, weights = triton_experts.router(x, gate, bias, 9, 1.0, False)
    _, want = router.router(x, gate, bias, 9, 1.0, False)
    scores = torch.sigmoid(x.float() @ gate.T) + bias
    for token in range(2):
        order = sorted(range(20), key=lambda e, token=token: (-round(float(scores[token, e]), 5), e))
        assert ids[token].tolist() == order[:9]
    assert_close(weights, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("form", "count"), [("nvfp4", 1), ("nvfp4", 8), ("fp8", 2), ("bf16", 3)])
def test_experts_that_tokens_share_or_choose_twice(form: str, count: int) -> None:
    up, down = weight(form, 9, 32, 48), weight(form, 9, 48, 32)
    x, weights = tokens(count, 48), torch.rand(count, 3)
    ids = torch.tensor([8, 0, 8]).repeat(count, 1).int()
    same(triton_experts.experts(x, ids, weights, up, down), moe.experts(x, ids, weights, up, down))


def moe_case(count: int, shared: str, latent: int | None) -> tuple[Tensor, Norm, MoeWeights]:
    hidden, experts, size = 48, 20, 32
    weights = MoeWeights(
        gate=torch.randn(experts, hidden) / 7,
        bias=torch.randn(experts) * 0.1,
        top_k=3,
        scale=2.5,
        normalize=True,
        up=weight("nvfp4", experts, size, latent or hidden),
        down=weight("nvfp4", experts, latent or hidden, size),
        shared_up=weight(shared, 80, hidden),
        shared_down=weight(shared, hidden, 80),
        latent_in=weight("bf16", latent, hidden) if latent else None,
        latent_out=weight("fp8", hidden, latent) if latent else None,
        tickets=torch.zeros(fused.tickets(hidden), dtype=torch.int32),
    )
    return tokens(count, hidden), Norm(1 + 0.1 * torch.randn(hidden), 1e-5), weights


@pytest.mark.parametrize(("count", "shared", "latent"), [(1, "nvfp4", None), (3, "fp8", 32), (8, "bf16", None)])
def test_a_mixture_of_experts_is_the_reference(count: int, shared: str, latent: int | None) -> None:
    stream, before, weights = moe_case(count, shared, latent)
    want = fused.moe_add(stream, before, weights)
    first = triton_experts.moe_add(stream, before, weights)
    same(first, want)
    assert torch.equal(triton_experts.moe_add(stream, before, weights), first)
    same(triton_experts.moe_add(stream, before, weights, cut=always(Tile(slots=4, chunk=64))), want)
    assert not weights.tickets.any()


def test_many_tokens_take_the_reference() -> None:
    case = moe_case(20, "nvfp4", None)
    assert torch.equal(triton_experts.moe_add(*case), fused.moe_add(*case))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: triton_linear.linear(torch.randn(1, 32), Plain(tokens(4, 32))), ("torch.float32", "bfloat16")),
        (lambda: triton_linear.linear(tokens(1, 32), Plain(torch.randn(4, 32))), ("torch.float32", "NVFP4")),
    ],
)
def test_other_types_are_refused_with_a_remedy(call: Callable[[], Tensor], words: tuple[str, ...]) -> None:
    with pytest.raises(BackendError) as caught:
        call()
    assert all(word in str(caught.value) for word in (*words, "choose torch"))


def every_block() -> tuple[Tensor, Tensor]:
    """All 256 bytes of two codes, in rows with every scale that a checkpoint may hold."""
    scales = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    return torch.arange(256, dtype=torch.uint8).repeat(127, 1), scales.unsqueeze(1).repeat(1, 32)


def test_every_code_and_scale_is_expanded_exactly() -> None:
    data, scales = every_block()
    w = Nvfp4(data, scales, torch.tensor(1.0))
    assert torch.equal(
        triton_linear.linear_f32(torch.eye(512).to(BF16), w), nvfp4.unpack(data, scales, w.global_scale).T
    )


def bf16_pairs(words: list[ptx.Words]) -> Tensor:
    """32-bit words of two BF16 each, as [words, numbers, 2]."""
    halves = torch.from_numpy(np.stack([word.astype(np.uint32) for word in words]).view(np.uint16).copy())
    return halves.view(BF16).view(len(words), -1, 2)


def test_the_assembly_expands_every_code_and_scale_exactly() -> None:
    data, scales = every_block()
    # Two elements of two bytes each in a register; a byte's codes must not depend on the bytes beside it.
    noise = torch.randint(0, 256, (256, 4), dtype=torch.uint8)
    for place in range(4):
        packed = noise.clone()
        packed[:, place] = data[0]
        words = packed.numpy().copy().view(np.uint32)[:, 0].astype(np.uint64)
        four = bf16_pairs(ptx.run(triton_tile.CODES.value, 4, [words]))  # [code, byte, element]
        codes = torch.tensor(nvfp4.E2M1)[torch.stack((data[0] & 15, data[0] >> 4)).int()]
        got = four[2 * (place % 2) : 2 * (place % 2) + 2, :, place // 2]
        assert torch.equal(got.float() * 2.0**126, codes)
        up = (scales[:, :1].float() * triton_tile.SCALE_UP.value).to(BF16)
        product = got.unsqueeze(1) * up  # BF16, as the kernel multiplies
        assert torch.equal(
            product.double() * triton_tile.CODES_DOWN.value, codes.double().unsqueeze(1) * scales[:, :1].double()
        )


def test_the_assembly_takes_activations_apart_in_their_order() -> None:
    x = tokens(64, 8)
    words = torch.from_numpy(x.view(torch.int64).numpy().view(np.uint64)).T.numpy()
    four = bf16_pairs(ptx.run(triton_tile.QUARTERS.value, 4, [words[0], words[1]]))
    want = torch.stack([torch.stack((x[:, i], x[:, 4 + i]), dim=1) for i in range(4)])
    assert torch.equal(four.view(torch.int16), want.view(torch.int16))


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("count", [1, 8, 16])
def test_tiles_fit_the_shared_memory(bits: int, count: int) -> None:
    for tile in (untuned(bits, 2688, 4096, 1), Tile(chunk=256, slots=8, stages=5), Tile(rows=32, slots=8)):
        assert shared_bytes(fitted(tile, bits, count), bits, count) <= SHARED
    assert untuned(bits, 2688, 4096, 1).slots == 8
    assert untuned(bits, 131072, 2688, 1).slots == 1
