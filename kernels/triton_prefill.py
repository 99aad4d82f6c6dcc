"""Convolution and gated norm of a Mamba-2 layer over many tokens, in Triton: a launch each."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoserve.kernels.prefill_checks import checked_rows
from nanoserve.kernels.prefill_tiles import tiles_on
from nanoserve.kernels.tiles import blocks, launch, power_of_two


@triton.jit
def _silu(x: tl.tensor) -> tl.tensor:
    """X / (1 + exp(-x)), without a power that overflows."""
    e = tl.exp(-tl.abs(x))
    return x * tl.where(x < 0, e, 1.0) / (1 + e)


@triton.jit(do_not_specialize=["tokens"])
def conv_kernel(
    x: tl.tensor,
    x_row: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    state: tl.tensor,
    out: tl.tensor,
    tokens: tl.tensor,
    channels: tl.tensor,
    WIDTH: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
) -> None:
    """Grid (blocks of BC channels, blocks of BT tokens).

    Of the programs of a channel only the first block's touches the state: it reads what was before, and writes
    what is after, whose numbers it finds in x however long that is. So none reads what another one writes.
    """
    first = tl.program_id(1) == 0
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    real = c < channels
    total = tl.zeros([BT, BC], tl.float32) + tl.load(bias + c, mask=real, other=0.0)[None, :]
    for tap in tl.static_range(WIDTH):  # pyright: ignore[reportGeneralTypeIssues]
        source = t + tap - (WIDTH - 1)
        mask = ((source >= 0) & (source < tokens))[:, None] & real[None, :]
        value = tl.load(x + source.to(tl.int64)[:, None] * x_row + c[None, :], mask=mask, other=0.0)
        value = value.to(tl.float32)
        if first:
            before = (source < 0)[:, None] & real[None, :]
            held = state + c[None, :] * (WIDTH - 1) + (source + WIDTH - 1)[:, None]
            value += tl.load(held, mask=before, other=0.0).to(tl.float32)
        total += value * tl.load(weight + c * WIDTH + tap, mask=real, other=0.0)[None, :]
    total = _silu(total)
    mask = (t < tokens)[:, None] & real[None, :]
    place = out + t.to(tl.int64)[:, None] * channels + c[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=mask)  # pyright: ignore[reportAttributeAccessIssue]
    if first:
        tl.debug_barrier()  # every warp has read the state
        for slot in tl.static_range(WIDTH - 1):  # pyright: ignore[reportGeneralTypeIssues]
            # Slot j takes what lies ``tokens`` further, so j goes up.
            at = slot + tokens - (WIDTH - 1)
            new = tl.load(x + at.to(tl.int64) * x_row + c, mask=real & (at >= 0), other=0.0).to(tl.float32)
            slots = state + c * (WIDTH - 1) + slot
            new += tl.load(slots + tokens, mask=real & (at < 0), other=0.0).to(tl.float32)
            tl.store(slots, new.to(state.dtype.element_ty), mask=real)  # pyright: ignore[reportAttributeAccessIssue]


@triton.jit
def gated_norm_kernel(
    y: tl.tensor,
    y_row: tl.tensor,
    gate: tl.tensor,
    gate_row: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    eps: tl.tensor,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Grid (tokens, groups)."""
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n = tl.arange(0, BLOCK)
    inside = n < SIZE
    place = group * SIZE + n
    z = tl.load(gate + token * gate_row + place, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(y + token * y_row + place, mask=inside, other=0.0).to(tl.float32) * _silu(z)
    value = value * tl.rsqrt(tl.sum(value * value, axis=0) / SIZE + eps)
    value = value * tl.load(weight + place, mask=inside, other=0.0)
    target = out + token * (GROUPS * SIZE) + place
    tl.store(target, value.to(out.dtype.element_ty), mask=inside)  # pyright: ignore[reportAttributeAccessIssue]


def conv_prefill(
    x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, tile: tuple[int, int, int] | None = None
) -> Tensor:
    """As `nanoserve.kernels.conv.conv`; ``tile`` overrides the chip's."""
    tokens_block, channels_block, warps = tile or tiles_on(x.device).conv
    x, (tokens, channels) = checked_rows(x), x.shape
    out = torch.empty((tokens, channels), dtype=x.dtype, device=x.device)
    launch(
        conv_kernel, (blocks(channels, channels_block), blocks(tokens, tokens_block)),
        x, x.stride(0), weight, bias, state, out, tokens, channels,
        WIDTH=weight.shape[1], BT=tokens_block, BC=channels_block, num_warps=warps,
    )  # fmt: skip
    return out


def gated_norm(y: Tensor, gate: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """As `nanoserve.kernels.norm.gated_norm`."""
    y, gate, (tokens, width) = checked_rows(y), checked_rows(gate), y.shape
    out = torch.empty((tokens, width), dtype=gate.dtype, device=y.device)
    size = width // groups
    launch(
        gated_norm_kernel, (tokens, groups),
        y, y.stride(0), gate, gate.stride(0), weight, out, eps,
        SIZE=size, GROUPS=groups, BLOCK=power_of_two(size), num_warps=4 if size > 256 else 1,
    )  # fmt: skip
    return out
