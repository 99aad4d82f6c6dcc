"""How the Triton kernels are cut for each chip: tuned choices as data, nothing is tried when an engine starts."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from nanoserve.kernels import nvrtc

Tile = Mapping[str, int]

_BASE: Mapping[str, Tile] = {
    # rows of a head's state a program; fused: the norm in the same launch
    "mamba_decode": {"block_p": 8, "warps": 4, "fused": 1},
    # block: positions a step; programs: about as many as the chip has multiprocessors, over all KV heads;
    # wide: where the query rows of all tokens are more than 32, and more would not fit the registers
    "attention_decode": {
        "block": 64,
        "warps": 4,
        "wide_block": 32,
        "wide_warps": 8,
        "stages": 2,
        "programs": 128,
    },
    # block: logits a program; chunk: of them, held against all points of a search at once
    "sample": {"block": 1024, "chunk": 128, "warps": 4},
}

TILES: Mapping[tuple[int, int], Mapping[str, Tile]] = {
    (9, 0): _BASE,
    (12, 0): {**_BASE, "attention_decode": {**_BASE["attention_decode"], "programs": 192}},
    (12, 1): {**_BASE, "attention_decode": {**_BASE["attention_decode"], "programs": 64}},
}
"""Compute capability → op → its tile. H100 and H200 are 9.0, RTX PRO 6000 is 12.0 and DGX Spark 12.1."""


def tile_of(op: str, device: torch.device) -> Tile:
    """The op's tile on a device; on a CPU (Triton's interpreter) and on chips that nobody tuned, the base."""
    chip = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return TILES.get(chip, _BASE)[op] if chip else _BASE[op]


def dependent(device: torch.device, *, early: int = 0) -> dict[str, Any]:
    """Options for a launch that may begin before the one in front of it has ended."""
    return {"PDL": early, "launch_pdl": True} if early and device.type != "cpu" else {"PDL": 0}


def launch(kernel: Any, grid: tuple[int, ...], *arguments: object, **options: object) -> None:
    """Launch a Triton kernel, whose own types say nothing of a launch."""
    compiled = kernel[grid](*arguments, **options)
    if options.get("launch_pdl") and compiled is not None:  # nothing, where launches are only recorded
        _like_the_others(int(compiled.function))


@cache
def _like_the_others(function: int) -> None:
    """Let a kernel want as much shared memory as all that begin early, once it is loaded (see `nvrtc.even`)."""
    nvrtc.even(function)


def blocks(count: int, block: int) -> int:
    """How many blocks cover ``count``."""
    return -(-count // block)


def power_of_two(count: int) -> int:
    """The least power of two that is not less."""
    return 1 << (count - 1).bit_length()
