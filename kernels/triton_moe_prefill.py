"""The routed experts over many tokens: products grouped by expert, on tensor cores.

A pair is a (token, choice), numbered token * k + choice. Pairs are sorted by their expert on the device; a program
takes up to BT pairs of one expert and BN rows of that expert's matrix. The host knows only how many such blocks
there can be at most; programs past the last return at once. Weights are read as stored and become operands in
registers; the other operand, the tokens, comes through shared memory.
"""

# Triton's types are those of its compiler, and not of the language that it compiles.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportReturnType=false, reportCallIssue=false
# pyright: reportAssignmentType=false

import triton
import triton.language as tl

from nanoserve.kernels.triton_tile import CODES_DOWN, SCALE_UP, codes, scaled


@triton.jit(do_not_specialize=["tokens", "pairs"])
def grouped_kernel(
    x: tl.tensor,
    w: tl.tensor,
    scales: tl.tensor,
    matrix_scale: tl.tensor,
    order: tl.tensor,
    starts: tl.tensor,
    block_ends: tl.tensor,
    out: tl.tensor,
    tokens: tl.tensor,
    pairs: tl.tensor,
    rows: tl.tensor,
    K: tl.constexpr,
    E: tl.constexpr,
    CHOICES: tl.constexpr,
    BITS: tl.constexpr,
    UP: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BT: tl.constexpr,
    BE: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
) -> None:
    """Grid (blocks of BN rows, blocks of BT pairs).

    Where UP: out = relu(w x)² as BF16, in the order of the experts, x [tokens, K] in that of the tokens.
    Else: out = w x as float32, in the order of the pairs, x [pairs, K] in that of the experts.
    Where BITS is 4, x is [4, tokens or pairs, K / 4], x[i, t, e] being the value at k = 4 e + i, as the codes of a
    stored element lie; and an UP's out is so, too.

    order: int32 [pairs], the pair at each place among the sorted;
    starts: int32 [E + 1], each expert's first place;
    block_ends: int32 [E], blocks of all experts up to this one.
    """
    block = tl.program_id(1)
    every = tl.arange(0, BE)
    ends = tl.load(block_ends + every, mask=every < E, other=1 << 30)
    expert = tl.sum((ends <= block).to(tl.int32), 0)
    if expert >= E:
        return
    first = tl.load(starts + expert)
    before = tl.sum(tl.where(every == expert - 1, ends, 0), 0)
    place = first + (block - before) * BT + tl.arange(0, BT)
    there = place < tl.load(starts + expert + 1)
    pair = tl.load(order + place, mask=there, other=0)
    source = tl.where(there, pair // CHOICES if UP else place, 0).to(tl.int64)

    PER: tl.constexpr = 4 if BITS == 4 else 1  # what an element of a stored row holds
    row = tl.arange(0, BN)
    if UP and BITS == 4:  # in the order in which they are written
        row = (row % (BN // 4)) * 4 + row // (BN // 4)
    n = tl.program_id(0) * BN + row
    at = expert.to(tl.int64) * rows + tl.minimum(n, rows - 1)
    acc = tl.zeros([BN, BT], tl.float32)
    sources = tokens if UP else pairs
    for start in tl.range(0, K // PER, BK // PER, num_stages=STAGES):
        e = start + tl.arange(0, BK // PER)
        inside = e < K // PER
        weights = tl.load(w + at[:, None] * (K // PER) + e[None, :], mask=inside[None, :], other=0.0)
        if BITS == 4:
            g = start // 4 + tl.arange(0, BK // 16)
            grid = tl.load(scales + at[:, None] * (K // 16) + g[None, :], mask=(g < K // 16)[None, :], other=0.0)
            grid = (grid.to(tl.float32) * SCALE_UP).to(tl.bfloat16)
            grid = tl.broadcast_to(grid[:, :, None], [BN, BK // 16, 4]).reshape([BN, BK // 4])
            four = codes(weights, ASM)
            for i in tl.static_range(4):
                plane = x + sources.to(tl.int64) * (K // 4) * i
                part = tl.load(plane + source[None, :] * (K // 4) + e[:, None], mask=inside[:, None], other=0.0)
                acc = tl.dot(scaled(four[i], grid, ASM), part, acc)
        else:
            part = tl.load(x + source[None, :] * K + e[:, None], mask=inside[:, None], other=0.0)
            acc = tl.dot(weights.to(tl.float32).to(tl.bfloat16), part, acc)
    if BITS == 4:
        acc = acc * CODES_DOWN
    if BITS < 16:
        acc = acc * tl.load(matrix_scale + expert)
    mask = there[None, :] & (n < rows)[:, None]
    if UP:
        acc = acc.to(tl.bfloat16).to(tl.float32)  # as where a linear layer and relu² are two ops
        acc = tl.maximum(acc, 0.0)
        value = (acc * acc).to(tl.bfloat16)
        if BITS == 4:
            plane = (n % 4).to(tl.int64) * pairs * (rows // 4) + n // 4
            tl.store(out + place.to(tl.int64)[None, :] * (rows // 4) + plane[:, None], value, mask=mask)
        else:
            tl.store(out + place.to(tl.int64)[None, :] * rows + n[:, None], value, mask=mask)
    else:
        tl.store(out + pair.to(tl.int64)[None, :] * rows + n[:, None], acc, mask=mask)


@triton.jit
def choices_kernel(
    parts: tl.tensor,
    weights: tl.tensor,
    out: tl.tensor,
    width: tl.tensor,
    CHOICES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Grid (tokens, blocks of the width): out = sum of a token's parts by their weights, in the choice's order."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for choice in range(CHOICES):
        pair = token * CHOICES + choice
        part = tl.load(parts + pair * width + n, mask=n < width, other=0.0).to(tl.float32)
        total += part * tl.load(weights + pair)
    tl.store(out + token * width + n, total.to(tl.bfloat16), mask=n < width)
