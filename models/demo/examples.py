"""What a generator makes: a whole conversation, with the turn that answers and what is right there."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

HELD_OUT_SHARE = 16
"""One turn in this many is kept out of training, by its digest: the sets are disjoint whatever the seeds."""


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation to learn from or to be examined in.

    Attributes:
        messages: OpenAI messages, the assistant's turns with their ``reasoning_content``.
        answer: what is right, as the task's grader takes it.
        tools: OpenAI tools.
        thinking: the assistant's turns start inside ``<think>``.
        ask: index of the turn that an examination asks for.
    """

    messages: tuple[Mapping[str, Any], ...]
    answer: Any
    tools: tuple[Mapping[str, Any], ...] = ()
    thinking: bool = True
    ask: int = -1

    @property
    def prompt(self) -> tuple[Mapping[str, Any], ...]:
        """The messages before the turn that answers."""
        return self.messages[: self.ask]

    @property
    def held_out(self) -> bool:
        """Whether it belongs to the held-out side: one of its user's turns, with all before it, does."""
        turns = (i for i, message in enumerate(self.messages) if message["role"] == "user")
        return any(self._is_held_out(self.messages[: i + 1]) for i in turns)

    def _is_held_out(self, messages: tuple[Mapping[str, Any], ...]) -> bool:
        text = json.dumps([list(messages), list(self.tools)], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=2).digest()[0] % HELD_OUT_SHARE == 0


def chat(
    question: str,
    content: str,
    *,
    answer: Any,
    reasoning: str = "",
    system: str = "",
    before: Sequence[Mapping[str, Any]] = (),
) -> Example:
    """A conversation that ends in one question and its answer.

    Args:
        question: the user's last message.
        content: the assistant's answer.
        answer: what the grader takes.
        reasoning: the assistant's thoughts.
        system: the system message; none when empty.
        before: turns before the question; if any.
    """
    first = [{"role": "system", "content": system}] if system else []
    messages = [*first, *before, {"role": "user", "content": question}, turn(content, reasoning)]
    return Example(tuple(messages), answer)


def turn(content: str, reasoning: str = "") -> dict[str, Any]:
    """An assistant's message."""
    thoughts = {"reasoning_content": reasoning} if reasoning else {}
    return {"role": "assistant", "content": content, **thoughts}


def aloud(example: Example) -> Example:
    """The same without thinking, and with the reasoning as a part of the answer."""
    messages = [
        turn(f"{message['reasoning_content']}\n{message['content']}")
        if "reasoning_content" in message
        else message
        for message in example.messages
    ]
    return replace(example, messages=tuple(messages), thinking=False)


def without_thinking(example: Example) -> Example:
    """The same without thinking and without the reasoning."""
    messages = [
        {key: value for key, value in message.items() if key != "reasoning_content"}
        for message in example.messages
    ]
    return replace(example, messages=tuple(messages), thinking=False)
