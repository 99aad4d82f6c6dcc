"""Ops that a decode step takes in few launches, as compositions of the elementary ones: their meaning.

A layer reads the residual stream: its first op applies the norm in front of it, and its last adds its result.
"""

from dataclasses import dataclass

from torch import Tensor

from nanoserve.kernels.linear import Weight, linear, linear_f32, relu2
from nanoserve.kernels.moe import experts
from nanoserve.kernels.norm import norm as rms_norm
from nanoserve.kernels.router import router


@dataclass(frozen=True, slots=True)
class Norm:
    """The norm in front of a layer.

    Attributes:
        weight: float32 [H].
        eps: added to the mean square.
    """

    weight: Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class MoeWeights:
    """A mixture of experts, as `nanoserve.kernels.router` and `nanoserve.kernels.moe` take it.

    Attributes:
        gate, bias: of the router, [E, H] and float32 [E].
        top_k, scale, normalize: of the choice.
        up, down: stacks [E, I, L] and [E, L, I].
        shared_up, shared_down: of the shared expert, [S, H] and [H, S].
        latent_in, latent_out: [L, H] and [H, L], around the routed experts where L is not H.
        tickets: int32 [`tickets`], zero between launches: a kernel's programs count themselves here, so that the
            last one can do what needs all of them.
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
    """How many a mixture of experts needs: one for each of 16 tokens and block of 16 rows."""
    return size + 16


def norm_linears(stream: Tensor, norm: Norm, weights: tuple[Weight, ...]) -> tuple[Tensor, ...]:
    """Several weights [N, H] over the norm of the residual stream [T, H]: their `linear`, each [T, N]."""
    x = rms_norm(stream, norm.weight, norm.eps)
    return tuple(linear(x, weight) for weight in weights)


def head(stream: Tensor, norm: Norm, weight: Weight, out: Tensor | None = None) -> Tensor:
    """Logits: the last weight over the norm of the residual stream.

    Args:
        stream: [T, H].
        norm: the final one.
        weight: [V, H].
        out: where they go, float32 [T, V]; None for a new tensor.

    Returns:
        float32 [T, V], sums as they are: logits are never rounded.
    """
    logits = linear_f32(rms_norm(stream, norm.weight, norm.eps), weight)
    return logits if out is None else out.copy_(logits)


def linear_add(x: Tensor, weight: Weight, stream: Tensor) -> Tensor:
    """A layer's last projection, of x [T, K] by a weight [H, K], added to the residual stream [T, H]."""
    return stream + linear(x, weight)


def mlp_add(stream: Tensor, norm: Norm, up: Weight, down: Weight) -> Tensor:
    """A dense layer, down(relu(up(norm(stream)))²), added to the stream [T, H]."""
    return linear_add(relu2(norm_linears(stream, norm, (up,))[0]), down, stream)


def moe_add(stream: Tensor, norm: Norm, w: MoeWeights) -> Tensor:
    """A mixture of experts over the norm of the residual stream [T, H], added to it."""
    x = rms_norm(stream, norm.weight, norm.eps)
    ids, weights = router(x, w.gate, w.bias, w.top_k, w.scale, w.normalize)
    narrow = linear(x, w.latent_in) if w.latent_in else x
    routed = experts(narrow, ids, weights, w.up, w.down)
    if w.latent_out:
        routed = linear(routed, w.latent_out)
    shared = linear(relu2(linear(x, w.shared_up)), w.shared_down)
    return stream + (routed + shared)
