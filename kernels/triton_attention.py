"""`nanoserve.kernels.attention` in Triton, for a few tokens of one sequence: KV append and paged decode attention.

The context is split among programs, whose partial results a second launch combines in a fixed order. How long it
is stands in device memory (``positions``), so that a CUDA graph serves at any: the grid does not depend on it, and
programs for which nothing is left return at once.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoserve.kernels.attention import LayerKV
from nanoserve.kernels.tiles import Tile, dependent, launch, power_of_two, tile_of
from nanoserve.kernels.triton_tile import producers_done

EARLY = 3
"""How early the launches here let the next one begin: see `producers_done`."""


@triton.jit
def _stored(x: tl.tensor, scale: tl.tensor, FP8: tl.constexpr) -> tl.tensor:
    """A value as the cache keeps it, but for the last conversion."""
    x = x.to(tl.float32)
    if FP8:
        x = tl.div_rn(x, tl.zeros_like(x) + scale)
        # Clamped as torch does it, which lets NaN pass.
        x = tl.minimum(tl.maximum(x, -448.0, tl.PropagateNan.ALL), 448.0, tl.PropagateNan.ALL)
    return x


@triton.jit
def append_kernel(
    k: tl.tensor,
    v: tl.tensor,
    k_row: tl.tensor,
    v_row: tl.tensor,
    k_pages: tl.tensor,
    v_pages: tl.tensor,
    page_table: tl.tensor,
    positions: tl.tensor,
    k_scale: tl.tensor,
    v_scale: tl.tensor,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    FP8: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Grid (tokens,); WIDTH is kv_heads * head_dim."""
    token = tl.program_id(0)
    place = tl.arange(0, BLOCK)
    inside = place < WIDTH
    position = tl.load(positions + token)
    page = tl.load(page_table + position // PAGE).to(tl.int64)
    zero = producers_done(PDL)
    k, v = k + zero, v + zero
    target = (page * PAGE + position % PAGE) * WIDTH + place
    keys = _stored(tl.load(k + token * k_row + place, mask=inside, other=0.0), k_scale, FP8)
    tl.store(k_pages + target, keys.to(k_pages.dtype.element_ty), mask=inside)
    values = _stored(tl.load(v + token * v_row + place, mask=inside, other=0.0), v_scale, FP8)
    tl.store(v_pages + target, values.to(v_pages.dtype.element_ty), mask=inside)


@triton.jit
def _share(length: tl.tensor, BLOCK: tl.constexpr, SPLITS: tl.constexpr) -> tl.tensor:
    """Positions that each split takes, whole blocks."""
    return tl.cdiv(tl.cdiv(length, BLOCK), SPLITS) * BLOCK


@triton.jit
def split_kernel(
    q: tl.tensor,
    k_pages: tl.tensor,
    v_pages: tl.tensor,
    page_table: tl.tensor,
    positions: tl.tensor,
    sums: tl.tensor,
    tops: tl.tensor,
    weights: tl.tensor,
    scale: tl.tensor,
    TOKENS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Grid (kv_heads, SPLITS). Row r of a KV head's tile is query head r % GROUP of token r // GROUP.

    Leaves per split and row: ``tops``, the largest score; ``weights``, the sum of 2^(score - top); and ``sums``
    [kv_heads, SPLITS, TOKENS * GROUP, DIM], the values weighted so. ``scale`` has log2(e) in it.
    """
    head, split = tl.program_id(0), tl.program_id(1)
    first = tl.load(positions).to(tl.int32)
    length = first + TOKENS
    share = _share(length, BLOCK, SPLITS)
    start = split * share
    zero = producers_done(PDL)
    if start >= length:
        return
    q, k_pages, v_pages = q + zero, k_pages + zero, v_pages + zero
    end = tl.minimum(start + share, length)
    rows, d = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    token, member = rows // GROUP, rows % GROUP
    real, inside = rows < TOKENS * GROUP, d < DIM
    place = ((token * KV_HEADS + head) * GROUP + member)[:, None] * DIM + d[None, :]
    queries = tl.load(q + place, mask=real[:, None] & inside[None, :], other=0.0)
    last = first + token  # the last position that a row sees
    top = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for at in tl.range(start, end, BLOCK, num_stages=STAGES):
        position = at + tl.arange(0, BLOCK)
        there = position < end
        page = tl.load(page_table + position // PAGE, mask=there, other=0).to(tl.int64)
        kv = ((page * PAGE + position % PAGE) * KV_HEADS + head) * DIM
        block = there[:, None] & inside[None, :]
        keys = tl.load(k_pages + kv[:, None] + d[None, :], mask=block, other=0.0).to(queries.dtype)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where(there[None, :] & (position[None, :] <= last[:, None]), scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        # A row that sees nothing yet has -inf here, and -inf - -inf is no number.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        weight = weight * shrink + tl.sum(p, axis=1)
        values = tl.load(v_pages + kv[:, None] + d[None, :], mask=block, other=0.0).to(queries.dtype)
        # In two parts, for BF16 alone would round the probabilities to three digits.
        high = p.to(queries.dtype)
        total = tl.dot(high, values, total * shrink[:, None], input_precision="ieee")
        if queries.dtype != tl.float32:
            low = (p - high.to(tl.float32)).to(queries.dtype)
            total = tl.dot(low, values, total, input_precision="ieee")
        top = new_top
    out = (head * SPLITS + split) * (TOKENS * GROUP) + rows
    tl.store(tops + out, top, mask=real)
    tl.store(weights + out, weight, mask=real)
    tl.store(sums + out[:, None] * DIM + d[None, :], total, mask=real[:, None] & inside[None, :])


@triton.jit
def combine_kernel(
    positions: tl.tensor,
    sums: tl.tensor,
    tops: tl.tensor,
    weights: tl.tensor,
    out: tl.tensor,
    v_scale: tl.tensor,
    TOKENS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Grid (tokens, heads): the splits of one row, in their order."""
    token, query = tl.program_id(0), tl.program_id(1)
    head, member = query // GROUP, query % GROUP
    length = tl.load(positions).to(tl.int32) + TOKENS
    used = tl.cdiv(length, _share(length, BLOCK, SPLITS))
    zero = producers_done(PDL)
    sums, tops, weights = sums + zero, tops + zero, weights + zero
    split, d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    row = (head * SPLITS + split) * (TOKENS * GROUP) + token * GROUP + member
    top = tl.load(tops + row, mask=split < used, other=float("-inf"))
    part = tl.exp2(top - tl.max(top, axis=0))
    weight = tl.sum(part * tl.load(weights + row, mask=split < used, other=0.0), axis=0)
    both = (split < used)[:, None] & (d < DIM)[None, :]
    values = tl.load(sums + row[:, None] * DIM + d[None, :], mask=both, other=0.0)
    mixed = tl.sum(values * part[:, None], axis=0) / weight * v_scale
    target = (token * KV_HEADS * GROUP + query) * DIM + d
    tl.store(out + target, mixed.to(out.dtype.element_ty), mask=d < DIM)


def kv_append(k: Tensor, v: Tensor, cache: LayerKV, page_table: Tensor, positions: Tensor) -> None:
    """As `nanoserve.kernels.attention.kv_append`."""
    tokens, heads, dim = k.shape
    width = heads * dim
    launch(
        append_kernel, (tokens,),
        k, v, k.stride(0), v.stride(0), cache.k, cache.v, page_table, positions, cache.k_scale, cache.v_scale,
        width, cache.k.shape[1], power_of_two(width), cache.k.dtype == torch.float8_e4m3fn,
        num_warps=4, **dependent(k.device, early=EARLY),
    )  # fmt: skip


def attention_decode(
    q: Tensor, k: Tensor, v: Tensor, cache: LayerKV, page_table: Tensor, positions: Tensor
) -> Tensor:
    """As `nanoserve.kernels.attention.attention_decode`, in three launches."""
    kv_append(k, v, cache, page_table, positions)
    return attend(q, cache, page_table, positions)


def attend(q: Tensor, cache: LayerKV, page_table: Tensor, positions: Tensor, tile: Tile | None = None) -> Tensor:
    """As `nanoserve.kernels.attention.attention`; ``tile`` overrides the chip's."""
    tile = tile or tile_of("attention_decode", q.device)
    tokens, heads, dim = q.shape
    page, kv_heads = cache.k.shape[1:3]
    group, splits = heads // kv_heads, max(1, tile["programs"] // kv_heads)
    q = q.contiguous()
    parts = (kv_heads, splits, tokens * group)
    tops, weights = (torch.empty(parts, dtype=torch.float32, device=q.device) for _ in range(2))
    sums = torch.empty((*parts, dim), dtype=torch.float32, device=q.device)
    out = torch.empty_like(q)
    block_d, rows = max(16, power_of_two(dim)), max(16, power_of_two(tokens * group))
    block, warps = (tile["block"], tile["warps"]) if rows <= 32 else (tile["wide_block"], tile["wide_warps"])
    launch(
        split_kernel, (kv_heads, splits,),
        q, cache.k, cache.v, page_table, positions, sums, tops, weights,
        cache.k_scale * math.log2(math.e) / math.sqrt(dim),
        tokens, kv_heads, group, dim, page, splits, rows, block, block_d, tile["stages"], num_warps=warps,
        **dependent(q.device, early=EARLY),
    )  # fmt: skip
    launch(
        combine_kernel, (tokens, heads,),
        positions, sums, tops, weights, out, cache.v_scale,
        tokens, kv_heads, group, dim, splits, block, power_of_two(splits), block_d, num_warps=8,
        **dependent(q.device, early=EARLY),
    )  # fmt: skip
    return out
