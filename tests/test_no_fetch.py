"""The server fetches nothing that a request names: no image, no file, no schema, no tool server."""

import socket
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine, running

from nanoserve.tokenizer import Tokenizer

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
Make = Callable[[str], dict[str, Any]]


def user(*parts: object) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


HI = [{"role": "user", "content": "hi"}]
BODIES: list[tuple[str, Make]] = [
    (CHAT, lambda url: {"messages": user({"type": "image_url", "image_url": {"url": url}})}),
    (CHAT, lambda url: {"messages": user({"type": "file", "file": {"file_data": url}})}),
    (CHAT, lambda url: {"messages": HI, "guided_json": {"$ref": url}}),
    (CHAT, lambda url: {"messages": HI, "guided_json": {"$id": url, "$ref": "x.json"}}),
    (CHAT, lambda url: {"messages": HI, "guided_grammar": f'start: %json {{"$ref": "{url}"}}'}),
    (
        CHAT,
        lambda url: {
            "messages": HI,
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"$ref": url}}}],
            "tool_choice": "required",
        },
    ),
    (MESSAGES, lambda url: {"messages": user({"type": "image", "source": {"type": "url", "url": url}})}),
    (MESSAGES, lambda url: {"messages": user({"type": "document", "source": {"type": "url", "url": url}})}),
    (MESSAGES, lambda url: {"messages": HI, "mcp_servers": [{"type": "url", "url": url, "name": "x"}]}),
    (RESPONSES, lambda url: {"input": user({"type": "input_image", "image_url": url})}),
    (RESPONSES, lambda url: {"input": user({"type": "input_file", "file_url": url})}),
    (RESPONSES, lambda url: {"input": "hi", "tools": [{"type": "mcp", "server_url": url}]}),
]


def test_no_url_is_fetched(tokenizer: Tokenizer) -> None:
    """S8."""
    with (
        socket.create_server(("127.0.0.1", 0)) as canary,
        running(tokenizer, FakeEngine()) as server,
        httpx.Client(timeout=20) as http,
    ):
        canary.setblocking(False)
        for url in (f"http://127.0.0.1:{canary.getsockname()[1]}/x.json", "file:///etc/passwd"):
            for path, make in BODIES:
                body = make(url) | ({"max_tokens": 2} if path != RESPONSES else {})
                answer = http.post(server.url + path, json=body)
                assert answer.status_code == 400, (path, body)
                assert "root:" not in answer.text
        with pytest.raises(BlockingIOError):
            canary.accept()
