"""``nanoserve eval``: the same questions to one candidate after another, one engine in memory at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nanoserve.errors import ConfigError
from nanoserve.eval_local import Answer, LocalCandidate, LocalRunner, encode
from nanoserve.eval_questions import Suite
from nanoserve.eval_report import Comparison, Drift, Report, Row
from nanoserve.eval_server import ServerCandidate, ServerRunner
from nanoserve.eval_stats import percentile, perplexity
from nanoserve.local import LocalEngine
from nanoserve.progress import QuestionBar
from nanoserve.signals import Interrupt

KL_QUESTIONS = 50
"""Questions whose distributions are compared, unless told otherwise."""
KL_BYTES = 1 << 30
"""The first candidate's distributions are kept in memory up to this; they are 4 bytes a token and entry."""

Candidate = LocalCandidate | ServerCandidate


@dataclass(slots=True)
class _Found:
    """What a candidate has been found to do so far; ``answers`` are graded."""

    label: str
    facts: Mapping[str, Any]
    answers: list[tuple[Answer, bool]] = field(default_factory=list[tuple[Answer, bool]])
    perplexity: float | None = None
    drift: Drift | None = None

    def row(self) -> Row:
        right = tuple(right for _, right in self.answers)
        tokens, seconds = sum(a.tokens for a, _ in self.answers), sum(a.seconds for a, _ in self.answers)
        return Row(self.label, self.facts, right, tokens, seconds, self.perplexity)


def evaluate(
    suite: Suite,
    candidates: Sequence[Candidate],
    *,
    kl_questions: int | None = None,
    interrupt: Interrupt | None = None,
) -> Report:
    """Ask every candidate every question.

    KeyboardInterrupt, once there is an answer, ends it with the answers that there are.

    Args:
        suite: the questions.
        candidates: the first is what the others are compared with.
        kl_questions: compare the distributions on so many questions, within `KL_BYTES`; None does not.
        interrupt: is told when there is an answer, and asked between questions whether to go on.

    Raises:
        NanoserveError: a candidate cannot run, or cannot be compared; most of it before the first question.
        KeyboardInterrupt: it came before the first answer.
    """
    vocab_size = _check(suite, candidates, kl_questions)
    interrupt = interrupt or Interrupt()
    found: list[_Found] = []
    reference: Reference | None = None
    complete = False
    try:
        for candidate in candidates:
            with candidate.open() as runner:
                found.append(_Found(candidate.label, runner.facts()))
                _ask(found[-1], runner, suite, interrupt)
                if kl_questions is not None:
                    assert isinstance(runner, LocalRunner)
                    asked = [answer for answer, _ in found[0].answers[:kl_questions]]
                    reference = _compare(found[-1], runner.engine, reference, asked, vocab_size)
        complete = True
    except KeyboardInterrupt:
        if not (found and found[0].answers):
            raise
    rows = [(one.row(), one.drift) for one in found if one.answers]
    comparisons = tuple(Comparison(rows[0][0], row, drift) for row, drift in rows[1:])
    counts = [len(one.answers) for one in found] + [0] * (len(candidates) - len(found))
    cut_short = [] if complete else [(c.label, n) for c, n in zip(candidates, counts, strict=True)]
    return Report(suite, tuple(row for row, _ in rows), comparisons, tuple(cut_short))


def _check(suite: Suite, candidates: Sequence[Candidate], kl_questions: int | None) -> int:
    """Find what cannot run before anything does.

    Returns:
        The size of the vocabulary that distributions are compared over; 0 when they are not.
    """
    if kl_questions is not None and kl_questions < 1:
        raise ConfigError(f"kl-questions is {kl_questions} and must be at least 1")
    checked = [(c.label, *c.check()) for c in candidates if isinstance(c, LocalCandidate)]
    if kl_questions is None:
        return 0
    if len(checked) < len(candidates):
        raise ConfigError("kl needs the distributions, which a server does not tell: leave out --url or --kl")
    (name, tokenizer, vocab_size), *others = checked
    asked = suite.questions[:kl_questions]
    wanted = [encode(tokenizer, question) for question in asked]
    for label, other, size in others:
        if size != vocab_size or [encode(other, question) for question in asked] != wanted:
            raise ConfigError(
                f"kl compares distributions over one vocabulary, and {label} has another than {name}: "
                "leave out --kl"
            )
    return vocab_size


def _ask(found: _Found, runner: LocalRunner | ServerRunner, suite: Suite, interrupt: Interrupt) -> None:
    """All questions, with a bar."""
    bar, total = QuestionBar(found.label), len(suite.questions)
    for count, question in enumerate(suite.questions, 1):
        interrupt.check()
        answer = runner.answer(question)
        found.answers.append((answer, question.is_right(answer.text)))
        interrupt.worthwhile = True
        bar(count, total, f"{sum(right for _, right in found.answers) / count:6.1%} right")


def _compare(
    found: _Found, engine: LocalEngine, reference: "Reference | None", asked: Sequence[Answer], vocab_size: int
) -> "Reference":
    """Put the distributions beside the first candidate's, which are returned; without these, it is the first."""
    if reference is None:
        reference = Reference.take(engine, asked, KL_BYTES // (4 * vocab_size))
        found.perplexity = perplexity(reference.own_logprobs())
    else:
        found.drift, logprobs = reference.compare(engine)
        found.perplexity = perplexity(logprobs)
    return reference


@dataclass(frozen=True, slots=True)
class Reference:
    """The first candidate's distributions at the tokens it generated.

    Attributes:
        items: (prompt ids, answer ids, ln p float32 [len(answer ids), V]) of each question.
    """

    items: tuple[tuple[tuple[int, ...], tuple[int, ...], Tensor], ...]

    @classmethod
    def take(cls, engine: LocalEngine, answers: Sequence[Answer], most: int) -> "Reference":
        """Run the answers again.

        Args:
            engine: that gave them.
            answers: with their ids.
            most: positions to keep; what is beyond is left out.
        """
        items: list[tuple[tuple[int, ...], tuple[int, ...], Tensor]] = []
        bar = QuestionBar("distributions")
        for count, answer in enumerate(answers, 1):
            ids = answer.ids[:most]
            most -= len(ids)
            if ids:
                items.append((answer.prompt_ids, ids, engine.logprobs(answer.prompt_ids, ids)))
            bar(count, len(answers))
        return cls(tuple(items))

    def own_logprobs(self) -> list[float]:
        """Ln p of the generated tokens."""
        return [value for _, ids, logprobs in self.items for value in _chosen(logprobs, ids)]

    def compare(self, engine: LocalEngine) -> tuple[Drift, list[float]]:
        """Tell another candidate the same tokens.

        Returns:
            How far its distributions are from these, and its ln p of the tokens.
        """
        divergences: list[float] = []
        chosen: list[float] = []
        bar = QuestionBar("distributions")
        for count, (prompt_ids, ids, own) in enumerate(self.items, 1):
            other = engine.logprobs(prompt_ids, ids)
            divergences += kl_divergence(own, other).tolist()
            chosen += _chosen(other, ids)
            bar(count, len(self.items))
        mean = sum(divergences) / len(divergences)
        return Drift(mean, percentile(divergences, 99.9), len(divergences), len(self.items)), chosen


def _chosen(logprobs: Tensor, ids: tuple[int, ...]) -> list[float]:
    return logprobs.gather(1, torch.tensor(ids).unsqueeze(1)).squeeze(1).tolist()


def kl_divergence(first: Tensor, second: Tensor) -> Tensor:
    """KL(first || second) of distributions given as ln p.

    Args:
        first: [T, V].
        second: [T, V].

    Returns:
        Nats, float64 [T].
    """
    # float32 logarithms do not sum to 1 exactly, which would show as a divergence of its own, even below 0.
    rows = zip(first.split(64), second.split(64), strict=True)
    return torch.cat([_kl(p.double().log_softmax(-1), q.double().log_softmax(-1)) for p, q in rows])


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
