"""FP8 as ModelOpt stores it: float8_e4m3fn values with one scale a matrix."""

import torch
from torch import Tensor


def widen(values: Tensor) -> Tensor:
    """float8_e4m3fn to float32, exactly, any shape.

    On a CPU torch converts one value after another. Moved up by seven bits, an E4M3 value is the float16 value 256
    times smaller, subnormal ones included, and float16 converts by vectors. Only the NaN codes, seven ones, need
    more: the carry out of their one more sets the last bit of the exponent.
    """
    if values.device.type != "cpu":
        return values.float()
    codes = values.view(torch.int8).to(torch.int16)
    nan = ((codes & 0x7F) + 1) & 0x80
    return ((codes << 7) & ~0x4000 | nan << 7).view(torch.float16).float() * 256
