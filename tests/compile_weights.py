"""Compiles the weight-reading kernels at released shapes for a chip that need not be here; a JSON line a kernel.

    python tests/compile_weights.py sm_120 nano,super 1 8      # architecture, shapes, numbers of tokens

A program of its own, for Triton's interpreter and its compiler do not go together in one.
"""

import json
import sys
from dataclasses import asdict, replace
from typing import Any

import aot
import torch

from nanoserve.kernels import tiles
from nanoserve.kernels.weight_launches import SHAPES, launches
from nanoserve.kernels.weight_tiles import Tile, fitted, tiles_for

CHIPS = {"sm_90": (9, 0), "sm_120": (12, 0), "sm_121": (12, 1)}


def always(bits: int, rows: int, columns: int, device: torch.device, *, tokens: int = 1, copies: int = 1) -> Tile:
    return fitted(Tile(slots=2, parts=4, early=1), bits, tokens)


def main() -> None:
    architecture, names, counts = sys.argv[1], sys.argv[2].split(","), [int(count) for count in sys.argv[3:]]
    own = tiles_for(CHIPS[architecture])
    tiles.dependent.__kwdefaults__ = {"early": 1}

    def cut(*arguments: Any, **options: Any) -> Tile:
        # Early launches, for what they add must fit the chip too.
        return replace(own(*arguments, **options), early=1)

    for name in names:
        for tokens in counts:
            # A layer's end once more, with programs that share a block's columns.
            shared = (row for row in launches(SHAPES[name], tokens, always) if row[0] in ("out_proj", "moe"))
            for what, call in (*launches(SHAPES[name], tokens, cut), *shared):
                with aot.recorded() as recorded:
                    call()
                for launch in recorded:
                    row = asdict(launch.compiled(architecture))
                    ptx = row.pop("ptx")
                    row |= {"shape": name, "op": what, "tokens": tokens, "grid": launch.grid}
                    row |= {"options": {k: v for k, v in launch.arguments.items() if k in ("CHUNK", "SLOTS")}}
                    early = ptx.find("griddepcontrol.wait"), ptx.find("cp.async.bulk.prefetch")
                    print(json.dumps({**row, "fetches_before_it_waits": 0 <= early[1] < early[0]}), flush=True)


if __name__ == "__main__":
    main()
