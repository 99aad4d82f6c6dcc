"""The Mamba-2 recurrence, step by step (decode) and in chunks (prefill).

For every head h, with g its group, dt = softplus(dt + dt_bias) and A = -exp(A_log):

    S[p, n] = exp(dt * A) * S[p, n] + dt * x[p] * B[g, n]
    y[p]    = sum_n S[p, n] * C[g, n] + D * x[p]

dt is not clamped: transformers clamps it in prefill only, which no production engine does.
Source: "Transformers are SSMs" (Dao and Gu, 2024), sections 3 and 6.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus


@dataclass(frozen=True, slots=True)
class SsmWeights:
    """The recurrence's own parameters, float32 [heads] each."""

    a_log: Tensor
    d: Tensor
    dt_bias: Tensor


def ssm_step(x: Tensor, dt: Tensor, b: Tensor, c: Tensor, weights: SsmWeights, state: Tensor) -> Tensor:
    """A few tokens, one after another.

    Args:
        x: [T, heads, P].
        dt: [T, heads], before bias and softplus.
        b: [T, groups, N].
        c: [T, groups, N].
        weights: of this layer.
        state: S, float32 [heads, P, N]; **updated in place**.

    Returns:
        y [T, heads, P] in x's dtype.
    """
    repeat = x.shape[1] // b.shape[1]
    steps = softplus(dt.float() + weights.dt_bias)
    decay = torch.exp(steps * -torch.exp(weights.a_log))
    inputs = x.float() * steps.unsqueeze(-1)
    outputs: list[Tensor] = []
    for t in range(len(x)):
        keys, queries = (m[t].float().repeat_interleave(repeat, dim=0).unsqueeze(1) for m in (b, c))
        state.mul_(decay[t, :, None, None]).add_(inputs[t].unsqueeze(-1) * keys)
        outputs.append((state * queries).sum(dim=-1))
    return (torch.stack(outputs) + x.float() * weights.d.unsqueeze(-1)).to(x.dtype)


def ssm_scan(
    x: Tensor, dt: Tensor, b: Tensor, c: Tensor, weights: SsmWeights, state: Tensor, chunk: int
) -> Tensor:
    """Many tokens, a chunk at a time: inside a chunk as matrix products, between chunks through the state.

    Arguments and result as in `ssm_step`, and ``chunk``: tokens that are taken together.
    """
    steps = softplus(dt.float() + weights.dt_bias)
    log_decay = steps * -torch.exp(weights.a_log)
    inputs = x.float() * steps.unsqueeze(-1)
    outputs = [
        _chunk(inputs[s : s + chunk], log_decay[s : s + chunk], b[s : s + chunk], c[s : s + chunk], state)
        for s in range(0, len(x), chunk)
    ]
    return (torch.cat(outputs) + x.float() * weights.d.unsqueeze(-1)).to(x.dtype)


def _chunk(inputs: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, state: Tensor) -> Tensor:
    """One chunk of L tokens; ``inputs`` [L, heads, P] already hold dt, ``log_decay`` [L, heads] is dt * A."""
    length, heads, _ = inputs.shape
    repeat = heads // b.shape[1]
    # Log decay from the chunk's start to each token, inclusive, [heads, L]. In float64: the sums reach -1e4, and
    # what counts is their small differences.
    total = log_decay.double().cumsum(dim=0).T
    keys, queries = (m.float().transpose(0, 1) for m in (b, c))  # [groups, L, N]
    values = inputs.transpose(0, 1)  # [heads, L, P]

    # Masked before exp: above the diagonal the exponent is positive and may overflow.
    between = total.unsqueeze(-1) - total.unsqueeze(-2)
    future = torch.ones(length, length, dtype=torch.bool, device=inputs.device).triu(1)
    reach = torch.exp(between.masked_fill(future, -torch.inf)).float()
    scores = (queries @ keys.transpose(1, 2)).repeat_interleave(repeat, dim=0) * reach
    queries, keys = (m.repeat_interleave(repeat, dim=0) for m in (queries, keys))
    from_state = (queries * torch.exp(total).float().unsqueeze(-1)) @ state.transpose(1, 2)
    outputs = scores @ values + from_state

    to_end = torch.exp(total[:, -1:] - total).float().unsqueeze(-1)  # [heads, L, 1]
    state.mul_(torch.exp(total[:, -1]).float()[:, None, None]).add_((values * to_end).transpose(1, 2) @ keys)
    return outputs.transpose(0, 1)
