"""What ends a layer: its output joins the residual stream, which is normalised for the next layer.

The norm needs every row of the stream, so each program takes a ticket when its rows are written, and the last one
normalises them all, in a fixed order: the result does not depend on which one was last.
"""

# Triton's types are those of its compiler, and not of the language that it compiles.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportReturnType=false, reportCallIssue=false
# pyright: reportAssignmentType=false

import triton
import triton.language as tl

from nanoserve.kernels.triton_skinny import ahead, product
from nanoserve.kernels.triton_tile import producers_done


@triton.jit
def join(
    delta: tl.tensor,
    n: tl.tensor,
    stream: tl.tensor,
    new: tl.tensor,
    rows: tl.tensor,
    T: tl.constexpr,
    BT: tl.constexpr,
) -> None:
    """Set new = stream + delta at rows ``n`` of T tokens; ``delta`` [BN, BT] is rounded already."""
    t = tl.arange(0, BT)
    mask = (t < T)[None, :] & (n < rows)[:, None]
    at = t[None, :] * rows + n[:, None]
    total = tl.load(stream + at, mask=mask, other=0.0).to(tl.float32) + delta.to(tl.float32)
    tl.store(new + at, total.to(new.dtype.element_ty), mask=mask)


@triton.jit
def normalise(
    x: tl.tensor, weight: tl.tensor, out: tl.tensor, size: tl.tensor, eps: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """Out = x / sqrt(mean(x²) + eps) * weight over one token."""
    at = tl.arange(0, BLOCK)
    inside = at < size
    # .cg: other multiprocessors wrote it, and this one's first cache may hold what was there before.
    value = tl.load(x + at, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
    root = tl.rsqrt(tl.sum(value * value, 0) / size + eps)
    y = value * root * tl.load(weight + at, mask=inside, other=0.0)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def last_of(tickets: tl.tensor, count: tl.tensor) -> tl.tensor:
    """Whether this program is the last of ``count`` with this ticket; what the others wrote can be seen then."""
    tl.debug_barrier()  # the ticket tells of what every warp of this program wrote
    last = tl.atomic_add(tickets, 1, sem="acq_rel") == count - 1
    if last:
        tl.store(tickets, 0)
    return last


@triton.jit
def normalise_if_last(
    x: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    size: tl.tensor,
    eps: tl.tensor,
    tickets: tl.tensor,
    programs: tl.tensor,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """`normalise` T tokens if this is the last of so many programs to come here; tickets is 0 again after that."""
    if last_of(tickets, programs):
        for t in range(T):
            normalise(x + t * size, weight, out + t * size, size, eps, BLOCK)


@triton.jit
def add_norm_kernel(
    x: tl.tensor,
    delta: tl.tensor,
    weight: tl.tensor,
    new: tl.tensor,
    normed: tl.tensor,
    size: tl.tensor,
    eps: tl.tensor,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A program a token: new = x + delta (with ADD), normed = its norm."""
    start = tl.program_id(0).to(tl.int64) * size + producers_done(PDL)
    at = tl.arange(0, BLOCK)
    inside = at < size
    total = tl.load(x + start + at, mask=inside, other=0.0)
    if ADD:
        more = tl.load(delta + start + at, mask=inside, other=0.0)
        total = (total.to(tl.float32) + more.to(tl.float32)).to(new.dtype.element_ty)
        tl.store(new + start + at, total, mask=inside)
    value = total.to(tl.float32)
    root = tl.rsqrt(tl.sum(value * value, 0) / size + eps)
    y = value * root * tl.load(weight + at, mask=inside, other=0.0)
    tl.store(normed + start + at, y.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def ended(
    delta: tl.tensor,
    n: tl.tensor,
    stream: tl.tensor,
    new: tl.tensor,
    weight: tl.tensor,
    normed: tl.tensor,
    tickets: tl.tensor,
    rows: tl.tensor,
    eps: tl.tensor,
    T: tl.constexpr,
    FUSED: tl.constexpr,
    BLOCK: tl.constexpr,
    BT: tl.constexpr,
) -> None:
    """`join`, and with FUSED `normalise_if_last`; a program a block of rows comes here."""
    join(delta, n, stream, new, rows, T, BT)
    if FUSED:
        normalise_if_last(new, weight, normed, rows, eps, tickets, tl.num_programs(0), T, BLOCK)


@triton.jit
def linear_add_norm_kernel(
    x1: tl.tensor,
    w1: tl.tensor,
    scales1: tl.tensor,
    matrix_scale1: tl.tensor,
    x2: tl.tensor,
    w2: tl.tensor,
    scales2: tl.tensor,
    matrix_scale2: tl.tensor,
    sums: tl.tensor,
    stream: tl.tensor,
    new: tl.tensor,
    weight: tl.tensor,
    normed: tl.tensor,
    tickets: tl.tensor,
    block_tickets: tl.tensor,
    rows: tl.tensor,
    eps: tl.tensor,
    T: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
    SPAN1: tl.constexpr,
    SPAN2: tl.constexpr,
    BITS1: tl.constexpr,
    BITS2: tl.constexpr,
    PARTS: tl.constexpr,
    FUSED: tl.constexpr,
    BLOCK: tl.constexpr,
    BN: tl.constexpr,
    CHUNK: tl.constexpr,
    BT: tl.constexpr,
    SLOTS: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
    ASM: tl.constexpr,
) -> None:
    """Set new = stream + x1 @ w1.T (+ x2 @ w2.T, unless BITS2 is 0), normed = its norm, with FUSED.

    Grid (blocks of BN rows, PARTS): programs that share a block's columns, SPAN of them each, leave their sums in
    ``sums`` [2, PARTS, T, rows], and the last of them adds these up in their order.
    """
    block, part = tl.program_id(0), tl.program_id(1)
    n, t = block * BN + tl.arange(0, BN), tl.arange(0, BT)
    at = t[None, :] * rows + n[:, None]
    mask = (t < T)[None, :] & (n < rows)[:, None]
    ahead(block, part, w1, scales1, rows, K1, SPAN1, BITS1, BN, SLOTS, AHEAD)
    if BITS2 > 0:
        ahead(block, part, w2, scales2, rows, K2, SPAN2, BITS2, BN, SLOTS, AHEAD)
    delta = product(
        block, part, x1, K1, w1, scales1, matrix_scale1, rows,
        T, K1, SPAN1, BITS1, BN, CHUNK, BT, SLOTS, STAGES, PDL, ASM,
    )  # fmt: skip
    if BITS2 > 0:
        more = product(
            block, part, x2, K2, w2, scales2, matrix_scale2, rows,
            T, K2, SPAN2, BITS2, BN, CHUNK, BT, SLOTS, STAGES, PDL, ASM,
        )  # fmt: skip
    if PARTS == 1:
        delta = delta.to(new.dtype.element_ty)
        if BITS2 > 0:
            delta = (delta.to(tl.float32) + more.to(new.dtype.element_ty).to(tl.float32)).to(new.dtype.element_ty)
        ended(delta, n, stream, new, weight, normed, tickets, rows, eps, T, FUSED, BLOCK, BT)
    else:
        tl.store(sums + part * T * rows + at, delta, mask=mask)
        if BITS2 > 0:
            tl.store(sums + (PARTS + part) * T * rows + at, more, mask=mask)
        if last_of(block_tickets + block, PARTS):
            total = added(sums, at, mask, T * rows, PARTS, BN, BT).to(new.dtype.element_ty)
            if BITS2 > 0:
                second = added(sums + PARTS * T * rows, at, mask, T * rows, PARTS, BN, BT).to(new.dtype.element_ty)
                total = (total.to(tl.float32) + second.to(tl.float32)).to(new.dtype.element_ty)
            ended(total, n, stream, new, weight, normed, tickets, rows, eps, T, FUSED, BLOCK, BT)


@triton.jit
def added(
    sums: tl.tensor,
    at: tl.tensor,
    mask: tl.tensor,
    size: tl.tensor,
    PARTS: tl.constexpr,
    BN: tl.constexpr,
    BT: tl.constexpr,
) -> tl.tensor:
    """The sum of PARTS tensors [BN, BT] that lie ``size`` apart, in their order."""
    total = tl.zeros([BN, BT], tl.float32)
    for i in tl.static_range(PARTS):
        total += tl.load(sums + i * size + at, mask=mask, other=0.0, cache_modifier=".cg")
    return total
