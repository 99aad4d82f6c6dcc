"""A Mamba-2 layer's decode step between its two projections: convolution, recurrence and gated norm in one op."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nanoserve.kernels.conv import conv
from nanoserve.kernels.norm import gated_norm
from nanoserve.kernels.ssm import SsmWeights, ssm_step


@dataclass(frozen=True, slots=True)
class MambaWeights:
    """What a layer has between its projections.

    Attributes:
        conv: float32 [C, W] with C = heads * P + 2 * groups * N; the last column multiplies the current token.
        conv_bias: float32 [C].
        ssm: of the recurrence.
        norm: float32 [heads * P].
        eps: added to the norm's mean square.
    """

    conv: Tensor
    conv_bias: Tensor
    ssm: SsmWeights
    norm: Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class MambaState:
    """One layer's state of one sequence, as views of the cache.

    Attributes:
        conv: the last W - 1 inputs of the convolution [C, W - 1], oldest first.
        ssm: S, float32 [heads, P, N].
        tickets: int32 [groups], zero between launches: a kernel's programs count themselves here, so that the last
            one of a group can end what needs all of them.
    """

    conv: Tensor
    ssm: Tensor
    tickets: Tensor


def mamba_decode(projected: Tensor, weights: MambaWeights, state: MambaState) -> Tensor:
    """A few tokens of one sequence, one after another.

    Args:
        projected: what in_proj gives: z, x, B, C and dt side by side [T, 2 * heads * P + 2 * groups * N + heads].
        weights: of this layer.
        state: ``conv`` and ``ssm`` are **updated in place**.

    Returns:
        What out_proj takes: [T, heads * P] in projected's dtype.
    """
    heads, size, states = state.ssm.shape
    inner, channels = heads * size, len(weights.conv)
    groups = (channels - inner) // (2 * states)
    z, xbc, dt = projected.split([inner, channels, heads], dim=-1)
    xbc = conv(xbc, weights.conv, weights.conv_bias, state.conv)
    x, b, c = xbc.split([inner, groups * states, groups * states], dim=-1)
    b, c = (m.unflatten(-1, (groups, states)) for m in (b, c))
    y = ssm_step(x.unflatten(-1, (heads, size)), dt, b, c, weights.ssm, state.ssm)
    return gated_norm(y.flatten(1), z, weights.norm, groups, weights.eps)


def state_of(conv: Tensor, ssm: Tensor, groups: int) -> MambaState:
    """A state with tickets of its own, for what runs outside of a cache."""
    return MambaState(conv, ssm, torch.zeros(groups, dtype=torch.int32, device=ssm.device))
