"""The doors of other interfaces without a client: what is refused, under which name, and what is let through."""

import asyncio
import json
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
import pytest
from fake_engine import MODEL, PLAIN, VOCAB, FakeEngine, make_service, plain_config
from in_process import client_of
from starlette.applications import Starlette
from test_malformed import RAW, check_error

from nanoserve import anthropic, responses
from nanoserve.chat import parse_chat
from nanoserve.grammar import Grammar, JsonSchema, ToolCalls
from nanoserve.parameters import Limits
from nanoserve.routes import create_app
from nanoserve.tokenizer import Tokenizer
from nanoserve.worker import Worker

MESSAGES, COUNT, RESPONSES = "/v1/messages", "/v1/messages/count_tokens", "/v1/responses"
HI = [{"role": "user", "content": "hi"}]
DEEP: Any = json.loads("[" * 400 + "]" * 400)
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA"}}
SCHEMA = {"type": "object"}
BAD_SCHEMA = {"type": "nothing"}


def user(*blocks: Any) -> list[Any]:
    return [{"role": "user", "content": list(blocks)}]


def turn(*blocks: Any) -> list[Any]:
    return [*HI, {"role": "assistant", "content": list(blocks)}, *HI]


ANTHROPIC: list[tuple[str, list[Any]]] = [
    # The path that a message must begin with → values of the field that is its first word.
    ("messages", [[], {}, "hi", 5, None, [*HI, {"role": "assistant", "content": "I will"}]]),
    ("messages[0]", [["hi"], [None], [5], [[]]]),
    ("messages[0].role", [[{"role": "tool", "content": "x"}], [{"content": "x"}], [{"role": 1, "content": "x"}]]),
    ("messages[0].content", [[{"role": "user"}], [{"role": "user", "content": 5}], user()]),
    ("messages[0].name", [[{"role": "user", "content": "x", "name": "n"}]]),
    ("messages[0].content[0]", [user("hi"), user(5), user(None)]),
    (
        "messages[0]",
        [user({"type": "text", "text": "\ud800"}), user({"type": "text", "text": DEEP, "x": "\ud800"})],
    ),
    ("messages[0].content[0].text", [user({"type": "text"}), user({"type": "text", "text": 5})]),
    ("messages[0].content[0].x", [user({"type": "text", "text": "a", "x": 1})]),
    (
        "messages[0].content[0].type",
        [user(IMAGE), user({"type": "document"}), user({"text": "a"}), user({"type": 1})],
    ),
    ("messages[0].content[0].type", [user({"type": "tool_use", "id": "a", "name": "f", "input": {}})]),
    ("messages[0].content[0].type", [user({"type": "thinking", "thinking": "a"}), user({"type": DEEP})]),
    ("messages[0].content[0].tool_use_id", [user({"type": "tool_result"})]),
    ("messages[0].content[0].is_error", [user({"type": "tool_result", "tool_use_id": "a", "is_error": 1})]),
    ("messages[0].content[0].content", [user({"type": "tool_result", "tool_use_id": "a", "content": 5})]),
    (
        "messages[0].content[0].content[0].type",
        [user({"type": "tool_result", "tool_use_id": "a", "content": [IMAGE]})],
    ),
    ("messages[1].content[0].type", [turn({"type": "tool_result", "tool_use_id": "a"}), turn(IMAGE)]),
    ("messages[1].content[0].thinking", [turn({"type": "thinking", "signature": "x"})]),
    ("messages[1].content[0].data", [turn({"type": "redacted_thinking"})]),
    ("messages[1].content[0].input", [turn({"type": "tool_use", "id": "a", "name": "f", "input": "{}"})]),
    ("messages[1].content[0].id", [turn({"type": "tool_use", "name": "f", "input": {}})]),
    ("messages[1].content[0].name", [turn({"type": "tool_use", "id": "a", "input": {}})]),
    ("messages[0].content[0].type", [[{"role": "system", "content": [IMAGE]}]]),
    ("the prompt", [[{"role": "user", "content": "word " * 600}]]),
    ("system", [5, {}]),
    ("system[0].type", [[IMAGE]]),
    ("system[0].text", [[{"type": "text"}]]),
    ("max_tokens", [None, 0, -1, "5", True, 1.5]),
    ("model", [5, "gpt-5", ""]),
    ("temperature", [-1, "1", True]),
    ("top_p", [0, 2]),
    ("top_k", [-2, "5"]),
    ("stop_sequences", ["x", [""], [5], ["a"] * 17, ["a" * 1001], [["a"]]]),
    ("stop", [["x"]]),
    ("stream", [1, "yes"]),
    ("tools", ["x", {}, [{"name": f"f{i}", "input_schema": {}} for i in range(129)]]),
    ("tools[0]", [[5], ["x"], [None]]),
    ("tools[0].type", [[{"type": "web_search_20250305", "name": "web_search"}], [{"type": "function"}]]),
    (
        "tools[0].name",
        [[{"input_schema": {}}], [{"name": "a b", "input_schema": {}}], [{"name": 5, "input_schema": {}}]],
    ),
    (
        "tools[0].input_schema",
        [[{"name": "f"}], [{"name": "f", "input_schema": 5}], [{"name": "f", "input_schema": []}]],
    ),
    ("tools[0].parameters", [[{"name": "f", "input_schema": SCHEMA, "parameters": {}}]]),
    ("tools[0].description", [[{"name": "f", "input_schema": SCHEMA, "description": 5}]]),
    ("tools[0].defer_loading", [[{"name": "f", "input_schema": SCHEMA, "defer_loading": True}]]),
    ("tools[1].name", [[{"name": "f", "input_schema": SCHEMA}] * 2]),
    ("tool_choice", ["auto", 5, [], {"type": "any"}, {"type": "tool", "name": "f"}]),
    ("tool_choice.type", [{"type": "required"}, {"x": 1}]),
    ("tool_choice.name", [{"type": "tool"}]),
    ("tool_choice.disable_parallel_tool_use", [{"type": "auto", "disable_parallel_tool_use": 1}]),
    ("thinking", ["enabled", 5]),
    ("thinking.type", [{"type": "on"}, {"budget_tokens": 5}, {"type": "between_tools"}]),
    ("thinking.display", [{"type": "adaptive", "display": "omitted"}]),
    (
        "thinking.budget_tokens",
        [{"type": "enabled", "budget_tokens": -1}, {"type": "disabled", "budget_tokens": 1}],
    ),
    (
        "output_config.effort",
        [{"effort": "none"}, {"effort": 5}, {"effort": "low"}],
    ),  # no low_effort in the template
    ("output_config.format", [{"format": 5}]),
    ("output_config.format", [{"format": {"type": "json_schema", "schema": BAD_SCHEMA}}]),
    ("output_config.format.type", [{"format": {"type": "json_object"}}]),
    ("output_config.x", [{"x": 1}]),
    ("context_management.edits[0]", [{"edits": [{"type": "clear_tool_uses_20250919"}]}, {"edits": [5]}]),
    ("container", ["c"]),
    ("mcp_servers", [[{"url": "http://127.0.0.1"}]]),
    ("inference_geo", ["us"]),
    ("parallel_tool_calls", [True]),
    ("store", [True]),
    ("response_format", [{"type": "text"}]),
    ("logprobs", [True]),
    ("n", [2]),
    ("seed", ["1"]),
    ("ignore_eos", [1]),
    ("chat_template_kwargs", [5]),
    ("chat_template_kwargs.x", [{"x": 1}]),
]


def item(**fields: Any) -> list[Any]:
    return [fields]


CALL: dict[str, Any] = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}
OUTPUT: dict[str, Any] = {"type": "function_call_output", "call_id": "a"}
RESPONSE: list[tuple[str, list[Any]]] = [
    ("input", [None, [], {}, 5, "\ud800", "word " * 600]),
    ("input[0]", [["hi"], [5], [None], item(role="user", content="\ud800")]),
    ("input[0].role", [item(role="tool", content="x"), item(content="x"), item(type="message", content="x")]),
    ("input[0].content", [item(role="user"), item(role="user", content=5), item(role="assistant")]),
    ("input[0].content[0]", [item(role="user", content=[5])]),
    ("input[0].content[0].type", [item(role="user", content=[{"type": "input_image", "image_url": "file:///x"}])]),
    ("input[0].content[0].type", [item(role="user", content=[{"type": "output_text", "text": "a"}])]),
    ("input[0].content[0].text", [item(role="user", content=[{"type": "input_text"}])]),
    ("input[0].name", [item(role="user", content="x", name="n")]),
    (
        "input[0].type",
        [item(type="item_reference", id="a"), item(type="web_search_call"), item(type=5), item(type=DEEP)],
    ),
    ("input[0].arguments", [item(**{**CALL, "arguments": value}) for value in ("{", "[]", "5", "NaN", 5, None)]),
    ("input[0].call_id", [item(**{**CALL, "call_id": None}), item(type="function_call_output", output="x")]),
    ("input[0].namespace", [item(**CALL, namespace="n")]),
    ("input[0].output", [item(**OUTPUT), item(**OUTPUT, output=5)]),
    ("input[0].output[0].type", [item(**OUTPUT, output=[{"type": "input_file"}])]),
    ("input[0].summary", [item(type="reasoning", summary="x")]),
    ("input[0].content[0].type", [item(type="reasoning", content=[{"type": "input_text", "text": "x"}])]),
    ("instructions", [5, []]),
    ("max_output_tokens", [0, "5", True]),
    ("temperature", [-1, "x"]),
    ("top_p", [0]),
    ("model", [5, "gpt-5"]),
    ("stream", [1]),
    ("stream_options.include_usage", [{"include_usage": True}]),
    ("parallel_tool_calls", [1]),
    ("tools", ["x", {}]),
    ("tools[0]", [[5]]),
    ("tools[0].type", [[{"type": "web_search"}], [{"type": "custom", "name": "f"}], [{"name": "f"}]]),
    ("tools[0].name", [[{"type": "function"}], [{"type": "function", "name": "a b"}]]),
    ("tools[0].parameters", [[{"type": "function", "name": "f", "parameters": 5}]]),
    ("tools[0].function", [[{"type": "function", "function": {"name": "f"}}]]),
    ("tools[0].output_schema", [[{"type": "function", "name": "f", "output_schema": {}}]]),
    ("tool_choice", ["required", "any", 5, {"type": "function", "name": "f"}]),
    ("tool_choice.type", [{"type": "allowed_tools", "mode": "auto", "tools": []}]),
    ("reasoning", ["high"]),
    ("reasoning.effort", [{"effort": "hard"}, {"effort": 5}, {"effort": "low"}]),
    ("reasoning.summary", [{"summary": "detailed"}]),
    ("reasoning.x", [{"x": 1}]),
    ("text", ["x"]),
    ("text.format.type", [{"format": {"type": "yaml"}}, {"format": {"name": "n"}}]),
    ("text.format.schema", [{"format": {"type": "json_schema", "name": "n"}}]),
    ("text.format", [{"format": {"type": "json_schema", "name": "n", "schema": BAD_SCHEMA}}]),
    (
        "text.format",
        [{"format": 5}],
    ),
    ("text.verbosity", [{"verbosity": "low"}]),
    ("truncation", ["auto"]),
    ("include", [["message.output_text.logprobs"]]),
    ("top_logprobs", [3]),
    ("prompt", [{"id": "p"}]),
    ("store", [True, 1]),
    ("background", [True]),
    ("previous_response_id", ["resp_1", 5]),
    ("conversation", ["c", {"id": "c"}]),
    ("messages", [HI]),
    ("n", [2]),
    ("x", [1]),
]


def cases() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, table, base in (
        (MESSAGES, ANTHROPIC, {"messages": HI, "max_tokens": 8}),
        (RESPONSES, RESPONSE, {"input": "hi"}),
    ):
        for named, values in table:
            field = {"the prompt": "messages"}.get(named, named).partition("[")[0].partition(".")[0]
            for value in values:
                yield path, named, {**base, field: value}


CASES = list(cases())


@pytest.fixture(scope="module")
def app(tokenizer: Tokenizer) -> Iterator[Starlette]:
    engine = FakeEngine()
    worker = Worker(lambda: engine, max_queue=4)
    worker.wait_ready(10)
    yield create_app(plain_config(), make_service(worker, tokenizer, engine))
    assert worker.state == "ready"
    assert worker.close(5)


def post(app: Starlette, path: str, content: bytes) -> httpx.Response:
    async def go() -> httpx.Response:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app=app), base_url="http://localhost"
        ) as client:
            return await client.post(path, content=content, headers={"content-type": "application/json"})

    return asyncio.run(go())


def check_anthropic(response: httpx.Response) -> str:
    """The message of an error, if it has exactly Anthropic's shape and tells nothing of our insides."""
    assert 400 <= response.status_code < 500, response.text[:300]
    body = response.json()
    assert set(body) == {"type", "error", "request_id"}
    assert body["type"] == "error"
    assert body["request_id"] == response.headers["request-id"] == response.headers["x-request-id"]
    assert set(body["error"]) == {"type", "message"}
    assert body["error"]["type"] == ("not_found_error" if response.status_code == 404 else "invalid_request_error")
    assert len(response.text) < 2000
    assert not any(word in response.text for word in ("Traceback", "/work", ".py", "File "))
    return body["error"]["message"]


@pytest.mark.parametrize(
    ("path", "named", "body"), CASES, ids=[f"{p[4:]}-{n}-{i}" for i, (p, n, _) in enumerate(CASES)]
)
def test_a_wrong_field_is_named(app: Starlette, path: str, named: str, body: dict[str, Any]) -> None:
    response = post(app, path, json.dumps(body).encode())
    if path == MESSAGES:
        message = check_anthropic(response)
    else:
        error = check_error(response)
        message, param = error["message"], error["param"]
        assert param == named, error
    of_input = path == RESPONSES and message.startswith("the prompt has")
    assert message.startswith("the prompt has" if of_input else f"{named} "), message
    if path == MESSAGES and named not in ("max_tokens", "output_config.format") and "ends" not in message:
        counted = {name: value for name, value in body.items() if name != "max_tokens"}
        response = post(app, COUNT, json.dumps(counted).encode())
        assert response.status_code == 200 if named == "the prompt" else check_anthropic(response) == message


@pytest.mark.parametrize("content", RAW, ids=range(len(RAW)))
def test_what_is_no_json_object_is_refused(app: Starlette, content: bytes) -> None:
    check_anthropic(post(app, MESSAGES, content))
    check_anthropic(post(app, COUNT, content))
    check_error(post(app, RESPONSES, content))


def test_every_error_at_this_door_has_its_shape(tokenizer: Tokenizer) -> None:
    with client_of(FakeEngine(), tokenizer, api_key="key", max_body_bytes=1024) as client:
        kinds: dict[int, Any] = {}
        for path, headers, content in (
            (MESSAGES, {}, b"{}"),
            (MESSAGES, {"x-api-key": "key"}, b"{}"),
            (MESSAGES, {"x-api-key": "key", "host": "evil.example"}, b"{}"),
            (f"{MESSAGES}/batches", {"x-api-key": "key"}, b"{}"),
            (MESSAGES, {"x-api-key": "key", "content-type": "text/plain"}, b"{}"),
            (MESSAGES, {"authorization": "Bearer key"}, b" " * 2000),
        ):
            response = client.post(path, headers={"content-type": "application/json", **headers}, content=content)
            kinds[response.status_code] = response.json()["error"]["type"]
            assert response.json()["request_id"] == response.headers["request-id"]
        wrong = client.get(MESSAGES, headers={"x-api-key": "key"})
        kinds[wrong.status_code] = wrong.json()["error"]["type"]
        assert "request-id" not in client.get("/health").headers
    assert kinds == {
        400: "invalid_request_error",
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        405: "invalid_request_error",
        413: "request_too_large",
        415: "invalid_request_error",
    }


HARMLESS: list[tuple[str, dict[str, Any]]] = [
    (MESSAGES, {"metadata": {"user_id": "u"}, "service_tier": "auto", "speed": "standard", "diagnostics": {}}),
    (
        MESSAGES,
        {"cache_control": {"type": "ephemeral"}, "mcp_servers": [], "tools": [], "tool_choice": {"type": "none"}},
    ),
    (
        MESSAGES,
        {"system": None, "temperature": None, "stop_sequences": [], "unknown_but_null": None, "thinking": {}},
    ),
    (MESSAGES, {"seed": 1, "min_p": 0.1, "ignore_eos": True, "logit_bias": {"30": 1}, **PLAIN}),
    (
        MESSAGES,
        {"tools": [{"name": "f", "input_schema": SCHEMA, "cache_control": {}, "eager_input_streaming": True}]},
    ),
    (
        MESSAGES,
        {"tools": [{"type": "custom", "name": "f", "input_schema": SCHEMA, "allowed_callers": ["direct"]}]},
    ),
    (
        MESSAGES,
        {"messages": turn({"type": "text", "text": "a", "citations": [{}]}, {"type": "thinking", "thinking": ""})},
    ),
    (RESPONSES, {"metadata": {}, "user": "u", "prompt_cache_key": "k", "store": False, "background": False}),
    (
        RESPONSES,
        {
            "include": [],
            "truncation": "disabled",
            "reasoning": {"summary": "auto"},
            "text": {"verbosity": "medium"},
        },
    ),
    (RESPONSES, {"text": {"format": {"type": "text"}}, "tool_choice": "auto", "parallel_tool_calls": True}),
    (RESPONSES, {"client_metadata": {"x": "y"}, "top_logprobs": 0, "max_tool_calls": 3, "tools": [], "seed": 5}),
]


@pytest.mark.parametrize(("path", "extra"), HARMLESS, ids=range(len(HARMLESS)))
def test_hints_pass(app: Starlette, path: str, extra: dict[str, Any]) -> None:
    base = {"messages": HI, "max_tokens": 2} if path == MESSAGES else {"input": "hi", "max_output_tokens": 2}
    response = post(app, path, json.dumps({**base, **extra}).encode())
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(("path", "ping"), [(MESSAGES, "event: ping\ndata: "), (RESPONSES, ": ping\n")])
def test_a_silent_stream_is_kept_alive(tokenizer: Tokenizer, path: str, ping: str) -> None:
    engine = FakeEngine(delay=0.3)
    with client_of(engine, tokenizer, ping_interval=0.1) as client:
        body = {"messages": HI, "max_tokens": 1} if path == MESSAGES else {"input": "hi", "max_output_tokens": 1}
        text = client.post(path, json={**body, "stream": True}).text
    first, _, rest = text.partition("\n\n")
    assert first.startswith(("event: message_start\n", "event: response.created\n"))
    assert ping in rest
    assert "[DONE]" not in text


FUNCTIONS: dict[str, Mapping[str, Any]] = {"f": SCHEMA, "g": SCHEMA}
ANTHROPIC_TOOLS = [{"name": name, "input_schema": SCHEMA} for name in FUNCTIONS]
FLAT_TOOLS = [{"type": "function", "name": name, "parameters": SCHEMA} for name in FUNCTIONS]
ONE: dict[str, Mapping[str, Any]] = {"f": SCHEMA}
JSON = JsonSchema(SCHEMA)


@pytest.mark.parametrize(
    ("chat", "held"),
    [
        ({"tools": ANTHROPIC_TOOLS, "tool_choice": {"type": "any"}}, ToolCalls(FUNCTIONS)),
        (
            {"tools": ANTHROPIC_TOOLS, "tool_choice": {"type": "any", "disable_parallel_tool_use": True}},
            ToolCalls(FUNCTIONS, several=False),
        ),
        ({"tools": ANTHROPIC_TOOLS, "tool_choice": {"type": "tool", "name": "f"}}, ToolCalls(ONE, several=False)),
        ({"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}, JSON),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, None),
    ],
)
def test_an_anthropic_answer_is_held_to_what_was_asked(chat: dict[str, Any], held: Grammar | None) -> None:
    body = {"messages": HI, "max_tokens": 2000, **chat}
    asked = parse_chat(anthropic.chat_body(body), Limits(MODEL, VOCAB, {}, True)).held
    assert (asked.grammar, asked.budget) == (held, None if held else 1024)


@pytest.mark.parametrize(
    ("chat", "held"),
    [
        ({"tools": FLAT_TOOLS, "tool_choice": "required"}, ToolCalls(FUNCTIONS)),
        ({"tools": FLAT_TOOLS, "tool_choice": {"type": "function", "name": "f"}}, ToolCalls(ONE, several=False)),
        ({"text": {"format": {"type": "json_schema", "name": "n", "strict": True, "schema": SCHEMA}}}, JSON),
        ({"text": {"format": {"type": "json_object"}}}, JSON),
    ],
)
def test_a_response_is_held_to_what_was_asked(chat: dict[str, Any], held: Grammar) -> None:
    body = {"input": "hi", **chat}
    assert parse_chat(responses.chat_body(body), Limits(MODEL, VOCAB, {}, True)).held.grammar == held


def test_calls_are_single_where_asked(tokenizer: Tokenizer) -> None:
    engine = FakeEngine()
    call = "<tool_call>\n<function=f>\n</function>\n</tool_call>"
    engine.script = tokenizer.encode(f"</think>{call}\n{call}")
    tool = {"name": "f", "input_schema": SCHEMA}
    with client_of(engine, tokenizer) as client:
        for single in (False, True):
            choice = {"type": "auto", "disable_parallel_tool_use": single}
            body = {"messages": HI, "max_tokens": 90, "tools": [tool], "tool_choice": choice}
            content = client.post(MESSAGES, json=body).json()["content"]
            assert [block["type"] for block in content] == ["tool_use"] * (1 if single else 2)
            assert [block["input"] for block in content] == [{}] * len(content)
            other = {
                "input": "hi",
                "tools": [{"type": "function", "name": "f"}],
                "parallel_tool_calls": not single,
            }
            assert len(client.post(RESPONSES, json=other).json()["output"]) == len(content)


def said_in_events(text: str) -> Any:
    """What a stream of either door says, put together as its clients do."""
    events = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]
    if events[0]["type"] == "response.created":
        done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
        assert done == events[-1]["response"]["output"]
        return without_ids(events[-1]["response"])
    message = events[0]["message"]
    for event in events[1:]:
        match event["type"]:
            case "content_block_start":
                message["content"].append({**event["content_block"], "pieces": ""})
            case "content_block_delta":
                ((name, piece),) = [entry for entry in event["delta"].items() if entry[0] != "type"]
                block = message["content"][event["index"]]
                block["pieces" if name == "partial_json" else name] += piece
            case "content_block_stop":
                block = message["content"][event["index"]]
                if pieces := block.pop("pieces"):
                    block["input"] = json.loads(pieces)
            case "message_delta":
                message |= {**event["delta"], "usage": event["usage"]}
            case _:
                pass
    return without_ids(message)


def without_ids(value: Any) -> Any:
    if isinstance(value, dict):
        changing = ("id", "call_id", "created_at")
        return {key: without_ids(item) for key, item in value.items() if key not in changing}
    return [without_ids(item) for item in value] if isinstance(value, list) else value


ODD = [
    "",
    "</think>",
    "thoughts without an end",
    "</think></think>x",
    "a</think>b<think>c</think>d",
    "</think>x <tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call> y",
    "hm <tool_call>\n<function=f>\n</function>\n</tool_call>\n<tool_call>\n<function=f>\n<parameter=a>\ncut",
    "</think><tool_call>\n<function=unknown>\n</function>\n</tool_call>z",
    "</think><tool_call><function=f></function><function=f></function></tool_call><tool_call>",
    "日本</think>語🎉\n\n",
]


@pytest.mark.parametrize("text", ODD, ids=range(len(ODD)))
def test_a_stream_says_what_a_whole_answer_says(tokenizer: Tokenizer, text: str) -> None:
    engine = FakeEngine()
    engine.script = tokenizer.encode(text)
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    message = {"messages": HI, "max_tokens": 90, "tools": [{"name": "f", "input_schema": schema}]}
    response = {"input": "hi", "tools": [{"type": "function", "name": "f", "parameters": schema}]}
    with client_of(engine, tokenizer) as client:
        for path, body in ((MESSAGES, message), (RESPONSES, response)):
            whole = client.post(path, json=body).json()
            assert said_in_events(client.post(path, json={**body, "stream": True}).text) == without_ids(whole)
            assert not any(tag in json.dumps(whole) for tag in ("<think>", "</think>", "tool_call>", "<function"))
