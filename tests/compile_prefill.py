"""Compiles the prefill kernels at released shapes for a chip that need not be here; prints a JSON line a kernel.

    python tests/compile_prefill.py sm_120

A program of its own, for Triton's interpreter and its compiler do not go together in one.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial

import aot
import torch

from nanoserve.kernels.prefill_experts import experts_prefill
from nanoserve.kernels.prefill_tiles import TILES, ExpertTile
from nanoserve.kernels.weight_launches import SHAPES, empty, weight

CHIPS = {"sm_90": (9, 0), "sm_120": (12, 0), "sm_121": (12, 1)}


def experts(name: str, bits: int, tile: ExpertTile) -> None:
    s = SHAPES[name]
    width = s.latent or s.hidden
    x, ids = empty(512, width), empty(512, s.top_k, dtype=torch.int32)
    up, down = weight(bits, s.experts, s.size, width), weight(bits, s.experts, width, s.size)
    experts_prefill(x, ids, empty(512, s.top_k, dtype=torch.float32), up, down, tile)


def calls(architecture: str) -> Iterator[tuple[str, Callable[[], object]]]:
    tiles = TILES[CHIPS[architecture]]
    for name in ("nano", "super"):
        for tile in (tiles.experts, tiles.few):
            yield f"experts {name}", partial(experts, name, 4, tile)


def main() -> None:
    architecture = sys.argv[1]
    for what, call in calls(architecture):
        with aot.recorded() as launches:
            call()
        for launch in launches:
            row = asdict(launch.compiled(architecture))
            del row["ptx"]
            print(json.dumps({"op": what, **row, "grid": launch.grid}), flush=True)


if __name__ == "__main__":
    main()
