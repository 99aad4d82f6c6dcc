"""What an evaluation found: its numbers, as JSON and as a table."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nanoserve import __version__
from nanoserve.eval_questions import Suite
from nanoserve.eval_stats import mcnemar_exact, wilson

METHOD: Mapping[str, str] = {
    "decoding": "greedy, one question at a time",
    "accuracy_95": "Wilson score interval",
    "mcnemar_p": "exact, two-sided, on the same questions",
    "tokens_per_second": "generated tokens over the seconds of all answers, reading the prompts included",
    "kl": "KL(first || other) in nats, of next-token distributions at the first candidate's generated tokens, "
    "which both are told: the prompt by prefill, then a decode step a token",
    "perplexity": "of the first candidate's generated tokens, at the same positions",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One candidate's results.

    Attributes:
        label: its name in the report.
        facts: what ran.
        right: by question.
        tokens: generated in all.
        seconds: of all answers; loading is not in it.
        perplexity: see `METHOD`; None when not asked for.
    """

    label: str
    facts: Mapping[str, Any]
    right: tuple[bool, ...]
    tokens: int
    seconds: float
    perplexity: float | None = None

    @property
    def correct(self) -> int:
        """Right answers."""
        return sum(self.right)

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.correct / len(self.right)

    @property
    def mean_tokens(self) -> float:
        """Generated tokens an answer."""
        return self.tokens / len(self.right)

    @property
    def speed(self) -> float:
        """Generated tokens a second."""
        return self.tokens / max(self.seconds, 1e-9)

    def data(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "label": self.label,
            **self.facts,
            "correct": self.correct,
            "total": len(self.right),
            "accuracy": self.accuracy,
            "accuracy_95": list(wilson(self.correct, len(self.right))),
            "mean_tokens": self.mean_tokens,
            "tokens_per_second": self.speed,
            "seconds": self.seconds,
            **({} if self.perplexity is None else {"perplexity": self.perplexity}),
        }

    def cells(self) -> list[str]:
        """The line of the table."""
        low, high = wilson(self.correct, len(self.right))
        cells = [
            self.label,
            f"{self.correct:,} of {len(self.right):,}",
            f"{self.accuracy:.1%}",
            f"{low:.1%} to {high:.1%}",
            f"{self.mean_tokens:.1f}",
            f"{self.speed:.1f}",
            f"{self.seconds:.1f}",
        ]
        return [*cells, "" if self.perplexity is None else f"{self.perplexity:.4f}"]


_HEADS = ("", "right", "accuracy", "95 % interval", "tokens", "tok/s", "seconds", "perplexity")


@dataclass(frozen=True, slots=True)
class Drift:
    """How far a candidate's distributions are from the first's, in nats."""

    mean: float
    p999: float
    positions: int
    questions: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """A candidate against the first, pair by pair, on the questions that both have answered."""

    first: Row
    second: Row
    drift: Drift | None

    def _pairs(self) -> list[tuple[bool, bool]]:
        # Both were asked in the same order, and one of them perhaps not to the end.
        return list(zip(self.first.right, self.second.right, strict=False))

    def pairs(self) -> dict[str, int]:
        """Questions by who was right."""
        pairs = self._pairs()
        return {
            "both_right": pairs.count((True, True)),
            "only_first": pairs.count((True, False)),
            "only_second": pairs.count((False, True)),
            "both_wrong": pairs.count((False, False)),
        }

    @property
    def p_value(self) -> float:
        """McNemar's exact p."""
        pairs = self.pairs()
        return mcnemar_exact(pairs["only_first"], pairs["only_second"])

    @property
    def points(self) -> float:
        """Difference of the accuracies, in percentage points; positive when the second is better."""
        pairs = self._pairs()
        return 100 * sum(second - first for first, second in pairs) / len(pairs)

    def data(self) -> dict[str, Any]:
        """As JSON."""
        out: dict[str, Any] = {"first": self.first.label, "second": self.second.label, **self.pairs()}
        out |= {"difference_points": self.points, "mcnemar_p": self.p_value}
        if d := self.drift:
            out["kl"] = {"mean": d.mean, "p99.9": d.p999, "positions": d.positions, "questions": d.questions}
        return out

    def lines(self) -> list[str]:
        """As text."""
        n, both = self.pairs(), len(self._pairs())
        whole = both == len(self.first.right) == len(self.second.right)
        same = "the same questions" if whole else f"the {both:,} questions that both have answered"
        lines = [
            f"{self.second.label} against {self.first.label}, on {same}",
            f"  accuracy    {self.points:+.1f} points, McNemar p = {self.p_value:.3g}",
            f"  right       both {n['both_right']:,}, only the first {n['only_first']:,}, "
            f"only the second {n['only_second']:,}, neither {n['both_wrong']:,}",
        ]
        if d := self.drift:
            over = f"{d.positions:,} positions of {d.questions:,} questions"
            lines.append(f"  KL          mean {d.mean:.3g}, 99.9 % {d.p999:.3g} nats, over {over}")
        return lines


@dataclass(frozen=True, slots=True)
class Report:
    """All of a run.

    Attributes:
        suite: what was asked.
        rows: of the candidates that have answered anything.
        comparisons: of all others with the first.
        cut_short: where the run was ended early: (label, questions answered) of every candidate.
    """

    suite: Suite
    rows: tuple[Row, ...]
    comparisons: tuple[Comparison, ...]
    cut_short: tuple[tuple[str, int], ...] = ()

    def data(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "task": self.suite.task,
            "count": len(self.suite.questions),
            **self.suite.origin,
            **({"cut_short": self._counts()} if self.cut_short else {}),
            "method": {"questions": self.suite.method, **METHOD},
            "version": __version__,
            "candidates": [row.data() for row in self.rows],
            "comparisons": [comparison.data() for comparison in self.comparisons],
        }

    def _counts(self) -> list[dict[str, Any]]:
        of = len(self.suite.questions)
        return [{"label": label, "answered": answered, "of": of} for label, answered in self.cut_short]

    def text(self) -> str:
        """As a table for a terminal."""
        origin = "".join(f", {name} {value}" for name, value in self.suite.origin.items())
        table = [list(_HEADS), *(row.cells() for row in self.rows)]
        if not any(cells[-1] for cells in table[1:]):
            table = [cells[:-1] for cells in table]
        widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
        lines = [f"{self.suite.task}: {len(self.suite.questions):,} questions{origin}, greedy", ""]
        for one in self._counts():
            lines.insert(-1, f"CUT SHORT: {one['label']} has answered {one['answered']:,} of {one['of']:,}")
        for first, *others in table:
            cells = [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(others, widths[1:], strict=True))]
            lines.append("  ".join(cells))
        for comparison in self.comparisons:
            lines += ["", *comparison.lines()]
        return "\n".join(lines)
