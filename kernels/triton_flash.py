"""`nanoserve.kernels.attention` in Triton for many tokens of one sequence, over pages, on tensor cores."""

# Triton's types are those of its compiler, and not of the language that it compiles.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportReturnType=false, reportCallIssue=false
# pyright: reportAssignmentType=false

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoserve.kernels.attention import LayerKV
from nanoserve.kernels.prefill_checks import checked_rows
from nanoserve.kernels.prefill_tiles import tiles_on
from nanoserve.kernels.tiles import blocks, launch, power_of_two


@triton.jit(do_not_specialize=["tokens"])
def flash_kernel(
    q: tl.tensor,
    q_row: tl.tensor,
    k_pages: tl.tensor,
    v_pages: tl.tensor,
    page_table: tl.tensor,
    positions: tl.tensor,
    out: tl.tensor,
    scale: tl.tensor,
    v_scale: tl.tensor,
    tokens: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """Grid (heads, blocks of BLOCK_Q tokens), the last tokens first, for they see the most.

    How long the context is stands in device memory. ``scale`` has log2(e) in it.
    """
    query = tl.program_id(0)
    head = query // (HEADS // KV_HEADS)
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    t, d = block * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    first = tl.load(positions).to(tl.int32)
    end = first + tl.minimum((block + 1) * BLOCK_Q, tokens)
    own = first + t
    real, inside = t < tokens, d < DIM
    place = t.to(tl.int64)[:, None] * q_row + query * DIM + d[None, :]
    queries = tl.load(q + place, mask=real[:, None] & inside[None, :], other=0.0)
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_Q], tl.float32)
    total = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for at in tl.range(0, end, BLOCK, num_stages=STAGES):
        position = at + tl.arange(0, BLOCK)
        there = position < end
        page = tl.load(page_table + position // PAGE, mask=there, other=0).to(tl.int64)
        kv = ((page * PAGE + position % PAGE) * KV_HEADS + head) * DIM
        mask = there[:, None] & inside[None, :]
        keys = tl.load(k_pages + kv[:, None] + d[None, :], mask=mask, other=0.0).to(tl.bfloat16)
        scores = tl.dot(queries, tl.trans(keys)) * scale
        # Position 0 is in the first block and every query sees it: top is a number from then on.
        scores = tl.where(position[None, :] <= own[:, None], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        p = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        weight = weight * shrink + tl.sum(p, axis=1)
        values = tl.load(v_pages + kv[:, None] + d[None, :], mask=mask, other=0.0).to(tl.bfloat16)
        total = tl.dot(p.to(tl.bfloat16), values, total * shrink[:, None])
        top = new_top
    target = t.to(tl.int64)[:, None] * (HEADS * DIM) + query * DIM + d[None, :]
    mixed = total * (v_scale / weight)[:, None]
    tl.store(out + target, mixed.to(tl.bfloat16), mask=real[:, None] & inside[None, :])


def attention_prefill(
    q: Tensor, cache: LayerKV, page_table: Tensor, positions: Tensor, tile: tuple[int, int, int, int] | None = None
) -> Tensor:
    """As `nanoserve.kernels.attention.attention`; ``tile`` overrides the chip's.

    The weights of the values are rounded to BF16, as the result is.
    """
    most, block, warps, stages = tile or tiles_on(q.device).attention
    tokens, heads, dim = q.shape
    page, kv_heads = cache.k.shape[1:3]
    rows, out = checked_rows(q.flatten(1)), torch.empty((tokens, heads, dim), dtype=q.dtype, device=q.device)
    block_q = min(most, max(16, power_of_two(tokens)))
    launch(
        flash_kernel, (heads, blocks(tokens, block_q)),
        rows, rows.stride(0), cache.k, cache.v, page_table, positions, out,
        cache.k_scale * math.log2(math.e) / math.sqrt(dim), cache.v_scale, tokens,
        HEADS=heads, KV_HEADS=kv_heads, DIM=dim, PAGE=page, BLOCK_Q=block_q, BLOCK=block,
        BLOCK_D=max(16, power_of_two(dim)), STAGES=stages, num_warps=warps if block_q >= 64 else 4,
    )  # fmt: skip
    return out
