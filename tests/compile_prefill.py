"""Compiles the prefill kernels at released shapes for a chip that need not be here; prints a JSON line a kernel.

    python tests/compile_prefill.py sm_120

A program of its own, for Triton's interpreter and its compiler do not go together in one.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from unittest.mock import patch

import aot
import torch

from nanoserve.kernels import triton_linear
from nanoserve.kernels.attention import LayerKV
from nanoserve.kernels.prefill_experts import experts_prefill
from nanoserve.kernels.prefill_tiles import TILES, ExpertTile, PrefillTiles
from nanoserve.kernels.ssm import SsmWeights
from nanoserve.kernels.triton_flash import attention_prefill
from nanoserve.kernels.triton_prefill import conv_prefill, gated_norm
from nanoserve.kernels.triton_scan import ssm_prefill
from nanoserve.kernels.weight_launches import SHAPES, empty, weight
from nanoserve.kernels.weight_tiles import GemmTile

CHIPS = {"sm_90": (9, 0), "sm_120": (12, 0), "sm_121": (12, 1)}


def experts(name: str, bits: int, tile: ExpertTile) -> None:
    s = SHAPES[name]
    width = s.latent or s.hidden
    x, ids = empty(512, width), empty(512, s.top_k, dtype=torch.int32)
    up, down = weight(bits, s.experts, s.size, width), weight(bits, s.experts, width, s.size)
    experts_prefill(x, ids, empty(512, s.top_k, dtype=torch.float32), up, down, tile)


def attend(kv_dtype: torch.dtype, tile: tuple[int, int, int, int]) -> None:
    cache = LayerKV(empty(64, 16, 2, 128, dtype=kv_dtype), empty(64, 16, 2, 128, dtype=kv_dtype), 0.5, 0.5)
    table, positions = empty(64, dtype=torch.int32), empty(512, dtype=torch.int64)
    attention_prefill(empty(512, 32, 128), cache, table, positions, tile)


def mamba(heads: int, tiles: PrefillTiles) -> None:
    inner, numbers = heads * 64, empty(heads, dtype=torch.float32)
    channels = inner + 2048
    projected = empty(512, inner + channels + heads)
    xbc = projected[:, inner : inner + channels]
    kernel, bias = empty(channels, 4, dtype=torch.float32), empty(channels, dtype=torch.float32)
    mixed = conv_prefill(xbc, kernel, bias, empty(channels, 3), tiles.conv)
    x, b, c = mixed.split([inner, 1024, 1024], dim=-1)
    x, (b, c) = x.unflatten(1, (heads, 64)), (m.unflatten(1, (8, 128)) for m in (b, c))
    state = empty(heads, 64, 128, dtype=torch.float32)
    weights = SsmWeights(numbers, numbers, numbers)
    y = ssm_prefill(x, projected[:, -heads:], b, c, weights, state, 128, tiles.scan)
    gated_norm(y.flatten(1), projected[:, :inner], empty(inner, dtype=torch.float32), 8, 1e-5)


def scan(heads: int, tile: tuple[int, int, int, int]) -> None:
    mamba(heads, replace(TILES[9, 0], scan=tile))


def gemm(bits: int, columns: int, tile: GemmTile) -> None:
    with patch.object(triton_linear, "gemm_tile", lambda bits, tokens, device: tile):  # pyright: ignore[reportUnknownLambdaType, reportUnknownArgumentType]
        triton_linear.linear(empty(512, columns), weight(bits, 4096, columns))


def calls(architecture: str) -> Iterator[tuple[str, Callable[[], object]]]:
    tiles = TILES[CHIPS[architecture]]
    for name in ("nano", "super"):
        for tile in (tiles.experts, tiles.few):
            yield f"experts {name}", partial(experts, name, 4, tile)
    for kv_dtype in (torch.bfloat16, torch.float8_e4m3fn):
        yield f"attention {kv_dtype}", partial(attend, kv_dtype, tiles.attention)
    yield "mamba nano", partial(mamba, 64, tiles)
    yield "mamba super", partial(mamba, 128, tiles)


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
