"""The launches of the CUDA C++ kernels in a released model's decode step, as their host side asks for them.

Nothing runs and no chip is needed: the ops are called over tensors without memory, in every layer's own formats,
and what they would load is written down.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from unittest.mock import patch

import torch
from torch import Tensor

from nanoserve.config import EngineConfig, ShapeName
from nanoserve.kernels import cuda_attention, cuda_mamba, cuda_ops, cuda_products, nvrtc
from nanoserve.kernels.attention import LayerKV
from nanoserve.kernels.chips import MULTIPROCESSORS
from nanoserve.kernels.fused import Norm
from nanoserve.kernels.mamba import MambaState, MambaWeights
from nanoserve.kernels.ssm import SsmWeights
from nanoserve.models.config import NemotronHConfig
from nanoserve.models.layers import Attention, Mamba, Mixer, Mlp
from nanoserve.models.nemotron_h import NemotronH
from nanoserve.shapes import examine_shape
from nanoserve.weights import DTYPES, Item, finish, kept_shape

_META = torch.device("meta")
PAGE = 16
"""Positions of a page: the engine's default."""


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel as it is loaded.

    Attributes:
        name: its file.
        defines: what NVRTC is given.
        threads, shared: of a block; bytes of dynamic shared memory.
    """

    name: str
    defines: tuple[tuple[str, str], ...]
    threads: int
    shared: int


@dataclass(slots=True)
class _Recorder:
    """In the place of `nanoserve.kernels.nvrtc.load`, and of what it gives."""

    seen: list[Launch] = field(default_factory=list[Launch])

    def load(
        self, name: str, defines: dict[str, str], threads: int, shared: int, device: torch.device
    ) -> "_Recorder":
        self.seen.append(Launch(name, tuple(defines.items()), threads, shared))
        return self

    def launch(self, blocks: int, arguments: ctypes.Structure, device: torch.device) -> None:
        pass


def launches(name: ShapeName, chip: tuple[int, int]) -> Iterator[tuple[str, Launch]]:
    """(op, launch) of a decode step of one token, each once.

    Args:
        name: a released shape.
        chip: compute capability.
    """
    examined = examine_shape(name, EngineConfig(device="cpu"))
    fields = {(item.layer, item.entry.field): _without_memory(item) for item in examined.manifest.items}
    model = NemotronH.build(examined.config, examined.ops, torch.bfloat16, fields)
    recorder, seen = _Recorder(), set[tuple[str, Launch]]()
    with ExitStack() as stack:
        stack.enter_context(patch.object(nvrtc, "load", recorder.load))
        stack.enter_context(patch.object(torch.cuda, "get_device_capability", _always(chip)))
        stack.enter_context(patch.object(cuda_products, "_multiprocessors", _always(MULTIPROCESSORS[chip])))
        for op in _ops(model):
            for launch in recorder.seen:
                if (op, launch) not in seen:
                    seen.add((op, launch))
                    yield op, launch
            recorder.seen.clear()


def _always(value: object) -> Callable[[torch.device], object]:
    return lambda _: value


def _without_memory(item: Item) -> object:
    if not item.parts or not item.parts[0].shape:
        return None
    return finish(
        item, {p.role: torch.empty(kept_shape(item, p), dtype=DTYPES[p.dtype], device=_META) for p in item.parts}
    )


def _ops(model: NemotronH) -> Iterator[str]:
    """Call each op of a decode step, and tell which it was."""
    stream = torch.empty((1, model.config.hidden_size), dtype=torch.bfloat16, device=_META)
    for layer, norm in zip(model.layers, model.norms[:-1], strict=True):
        yield from _layer(model.config, layer, norm, stream)
    cuda_ops.head(stream, model.norms[-1], model.lm_head)
    yield "head"


def _layer(c: NemotronHConfig, layer: Mixer, norm: Norm, stream: Tensor) -> Iterator[str]:
    match layer:
        case Mamba():
            (projected,) = cuda_ops.norm_linears(stream, norm, (layer.in_proj,))
            yield "norm_linears"
            ssm = SsmWeights(layer.a_log, layer.d, layer.dt_bias)
            weights = MambaWeights(layer.conv_weight, layer.conv_bias, ssm, layer.norm, c.eps)
            y = cuda_mamba.mamba_decode(projected, weights, _state(c))
            yield "mamba_decode"
            cuda_ops.linear_add(y, layer.out_proj, stream)
            yield "linear_add"
        case Attention():
            projected = cuda_ops.norm_linears(stream, norm, (layer.q_proj, layer.k_proj, layer.v_proj))
            yield "norm_linears"
            q, k, v = (m.unflatten(-1, (-1, c.head_dim)) for m in projected)
            table, positions = (torch.empty(1, dtype=kind, device=_META) for kind in (torch.int32, torch.int64))
            for kind in (torch.bfloat16, torch.float8_e4m3fn):
                pages = torch.empty((1, PAGE, c.kv_heads, c.head_dim), dtype=kind, device=_META)
                cuda_attention.attention_decode(q, k, v, LayerKV(pages, pages), table, positions)
            yield "attention_decode"
            cuda_ops.linear_add(q.flatten(1), layer.o_proj, stream)
            yield "linear_add"
        case Mlp():
            cuda_ops.mlp_add(stream, norm, layer.up_proj, layer.down_proj)
            yield "mlp_add"
        case _:
            cuda_ops.moe_add(stream, norm, layer.weights)
            yield "moe_add"


def _state(c: NemotronHConfig) -> MambaState:
    conv = torch.empty((c.conv_dim, cuda_mamba.WIDTH - 1), dtype=torch.bfloat16, device=_META)
    ssm = torch.empty((c.mamba_heads, c.mamba_head_dim, c.state_size), device=_META)
    return MambaState(conv, ssm, torch.empty(c.groups, dtype=torch.int32, device=_META))
