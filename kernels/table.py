"""Which function runs each op: a literal table, resolved once at load, printed with its reasons.

A new backend is a line in `BACKENDS` and a predicate in `nanoserve.kernels.requirements`; the model never asks
which one runs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from nanoserve.errors import BackendError
from nanoserve.kernels.attention import LayerKV
from nanoserve.kernels.fused import MoeWeights, Norm
from nanoserve.kernels.linear import Fp8, Nvfp4, Plain, Weight
from nanoserve.kernels.mamba import MambaState, MambaWeights
from nanoserve.kernels.place import Experts as ExpertFacts
from nanoserve.kernels.place import Place, Reason
from nanoserve.kernels.probe import place_of
from nanoserve.kernels.requirements import ELECTIVE, NUMERICS, REQUIREMENTS
from nanoserve.kernels.sample import SamplerState
from nanoserve.kernels.ssm import SsmWeights

BACKENDS: Mapping[str, Mapping[str, str]] = {
    # op: {backend: "module:function"}, best first. The torch column is each op's meaning and runs anywhere.
    "norm": {
        "triton": "nanoserve.kernels.triton_linear:norm",
        "torch": "nanoserve.kernels.norm:norm",
    },
    "gated_norm": {
        "triton": "nanoserve.kernels.triton_prefill:gated_norm",
        "torch": "nanoserve.kernels.norm:gated_norm",
    },
    "linear_plain": {
        "triton": "nanoserve.kernels.triton_linear:linear",
        "torch": "nanoserve.kernels.linear:linear",
    },
    "linear_fp8": {
        "triton": "nanoserve.kernels.triton_linear:linear",
        "mm_fp8": "nanoserve.kernels.flashinfer_linear:linear_fp8",
        "torch": "nanoserve.kernels.linear:linear",
    },
    "linear_nvfp4": {
        "triton": "nanoserve.kernels.triton_linear:linear",
        "native": "nanoserve.kernels.flashinfer_linear:linear",
        "mm_fp4": "nanoserve.kernels.flashinfer_linear:linear_fp4",
        "torch": "nanoserve.kernels.linear:linear",
    },
    "head": {
        "cuda": "nanoserve.kernels.cuda_ops:head",
        "triton": "nanoserve.kernels.triton_linear:head",
        "torch": "nanoserve.kernels.fused:head",
    },
    "norm_linears": {
        "cuda": "nanoserve.kernels.cuda_ops:norm_linears",
        "triton": "nanoserve.kernels.triton_linear:norm_linears",
        "torch": "nanoserve.kernels.fused:norm_linears",
    },
    "linear_add": {
        "cuda": "nanoserve.kernels.cuda_ops:linear_add",
        "triton": "nanoserve.kernels.triton_linear:linear_add",
        "torch": "nanoserve.kernels.fused:linear_add",
    },
    "mlp_add": {
        "cuda": "nanoserve.kernels.cuda_ops:mlp_add",
        "triton": "nanoserve.kernels.triton_linear:mlp_add",
        "torch": "nanoserve.kernels.fused:mlp_add",
    },
    "moe_add": {
        "cuda": "nanoserve.kernels.cuda_ops:moe_add",
        "triton": "nanoserve.kernels.triton_experts:moe_add",
        "w4a16": "nanoserve.kernels.flashinfer_moe:moe_add_w4a16",
        "b12x": "nanoserve.kernels.flashinfer_moe:moe_add_b12x",
        "torch": "nanoserve.kernels.fused:moe_add",
    },
    "conv_prefill": {
        "triton": "nanoserve.kernels.triton_prefill:conv_prefill",
        "torch": "nanoserve.kernels.conv:conv",
    },
    "ssm_prefill": {
        "triton": "nanoserve.kernels.triton_scan:ssm_prefill",
        "torch": "nanoserve.kernels.ssm:ssm_scan",
    },
    "mamba_decode": {
        "cuda": "nanoserve.kernels.cuda_mamba:mamba_decode",
        "triton": "nanoserve.kernels.triton_mamba:mamba_decode",
        "ssu": "nanoserve.kernels.flashinfer_mamba:mamba_decode",
        "torch": "nanoserve.kernels.mamba:mamba_decode",
    },
    "kv_append": {
        "triton": "nanoserve.kernels.triton_attention:kv_append",
        "torch": "nanoserve.kernels.attention:kv_append",
    },
    "attention_prefill": {
        "triton": "nanoserve.kernels.triton_flash:attention_prefill",
        "torch": "nanoserve.kernels.attention:attention",
    },
    "attention_decode": {
        "cuda": "nanoserve.kernels.cuda_attention:attention_decode",
        "triton": "nanoserve.kernels.triton_attention:attention_decode",
        "xqa": "nanoserve.kernels.flashinfer_attention:attention_decode",
        "torch": "nanoserve.kernels.attention:attention_decode",
    },
    "router": {
        "triton": "nanoserve.kernels.triton_experts:router",
        "torch": "nanoserve.kernels.router:router",
    },
    "experts_prefill": {
        "cutlass": "nanoserve.kernels.flashinfer_experts:experts_cutlass",
        "triton": "nanoserve.kernels.prefill_experts:experts_prefill",
        "torch": "nanoserve.kernels.moe:experts",
    },
    "experts_few": {  # of a prefill step with fewer than PREFILL_FROM tokens
        "triton": "nanoserve.kernels.prefill_experts:experts_prefill",
        "w4a16": "nanoserve.kernels.flashinfer_experts:experts_w4a16",
        "b12x": "nanoserve.kernels.flashinfer_experts:experts_b12x",
        "torch": "nanoserve.kernels.moe:experts",
    },
    "sample": {
        "triton": "nanoserve.kernels.triton_sample:sample",
        "torch": "nanoserve.kernels.sample:sample",
    },
}

_COPIES = "copies the table of codes from the host"
HOST_BOUND: Mapping[tuple[str, str], str] = {
    # (op, backend) of a decode step that no CUDA graph can hold: why not.
    ("linear_nvfp4", "torch"): _COPIES,
    ("head", "torch"): _COPIES,
    ("attention_decode", "torch"): "asks how long the context is",
    ("norm_linears", "torch"): _COPIES,
    ("linear_add", "torch"): _COPIES,
    ("mlp_add", "torch"): _COPIES,
    ("moe_add", "torch"): "asks which experts were chosen",
    ("sample", "torch"): "takes the request's numbers from the host",
}

_NORMING = ("torch", "triton", "cuda")
"""Backends of a linear op that `norm_linears` stands in for; the others are chosen by name alone."""

Experts = Callable[[Tensor, Tensor, Tensor, Weight, Weight], Tensor]
Attend = Callable[[Tensor, LayerKV, Tensor, Tensor], Tensor]
Conv = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Resolution:
    """Why an op runs on its backend.

    ``rejected`` holds (backend, reason) pairs of those that cannot run, or are not chosen automatically.
    """

    op: str
    backend: str
    reason: str
    rejected: tuple[tuple[str, Reason], ...]


@dataclass(frozen=True, slots=True)
class Ops:
    """Every op of the model, resolved. Contracts stand at the torch functions that `BACKENDS` names."""

    norm: Callable[[Tensor, Tensor, float], Tensor]
    gated_norm: Callable[[Tensor, Tensor, Tensor, int, float], Tensor]
    linear_plain: Callable[[Tensor, Weight], Tensor]
    linear_fp8: Callable[[Tensor, Weight], Tensor]
    linear_nvfp4: Callable[[Tensor, Weight], Tensor]
    head: Callable[[Tensor, Norm, Weight, Tensor | None], Tensor]
    norm_linears: Callable[[Tensor, Norm, tuple[Weight, ...]], tuple[Tensor, ...]]
    linear_add: Callable[[Tensor, Weight, Tensor], Tensor]
    mlp_add: Callable[[Tensor, Norm, Weight, Weight], Tensor]
    moe_add: Callable[[Tensor, Norm, MoeWeights], Tensor]
    conv_prefill: Conv
    ssm_prefill: Callable[[Tensor, Tensor, Tensor, Tensor, SsmWeights, Tensor, int], Tensor]
    mamba_decode: Callable[[Tensor, MambaWeights, MambaState], Tensor]
    kv_append: Callable[[Tensor, Tensor, LayerKV, Tensor, Tensor], None]
    attention_prefill: Attend
    attention_decode: Callable[[Tensor, Tensor, Tensor, LayerKV, Tensor, Tensor], Tensor]
    router: Callable[[Tensor, Tensor, Tensor, int, float, bool], tuple[Tensor, Tensor]]
    experts_prefill: Experts
    experts_few: Experts
    sample: Callable[[Tensor, SamplerState, Tensor], None]
    report: tuple[Resolution, ...]

    def backend(self, op: str) -> str:
        """The name of an op's backend."""
        return next(row.backend for row in self.report if row.op == op)

    def linear(self, x: Tensor, weight: Weight) -> Tensor:
        """The linear op of the weight's own format: [T, K] → [T, N]."""
        return getattr(self, _linear_op(weight))(x, weight)

    def project(self, stream: Tensor, norm: Norm, weight: Weight) -> Tensor:
        """The linear op of the weight's own format over norm(stream), [T, H] → [T, N]; fused where it can be."""
        if self.backend(_linear_op(weight)) in _NORMING:
            return self.norm_linears(stream, norm, (weight,))[0]
        return self.linear(self.norm(stream, norm.weight, norm.eps), weight)


def _linear_op(weight: Weight) -> str:
    match weight:
        case Plain():
            return "linear_plain"
        case Fp8():
            return "linear_fp8"
        case Nvfp4():
            return "linear_nvfp4"


def select(
    device: torch.device, dtype: torch.dtype, choices: Mapping[str, str], experts: ExpertFacts | None = None
) -> Ops:
    """Resolve every op for a device.

    Args:
        device: where the model runs.
        dtype: the activations'.
        choices: op → backend, for ops that should not be chosen automatically.
        experts: the model's; None where it has none.

    Raises:
        BackendError: an unknown op or backend, or a chosen backend that cannot run here; names the choices.
    """
    report = resolve(place_of(device, dtype, experts), choices)
    functions: dict[str, Any] = {row.op: _function(BACKENDS[row.op][row.backend]) for row in report}
    expected = {field.name for field in fields(Ops)} - {"report"}
    assert functions.keys() == expected, "BACKENDS and Ops name different ops"
    return Ops(**functions, report=report)


def resolve(place: Place, choices: Mapping[str, str]) -> tuple[Resolution, ...]:
    """Every op's backend at a place: the chosen one, or else the best that can run and need not be named.

    Raises:
        BackendError: as `select`.
    """
    unknown = sorted(set(choices) - set(BACKENDS))
    if unknown:
        raise BackendError(f"unknown op {unknown[0]!r}; known are {', '.join(BACKENDS)}")
    return tuple(_resolve(op, place, choices.get(op)) for op in BACKENDS)


def describe(report: tuple[Resolution, ...]) -> list[str]:
    """The report for people: a line for each backend and reason, with its ops, and what was not taken for them.

    Where one line holds for every op, it says so.
    """
    groups: dict[tuple[str, str], list[Resolution]] = {}
    for row in report:
        groups.setdefault((row.backend, row.reason), []).append(row)
    lines: list[str] = []
    for (backend, reason), rows in groups.items():
        names = "every op" if len(rows) == len(report) else ", ".join(row.op for row in rows)
        others: dict[str, dict[str, None]] = {}
        for name, why in (pair for row in rows for pair in row.rejected):
            others.setdefault(str(why), {})[name] = None
        rejected = [f"not {', '.join(names)}: {why}" for why, names in others.items()]
        lines.append("; ".join([f"{backend} ({reason}): {names}", *rejected]))
    return lines


def _resolve(op: str, place: Place, choice: str | None) -> Resolution:
    reasons = {name: reason for name in BACKENDS[op] if (reason := REQUIREMENTS[name](place))}
    able = [name for name in BACKENDS[op] if name not in reasons]
    if choice is None:
        reasons |= {name: reason for name in able if name in ELECTIVE and (reason := ELECTIVE[name](place))}
        best = next(name for name in able if name not in reasons)  # torch is always there
        return Resolution(op, best, _told("the best that runs here", best), tuple(reasons.items()))
    if choice not in BACKENDS[op]:
        raise BackendError(f"op {op} has no backend {choice!r}; it has {', '.join(BACKENDS[op])}")
    if choice not in able:
        raise BackendError(f"op {op}: {choice} cannot run: {reasons[choice]}; able: {', '.join(able)}")
    return Resolution(op, choice, _told("chosen by name", choice), tuple(reasons.items()))


def _told(reason: str, backend: str) -> str:
    return f"{reason}; {NUMERICS[backend]}" if backend in NUMERICS else reason


def backends(
    op: str, device: torch.device, dtype: torch.dtype, experts: ExpertFacts | None = None
) -> tuple[dict[str, Callable[..., Any]], tuple[tuple[str, Reason], ...]]:
    """An op's backends that can run on a device, best first, and the others with their reasons."""
    place = place_of(device, dtype, experts)
    reasons = {name: REQUIREMENTS[name](place) for name in BACKENDS[op]}
    able = {name: _function(BACKENDS[op][name]) for name, reason in reasons.items() if reason is None}
    return able, tuple((name, reason) for name, reason in reasons.items() if reason is not None)


def _function(target: str) -> Callable[..., Any]:
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)
