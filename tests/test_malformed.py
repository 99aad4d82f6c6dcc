"""Hostile and mistaken bodies: a 4xx in OpenAI's shape that names the field, and the server goes on."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine, make_service, make_tokenizer, plain_config
from starlette.applications import Starlette

from nanoserve.routes import create_app
from nanoserve.worker import Worker

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HUGE = "9" * 5000
HI = [{"role": "user", "content": "hi"}]

COMMON: list[tuple[str, list[Any]]] = [
    # Field → values that both endpoints refuse.
    ("temperature", [-1, 101, "1", True, [], {}, 1e300]),
    ("top_p", [0, -0.1, 1.1, "1", False]),
    ("min_p", [-0.1, 1.5, "0"]),
    ("top_k", [-2, 1.5, "5", True, 2**40]),
    ("presence_penalty", [-2.5, 2.5, "1"]),
    ("frequency_penalty", [-2.5, 2.5, "x"]),
    ("repetition_penalty", [0, -1, 101, "1"]),
    ("seed", [1.5, "1", True, 2**63, -(2**63) - 1]),
    ("stop", ["", [""], [1], {}, ["a"] * 17, "a" * 1001, 5, "\ud800", [["a"]]]),
    ("stop_token_ids", ["1", [-1], [512], [True], ["1"], [1.0], list(range(20)) * 60]),
    (
        "logit_bias",
        [
            [],
            "x",
            {"512": 1},
            {"-1": 1},
            {"a": 1},
            {"1.0": 1},
            {"٣": 1},
            {"1": 101},
            {"1": "1"},
            {"1": True},
            {"1": None},
            {"": 1},
            {"9" * 5000: 1},
            {str(i): 1 for i in range(1025)},
        ],
    ),
    ("n", [0, -1, 17, 1.5, "1", True]),
    ("stream", [1, "true", [], {}]),
    ("stream_options", [{"include_usage": True}, [], "x"]),  # without stream
    ("min_tokens", [-1, "1", 0.5]),
    ("ignore_eos", [1, "yes"]),
    ("model", [1, "gpt-5", "", "org", "org/fake\n", "\ud800", ["org/fake"]]),
    ("max_tokens", [-1, "5", 1.5, True, 2**40]),
    ("tools", [{}, "x", [0], [{"type": "function"}], [{"type": "web_search"}], [{"function": {"name": "f"}}]]),
    ("tool_choice", ["required", {"type": "function"}, {"type": "function", "function": {"name": "f"}}, "any", 1]),
    ("functions", [[{"name": "f"}]]),
    ("function_call", [{"name": "f"}]),
    ("response_format", [{"type": "json_schema"}, {"type": "yaml"}, "text", {}]),
    ("reasoning_effort", ["hard", 1, True, ""]),
    ("thinking_token_budget", [-1, 1.5, "5"]),
    ("modalities", [["text", "audio"], "text"]),
    ("audio", [{"voice": "x"}]),
    ("prediction", [{"type": "content"}]),
    ("web_search_options", [{}]),
    ("verbosity", ["low"]),
    ("suffix", ["x"]),
    ("best_of", [2, True]),
    ("guided_json", ["{", [1], 5]),
    ("use_beam_search", [True, 0]),
    ("chat_template", ["{{ 1 }}"]),
    ("continue_final_message", [True]),
    ("tempertaure", [1]),
    ("__class__", [1]),
]
CHAT_ONLY: list[tuple[str, list[Any]]] = [
    ("messages", [[], {}, "hi", [1], [None], [[]], 5, [{}], [{"role": "user"}]]),
    ("messages", [[{"role": "wizard", "content": "x"}], [{"role": 1, "content": "x"}], [{"content": "x"}]]),
    ("messages", [[{"role": "user", "content": 5}], [{"role": "user", "content": "\ud800"}]]),
    ("messages", [[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///x"}}]}]]),
    ("messages", [[{"role": "user", "content": [{"type": "text"}]}], [{"role": "user", "content": ["a"]}]]),
    ("messages", [[{"role": "user", "content": "x" * 5000}]]),  # longer than the context
    ("max_tokens", [0]),
    ("max_completion_tokens", [0, "5"]),
    ("logprobs", [1, "true"]),
    ("top_logprobs", [1, 21, -1, True]),
    ("chat_template_kwargs", [[], "x", {"messages": []}, {"x": []}, {"add_generation_prompt": True}]),
    ("add_generation_prompt", [1]),
    ("chat_template_kwargs", [{"low_effort": True}, {"enable_thinking": "false"}, {"enable_thinking": 0}]),
    ("chat_template_kwargs", [{"force_nonempty_content": 1}, {"text": "x"}, {"thinking": False}]),
    ("reasoning_effort", ["low", "minimal"]),  # the template has no low_effort
    ("parallel_tool_calls", [0, "no"]),
    *(("tools", [[{"type": "function", "function": function}]]) for function in (None, [], {}, {"name": 1})),
    *(("tools", [[{"type": "function", "function": {"name": name}}]]) for name in ("", "a b", "<f>", "x" * 257)),
    (
        "tools",
        [
            [{"type": "function", "function": {"name": "f", "parameters": []}}],
            [{"type": "function", "function": {"name": "f", "description": 1}}],
            [{"type": "function", "function": {"name": "f", "strict": "yes"}}],
            [{"type": "function", "function": {"name": "\ud800"}}],
            [{"type": "function", "function": {"name": "f"}, "cache_control": {}}],
            [{"type": "function", "function": {"name": "f"}}] * 2,
            [{"type": "function", "function": {"name": f"f{i}"}} for i in range(129)],
        ],
    ),
    ("prompt", ["hi"]),
    ("echo", [True]),
]
TEXT_ONLY: list[tuple[str, list[Any]]] = [
    ("prompt", ["", [], {}, 5, True, [[]], [""], [True], [1.5], [512], [-1], [1, "a"], ["a", [1]], [[1], "a"]]),
    ("prompt", [[[1], 5], ["a"] * 129, "\ud800", [None], "word " * 2000, [30] * 600]),
    ("max_tokens", [0]),
    ("logprobs", [True, 21, -1, "1"]),
    ("echo", [1, "true"]),
    ("return_token_ids", [1]),
    ("tools", [[{"type": "function", "function": {"name": "f"}}]]),
    ("reasoning_effort", ["high"]),
    ("chat_template_kwargs", [{"enable_thinking": False}]),
    ("messages", [HI]),
    ("top_logprobs", [1]),
    ("max_completion_tokens", [5]),
]


def bodies() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, tables, base in (
        (CHAT, (COMMON, CHAT_ONLY), {"messages": HI}),
        (TEXT, (COMMON, TEXT_ONLY), {"prompt": "hi"}),
    ):
        for field, values in (row for table in tables for row in table):
            for value in values:
                yield path, field, {**base, field: value}


PAIRS: list[tuple[str, str, dict[str, Any]]] = [
    (CHAT, "messages", {}),
    (TEXT, "prompt", {}),
    (CHAT, "max_completion_tokens", {"messages": HI, "max_tokens": 4, "max_completion_tokens": 5}),
    (TEXT, "min_tokens", {"prompt": "hi", "max_tokens": 4, "min_tokens": 5}),
    (CHAT, "stream_options", {"messages": HI, "stream": True, "stream_options": {"include_usage": 1}}),
    (CHAT, "stream_options", {"messages": HI, "stream": True, "stream_options": {"x": 1}}),
    (
        CHAT,
        "stream_options",
        {"messages": HI, "stream": True, "stream_options": {"continuous_usage_stats": True}},
    ),
    ("/tokenize", "messages", {}),
    ("/tokenize", "prompt", {"prompt": 5}),
    ("/tokenize", "x", {"prompt": "a", "x": 1}),
    ("/detokenize", "tokens", {}),
    ("/detokenize", "tokens", {"tokens": ["a"]}),
    ("/detokenize", "tokens", {"tokens": [512]}),
    ("/detokenize", "model", {"tokens": [30], "model": "x"}),
]

RAW: list[bytes] = [
    b"",
    b" ",
    b"null",
    b"[]",
    b"5",
    b'"x"',
    b"{",
    b"{}}",
    b"{'a': 1}",
    b'{"messages": NaN}',
    b'{"temperature": Infinity, "messages": []}',
    b'{"temperature": -Infinity}',
    b'{"temperature": 1e999}',
    b'{"seed": ' + HUGE.encode() + b"}",
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    b"\xff\xfe{\x00}\x00",
    b"\x80",
    b'\xef\xbb\xbf{"messages": []}',
    b'{"messages": "\x01"}',
    b"\x00" * 100,
    b'{"\\ud800": 1}',
    b'{"model": "\\ud800", "messages": []}',
]

CASES = [*bodies(), *PAIRS]


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starlette]:
    engine = FakeEngine()
    worker = Worker(lambda: engine, max_queue=4)
    worker.wait_ready(10)
    tokenizer = make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    yield create_app(plain_config(), make_service(worker, tokenizer, engine))
    assert worker.state == "ready"
    assert worker.close(5)


def post(app: Starlette, path: str, content: bytes) -> httpx.Response:
    async def go() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            response = await client.post(path, content=content, headers={"content-type": "application/json"})
            alive = await client.post(TEXT, json={"prompt": "still there?", "max_tokens": 1})
            assert alive.status_code == 200
            return response

    return asyncio.run(go())


def check_error(response: httpx.Response) -> dict[str, Any]:
    """The error object, if it has exactly OpenAI's shape and tells nothing of our insides."""
    assert 400 <= response.status_code < 500, response.text[:300]
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["type"] == "invalid_request_error"
    assert error["param"] is None or isinstance(error["param"], str)
    assert error["code"] is None or isinstance(error["code"], str)
    assert len(response.text) < 2000
    assert not any(word in response.text for word in ("Traceback", "/work", ".py", "File "))
    return error


def test_the_table_is_long() -> None:
    assert len(CASES) + len(RAW) >= 120


@pytest.mark.parametrize(
    ("path", "field", "body"), CASES, ids=[f"{i}-{path[1:]}-{field}" for i, (path, field, _) in enumerate(CASES)]
)
def test_a_wrong_field_is_named(app: Starlette, path: str, field: str, body: dict[str, Any]) -> None:
    """S2, S12."""
    response = post(app, path, json.dumps(body).encode())
    error = check_error(response)
    assert (error["param"] or "").partition("[")[0].partition(".")[0] == field, error
    assert response.status_code == (404 if error["code"] == "model_not_found" else 400)


@pytest.mark.parametrize(
    ("field", "value", "limit"),
    [
        ("stop", ["a"] * 17, "16"),
        ("stop", "a" * 1001, "1000"),
        ("stop_token_ids", [5] * 1025, "1024"),
        ("logit_bias", {"512": 1}, "[0, 511]"),
        ("logit_bias", {str(i): 1 for i in range(1025)}, "1024"),
        ("tools", [{"type": "function", "function": {"name": f"f{i}"}} for i in range(129)], "128"),
        ("messages", HI * 16_385, "16384"),
        ("top_logprobs", 21, "20"),
        ("n", 17, "16"),
        ("user", "x" * (8 * 1024 * 1024), "8388608"),
    ],
)
def test_a_limit_is_named(app: Starlette, field: str, value: object, limit: str) -> None:
    """S10."""
    response = post(app, CHAT, json.dumps({"messages": HI, "logprobs": True, field: value}).encode())
    assert limit in check_error(response)["message"]


@pytest.mark.parametrize("content", RAW, ids=range(len(RAW)))
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_what_is_no_json_object_is_refused(app: Starlette, path: str, content: bytes) -> None:
    check_error(post(app, path, content))


HARMLESS: list[dict[str, Any]] = [
    {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"},
    {"safety_identifier": "x", "prompt_cache_key": "y", "prompt_cache_retention": "24h"},
    {"parallel_tool_calls": True, "tools": [], "tool_choice": "none", "functions": []},
    {"response_format": {"type": "text"}, "modalities": ["text"], "tool_choice": "auto"},
    {"temperature": None, "stop": None, "tools": None, "seed": None, "n": None, "logit_bias": None},
    {"temperature": 0, "top_p": 1, "top_k": -1, "seed": -(2**63), "stop": [], "logit_bias": {"0": -100}},
    {"top_k": 0, "min_p": 0.5, "repetition_penalty": 1.1, "min_tokens": 1, "ignore_eos": True},
    {"model": "org/fake", "stop": ["a"] * 16, "stop_token_ids": [1, 2], "n": 1},
    {"unknown_but_null": None},
]


@pytest.mark.parametrize("extra", HARMLESS, ids=range(len(HARMLESS)))
@pytest.mark.parametrize(("path", "base"), [(CHAT, {"messages": HI}), (TEXT, {"prompt": "hi"})])
def test_harmless_and_neutral_fields_pass(
    app: Starlette, path: str, base: dict[str, Any], extra: dict[str, Any]
) -> None:
    assert post(app, path, json.dumps({"max_tokens": 2, **base, **extra}).encode()).status_code == 200
