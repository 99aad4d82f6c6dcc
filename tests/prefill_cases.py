"""Random inputs of gpu_prefill.py, at released shapes; tiny ones where it is rehearsed."""

import os
from dataclasses import replace
from typing import Any

import torch
from gpu_inputs import random_weight
from torch import Tensor

from nanoserve.kernels.attention import LayerKV
from nanoserve.kernels.linear import Weight
from nanoserve.kernels.mamba import MambaState
from nanoserve.kernels.random_inputs import attention_inputs, mamba_inputs, random_routing
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
    return random_routing(count, experts, top_k, DEVICE)


def dense_weights(bits: int, rows: int, columns: int, count: int) -> list[Weight]:
    return [random_weight(bits, rows, columns, device=DEVICE) for _ in range(count)]


def mamba_case(count: int, heads: int, size: int, groups: int, states: int) -> tuple[Tensor, Any, MambaState]:
    """(in_proj's output, weights, state)."""
    return mamba_inputs(count, (heads, size, groups, states, 4), DEVICE)


def attention_case(
    count: int, length: int, heads: int, kv_heads: int, dim: int, kv: torch.dtype
) -> tuple[Tensor, LayerKV, Tensor, Tensor]:
    """(q, pages, their order, positions)."""
    return attention_inputs(count, length, (heads, kv_heads, dim), kv, DEVICE)
