"""How the weight-reading kernels are cut for each chip: tuned choices as data; an engine's start tries nothing."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch

ENOUGH_WARPS = 1024
"""About eight for each multiprocessor of a large chip: fewer leave the memory idle."""

SHARED = 96 << 10
"""Bytes of shared memory for copies; SM12x has 99 KiB a block, and reductions take some."""


@dataclass(frozen=True, slots=True)
class Tile:
    """How a product with a few tokens is cut.

    Attributes:
        rows: of the weight, a program; a multiple of 16.
        chunk: bytes of a row, a warp and step; 64, 128 or 256.
        slots: warps that share K.
        stages: of the copies to shared memory.
        early: 0 if nothing happens before the launch in front has ended; else weights are fetched, and the next
            launch may begin: when this one has (1), when its products are done (2), or when it has waited (3).
    """

    rows: int = 16
    chunk: int = 128
    slots: int = 4
    stages: int = 4
    early: int = 0


@dataclass(frozen=True, slots=True)
class GemmTile:
    """How a product with many tokens is cut.

    Attributes:
        rows: of the weight, a program.
        tokens: a program.
        columns: a step; 64 at least where a weight has 4 bits.
        warps: of a program.
        stages: of the copies to shared memory.
    """

    rows: int
    tokens: int
    columns: int
    warps: int
    stages: int = 3


def gemm_tile(bits: int, tokens: int, device: torch.device) -> GemmTile:
    """The tile for so many tokens; only Hopper has the shared memory for the large one."""
    columns = 128 if bits == 4 else 64
    if tokens >= 1024 and device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0):
        return GemmTile(128, 256, columns, warps=8)
    if tokens <= 64:
        return GemmTile(64, 32 if tokens <= 32 else 64, columns, warps=4)
    return GemmTile(128, 128, columns, warps=8)


@cache
def tuned_tiles(chip: tuple[int, int]) -> Mapping[tuple[int, int, int], Tile]:
    """(bits of a weight, rows, columns) → the tile that was the fastest, as tests/gpu_matvec.py measured it.

    From tiles/sm_NM.json beside this file; nothing, where no one has measured on that chip. H100 and H200 are
    sm_90, RTX PRO 6000 is sm_120, and DGX Spark sm_121.
    """
    path = Path(__file__).parent / "tiles" / "sm_{}{}.json".format(*chip)
    if not path.exists():
        return {}
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return {(row["bits"], row["rows"], row["columns"]): Tile(**row["tile"]) for row in rows}


class Cut(Protocol):
    """Says how a weight is cut."""

    def __call__(
        self, bits: int, rows: int, columns: int, device: torch.device, *, tokens: int = 1, copies: int = 1
    ) -> Tile:
        """The tile of a weight.

        Args:
            bits: of a weight.
            rows: of it.
            columns: of it.
            device: where it is.
            tokens: that meet it in a launch.
            copies: how many such weights one launch reads, the experts.
        """
        ...


def tile_of(bits: int, rows: int, columns: int, device: torch.device, *, tokens: int = 1, copies: int = 1) -> Tile:
    """The `Cut` of the device's chip; a CPU (Triton's interpreter) and the meta device have no tuned tiles."""
    chip = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    return tiles_for(chip)(bits, rows, columns, device, tokens=tokens, copies=copies)


def tiles_for(chip: tuple[int, int]) -> Cut:
    """The `Cut` of a chip that need not be here."""

    def cut(bits: int, rows: int, columns: int, device: torch.device, *, tokens: int = 1, copies: int = 1) -> Tile:
        tuned = tuned_tiles(chip).get((bits, rows, columns))
        return fitted(tuned or untuned(bits, rows, columns, copies), bits, tokens)

    return cut


def untuned(bits: int, rows: int, columns: int, copies: int) -> Tile:
    """Enough warps to keep the memory busy, and few columns past the end of a row."""
    slots = 1
    while slots < 8 and -(-rows // 16) * copies * slots < ENOUGH_WARPS:
        slots *= 2

    def padded(chunk: int) -> int:
        step = slots * chunk * 8 // bits
        return -(-columns // step) * step

    return Tile(chunk=min((128, 64), key=padded), slots=slots)


def fitted(tile: Tile, bits: int, tokens: int) -> Tile:
    """The tile with as few columns a step as the shared memory asks for, where more tokens come with them."""
    while shared_bytes(tile, bits, tokens) > SHARED and tile.chunk > 64:
        tile = replace(tile, chunk=tile.chunk // 2)
    while shared_bytes(tile, bits, tokens) > SHARED:
        tile = replace(tile, stages=tile.stages - 1)
    return tile


def shared_bytes(tile: Tile, bits: int, tokens: int) -> int:
    """What the copies take: rows of a weight, NVFP4 scales, and tokens, of which a single one is not padded."""
    columns = tile.chunk * 8 // bits
    padded = 1 if tokens == 1 else 8 if tokens <= 8 else 16
    scales = tile.rows * columns // 16 if bits == 4 else 0
    return (tile.stages - 1) * tile.slots * (tile.rows * tile.chunk + scales + 2 * padded * columns)
