"""`nanoserve.kernels.mamba` in Triton: one launch a layer, the recurrence's state read once and written once.

A program owns some rows of one head's state. The norm needs every program of a group, so each takes a ticket when
its rows are done, and the last one ends the group: it shifts the convolution's inputs that all of them read (B and
C), and normalises in a fixed order, so the result does not depend on which one was last.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoserve.kernels.mamba import MambaState, MambaWeights
from nanoserve.kernels.tiles import Tile, blocks, dependent, launch, power_of_two, tile_of
from nanoserve.kernels.triton_tile import producers_done


@triton.jit
def _input(
    projected: tl.tensor,
    row: tl.tensor,
    skip: tl.tensor,
    state: tl.tensor,
    channel: tl.tensor,
    mask: tl.tensor,
    token: tl.tensor,
    WIDTH: tl.constexpr,
) -> tl.tensor:
    """The convolution's input at a token, from the state where it lies before token 0; float32, which is exact."""
    before = tl.load(state + channel * (WIDTH - 1) + token + WIDTH - 1, mask=mask & (token < 0), other=0.0)
    now = tl.load(projected + token * row + skip + channel, mask=mask & (token >= 0), other=0.0)
    return before.to(tl.float32) + now.to(tl.float32)


@triton.jit
def _conv(
    projected: tl.tensor,
    row: tl.tensor,
    skip: tl.tensor,
    state: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    channel: tl.tensor,
    mask: tl.tensor,
    token: tl.tensor,
    WIDTH: tl.constexpr,
) -> tl.tensor:
    """silu(conv) of a token at some channels, rounded as the reference rounds it; float32."""
    total = tl.load(bias + channel, mask=mask, other=0.0)
    for tap in tl.static_range(WIDTH):  # pyright: ignore[reportGeneralTypeIssues]
        value = _input(projected, row, skip, state, channel, mask, token + tap - (WIDTH - 1), WIDTH)
        total += value * tl.load(weight + channel * WIDTH + tap, mask=mask, other=0.0)
    out = total / (1 + tl.exp(-total))
    return out.to(projected.dtype.element_ty).to(tl.float32)  # pyright: ignore[reportAttributeAccessIssue]


@triton.jit
def _shift(
    projected: tl.tensor,
    row: tl.tensor,
    skip: tl.tensor,
    state: tl.tensor,
    channel: tl.tensor,
    mask: tl.tensor,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """Move some channels' inputs on: slot j of the state takes what lies TOKENS further, so j goes up."""
    for slot in tl.static_range(WIDTH - 1):  # pyright: ignore[reportGeneralTypeIssues]
        value = _input(projected, row, skip, state, channel, mask, slot + TOKENS - (WIDTH - 1), WIDTH)
        tl.store(state + channel * (WIDTH - 1) + slot, value.to(state.dtype.element_ty), mask=mask)


@triton.jit
def softplus(x: tl.tensor) -> tl.tensor:
    """max(x, 0) + log1p(exp(-|x|)), with log1p(e) = 2 atanh(e / (2 + e)), whose argument is in [0, 1/3]."""
    e = tl.exp(-tl.abs(x))
    s = e / (2 + e)
    q = s * s
    series = 1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13 + q / 15))))))
    return tl.maximum(x, 0.0) + 2 * s * series


@triton.jit
def _end_group(
    group: tl.tensor,
    projected: tl.tensor,
    row: tl.tensor,
    conv_state: tl.tensor,
    norm: tl.tensor,
    gated: tl.tensor,
    out: tl.tensor,
    eps: tl.tensor,
    TOKENS: tl.constexpr,
    INNER: tl.constexpr,
    STATES: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
) -> None:
    """The group's norm over what its heads left in ``gated``, and the shift of its B and C."""
    size: tl.constexpr = INNER // GROUPS
    place = tl.arange(0, BLOCK_G)
    inside = place < size
    weight = tl.load(norm + group * size + place, mask=inside, other=0.0)
    for t in range(TOKENS):
        # .cg: other multiprocessors wrote it, and this one's first cache may hold what was there before.
        value = tl.load(gated + t * INNER + group * size + place, mask=inside, other=0.0, cache_modifier=".cg")
        scale = tl.rsqrt(tl.sum(value * value, axis=0) / size + eps)
        target = out + t * INNER + group * size + place
        tl.store(target, (value * scale * weight).to(out.dtype.element_ty), mask=inside)
    n = tl.arange(0, BLOCK_N)
    for part in tl.static_range(2):  # pyright: ignore[reportGeneralTypeIssues]
        channel = INNER + (part * GROUPS + group) * STATES + n
        _shift(projected, row, INNER, conv_state, channel, n < STATES, TOKENS, WIDTH)


@triton.jit
def mamba_kernel(
    projected: tl.tensor,
    row: tl.tensor,
    conv_weight: tl.tensor,
    conv_bias: tl.tensor,
    conv_state: tl.tensor,
    a_log: tl.tensor,
    d: tl.tensor,
    dt_bias: tl.tensor,
    state: tl.tensor,
    norm: tl.tensor,
    gated: tl.tensor,
    out: tl.tensor,
    tickets: tl.tensor,
    eps: tl.tensor,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    STATES: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
    FUSED: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Grid (heads, blocks of BLOCK_P rows). Without FUSED, `norm_kernel` must follow."""
    head, block = tl.program_id(0), tl.program_id(1)
    inner: tl.constexpr = HEADS * SIZE
    channels: tl.constexpr = inner + 2 * GROUPS * STATES
    group = head // (HEADS // GROUPS)
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    rows, columns = p < SIZE, n < STATES
    place = state + (head * SIZE + p)[:, None] * STATES + n[None, :]
    both = rows[:, None] & columns[None, :]
    # First, for it is the long way; and in front of the wait: what wrote it belongs to another step.
    s = tl.load(place, mask=both, other=0.0)
    decay_rate = -tl.exp(tl.load(a_log + head))
    skip_weight, bias = tl.load(d + head), tl.load(dt_bias + head)
    projected += producers_done(PDL)
    x_channel = head * SIZE + p
    b_channel = inner + group * STATES + n
    c_channel = inner + (GROUPS + group) * STATES + n
    for t in range(TOKENS):
        x = _conv(projected, row, inner, conv_state, conv_weight, conv_bias, x_channel, rows, t, WIDTH)
        b = _conv(projected, row, inner, conv_state, conv_weight, conv_bias, b_channel, columns, t, WIDTH)
        c = _conv(projected, row, inner, conv_state, conv_weight, conv_bias, c_channel, columns, t, WIDTH)
        dt = softplus(tl.load(projected + t * row + inner + channels + head).to(tl.float32) + bias)
        s = s * tl.exp(dt * decay_rate) + (x * dt)[:, None] * b[None, :]
        y = tl.sum(s * c[None, :], axis=1) + x * skip_weight
        y = y.to(projected.dtype.element_ty).to(tl.float32)
        z = tl.load(projected + t * row + x_channel, mask=rows, other=0.0).to(tl.float32)
        tl.store(gated + t * inner + x_channel, y * (z / (1 + tl.exp(-z))), mask=rows)
    tl.store(place, s, mask=both)
    tl.debug_barrier()  # every warp has read the convolution's state, and written its rows
    _shift(projected, row, inner, conv_state, x_channel, rows, TOKENS, WIDTH)
    if FUSED:
        ticket = tl.atomic_add(tickets + group, 1, sem="acq_rel")
        if ticket == (HEADS // GROUPS) * tl.num_programs(1) - 1:
            _end_group(
                group, projected, row, conv_state, norm, gated, out, eps,
                TOKENS, inner, STATES, GROUPS, WIDTH, BLOCK_N, BLOCK_G,
            )  # fmt: skip
            tl.store(tickets + group, 0)


@triton.jit
def norm_kernel(
    projected: tl.tensor,
    row: tl.tensor,
    conv_state: tl.tensor,
    norm: tl.tensor,
    gated: tl.tensor,
    out: tl.tensor,
    eps: tl.tensor,
    TOKENS: tl.constexpr,
    INNER: tl.constexpr,
    STATES: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Grid (groups,): the second launch of a `mamba_kernel` that is not FUSED."""
    gated += producers_done(PDL)
    _end_group(
        tl.program_id(0), projected, row, conv_state, norm, gated, out, eps,
        TOKENS, INNER, STATES, GROUPS, WIDTH, BLOCK_N, BLOCK_G,
    )  # fmt: skip


def mamba_decode(projected: Tensor, weights: MambaWeights, state: MambaState, tile: Tile | None = None) -> Tensor:
    """As `nanoserve.kernels.mamba.mamba_decode`; ``tile`` overrides the chip's."""
    tile = tile or tile_of("mamba_decode", projected.device)
    heads, size, states = state.ssm.shape
    tokens, inner, width = len(projected), heads * size, weights.conv.shape[1]
    groups = (len(weights.conv) - inner) // (2 * states)
    gated = torch.empty((tokens, inner), dtype=torch.float32, device=projected.device)
    out = torch.empty((tokens, inner), dtype=projected.dtype, device=projected.device)
    block_n, block_g = power_of_two(states), power_of_two(inner // groups)
    block_p = min(tile["block_p"], power_of_two(size))
    launch(
        mamba_kernel, (heads, blocks(size, block_p),),
        projected, projected.stride(0), weights.conv, weights.conv_bias, state.conv,
        weights.ssm.a_log, weights.ssm.d, weights.ssm.dt_bias, state.ssm, weights.norm,
        gated, out, state.tickets, weights.eps,
        tokens, heads, size, states, groups, width, block_p, block_n, block_g, bool(tile["fused"]),
        num_warps=tile["warps"], **dependent(out.device),
    )  # fmt: skip
    if not tile["fused"]:
        launch(
            norm_kernel, (groups,),
            projected, projected.stride(0), state.conv, weights.norm, gated, out, weights.eps,
            tokens, inner, states, groups, width, block_n, block_g, num_warps=4, **dependent(out.device),
        )  # fmt: skip
    return out
