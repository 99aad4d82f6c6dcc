"""What an evaluation asks: the demo's held-out problems, or GSM8K from its public file."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from nanoserve import gsm8k
from nanoserve.errors import ConfigError

TaskName = Literal["arithmetic", "tools", "json", "recall", "gsm8k"]

DEFAULT_COUNT = 200
"""Questions of a demo task; GSM8K asks all that the file has."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question.

    Attributes:
        prompt: text to continue as it is, or chat messages.
        tools: OpenAI tools that go with messages.
        stop: strings that end the answer.
        max_tokens: of the answer.
        is_right: grades the text of the answer, reasoning included.
    """

    prompt: str | tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...]
    stop: tuple[str, ...]
    max_tokens: int
    is_right: Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class Suite:
    """The questions of a run, and what they came from.

    Attributes:
        task: its name.
        questions: in the order asked.
        origin: the settings that made them, for the report.
        method: how they are asked and graded, in words.
    """

    task: TaskName
    questions: tuple[Question, ...]
    origin: Mapping[str, Any]
    method: str


def read_suite(
    task: TaskName, *, count: int | None, seed: int | None, length: int | None, data: Path | None
) -> Suite:
    """The questions of a task.

    Args:
        task: its name.
        count: how many; None takes `DEFAULT_COUNT`, or all of a file.
        seed: of the demo's problems; None takes the held-out seed, on which nothing was trained.
        length: tokens of recall's text.
        data: GSM8K's file.

    Raises:
        ConfigError: a value is out of range, or does not belong to the task; or the file is malformed.
    """
    if count is not None and count < 1:
        raise ConfigError(f"count is {count} and must be at least 1")
    if length is not None and (task != "recall" or length < 1):
        wrong = "must be at least 1" if task == "recall" else f"is recall's alone: leave it out for {task}"
        raise ConfigError(f"length is {length} and {wrong}")
    if task == "gsm8k":
        if data is None:
            raise ConfigError("data is missing: gsm8k needs --data FILE, the public test file in JSON lines")
        if seed is not None:
            raise ConfigError(f"seed is {seed} and gsm8k draws nothing: leave it out")
        return _gsm8k(data, count)
    if data is not None:
        raise ConfigError(f"data is {data} and is gsm8k's alone: leave it out for {task}")
    return _demo(task, count or DEFAULT_COUNT, seed, length)


def _demo(
    task: Literal["arithmetic", "tools", "json", "recall"], count: int, seed: int | None, length: int | None
) -> Suite:
    from nanoserve.models.demo.tasks import HELD_OUT_SEED, grade, problems

    seed = HELD_OUT_SEED if seed is None else seed
    questions = tuple(
        Question(p.messages, p.tools, (), p.max_tokens, partial(grade, task, p))
        for p in problems(task, count, seed, length)
    )
    origin = {"seed": seed, **({} if length is None else {"length": length})}
    return Suite(task, questions, origin, "the demo's held-out problems as a chat, graded by the task's own rule")


def _gsm8k(data: Path, count: int | None) -> Suite:
    found = gsm8k.read_problems(data)
    if count is not None and count > len(found):
        raise ConfigError(f"count is {count} and {data} has {len(found)} questions: ask for no more")
    questions = tuple(
        Question(gsm8k.prompt_of(p.question), (), gsm8k.STOP, gsm8k.MAX_TOKENS, partial(gsm8k.is_right, p))
        for p in found[:count]
    )
    method = (
        f"{len(gsm8k.EXAMPLES)} worked examples with their chain of thought, then the question, as plain text to "
        f"continue; ends at {gsm8k.STOP[0]!r} or after {gsm8k.MAX_TOKENS} tokens; the last number counts"
    )
    return Suite("gsm8k", questions, {"data": data.name}, method)
