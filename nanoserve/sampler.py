"""From a request's `SamplingParams` to the sampling op's state, and from logits to reported logprobs."""

import secrets
from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor

from nanoserve.kernels.sample import SamplerState
from nanoserve.request import SamplingParams, TokenScore

SCORE_ROWS = 64
"""Logits of this many prompt tokens are held at once when a prompt is scored."""


def begin_sampling(state: SamplerState, params: SamplingParams, prompt: Tensor, end_ids: Collection[int]) -> None:
    """Refill the device's sampling state for a new request.

    Args:
        state: **overwritten**.
        params: what the request asks for.
        prompt: its ids, int64 [T], on the device.
        end_ids: tokens that would end the answer; masked until ``min_tokens``.
    """
    for tensor in (state.bias, state.seen, state.counts, state.ends, state.step, state.drawn):
        tensor.zero_()
    state.seen[prompt] = True
    state.ends[list(end_ids)] = True
    state.restricted = False
    state.biased = bool(params.logit_bias)
    if state.biased:
        values = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32, device=prompt.device)
        state.bias[list(params.logit_bias)] = values
    state.temperature, state.min_tokens = params.temperature, params.min_tokens
    state.top_k, state.top_p, state.min_p = params.top_k, params.top_p, params.min_p
    state.repetition = params.repetition_penalty
    state.presence, state.frequency = params.presence_penalty, params.frequency_penalty
    state.seed = secrets.randbits(64) if params.seed is None else params.seed & (2**64 - 1)
    state.publish()


def restrict(state: SamplerState, allowed: bytes | None) -> None:
    """Set the ids that the next draw may choose from, without waiting for the device.

    The host must have read the token drawn before: only then is the last copy out of ``staged`` surely done.

    Args:
        state: **updated**.
        allowed: as `Constraint.allowed` gives them.
    """
    state.restricted = allowed is not None
    if allowed is not None:
        state.staged.numpy()[:] = np.frombuffer(allowed, dtype="<i4")
        state.allowed.copy_(state.staged, non_blocking=True)


def token_scores(logits: Tensor, ids: Tensor, alternatives: int) -> list[TokenScore]:
    """Ln p of tokens under the model's own distribution, with the likeliest alternatives.

    Args:
        logits: float32 [T, V].
        ids: int64 [T], the tokens that came.
        alternatives: how many of the likeliest to report, from 0.
    """
    logprobs = logits.log_softmax(dim=-1)
    chosen = logprobs.gather(-1, ids.unsqueeze(-1)).squeeze(-1).tolist()
    if not alternatives:
        return [TokenScore(value) for value in chosen]
    best = logprobs.topk(min(alternatives, logprobs.shape[-1]), dim=-1)
    rows = zip(chosen, best.indices.tolist(), best.values.tolist(), strict=True)
    return [TokenScore(value, tuple(zip(i, v, strict=True))) for value, i, v in rows]
