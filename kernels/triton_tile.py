"""Pieces that the weight-reading Triton kernels share: stored weights and activations as tensor-core operands.

The operands are exact: E2M1 code times E4M3 scale has six significant bits, an FP8 value has four, and BF16 holds
eight. So only the sums round, and they are float32; the scale of a whole matrix is taken at the end.

NVFP4 is read as 16-bit elements of four codes each: code i of element e is k = 4 e + i. So one tile of elements is
four tiles of codes, and the activations are four interleaved vectors: no value ever changes its place.

``ASM`` says whether PTX may be written out. Triton's interpreter has none, and takes plain operations.
"""

# Triton's types are those of its compiler, and not of the language that it compiles.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportReturnType=false, reportCallIssue=false
# pyright: reportAssignmentType=false

import triton
import triton.language as tl

CODES = tl.constexpr("""{
.reg .b32 t, u;
and.b32 t, $4, 0x000F000F;
mul.lo.u32 t, t, 4160;
and.b32 $0, t, 0x81C081C0;
and.b32 t, $4, 0x00F000F0;
mul.lo.u32 t, t, 260;
and.b32 $1, t, 0x81C081C0;
shr.u32 u, $4, 8;
and.b32 t, u, 0x000F000F;
mul.lo.u32 t, t, 4160;
and.b32 $2, t, 0x81C081C0;
shr.u32 u, $4, 6;
and.b32 u, u, 0x01C001C0;
and.b32 t, $4, 0x80008000;
or.b32 $3, t, u;
}""")
"""Four codes of each of two elements as BF16 pairs: sign at bit 15, the three other bits at 8 … 6, which is the
code's value times 2^-126, subnormals included. A product with 4160 = 2^12 + 2^6 brings both there at once."""

QUARTERS = tl.constexpr("""{
.reg .b32 a, b, c, d;
mov.b64 {a, b}, $4;
mov.b64 {c, d}, $5;
prmt.b32 $0, a, c, 0x5410;
prmt.b32 $1, a, c, 0x7632;
prmt.b32 $2, b, d, 0x5410;
prmt.b32 $3, b, d, 0x7632;
}""")
"""The four BF16 of each of two words as four pairs."""

SCALE_UP = tl.constexpr(2.0**119)
CODES_DOWN = tl.constexpr(2.0**7)
"""Scales are taken times 2^119, so that the largest (448) still fits; with codes times 2^-126, sums are to be
multiplied by 2^7."""

WAIT = tl.constexpr("griddepcontrol.wait; mov.u32 $0, 0;")
RELEASE = tl.constexpr("griddepcontrol.launch_dependents; mov.u32 $0, 0;")
FETCH = tl.constexpr("""{
.reg .pred p;
setp.ne.s32 p, $3, 0;
@p cp.async.bulk.prefetch.L2.global [$1], $2;
mov.u32 $0, 0;
}""")


@triton.jit
def producers_done(PDL: tl.constexpr) -> tl.tensor:
    """0, once all that earlier launches wrote can be seen.

    To be added to the addresses of what they wrote: no compiler moves such a load in front of the wait. What
    stands in front of it may read weights, and what no launch of the same step writes.

    The next launch may begin now where PDL is 1, and waits in its turn; after this wait where it is 3, so that
    never more than one launch waits; at `release` where it is 2; when this one has ended where it is 0.
    """
    if PDL > 0:
        if PDL == 1:
            tl.inline_asm_elementwise(RELEASE, "=r", [], dtype=tl.int32, is_pure=False, pack=1)
        zero = tl.inline_asm_elementwise(WAIT, "=r", [], dtype=tl.int32, is_pure=False, pack=1)
        if PDL == 3:
            tl.inline_asm_elementwise(RELEASE, "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    else:
        zero = tl.program_id(0) * 0
    return zero * 16  # a multiple of 16, so that loads stay as wide as they were


@triton.jit
def release(PDL: tl.constexpr) -> None:
    """Let the next launch begin, where PDL is 2."""
    if PDL == 2:
        tl.inline_asm_elementwise(RELEASE, "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def fetch(
    base: tl.tensor,
    first: tl.tensor,
    rows: tl.tensor,
    ROW: tl.constexpr,
    offset: tl.tensor,
    size: tl.tensor,
    BN: tl.constexpr,
    THREADS: tl.constexpr,
) -> None:
    """Begin to bring ``size`` bytes, ``offset`` from each row's beginning, of BN rows of ROW to the second cache.

    A thread a row; whole and aligned sixteens of bytes only. It asks for nothing past a row's end.
    """
    thread = tl.arange(0, THREADS)
    row = tl.minimum(first + thread, rows - 1).to(tl.int64)
    start = (base.to(tl.int64) + row * ROW + offset) & -16
    size = size // 16 * 16
    asked = ((thread < BN) & (size > 0)).to(tl.int32)
    tl.inline_asm_elementwise(FETCH, "=r,l,r,r", [start, size, asked], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def codes(v: tl.tensor, ASM: tl.constexpr) -> tl.tuple:
    """Codes 0 … 3 of int16 elements, times 2^-126: four tensors, BF16 with ASM and float32 without."""
    if ASM:
        four = tl.inline_asm_elementwise(
            CODES,
            "=r,=r,=r,=r,r",
            [v],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    else:
        four = code(v), code(v >> 4), code(v >> 8), code(v >> 12)
    return four


@triton.jit
def code(v: tl.tensor) -> tl.tensor:
    """The lowest code of an integer times 2^-126, float32: its three bits lie where exponent and mantissa meet."""
    wide = v.to(tl.uint32)
    return (((wide & 8) << 28) | ((wide & 7) << 22)).to(tl.float32, bitcast=True)


@triton.jit
def scaled(values: tl.tensor, scales: tl.tensor, ASM: tl.constexpr) -> tl.tensor:
    """One of `codes` times its block scales, exact BF16."""
    if ASM:
        product = values * scales
    else:
        product = (values * scales.to(tl.float32)).to(tl.bfloat16)
    return product


@triton.jit
def quarters(q: tl.tensor, ASM: tl.constexpr) -> tl.tuple:
    """The four BF16 of int64 words, as four tensors."""
    if ASM:
        four = tl.inline_asm_elementwise(
            QUARTERS,
            "=r,=r,=r,=r,l,l",
            [q],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    else:
        four = quarter(q), quarter(q >> 16), quarter(q >> 32), quarter(q >> 48)
    return four


@triton.jit
def quarter(q: tl.tensor) -> tl.tensor:
    """The lowest 16 bits of integers as BF16."""
    return q.to(tl.int16).to(tl.bfloat16, bitcast=True)
