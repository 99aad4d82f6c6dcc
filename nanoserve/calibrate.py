"""Which decode backend of the experts is the fastest on this card: measured once, kept, and told.

Of backends that can run, those that fault or disagree with the reference are excluded, with the reason. What
quantises activations must win by `MARGIN`. With one candidate nothing is measured and nothing is written.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from nanoserve.cached import cache_folder, write

MARGIN = 0.03
"""By how much a backend that quantises activations must be faster than the fastest that does not."""

NARROW = frozenset({"b12x", "cutlass"})
"""Backends that quantise activations to 4 bits."""

OP = "moe_add"
"""What is calibrated: the decode step's experts."""

FORMAT = 2
"""Of the cache file."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Key:
    """What a result holds for.

    Attributes:
        chip: name, compute capability and multiprocessors.
        driver: its version.
        versions: of the packages that compile or hold kernels, this one included.
        geometry: of the model, as far as the op depends on it.
        candidates: the backends that could run.
    """

    chip: str
    driver: str
    versions: Mapping[str, str]
    geometry: Mapping[str, Any]
    candidates: tuple[str, ...]

    def data(self) -> dict[str, Any]:
        """As JSON gives it back."""
        return json.loads(json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True))

    def path(self, folder: Path) -> Path:
        """The file of this key."""
        text = json.dumps(self.data(), sort_keys=True)
        return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


@dataclass(frozen=True, slots=True)
class Outcome:
    """One candidate: its error and time, or why it is excluded."""

    backend: str
    error: float | None = None
    tolerance: float | None = None
    us: float | None = None
    excluded: str = ""


@dataclass(frozen=True, slots=True)
class Calibration:
    """What came of it.

    Attributes:
        backend: to use; the shipped default where nothing could be measured.
        reason: why, for the startup report.
        outcomes: of all candidates.
        kept: whether they come from the cache file.
    """

    backend: str
    reason: str
    outcomes: tuple[Outcome, ...] = field(default=())
    kept: bool = False


BUDGET = 60.0
"""Seconds after which no further candidate is begun; what is known by then decides, and is not kept."""

Measure = Callable[[str], Outcome]
"""Checks and times a candidate; what it raises excludes the candidate."""
Isolate = Callable[[str], str | None]
"""Tries a candidate in a process of its own: why it is excluded, or None."""


def calibrate(
    candidates: Sequence[str],
    key: Key,
    measure: Measure,
    isolate: Isolate,
    say: Say,
    *,
    folder: Path | None = None,
    anew: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> Calibration:
    """Measure the candidates, or take what was measured before.

    Args:
        candidates: backends that can run, the shipped default first.
        key: what the result will hold for.
        measure: checks and times one.
        isolate: asked first.
        say: called with a line for each.
        folder: of the cache files.
        anew: measure though there is a result.
        clock: seconds.
    """
    if len(candidates) == 1:
        return Calibration(candidates[0], "the only one that can run here")
    path = key.path(folder or cache_folder() / "calibration")
    if not anew and (kept := _read(path, key, say)) is not None:
        return _chosen(candidates[0], kept, kept=True)
    outcomes, started, in_time = list[Outcome](), clock(), True
    for index, name in enumerate(candidates, 1):
        if not (in_time := clock() - started < BUDGET):
            outcomes.append(Outcome(name, excluded=f"no time left of {BUDGET:.0f} s"))
            continue
        say(f"calibrating {OP}, {index} of {len(candidates)}: {name}")
        outcomes.append(_tried(name, measure, isolate))
        say(f"  {told(outcomes[-1])}")
    if in_time:
        _keep(path, key, outcomes, say)
    return _chosen(candidates[0], outcomes, kept=False)


def _keep(path: Path, key: Key, outcomes: Sequence[Outcome], say: Say) -> None:
    rows = [asdict(outcome) for outcome in outcomes]
    try:
        write(path, json.dumps({"key": key.data(), "outcomes": rows}, indent=1))
    except OSError as error:
        say(f"the calibration could not be kept, and the next start repeats it: {error}")


def pick(outcomes: Sequence[Outcome]) -> Outcome | None:
    """The fastest; one that quantises activations only where it is `MARGIN` faster than all that do not."""
    able = sorted((o for o in outcomes if o.us is not None and not o.excluded), key=lambda o: o.us or math.inf)
    wide = [o for o in able if o.backend not in NARROW]
    if not able or not wide:
        return able[0] if able else None
    best, rival = able[0], wide[0]
    assert best.us is not None
    assert rival.us is not None
    return best if best.us <= rival.us * (1 - MARGIN) else rival


def told(outcome: Outcome) -> str:
    """One candidate for people."""
    if outcome.excluded:
        return f"{outcome.backend} excluded: {outcome.excluded}"
    numerics = ", activations in 4 bits" if outcome.backend in NARROW else ""
    return f"{outcome.backend} {outcome.us:.1f} µs, error {outcome.error:.1e}{numerics}"


def _tried(name: str, measure: Measure, isolate: Isolate) -> Outcome:
    """A candidate's outcome; nothing that it does keeps the engine from starting."""
    try:
        if reason := isolate(name):
            return Outcome(name, excluded=reason)
        found = measure(name)
    except Exception as fault:  # noqa: BLE001  # whatever it is, the backend is excluded and the reason told
        lines = str(fault).strip().splitlines()
        return Outcome(name, excluded=f"{type(fault).__name__}: {lines[0] if lines else ''}")
    if found.error is None or found.tolerance is None or not found.error <= found.tolerance:  # a NaN is too much
        reason = f"differs from the reference by {found.error}, and may by {found.tolerance}"
        return Outcome(name, found.error, found.tolerance, found.us, reason)
    return found


def _chosen(default: str, outcomes: Sequence[Outcome], *, kept: bool) -> Calibration:
    best = pick(outcomes)
    if best is None:
        reason = "the shipped default: no candidate passed its check"
        return Calibration(default, reason, tuple(outcomes), kept)
    others = [told(outcome) for outcome in outcomes if outcome is not best]
    when = "measured before" if kept else "measured now"
    return Calibration(best.backend, f"{when}: {told(best)}; {'; '.join(others)}", tuple(outcomes), kept)


def _read(path: Path, key: Key, say: Say) -> tuple[Outcome, ...] | None:
    """Outcomes that were kept, or None where there are none for this key."""
    try:
        data: object = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        say(f"the kept calibration cannot be read ({error}): measuring anew")
        return None
    try:
        fields = cast("dict[str, Any]", data)
        outcomes = tuple(Outcome(**row) for row in fields["outcomes"])
        whole = fields["key"] == key.data() and {o.backend for o in outcomes} == set(key.candidates)
        fine = whole and all(o.excluded or (isinstance(o.us, float) and o.us > 0) for o in outcomes)
    except (TypeError, KeyError, AttributeError):
        fine, outcomes = False, ()
    if not fine:
        say(f"the kept calibration {path.name} is damaged: measuring anew")
        return None
    return outcomes
