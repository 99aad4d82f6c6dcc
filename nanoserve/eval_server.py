"""A candidate of an evaluation that runs elsewhere: an OpenAI-style server, asked one question at a time."""

import http.client
import json
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import SplitResult, urlsplit

from nanoserve.errors import ConfigError, EngineError, NanoserveError, RequestError
from nanoserve.eval_local import Answer
from nanoserve.eval_questions import Question

_TIMEOUT = 600.0
"""Seconds without a byte; a whole answer comes at once, and its request may wait for another's."""


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
        runner.model = _at(runner.call("GET", "/models"), str, "data", 0, "id")
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
        body |= {"messages": list(question.prompt)} if chat else {"prompt": question.prompt}
        started = time.perf_counter()
        answer = self.call("POST", "/chat/completions" if chat else "/completions", body)
        seconds = time.perf_counter() - started
        text = (
            _text(_at(answer, dict, "choices", 0, "message")) if chat else _at(answer, str, "choices", 0, "text")
        )
        return Answer(text, _at(answer, int, "usage", "completion_tokens"), seconds)

    def call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> object:
        """One request, on a connection of its own; redirects are not followed, so that the key stays here.

        Raises:
            RequestError: status 4xx.
            EngineError: any other failure.
        """
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
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(f"{where}: {type(error).__name__}: {error}: is the server running?") from error
        finally:
            connection.close()
        return _parsed(where, status, content)


def _parsed(where: str, status: int, content: bytes) -> object:
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
    raise _error_of(status, message)


def _error_of(status: int, message: str) -> NanoserveError:
    return RequestError(message, status=status) if 400 <= status < 500 else EngineError(message)


def _text(message: Mapping[str, Any]) -> str:
    """All that was generated; a server may have taken the reasoning out of the content."""
    if message.get("tool_calls"):
        raise EngineError(
            "the server answers with parsed tool_calls, and the tasks grade text: evaluate the checkpoint here"
        )
    reasoning, content = message.get("reasoning_content"), message.get("content")
    thoughts = f"<think>{reasoning}</think>" if isinstance(reasoning, str) else ""
    return thoughts + (content if isinstance(content, str) else "")


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
