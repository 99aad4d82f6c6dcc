"""NVFP4 as ModelOpt stores it, explained by its data.

A weight [N, K] is three tensors: ``packed`` uint8 [N, K/2] (byte j holds k = 2j in its low nibble and 2j+1 in its
high one), ``scales`` float8_e4m3fn [N, K/16] (row-major, not swizzled), and ``global_scale`` float32 [].

    w[n, k] = E2M1[code] * scales[n, k // 16] * global_scale

The product is taken in float32 and never rounded to BF16: that alone moves ln p by up to 3 on these models, since
router choices flip.
"""

import torch
from torch import Tensor

from nanoserve.kernels.fp8 import widen

GROUP = 16
"""Consecutive k that share one block scale."""

E2M1 = (
    +0.0, +0.5, +1.0, +1.5, +2.0, +3.0, +4.0, +6.0,
    -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0,
)  # fmt: skip
"""The sixteen codes: sign in bit 3, two bits of exponent, one of mantissa."""

_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_MAX_CODE, _MAX_SCALE = 6.0, 448.0


def byte_pairs(device: torch.device) -> Tensor:
    """Both float32 values of every byte, low nibble first, as one 8-byte word a byte: int64 [256].

    Gathering words is twice as fast as gathering rows of two floats.
    """
    codes = torch.tensor(E2M1, device=device)
    byte = torch.arange(256, device=device)
    return torch.stack((codes[byte & 15], codes[byte >> 4]), dim=1).view(torch.int64).squeeze(1)


def unpack(packed: Tensor, scales: Tensor, global_scale: Tensor) -> Tensor:
    """Expand rows of an NVFP4 weight exactly.

    Args:
        packed: uint8 [N, K/2].
        scales: float8_e4m3fn [N, K/16].
        global_scale: float32 [].

    Returns:
        float32 [N, K].
    """
    rows = packed.shape[0]
    pairs = byte_pairs(packed.device).index_select(0, packed.reshape(-1).int())
    values = pairs.view(torch.float32).view(rows, -1, GROUP)
    # code * scale is exact in float32, so the one rounding is the global scale's.
    return (values * widen(scales).unsqueeze(-1) * global_scale).view(rows, -1)


def pack(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise a float weight [N, K] to (packed, scales, global_scale), rounding to nearest, ties to even codes.

    For checkpoints that we write ourselves; the scale choice is ModelOpt's "max" calibration.
    """
    rows, width = weight.shape
    blocks = weight.float().view(rows, width // GROUP, GROUP)
    amax = blocks.abs().amax(dim=-1)
    global_scale = (amax.max() / (_MAX_CODE * _MAX_SCALE)).clamp_min(torch.finfo(torch.float32).tiny)
    scales = (amax / _MAX_CODE / global_scale).clamp(max=_MAX_SCALE).to(torch.float8_e4m3fn)
    scales = torch.where(scales.float() == 0, torch.ones_like(scales), scales)
    scaled = blocks / (scales.float().unsqueeze(-1) * global_scale)
    codes = nearest_code(scaled).view(rows, width // 2, 2)
    return codes[..., 0] | (codes[..., 1] << 4), scales, global_scale


def nearest_code(values: Tensor) -> Tensor:
    """The code (uint8) of the E2M1 value nearest to each of ``values``, any shape; ties go to the even code."""
    bounds = torch.tensor(_MIDPOINTS, device=values.device)
    magnitude = values.abs()
    # Even is up at 0.75, 1.75 and 3.5 (odd lower code), down at the others.
    below = torch.bucketize(magnitude, bounds)
    odd_below = (magnitude == bounds[below.clamp(max=6)]) & (below % 2 == 1)
    code = (below + odd_below.int()).to(torch.uint8)
    return code | ((values < 0).to(torch.uint8) << 3)
