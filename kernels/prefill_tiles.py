"""How the prefill kernels are cut: choices as data; nothing is tried when an engine starts."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class ExpertTile:
    """How the experts' products over many tokens are cut.

    Attributes:
        rows: of a weight, a program.
        tokens: of one expert, a program.
        columns: a step; 64 at least where a weight has 4 bits.
        warps: of a program.
        stages: of the copies to shared memory.
    """

    rows: int
    tokens: int
    columns: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class PrefillTiles:
    """The choices of one chip.

    Attributes:
        experts: where an expert has many tokens, more than half of ``experts.tokens``, on average.
        few: where it has fewer.
        attention: (queries a program, keys a step, warps, stages).
        scan: (most tokens of a chunk, queries a program, warps of a state's program, warps of an output's).
        conv: (tokens, channels, warps) of a program.
    """

    experts: ExpertTile
    few: ExpertTile
    attention: tuple[int, int, int, int]
    scan: tuple[int, int, int, int]
    conv: tuple[int, int, int]


EXPERT_TILES = (
    ExpertTile(128, 128, 128, 8, 3),
    ExpertTile(128, 128, 128, 4, 3),
    ExpertTile(128, 64, 128, 4, 4),
    ExpertTile(64, 128, 128, 4, 4),
    ExpertTile(256, 128, 128, 8, 3),
    ExpertTile(128, 128, 256, 8, 3),
    ExpertTile(64, 32, 128, 4, 4),
    ExpertTile(128, 32, 256, 4, 3),
)
"""Worth trying on a large chip; tests/gpu_prefill.py measures them."""

_HOPPER = PrefillTiles(EXPERT_TILES[4], EXPERT_TILES[6], (128, 64, 4, 2), (128, 64, 4, 4), (16, 128, 4))
_BLACKWELL = PrefillTiles(
    ExpertTile(128, 64, 128, 4, 3), EXPERT_TILES[6], (64, 64, 8, 2), (64, 32, 8, 4), (32, 128, 4)
)

TILES: Mapping[tuple[int, int], PrefillTiles] = {(9, 0): _HOPPER, (12, 0): _BLACKWELL, (12, 1): _BLACKWELL}
"""Compute capability → its choices. H100 and H200 are 9.0, RTX PRO 6000 is 12.0 and DGX Spark 12.1."""


def tiles_on(device: torch.device) -> PrefillTiles:
    """The choices for a device; a CPU (Triton's interpreter) and the meta device take Hopper's."""
    chip = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return TILES.get(chip, _BLACKWELL)
