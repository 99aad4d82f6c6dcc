"""What ``nanoserve doctor`` found, as a table and as JSON."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nanoserve.calibrate import Calibration, told
from nanoserve.doctor_environment import Finding
from nanoserve.kernels.place import Reason
from nanoserve.op_checks import OpReport, OpRow


@dataclass(frozen=True, slots=True)
class DoctorReport:
    """Everything of one run.

    Attributes:
        version: nanoserve's.
        model: name of the checkpoint or shape.
        device: where the ops ran.
        bandwidth: that the bus reads at best, bytes a second.
        seed: of the random arguments, to make them again.
        findings: about the machine.
        ops: every op with every backend.
        calibration: of the experts' backends; None where it was not asked for, or there was no choice.
        left_out: what could not be run here, in sentences.
    """

    version: str
    model: str
    device: str
    bandwidth: float
    seed: int
    findings: tuple[Finding, ...]
    ops: OpReport
    calibration: Calibration | None
    left_out: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """Nothing on which an engine here depends has failed."""
        on_gpu = self.device != "cpu"
        return self.ops.sound and not (on_gpu and any(finding.verdict == "FAIL" for finding in self.findings))

    def data(self) -> dict[str, Any]:
        """As JSON."""
        rejected = [
            {"op": op, "backend": name, "code": why.code.value, "reason": why.text}
            for op, name, why in self.ops.rejected
        ]
        return {
            "sound": self.sound,
            "nanoserve": self.version,
            "model": self.model,
            "device": self.device,
            "bandwidth_tb_s": self.bandwidth / 1e12,
            "seed": self.seed,
            "environment": [asdict(finding) for finding in self.findings],
            "ops": [asdict(row) for row in self.ops.rows],
            "rejected": rejected,
            "unchecked": list(self.ops.unchecked),
            "calibration": None if self.calibration is None else asdict(self.calibration),
            "left_out": list(self.left_out),
        }

    def text(self) -> str:
        """As a table."""
        lines = ["environment", *map(_finding, self.findings), ""]
        bus = f"the bus reads {self.bandwidth / 1e12:.3g} TB/s at best"
        lines.append(f"ops of {self.model} on {self.device}, seed {self.seed}; {bus}")
        lines += [*_ops(self.ops.rows), *_rejected(self.ops.rejected)]
        if self.ops.unchecked:
            lines.append(f"  not in this model: {', '.join(self.ops.unchecked)}")
        if self.calibration is not None:
            lines += ["", f"experts decode on {self.calibration.backend}: {self.calibration.reason}"]
            lines += [f"  {told(outcome)}" for outcome in self.calibration.outcomes]
        lines += ["", *(f"not run: {sentence}" for sentence in self.left_out)]
        return "\n".join([*lines, self._verdict()])

    def _verdict(self) -> str:
        if self.sound:
            return "sound: every backend that an engine here would choose agrees with the reference"
        wrong = [f"{row.op} on {row.backend}" for row in self.ops.rows if _failed(row) and row.chosen]
        failed = [finding.name for finding in self.findings if finding.verdict == "FAIL"]
        return f"NOT SOUND: {', '.join([*wrong, *failed])}"


def _failed(row: OpRow) -> bool:
    return row.verdict not in ("reference", "right")


def _finding(finding: Finding) -> str:
    remedy = f" ({finding.remedy})" if finding.remedy else ""
    return f"  {finding.verdict:<7}{finding.name:<18}{finding.value}{remedy}"


def _ops(rows: Sequence[OpRow]) -> Iterator[str]:
    head = f"  {'op':<19}{'tokens':>6}  {'backend':<9}{'error':>9}{'may be':>9}{'µs':>10}{'TB/s':>8}{'bus':>6}"
    yield f"{head}  verdict"
    before = ""
    for row in rows:
        if row.op + row.what != before:
            before = row.op + row.what
            yield f"  {row.op}: {row.what}"
        error, may = (_number(value, ".1e") for value in (row.error, row.tolerance))
        us, rate, share = _number(row.us, ".1f"), _number(row.tb_s, ".3f"), _number(row.of_bus, ".0%")
        numbers = f"{error:>9}{may:>9}{us:>10}{rate:>8}{share:>6}"
        words = ", ".join(part for part in (row.verdict, "chosen" if row.chosen else "", row.reason) if part)
        yield f"  {'':<19}{row.tokens:>6}  {row.backend:<9}{numbers}  {words}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _rejected(rejected: Sequence[tuple[str, str, Reason]]) -> Iterator[str]:
    """A line a backend and reason, with the ops that it holds for."""
    groups: dict[tuple[str, str], list[str]] = {}
    for op, name, why in rejected:
        groups.setdefault((name, why.text), []).append(op)
    for (name, text), ops in groups.items():
        yield f"  not {name}: {text}: {', '.join(ops)}"
