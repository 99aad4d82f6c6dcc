"""A candidate of an evaluation that runs elsewhere: an OpenAI-style server, asked one question at a time."""

import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from nanoserve.client import RemoteServer, at
from nanoserve.errors import EngineError
from nanoserve.eval_local import Answer
from nanoserve.eval_questions import Question


@dataclass(frozen=True, slots=True)
class ServerCandidate:
    """A base URL, such as http://127.0.0.1:8000/v1.

    Raises:
        ConfigError: the URL is none.
    """

    label: str
    api_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self._server()

    def _server(self) -> RemoteServer:
        return RemoteServer(self.label, self.api_key)

    @contextmanager
    def open(self) -> Generator["ServerRunner"]:
        """Ask what it serves.

        Raises:
            RequestError, EngineError: it refuses, cannot be reached, or speaks another language.
        """
        server = self._server()
        yield ServerRunner(server, at(server.call("GET", "/models"), str, "data", 0, "id"))


@dataclass(frozen=True, slots=True)
class ServerRunner:
    """A server that answered; ``model`` is its name for what it serves."""

    server: RemoteServer
    model: str

    def facts(self) -> dict[str, Any]:
        """What ran, as far as it can be seen from here."""
        return {"model": self.model, "device": self.server.url}

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
        answer = self.server.call("POST", "/chat/completions" if chat else "/completions", body)
        seconds = time.perf_counter() - started
        text = _text(at(answer, dict, "choices", 0, "message")) if chat else at(answer, str, "choices", 0, "text")
        return Answer(text, at(answer, int, "usage", "completion_tokens"), seconds)


def _text(message: Mapping[str, Any]) -> str:
    """All that was generated; a server may have taken the reasoning out of the content."""
    if message.get("tool_calls"):
        raise EngineError(
            "the server answers with parsed tool_calls, and the tasks grade text: evaluate the checkpoint here"
        )
    reasoning, content = message.get("reasoning_content"), message.get("content")
    thoughts = f"<think>{reasoning}</think>" if isinstance(reasoning, str) else ""
    return thoughts + (content if isinstance(content, str) else "")
