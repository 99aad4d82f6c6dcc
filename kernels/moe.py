"""The routed experts: up, relu², down, weighted sum. No gate projection in this family."""

import torch
from torch import Tensor

from nanoserve.kernels.linear import Weight, expert, linear_f32, relu2

PREFILL_FROM = 64
"""Tokens from which a step's experts are `experts_prefill`'s: with fewer, most weights serve one or two tokens."""


def experts(x: Tensor, ids: Tensor, weights: Tensor, up: Weight, down: Weight) -> Tensor:
    """sum_k weights[k] * down[ids[k]](relu(up[ids[k]](x))²).

    Args:
        x: [T, L].
        ids: int32 [T, k].
        weights: float32 [T, k].
        up: stack [E, I, L].
        down: stack [E, L, I].

    Returns:
        [T, L] in x's dtype, summed in float32.
    """
    total = torch.zeros_like(x, dtype=torch.float32)
    for index in ids.unique().tolist():
        token, choice = torch.where(ids == index)
        hidden = relu2(linear_f32(x[token], expert(up, index)).to(x.dtype))
        output = linear_f32(hidden, expert(down, index))
        total.index_add_(0, token, output * weights[token, choice].unsqueeze(-1))
    return total.to(x.dtype)
