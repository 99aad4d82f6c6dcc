"""Host side of the weight-reading Triton kernels: which kernel, which tile, how many programs."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from nanoserve.kernels.fused import Norm
from nanoserve.kernels.linear import Fp8, Nvfp4, Plain, Weight
from nanoserve.kernels.triton_skinny import linears_kernel
from nanoserve.kernels.triton_stream import add_norm_kernel, linear_add_norm_kernel
from nanoserve.kernels.weight_tiles import Tile, tile_of

FEW = 16
"""Up to so many tokens a product is bound by reading its weight."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A weight as a kernel's arguments: data, block scales, scale of the matrix; bits of a weight; rows, columns."""

    tensors: tuple[Tensor, Tensor, Tensor]
    bits: int
    rows: int
    columns: int


def stored(weight: Weight) -> Stored:
    """A weight (or a stack of experts) as a kernel's arguments."""
    match weight:
        case Nvfp4(data, scales, global_scale):
            return Stored((data.view(torch.int16), scales, global_scale), 4, data.shape[-2], 2 * data.shape[-1])
        case Fp8(data, scale):
            return Stored((data, data, scale), 8, *data.shape[-2:])
        case Plain(data) if data.dtype == torch.bfloat16:
            return Stored((data, data, data), 16, *data.shape[-2:])
        case Plain(data):
            raise TypeError(f"the Triton kernels read BF16, FP8 and NVFP4 weights, and this one is {data.dtype}")


def shape_options(tile: Tile, tokens: int, device: torch.device) -> dict[str, Any]:
    """What every weight-reading kernel takes beside its arguments."""
    real = device.type != "cpu"  # on a CPU it is the interpreter
    return {
        "BN": tile.rows,
        "CHUNK": tile.chunk,
        "BT": 8 if tokens <= 8 else 16,
        "SLOTS": tile.slots,
        "STAGES": tile.stages,
        "ASM": real,
        "PDL": real and tile.early,
        "num_warps": tile.slots,
        **({"launch_pdl": True} if real and tile.early else {}),
    }


def checked(x: Tensor) -> Tensor:
    """Tokens as the kernels read them: BF16, one after another."""
    if x.dtype != torch.bfloat16:
        raise TypeError(f"the Triton kernels compute on BF16 activations, and these are {x.dtype}")
    return x.contiguous()


def linear(x: Tensor, weight: Weight) -> Tensor:
    """`nanoserve.kernels.linear.linear` for BF16 activations."""
    return linears(x, (weight,))[0]


def linear_f32(x: Tensor, weight: Weight) -> Tensor:
    """`nanoserve.kernels.linear.linear_f32` for BF16 activations."""
    return _launch(x, (weight,), torch.float32, squared=False)[0]


def linears(x: Tensor, weights: tuple[Weight, ...]) -> tuple[Tensor, ...]:
    """`nanoserve.kernels.fused.linears`, in one launch."""
    return _launch(x, weights, x.dtype, squared=False)


def linear_relu2(x: Tensor, weight: Weight) -> Tensor:
    """relu2(linear(x, weight))."""
    return _launch(x, (weight,), x.dtype, squared=True)[0]


def _launch(x: Tensor, weights: tuple[Weight, ...], dtype: torch.dtype, *, squared: bool) -> tuple[Tensor, ...]:
    x = checked(x)
    views = [stored(weight) for weight in weights]
    outs = tuple(torch.empty((len(x), view.rows), dtype=dtype, device=x.device) for view in views)
    first = views[0]
    tile = tile_of(first.bits, sum(view.rows for view in views), first.columns, x.device)
    arguments: list[Any] = []
    for view, out in zip(views, outs, strict=True):
        arguments += [*view.tensors, out, view.rows]
    arguments += [*first.tensors, outs[0], 0] * (3 - len(views))
    bits = [view.bits for view in views] + [0] * (3 - len(views))
    grid = (sum(triton.cdiv(view.rows, tile.rows) for view in views),)
    linears_kernel[grid](
        x, x.shape[1], *arguments,
        T=len(x), K=first.columns, BITS1=bits[0], BITS2=bits[1], BITS3=bits[2], SQUARED1=squared,
        **shape_options(tile, len(x), x.device),
    )  # fmt: skip
    return outs


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`nanoserve.kernels.norm.add_norm`: a program a token."""
    new = x if delta is None else torch.empty_like(x)
    normed = torch.empty_like(x)
    real = x.device.type != "cpu"
    size = x.shape[1]
    add_norm_kernel[(len(x),)](
        x, x if delta is None else delta, weight, new, normed, size, eps,
        ADD=delta is not None, PDL=real, BLOCK=triton.next_power_of_2(size), num_warps=8,
        **({"launch_pdl": True} if real else {}),
    )  # fmt: skip
    return new, normed


def linear_add_norm(x: Tensor, weight: Weight, stream: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """`nanoserve.kernels.fused.linear_add_norm`, in one launch."""
    return linears_add_norm(x, weight, None, None, stream, norm)


def mlp_add_norm(x: Tensor, up: Weight, down: Weight, stream: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """`nanoserve.kernels.fused.mlp_add_norm`, in two launches."""
    return linear_add_norm(linear_relu2(x, up), down, stream, norm)


def linears_add_norm(
    x: Tensor, weight: Weight, x2: Tensor | None, weight2: Weight | None, stream: Tensor, norm: Norm
) -> tuple[Tensor, Tensor]:
    """add_norm(stream, linear(x, weight) + linear(x2, weight2)); without the second product where it is None."""
    x, first = checked(x), stored(weight)
    second = stored(weight2) if weight2 else first
    tile = tile_of(first.bits, first.rows, first.columns, x.device)
    new, normed = torch.empty_like(stream), torch.empty_like(stream)
    linear_add_norm_kernel[(triton.cdiv(first.rows, tile.rows),)](
        x, *first.tensors, x if x2 is None else checked(x2), *second.tensors,
        stream, new, norm.weight, normed, norm.tickets, first.rows, norm.eps,
        T=len(x), K1=first.columns, K2=second.columns, BITS1=first.bits, BITS2=second.bits if weight2 else 0,
        FUSED=tile.fused, BLOCK=triton.next_power_of_2(first.rows), **shape_options(tile, len(x), x.device),
    )  # fmt: skip
    return (new, normed) if tile.fused else add_norm(new, None, norm.weight, norm.eps)
