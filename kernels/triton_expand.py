"""A quantised weight times many tokens over BF16 copies of its rows, a part at a time, made in a small buffer.

The copies are exact, for the scale of the matrix is taken from the float32 sums (see `triton_tile`).
"""

# Triton's types are those of its compiler, and not of the language that it compiles.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportReturnType=false, reportCallIssue=false
# pyright: reportAssignmentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoserve.kernels.dense_many import EXPANDED_BYTES, plain_product
from nanoserve.kernels.linear import Fp8, Nvfp4
from nanoserve.kernels.triton_linear import blocks, checked, launch, stored
from nanoserve.kernels.triton_tile import CODES_DOWN, SCALE_UP, codes, scaled


@triton.jit
def expand_kernel(
    w: tl.tensor,
    scales: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    K: tl.constexpr,
    BITS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ASM: tl.constexpr,
) -> None:
    """Grid (blocks of BN rows, blocks of BK columns): out [rows, K] BF16; where BITS is 4, times 2^-7."""
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    real = (n < rows)[:, None]
    if BITS == 4:
        e = tl.program_id(1) * (BK // 4) + tl.arange(0, BK // 4)
        inside = real & (e < K // 4)[None, :]
        weights = tl.load(w + n[:, None] * (K // 4) + e[None, :], mask=inside, other=0.0)
        grid = tl.load(scales + n[:, None] * (K // 16) + (e // 4)[None, :], mask=inside, other=0.0)
        grid = (grid.to(tl.float32) * SCALE_UP).to(tl.bfloat16)
        four = codes(weights, ASM)
        even = tl.join(scaled(four[0], grid, ASM), scaled(four[2], grid, ASM))
        odd = tl.join(scaled(four[1], grid, ASM), scaled(four[3], grid, ASM))
        value = tl.join(even, odd).reshape([BN, BK])
    else:
        value = tl.load(w + n[:, None] * K + k[None, :], mask=real & (k < K)[None, :], other=0.0)
        value = value.to(tl.float32).to(tl.bfloat16)
    tl.store(out + n[:, None] * K + k[None, :], value, mask=real & (k < K)[None, :])


def expanded_product(x: Tensor, weight: Fp8 | Nvfp4, dtype: torch.dtype) -> Tensor:
    """X [T, K] @ weight.T on a GPU, in float32 sums: [T, N] as ``dtype``."""
    x, view = checked(x), stored(weight)
    data, scales, scale = view.tensors
    part = max(1, EXPANDED_BYTES // (2 * view.columns))
    buffer = torch.empty((min(part, view.rows), view.columns), dtype=x.dtype, device=x.device)
    out = torch.empty((len(x), view.rows), dtype=dtype, device=x.device)
    scale = scale * CODES_DOWN.value if view.bits == 4 else scale
    for start in range(0, view.rows, part):
        stop = min(start + part, view.rows)
        expand(data[start:stop], scales[start:stop], buffer, view.bits)
        sums = plain_product(x, buffer[: stop - start], torch.float32)
        torch.mul(sums, scale, out=out[:, start:stop])
    return out


def expand(data: Tensor, scales: Tensor, out: Tensor, bits: int) -> None:
    """Rows of a weight as a kernel's arguments (`triton_linear.stored`) to BF16 rows of ``out``."""
    rows, columns = len(data), out.shape[1]
    launch(
        expand_kernel, (blocks(rows, 16), blocks(columns, 256)),
        data, scales, out, rows, K=columns, BITS=bits, BN=16, BK=256, ASM=data.device.type != "cpu", num_warps=4,
    )  # fmt: skip
