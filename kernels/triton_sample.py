"""`nanoserve.kernels.sample` in Triton: two launches for greedy and plain draws, and no sort for truncated ones.

What the request wants stands in device memory (`SamplerState.knobs`), so a CUDA graph draws for any request; only
which truncations there are is known when it is captured.

top_k and top_p keep the scores from some value up: top_k where fewer than k are larger, top_p where the larger
ones have less than p of the mass. That value is searched for among the scores' bit patterns, which order as they
do: each pair of launches weighs what lies above `_BINS` points of the interval that is left, and takes the part
between two of them. Sums are taken in a fixed order.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoserve.kernels.sample import GREEDY_BELOW, RING, SamplerState
from nanoserve.kernels.tiles import Tile, blocks, launch, power_of_two, tile_of

_BINS = 64
_NARROWINGS = 6
"""By `_BINS` each, from 2^32 bit patterns down to one."""


@triton.jit
def _knob(knobs: tl.tensor, INDEX: tl.constexpr) -> tl.tensor:
    """A number of `SamplerState.knobs`, in its order."""
    return tl.load(knobs + INDEX).to(tl.float32)


@triton.jit
def _mix(x: tl.tensor) -> tl.tensor:
    """The reference's hash, in uint32."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _noise(token: tl.tensor, knobs: tl.tensor, step: tl.tensor) -> tl.tensor:
    """The reference's Gumbel noise of some tokens."""
    low, high = tl.load(knobs + 8).to(tl.uint32), tl.load(knobs + 9).to(tl.uint32)
    key = _mix(_mix(tl.load(step).to(tl.uint32) ^ _mix(low)) ^ high)
    bits = _mix(token.to(tl.uint32) ^ key)
    uniform = ((bits >> 9).to(tl.float32) + 0.5) * (1.0 / 8388608)
    return -tl.log(-tl.log(uniform))


@triton.jit
def _best(value: tl.tensor, token: tl.tensor, best: tl.tensor, index: tl.tensor) -> None:
    """Leave the block's largest value and its lowest token."""
    top = tl.max(value, axis=0)
    tl.store(best + tl.program_id(0), top)
    tl.store(index + tl.program_id(0), tl.min(tl.where(value == top, token, 0x7FFFFFFF), axis=0))


@triton.jit
def score_kernel(
    logits: tl.tensor,
    bias: tl.tensor,
    seen: tl.tensor,
    counts: tl.tensor,
    ends: tl.tensor,
    allowed: tl.tensor,
    knobs: tl.tensor,
    step: tl.tensor,
    scores: tl.tensor,
    best: tl.tensor,
    index: tl.tensor,
    bad: tl.tensor,
    greedy_below: tl.tensor,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    TRUNCATED: tl.constexpr,
    RESTRICTED: tl.constexpr,
) -> None:
    """Grid (blocks,): bias, penalties, masks, temperature; the block's best, with noise if nothing truncates."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < VOCAB
    x = tl.load(logits + token, mask=inside, other=0.0)
    tl.store(bad + tl.program_id(0), tl.max(((x != x) | (tl.abs(x) == float("inf"))).to(tl.int32), axis=0))
    temperature, repetition = _knob(knobs, 0), _knob(knobs, 4)
    presence, frequency = _knob(knobs, 5), _knob(knobs, 6)
    x += tl.load(bias + token, mask=inside & (_knob(knobs, 10) != 0), other=0.0)
    old = tl.load(seen + token, mask=inside & (repetition != 1), other=0)
    x = tl.where(old != 0, tl.where(x > 0, tl.div_rn(x, tl.zeros_like(x) + repetition), x * repetition), x)
    count = tl.load(counts + token, mask=inside & ((presence != 0) | (frequency != 0)), other=0.0)
    x -= tl.where(count > 0, presence, 0.0) + frequency * count
    early = tl.load(step) < tl.load(knobs + 7).to(tl.int64)
    end = tl.load(ends + token, mask=inside & early, other=0)
    x = tl.where((end != 0) | (token >= VOCAB), float("-inf"), x)
    if RESTRICTED:
        word = tl.load(allowed + token // 32, mask=inside, other=0)
        x = tl.where((word >> (token % 32)) & 1 != 0, x, float("-inf"))
    greedy = temperature < greedy_below
    x = tl.div_rn(x, tl.zeros_like(x) + tl.where(greedy, 1.0, temperature))
    if TRUNCATED:
        tl.store(scores + token, x, mask=inside)
    else:
        x += tl.where(greedy, 0.0, _noise(token, knobs, step))
    _best(x, token, best, index)


@triton.jit
def _key(x: tl.tensor) -> tl.tensor:
    """An int32 that orders as the float32 does."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def begin_kernel(
    best: tl.tensor,
    knobs: tl.tensor,
    top: tl.tensor,
    bounds: tl.tensor,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program: the largest score, and what min_p keeps. ``bounds`` is low, high and floor, int64 keys."""
    block = tl.arange(0, BLOCK)
    largest = tl.max(tl.load(best + block, mask=block < COUNT, other=float("-inf")), axis=0)
    tl.store(top, largest)
    tl.store(bounds + 2, _key(largest + _knob(knobs, 3)).to(tl.int64))
    tl.store(bounds, tl.full([], -(1 << 31), tl.int64))
    tl.store(bounds + 1, tl.full([], (1 << 31) - 1, tl.int64))


@triton.jit
def _points(bounds: tl.tensor, BINS: tl.constexpr) -> tl.tensor:
    """The last keys of the interval's BINS parts; all of the last ones are the interval's end."""
    low, high = tl.load(bounds), tl.load(bounds + 1)
    step = tl.cdiv(high - low + 1, BINS)
    return tl.minimum(low + (tl.arange(0, BINS) + 1) * step - 1, high)


@triton.jit
def weigh_kernel(
    scores: tl.tensor,
    top: tl.tensor,
    bounds: tl.tensor,
    above: tl.tensor,
    totals: tl.tensor,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    BINS: tl.constexpr,
    MASS: tl.constexpr,
) -> None:
    """Grid (blocks,): what the block has above each point: tokens, or with MASS their e^(score - top)."""
    point, floor, largest = _points(bounds, BINS).to(tl.int32), tl.load(bounds + 2), tl.load(top)
    sums = tl.zeros([BINS], tl.float32)
    total = 0.0
    for start in range(0, BLOCK, CHUNK):
        token = tl.program_id(0) * BLOCK + start + tl.arange(0, CHUNK)
        x = tl.load(scores + token, mask=token < VOCAB, other=float("-inf"))
        key = _key(x)
        weight = tl.where(key.to(tl.int64) >= floor, tl.exp(x - largest) if MASS else 1.0, 0.0)
        weight = tl.where(x == float("-inf"), 0.0, weight)
        sums += tl.sum(tl.where(key[:, None] > point[None, :], weight[:, None], 0.0), axis=0)
        total += tl.sum(weight, axis=0)
    tl.store(above + tl.program_id(0) * BINS + tl.arange(0, BINS), sums)
    tl.store(totals + tl.program_id(0), total)


@triton.jit
def narrow_kernel(
    knobs: tl.tensor,
    bounds: tl.tensor,
    above: tl.tensor,
    totals: tl.tensor,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
    MASS: tl.constexpr,
    LAST: tl.constexpr,
) -> None:
    """One program: take the part whose last key is the first with less than the target above it."""
    block, number = tl.arange(0, BLOCK)[:, None], tl.arange(0, BINS)
    sums = tl.sum(tl.load(above + block * BINS + number[None, :], mask=block < COUNT, other=0.0), axis=0)
    target = _knob(knobs, 1)
    if MASS:
        blocks = tl.arange(0, BLOCK)
        target = _knob(knobs, 2) * tl.sum(tl.load(totals + blocks, mask=blocks < COUNT, other=0.0), axis=0)
    # Nothing lies above the largest of all keys, so some point has less than the target.
    part = tl.min(tl.where(sums < target, number, BINS - 1), axis=0)
    low, high = tl.load(bounds), tl.load(bounds + 1)
    step = tl.cdiv(high - low + 1, BINS)
    high = tl.minimum(low + (part + 1) * step - 1, high)
    low = low + part * step
    if LAST:  # the next search begins with what this one keeps
        tl.store(bounds + 2, tl.maximum(tl.load(bounds + 2), low))
        low, high = tl.full([], -(1 << 31), tl.int64), tl.full([], (1 << 31) - 1, tl.int64)
    tl.store(bounds, low)
    tl.store(bounds + 1, high)


@triton.jit
def pick_kernel(
    scores: tl.tensor,
    bounds: tl.tensor,
    knobs: tl.tensor,
    step: tl.tensor,
    best: tl.tensor,
    index: tl.tensor,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Grid (blocks,): the block's best of what is kept, with noise."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(scores + token, mask=token < VOCAB, other=float("-inf"))
    x = tl.where(_key(x).to(tl.int64) >= tl.load(bounds + 2), x, float("-inf"))
    _best(x + _noise(token, knobs, step), token, best, index)


@triton.jit
def note_kernel(
    best: tl.tensor,
    index: tl.tensor,
    bad: tl.tensor,
    seen: tl.tensor,
    counts: tl.tensor,
    step: tl.tensor,
    drawn: tl.tensor,
    out: tl.tensor,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    RING_SIZE: tl.constexpr,
) -> None:
    """One program: the best of the blocks, noted in the state."""
    block = tl.arange(0, BLOCK)
    value = tl.load(best + block, mask=block < COUNT, other=float("-inf"))
    token = tl.load(index + block, mask=block < COUNT, other=0x7FFFFFFF)
    choice = tl.min(tl.where(value == tl.max(value, axis=0), token, 0x7FFFFFFF), axis=0)
    fine = tl.max(tl.load(bad + block, mask=block < COUNT, other=0), axis=0) == 0
    count = tl.load(step)
    tl.store(counts + choice, tl.load(counts + choice, mask=fine, other=0.0) + 1, mask=fine)
    tl.store(seen + choice, 1, mask=fine)
    result = tl.where(fine, choice, -1).to(tl.int64)
    tl.store(drawn + count % RING_SIZE, result)
    tl.store(step, count + 1)
    tl.store(out, result)


def sample(logits: Tensor, state: SamplerState, out: Tensor, tile: Tile | None = None) -> None:
    """As `nanoserve.kernels.sample.sample`; ``tile`` overrides the chip's."""
    tile = tile or tile_of("sample", logits.device)
    vocab, block, warps = len(logits), tile["block"], tile["warps"]
    count = blocks(vocab, block)

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    best, index, bad = scratch(count), scratch(count, dtype=torch.int32), scratch(count, dtype=torch.int32)
    truncations = state.truncations
    scores = scratch(vocab) if truncations else best
    launch(
        score_kernel, (count,),
        logits, state.bias, state.seen, state.counts, state.ends, state.allowed, state.knobs, state.step, scores,
        best, index, bad, GREEDY_BELOW, vocab, block, bool(truncations), state.restricted, num_warps=warps,
    )  # fmt: skip
    if truncations:
        bounds = scratch(3, dtype=torch.int64)
        _search(scores, best, bounds, state, scratch, tile)
        launch(
            pick_kernel, (count,),
            scores, bounds, state.knobs, state.step, best, index, vocab, block, num_warps=warps,
        )  # fmt: skip
    launch(
        note_kernel, (1,),
        best, index, bad, state.seen, state.counts, state.step, state.drawn, out,
        count, power_of_two(count), RING, num_warps=1,
    )  # fmt: skip


def _search(
    scores: Tensor, best: Tensor, bounds: Tensor, state: SamplerState, scratch: Callable[..., Tensor], tile: Tile
) -> None:
    """Leave in ``bounds`` from where up scores are kept."""
    vocab, count, block = len(scores), len(best), tile["block"]
    top, above, totals = scratch(1), scratch(count, _BINS), scratch(count)
    launch(begin_kernel, (1,), best, state.knobs, top, bounds, count, power_of_two(count), num_warps=1)
    for mass in (name == "top_p" for name in state.truncations if name != "min_p"):
        for number in range(1, _NARROWINGS + 1):
            launch(
                weigh_kernel, (count,),
                scores, top, bounds, above, totals, vocab, block, tile["chunk"], _BINS, mass,
                num_warps=tile["warps"],
            )  # fmt: skip
            launch(
                narrow_kernel, (1,),
                state.knobs, bounds, above, totals, count, power_of_two(count), _BINS, mass, number == _NARROWINGS,
                num_warps=8,
            )  # fmt: skip
