"""A weight times many tokens: y = x @ w.T, the stored weight expanded tile by tile, on its way to tensor cores."""

# Triton's types are those of its compiler, and not of the language that it compiles.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportReturnType=false, reportCallIssue=false
# pyright: reportAssignmentType=false

import triton
import triton.language as tl

from nanoserve.kernels.triton_tile import CODES_DOWN, SCALE_UP, codes, scaled


@triton.jit
def gemm_kernel(
    x: tl.tensor,
    w: tl.tensor,
    scales: tl.tensor,
    matrix_scale: tl.tensor,
    out: tl.tensor,
    tokens: tl.tensor,
    rows: tl.tensor,
    K: tl.constexpr,
    BITS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BT: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
) -> None:
    """Set out [tokens, rows] = x @ w.T; grid (blocks of BT tokens, blocks of BN rows).

    x is BF16 [tokens, K]; where BITS is 4, [4, tokens, K / 4] with x[i, t, e] the token's value at k = 4 e + i, as
    the codes of a stored element lie.
    """
    PER: tl.constexpr = 4 if BITS == 4 else 1  # what an element of a stored row holds
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    row = tl.minimum(n, rows - 1).to(tl.int64)
    token = tl.minimum(t, tokens - 1).to(tl.int64)
    acc = tl.zeros([BN, BT], tl.float32)
    for start in tl.range(0, K // PER, BK // PER, num_stages=STAGES):
        e = start + tl.arange(0, BK // PER)
        inside = e < K // PER
        weights = tl.load(w + row[:, None] * (K // PER) + e[None, :], mask=inside[None, :], other=0.0)
        if BITS == 4:
            g = start // 4 + tl.arange(0, BK // 16)
            grid = tl.load(scales + row[:, None] * (K // 16) + g[None, :], mask=(g < K // 16)[None, :], other=0.0)
            grid = (grid.to(tl.float32) * SCALE_UP).to(tl.bfloat16)
            grid = tl.broadcast_to(grid[:, :, None], [BN, BK // 16, 4]).reshape([BN, BK // 4])
            four = codes(weights, ASM)
            for i in tl.static_range(4):
                plane = x + tokens.to(tl.int64) * (K // 4) * i
                part = tl.load(plane + token[None, :] * (K // 4) + e[:, None], mask=inside[:, None], other=0.0)
                acc = tl.dot(scaled(four[i], grid, ASM), part, acc)
        else:
            part = tl.load(x + token[None, :] * K + e[:, None], mask=inside[:, None], other=0.0)
            acc = tl.dot(weights.to(tl.float32).to(tl.bfloat16), part, acc)
    if BITS == 4:
        acc = acc * CODES_DOWN
    if BITS < 16:
        acc = acc * tl.load(matrix_scale)
    mask = (t < tokens)[None, :] & (n < rows)[:, None]
    tl.store(out + t.to(tl.int64)[None, :] * rows + n[:, None], acc.to(out.dtype.element_ty), mask=mask)
