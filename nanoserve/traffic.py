"""The bytes that a decoded token must move, counted from what is loaded, and what the bus gives at best."""

import time
from collections import Counter
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nanoserve.engine import Engine
from nanoserve.kernels.fused import MoeWeights
from nanoserve.kernels.linear import Fp8, Nvfp4
from nanoserve.models.layers import Attention, Mamba, Mlp, MoE

_GPU_BYTES, _CPU_BYTES = 4 << 30, 256 << 20


def token_traffic(engine: Engine, context: float) -> dict[str, int]:
    """Bytes that one token reads or writes at batch 1 and some tokens of context, by family.

    Every weight once, top_k of the routed experts, one row of the embedding, conv and SSM state read and written,
    and the KV cache read.
    """
    model, config = engine.model, engine.model.config
    total: Counter[str] = Counter({"embedding": model.embeddings[0].nbytes, "head": nbytes(model.lm_head)})
    total["norms"] = sum(norm.weight.nbytes for norm in model.norms)
    for mixer in model.layers:
        match mixer:
            case Mamba():
                total["mamba"] += nbytes(mixer)
            case Attention():
                total["attention"] += nbytes(mixer)
            case Mlp():
                total["mlp"] += nbytes(mixer)
            case MoE():
                total.update(moe_traffic(mixer.weights))
    total["state"] = 2 * engine.cache.shape.state_bytes(config)
    total["kv"] = round(engine.cache.shape.kv_bytes_per_token(config) * context)
    return {family: count for family, count in total.items() if count}


def moe_traffic(w: MoeWeights) -> dict[str, int]:
    """Bytes of weights that one token reads in a mixture of experts, by family."""
    return {
        "router": nbytes((w.gate, w.bias)),
        "experts": nbytes((w.up, w.down)) * w.top_k // len(w.gate),
        "shared": nbytes((w.shared_up, w.shared_down)),
        "latent": nbytes((w.latent_in, w.latent_out)),
    }


def nbytes(value: Any) -> int:
    """Bytes of the tensors in a dataclass or tuple, however deep; everything else weighs nothing."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, Nvfp4 | Fp8):
        value = replace(value, prepared=None)  # the same scales once more, of which a token reads one
    if is_dataclass(value) and not isinstance(value, type):
        return sum(nbytes(getattr(value, field.name)) for field in fields(value))
    return sum(map(nbytes, value)) if isinstance(value, tuple) else 0  # pyright: ignore[reportUnknownVariableType]


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second that the device reads at best, measured now."""
    if device.type == "cuda":
        from nanoserve.kernels.triton_read import read_bandwidth as on_gpu

        return on_gpu(min(_GPU_BYTES, torch.cuda.mem_get_info(device)[0] // 2), device)
    source = torch.ones(_CPU_BYTES // 4)
    return source.nbytes / min(_seconds(source) for _ in range(5))


def _seconds(source: Tensor) -> float:
    started = time.perf_counter()
    source.sum()
    return time.perf_counter() - started
