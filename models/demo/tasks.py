"""The demo's examinations: problems that were kept out of training, and what counts as right."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from nanoserve.models.demo import arithmetic, recall, structured, tools
from nanoserve.models.demo.examples import Example

Task = Literal["arithmetic", "tools", "json", "recall"]

HELD_OUT_SEED = 20_261_124
"""The seed that the published figures are made with; any other gives another set of the same kind."""

DEFAULT_LENGTH = 4096
"""Tokens of a recall text."""

_MAX_TOKENS: Mapping[Task, int] = {"arithmetic": 160, "tools": 220, "json": 320, "recall": 96}


@dataclass(frozen=True, slots=True)
class Problem:
    """One question of an examination.

    Attributes:
        messages: OpenAI messages, the last one the user's.
        tools: OpenAI tools; may be empty.
        answer: what is right.
        max_tokens: enough for a right answer.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...]
    answer: Any
    max_tokens: int


def problems(task: Task, count: int, seed: int, length: int | None = None) -> list[Problem]:
    """Questions that no training run has seen.

    Args:
        task: the kind.
        count: how many.
        seed: of the set.
        length: tokens of a recall text, in the demo's own vocabulary (within a few per cent).
    """
    rng = Random(f"held out {task} {length} {seed}")
    makers: Mapping[Task, Callable[[Random], Example]] = {
        "arithmetic": arithmetic.example,
        "tools": tools.example,
        "json": structured.example,
        "recall": lambda r: recall.long_text(r, length or DEFAULT_LENGTH),
    }
    found = _held_out(makers[task], rng)
    return [_problem(next(found), _MAX_TOKENS[task]) for _ in range(count)]


def _held_out(make: Callable[[Random], Example], rng: Random) -> Iterator[Example]:
    while True:
        example = make(rng)
        if example.held_out:
            yield example


def _problem(example: Example, max_tokens: int) -> Problem:
    return Problem(example.prompt, example.tools, example.answer, max_tokens)


def grade(task: Task, problem: Problem, text: str) -> bool:
    """Whether an answer is right.

    Args:
        task: the problem's kind.
        problem: the question.
        text: all that was generated, behind ``<think>`` if the prompt opened it; what stands before
            ``</think>`` does not count, and reasoning that never ends is no answer.
    """
    content = text.rpartition("</think>")[2].strip()
    if "<think>" in content:
        return False
    match task:
        case "arithmetic":
            numbers = re.findall(r"-?\d[\d,]*", content)
            return bool(numbers) and numbers[-1].replace(",", "") == str(problem.answer)
        case "json":
            return _json(content) == problem.answer and _types(_json(content)) == _types(problem.answer)
        case "recall":
            return content.rstrip(".").strip() == problem.answer
        case "tools":
            call, right = called(content, problem.tools), problem.answer
            return call is not None and call == right and _types(call["arguments"]) == _types(right["arguments"])


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _types(value: Any) -> Any:
    """1, 1.0 and true are equal in Python, and different in JSON."""
    return {key: type(item).__name__ for key, item in value.items()} if isinstance(value, dict) else None


_CALL = re.compile(r"<tool_call>\s*<function=([^>\n]+)>\s*(.*?)</function>\s*</tool_call>", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


def called(text: str, declared: tuple[Mapping[str, Any], ...]) -> dict[str, Any] | None:
    """The one call in a text, its arguments typed by the tool's schema; None when there is none, or two."""
    calls = _CALL.findall(text)
    if len(calls) != 1:
        return None
    name, body = calls[0]
    schemas = {tool["function"]["name"]: tool["function"]["parameters"]["properties"] for tool in declared}
    properties = schemas.get(name)
    if properties is None:
        return None
    found = {key: _typed(value, properties.get(key, {}).get("type")) for key, value in _PARAMETER.findall(body)}
    return {"name": name, "arguments": found}


def _typed(value: str, kind: str | None) -> Any:
    if kind == "string":
        return value
    return _json(value.lower() if kind == "boolean" else value)  # the released templates write True
