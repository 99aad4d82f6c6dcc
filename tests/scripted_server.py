"""A server that answers chats from a script, so that what a client must show is known."""

import json
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from nanoserve.page import PAGE_FILE, security_headers

WAIT = "wait"
"""In a reply: go on when the test releases it."""
ENDLESS = "endless"
"""In a reply: send a piece now and then until the client leaves."""
DONE = "done"
"""In a reply: [DONE]."""

USAGE: dict[str, Any] = {
    "choices": [],
    "usage": {"prompt_tokens": 20, "completion_tokens": 21, "total_tokens": 41},
}


def delta(finish: str | None = None, **fields: object) -> dict[str, Any]:
    """A chunk with these fields of a delta."""
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": finish}]}


def text_reply(*pieces: str) -> list[object]:
    """A whole answer of text."""
    begin = delta(role="assistant", content="")
    return [begin, *(delta(content=piece) for piece in pieces), delta("stop"), USAGE, DONE]


@dataclass(frozen=True)
class Refusal:
    """A reply that is no stream."""

    status: int
    body: str
    headers: dict[str, str] = field(default_factory=dict[str, str])


@dataclass
class Script:
    """What the server does, and what it saw."""

    replies: list[Sequence[object] | Refusal] = field(default_factory=list[Sequence[object] | Refusal])
    model: str = "org/scripted"
    key: str | None = None
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    paths: list[str] = field(default_factory=list[str])
    release: threading.Event = field(default_factory=threading.Event)
    left: threading.Event = field(default_factory=threading.Event)


@contextmanager
def scripted() -> Generator[Script]:
    """Serve on loopback."""
    script = Script()

    class Handler(_Handler):
        plan = script

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        script.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield script
        finally:
            script.release.set()
            server.shutdown()
            thread.join(10)


class _Handler(BaseHTTPRequestHandler):
    plan: Script

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.plan.paths.append(self.path)
        if self.path == "/":
            html = PAGE_FILE.read_text(encoding="utf-8")
            self._whole(Refusal(200, html, {"content-type": "text/html", **security_headers(html)}))
        elif self.path == "/v1/models":
            if self._has_key():
                models = {"data": [{"id": self.plan.model, "max_model_len": 512}]}
                self._whole(Refusal(200, json.dumps(models)))
        else:
            self._whole(Refusal(404, "{}"))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.plan.paths.append(self.path)
        if not self._has_key():
            return
        self.plan.bodies.append(json.loads(body))
        reply = self.plan.replies.pop(0)
        if isinstance(reply, Refusal):
            self._whole(reply)
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        for event in reply:
            self._send(event)

    def _send(self, event: object) -> None:
        if event == WAIT:
            assert self.plan.release.wait(30)
        elif event == ENDLESS:
            try:
                for _ in range(1000):
                    self._send(delta(content="tick "))
                    if self.plan.release.wait(0.02):
                        return
            except OSError:
                self.plan.left.set()
        else:
            text = "[DONE]" if event == DONE else json.dumps(event, ensure_ascii=False)
            data = f": ping\n\ndata: {text}\n\n".encode()
            # In two parts, as a network may cut it: inside a line, and inside a character where one is long.
            cut = next((i + 1 for i, byte in enumerate(data) if byte > 127), len(data) // 2)
            self.wfile.write(data[:cut])
            time.sleep(0.002)
            self.wfile.write(data[cut:])

    def _has_key(self) -> bool:
        key = self.plan.key
        offered = self.headers.get("authorization", "").encode("latin-1")
        if key is None or offered == b"Bearer " + key.encode():
            return True
        error = {"message": "a valid API key is needed", "type": "authentication_error", "code": "invalid_api_key"}
        self._whole(Refusal(401, json.dumps({"error": error})))
        return False

    def _whole(self, answer: Refusal) -> None:
        content = answer.body.encode()
        self.send_response(answer.status)
        for name, value in ({"content-type": "application/json"} | answer.headers).items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
