"""The endpoints in this process over a fake engine, and what an answer says, whole or put together from chunks."""

import json
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fake_engine import FakeEngine, make_service, plain_config
from starlette.testclient import TestClient

from nanoserve.routes import create_app
from nanoserve.tokenizer import Tokenizer
from nanoserve.worker import Worker

CHAT = "/v1/chat/completions"


@contextmanager
def client_of(engine: FakeEngine, tokenizer: Tokenizer | None, **options: object) -> Generator[TestClient]:
    worker = Worker(lambda: engine, max_queue=4)
    worker.wait_ready(5)
    app = create_app(plain_config(**options), make_service(worker, tokenizer, engine))
    try:
        yield TestClient(app, base_url="http://localhost")
    finally:
        assert worker.close(5)


def events_of(text: str) -> list[Any]:
    """The stream's chunks, and "[DONE]"; comments are left out."""
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    data = [block.removeprefix("data: ") for block in blocks]
    return [item if item == "[DONE]" else json.loads(item) for item in data]


@dataclass(frozen=True, slots=True)
class Said:
    """One choice's message; calls as (name, arguments)."""

    reasoning: str = ""
    content: str = ""
    calls: tuple[tuple[str, str], ...] = ()
    finish: str | None = None

    @property
    def arguments(self) -> list[Any]:
        return [json.loads(arguments) for _, arguments in self.calls]


def of_choice(choice: dict[str, Any]) -> Said:
    """A choice of a whole answer; fails where a client would."""
    message = choice["message"]
    assert message["role"] == "assistant"
    assert message["reasoning"] == message["reasoning_content"] != ""
    calls = message.get("tool_calls")
    assert calls != []
    if message["content"] is None:
        assert calls
    for call in calls or []:
        assert call["type"] == "function"
        assert call["id"].startswith("call_")
    functions = [(call["function"]["name"], call["function"]["arguments"]) for call in calls or []]
    return Said(message["reasoning"] or "", message["content"] or "", tuple(functions), choice["finish_reason"])


def of_chunks(chunks: Sequence[dict[str, Any]], index: int = 0) -> Said:
    """A choice of a stream; fails where a client would."""
    mine = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    deltas = [choice["delta"] for choice in mine]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert all("role" not in delta for delta in deltas[1:])
    calls: list[tuple[str, str]] = []
    ids: set[str] = set()
    for delta in deltas:
        assert delta.get("reasoning") == delta.get("reasoning_content")
        for piece in delta.get("tool_calls", []):
            if piece["index"] == len(calls):
                assert piece["id"].startswith("call_")
                assert piece["type"] == "function"
                assert piece["function"]["arguments"] == ""
                ids.add(piece["id"])
                calls.append((piece["function"]["name"], ""))
            else:
                assert set(piece) == {"index", "function"}
                assert set(piece["function"]) == {"arguments"}
                name, before = calls[piece["index"]]
                calls[piece["index"]] = (name, before + piece["function"]["arguments"])
    assert len(ids) == len(calls)
    finishes = [choice["finish_reason"] for choice in mine]
    assert finishes[:-1] == [None] * (len(mine) - 1)
    text = {name: "".join(delta.get(name, "") for delta in deltas) for name in ("reasoning", "content")}
    return Said(text["reasoning"], text["content"], tuple(calls), finishes[-1])


def ask(client: TestClient, **body: Any) -> Said:
    """The message, if it is the same streamed and not, and so is the usage."""
    body = {"messages": [{"role": "user", "content": "hi"}], **body}
    response = client.post(CHAT, json=body)
    assert response.status_code == 200, response.text
    answer = response.json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, done = events_of(client.post(CHAT, json={**body, **options}).text)
    assert done == "[DONE]"
    said = of_choice(answer["choices"][0])
    assert of_chunks(chunks) == said
    assert chunks[-1]["usage"] == answer["usage"]
    assert answer["timings"].keys() == chunks[-1]["timings"].keys()
    return said
