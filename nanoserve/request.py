"""What the engine is asked and what it answers: token ids only, no text, no torch.

A request yields `PromptScores` (when asked for), then `Token`s, and always exactly one `Finish` last.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, Protocol, cast

from nanoserve.errors import CheckpointError, RequestError

FinishReason = Literal["stop", "length", "tool_calls", "cancelled", "error"]

MAX_TOP_LOGPROBS = 20
"""OpenAI's limit for ``top_logprobs``."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen.

    The order of operations is: logit_bias, repetition, presence and frequency penalties, then the mask that
    keeps end tokens away before ``min_tokens``, the mask of the request's constraint, temperature, min_p, top_k,
    top_p, draw.

    Attributes:
        max_tokens: tokens to generate at most; None generates until the context is full, 0 only scores.
        min_tokens: end tokens are masked until this many tokens have been generated.
        temperature: 0 is greedy (lowest id wins a tie).
        top_k: keep the k likeliest tokens; 0 keeps all, and so does -1, which is kept as 0.
        top_p: keep the smallest set of tokens whose probability reaches top_p, in (0, 1].
        min_p: drop tokens less likely than min_p times the likeliest, in [0, 1].
        presence_penalty: subtracted once from tokens generated before, in [-2, 2].
        frequency_penalty: subtracted once a time a token was generated, in [-2, 2].
        repetition_penalty: divides (multiplies when negative) logits of tokens in prompt or answer, > 0.
        logit_bias: added to the logits of these token ids, each in [-100, 100].
        seed: same seed, same text; None draws a fresh one.
        logprobs: None for none, otherwise that many alternatives a token (0: the chosen one only).
            They are of the model's own distribution, before bias, penalties, constraint and temperature.
        prompt_logprobs: the same for the prompt's tokens.
        stop: strings that end the text (matched above the engine; never part of the text).
        stop_token_ids: token ids that end the answer, besides the model's own end tokens.
        ignore_eos: do not end at the model's own end tokens.

    Raises:
        RequestError: a value is out of range; ``param`` names the field.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _check_types(self)
        _check("max_tokens", self.max_tokens, self.max_tokens is None or self.max_tokens >= 0, "at least 0")
        _check("min_tokens", self.min_tokens, self.min_tokens >= 0, "at least 0")
        if self.max_tokens is not None:
            fits = self.min_tokens <= self.max_tokens
            _check("min_tokens", self.min_tokens, fits, f"at most max_tokens ({brief(self.max_tokens)})")
        _check("temperature", self.temperature, 0 <= self.temperature <= 100, "in [0, 100]")
        if self.top_k == -1:  # other engines' spelling of "off"
            object.__setattr__(self, "top_k", 0)
        _check("top_k", self.top_k, self.top_k >= 0, "at least 0 (0 keeps all tokens)")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "in [0, 1]")
        _check("presence_penalty", self.presence_penalty, -2 <= self.presence_penalty <= 2, "in [-2, 2]")
        _check("frequency_penalty", self.frequency_penalty, -2 <= self.frequency_penalty <= 2, "in [-2, 2]")
        _check("repetition_penalty", self.repetition_penalty, 0 < self.repetition_penalty <= 100, "in (0, 100]")
        for token, bias in self.logit_bias.items():
            _check("logit_bias", bias, token >= 0 and -100 <= bias <= 100, "in [-100, 100] for ids from 0")
        for name in ("logprobs", "prompt_logprobs"):
            value: int | None = getattr(self, name)
            _check(name, value, value is None or 0 <= value <= MAX_TOP_LOGPROBS, f"in [0, {MAX_TOP_LOGPROBS}]")
        _check("stop", "", "" not in self.stop, "a non-empty string")


_INTEGERS = ("max_tokens", "min_tokens", "top_k", "seed", "logprobs", "prompt_logprobs")
_OPTIONAL = ("max_tokens", "seed", "logprobs", "prompt_logprobs")
_NUMBERS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")


def _check_types(params: SamplingParams) -> None:
    """Callers are not all type-checked, and a wrong type must fail here, not on the thread that owns the GPU."""
    for name in _INTEGERS:
        value: object = getattr(params, name)
        _check(name, value, is_integer(value) or (value is None and name in _OPTIONAL), "a whole number")
    for name in _NUMBERS:
        value = getattr(params, name)
        _check(name, value, _is_number(value), "a number")
    _check("ignore_eos", params.ignore_eos, type(params.ignore_eos) is bool, "true or false")
    bias = cast("object", params.logit_bias)
    _check("logit_bias", bias, isinstance(bias, Mapping), "a mapping of token ids to numbers")
    for token, value in cast("Mapping[object, object]", bias).items():
        _check("logit_bias", token, is_integer(token), "a mapping with token ids as keys")
        _check("logit_bias", value, _is_number(value), "a mapping with numbers as values")
    for name, kind in (("stop", str), ("stop_token_ids", int)):
        items: object = getattr(params, name)
        _check(name, items, isinstance(items, tuple), f"a tuple of {kind.__name__}")
        for item in cast("tuple[object, ...]", items):
            _check(name, item, type(item) is kind, f"a tuple of {kind.__name__}")


def is_integer(value: object) -> bool:
    """A whole number; in Python, booleans are integers too."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def _check(name: str, value: object, fine: bool, must_be: str) -> None:
    if not fine:
        raise RequestError(f"{name} is {brief(value)} and must be {must_be}", param=name)


def brief(value: object, limit: int = 80) -> str:
    """A value for a message: printable, whatever the caller sent, and at most ``limit`` characters."""
    # Not repr: what is nested as deeply as JSON may be would exhaust Python's stack.
    if isinstance(value, Mapping):
        return "an object" if value else "an empty object"
    if isinstance(value, list | tuple):
        return "an array" if value else "an empty array"
    if isinstance(value, int) and abs(value) >= 10**40:
        return "a huge number"  # Python refuses to write out the hugest
    return clip(repr(value[:limit] if isinstance(value, str) else value), limit)


def clip(text: str, limit: int = 80) -> str:
    """A text for a message: valid Unicode, and at most ``limit`` characters."""
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= limit else text[: limit - 1] + "…"


def sampling_defaults(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint's generation_config.json recommends for fields that a request leaves out.

    Raises:
        CheckpointError: a recommended value cannot be one.
    """
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    found = {name: generation_config[name] for name in names if generation_config.get(name) is not None}
    top_k = found.get("top_k")
    if isinstance(top_k, float) and top_k.is_integer():
        found["top_k"] = int(top_k)
    try:
        params = SamplingParams(**found)
    except RequestError as error:
        raise CheckpointError("generation_config.json", str(error)) from error
    return {name: getattr(params, name) for name in found}


class Constraint(Protocol):
    """What one answer may say next. It has a state, and belongs to the engine's thread."""

    @property
    def ended(self) -> bool:
        """The answer is complete: nothing may follow."""
        ...

    def allowed(self) -> bytes | None:
        """The ids that may come next, or None for every id; asked for once a token, before it is drawn.

        It may find that nothing can come, which `ended` then tells.

        Returns:
            A bit an id of the model's vocabulary, padded to 32: id i is bit i % 8 of byte i // 8.

        Raises:
            RequestError: what it follows has become too complex to go on with.
        """
        ...

    def push(self, token: int) -> None:
        """Take note of the token that was drawn.

        Raises:
            RequestError: as `allowed`.
        """
        ...


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and how to continue it.

    Attributes:
        prompt: token ids, at least one.
        sampling: how to choose tokens.
        id: appears in logs, and in answers as the x-request-id header.
        constraint: makes the constraint that the answer is to keep, when it begins; None lets it say anything.
    """

    prompt: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    id: str = ""
    constraint: Callable[[], Constraint] | None = None


@dataclass(frozen=True, slots=True)
class TokenScore:
    """ln p of a token, and the likeliest alternatives as (token id, ln p), best first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Scores of the prompt's tokens; entry i is of token i given those before it, so entry 0 is None."""

    scores: tuple[TokenScore | None, ...]


@dataclass(frozen=True, slots=True)
class Token:
    """A generated token; ``score`` is None unless logprobs were asked for. An end token is one too."""

    id: int
    score: TokenScore | None = None


@dataclass(frozen=True, slots=True)
class Finish:
    """The one terminal event. ``message`` tells what went wrong when the reason is "error"."""

    reason: FinishReason
    message: str | None = None


Event = PromptScores | Token | Finish
