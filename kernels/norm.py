"""Root-mean-square norms, in float32 whatever the activations are."""

import torch
from torch import Tensor


def rms(x: Tensor, eps: float) -> Tensor:
    """X / sqrt(mean(x²) + eps) over the last dimension, float32."""
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm in front of a layer, or of the head.

    Args:
        x: residual stream [T, H].
        weight: float32 [H], multiplied plainly (not 1 + w).
        eps: added to the mean square.

    Returns:
        [T, H] in x's dtype.
    """
    return (rms(x, eps) * weight).to(x.dtype)


def gated_norm(y: Tensor, gate: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """Mamba-2's output norm: gate first, then the norm over each group (``norm_before_gate=False``).

    Args:
        y: [T, D].
        gate: z [T, D].
        weight: float32 [D].
        groups: D / groups values share one mean square.
        eps: added to the mean square.

    Returns:
        [T, D] in gate's dtype.
    """
    gated = y.float() * torch.nn.functional.silu(gate.float())
    grouped = rms(gated.view(len(y), groups, -1), eps).view(gated.shape)
    return (grouped * weight).to(gate.dtype)
