"""Ops that a decode step takes in few launches, as compositions of the elementary ones: their meaning.

A layer's output ends in `add_norm`: it joins the residual stream, which is normalised for the next layer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nanoserve.kernels.linear import Weight, linear, relu2
from nanoserve.kernels.moe import experts
from nanoserve.kernels.norm import add_norm
from nanoserve.kernels.router import router

GATE_TICKETS = 16
"""What counts all programs takes the first of so many, and a block of rows one behind them, which stay aligned."""


@dataclass(frozen=True, slots=True)
class Norm:
    """The norm in front of a layer.

    Attributes:
        weight: float32 [H].
        eps: added to the mean square.
        tickets: int32 [`tickets`], zero between launches: a kernel's programs count themselves here, so that the
            last one can do what needs all of them.
    """

    weight: Tensor
    eps: float
    tickets: Tensor

    @classmethod
    def of(cls, weight: Tensor, eps: float) -> "Norm":
        """With tickets of its own."""
        count = tickets(len(weight))
        return cls(weight, eps, torch.zeros(count, dtype=torch.int32, device=weight.device))


@dataclass(frozen=True, slots=True)
class MoeWeights:
    """A mixture of experts, as `nanoserve.kernels.router` and `nanoserve.kernels.moe` take it.

    Attributes:
        gate, bias: of the router, [E, H] and float32 [E].
        top_k, scale, normalize: of the choice.
        up, down: stacks [E, I, L] and [E, L, I].
        shared_up, shared_down: of the shared expert, [S, H] and [H, S].
        latent_in, latent_out: [L, H] and [H, L], around the routed experts where L is not H.
        tickets: int32 [`tickets`], as of `Norm`.
    """

    gate: Tensor
    bias: Tensor
    top_k: int
    scale: float
    normalize: bool
    up: Weight
    down: Weight
    shared_up: Weight
    shared_down: Weight
    latent_in: Weight | None
    latent_out: Weight | None
    tickets: Tensor


def tickets(size: int) -> int:
    """How many a layer's end needs: `GATE_TICKETS`, and one for each of 16 tokens and block of 16 rows."""
    return GATE_TICKETS + size + 16


def linears(x: Tensor, weights: tuple[Weight, ...]) -> tuple[Tensor, ...]:
    """Several weights over the same tokens [T, K]: their `linear`, each [T, N]."""
    return tuple(linear(x, weight) for weight in weights)


def linear_add_norm(x: Tensor, weight: Weight, stream: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """A layer's last projection, the residual stream [T, H] after it, and its norm for the next layer.

    Args:
        x: [T, K].
        weight: [H, K].
        stream: residual stream [T, H].
        norm: of the next layer.

    Returns:
        (the new stream, its norm), as `add_norm`.
    """
    return add_norm(stream, linear(x, weight), norm.weight, norm.eps)


def mlp_add_norm(x: Tensor, up: Weight, down: Weight, stream: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """A dense layer, down(relu(up(x))²), and what `linear_add_norm` does after it."""
    return linear_add_norm(relu2(linear(x, up)), down, stream, norm)


def moe_add_norm(x: Tensor, w: MoeWeights, stream: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """A mixture-of-experts layer over the normed stream x [T, H], and what `linear_add_norm` does after it."""
    ids, weights = router(x, w.gate, w.bias, w.top_k, w.scale, w.normalize)
    narrow = linear(x, w.latent_in) if w.latent_in else x
    routed = experts(narrow, ids, weights, w.up, w.down)
    if w.latent_out:
        routed = linear(routed, w.latent_out)
    shared = linear(relu2(linear(x, w.shared_up)), w.shared_down)
    return add_norm(stream, routed + shared, norm.weight, norm.eps)
