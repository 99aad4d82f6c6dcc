"""Host side of the mixture of experts in Triton: four launches a layer, five where there is a latent."""

import torch
from torch import Tensor

from nanoserve.kernels import fused
from nanoserve.kernels.fused import MoeWeights, Norm
from nanoserve.kernels.linear import Weight
from nanoserve.kernels.prefill_router import router_many
from nanoserve.kernels.tiles import blocks, dependent, launch, power_of_two
from nanoserve.kernels.triton_linear import (
    FEW,
    ahead,
    checked,
    linears_add,
    normed,
    shape_options,
    stored,
)
from nanoserve.kernels.triton_moe import choose_kernel, down_kernel, front_kernel, gate_kernel, up_kernel
from nanoserve.kernels.weight_tiles import Cut, tile_of

GATE_ROWS = 4
"""Experts a program of the router: its weight is small, and many programs read it sooner."""


def router(
    x: Tensor, gate: Tensor, bias: Tensor, top_k: int, scale: float, normalize: bool
) -> tuple[Tensor, Tensor]:
    """`nanoserve.kernels.router.router`, in two launches; of equal scores the lower number is taken first."""
    if len(x) > FEW:
        return router_many(x, gate, bias, top_k, scale, normalize)
    x, experts = checked(x), len(gate)
    logits = torch.empty((len(x), experts), device=x.device)
    ids, weights = _room(x, top_k)
    early = dependent(x.device)
    launch(
        gate_kernel,
        (blocks(experts, GATE_ROWS),),
        x,
        gate,
        logits,
        experts,
        T=len(x),
        K=x.shape[1],
        BYTES=gate.element_size(),
        BE=GATE_ROWS,
        BK=1024,
        **early,
    )
    launch(
        choose_kernel, (len(x),),
        logits, bias, ids, weights, experts, scale,
        TOP=top_k, NORMALIZE=normalize, BLOCK_E=power_of_two(experts),
        BLOCK_K=power_of_two(top_k), **early,
    )  # fmt: skip
    return ids, weights


def experts(x: Tensor, ids: Tensor, weights: Tensor, up: Weight, down: Weight, *, cut: Cut = tile_of) -> Tensor:
    """`nanoserve.kernels.moe.experts`, in two launches."""
    x = checked(x)
    hidden = up_products(x, ids, up, cut)
    tickets = torch.zeros(len(x) * len(down.data[0]), dtype=torch.int32, device=x.device)
    return down_products(hidden, ids, weights, down, torch.empty_like(x), tickets, cut)


def moe_add(stream: Tensor, norm: Norm, w: MoeWeights, *, cut: Cut = tile_of) -> Tensor:
    """`nanoserve.kernels.fused.moe_add`; of equal scores the lower expert's number is taken first."""
    if len(stream) > FEW:
        return fused.moe_add(stream, norm, w)
    stream = checked(stream)
    ids, weights, shared, narrow = front(normed(stream, norm), w, cut)
    hidden = up_products(narrow, ids, w.up, cut)
    out = torch.empty_like(narrow)
    if w.latent_out:
        routed = down_products(hidden, ids, weights, w.down, out, w.tickets, cut)
        return linears_add(routed, w.latent_out, shared, w.shared_down, stream, cut=cut)
    ending = (shared, w.shared_down, stream)
    return down_products(hidden, ids, weights, w.down, out, w.tickets, cut, ending=ending)


def _room(x: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    ids = torch.empty((len(x), top_k), dtype=torch.int32, device=x.device)
    return ids, torch.empty((len(x), top_k), device=x.device)


def front(x: Tensor, w: MoeWeights, cut: Cut) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(ids, weights, the shared expert's hidden values, what the experts read)."""
    shared, count = stored(w.shared_up), len(w.gate)
    latent = stored(w.latent_in) if w.latent_in else shared
    ids, weights = _room(x, w.top_k)
    logits = torch.empty((len(x), count), device=x.device)
    hidden = torch.empty((len(x), shared.rows), dtype=x.dtype, device=x.device)
    narrow = torch.empty((len(x), latent.rows), dtype=x.dtype, device=x.device) if w.latent_in else x
    tile = cut(shared.bits, shared.rows, shared.columns, x.device, tokens=len(x))
    programs = blocks(count, GATE_ROWS) + blocks(shared.rows, tile.rows)
    programs += blocks(latent.rows, tile.rows) if w.latent_in else 0
    launch(
        front_kernel, (programs,),
        x, w.gate, w.bias, logits, ids, weights, w.tickets, count, w.scale,
        *shared.tensors, hidden, shared.rows, *latent.tensors, narrow, latent.rows,
        T=len(x), K=x.shape[1], BITS1=shared.bits, BITS2=latent.bits if w.latent_in else 0,
        TOP=w.top_k, NORMALIZE=w.normalize, BYTES=w.gate.element_size(), BE=GATE_ROWS,
        BLOCK_E=power_of_two(count), BLOCK_K=power_of_two(w.top_k),
        AHEAD=ahead(tile, x.device, shared, latent),
        **shape_options(tile, len(x), x.device),
    )  # fmt: skip
    return ids, weights, hidden, narrow


def up_products(x: Tensor, ids: Tensor, up: Weight, cut: Cut) -> Tensor:
    """Hidden values of the chosen experts [T * k, I]."""
    view, pairs = stored(up), ids.numel()
    tile = cut(view.bits, view.rows, view.columns, x.device, copies=ids.shape[1])
    hidden = torch.empty((pairs, view.rows), dtype=x.dtype, device=x.device)
    launch(
        up_kernel, (blocks(view.rows, tile.rows), pairs),
        x, ids, *view.tensors, hidden, view.rows,
        K=view.columns, BITS=view.bits, TOP=ids.shape[1], **shape_options(tile, 1, x.device),
    )  # fmt: skip
    return hidden


def down_products(
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
    down: Weight,
    out: Tensor,
    tickets: Tensor,
    cut: Cut,
    *,
    ending: tuple[Tensor, Weight, Tensor] | None = None,
) -> Tensor:
    """The experts' weighted sum into ``out`` [T, rows]; with an ending, also what ends a layer.

    ``ending`` is (the shared expert's hidden values, its second weight, the residual stream), and ``out`` is then
    the new stream.
    """
    view, top_k = stored(down), ids.shape[1]
    tile = cut(view.bits, view.rows, view.columns, out.device, copies=top_k)
    x2, second, stream = (ending[0], stored(ending[1]), ending[2]) if ending else (hidden, view, out)
    count = top_k + (1 if ending else 0)
    parts = torch.empty((len(ids), count, view.rows), device=out.device)
    launch(
        down_kernel, (blocks(view.rows, tile.rows), count, len(ids)),
        hidden, ids, weights, *view.tensors, x2, *second.tensors, parts, out, stream, tickets, view.rows,
        T=len(ids), K=view.columns, K2=second.columns, BITS=view.bits, BITS2=second.bits if ending else 0,
        TOP=top_k, AHEAD=ahead(tile, out.device, second) if ending else 0, **shape_options(tile, 1, out.device),
    )  # fmt: skip
    return out
