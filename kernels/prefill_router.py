"""The router for many tokens in Triton: its scores as one product, and the choice, a program a token."""

import torch
from torch import Tensor

from nanoserve.kernels.tiles import launch, power_of_two
from nanoserve.kernels.triton_moe import choose_kernel


def router_many(
    x: Tensor, gate: Tensor, bias: Tensor, top_k: int, scale: float, normalize: bool
) -> tuple[Tensor, Tensor]:
    """As `nanoserve.kernels.router.router`; of equal scores the lower number is taken first."""
    experts = len(gate)
    if x.device.type == "cuda" and gate.dtype == x.dtype == torch.bfloat16:
        logits = torch.mm(x, gate.T, out_dtype=torch.float32)  # BF16 products are exact in float32
    else:
        logits = x.float() @ gate.float().T
    ids = torch.empty((len(x), top_k), dtype=torch.int32, device=x.device)
    weights = torch.empty((len(x), top_k), dtype=torch.float32, device=x.device)
    launch(
        choose_kernel, (len(x),),
        logits, bias, ids, weights, experts, scale,
        TOP=top_k, NORMALIZE=normalize, BLOCK_E=power_of_two(experts), BLOCK_K=power_of_two(top_k), PDL=0,
        num_warps=1 if experts <= 128 else 4,
    )  # fmt: skip
    return ids, weights
