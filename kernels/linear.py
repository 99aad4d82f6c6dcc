"""Linear layers: a weight as the checkpoint stores it, and y = x @ w.T over it.

Contract of every ``linear_*`` backend: ``(x [T, K], weight) -> [T, N]`` in x's dtype, weight-only arithmetic
(activations are not quantised, ``input_scale`` is not used), sums in float32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nanoserve.kernels import nvfp4
from nanoserve.kernels.fp8 import widen
from nanoserve.kernels.prepared import Prepared, PreparedFp8

TILE_BYTES = 4 << 20
"""The reference expands this many float32 bytes of a weight at a time; with 32 MiB, which no cache holds, a CPU
took seven times as long."""


@dataclass(frozen=True, slots=True)
class Plain:
    """An unquantised weight, BF16, F16 or F32 [..., N, K]."""

    data: Tensor

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows as float32 [stop - start, K]."""
        return self.data[start:stop].float()


@dataclass(frozen=True, slots=True)
class Fp8:
    """float8_e4m3fn [..., N, K] with one float32 scale a matrix [...]: w = data * scale.

    ``prepared`` is what a product wants that quantises activations too; weight-only arithmetic does not use it.
    """

    data: Tensor
    scale: Tensor
    prepared: PreparedFp8 | None = None

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows as float32 [stop - start, K]."""
        return widen(self.data[start:stop]) * self.scale


@dataclass(frozen=True, slots=True)
class Nvfp4:
    """Packed NVFP4, see `nanoserve.kernels.nvfp4`: uint8 [..., N, K/2], e4m3 [..., N, K/16], float32 [...].

    A stack of experts may have more, which weight-only arithmetic does not use: ``input_scale``, float32 [E], by
    which a checkpoint for 4-bit activations divides what each expert reads; and what kernels want ``prepared``.
    """

    data: Tensor
    scales: Tensor
    global_scale: Tensor
    input_scale: Tensor | None = None
    prepared: Prepared | None = None

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows as float32 [stop - start, K]."""
        return nvfp4.unpack(self.data[start:stop], self.scales[start:stop], self.global_scale)


Weight = Plain | Fp8 | Nvfp4


def expert(stack: Weight, index: int) -> Weight:
    """One matrix out of a stack of experts, as a view."""
    match stack:
        case Plain(data):
            return Plain(data[index])
        case Fp8(data, scale):
            return Fp8(data[index], scale[index])
        case Nvfp4(data, scales, global_scale):
            return Nvfp4(data[index], scales[index], global_scale[index])


def linear(x: Tensor, weight: Weight) -> Tensor:
    """The reference for every format: expand a tile of rows to float32, multiply, move on.

    Args:
        x: [T, K], any float dtype.
        weight: [N, K].

    Returns:
        [T, N] in x's dtype.
    """
    return linear_f32(x, weight).to(x.dtype)


def linear_f32(x: Tensor, weight: Weight) -> Tensor:
    """`linear` with the float32 sums as they are: for logits, which are never rounded."""
    rows, wide = weight.data.shape[0], x.float()
    tile = max(1, TILE_BYTES // (4 * x.shape[-1]))
    parts = [wide @ weight.rows(start, min(start + tile, rows)).T for start in range(0, rows, tile)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def relu2(x: Tensor) -> Tensor:
    """relu(x)², the activation of every MLP and expert of the family."""
    return torch.relu(x).square()
