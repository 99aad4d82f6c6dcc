"""The launches of a decode step that read no weights, at released shapes, over tensors that have no memory.

Beside `nanoserve.kernels.weight_launches`; whoever records them (`nanoserve.kernels.aot`) can compile them for
chips that are not here.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from nanoserve.kernels import triton_attention, triton_mamba, triton_sample
from nanoserve.kernels.attention import LayerKV
from nanoserve.kernels.mamba import MambaState, MambaWeights
from nanoserve.kernels.sample import SamplerState
from nanoserve.kernels.ssm import SsmWeights
from nanoserve.kernels.tiles import TILES
from nanoserve.kernels.weight_launches import SHAPES, empty

VOCAB, STATES, GROUPS, HEAD = 131072, 128, 8, 64
"""Of all released shapes: vocabulary, Mamba's states, groups and size of a head."""

_F32 = torch.float32


def mamba(tokens: int, heads: int, chip: tuple[int, int]) -> None:
    """Mamba's step of a few tokens."""
    inner = heads * HEAD
    channels = inner + 2 * GROUPS * STATES
    numbers = SsmWeights(*(empty(heads, dtype=_F32) for _ in range(3)))
    conv_weight, conv_bias = empty(channels, 4, dtype=_F32), empty(channels, dtype=_F32)
    weights = MambaWeights(conv_weight, conv_bias, numbers, empty(inner, dtype=_F32), 1e-5)
    ssm = empty(heads, HEAD, STATES, dtype=_F32)
    state = MambaState(empty(channels, 3), ssm, empty(GROUPS, dtype=torch.int32))
    projected = empty(tokens, inner + channels + heads)
    triton_mamba.mamba_decode(projected, weights, state, TILES[chip]["mamba_decode"])


def attend(tokens: int, kv_dtype: torch.dtype, chip: tuple[int, int]) -> None:
    """Keys and values appended, and attention over them."""
    cache = LayerKV(empty(64, 16, 2, 128, dtype=kv_dtype), empty(64, 16, 2, 128, dtype=kv_dtype), 0.5, 0.5)
    table, positions = empty(64, dtype=torch.int32), empty(tokens, dtype=torch.int64)
    k, v = (empty(tokens, 2, 128) for _ in range(2))
    triton_attention.kv_append(k, v, cache, table, positions)
    q = empty(tokens, 32, 128)
    triton_attention.attend(q, cache, table, positions, TILES[chip]["attention_decode"])


def draw(chip: tuple[int, int]) -> None:
    """A draw without truncations, and one with all of them."""
    state = SamplerState.allocate(VOCAB, torch.device("meta"))
    out = empty(1, dtype=torch.int64)
    triton_sample.sample(empty(VOCAB, dtype=_F32), state, out, TILES[chip]["sample"])
    state.min_p, state.top_k, state.top_p = 0.1, 20, 0.9
    triton_sample.sample(empty(VOCAB, dtype=_F32), state, out, TILES[chip]["sample"])


def launches(name: str, tokens: int, chip: tuple[int, int]) -> Iterator[tuple[str, Callable[[], object]]]:
    """(what, call it) for each op of a decode step that reads no weights.

    Args:
        name: a released shape's.
        tokens: of the step.
        chip: its compute capability.
    """
    yield "mamba_decode", partial(mamba, tokens, SHAPES[name].inner // HEAD, chip)
    for kv_dtype in (torch.bfloat16, torch.float8_e4m3fn):
        kind = "FP8" if kv_dtype.itemsize == 1 else "BF16"
        yield f"attention_decode {kind}", partial(attend, tokens, kv_dtype, chip)
    yield "sample", partial(draw, chip)
