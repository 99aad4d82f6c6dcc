"""The ops of a decode step that read weights, for one token, by cuda/products.cu.

More tokens than one, and weights whose rows are no whole sixteens of bytes, are the Triton column's.
"""

import torch
from torch import Tensor

from nanoserve.kernels import cuda_plans as plans
from nanoserve.kernels import triton_experts, triton_linear
from nanoserve.kernels.cuda_plans import MOST, Matrix, matrix
from nanoserve.kernels.cuda_products import Inputs, Plan, Router, run
from nanoserve.kernels.fused import MoeWeights, Norm
from nanoserve.kernels.linear import Plain, Weight

WEIGHTS = 3
"""So many a launch takes."""


def _matrices(x: Tensor, *weights: Weight) -> tuple[Matrix, ...] | None:
    """The weights' facts; None where the kernel does not take them, or x."""
    found = [m for weight in weights if (m := matrix(weight)) is not None and m.able]
    return tuple(found) if len(x) == 1 and x.dtype == torch.bfloat16 and len(found) == len(weights) else None


def _room(x: Tensor, *sizes: int) -> tuple[Tensor, ...]:
    return tuple(torch.empty((1, size), dtype=torch.bfloat16, device=x.device) for size in sizes)


def _run(plan: Plan, weights: tuple[Weight, ...], outs: tuple[Tensor, ...], inputs: Inputs) -> None:
    major, _ = torch.cuda.get_device_capability(outs[0].device)
    whole, cut = plans.fitted(plan, major)
    run(whole, weights, outs, inputs, cut)


def norm_linears(stream: Tensor, norm: Norm, weights: tuple[Weight, ...]) -> tuple[Tensor, ...]:
    """`nanoserve.kernels.fused.norm_linears`, in one launch."""
    found = _matrices(stream, *weights)
    if found is None or len(weights) > WEIGHTS:
        return triton_linear.norm_linears(stream, norm, weights)
    outs = _room(stream, *(m.rows for m in found))
    plan = plans.normed(found, ("BF16",) * len(found), (0,) * len(found))
    _run(plan, weights, outs, Inputs((stream,), norm.weight, norm.eps))
    return outs


def linear_add(x: Tensor, weight: Weight, stream: Tensor) -> Tensor:
    """`nanoserve.kernels.fused.linear_add`, in one launch."""
    found = _matrices(x, weight)
    if found is None:
        return triton_linear.linear_add(x, weight, stream)
    (new,) = _room(x, found[0].rows)
    _run(plans.plain(found[0], "STREAM", ready=False), (weight,), (new,), Inputs((x.contiguous(),), stream=stream))
    return new


def mlp_add(stream: Tensor, norm: Norm, up: Weight, down: Weight) -> Tensor:
    """`nanoserve.kernels.fused.mlp_add`, in two launches."""
    found = _matrices(stream, up, down)
    if found is None:
        return triton_linear.mlp_add(stream, norm, up, down)
    hidden, new = _room(stream, found[0].rows, found[1].rows)
    first = plans.normed(found[:1], ("SQUARED",), (found[1].bits,))
    _run(first, (up,), (hidden,), Inputs((stream,), norm.weight, norm.eps))
    _run(plans.plain(found[1], "STREAM", ready=True), (down,), (new,), Inputs((hidden,), stream=stream))
    return new


def head(stream: Tensor, norm: Norm, weight: Weight, out: Tensor | None = None) -> Tensor:
    """`nanoserve.kernels.fused.head`, in one launch."""
    found = _matrices(stream, weight)
    if found is None:
        return triton_linear.head(stream, norm, weight, out)
    logits = torch.empty((1, found[0].rows), device=stream.device) if out is None else out
    _run(plans.normed(found, ("FLOAT",), (0,)), (weight,), (logits,), Inputs((stream,), norm.weight, norm.eps))
    return logits


def moe_add(stream: Tensor, norm: Norm, w: MoeWeights) -> Tensor:
    """`nanoserve.kernels.fused.moe_add`: three launches, four where there is a latent.

    The router, the shared expert's first product and the latent's, and the choice; the shared expert's second
    product and the experts' first; the experts' second. Of equal scores the lower expert's number is taken first.
    """
    gate = Plain(w.gate)
    latent = [weight for weight in (w.latent_in, w.latent_out) if weight]
    found = _matrices(stream, gate, w.shared_up, w.shared_down, w.up, w.down, *latent)
    if found is None or w.top_k > MOST:
        return triton_experts.moe_add(stream, norm, w)
    gated, shared_up, shared_down, up, down, *around = found
    count, device = len(w.gate), stream.device
    logits = torch.empty((1, count), device=device)
    ids = torch.empty((1, w.top_k), dtype=torch.int32, device=device)
    chosen = torch.empty((1, w.top_k), device=device)
    shared, added, new = _room(stream, shared_up.rows, shared_down.rows, stream.shape[1])
    hidden = torch.empty((w.top_k, up.rows), dtype=stream.dtype, device=device)
    front, weights, outs = (gated, shared_up), (gate, w.shared_up), (logits, shared)
    narrow = stream
    if w.latent_in:
        (narrow,) = _room(stream, around[0].rows)
        front, weights, outs = (*front, around[0]), (*weights, w.latent_in), (*outs, narrow)
    order = (0, shared_down.bits, up.bits)[: len(front)]
    here, front_chose, before = (Router(count, w.top_k, w.normalize, at) for at in ("here", "in front", "before"))
    first = plans.normed(front, ("FLOAT", "SQUARED", "BF16")[: len(front)], order, here)
    choice = Inputs(
        (stream,), norm.weight, norm.eps, logits=logits, bias=w.bias, ids=ids, chosen=chosen, ticket=w.tickets,
        scale=w.scale,
    )  # fmt: skip
    _run(first, weights, outs, choice)
    second = plans.up(shared_down, up, front_chose, latent=bool(around))
    middle = Inputs((narrow, shared), norm.weight, norm.eps, ids=ids, chosen=chosen)
    _run(second, (w.shared_down, w.up), (added, hidden), middle)
    if not w.latent_out:
        ends = Inputs((hidden,), stream=stream, addend=added, ids=ids, chosen=chosen)
        _run(plans.down(down, before, "STREAM", 0), (w.down,), (new,), ends)
        return new
    (routed,) = _room(stream, down.rows)
    last = Inputs((hidden,), ids=ids, chosen=chosen)
    _run(plans.down(down, before, "BF16", around[1].bits), (w.down,), (routed,), last)
    ends = Inputs((routed,), stream=stream, addend=added)
    _run(plans.plain(around[1], "STREAM", ready=True), (w.latent_out,), (new,), ends)
    return new
