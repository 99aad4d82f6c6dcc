"""Random weights, states and tokens, made where they stay: what kernels are checked and timed on.

All values come from torch's random state, so that a seed makes them again.
"""

import torch
from torch import Tensor

from nanoserve.kernels import mamba
from nanoserve.kernels.attention import TICKETS, LayerKV
from nanoserve.kernels.fused import Norm
from nanoserve.kernels.linear import Fp8, Nvfp4, Plain, Weight
from nanoserve.kernels.mamba import MambaState, MambaWeights
from nanoserve.kernels.ssm import SsmWeights

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


def random_tokens(count: int, width: int, device: torch.device, dtype: torch.dtype = BF16) -> Tensor:
    """[count, width] in ``dtype``, normally distributed."""
    return torch.randn(count, width, device=device).to(dtype)


def random_weight(bits: int, *shape: int, device: torch.device) -> Weight:
    """Values of about 1 / sqrt(columns), in every code of the format; a stack where there are three sizes."""
    leading, (rows, columns) = shape[:-2], shape[-2:]
    spread = columns**-0.5
    match bits:
        case 4:
            data = torch.randint(0, 256, (*leading, rows, columns // 2), dtype=torch.uint8, device=device)
            scales = torch.randint(0x28, 0x48, (*leading, rows, columns // 16), dtype=torch.uint8, device=device)
            # Codes spread by 2.6, these scales by about 1.1.
            return Nvfp4(data, scales.view(FP8), torch.full(leading, spread / 3, device=device))
        case 8:
            data = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
            data = torch.where((data & 0x7F) == 0x7F, data & 0x80, data)  # not NaN
            return Fp8(data.view(FP8), torch.full(leading, spread / 80, device=device))
        case _:
            return Plain((torch.randn(shape, device=device) * spread).to(BF16))


def random_norm(size: int, device: torch.device) -> Norm:
    """Weights near 1."""
    return Norm(1 + 0.1 * torch.randn(size, device=device), 1e-5)


def random_routing(count: int, experts: int, top_k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids int32 [T, k], weights float32 [T, k]): every token to experts of its own, chosen by chance."""
    ids = torch.rand(count, experts, device=device).topk(top_k, dim=-1).indices.int()
    return ids, torch.rand(count, top_k, device=device)


def mamba_inputs(
    count: int, sizes: tuple[int, int, int, int, int], device: torch.device, dtype: torch.dtype = BF16
) -> tuple[Tensor, MambaWeights, MambaState]:
    """(in_proj's output, weights, state) of a Mamba layer.

    Args:
        count: tokens.
        sizes: heads, size of a head, groups, states, width of the convolution.
        device: where.
        dtype: the activations'.
    """
    heads, size, groups, states, width = sizes
    inner = heads * size
    channels = inner + 2 * groups * states

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    ssm = SsmWeights(torch.log(1 + 15 * torch.rand(heads, device=device)), normal(heads), normal(heads) - 3)
    between = normal(channels, width) * 0.5, normal(channels) * 0.1
    weights = MambaWeights(*between, ssm, 1 + 0.1 * normal(inner), 1e-5)
    state = mamba.state_of(normal(channels, width - 1).to(dtype), normal(heads, size, states), groups)
    return normal(count, inner + channels + heads).to(dtype), weights, state


def attention_inputs(
    count: int,
    length: int,
    sizes: tuple[int, int, int],
    kv: torch.dtype,
    device: torch.device,
    dtype: torch.dtype = BF16,
) -> tuple[Tensor, LayerKV, Tensor, Tensor]:
    """(q, pages, their order, positions) of the last tokens of a sequence.

    Args:
        count: tokens that ask.
        length: tokens of the sequence.
        sizes: heads, KV heads, size of a head.
        kv: the cache's type.
        device: where.
        dtype: of q.
    """
    heads, kv_heads, dim = sizes
    used = -(-length // 16)
    k, v = (torch.randn((used + 3, 16, kv_heads, dim), device=device).clamp(-3, 3).to(kv) for _ in range(2))
    tickets = torch.zeros((kv_heads, TICKETS), dtype=torch.int32, device=device)
    cache = LayerKV(k, v, *((0.5, 0.25) if kv == FP8 else (1.0, 1.0)), tickets)
    pages = torch.randperm(used + 3, device=device)[:used].int()
    q = torch.randn((count, heads, dim), device=device).to(dtype)
    return q, cache, pages, torch.arange(length - count, length, device=device)
