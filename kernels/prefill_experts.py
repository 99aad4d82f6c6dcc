"""Host side of the routed experts over many tokens in Triton: three launches after a sort, and no wait."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nanoserve.kernels.linear import Weight
from nanoserve.kernels.prefill_tiles import ExpertTile, tiles_on
from nanoserve.kernels.triton_linear import Stored, blocks, checked, launch, power_of_two, stored
from nanoserve.kernels.triton_moe_prefill import choices_kernel, grouped_kernel


@dataclass(frozen=True, slots=True)
class Grouping:
    """(token, choice) pairs by expert, int32 on the device.

    Attributes:
        order: the pair at each place among the sorted [pairs]; of one expert in the order of the tokens.
        starts: each expert's first place [E + 1].
        block_ends: blocks of pairs of all experts up to this one [E].
        most: blocks that there can be.
    """

    order: Tensor
    starts: Tensor
    block_ends: Tensor
    most: int


def group(ids: Tensor, experts: int, block: int) -> Grouping:
    """Sort pairs by expert.

    Args:
        ids: int32 [T, k].
        experts: how many there are.
        block: pairs of one expert that a program takes.
    """
    flat = ids.flatten()
    sorted_ids, order = torch.sort(flat, stable=True)
    bounds = torch.arange(experts + 1, dtype=ids.dtype, device=ids.device)
    starts = torch.searchsorted(sorted_ids, bounds, out_int32=True)
    counts = starts[1:] - starts[:-1]
    block_ends = torch.cumsum((counts + (block - 1)) // block, 0, dtype=torch.int32)
    return Grouping(order.int(), starts, block_ends, len(flat) // block + min(experts, len(flat)))


def experts_prefill(
    x: Tensor, ids: Tensor, weights: Tensor, up: Weight, down: Weight, tile: ExpertTile | None = None
) -> Tensor:
    """As `nanoserve.kernels.moe.experts`; ``tile`` overrides the chip's."""
    x, first, second = checked(x), stored(up), stored(down)
    count, choices = ids.shape
    experts = len(up.data)
    tile = tile or tile_for(count * choices, experts, x.device)
    grouping = group(ids, experts, tile.tokens)
    hidden = torch.empty((count * choices, first.rows), dtype=x.dtype, device=x.device)
    _grouped(planes(x, first.bits), first, grouping, hidden, count, choices, tile, up=True)
    if (first.bits == 4) != (second.bits == 4):  # its planes are as the other weight wants them
        hidden = planes(hidden, 4) if second.bits == 4 else _rows(hidden)
    parts = torch.empty((count * choices, second.rows), dtype=torch.float32, device=x.device)
    _grouped(hidden, second, grouping, parts, count, choices, tile, up=False)
    out = torch.empty_like(x)
    launch(
        choices_kernel, (count, blocks(second.rows, 1024)),
        parts, weights.contiguous(), out, second.rows, CHOICES=choices, BLOCK=1024, num_warps=4,
    )  # fmt: skip
    return out


def tile_for(pairs: int, experts: int, device: torch.device) -> ExpertTile:
    """By how many tokens an expert has on average."""
    tiles = tiles_on(device)
    return tiles.experts if 2 * pairs > tiles.experts.tokens * experts else tiles.few


def planes(x: Tensor, bits: int) -> Tensor:
    """[T, K] as [4, T, K / 4] where a weight has 4 bits: as the codes of its stored elements lie."""
    return x.view(len(x), -1, 4).permute(2, 0, 1).contiguous() if bits == 4 else x


def _rows(x: Tensor) -> Tensor:
    """`planes` undone; x has the shape of the result."""
    return x.view(4, len(x), -1).permute(1, 2, 0).reshape(x.shape)


def _grouped(
    x: Tensor, w: Stored, g: Grouping, out: Tensor, tokens: int, choices: int, tile: ExpertTile, *, up: bool
) -> None:
    experts = len(g.block_ends)
    launch(
        grouped_kernel, (blocks(w.rows, tile.rows), g.most),
        x, *w.tensors, g.order, g.starts, g.block_ends, out, tokens, tokens * choices, w.rows,
        K=w.columns, E=experts, CHOICES=choices, BITS=w.bits, UP=up,
        BN=tile.rows, BK=tile.columns if w.bits < 16 else tile.columns // 2, BT=tile.tokens,
        BE=power_of_two(experts), STAGES=tile.stages, ASM=x.device.type != "cpu", num_warps=tile.warps,
    )  # fmt: skip
