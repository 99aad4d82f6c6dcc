"""Host side of the weight-reading Triton kernels: which kernel, which tile, how many programs."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanoserve.errors import BackendError
from nanoserve.kernels.fused import Norm
from nanoserve.kernels.linear import Fp8, Nvfp4, Plain, Weight, relu2
from nanoserve.kernels.tiles import blocks, dependent, launch, power_of_two
from nanoserve.kernels.triton_gemm import gemm_kernel
from nanoserve.kernels.triton_skinny import linears_kernel
from nanoserve.kernels.triton_stream import linear_add_kernel, norm_kernel
from nanoserve.kernels.weight_tiles import Cut, Tile, gemm_tile, tile_of

FEW = 16
"""Up to so many tokens a product is bound by reading its weight."""
FETCHED = 20 << 20
"""Bytes of weights that are fetched ahead whole: they must stay in the second cache until they are read."""
WEIGHTS = 3
"""So many weights one launch takes."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A weight as a kernel's arguments: (data, block scales, scale of the matrix), bits of a weight, its shape."""

    tensors: tuple[Tensor, Tensor, Tensor]
    bits: int
    rows: int
    columns: int


def stored(weight: Weight) -> Stored:
    """A weight (or a stack of experts) as a kernel's arguments.

    Raises:
        BackendError: it is stored as F16 or F32.
    """
    match weight:
        case Nvfp4(data, scales, global_scale):
            return Stored((data.view(torch.int16), scales, global_scale), 4, data.shape[-2], 2 * data.shape[-1])
        case Fp8(data, scale):
            return Stored((data, data, scale), 8, *data.shape[-2:])
        case Plain(data) if data.dtype == torch.bfloat16:
            return Stored((data, data, data), 16, *data.shape[-2:])
        case Plain(data):
            raise BackendError(
                f"the triton backends read BF16, FP8 and NVFP4 weights, and this one is {data.dtype}: "
                "choose torch for the op"
            )


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
        "num_warps": tile.slots,
        **dependent(device, early=tile.early),
    }


def ahead(tile: Tile, device: torch.device, *weights: Stored) -> int:
    """Bytes of each row to fetch while the launch before ends: all, where the second cache holds the weights."""
    if not tile.early or device.type == "cpu":
        return 0
    total = sum(view.rows * view.columns * view.bits // 8 for view in weights)
    return 1 << 20 if total <= FETCHED else tile.slots * tile.chunk * (tile.stages - 1)


def checked(x: Tensor) -> Tensor:
    """Tokens as the kernels read them: BF16, one after another.

    Raises:
        BackendError: they are not BF16.
    """
    if x.dtype != torch.bfloat16:
        raise BackendError(
            f"the triton backends compute on bfloat16 activations, and these are {x.dtype}: "
            "use dtype 'bfloat16', or choose torch for the op"
        )
    return x.contiguous()


def linear(x: Tensor, weight: Weight) -> Tensor:
    """`nanoserve.kernels.linear.linear` for BF16 activations."""
    return products(x, (weight,), x.dtype)[0]


def linear_f32(x: Tensor, weight: Weight) -> Tensor:
    """`nanoserve.kernels.linear.linear_f32` for BF16 activations."""
    return products(x, (weight,), torch.float32)[0]


def head(stream: Tensor, norm: Norm, weight: Weight, out: Tensor | None = None) -> Tensor:
    """`nanoserve.kernels.fused.head`, in two launches."""
    logits = linear_f32(normed(stream, norm), weight)
    return logits if out is None else out.copy_(logits)


def norm_linears(stream: Tensor, norm: Norm, weights: tuple[Weight, ...]) -> tuple[Tensor, ...]:
    """`nanoserve.kernels.fused.norm_linears`: two launches for up to three weights and few tokens."""
    return products(normed(stream, norm), weights, stream.dtype)


def products(
    x: Tensor,
    weights: tuple[Weight, ...],
    dtype: torch.dtype,
    *,
    squared: bool = False,
    cut: Cut = tile_of,
) -> tuple[Tensor, ...]:
    """Products x @ w.T in a type of choice; relu2 of it with ``squared``, for a single weight and few tokens."""
    x = checked(x)
    if len(x) > FEW or len(weights) > WEIGHTS:
        return tuple(_many(x, weight, dtype) for weight in weights)
    views = [stored(weight) for weight in weights]
    outs = tuple(torch.empty((len(x), view.rows), dtype=dtype, device=x.device) for view in views)
    first, missing = views[0], WEIGHTS - len(views)
    rows = sum(view.rows for view in views)
    tile = cut(first.bits, rows, first.columns, x.device, tokens=len(x))
    arguments: list[Any] = []
    for view, out in zip(views, outs, strict=True):
        arguments += [*view.tensors, out, view.rows]
    arguments += [*first.tensors, outs[0], 0] * missing
    bits = [view.bits for view in views] + [0] * missing
    launch(
        linears_kernel, (sum(blocks(view.rows, tile.rows) for view in views),),
        x, x.shape[1], *arguments,
        T=len(x), K=first.columns, BITS1=bits[0], BITS2=bits[1], BITS3=bits[2], SQUARED1=squared,
        AHEAD=ahead(tile, x.device, *views),
        **shape_options(tile, len(x), x.device),
    )  # fmt: skip
    return outs


def plain_product(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """X @ weight.T on a GPU by the vendor's BF16 product, as ``dtype``: BF16 or float32."""
    if dtype == x.dtype:
        return torch.nn.functional.linear(x, weight)
    return torch.mm(x, weight.T, out_dtype=dtype)


def _many(x: Tensor, weight: Weight, dtype: torch.dtype) -> Tensor:
    if isinstance(weight, Plain) and x.device.type == "cuda":
        return plain_product(x, stored(weight).tensors[0], dtype)
    view, (tokens, columns) = stored(weight), x.shape
    tile = gemm_tile(view.bits, tokens, x.device)
    out = torch.empty((tokens, view.rows), dtype=dtype, device=x.device)
    if view.bits == 4:  # as the codes of a stored element lie
        x = x.view(tokens, columns // 4, 4).permute(2, 0, 1).contiguous()
    launch(
        gemm_kernel, (blocks(tokens, tile.tokens), blocks(view.rows, tile.rows)),
        x, *view.tensors, out, tokens, view.rows,
        K=columns, BITS=view.bits, BN=tile.rows, BK=tile.columns, BT=tile.tokens, STAGES=tile.stages,
        ASM=x.device.type != "cpu", num_warps=tile.warps,
    )  # fmt: skip
    return out


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`nanoserve.kernels.norm.norm`: a program a token."""
    out, size = torch.empty_like(x), x.shape[1]
    launch(norm_kernel, (len(x),), x, weight, out, size, eps, BLOCK=power_of_two(size), num_warps=8)
    return out


def normed(stream: Tensor, by: Norm) -> Tensor:
    """The residual stream as a layer reads it."""
    return norm(stream, by.weight, by.eps)


def linear_add(x: Tensor, weight: Weight, stream: Tensor) -> Tensor:
    """`nanoserve.kernels.fused.linear_add`, in one launch."""
    return linears_add(x, weight, None, None, stream)


def mlp_add(stream: Tensor, norm: Norm, up: Weight, down: Weight) -> Tensor:
    """`nanoserve.kernels.fused.mlp_add`, in three launches."""
    few = len(stream) <= FEW
    hidden = products(normed(stream, norm), (up,), stream.dtype, squared=few)[0]
    return linear_add(hidden if few else relu2(hidden), down, stream)


def linears_add(
    x: Tensor,
    weight: Weight,
    x2: Tensor | None,
    weight2: Weight | None,
    stream: Tensor,
    *,
    cut: Cut = tile_of,
) -> Tensor:
    """Stream + (linear(x, weight) + linear(x2, weight2)); without the second product where it is None."""
    if len(x) > FEW:
        delta = linear(x, weight)
        return stream + (delta if x2 is None or weight2 is None else delta + linear(x2, weight2))
    x, first = checked(x), stored(weight)
    second = stored(weight2) if weight2 else first
    tile = cut(first.bits, first.rows, first.columns, x.device, tokens=len(x))
    new = torch.empty_like(stream)
    launch(
        linear_add_kernel, (blocks(first.rows, tile.rows),),
        x, *first.tensors, x if x2 is None else checked(x2), *second.tensors, stream, new, first.rows,
        T=len(x), K1=first.columns, K2=second.columns, BITS1=first.bits, BITS2=second.bits if weight2 else 0,
        AHEAD=ahead(tile, x.device, first, second), **shape_options(tile, len(x), x.device),
    )  # fmt: skip
    return new
