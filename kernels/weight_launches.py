"""The weight-reading launches of the released models' layers, over tensors that have no memory.

Whoever records the launches (`nanoserve.kernels.aot`) can compile them for chips that are not here, or time them.
Shapes and formats: the released configurations, ../shared/facts/model.md sections 1 and 4.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nanoserve.kernels.fused import MoeWeights, Norm, tickets
from nanoserve.kernels.linear import Fp8, Nvfp4, Plain, Weight
from nanoserve.kernels.triton_experts import moe_add, router
from nanoserve.kernels.triton_linear import linears_add, norm, products
from nanoserve.kernels.weight_tiles import Cut

_META = torch.device("meta")


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a released model's geometry and formats the launches depend on; formats in bits of a weight.

    Attributes:
        hidden: width of the residual stream.
        inner, projected: columns of a Mamba layer's out_proj, rows of its in_proj.
        heads, kv: rows of q_proj, and of k_proj and v_proj each.
        experts, top_k, size, shared, latent: of expert layers; latent is 0 where there is none.
        vocab: rows of the head.
        mamba_bits, shared_bits, head_bits: formats; the experts' is NVFP4, of the rest BF16.
        gate: type of the router's weight.
    """

    hidden: int
    inner: int
    projected: int
    heads: int
    kv: int
    experts: int
    top_k: int
    size: int
    shared: int
    latent: int
    vocab: int
    mamba_bits: int
    shared_bits: int
    head_bits: int
    gate: torch.dtype


SHAPES = {
    "nano": Shape(2688, 4096, 10304, 4096, 256, 128, 6, 1856, 3712, 0, 131072, 4, 4, 16, torch.float32),
    "lightning": Shape(2688, 4096, 10304, 4096, 256, 128, 6, 1856, 3712, 0, 131072, 8, 4, 4, torch.bfloat16),
    "super": Shape(4096, 8192, 18560, 4096, 256, 512, 22, 2688, 5376, 1024, 131072, 8, 8, 16, torch.bfloat16),
}
"""By the names of `nanoserve bench --shape`."""


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device=_META)


def weight(bits: int, *shape: int) -> Weight:
    """A weight, or a stack of them, without memory."""
    leading, (rows, columns) = shape[:-2], shape[-2:]
    scale = empty(*leading, dtype=torch.float32)
    match bits:
        case 4:
            scales = empty(*leading, rows, columns // 16, dtype=torch.float8_e4m3fn)
            return Nvfp4(empty(*leading, rows, columns // 2, dtype=torch.uint8), scales, scale)
        case 8:
            return Fp8(empty(*shape, dtype=torch.float8_e4m3fn), scale)
        case _:
            return Plain(empty(*shape))


def moe(s: Shape) -> MoeWeights:
    """An expert layer without memory."""
    width = s.latent or s.hidden
    return MoeWeights(
        gate=empty(s.experts, s.hidden, dtype=s.gate),
        bias=empty(s.experts, dtype=torch.float32),
        top_k=s.top_k,
        scale=2.5,
        normalize=True,
        up=weight(4, s.experts, s.size, width),
        down=weight(4, s.experts, width, s.size),
        shared_up=weight(s.shared_bits, s.shared, s.hidden),
        shared_down=weight(s.shared_bits, s.hidden, s.shared),
        latent_in=weight(16, s.latent, s.hidden) if s.latent else None,
        latent_out=weight(16, s.hidden, s.latent) if s.latent else None,
        tickets=empty(tickets(s.hidden), dtype=torch.int32),
    )


def launches(s: Shape, tokens: int, cut: Cut) -> Iterator[tuple[str, Callable[[], object]]]:
    """(what, call it) for each op of a decode step that reads weights.

    Args:
        s: a released shape.
        tokens: of the step.
        cut: of the chip.
    """
    x, inner = empty(tokens, s.hidden), empty(tokens, s.inner)
    before = Norm(empty(s.hidden, dtype=torch.float32), 1e-5)
    in_proj, out_proj = weight(s.mamba_bits, s.projected, s.hidden), weight(s.mamba_bits, s.hidden, s.inner)
    qkv = (weight(16, s.heads, s.hidden), *(weight(16, s.kv, s.hidden) for _ in range(2)))
    mixed, o_proj = empty(tokens, s.heads), weight(16, s.hidden, s.heads)
    experts, head = moe(s), weight(s.head_bits, s.vocab, s.hidden)
    bfloat16, float32 = torch.bfloat16, torch.float32
    yield "in_proj", partial(products, x, (in_proj,), bfloat16, cut=cut)
    yield "out_proj", partial(linears_add, inner, out_proj, None, None, x, cut=cut)
    yield "qkv", partial(products, x, qkv, bfloat16, cut=cut)
    yield "o_proj", partial(linears_add, mixed, o_proj, None, None, x, cut=cut)
    yield "moe", partial(moe_add, x, before, experts, cut=cut)
    yield "router", partial(router, x, experts.gate, experts.bias, s.top_k, 2.5, True)
    yield "norm", partial(norm, x, before.weight, before.eps)
    yield "head", partial(products, x, (head,), float32, cut=cut)
    yield "prefill", partial(products, empty(512, s.hidden), (in_proj,), bfloat16, cut=cut)
