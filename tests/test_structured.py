"""What a request may hold its answer to: the fields, and answers of a random model that keep to them."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from fake_engine import MODEL, VOCAB
from test_run import Server

from nanoserve.chat import parse_chat
from nanoserve.completions import parse_completion
from nanoserve.errors import RequestError
from nanoserve.grammar import Choice, JsonSchema, Lark, Regex, ToolCalls
from nanoserve.parameters import Limits
from nanoserve.structured import Held

LIMITS = Limits(MODEL, VOCAB, {}, has_text=True)
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer"},
        "ok": {"type": "boolean"},
    },
    "required": ["name", "age", "ok"],
    "additionalProperties": False,
}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}
FORMAT: dict[str, Any] = {
    "type": "json_schema",
    "json_schema": {"name": "person", "schema": SCHEMA, "strict": True},
}


def tool(name: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [tool("first"), tool("second")]
PARAMETERS = TOOLS[0]["function"]["parameters"]
BOTH = {"first": PARAMETERS, "second": PARAMETERS}
SECOND = {"type": "function", "function": {"name": "second"}}


@pytest.mark.parametrize(
    ("body", "held"),
    [
        ({}, Held()),
        ({"response_format": {"type": "text"}}, Held()),
        ({"response_format": {"type": "json_object"}}, Held(JsonSchema({"type": "object"}), "response_format")),
        ({"response_format": FORMAT}, Held(JsonSchema(SCHEMA), "response_format")),
        ({"guided_json": json.dumps(SCHEMA)}, Held(JsonSchema(SCHEMA), "guided_json")),
        ({"guided_regex": "a+"}, Held(Regex("a+"), "guided_regex")),
        ({"guided_choice": ["a", "b"]}, Held(Choice(("a", "b")), "guided_choice")),
        ({"guided_grammar": 'root ::= "a"'}, Held(Lark('root ::= "a"'), "guided_grammar")),
        ({"structured_outputs": {"regex": "a+"}}, Held(Regex("a+"), "structured_outputs.regex")),
        ({"thinking_token_budget": 0}, Held(budget=0)),
        ({"tools": TOOLS}, Held()),
        ({"tools": TOOLS, "tool_choice": "required"}, Held(ToolCalls(BOTH), "tools")),
        (
            {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False},
            Held(ToolCalls(BOTH, several=False), "tools"),
        ),
        ({"tools": TOOLS, "tool_choice": SECOND}, Held(ToolCalls({"second": PARAMETERS}, several=False), "tools")),
        (
            {"tools": TOOLS, "response_format": FORMAT},
            Held(ToolCalls(BOTH, otherwise=JsonSchema(SCHEMA)), "response_format"),
        ),
        (
            {"tools": TOOLS, "tool_choice": "none", "response_format": FORMAT},
            Held(JsonSchema(SCHEMA), "response_format"),
        ),
    ],
)
def test_what_an_answer_is_held_to(body: dict[str, Any], held: Held) -> None:
    assert parse_chat({**CHAT, **body}, LIMITS).held == held


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"response_format": {**FORMAT, "more": 1}}, "response_format.more"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": [1]}, "guided_json"),
        ({"guided_regex": 5}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": ["a", 1]}, "guided_choice[1]"),
        ({"structured_outputs": {"yaml": "a"}}, "structured_outputs.yaml"),
        ({"guided_regex": "a", "response_format": FORMAT}, "response_format"),
        ({"thinking_token_budget": -1}, "thinking_token_budget"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "third"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {}}}, "tool_choice.function.name"),
        ({"tools": TOOLS, "tool_choice": {"type": "custom"}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "required", "response_format": FORMAT}, "response_format"),
        ({"tools": TOOLS, "guided_regex": "a"}, "guided_regex"),
    ],
)
def test_what_is_wrong_is_named(body: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_chat({**CHAT, **body}, LIMITS)
    assert caught.value.param == param


def test_a_plain_completion_takes_what_is_no_chats() -> None:
    assert parse_completion({"prompt": "a", "guided_regex": "a+"}, LIMITS).held == Held(
        Regex("a+"), "guided_regex"
    )
    with pytest.raises(RequestError, match="response_format"):
        parse_completion({"prompt": "a", "response_format": FORMAT}, LIMITS)


@pytest.fixture(scope="module")
def server(random_checkpoint: Path) -> Iterator[Server]:
    server = Server(random_checkpoint, "--port", "0", "--device", "cpu", "--max-context", "2048")
    yield server
    assert server.stop() == 0, server.log
    assert "Traceback" not in server.log


def ask(server: Server, **body: Any) -> dict[str, Any]:
    answer = httpx.post(f"{server.url}/chat/completions", json={**CHAT, "max_tokens": 400, **body}, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


NO_THOUGHT = {"chat_template_kwargs": {"enable_thinking": False}}


@pytest.mark.parametrize("think", [{"thinking_token_budget": 5}, NO_THOUGHT], ids=["budget", "quiet"])
def test_a_random_model_keeps_to_a_schema(server: Server, think: dict[str, Any]) -> None:
    ended = 0
    for seed in range(5):
        choice = ask(server, response_format=FORMAT, seed=seed, **think)
        if choice["finish_reason"] == "stop":
            jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
            ended += 1
    assert ended == 5


def test_a_random_model_calls_what_it_must(server: Server) -> None:
    for seed in range(4):
        choice = ask(server, tools=TOOLS, tool_choice=SECOND, seed=seed, **NO_THOUGHT)
        assert choice["finish_reason"] == "tool_calls"
        (call,) = choice["message"]["tool_calls"]
        assert call["function"]["name"] == "second"
        assert isinstance(json.loads(call["function"]["arguments"])["n"], int)


def test_with_tools_an_answer_is_a_call_or_the_format(server: Server) -> None:
    for seed in range(4):
        choice = ask(
            server, tools=TOOLS, parallel_tool_calls=False, response_format=FORMAT, seed=seed, **NO_THOUGHT
        )
        message = choice["message"]
        if choice["finish_reason"] == "tool_calls":
            assert message["tool_calls"][0]["function"]["name"] in BOTH
        elif choice["finish_reason"] == "stop":
            jsonschema.validate(json.loads(message["content"]), SCHEMA)


def test_a_stream_is_held_as_well(server: Server) -> None:
    stream = server.client().chat.completions.create(
        model="model",
        messages=CHAT["messages"],
        stream=True,
        seed=1,
        extra_body={"guided_choice": ["yes", "no"], **NO_THOUGHT},
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) in ("yes", "no")


def hostile() -> list[dict[str, Any]]:
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(300):
        deep = {"type": "array", "items": deep}
    return [
        {"guided_json": deep},
        {"guided_json": {"$ref": "#"}},
        {"guided_json": {"type": "string", "pattern": "(a|b|ab)*" * 40 + "{1,900}"}},
        {"guided_regex": "((a{1,300}){1,300}){1,300}"},
        {"guided_grammar": "start: start start | start"},
    ]


def test_hostile_ones_are_refused_in_time_while_others_are_served(server: Server) -> None:
    """R4, S9. A verdict within 6 s, or word when to come back; a known grammar passes; /health is quick."""
    chats, slowest = f"{server.url}/chat/completions", 0.0
    known = {**CHAT, "max_tokens": 9, "guided_choice": ["yes", "no"], **NO_THOUGHT}
    ask(server, **known)
    slow = [{"allOf": [{"type": "integer", "multipleOf": m} for m in (9973 + i, 9967)]} for i in range(11)]
    bodies = [{**CHAT, "max_tokens": 3, **body} for body in [*hostile(), *({"guided_json": one} for one in slow)]]
    with ThreadPoolExecutor(17) as pool, httpx.Client(timeout=60) as http:
        asked = [pool.submit(http.post, chats, json=body) for body in bodies]
        asked.append(pool.submit(http.post, chats, json=known))
        while not all(one.done() for one in asked):
            began = time.monotonic()
            assert http.get(f"{server.root}/health").status_code == 200
            slowest = max(slowest, time.monotonic() - began)
            time.sleep(0.05)
    *answers, good = [one.result() for one in asked]
    for answer in answers:
        # A grammar that is merely odd may be served.
        assert answer.status_code in (200, 400, 503), answer.text
        assert answer.status_code != 503 or int(answer.headers["retry-after"]) >= 1
        assert answer.elapsed.total_seconds() < 6
    assert {400, 503} <= {answer.status_code for answer in answers}
    assert good.status_code == 200
    assert good.elapsed.total_seconds() < 6
    assert slowest < 0.5
