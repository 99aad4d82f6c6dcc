"""The order in which FlashInfer's kernels read NVFP4 block scales: 128 x 4, a permutation and no arithmetic.

Scale (row, column) of [R, C] lies, among the bytes of its matrix, in block (row // 128, column // 4), blocks row
by row, and in a block at row % 32 * 16 + row % 128 // 32 * 4 + column % 4. Rows are padded to 128, columns to 4.
Source: `convert_sf_to_mma_layout` (flashinfer.cute_dsl.utils), `_sf_row_base` (its moe_nvfp4_w4a16).
"""

import torch
from torch import Tensor

ROWS, COLUMNS = 128, 4
"""Of a block."""


def swizzled_shape(rows: int, columns: int) -> tuple[int, int]:
    """Of a swizzled matrix of scales."""
    return -(-rows // ROWS) * ROWS, -(-columns // COLUMNS) * COLUMNS


def swizzle(scales: Tensor) -> Tensor:
    """Block scales in the kernels' order, a new tensor.

    Args:
        scales: float8_e4m3fn [..., R, C], row-major.

    Returns:
        float8_e4m3fn [..., R to 128, C to 4], contiguous; its bytes are in the kernels' order, padding is 0.
    """
    *leading, rows, columns = scales.shape
    padded_rows, padded_columns = swizzled_shape(rows, columns)
    padded = scales.new_zeros((*leading, padded_rows, padded_columns), dtype=torch.uint8)
    padded[..., :rows, :columns] = scales.view(torch.uint8)
    blocks = padded.view(*leading, padded_rows // ROWS, 4, 32, padded_columns // COLUMNS, COLUMNS)
    ordered = blocks.movedim(-2, -4).transpose(-3, -2).contiguous()
    return ordered.view(padded.shape).view(torch.float8_e4m3fn)


def unswizzle(swizzled: Tensor, rows: int, columns: int) -> Tensor:
    """`swizzle` undone: float8_e4m3fn [..., rows, columns]."""
    *leading, padded_rows, padded_columns = swizzled.shape
    blocks = swizzled.view(torch.uint8).view(
        *leading, padded_rows // ROWS, padded_columns // COLUMNS, 32, 4, COLUMNS
    )
    plain = blocks.transpose(-3, -2).movedim(-4, -2).reshape(*leading, padded_rows, padded_columns)
    return plain[..., :rows, :columns].contiguous().view(torch.float8_e4m3fn)
