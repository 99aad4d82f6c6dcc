"""A weight times a few tokens, at the memory's speed: y = x @ w.T on tensor cores, the weight as it is stored.

A program owns BN rows. Its SLOTS warps walk along K side by side, BK columns each a step, with copies to shared
memory STAGES - 1 steps ahead, and add up what they have at the end, in a fixed order.
"""

# Triton's types are those of its compiler, and not of the language that it compiles.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportReturnType=false, reportCallIssue=false
# pyright: reportAssignmentType=false

import triton
import triton.language as tl

from nanoserve.kernels.triton_tile import (
    CODES_DOWN,
    SCALE_UP,
    codes,
    fetch,
    producers_done,
    quarters,
    release,
    scaled,
)


@triton.jit
def step(
    acc: tl.tensor,
    x: tl.tensor,
    x_row: tl.tensor,
    w: tl.tensor,
    scales: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    T: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    BK: tl.constexpr,
    ASM: tl.constexpr,
) -> tl.tensor:
    """Add the products of BK columns from ``k`` [SLOTS] to ``acc`` [SLOTS, BN, BT].

    One token meets every column of ``acc``, so that it is copied once and not BT times.
    """
    PER: tl.constexpr = 4 if BITS == 4 else 1  # what an element of a tile holds
    e = k[:, None] // PER + tl.arange(0, BK // PER)[None, :]
    inside = e < K // PER
    t = tl.arange(0, acc.shape[2])
    at = w[:, None, None] + n[None, :, None] * (K // PER) + e[:, None, :]
    weights = tl.load(at, mask=inside[:, None, :], other=0.0)
    if T == 1:
        tokens = tl.load(x[:, None] + e, mask=inside, other=0.0)
        tokens = tl.broadcast_to(tokens[:, :, None], [acc.shape[0], BK // PER, acc.shape[2]])
    else:
        mask = inside[:, :, None] & (t < T)[None, None, :]
        tokens = tl.load(x[:, None, None] + t[None, None, :] * x_row + e[:, :, None], mask=mask, other=0.0)
    if BITS == 4:
        g = k[:, None] // 16 + tl.arange(0, BK // 16)[None, :]
        at = scales[:, None, None] + n[None, :, None] * (K // 16) + g[:, None, :]
        grid = tl.load(at, mask=(g < K // 16)[:, None, :], other=0.0)
        grid = (grid.to(tl.float32) * SCALE_UP).to(tl.bfloat16)
        grid = tl.broadcast_to(grid[:, :, :, None], [acc.shape[0], n.shape[0], BK // 16, 4])
        grid = grid.reshape([acc.shape[0], n.shape[0], BK // 4])
        four = codes(weights, ASM)
        parts = quarters(tokens, ASM)
        for i in tl.static_range(4):
            acc = tl.dot(scaled(four[i], grid, ASM), parts[i], acc)
    else:
        acc = tl.dot(weights.to(tl.float32).to(tl.bfloat16), tokens, acc)
    return acc


@triton.jit
def slot_sums(
    x: tl.tensor,
    x_row: tl.tensor,
    w: tl.tensor,
    scales: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    T: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    BK: tl.constexpr,
    STRIDE: tl.constexpr,
    BT: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
) -> tl.tensor:
    """Products x @ w.T at the rows ``n``, without the scale of the whole matrix: float32 [SLOTS, BN, BT].

    Args:
        x: a pointer a slot: [T, K], BF16; as int64 where BITS is 4.
        x_row: elements of x between two tokens.
        w: a pointer a slot: [rows, K] BF16 or FP8, int16 [rows, K / 4] where BITS is 4.
        scales: a pointer a slot: E4M3 [rows, K / 16] where BITS is 4.
        n: rows [BN].
        k: where each slot begins.
        T: tokens; with one, every column of the result holds it.
        K: columns.
        BITS: of a weight: 4, 8, 16.
        BK: columns a slot takes a step: at least 16 elements.
        STRIDE: columns between two steps of a slot.
        BT: room for tokens: at least 8.
        STAGES: of the copies.
        ASM: PTX may be used.
    """
    acc = tl.zeros([k.shape[0], n.shape[0], BT], tl.float32)
    for start in tl.range(0, K, STRIDE, num_stages=STAGES):
        acc = step(acc, x, x_row, w, scales, n, start + k, T, K, BITS, BK, ASM)
    if BITS == 4:
        acc = acc * CODES_DOWN
    return acc


@triton.jit
def ahead(
    block: tl.tensor,
    w: tl.tensor,
    scales: tl.tensor,
    rows: tl.tensor,
    K: tl.constexpr,
    BITS: tl.constexpr,
    BN: tl.constexpr,
    SLOTS: tl.constexpr,
    AHEAD: tl.constexpr,
) -> None:
    """Begin to fetch what `product` will read first, AHEAD bytes of each row: no launch writes a weight."""
    if AHEAD > 0:
        fetch(w, block * BN, rows, K * BITS // 8, 0, tl.minimum(K * BITS // 8, AHEAD), BN, SLOTS * 32)
        if BITS == 4:
            fetch(scales, block * BN, rows, K // 16, 0, tl.minimum(K // 16, AHEAD // 8), BN, SLOTS * 32)


@triton.jit
def product(
    block: tl.tensor,
    x: tl.tensor,
    x_row: tl.tensor,
    w: tl.tensor,
    scales: tl.tensor,
    matrix_scale: tl.tensor,
    rows: tl.tensor,
    T: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    BN: tl.constexpr,
    CHUNK: tl.constexpr,
    BT: tl.constexpr,
    SLOTS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
    ASM: tl.constexpr,
) -> tl.tensor:
    """Products x @ w.T at the ``block``-th BN rows, float32 [BN, BT]; CHUNK bytes of a row a slot and step.

    x is BF16 [T, K]; it may still be in the making by the launch before, where PDL is on.
    """
    BK: tl.constexpr = CHUNK * 8 // BITS
    first = block * BN
    if BITS < 16:
        factor = tl.load(matrix_scale)
    x = x + producers_done(PDL)
    n = tl.minimum(first + tl.arange(0, BN), rows - 1)
    slot = tl.arange(0, SLOTS)
    if BITS == 4:
        x = x.to(tl.pointer_type(tl.int64))
        x_row = x_row // 4
    y = slot_sums(
        x + slot * 0, x_row, w + slot * 0, scales + slot * 0, n, slot * BK,
        T, K, BITS, BK, SLOTS * BK, BT, STAGES, ASM,
    )  # fmt: skip
    release(PDL)
    y = tl.sum(y, 0)
    if BITS < 16:
        y = y * factor
    return y


@triton.jit
def project(
    block: tl.tensor,
    x: tl.tensor,
    x_row: tl.tensor,
    w: tl.tensor,
    scales: tl.tensor,
    matrix_scale: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    T: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    SQUARED: tl.constexpr,
    BN: tl.constexpr,
    CHUNK: tl.constexpr,
    BT: tl.constexpr,
    SLOTS: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
    ASM: tl.constexpr,
) -> None:
    """Set out [T, rows] = x @ w.T at one block of rows, or relu(x @ w.T)² of the rounded product with SQUARED."""
    ahead(block, w, scales, rows, K, BITS, BN, SLOTS, AHEAD)
    y = product(block, x, x_row, w, scales, matrix_scale, rows, T, K, BITS, BN, CHUNK, BT, SLOTS, STAGES, PDL, ASM)
    y = y.to(out.dtype.element_ty)
    if SQUARED:
        y = tl.maximum(y.to(tl.float32), 0.0)
        y = (y * y).to(out.dtype.element_ty)
    n = block * BN + tl.arange(0, BN)
    t = tl.arange(0, BT)
    mask = (t < T)[None, :] & (n < rows)[:, None]
    tl.store(out + t[None, :] * rows + n[:, None], y, mask=mask)


@triton.jit
def linears_kernel(
    x: tl.tensor,
    x_row: tl.tensor,
    w1: tl.tensor,
    scales1: tl.tensor,
    matrix_scale1: tl.tensor,
    out1: tl.tensor,
    rows1: tl.tensor,
    w2: tl.tensor,
    scales2: tl.tensor,
    matrix_scale2: tl.tensor,
    out2: tl.tensor,
    rows2: tl.tensor,
    w3: tl.tensor,
    scales3: tl.tensor,
    matrix_scale3: tl.tensor,
    out3: tl.tensor,
    rows3: tl.tensor,
    T: tl.constexpr,
    K: tl.constexpr,
    BITS1: tl.constexpr,
    BITS2: tl.constexpr,
    BITS3: tl.constexpr,
    SQUARED1: tl.constexpr,
    BN: tl.constexpr,
    CHUNK: tl.constexpr,
    BT: tl.constexpr,
    SLOTS: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
    ASM: tl.constexpr,
) -> None:
    """Up to three weights over the same tokens; grid: their blocks of BN rows in turn. BITS 0 says: no weight."""
    block = tl.program_id(0)
    blocks1, blocks2 = tl.cdiv(rows1, BN), tl.cdiv(rows2, BN)
    if BITS2 == 0 or block < blocks1:
        project(
            block, x, x_row, w1, scales1, matrix_scale1, out1, rows1,
            T, K, BITS1, SQUARED1, BN, CHUNK, BT, SLOTS, STAGES, AHEAD, PDL, ASM,
        )  # fmt: skip
    elif block < blocks1 + blocks2:
        project(
            block - blocks1, x, x_row, w2, scales2, matrix_scale2, out2, rows2,
            T, K, BITS2, False, BN, CHUNK, BT, SLOTS, STAGES, AHEAD, PDL, ASM,
        )  # fmt: skip
    elif BITS3 > 0:
        project(
            block - blocks1 - blocks2, x, x_row, w3, scales3, matrix_scale3, out3, rows3,
            T, K, BITS3, False, BN, CHUNK, BT, SLOTS, STAGES, AHEAD, PDL, ASM,
        )  # fmt: skip
