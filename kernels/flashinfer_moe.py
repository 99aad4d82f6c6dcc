"""A decode step's mixture of experts where FlashInfer computes the routed ones, and our launches all around them.

Before: the norm, and one launch with the router, the shared expert's first weight and the latent. After: one with
the shared expert's second weight, the latent's way back and the residual stream.
"""

from torch import Tensor

from nanoserve.kernels.flashinfer_experts import run
from nanoserve.kernels.fused import MoeWeights, Norm
from nanoserve.kernels.linear import relu2
from nanoserve.kernels.triton_experts import front, router
from nanoserve.kernels.triton_linear import FEW, checked, linear, linears_add, normed
from nanoserve.kernels.weight_tiles import tile_of


def moe_add_w4a16(stream: Tensor, norm: Norm, w: MoeWeights) -> Tensor:
    """As `nanoserve.kernels.fused.moe_add`, the routed experts by `run_moe_w4a16`."""
    return _around("w4a16", stream, norm, w)


def moe_add_b12x(stream: Tensor, norm: Norm, w: MoeWeights) -> Tensor:
    """As `nanoserve.kernels.fused.moe_add`, the routed experts by `B12xMoEWrapper`."""
    return _around("b12x", stream, norm, w)


def _around(backend: str, stream: Tensor, norm: Norm, w: MoeWeights) -> Tensor:
    x = normed(checked(stream), norm)
    ids, weights, shared, narrow = _before(x, w)
    routed = run(backend, narrow, ids, weights, w.up, w.down)
    if w.latent_out:
        return linears_add(routed, w.latent_out, shared, w.shared_down, stream)
    return linears_add(shared, w.shared_down, None, None, stream + routed)


def _before(x: Tensor, w: MoeWeights) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(ids, weights, the shared expert's hidden values, what the routed experts read)."""
    if len(x) <= FEW:
        return front(x, w, tile_of)
    ids, weights = router(x, w.gate, w.bias, w.top_k, w.scale, w.normalize)
    narrow = linear(x, w.latent_in) if w.latent_in else x
    return ids, weights, relu2(linear(x, w.shared_up)), narrow
