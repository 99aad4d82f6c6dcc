"""The causal depthwise convolution in front of a Mamba-2 scan, with its state."""

import torch
from torch import Tensor


def conv(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> Tensor:
    """silu(conv(x)) over the tokens of one sequence, continuing from ``state``.

    Args:
        x: [T, C], T consecutive tokens.
        weight: float32 [C, W]; the last column multiplies the current token.
        bias: float32 [C].
        state: the W - 1 inputs before x [C, W - 1], oldest first; **overwritten** with those after x.

    Returns:
        [T, C] in x's dtype.
    """
    channels, width = weight.shape
    inputs = torch.cat((state.to(x.dtype), x.T), dim=-1)
    state.copy_(inputs[:, inputs.shape[1] - (width - 1) :])
    summed = torch.nn.functional.conv1d(inputs.float().unsqueeze(0), weight.unsqueeze(1), bias, groups=channels)
    return torch.nn.functional.silu(summed[0]).T.to(x.dtype)
