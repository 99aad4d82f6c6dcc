"""Random inputs of gpu_prefill.py, at released shapes; tiny ones where it is rehearsed."""

import os
from dataclasses import replace
from typing import Any

import torch
from gpu_inputs import random_weight
from torch import Tensor

from nanoserve.kernels import mamba
from nanoserve.kernels.attention import LayerKV
from nanoserve.kernels.linear import Weight
from nanoserve.kernels.mamba import MambaState, MambaWeights
from nanoserve.kernels.ssm import SsmWeights
from nanoserve.kernels.weight_launches import SHAPES, Shape

REHEARSE = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if REHEARSE else "cuda")
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn

SCANS = {"nano": (64, 64, 8, 128), "super": (128, 64, 8, 128), "odd": (6, 20, 2, 24)}
"""Heads, their size, groups, states."""

ODD = replace(SHAPES["nano"], experts=11, top_k=3, size=80, hidden=48)

Dense = tuple[str, int, int, int, float]
"""(family, bits, rows, columns, how many a model has)."""

DENSE: dict[str, list[Dense]] = {
    "nano": [
        ("in_proj", 4, 10304, 2688, 17), ("in_proj", 16, 10304, 2688, 6),
        ("out_proj", 4, 2688, 4096, 17), ("out_proj", 16, 2688, 4096, 6),
        ("shared up", 4, 3712, 2688, 23), ("shared down", 4, 2688, 3712, 23),
        ("q", 16, 4096, 2688, 6), ("o", 16, 2688, 4096, 6), ("k v", 16, 256, 2688, 12),
    ],
    "super": [
        ("in_proj", 8, 18560, 4096, 28), ("in_proj", 16, 18560, 4096, 12),
        ("out_proj", 8, 4096, 8192, 29), ("out_proj", 16, 4096, 8192, 11),
        ("shared up", 8, 5376, 4096, 40), ("shared down", 8, 4096, 5376, 40),
        ("fc1", 16, 1024, 4096, 40), ("fc2", 16, 4096, 1024, 40),
        ("q", 16, 4096, 4096, 8), ("o", 16, 4096, 4096, 8), ("k v", 16, 256, 4096, 16),
    ],
}  # fmt: skip
"""What a prompt meets, to the layer: Super's few exceptions are counted with the rest."""

LAYERS = {"nano": (23, 23, 6), "super": (40, 40, 8)}
"""Of Mamba, experts and attention."""


def experts_case(name: str, bits: int) -> tuple[Weight, Weight, Shape]:
    """(stack of up, stack of down, shape)."""
    s = ODD if name == "odd" else SHAPES[name]
    width = s.latent or s.hidden
    up = random_weight(bits, s.experts, s.size, width, device=DEVICE)
    return up, random_weight(bits, s.experts, width, s.size, device=DEVICE), s


def routing(count: int, experts: int, top_k: int) -> tuple[Tensor, Tensor]:
    """Every token to experts of its own, chosen by chance."""
    ids = torch.rand(count, experts, device=DEVICE).topk(top_k, dim=-1).indices.int()
    return ids, torch.rand(count, top_k, device=DEVICE)


def dense_weights(bits: int, rows: int, columns: int, count: int) -> list[Weight]:
    return [random_weight(bits, rows, columns, device=DEVICE) for _ in range(count)]


def mamba_case(count: int, heads: int, size: int, groups: int, states: int) -> tuple[Tensor, Any, MambaState]:
    """(in_proj's output, weights, state)."""
    inner = heads * size
    channels = inner + 2 * groups * states

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE)

    numbers = SsmWeights(torch.log(1 + 15 * torch.rand(heads, device=DEVICE)), normal(heads), normal(heads) - 3)
    weights = MambaWeights(
        normal(channels, 4) * 0.5, normal(channels) * 0.1, numbers, 1 + normal(inner) / 10, 1e-5
    )
    state = mamba.state_of(normal(channels, 3).to(BF16), normal(heads, size, states), groups)
    return normal(count, inner + channels + heads).to(BF16), weights, state


def attention_case(
    count: int, length: int, heads: int, kv_heads: int, dim: int, kv: torch.dtype
) -> tuple[Tensor, LayerKV, Tensor, Tensor]:
    """(q, pages, their order, positions)."""
    used = -(-length // 16)
    k, v = (torch.randn((used + 3, 16, kv_heads, dim), device=DEVICE).clamp(-3, 3).to(kv) for _ in range(2))
    cache = LayerKV(k, v, 0.5, 0.25) if kv == FP8 else LayerKV(k, v)
    pages = torch.randperm(used + 3, device=DEVICE)[:used].int()
    q = torch.randn((count, heads, dim), device=DEVICE).to(BF16)
    return q, cache, pages, torch.arange(length - count, length, device=DEVICE)
