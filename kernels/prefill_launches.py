"""The prefill launches of the released models' layers, over tensors that have no memory.

Whoever records them (`nanoserve.kernels.aot`) can compile them for chips that are not here. What reads weights of
dense layers stands in `nanoserve.kernels.weight_launches`, but for the tile that only Hopper takes.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from unittest.mock import patch

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

TOKENS = 512
"""Of a chunk; the kernels are the same for any number beyond a tile."""

Tile = tuple[int, int, int, int]


def experts(name: str, bits: int, tile: ExpertTile) -> None:
    """The routed experts of a shape."""
    s = SHAPES[name]
    width = s.latent or s.hidden
    x, ids = empty(TOKENS, width), empty(TOKENS, s.top_k, dtype=torch.int32)
    up, down = weight(bits, s.experts, s.size, width), weight(bits, s.experts, width, s.size)
    experts_prefill(x, ids, empty(TOKENS, s.top_k, dtype=torch.float32), up, down, tile)


def attend(kv_dtype: torch.dtype, tile: Tile) -> None:
    """Attention over a paged cache."""
    cache = LayerKV(empty(64, 16, 2, 128, dtype=kv_dtype), empty(64, 16, 2, 128, dtype=kv_dtype), 0.5, 0.5)
    table, positions = empty(64, dtype=torch.int32), empty(TOKENS, dtype=torch.int64)
    attention_prefill(empty(TOKENS, 32, 128), cache, table, positions, tile)


def mamba(heads: int, tiles: PrefillTiles) -> None:
    """Convolution, scan and gated norm."""
    inner, numbers = heads * 64, empty(heads, dtype=torch.float32)
    channels = inner + 2048
    projected = empty(TOKENS, inner + channels + heads)
    xbc = projected[:, inner : inner + channels]
    kernel, bias = empty(channels, 4, dtype=torch.float32), empty(channels, dtype=torch.float32)
    mixed = conv_prefill(xbc, kernel, bias, empty(channels, 3), tiles.conv)
    x, b, c = mixed.split([inner, 1024, 1024], dim=-1)
    x, (b, c) = x.unflatten(1, (heads, 64)), (m.unflatten(1, (8, 128)) for m in (b, c))
    state = empty(heads, 64, 128, dtype=torch.float32)
    weights = SsmWeights(numbers, numbers, numbers)
    y = ssm_prefill(x, projected[:, -heads:], b, c, weights, state, 128, tiles.scan)
    gated_norm(y.flatten(1), projected[:, :inner], empty(inner, dtype=torch.float32), 8, 1e-5)


def scan(heads: int, tile: Tile) -> None:
    """`mamba` with another tile of the scan."""
    mamba(heads, replace(TILES[9, 0], scan=tile))


def gemm(bits: int, columns: int, tile: GemmTile) -> None:
    """A dense product with a tile of one's own."""

    def chosen(bits: int, tokens: int, device: torch.device) -> GemmTile:
        return tile

    with patch.object(triton_linear, "gemm_tile", chosen):
        triton_linear.linear(empty(TOKENS, columns), weight(bits, 4096, columns))


def launches(name: str, chip: tuple[int, int]) -> Iterator[tuple[str, Callable[[], object]]]:
    """(what, call it) for each op of a prefill step.

    Args:
        name: a released shape's.
        chip: its compute capability.
    """
    tiles, s = TILES[chip], SHAPES[name]
    for tile in (tiles.experts, tiles.few):
        yield "experts_prefill", partial(experts, name, 4, tile)
    for kv_dtype in (torch.bfloat16, torch.float8_e4m3fn):
        kind = "FP8" if kv_dtype.itemsize == 1 else "BF16"
        yield f"attention_prefill {kind}", partial(attend, kv_dtype, tiles.attention)
    yield "mamba prefill", partial(mamba, s.inner // 64, tiles)
    if chip == (9, 0):  # as `gemm_tile` chooses it on the card itself, where there are many tokens
        for bits in {s.mamba_bits, s.shared_bits, 16}:
            large = GemmTile(128, 256, 128 if bits == 4 else 64, warps=8)
            yield f"dense {bits} bits", partial(gemm, bits, s.hidden, large)
