"""Asking an OpenAI-style server, with the standard library: a connection a request, answers whole or streamed."""

import http.client
import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import SplitResult, urlsplit

from nanoserve.errors import ConfigError, EngineError, NanoserveError, RequestError, ServerBusy, ServerUnreachable

TIMEOUT = 600.0
"""Seconds without a byte; a whole answer comes at once, and its request may wait for another's."""


@dataclass(frozen=True, slots=True)
class RemoteServer:
    """A server's base URL, such as http://127.0.0.1:8000/v1, and its key.

    Redirects are not followed, so that the key stays here.

    Raises:
        ConfigError: the URL is none, or the key cannot be sent.
    """

    url: str
    api_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        _split(self.url)
        if not (self.api_key or "").isprintable():
            raise ConfigError("api_key holds a line break or a control character and must be one line of text")

    def call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> object:
        """The JSON of one answer.

        Raises:
            RequestError: status 4xx.
            ServerUnreachable: nobody listens there.
            ServerBusy: it has no room, and says when it may have.
            EngineError: any other failure.
        """
        with self._ask(method, path, body) as response:
            content = response.read()
        value = _json(content)
        if value is None:
            raise EngineError(f"{self._at(path)} answered 200: {_words(content[:200])}")
        return value

    def stream(self, path: str, body: Mapping[str, Any]) -> Generator[Any]:
        """The events of a streamed answer; closing the iterator ends the request.

        Raises:
            RequestError, ServerUnreachable, ServerBusy, EngineError: as `call`; the last also when the answer
                breaks off.
        """
        with self._ask("POST", path, {**body, "stream": True}) as response:
            for line in response:
                if not line.startswith(b"data:"):
                    continue  # a blank line, or a comment that keeps the connection alive
                data = line.removeprefix(b"data:").strip()
                if data == b"[DONE]":
                    return
                event = _json(data)
                if not isinstance(event, dict) or "error" in event:
                    raise EngineError(f"{self._at(path)}: {_message(event, data)}")
                yield event
        raise EngineError(f"{self._at(path)}: the stream ended before the answer did")

    def _at(self, path: str) -> str:
        return f"{self.url.rstrip('/')}{path}"

    @contextmanager
    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None) -> Generator[http.client.HTTPResponse]:
        """An answer of status 200, of which nothing was read."""
        base, where = _split(self.url), self._at(path)
        kind = http.client.HTTPSConnection if base.scheme == "https" else http.client.HTTPConnection
        connection = kind(base.hostname or "", base.port, timeout=TIMEOUT)
        headers: dict[str, str | bytes] = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = b"Bearer " + self.api_key.encode()
        try:
            data = None if body is None else json.dumps(body)
            connection.request(method, base.path.rstrip("/") + path, data, headers)
            response = connection.getresponse()
            if response.status != 200:
                raise _refusal(where, response)
            yield response
        except ConnectionRefusedError as error:
            raise ServerUnreachable(where, error) from error
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(f"{where}: {type(error).__name__}: {error}: is the server running?") from error
        finally:
            connection.close()


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        sound, parts = False, SplitResult("", "", "", "", "")
    if not sound or parts.query or parts.fragment or parts.username is not None:
        raise ConfigError(f"url is {url!r} and must be a base URL such as http://127.0.0.1:8000/v1")
    return parts


def _json(content: bytes) -> object:
    """The value, or None where there is none."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _refusal(where: str, response: http.client.HTTPResponse) -> NanoserveError:
    content = response.read()
    message = f"{where} answered {response.status}: {_message(_json(content), content)}"
    wait = response.headers.get("retry-after", "")
    if response.status in (429, 503) and wait.isascii() and wait.isdecimal() and len(wait) < 6:
        return ServerBusy(message, int(wait))
    if 400 <= response.status < 500:
        return RequestError(message, status=response.status)
    return EngineError(message)


def _message(answer: object, content: bytes) -> str:
    """The words of an error object, or else how the content begins."""
    try:
        return _words(at(answer, str, "error", "message").encode())
    except EngineError:
        return _words(content[:200])


def _words(content: bytes) -> str:
    """On one line, and nothing that a terminal would obey."""
    text = " ".join(content.decode("utf-8", "replace").split())
    return "".join(char if char.isprintable() else "\ufffd" for char in text)


def at(value: object, kind: type[Any], *path: str | int) -> Any:
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
