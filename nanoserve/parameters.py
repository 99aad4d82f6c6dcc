"""The fields that /v1/chat/completions and /v1/completions share, and what both answer with. Pure functions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from nanoserve.errors import RequestError
from nanoserve.protocol import Fields, checked_text, refuse, token_ids
from nanoserve.request import Request, SamplingParams, brief

MAX_CHOICES = 16
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1000
MAX_BIASES = 1024
MAX_STOP_IDS = 1024
LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not have."""

_INT64 = 2**63


@dataclass(frozen=True, slots=True)
class Limits:
    """What requests are checked against.

    Attributes:
        model: the served model's name.
        vocab_size: token ids are below it.
        defaults: fields of `SamplingParams` that hold when a request leaves them out.
        has_text: there is a tokeniser.
    """

    model: str
    vocab_size: int
    defaults: Mapping[str, Any]
    has_text: bool


@dataclass(frozen=True, slots=True)
class Delivery:
    """How the answer is delivered: in how many choices, whether streamed, and with usage at the end.

    Attributes:
        usage_so_far: every chunk has the usage up to it, as vLLM's ``continuous_usage_stats`` asks.
    """

    choices: int
    stream: bool
    include_usage: bool = False
    usage_so_far: bool = False


def parse_model(fields: Fields, served: str) -> None:
    """Check the model's name; a request without one means the only model there is.

    Raises:
        RequestError: another model is asked for (404).
    """
    name = fields.string("model")
    if name is not None and name != served:
        raise RequestError(
            f"model {brief(name)} does not exist here: this server has {brief(served)}",
            param="model",
            code="model_not_found",
            status=404,
        )


def parse_delivery(fields: Fields) -> Delivery:
    """Fields ``n``, ``stream`` and ``stream_options``.

    Raises:
        RequestError: one of them is wrong.
    """
    choices = fields.integer("n", 1, MAX_CHOICES) or 1
    stream = fields.boolean("stream")
    given = fields.take("stream_options")
    if given is None:
        return Delivery(choices, stream)
    if not isinstance(given, dict):
        refuse("stream_options", given, "an object")
    if not stream:
        raise RequestError("stream_options needs stream to be true", param="stream_options")
    options = Fields(cast("dict[str, Any]", given), "stream_options")
    include_usage = options.boolean("include_usage")
    usage_so_far = options.boolean("continuous_usage_stats")
    if usage_so_far and not include_usage:
        path = options.path("continuous_usage_stats")
        raise RequestError(f"{path} needs include_usage to be true", param=path)
    options.boolean("include_obfuscation")  # padding against eavesdroppers: harmless to leave out
    options.done()
    return Delivery(choices, stream, include_usage, usage_so_far)


def parse_sampling(fields: Fields, limits: Limits, **decided: Any) -> SamplingParams:
    """The sampling fields that both endpoints share.

    Args:
        fields: the body's.
        limits: defaults and vocabulary.
        decided: fields of `SamplingParams` that the endpoint has read itself.

    Raises:
        RequestError: a field is ill-typed or out of range.
    """
    given: dict[str, Any] = {
        name: fields.number(name)
        for name in (
            *("temperature", "top_p", "min_p"),
            *("presence_penalty", "frequency_penalty", "repetition_penalty"),
        )
    }
    given["top_k"] = fields.integer("top_k", -1, 2**31)
    given["min_tokens"] = fields.integer("min_tokens", 0, 2**31)
    given["seed"] = fields.integer("seed", -_INT64, _INT64 - 1)
    values = {name: value for name, value in given.items() if value is not None}
    stop_ids = token_ids(fields.array("stop_token_ids", MAX_STOP_IDS), "stop_token_ids", limits.vocab_size)
    return SamplingParams(
        **{**limits.defaults, **values, **decided},
        logit_bias=_parse_bias(fields.mapping("logit_bias"), limits.vocab_size),
        stop=_parse_stop(fields.take("stop"), limits.has_text),
        stop_token_ids=stop_ids,
        ignore_eos=fields.boolean("ignore_eos"),
    )


def _parse_stop(value: object, has_text: bool) -> tuple[str, ...]:
    if value is None:
        return ()
    entries = cast("list[object]", value if isinstance(value, list) else [value])
    if len(entries) > MAX_STOPS:
        raise RequestError(f"stop has {len(entries)} strings and may have at most {MAX_STOPS}", param="stop")
    if entries and not has_text:
        raise RequestError("stop needs a tokenizer, which this checkpoint lacks: use stop_token_ids", param="stop")
    texts = tuple(checked_text(entry, "stop") for entry in entries)
    longest = max(map(len, texts), default=0)
    if longest > MAX_STOP_CHARACTERS:
        message = f"stop has a string of {longest} characters and may have at most {MAX_STOP_CHARACTERS}"
        raise RequestError(message, param="stop")
    return texts


def _parse_bias(value: Mapping[str, Any], vocab_size: int) -> dict[int, float]:
    if len(value) > MAX_BIASES:
        message = f"logit_bias has {len(value)} entries and may have at most {MAX_BIASES}"
        raise RequestError(message, param="logit_bias")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        # isdecimal() alone lets other scripts' digits and 5,000-digit numbers through.
        if not (key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < vocab_size):
            refuse("logit_bias", key, f"an object with token ids in [0, {vocab_size - 1}] as keys")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            refuse("logit_bias", bias, "an object with numbers in [-100, 100] as values")
        biases[int(key)] = float(bias)
    return biases


def wire_logprob(value: float) -> float:
    """A log-probability that JSON can hold."""
    return max(value, LOWEST_LOGPROB) if not math.isnan(value) else LOWEST_LOGPROB


def usage(prompt_tokens: int, completion_tokens: int, reasoning_tokens: int = 0) -> dict[str, Any]:
    """The usage object; the end token counts as one of the completion, and ``</think>`` as reasoning."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": reasoning_tokens},
    }


def choice_requests(
    prompts: Sequence[tuple[int, ...]], sampling: SamplingParams, choices: int, id: str
) -> list[Request]:
    """One engine request a choice: all choices of the first prompt, then of the second, and so on.

    With a seed, choice i of a prompt draws with seed + i: other texts, and the same ones the next time.
    """
    variants = [sampling]
    if choices > 1:
        seeds = [None if sampling.seed is None else sampling.seed + i for i in range(choices)]
        variants = [replace(sampling, seed=seed) for seed in seeds]
    return [Request(prompt, variant, id) for prompt in prompts for variant in variants]
