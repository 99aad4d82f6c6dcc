"""What begins a layer, the norm of the residual stream; and what ends it, a product added to the stream."""

# Triton's types are those of its compiler, and not of the language that it compiles.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportReturnType=false, reportCallIssue=false
# pyright: reportAssignmentType=false

import triton
import triton.language as tl

from nanoserve.kernels.triton_skinny import ahead, product


@triton.jit
def norm_kernel(
    x: tl.tensor, weight: tl.tensor, out: tl.tensor, size: tl.tensor, eps: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """Out = x / sqrt(mean(x²) + eps) * weight; a program a token."""
    start = tl.program_id(0).to(tl.int64) * size
    at = tl.arange(0, BLOCK)
    inside = at < size
    value = tl.load(x + start + at, mask=inside, other=0.0).to(tl.float32)
    root = tl.rsqrt(tl.sum(value * value, 0) / size + eps)
    y = value * root * tl.load(weight + at, mask=inside, other=0.0)
    tl.store(out + start + at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def linear_add_kernel(
    x1: tl.tensor,
    w1: tl.tensor,
    scales1: tl.tensor,
    matrix_scale1: tl.tensor,
    x2: tl.tensor,
    w2: tl.tensor,
    scales2: tl.tensor,
    matrix_scale2: tl.tensor,
    stream: tl.tensor,
    new: tl.tensor,
    rows: tl.tensor,
    T: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
    BITS1: tl.constexpr,
    BITS2: tl.constexpr,
    BN: tl.constexpr,
    CHUNK: tl.constexpr,
    BT: tl.constexpr,
    SLOTS: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
    ASM: tl.constexpr,
) -> None:
    """Set new = stream + x1 @ w1.T (+ x2 @ w2.T, unless BITS2 is 0), each rounded; grid (blocks of BN rows)."""
    block = tl.program_id(0)
    ahead(block, w1, scales1, rows, K1, BITS1, BN, SLOTS, AHEAD)
    if BITS2 > 0:
        ahead(block, w2, scales2, rows, K2, BITS2, BN, SLOTS, AHEAD)
    delta = product(
        block, x1, K1, w1, scales1, matrix_scale1, rows, T, K1, BITS1, BN, CHUNK, BT, SLOTS, STAGES, PDL, ASM
    )
    delta = delta.to(new.dtype.element_ty).to(tl.float32)
    if BITS2 > 0:
        more = product(
            block, x2, K2, w2, scales2, matrix_scale2, rows, T, K2, BITS2, BN, CHUNK, BT, SLOTS, STAGES, PDL, ASM
        )
        delta = delta + more.to(new.dtype.element_ty).to(tl.float32)
        delta = delta.to(new.dtype.element_ty).to(tl.float32)
    n, t = block * BN + tl.arange(0, BN), tl.arange(0, BT)
    at = t[None, :] * rows + n[:, None]
    mask = (t < T)[None, :] & (n < rows)[:, None]
    total = tl.load(stream + at, mask=mask, other=0.0).to(tl.float32) + delta
    tl.store(new + at, total.to(new.dtype.element_ty), mask=mask)
