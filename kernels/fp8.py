"""FP8 as ModelOpt stores it: float8_e4m3fn values with one scale a matrix, or one for all that a matrix reads."""

import torch
from torch import Tensor

LARGEST = 448.0
"""Of float8_e4m3fn, which has no infinity: what is larger would be NaN."""


def narrow(x: Tensor, divisor: Tensor) -> Tensor:
    """X / divisor as float8_e4m3fn, to the nearest, ties to even, at most `LARGEST`.

    Args:
        x: any shape, any float dtype.
        divisor: float32 [] or [1], ModelOpt's ``input_scale``: amax / 448.
    """
    return (x.float() / divisor).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


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
