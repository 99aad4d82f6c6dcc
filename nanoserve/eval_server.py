"""A candidate of an evaluation that runs elsewhere: an OpenAI-style server, asked one question at a time."""

import http.client
import json
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import SplitResult, urlsplit

from nanoserve.errors import ConfigError, EngineError, NanoserveError, RequestError
from nanoserve.eval_local import Answer
from nanoserve.eval_questions import Question

_TIMEOUT = 600.0
"""Seconds without a byte; a whole answer comes at once, and its request may wait for another's."""

_PATIENCE = 600
"""Seconds that a full server is waited for, question by question."""


class _Busy(EngineError):
    """The server has no room, and says after how many seconds it may have."""

    def __init__(self, message: str, retry_after: int) -> None:
        self.retry_after = retry_after
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class ServerCandidate:
    """A base URL, such as http://127.0.0.1:8000/v1.

    Raises:
        ConfigError: the URL is none.
    """

    label: str
    api_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        _split(self.label)

    @contextmanager
    def open(self) -> Generator["ServerRunner"]:
        """Ask what it serves.

        Raises:
            RequestError, EngineError: it refuses, cannot be reached, or speaks another language.
        """
        runner = ServerRunner(_split(self.label), self.api_key)
        runner.model = _at(runner.call("GET", "/models")[0], str, "data", 0, "id")
        yield runner


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        sound, parts = False, SplitResult("", "", "", "", "")
    if not sound or parts.query or parts.fragment or parts.username is not None:
        raise ConfigError(f"url is {url!r} and must be a base URL such as http://127.0.0.1:8000/v1")
    return parts


@dataclass(slots=True)
class ServerRunner:
    """A server that answered; ``model`` is its name for what it serves."""

    base: SplitResult
    api_key: str | None = field(repr=False)
    model: str = ""

    def facts(self) -> dict[str, Any]:
        """What ran, as far as it can be seen from here."""
        return {"model": self.model, "device": self.base.geturl()}

    def answer(self, question: Question) -> Answer:
        """Answer greedily: messages through /chat/completions, plain text through /completions.

        Raises:
            RequestError: the server refuses the request.
            EngineError: it fails, cannot be reached, or answers in another form.
        """
        body: dict[str, Any] = {"model": self.model, "max_tokens": question.max_tokens, "temperature": 0}
        if question.stop:
            body["stop"] = list(question.stop)
        if question.tools:
            body["tools"] = list(question.tools)
        chat = not isinstance(question.prompt, str)
        body |= {"prompt": question.prompt} if isinstance(question.prompt, str) else _messages(question.prompt)
        answer, seconds = self.call("POST", "/chat/completions" if chat else "/completions", body)
        if chat:
            text = _text(_at(answer, dict, "choices", 0, "message"), question.tools)
        else:
            text = _at(answer, str, "choices", 0, "text")
        return Answer(text, _at(answer, int, "usage", "completion_tokens"), seconds)

    def call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> tuple[object, float]:
        """One request, put again as long as the server has no room, within `_PATIENCE`.

        Returns:
            The answer's JSON, and the seconds that it took.

        Raises:
            RequestError: status 4xx.
            EngineError: any other failure.
        """
        waited = 0
        while True:
            started = time.perf_counter()
            try:
                return self._once(method, path, body), time.perf_counter() - started
            except _Busy as busy:
                waited += max(1, busy.retry_after)
                if waited > _PATIENCE:
                    raise
                time.sleep(busy.retry_after)

    def _once(self, method: str, path: str, body: Mapping[str, Any] | None) -> object:
        """On a connection of its own; redirects are not followed, so that the key stays here."""
        where = f"{self.base.geturl().rstrip('/')}{path}"
        kind = http.client.HTTPSConnection if self.base.scheme == "https" else http.client.HTTPConnection
        connection = kind(self.base.hostname or "", self.base.port, timeout=_TIMEOUT)
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        try:
            data = None if body is None else json.dumps(body)
            connection.request(method, self.base.path.rstrip("/") + path, data, headers)
            response = connection.getresponse()
            status, content = response.status, response.read()
            retry_after = response.getheader("Retry-After") or ""
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(f"{where}: {type(error).__name__}: {error}: is the server running?") from error
        finally:
            connection.close()
        return _parsed(where, status, content, retry_after)


def _parsed(where: str, status: int, content: bytes, retry_after: str) -> object:
    """The JSON of a 200; of anything else the error that it is."""
    try:
        value: object = json.loads(content)
    except (ValueError, RecursionError):
        value = None
    if status == 200 and value is not None:
        return value
    try:
        words = _at(value, str, "error", "message")
    except EngineError:
        words = content[:200].decode("utf-8", "replace")
    message = f"{where} answered {status}: {' '.join(words.split())}"
    raise _error_of(status, message, retry_after)


def _error_of(status: int, message: str, retry_after: str) -> NanoserveError:
    if status == 503 and retry_after.isascii() and retry_after.isdecimal() and len(retry_after) < 5:
        return _Busy(message, int(retry_after))
    return RequestError(message, status=status) if 400 <= status < 500 else EngineError(message)


def _messages(prompt: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Messages as the wire wants them: calls have ids, which their results name, and arguments in JSON."""
    sent: list[dict[str, Any]] = []
    open_calls: list[str] = []
    for message in prompt:
        given = dict(message)
        if calls := given.get("tool_calls"):
            open_calls = [f"call_{len(sent)}_{i}" for i in range(len(calls))]
            given["tool_calls"] = [_with_id(call, id) for call, id in zip(calls, open_calls, strict=True)]
        if given["role"] == "tool" and open_calls:
            given["tool_call_id"] = open_calls.pop(0)
        sent.append(given)
    return {"messages": sent}


def _with_id(call: Mapping[str, Any], id: str) -> dict[str, Any]:
    function = call["function"]
    return {**call, "id": id, "function": {**function, "arguments": json.dumps(function["arguments"])}}


def _text(message: Mapping[str, Any], tools: Sequence[Mapping[str, Any]]) -> str:
    """All that was generated: reasoning and calls are put back to where a server has taken them from."""
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    content = message.get("content")
    calls: list[object] = _at(message, list, "tool_calls") if message.get("tool_calls") else []
    thoughts = f"<think>{reasoning}</think>" if isinstance(reasoning, str) else ""
    written = [_written(call, tools) for call in calls]
    return "".join([thoughts, content if isinstance(content, str) else "", *written])


def _written(call: object, tools: Sequence[Mapping[str, Any]]) -> str:
    """A parsed call in the released form. A string where the tool wants none stands in quotes, and stays wrong."""
    name = _at(call, str, "function", "name")
    try:
        arguments: object = json.loads(_at(call, str, "function", "arguments"))
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        return ""
    declared = next((tool["function"]["parameters"] for tool in tools if tool["function"]["name"] == name), {})
    lines = [f"<tool_call>\n<function={name}>"]
    for key, value in cast("dict[str, object]", arguments).items():
        plain = isinstance(value, str) and declared.get("properties", {}).get(key, {}).get("type") == "string"
        lines.append(f"<parameter={key}>\n{value if plain else json.dumps(value)}\n</parameter>")
    return "\n".join([*lines, "</function>\n</tool_call>"])


def _at(value: object, kind: type[Any], *path: str | int) -> Any:
    """The value at a path of keys and indices.

    Raises:
        EngineError: there is none of this kind.
    """
    for step in path:
        try:
            value = cast("Any", value)[step]
        except (LookupError, TypeError):
            value = None
    if not isinstance(value, kind):
        name = ".".join(str(step) for step in path)
        raise EngineError(f"the server's answer has no {name}: is it an OpenAI-style server?")
    return value
