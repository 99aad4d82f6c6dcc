"""Reasoning: what a request asks of the chat template, and how the prompt's end says that an answer begins."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanoserve.errors import RequestError
from nanoserve.protocol import Fields, refuse
from nanoserve.tokenizer import Tokenizer

_BOOLEANS = ("enable_thinking", "truncate_history_thinking", "low_effort", "medium_effort")
"""Switches of the released templates. These test truth, so that the string "false" would switch them on."""

_FORCE = "force_nonempty_content"

_EFFORTS: Mapping[str, Mapping[str, bool]] = {
    "none": {"enable_thinking": False},
    "minimal": {"enable_thinking": True, "low_effort": True},
    "low": {"enable_thinking": True, "low_effort": True},
    "medium": {"enable_thinking": True},
    "high": {"enable_thinking": True},
    "xhigh": {"enable_thinking": True},
    "max": {"enable_thinking": True},
}

_TAIL = 16
"""Tokens of a prompt's end that hold ``</think>`` and white space, even where these are a token a character."""


@dataclass(frozen=True, slots=True)
class Thinking:
    """What a request asks.

    Attributes:
        template_kwargs: switches of the template, by name.
        effort: ``reasoning_effort``; None leaves it to the template.
        nonempty: an answer that is all reasoning becomes content too.
    """

    template_kwargs: Mapping[str, Any]
    effort: str | None = None
    nonempty: bool = False

    def switches(self, known: frozenset[str]) -> dict[str, Any]:
        """The variables that the template gets.

        ``reasoning_effort`` is put into the released templates' terms:

        - ``none``: ``enable_thinking`` is false;
        - ``minimal``, ``low``: ``low_effort`` is true, which Super's template has;
        - ``medium``: ``medium_effort`` is true where the template has it (Ultra), and else what the model does
          of itself, as OpenAI's default;
        - ``high``, ``xhigh``, ``max``: the template's full reasoning.

        Args:
            known: the switches that the template has.

        Raises:
            RequestError: the template cannot do it, or the request asks for two different things.
        """
        if self.effort is None:
            return dict(self.template_kwargs)
        wanted = dict(_EFFORTS[self.effort])
        if self.effort == "medium" and "medium_effort" in known:
            wanted["medium_effort"] = True
        if lacking := [name for name in wanted if name not in known]:
            able = [effort for effort, switches in _EFFORTS.items() if switches.keys() <= known]
            refuse(
                "reasoning_effort",
                self.effort,
                f"{'one of ' + ', '.join(able) if able else 'left out'}: "
                f"this checkpoint's chat template has no {lacking[-1]}",
            )
        for name, value in wanted.items():
            if self.template_kwargs.get(name, value) != value:
                message = f"reasoning_effort is {self.effort} and chat_template_kwargs.{name} is the contrary"
                raise RequestError(f"{message}: send one of them", param="reasoning_effort")
        return {**self.template_kwargs, **wanted}


def parse_thinking(fields: Fields) -> Thinking:
    """Fields ``chat_template_kwargs`` and ``reasoning_effort``.

    ``force_nonempty_content`` stands among the former, where NVIDIA's parsers read it.

    Raises:
        RequestError: one of them is ill-typed. Which switches there are is known to the template only.
    """
    given = fields.mapping("chat_template_kwargs")
    switches = Fields(given, "chat_template_kwargs")
    nonempty = switches.boolean(_FORCE)
    for name in _BOOLEANS:
        switches.boolean(name)
    effort = fields.string("reasoning_effort")
    if effort is not None and effort not in _EFFORTS:
        refuse("reasoning_effort", effort, f"one of {', '.join(_EFFORTS)}")
    kwargs = {name: value for name, value in given.items() if name != _FORCE and value is not None}
    return Thinking(kwargs, effort, nonempty)


@dataclass(frozen=True, slots=True)
class Opening:
    """How the template begins an answer.

    Attributes:
        thinking: inside ``<think>``.
        closed: behind ``</think>``: reasoning was switched off.
    """

    thinking: bool
    closed: bool


def opening(tokenizer: Tokenizer, prompt: Sequence[int]) -> Opening:
    """What the prompt's end says, whatever template wrote it."""
    end = tokenizer.decode(prompt[-_TAIL:], skip_special=False).rstrip()
    return Opening(end.endswith("<think>"), end.endswith("</think>"))
