"""A candidate of an evaluation that runs elsewhere: an OpenAI-style server, asked one question at a time."""

import json
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

from nanoserve.client import RemoteServer, at
from nanoserve.errors import ServerBusy
from nanoserve.eval_local import Answer
from nanoserve.eval_questions import Question

_PATIENCE = 600
"""Seconds that a full server is waited for, question by question."""


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
        runner = ServerRunner(self._server())
        yield replace(runner, model=at(runner.call("GET", "/models")[0], str, "data", 0, "id"))


@dataclass(frozen=True, slots=True)
class ServerRunner:
    """A server that answered; ``model`` is its name for what it serves."""

    server: RemoteServer
    model: str = ""

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
        body |= {"prompt": question.prompt} if isinstance(question.prompt, str) else _messages(question.prompt)
        answer, seconds = self.call("POST", "/chat/completions" if chat else "/completions", body)
        if chat:
            text = _text(at(answer, dict, "choices", 0, "message"), question.tools)
        else:
            text = at(answer, str, "choices", 0, "text")
        return Answer(text, at(answer, int, "usage", "completion_tokens"), seconds)

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
                return self.server.call(method, path, body), time.perf_counter() - started
            except ServerBusy as busy:
                waited += max(1, busy.retry_after)
                if waited > _PATIENCE:
                    raise
                time.sleep(busy.retry_after)


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
    calls: list[object] = at(message, list, "tool_calls") if message.get("tool_calls") else []
    thoughts = f"<think>{reasoning}</think>" if isinstance(reasoning, str) else ""
    written = [_written(call, tools) for call in calls]
    return "".join([thoughts, content if isinstance(content, str) else "", *written])


def _written(call: object, tools: Sequence[Mapping[str, Any]]) -> str:
    """A parsed call in the released form. A string where the tool wants none stands in quotes, and stays wrong."""
    name = at(call, str, "function", "name")
    try:
        arguments: object = json.loads(at(call, str, "function", "arguments"))
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
