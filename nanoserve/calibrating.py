"""Calibration on a real card: the candidates, how one is checked and timed, what the result holds for."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from nanoserve import __version__
from nanoserve.calibrate import OP, Calibration, Key, Outcome, calibrate
from nanoserve.kernels.flashinfer_experts import TOLERANCES
from nanoserve.kernels.table import HOST_BOUND, Ops, backends, select
from nanoserve.machine import driver_version
from nanoserve.op_cases import Subject, moe_case
from nanoserve.op_checks import REFERENCE, largest_error, outputs, timed
from nanoserve.trial import tried_elsewhere

_PACKAGES = ("torch", "triton", "flashinfer-python", "nvidia-cutlass-dsl", "nvidia-cutlass-dsl-libs-cu13")
_SEED = 20261129
_FIELDS = ("up", "down", "shared_up", "shared_down", "fc1", "fc2")


def calibrated(
    s: Subject, ops: Ops, named: Mapping[str, str], say: Callable[[str], None], *, anew: bool = False
) -> tuple[Ops, Calibration | None]:
    """The ops with the fastest decode backend of the experts, and how it was found, or None where nothing was.

    Nothing is measured on a CPU, without experts, or where the backend was chosen by name.

    Args:
        s: the model, and where.
        ops: as shipped.
        named: op → backend, chosen by the user.
        say: called with a line now and then.
        anew: measure though there is a result.
    """
    if s.device.type != "cuda" or s.experts is None or OP in named:
        return ops, None
    return choose(s, ops, named, say, key_of, anew=anew)


def choose(
    s: Subject,
    ops: Ops,
    named: Mapping[str, str],
    say: Callable[[str], None],
    key: Callable[[Subject, tuple[str, ...]], Key],
    *,
    anew: bool,
) -> tuple[Ops, Calibration | None]:
    """As `calibrated`, wherever the subject is; ``key`` says what the result holds for."""
    default = ops.backend(OP)
    able, _ = backends(OP, s.device, s.dtype, s.experts)
    candidates = [name for name in able if (OP, name) not in HOST_BOUND]
    if default not in candidates:
        return ops, None  # no graph can hold the default: this machine has none of the fast backends
    candidates.sort(key=lambda name: name != default)
    case = moe_case(s)
    result = calibrate(
        candidates,
        key(s, tuple(candidates)),
        measure=_measure(s, able),
        isolate=lambda name: tried_elsewhere(s, case, name, _SEED),
        say=say,
        anew=anew,
    )
    if s.device.type == "cuda":
        torch.cuda.empty_cache()  # the memory plan comes next
    if len(candidates) == 1:
        return ops, result
    chosen = select(s.device, s.dtype, {**named, OP: result.backend}, s.experts)
    report = tuple(replace(row, reason=result.reason) if row.op == OP else row for row in chosen.report)
    return replace(chosen, report=report), result


def key_of(s: Subject, candidates: tuple[str, ...]) -> Key:
    """What a result on this card, with these packages and this geometry holds for."""
    card = torch.cuda.get_device_properties(s.device)
    c = s.config
    geometry: dict[str, Any] = {
        "hidden": c.hidden_size,
        "experts": [c.experts, c.top_k, c.expert_size, c.expert_width, c.shared_size],
        "formats": [[field, bits, list(shape)] for field, bits, shape in s.formats if field in _FIELDS],
        "gate": str(s.gate),
        "dtype": str(s.dtype),
    }
    return Key(
        chip=f"{card.name}, {card.major}.{card.minor}, {card.multi_processor_count} multiprocessors",
        driver=driver_version() or "unknown",
        versions={"nanoserve": __version__, **{name: _version(name) for name in _PACKAGES}},
        geometry=geometry,
        candidates=candidates,
    )


def _measure(s: Subject, able: Mapping[str, Callable[..., Any]]) -> Callable[[str], Outcome]:
    """Checks a backend on a seed's arguments and times it in a CUDA graph over cold weights."""
    case, want = moe_case(s), list[list[Tensor]]()

    def measure(name: str) -> Outcome:
        if not want:
            want.append(outputs(case, able[REFERENCE], REFERENCE, _SEED, s.device))
        got = outputs(case, able[name], name, _SEED, s.device)
        tolerance = max(case.tolerance, TOLERANCES.get(name, 0.0))
        us, _ = timed(case, able[name], name, s)
        return Outcome(name, largest_error(got, want[0]), tolerance, us)

    return measure


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
