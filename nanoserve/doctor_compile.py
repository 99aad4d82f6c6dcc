"""``nanoserve doctor --compile``: every kernel at the released shapes, compiled for chips that need not be here.

What is compiled: our Triton kernels of a decode step (`DECODE_TOKENS`) and of prefill, and our CUDA C++ kernels of
a decode step of one token, for any chip; and FlashInfer's CuTe-DSL expert kernels (`EXPERT_TOKENS`) for sm_120a
and sm_121a. "Compiled for" is all it can say.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any, get_args

from nanoserve.compile_job import Family, Job, Row
from nanoserve.config import ShapeName
from nanoserve.errors import ConfigError
from nanoserve.kernels import nvrtc
from nanoserve.kernels.chips import ARCHITECTURES, may_spill, shared_limit

DECODE_TOKENS = (1, 2, 4, 8)
"""Of a decode step's kernels of ours: one sequence, and up to seven tokens of speculation."""

EXPERT_TOKENS = (1, 2, 4, 63)
"""Of the routed experts' backends: from 64 tokens on the layer prefills."""

OURS: tuple[Family, ...] = ("decode", "weights", "prefill", "cuda")


@dataclass(frozen=True, slots=True)
class Missing:
    """What was not compiled, and why; ``fault`` where it should have been."""

    architecture: str
    what: str
    reason: str
    fault: bool


@dataclass(frozen=True, slots=True)
class CompileReport:
    """All kernels of all chips."""

    rows: tuple[Row, ...]
    missing: tuple[Missing, ...]

    @property
    def sound(self) -> bool:
        """Every kernel was compiled and fits its chip."""
        return bool(self.rows) and all(fits(row) for row in self.rows) and not any(m.fault for m in self.missing)

    def data(self) -> dict[str, Any]:
        """As JSON."""
        limits = {row.architecture: shared_limit(row.architecture) for row in self.rows}
        return {
            "sound": self.sound,
            "shared_limits": limits,
            "kernels": [{**asdict(row), "verdict": verdict(row)} for row in self.rows],
            "missing": [asdict(m) for m in self.missing],
        }

    def text(self) -> str:
        """As a table: a line a chip, op and kernel, with the largest needs over shapes and tokens."""
        return "\n".join([*_table(self.rows), *map(_told, self.missing), *_summary(self.rows)])


def compile_kernels(
    architectures: Sequence[str],
    progress: Callable[[int, int, int], None],
    *,
    families: Sequence[Family] = get_args(Family),
    shapes: Sequence[str] = get_args(ShapeName),
    decode_tokens: Sequence[int] = DECODE_TOKENS,
    expert_tokens: Sequence[int] = EXPERT_TOKENS,
    workers: int | None = None,
) -> CompileReport:
    """Compile them, a process a job and as many at once as there are cores.

    Args:
        architectures: names out of `ARCHITECTURES`.
        progress: called with (jobs done, jobs, kernels so far).
        families: which kernels.
        shapes: released ones.
        decode_tokens: of a decode step.
        expert_tokens: of the routed experts' backends.
        workers: processes at once.

    Raises:
        ConfigError: an unknown chip.
    """
    jobs, missing = list[Job](), list[Missing]()
    for architecture in architectures:
        shared_limit(architecture)  # an unknown chip is told before anything is compiled
        for family in families:
            if (gap := _gap(architecture, family)) is not None:
                missing.append(gap)
                continue
            tokens = tuple(expert_tokens if family == "experts" else decode_tokens)
            jobs += [Job(architecture, family, shape, tokens) for shape in shapes]
    rows: list[Row] = []
    with ThreadPoolExecutor(workers or max(1, len(os.sched_getaffinity(0)))) as pool:
        for done, (found, fault) in enumerate(pool.map(run_job, jobs), 1):
            rows += found
            missing += [fault] if fault else []
            progress(done, len(jobs), len(rows))
    return CompileReport(tuple(rows), tuple(missing))


def parse_architectures(text: str) -> tuple[str, ...]:
    """A comma-separated list of chips.

    Raises:
        ConfigError: an unknown chip, or none.
    """
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for name in names:
        if name not in ARCHITECTURES:
            raise ConfigError(f"compile is {text!r}: {name!r} is not known; known are {', '.join(ARCHITECTURES)}")
    if not names:
        raise ConfigError(f"compile is {text!r} and must name chips, such as sm_120a,sm_121a")
    return names


def fits(row: Row) -> bool:
    """Whether the chip can take the kernel as it must be."""
    return verdict(row).startswith("fits")


def verdict(row: Row) -> str:
    """What the chip's limits say of a kernel."""
    limit = shared_limit(row.architecture)
    if row.shared > limit:
        return f"DOES NOT FIT: {row.shared} bytes of shared memory, and a block has {limit}"
    if row.checks.get("e2m1_in_hardware") is False:
        return "SOFTWARE: it converts to E2M1 without the chip's instructions"
    if not row.spilled:
        return "fits"
    if row.origin == "flashinfer":
        return "fits, with some of its stack in memory: FlashInfer's own code"
    if may_spill(row.architecture):
        return "fits, with a few spills: the fastest measured tile"
    return f"SPILLS {row.spilled} bytes"


def _gap(architecture: str, family: Family) -> Missing | None:
    """Why a family is not compiled for a chip."""
    if not find_spec("triton"):
        return Missing(architecture, family, "triton is not installed: pip install triton", fault=True)
    if family == "cuda":
        reason = nvrtc.missing()
        return Missing(architecture, "our CUDA C++ kernels", reason, fault=True) if reason else None
    if family != "experts":
        return None
    what = "FlashInfer's expert kernels"
    from nanoserve.kernels.flashinfer_compile import refusal

    if reason := refusal(architecture):
        return Missing(architecture, what, reason, fault=False)
    if absent := [name for name in ("flashinfer", "cutlass") if not find_spec(name)]:
        return Missing(architecture, what, f"{absent[0]} is not installed: see pyproject.toml", fault=True)
    return None


def run_job(job: Job) -> tuple[list[Row], Missing | None]:
    """A job's rows, and how it failed if it did."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "nanoserve.compile_job", json.dumps(asdict(job))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    rows = [Row(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith('{"architecture"')]
    if done.returncode == 0:
        return rows, None
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return rows, Missing(
        job.architecture, f"{job.family} {job.shape}, from kernel {len(rows) + 1} on", last, fault=True
    )


def _grouped(rows: Iterable[Row]) -> dict[tuple[str, str, str, str], list[Row]]:
    groups: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.architecture, row.origin, row.op, row.kernel), []).append(row)
    return groups


def _table(rows: Sequence[Row]) -> Iterator[str]:
    chip = ""
    for (architecture, _, op, kernel), group in _grouped(rows).items():
        if architecture != chip:
            chip = architecture
            yield ""
            yield f"compiled for {chip} ({shared_limit(chip):,} bytes of shared memory a block)"
            head = f"  {'op':<27}{'kernel':<42}{'shapes':<21}{'tokens':<9}"
            yield f"{head}{'regs':>5}{'spill':>6}{'shared':>8}  verdict"
        shapes = ",".join(dict.fromkeys(row.shape for row in group))
        counts = ",".join(str(n) for n in dict.fromkeys(row.tokens for row in group) if n) or "any"
        needs = [max(getattr(row, name) for row in group) for name in ("registers", "spilled", "shared")]
        worst = next(
            (verdict(row) for row in group if not fits(row)), verdict(max(group, key=lambda r: r.spilled))
        )
        numbers = f"{needs[0]:>5}{needs[1]:>6}{needs[2]:>8}"
        yield f"  {op:<27}{kernel[:41]:<42}{shapes:<21}{counts:<9}{numbers}  {worst}"


def _told(missing: Missing) -> str:
    word = "FAILED" if missing.fault else "not compiled"
    return f"\n{word}: {missing.what} for {missing.architecture}: {missing.reason}"


def _summary(rows: Sequence[Row]) -> Iterator[str]:
    yield ""
    for architecture in dict.fromkeys(row.architecture for row in rows):
        own = [row for row in rows if row.architecture == architecture]
        kernels = len(_grouped(own))
        wrong = len({(row.op, row.kernel) for row in own if not fits(row)})
        most = max(row.shared for row in own)
        yield (
            f"{architecture}: {kernels} kernels compiled in {len(own)} launches, {wrong} do not fit; "
            f"shared memory at most {most:,} of {shared_limit(architecture):,} bytes"
        )
