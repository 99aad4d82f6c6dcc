"""Compiles the decode kernels at released shapes for a chip that need not be here; prints a JSON line a kernel.

    python tests/compile_decode.py sm_120 1 8      # architecture, then numbers of tokens

A program of its own, for Triton's interpreter and its compiler do not go together in one.
"""

import json
import sys
from dataclasses import asdict

import aot
import torch
from torch import Tensor

from nanoserve.kernels import triton_attention, triton_mamba, triton_sample
from nanoserve.kernels.attention import LayerKV
from nanoserve.kernels.mamba import MambaState, MambaWeights
from nanoserve.kernels.sample import SamplerState
from nanoserve.kernels.ssm import SsmWeights
from nanoserve.kernels.tiles import TILES

CHIPS = {"sm_90": (9, 0), "sm_120": (12, 0), "sm_121": (12, 1)}
VOCAB, STATES, GROUPS = 131072, 128, 8


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def mamba(tokens: int, heads: int, chip: tuple[int, int]) -> None:
    inner = heads * 64
    channels = inner + 2 * GROUPS * STATES
    numbers = SsmWeights(empty(heads), empty(heads), empty(heads))
    weights = MambaWeights(empty(channels, 4), empty(channels), numbers, empty(inner), 1e-5)
    conv = empty(channels, 3, dtype=torch.bfloat16)
    state = MambaState(conv, empty(heads, 64, STATES), empty(GROUPS, dtype=torch.int32))
    projected = empty(tokens, inner + channels + heads, dtype=torch.bfloat16)
    triton_mamba.mamba_decode(projected, weights, state, TILES[chip]["mamba_decode"])


def attend(tokens: int, kv_dtype: torch.dtype, chip: tuple[int, int]) -> None:
    cache = LayerKV(empty(64, 16, 2, 128, dtype=kv_dtype), empty(64, 16, 2, 128, dtype=kv_dtype), 0.5, 0.5)
    table, positions = empty(64, dtype=torch.int32), empty(tokens, dtype=torch.int64)
    k, v = (empty(tokens, 2, 128, dtype=torch.bfloat16) for _ in range(2))
    triton_attention.kv_append(k, v, cache, table, positions)
    q = empty(tokens, 32, 128, dtype=torch.bfloat16)
    triton_attention.attention_decode(q, cache, table, positions, TILES[chip]["attention_decode"])


def draw(chip: tuple[int, int]) -> None:
    state = SamplerState.allocate(VOCAB, torch.device("meta"))
    out = empty(1, dtype=torch.int64)
    triton_sample.sample(empty(VOCAB), state, out, TILES[chip]["sample"])
    state.min_p, state.top_k, state.top_p = 0.1, 20, 0.9
    triton_sample.sample(empty(VOCAB), state, out, TILES[chip]["sample"])


def main() -> None:
    architecture, counts = sys.argv[1], map(int, sys.argv[2:])
    chip = CHIPS[architecture]
    with aot.recorded() as launches:
        draw(chip)
        for tokens in counts:
            for heads in (64, 128):  # Nano and Lightning, Super
                mamba(tokens, heads, chip)
            for kv_dtype in (torch.bfloat16, torch.float8_e4m3fn):
                attend(tokens, kv_dtype, chip)
    done: set[str] = set()
    for launch in launches:
        key = f"{launch.kernel.__name__} {launch.signature()} {launch.options}"
        if key in done:
            continue
        done.add(key)
        compiled = asdict(launch.compiled(architecture))
        del compiled["ptx"]
        print(json.dumps({**compiled, "grid": launch.grid}), flush=True)


if __name__ == "__main__":
    main()
