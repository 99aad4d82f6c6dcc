"""Host side of the mixture of experts in Triton: three launches a layer, four where there is a latent."""

import torch
from torch import Tensor

from nanoserve.kernels import fused
from nanoserve.kernels.fused import GATE_TICKETS, MoeWeights, Norm
from nanoserve.kernels.linear import Weight
from nanoserve.kernels.prefill_router import router_many
from nanoserve.kernels.tiles import blocks, dependent, launch, power_of_two
from nanoserve.kernels.triton_linear import (
    FEW,
    add_norm,
    ahead,
    checked,
    linears_add_norm,
    shape_options,
    stored,
)
from nanoserve.kernels.triton_moe import choose_kernel, down_kernel, front_kernel, gate_kernel, up_kernel
from nanoserve.kernels.weight_tiles import Cut, Tile, tile_of

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


def moe_add_norm(
    x: Tensor, w: MoeWeights, stream: Tensor, norm: Norm, *, cut: Cut = tile_of
) -> tuple[Tensor, Tensor]:
    """`nanoserve.kernels.fused.moe_add_norm`; of equal scores the lower expert's number is taken first."""
    if len(x) > FEW:
        return fused.moe_add_norm(x, w, stream, norm)
    x = checked(x)
    ids, weights, shared, narrow = front(x, w, cut)
    hidden = up_products(narrow, ids, w.up, cut)
    if w.latent_out:
        routed = down_products(
            hidden, ids, weights, w.down, torch.empty_like(narrow), w.tickets[GATE_TICKETS:], cut
        )
        return linears_add_norm(routed, w.latent_out, shared, w.shared_down, stream, norm, cut=cut)
    normed = torch.empty_like(stream)
    new = down_products(
        hidden, ids, weights, w.down, torch.empty_like(stream), w.tickets[GATE_TICKETS:], cut,
        shared=(shared, w.shared_down), tail=(stream, norm, normed),
    )  # fmt: skip
    if not _down_tile(w.down, w.top_k, x.device, cut).fused:
        return add_norm(new, None, norm.weight, norm.eps)
    return new, normed


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
    shared: tuple[Tensor, Weight] | None = None,
    tail: tuple[Tensor, Norm, Tensor] | None = None,
) -> Tensor:
    """The experts' weighted sum into ``out`` [T, rows]; with a shared expert, also what ends a layer.

    ``shared`` is its (hidden values, second weight); ``tail`` is (residual stream, norm, where that goes), and
    ``out`` is then the new stream.
    """
    view, top_k = stored(down), ids.shape[1]
    tile = _down_tile(down, top_k, out.device, cut)
    x2, second = (shared[0], stored(shared[1])) if shared else (hidden, view)
    stream, normed = (tail[0], tail[2]) if tail else (out, out)
    norm = tail[1] if tail else Norm(weights, 0.0, tickets)
    count = top_k + (1 if shared else 0)
    parts = torch.empty((len(ids), count, view.rows), device=out.device)
    launch(
        down_kernel, (blocks(view.rows, tile.rows), count, len(ids)),
        hidden, ids, weights, *view.tensors, x2, *second.tensors, parts, out,
        stream, norm.weight, normed, tickets, norm.tickets, view.rows, norm.eps,
        T=len(ids), K=view.columns, K2=second.columns, BITS=view.bits, BITS2=second.bits if shared else 0,
        TOP=top_k, FUSED=tile.fused and tail is not None, BLOCK=power_of_two(view.rows),
        AHEAD=ahead(tile, out.device, second) if shared else 0,
        **shape_options(tile, 1, out.device),
    )  # fmt: skip
    return out


def _down_tile(down: Weight, top_k: int, device: torch.device, cut: Cut) -> Tile:
    view = stored(down)
    return cut(view.bits, view.rows, view.columns, device, copies=top_k)
