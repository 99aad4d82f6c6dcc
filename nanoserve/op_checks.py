"""Every op with every backend that can run here, against the torch reference: error, time, share of the bus.

The reference runs on the same device and the same arguments. A backend that faults is told and the next goes on,
but for a fault that takes the device with it.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from nanoserve.breakdown import call_bytes
from nanoserve.kernels import flashinfer_experts, requirements
from nanoserve.kernels.place import Code, Reason
from nanoserve.kernels.probe import place_of
from nanoserve.kernels.requirements import ELECTIVE
from nanoserve.kernels.table import BACKENDS, HOST_BOUND, Resolution, backends
from nanoserve.op_cases import CONTEXT, OpCase, Subject, cases
from nanoserve.timing import median_us, sets_for
from nanoserve.traffic import nbytes

Verdict = Literal["reference", "right", "WRONG", "FAULT", "not run"]
REFERENCE = "torch"
_TOLERANCES = {**flashinfer_experts.TOLERANCES, **requirements.TOLERANCES}
_EAGER = (REFERENCE, "cutlass")
"""Not in a CUDA graph: the reference may ask the host, and CUTLASS runs in prefill alone."""


@dataclass(frozen=True, slots=True)
class OpRow:
    """One backend at one case.

    Attributes:
        op, what, tokens, backend: which.
        chosen: an engine here would take it.
        error, tolerance: ‖a - b‖ / ‖b‖ to the reference; None where it did not run.
        us: median microseconds a call, its data in no cache.
        tb_s, of_bus: bytes that a call must move in that time, and their share of what the bus reads.
        verdict: what follows.
        reason: of a fault.
    """

    op: str
    what: str
    tokens: int
    backend: str
    chosen: bool
    error: float | None
    tolerance: float
    us: float | None
    tb_s: float | None
    of_bus: float | None
    verdict: Verdict
    reason: str = ""


@dataclass(frozen=True, slots=True)
class OpReport:
    """All of them, and what could not be tried: (op, backend, reason)."""

    rows: tuple[OpRow, ...]
    rejected: tuple[tuple[str, str, Reason], ...]
    unchecked: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """No backend that would be chosen is wrong or faults."""
        return all(row.verdict in ("reference", "right") for row in self.rows if row.chosen)


Isolate = Callable[[OpCase, str], str | None]
"""Tries a backend in a process of its own: why it must not run here, or None."""


def check_ops(
    s: Subject,
    report: tuple[Resolution, ...],
    bandwidth: float,
    seed: int,
    progress: Callable[[int, int, str], None],
    isolate: Isolate,
) -> OpReport:
    """Check every case of a model.

    Args:
        s: the model, and where.
        report: what an engine would choose.
        bandwidth: of the bus, bytes a second.
        seed: of the random arguments.
        progress: called with (cases done, cases, the next one's op).
        isolate: asked first for each backend.
    """
    chosen = {row.op: row.backend for row in report}
    known = list(cases(s))
    rows: list[OpRow] = []
    for index, case in enumerate(known):
        progress(index, len(known), case.op)
        rows += _check(case, s, chosen[case.op], bandwidth, seed + index, isolate)
    progress(len(known), len(known), "")
    rejected = [(op, name, why) for op in BACKENDS for name, why in backends(op, s.device, s.dtype, s.experts)[1]]
    return OpReport(tuple(rows), tuple(rejected), tuple(_unchecked(s, known)))


def _unchecked(s: Subject, known: Iterable[OpCase]) -> Iterator[str]:
    """Ops that have no case here, though the table has them: this model does not use them, or nobody wrote one."""
    seen = {case.op for case in known}
    yield from (op for op in BACKENDS if op not in seen)


def _check(
    case: OpCase, s: Subject, chosen: str, bandwidth: float, seed: int, isolate: Isolate
) -> Iterator[OpRow]:
    able, _ = backends(case.op, s.device, s.dtype, s.experts)
    place = place_of(s.device, s.dtype, s.experts)
    want: list[Tensor] | None = None
    for name in (REFERENCE, *(name for name in able if name != REFERENCE)):
        row = partial(OpRow, case.op, case.what, case.tokens, name, name == chosen)
        tolerance = max(case.tolerance, _TOLERANCES.get(name, 0.0))
        nothing: dict[str, Any] = {
            "error": None,
            "tolerance": tolerance,
            "us": None,
            "tb_s": None,
            "of_bus": None,
        }
        if (why := ELECTIVE[name](place) if name in ELECTIVE else None) and why.code is Code.NOT_BUILT:
            yield row(**nothing, verdict="not run", reason=str(why))
            continue
        try:
            if name != REFERENCE and (why := isolate(case, name)):
                yield row(**nothing, verdict="FAULT", reason=why)
                continue
            got = outputs(case, able[name], name, seed, s.device)
            want = got if want is None else want
            error = largest_error(got, want)
            us, moved = timed(case, able[name], name, s)
        except Exception as fault:  # noqa: BLE001  # whatever it is: the others are to run all the same
            yield row(**nothing, verdict="FAULT", reason=_told(fault))
            if lost := device_lost(s.device):
                yield row(**nothing, verdict="not run", reason=f"the device is lost: {lost}")
                return
            continue
        rate = moved / us * 1e6
        fine: Verdict = "reference" if name == REFERENCE else "right"
        right: Verdict = fine if error <= tolerance else "WRONG"  # a NaN is not right
        times: dict[str, Any] = {"us": us, "tb_s": rate / 1e12, "of_bus": rate / bandwidth}
        yield row(error=error, tolerance=tolerance, **times, verdict=right)


def outputs(
    case: OpCase, function: Callable[..., Any], backend: str, seed: int, device: torch.device
) -> list[Tensor]:
    """What a backend makes of a seed's arguments: its results and the state that it wrote, as float64."""
    torch.manual_seed(seed)
    with torch.inference_mode():
        arguments = case.make(backend)
        result = function(*arguments)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        written = [arguments[index] for index in case.state]
        return [tensor.double() for tensor in _tensors((result, *written))]


def largest_error(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest of ‖a - b‖ / ‖b‖; NaN where anything is NaN, and infinity where shapes differ."""
    if [tensor.shape for tensor in got] != [tensor.shape for tensor in want]:
        return float("inf")
    errors = [_error(a, b) for a, b in zip(got, want, strict=True)]
    return max(errors, key=lambda error: float("inf") if error != error else error, default=0.0)


def _error(got: Tensor, want: Tensor) -> float:
    """What is equal differs by nothing, infinite or not."""
    difference = torch.where(got == want, 0.0, got - want)
    return float(difference.norm() / torch.where(want.isinf(), 0.0, want).norm().clamp_min(1e-30))


def device_lost(device: torch.device) -> str | None:
    """What a fault before has left of the device: its error, or None where it still works."""
    if device.type != "cuda":
        return None
    try:
        torch.zeros(1, device=device).add_(1)
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        return _told(error)
    return None


def timed(case: OpCase, function: Callable[..., Any], backend: str, s: Subject) -> tuple[float, int]:
    """(microseconds a call, bytes that it must move)."""
    with torch.inference_mode():
        first = case.make(backend)
        moved = max(call_bytes(case.op, first, CONTEXT), 1)
        count = sets_for(moved, nbytes(first)) if s.device.type == "cuda" else 1
        sets = [first, *(case.make(backend) for _ in range(count - 1))]
        captured = backend not in _EAGER and (case.op, backend) not in HOST_BOUND
        return median_us([partial(function, *own) for own in sets], s.device, captured=captured), moved


def _told(fault: BaseException) -> str:
    text = str(fault).strip().splitlines()
    return f"{type(fault).__name__}: {text[0] if text else ''}"


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a value, however deep, but for tickets, which are nobody's result."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            if field.name != "tickets":
                yield from _tensors(getattr(value, field.name))
    elif isinstance(value, tuple | list):
        for part in value:  # pyright: ignore[reportUnknownVariableType]
            yield from _tensors(part)
