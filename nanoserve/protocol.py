"""JSON in, checked fields out, and error objects: what every endpoint shares. Pure functions.

A field is implemented, harmless, or refused with its name: nothing that changes the answer is ignored.
"""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn, cast

from nanoserve.errors import EngineError, NanoserveError, RequestError
from nanoserve.request import brief

_HARMLESS = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "safety_identifier"),
        *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "cache_prompt"),
        *("parallel_tool_calls", "request_id"),
    }
)
"""Bookkeeping that SDKs send and that changes no answer."""

_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    # Fields that are not implemented, or not by every endpoint, and the values with which they ask for nothing.
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "reasoning_effort": (),
    "reasoning": (),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "web_search_options": (),
    "verbosity": ("medium",),
    "suffix": ("",),
    "best_of": (1,),
    "use_beam_search": (False,),
    "chat_template": (),
    "continue_final_message": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "add_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "return_token_ids": (False,),
    "echo": (False,),
    "priority": (0,),
}


def refuse(name: str, value: object, must_be: str) -> NoReturn:
    """Raise the RequestError that names field, value and remedy."""
    raise RequestError(f"{name} is {brief(value)} and must be {must_be}", param=name)


def decode_json(body: bytes) -> dict[str, Any]:
    """A request body's JSON object; NaN, Infinity and numbers that overflow are refused.

    Raises:
        RequestError: the body is not a JSON object in UTF-8.
    """
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_no_constant, parse_float=_finite)
    except RecursionError as error:
        raise RequestError("the body is nested too deeply", code="invalid_json") from error
    except ValueError as error:
        reason = brief(str(error), 120)
        raise RequestError(f"the body is not valid JSON: {reason}", code="invalid_json") from error
    if not isinstance(value, dict):
        raise RequestError(f"the body is {brief(value)} and must be a JSON object", code="invalid_json")
    return cast("dict[str, Any]", value)


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number is too large")
    return value


def error_object(message: str, *, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error object, all four keys; printable and short whatever stands in the message."""
    clean = message.encode("utf-8", "backslashreplace").decode("utf-8")[:1000]
    named = None if param is None else param.encode("utf-8", "backslashreplace").decode("utf-8")[:200]
    return {"error": {"message": clean, "type": kind, "param": named, "code": code}}


_ANTHROPIC_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}


def anthropic_error(error: Mapping[str, Any], status: int, request_id: str) -> dict[str, Any]:
    """OpenAI's error object as Anthropic's, which has no place for field and code: the message names them.

    Args:
        error: what `error_object` made.
        status: the HTTP status, which decides the type.
        request_id: as in the request-id header.
    """
    told = {"type": _ANTHROPIC_KINDS.get(status, "invalid_request_error"), "message": error["error"]["message"]}
    return {"type": "error", "error": told, "request_id": request_id}


def error_answer(error: NanoserveError) -> tuple[int, dict[str, Any]]:
    """HTTP status and error object of one of our errors."""
    if isinstance(error, RequestError):
        kind = "invalid_request_error" if error.status < 500 else "server_error"
        return error.status, error_object(str(error), kind=kind, param=error.param, code=error.code)
    if isinstance(error, EngineError):
        return 503, error_object(str(error), kind="server_error", code="engine_unavailable")
    return 500, error_object("the server failed: see its log", kind="server_error", code="internal_error")


class Fields:
    """Takes typed fields out of a JSON object; null counts as absent, and what nobody takes is refused."""

    def __init__(self, body: Mapping[str, Any], where: str = "") -> None:
        self._left = {name: value for name, value in body.items() if value is not None}
        self._where = where

    def path(self, name: str) -> str:
        """The field's full name, for messages."""
        return f"{self._where}.{name}" if self._where else name

    def take(self, name: str) -> Any:
        """The field as it came; None when absent."""
        return self._left.pop(name, None)

    def boolean(self, name: str, default: bool = False) -> bool:
        """A boolean.

        Raises:
            RequestError: as every method here, when the field is of another type or out of range.
        """
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            refuse(self.path(name), value, "true or false")
        return value

    def integer(self, name: str, low: int, high: int) -> int | None:
        """A whole number in [low, high]; 8.0 is 8, as JSON knows one kind of number."""
        value = self.take(name)
        whole: Any = int(value) if isinstance(value, float) and value.is_integer() else value
        if whole is not None and not is_int(whole, low, high):
            refuse(self.path(name), value, f"a whole number in [{low}, {high}]")
        return whole

    def number(self, name: str) -> float | None:
        """A number; its range is `SamplingParams`' affair."""
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e9:
            refuse(self.path(name), value, "a number")
        return float(value)

    def string(self, name: str) -> str | None:
        """A string of valid Unicode."""
        value = self.take(name)
        return None if value is None else checked_text(value, self.path(name))

    def mapping(self, name: str) -> Mapping[str, Any]:
        """An object; empty when absent."""
        value = self.take(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            refuse(self.path(name), value, "an object")
        return cast("Mapping[str, Any]", value)

    def array(self, name: str, most: int) -> list[Any]:
        """An array of at most ``most`` entries; empty when absent."""
        value = self.take(name)
        if value is None:
            return []
        if not isinstance(value, list):
            refuse(self.path(name), value, "an array")
        entries = cast("list[Any]", value)
        if len(entries) > most:
            name = self.path(name)
            raise RequestError(f"{name} has {len(entries)} entries and may have at most {most}", param=name)
        return entries

    def done(
        self, harmless: Collection[str] | None = None, neutral: Mapping[str, Sequence[object]] | None = None
    ) -> None:
        """Refuse what is left.

        Args:
            harmless: fields that change no answer; by default OpenAI's, at the top of a body.
            neutral: fields that are not implemented, and the values with which they ask for nothing; likewise.

        Raises:
            RequestError: a field is unknown, or is not implemented and asks for something.
        """
        harmless = (() if self._where else _HARMLESS) if harmless is None else harmless
        neutral = ({} if self._where else _NEUTRAL) if neutral is None else neutral
        for name, value in self._left.items():
            path = self.path(brief(name)[1:-1])
            if name in harmless:
                continue
            if name in neutral:
                if not any(type(value) is type(fine) and value == fine for fine in neutral[name]):
                    message = f"{path} is not supported by this server: leave it out"
                    raise RequestError(message, param=path, code="unsupported_parameter")
                continue
            raise RequestError(
                f"{path} is not a field of this endpoint: leave it out", param=path, code="unknown_parameter"
            )


def is_int(value: object, low: int, high: int) -> bool:
    """Whether it is a whole number in [low, high]; in Python, booleans are integers too."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def checked_text(value: object, where: str) -> str:
    """The value if it is a string of valid Unicode.

    Raises:
        RequestError: it is not; lone surrogates pass JSON and break everything behind it.
    """
    if not isinstance(value, str):
        refuse(where, value, "a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(f"{where} holds a lone surrogate: send valid Unicode", param=where) from error
    return value


def token_ids(value: object, where: str, vocab_size: int) -> tuple[int, ...]:
    """The value if it is an array of token ids.

    Raises:
        RequestError: it is not, or an id is outside the vocabulary.
    """
    if not isinstance(value, list):
        refuse(where, value, "an array of token ids")
    ids = cast("list[object]", value)
    for token in ids:
        if not is_int(token, 0, vocab_size - 1):
            refuse(where, token, f"an array of token ids in [0, {vocab_size - 1}]")
    return tuple(cast("list[int]", ids))
