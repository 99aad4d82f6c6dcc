"""A mixture of experts for a few tokens: what reads the layer's input, the experts' two products, and the choice.

The chosen experts' numbers are read on the device. Each token reads its own experts: two tokens that share one
find it in the second cache. The weighted sum runs over the experts in the order of the choice.
"""

# Triton's types are those of its compiler, and not of the language that it compiles.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportReturnType=false, reportCallIssue=false
# pyright: reportAssignmentType=false

import triton
import triton.language as tl

from nanoserve.kernels.triton_skinny import ahead, product, project
from nanoserve.kernels.triton_tile import fetch, producers_done, release


@triton.jit
def last_of(tickets: tl.tensor, count: tl.tensor) -> tl.tensor:
    """Whether this program is the last of ``count`` with this ticket; what the others wrote can be seen then."""
    tl.debug_barrier()  # the ticket tells of what every warp of this program wrote
    last = tl.atomic_add(tickets, 1, sem="acq_rel") == count - 1
    if last:
        tl.store(tickets, 0)
    return last


@triton.jit
def gate_logits(
    block: tl.tensor,
    x: tl.tensor,
    gate: tl.tensor,
    logits: tl.tensor,
    experts: tl.tensor,
    T: tl.constexpr,
    K: tl.constexpr,
    BYTES: tl.constexpr,
    BE: tl.constexpr,
    BK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Set logits [T, experts] = x @ gate.T at one block of BE experts, float32 throughout."""
    if PDL > 0:  # it is small, and fetched whole
        fetch(gate, block * BE, experts, K * BYTES, 0, K * BYTES, BE, 32)
    x = x + producers_done(PDL)
    e = block * BE + tl.arange(0, BE)
    row = tl.minimum(e, experts - 1)
    for t in tl.static_range(T):
        acc = tl.zeros([BE, BK], tl.float32)
        for start in tl.range(0, K, BK):
            k = start + tl.arange(0, BK)
            weights = tl.load(gate + row[:, None] * K + k[None, :], mask=(k < K)[None, :], other=0.0)
            acc += weights.to(tl.float32) * tl.load(x + t * K + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
        tl.store(logits + t * experts + e, tl.sum(acc, 1), mask=e < experts)
    release(PDL)


@triton.jit
def choose(
    logits: tl.tensor,
    bias: tl.tensor,
    ids: tl.tensor,
    weights: tl.tensor,
    experts: tl.tensor,
    scale: tl.tensor,
    TOP: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """One token's TOP experts by sigmoid + bias, best first, of equals the lower number; and their weights."""
    e = tl.arange(0, BLOCK_E)
    # .cg: other multiprocessors wrote it.
    logit = tl.load(logits + e, mask=e < experts, other=0.0, cache_modifier=".cg")
    wanted = 1 / (1 + tl.exp(-logit)) + tl.load(bias + e, mask=e < experts, other=0.0)
    # As integers in the order of the floats, above the number from the end: one maximum finds value and place.
    bits = wanted.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    key = tl.where(e < experts, (ordered << 32) | (BLOCK_E - 1 - e).to(tl.int64), -(1 << 63))
    place = tl.arange(0, BLOCK_K)
    chosen = tl.zeros([BLOCK_K], tl.int32)
    for i in range(TOP):
        best = tl.max(key, 0)
        number = BLOCK_E - 1 - (best & 0xFFFFFFFF).to(tl.int32)
        chosen = tl.where(place == i, number, chosen)
        key = tl.where(e == number, -(1 << 63), key)
    own = tl.load(logits + chosen, mask=place < TOP, other=0.0, cache_modifier=".cg")
    weight = tl.where(place < TOP, 1 / (1 + tl.exp(-own)), 0.0)
    if NORMALIZE:
        weight = weight / (tl.sum(weight, 0) + 1e-20)
    tl.store(ids + place, chosen, mask=place < TOP)
    tl.store(weights + place, weight * scale, mask=place < TOP)


@triton.jit
def gate_kernel(
    x: tl.tensor,
    gate: tl.tensor,
    logits: tl.tensor,
    experts: tl.tensor,
    T: tl.constexpr,
    K: tl.constexpr,
    BYTES: tl.constexpr,
    BE: tl.constexpr,
    BK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """`gate_logits` alone; grid (blocks of BE experts)."""
    gate_logits(tl.program_id(0), x, gate, logits, experts, T, K, BYTES, BE, BK, PDL)


@triton.jit
def choose_kernel(
    logits: tl.tensor,
    bias: tl.tensor,
    ids: tl.tensor,
    weights: tl.tensor,
    experts: tl.tensor,
    scale: tl.tensor,
    TOP: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """`choose` alone; a program a token."""
    t = tl.program_id(0)
    logits = logits + t * experts + producers_done(PDL)
    choose(logits, bias, ids + t * TOP, weights + t * TOP, experts, scale, TOP, NORMALIZE, BLOCK_E, BLOCK_K)


@triton.jit
def front_kernel(
    x: tl.tensor,
    gate: tl.tensor,
    bias: tl.tensor,
    logits: tl.tensor,
    ids: tl.tensor,
    weights: tl.tensor,
    tickets: tl.tensor,
    experts: tl.tensor,
    scale: tl.tensor,
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
    T: tl.constexpr,
    K: tl.constexpr,
    BITS1: tl.constexpr,
    BITS2: tl.constexpr,
    TOP: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BYTES: tl.constexpr,
    BE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BN: tl.constexpr,
    CHUNK: tl.constexpr,
    BT: tl.constexpr,
    SLOTS: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
    ASM: tl.constexpr,
) -> None:
    """All that reads the layer's input: the router, the shared expert's first product (1), and the latent's (2).

    Grid: the router's blocks, of which the last to end chooses while others read on; then those of (1), of (2).
    """
    block = tl.program_id(0)
    gates = tl.cdiv(experts, BE)
    blocks1 = tl.cdiv(rows1, BN)
    if block < gates:
        gate_logits(block, x, gate, logits, experts, T, K, BYTES, BE, 1024, PDL)
        if last_of(tickets, gates):
            for t in range(T):
                choose(
                    logits + t * experts, bias, ids + t * TOP, weights + t * TOP, experts, scale,
                    TOP, NORMALIZE, BLOCK_E, BLOCK_K,
                )  # fmt: skip
    elif block < gates + blocks1:
        project(
            block - gates, x, K, w1, scales1, matrix_scale1, out1, rows1,
            T, K, BITS1, True, BN, CHUNK, BT, SLOTS, STAGES, AHEAD, PDL, ASM,
        )  # fmt: skip
    elif BITS2 > 0:
        project(
            block - gates - blocks1, x, K, w2, scales2, matrix_scale2, out2, rows2,
            T, K, BITS2, False, BN, CHUNK, BT, SLOTS, STAGES, AHEAD, PDL, ASM,
        )  # fmt: skip


@triton.jit
def up_kernel(
    x: tl.tensor,
    ids: tl.tensor,
    w: tl.tensor,
    scales: tl.tensor,
    matrix_scales: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    K: tl.constexpr,
    BITS: tl.constexpr,
    TOP: tl.constexpr,
    BN: tl.constexpr,
    CHUNK: tl.constexpr,
    BT: tl.constexpr,
    SLOTS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
    ASM: tl.constexpr,
) -> None:
    """Set out [T * TOP, rows] = relu(x @ w[ids].T)²; grid (blocks of BN rows, T * TOP)."""
    PER: tl.constexpr = 4 if BITS == 4 else 1  # what an element of the stored weight holds
    block, pair = tl.program_id(0), tl.program_id(1)
    zero = producers_done(PDL)
    e = tl.load(ids + pair + zero).to(tl.int64)
    project(
        block, x + pair // TOP * K + zero, K, w + e * rows * (K // PER), scales + e * rows * (K // 16),
        matrix_scales + e, out + pair * rows, rows,
        1, K, BITS, True, BN, CHUNK, BT, SLOTS, STAGES, 0, False, ASM,
    )  # fmt: skip


@triton.jit
def down_kernel(
    hidden: tl.tensor,
    ids: tl.tensor,
    weights: tl.tensor,
    w: tl.tensor,
    scales: tl.tensor,
    matrix_scales: tl.tensor,
    x2: tl.tensor,
    w2: tl.tensor,
    scales2: tl.tensor,
    matrix_scale2: tl.tensor,
    parts: tl.tensor,
    out: tl.tensor,
    stream: tl.tensor,
    tickets: tl.tensor,
    rows: tl.tensor,
    T: tl.constexpr,
    K: tl.constexpr,
    K2: tl.constexpr,
    BITS: tl.constexpr,
    BITS2: tl.constexpr,
    TOP: tl.constexpr,
    BN: tl.constexpr,
    CHUNK: tl.constexpr,
    BT: tl.constexpr,
    SLOTS: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
    ASM: tl.constexpr,
) -> None:
    """The experts' second product and weighted sum; grid (blocks of BN rows, parts, T).

    A part is an expert; the shared one is one more, unless BITS2 is 0. The last program of a block of rows adds
    the parts up in their order. Without a shared expert out [T, rows] is that sum. With one it is stream + sum +
    x2 @ w2.T, each rounded as the reference rounds it.
    """
    block, part, t = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    PER: tl.constexpr = 4 if BITS == 4 else 1  # what an element of the stored weight holds
    SHARED: tl.constexpr = BITS2 if BITS2 > 0 else 16  # without one, no program takes that way
    count: tl.constexpr = TOP + 1 if BITS2 > 0 else TOP
    n = block * BN + tl.arange(0, BN)
    if part < TOP:
        chosen = t * TOP + part
        zero = producers_done(PDL)
        e = tl.load(ids + chosen + zero).to(tl.int64)
        y = product(
            block, hidden + chosen * K + zero, K, w + e * rows * (K // PER), scales + e * rows * (K // 16),
            matrix_scales + e, rows, 1, K, BITS, BN, CHUNK, BT, SLOTS, STAGES, False, ASM,
        )  # fmt: skip
        y = y * tl.load(weights + chosen)
        release(PDL)
    else:
        ahead(block, w2, scales2, rows, K2, SHARED, BN, SLOTS, AHEAD)
        y = product(
            block, x2 + t * K2, K2, w2, scales2, matrix_scale2, rows,
            1, K2, SHARED, BN, CHUNK, BT, SLOTS, STAGES, PDL, ASM,
        )  # fmt: skip
    parts += t * count * rows
    inside = n < rows
    tl.store(parts + part * rows + n, first_column(y, BT), mask=inside)
    if last_of(tickets + t * tl.num_programs(0) + block, count):
        total = tl.zeros([BN], tl.float32)
        for i in tl.static_range(TOP):
            total += tl.load(parts + i * rows + n, mask=inside, other=0.0, cache_modifier=".cg")
        result = total.to(out.dtype.element_ty)
        if BITS2 > 0:
            shared = tl.load(parts + TOP * rows + n, mask=inside, other=0.0, cache_modifier=".cg")
            shared = shared.to(out.dtype.element_ty)
            both = (result.to(tl.float32) + shared.to(tl.float32)).to(out.dtype.element_ty)
            before = tl.load(stream + t * rows + n, mask=inside, other=0.0)
            result = (before.to(tl.float32) + both.to(tl.float32)).to(out.dtype.element_ty)
        tl.store(out + t * rows + n, result, mask=inside)


@triton.jit
def first_column(y: tl.tensor, BT: tl.constexpr) -> tl.tensor:
    """Column 0 of [BN, BT]."""
    return tl.sum(tl.where(tl.arange(0, BT)[None, :] == 0, y, 0.0), 1)
