"""Anthropic's own client against the server."""

import asyncio
from collections.abc import Iterator
from typing import Any, cast

import anthropic
import pytest
from anthropic import Anthropic, AsyncAnthropic
from anthropic.types import Message, MessageParam, ToolParam
from fake_engine import MODEL, Running, prompt_of, script, until

from nanoserve.tokenizer import Tokenizer

HI: list[MessageParam] = [{"role": "user", "content": "hi"}]
WEATHER: ToolParam = {
    "name": "get_weather",
    "description": "Weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
}
CALL = (
    "Let me look.\n</think>\nA moment.\n<tool_call>\n<function=get_weather>\n"
    "<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"
)


@pytest.fixture
def client(server: Running) -> Iterator[Anthropic]:
    with Anthropic(base_url=server.url, api_key="key", max_retries=0) as client:
        yield client


def test_a_message(client: Anthropic, server: Running, tokenizer: Tokenizer) -> None:
    script(server, tokenizer, "one two</think>Hello wörld 😀")
    answer = client.messages.create(
        model=MODEL,
        max_tokens=100,
        system=[
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2; cch=1f2e3;"},
            {"type": "text", "text": "be kind", "cache_control": {"type": "ephemeral"}},
        ],
        messages=[{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
        metadata={"user_id": "someone"},
        service_tier="auto",
    )
    thought, text = answer.content
    assert thought.type == "thinking"
    assert (thought.thinking, bool(thought.signature)) == ("one two", True)
    assert text.type == "text"
    assert text.text == "Hello wörld 😀"
    assert (answer.role, answer.type, answer.model) == ("assistant", "message", MODEL)
    assert (answer.stop_reason, answer.stop_sequence) == ("end_turn", None)
    assert answer.id.startswith("msg_")
    assert answer._request_id  # pyright: ignore[reportPrivateUsage]
    assert answer.usage.input_tokens == len(server.engine.started[-1])
    assert answer.usage.output_tokens == len(tokenizer.encode("one two</think>Hello wörld 😀")) + 1
    assert answer.usage.output_tokens_details is not None
    assert answer.usage.output_tokens_details.thinking_tokens == len(tokenizer.encode("one two</think>"))
    prompt = prompt_of(server, tokenizer)
    assert "<|im_start|>system\nbe kind<|im_end|>" in prompt
    assert "<|im_start|>user\na\nb<|im_end|>" in prompt


def events(client: Anthropic, **body: Any) -> list[Any]:
    stream = client.messages.create(model=MODEL, max_tokens=200, messages=HI, stream=True, **body)
    return list(cast("Iterator[Any]", stream))


def test_the_events_come_in_their_order(client: Anthropic, server: Running, tokenizer: Tokenizer) -> None:
    script(server, tokenizer, CALL)
    seen = events(client, tools=[WEATHER])
    start, *inner, delta, stop = seen
    assert (start.type, delta.type, stop.type) == ("message_start", "message_delta", "message_stop")
    assert (start.message.content, start.message.stop_reason) == ([], None)
    assert start.message.usage.input_tokens == len(server.engine.started[-1])
    assert (delta.delta.stop_reason, delta.usage.output_tokens) == ("tool_use", len(tokenizer.encode(CALL)) + 1)
    blocks: list[list[Any]] = []
    for event in inner:
        if event.type == "content_block_start":
            blocks.append([])
        assert event.index == len(blocks) - 1
        blocks[-1].append(event)
    assert [block[0].content_block.type for block in blocks] == ["thinking", "text", "tool_use"]
    for block in blocks:
        assert [event.type for event in block[1:]] == ["content_block_delta"] * (len(block) - 2) + [
            "content_block_stop"
        ]
    kinds = [[event.delta.type for event in block[1:-1]] for block in blocks]
    assert kinds[0] == ["thinking_delta"] * (len(kinds[0]) - 1) + ["signature_delta"]
    assert set(kinds[1]) == {"text_delta"}
    assert set(kinds[2]) == {"input_json_delta"}
    assert blocks[2][0].content_block.input == {}
    assert blocks[2][0].content_block.id.startswith("toolu_")


@pytest.mark.parametrize("streamed", [False, True])
def test_a_round_of_tools(client: Anthropic, server: Running, tokenizer: Tokenizer, streamed: bool) -> None:
    """As an agent goes about it: the answer is put back into the history as it came."""

    def ask() -> Message:
        if not streamed:
            return client.messages.create(model=MODEL, max_tokens=200, messages=messages, tools=[WEATHER])
        with client.messages.stream(model=MODEL, max_tokens=200, messages=messages, tools=[WEATHER]) as stream:
            return stream.get_final_message()

    messages = list(HI)
    script(server, tokenizer, CALL)
    answer = ask()
    assert answer.stop_reason == "tool_use"
    thought, text, call = answer.content
    assert thought.type == "thinking"
    assert thought.thinking == "Let me look."
    assert text.type == "text"
    assert text.text == "A moment."
    assert call.type == "tool_use"
    assert (call.name, call.input) == ("get_weather", {"city": "Oslo", "days": 3})
    messages.append({"role": "assistant", "content": answer.content})
    messages.append(
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "and now?"},
                {
                    "type": "tool_result",
                    "tool_use_id": call.id,
                    "content": [{"type": "text", "text": "no signal"}],
                    "is_error": True,
                },
            ],
        }
    )
    script(server, tokenizer, "Pity.</think>Unknown.")
    assert [block.type for block in ask().content] == ["thinking", "text"]
    prompt = prompt_of(server, tokenizer)
    assert "A moment.\n<tool_call>\n<function=get_weather>" in prompt
    assert "<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n3\n</parameter>" in prompt
    result, question = prompt.index("<tool_response>\nError: no signal\n"), prompt.index("and now?")
    assert result < question
    assert "Weather of a city." in prompt


def test_thoughts_go_back_into_a_turn_of_tools(client: Anthropic, server: Running, tokenizer: Tokenizer) -> None:
    script(server, tokenizer, "x</think>y")
    messages: list[MessageParam] = [
        *HI,
        {
            "role": "assistant",
            "content": [
                {"type": "redacted_thinking", "data": "opaque"},
                {"type": "thinking", "thinking": "I must look", "signature": "someone's"},
                {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Oslo"}},
            ],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1"}]},
    ]
    client.messages.create(model=MODEL, max_tokens=50, messages=messages, tools=[WEATHER])
    prompt = prompt_of(server, tokenizer)
    assert "<think>\nI must look\n</think>" in prompt
    assert "opaque" not in prompt
    assert "<tool_response>\n\n</tool_response>" in prompt


def test_thinking_on_and_off(client: Anthropic, server: Running, tokenizer: Tokenizer) -> None:
    script(server, tokenizer, "three</think>four")
    off = client.messages.create(
        model=MODEL,
        max_tokens=50,
        messages=HI,
        thinking={"type": "disabled"},
        output_config={"effort": "low"},
    )
    assert [block.type for block in off.content] == ["text"]
    assert prompt_of(server, tokenizer).endswith("<think></think>")
    for thinking in ({"type": "adaptive"}, {"type": "enabled"}, {"type": "adaptive", "display": "summarized"}):
        on = client.messages.create(
            model=MODEL,
            max_tokens=50,
            messages=HI,
            thinking=cast("Any", thinking),
            output_config={"effort": "high"},
        )
        assert [block.type for block in on.content] == ["thinking", "text"]
    held = client.messages.create(
        model=MODEL, max_tokens=3000, messages=HI, thinking={"type": "enabled", "budget_tokens": 1024}
    )
    assert [block.type for block in held.content] == ["thinking", "text"]


def test_what_ends_an_answer(client: Anthropic, server: Running, tokenizer: Tokenizer) -> None:
    off: Any = {"thinking": {"type": "disabled"}}
    script(server, tokenizer, "count one two three")
    stopped = client.messages.create(
        model=MODEL, max_tokens=50, messages=HI, stop_sequences=["zzz", " two"], **off
    )
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", " two")
    assert [block.text for block in stopped.content if block.type == "text"] == ["count one"]
    streamed = events(client, stop_sequences=[" three"], **off)
    assert (streamed[-2].delta.stop_reason, streamed[-2].delta.stop_sequence) == ("stop_sequence", " three")
    cut = client.messages.create(model=MODEL, max_tokens=2, messages=HI, **off)
    assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 2)
    server.engine.script = tokenizer.encode("a") * 4000
    full = client.messages.create(model=MODEL, max_tokens=4000, messages=HI, **off)
    assert full.stop_reason == "model_context_window_exceeded"
    script(server, tokenizer, "")
    silent = client.messages.create(model=MODEL, max_tokens=5, messages=HI, **off)
    assert (silent.content, silent.stop_reason) == ([], "end_turn")


@pytest.mark.parametrize("thoughts", ["", "r\n</think>\n\n"])
def test_a_format_is_given_as_it_is(
    client: Anthropic, server: Running, tokenizer: Tokenizer, thoughts: str
) -> None:
    held: Any = {"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}}
    if not thoughts:
        held["thinking"] = {"type": "disabled"}
    said = '{"a": " <think></think> <tool_call> "}'
    server.engine.script = [*tokenizer.encode(thoughts), *tokenizer.encode_text(said)]
    answer = client.messages.create(model=MODEL, max_tokens=200, messages=HI, **held)
    assert [block.text for block in answer.content if block.type == "text"] == [said]
    assert len(answer.content) == 1 + bool(thoughts)
    streamed = [event.delta for event in events(client, **held) if event.type == "content_block_delta"]
    assert "".join(delta.text for delta in streamed if delta.type == "text_delta") == said


def test_counting_tokens(client: Anthropic, server: Running, tokenizer: Tokenizer) -> None:
    script(server, tokenizer, "x</think>y")
    asked: Any = {"model": MODEL, "system": "be kind", "messages": HI, "tools": [WEATHER]}
    count = client.messages.count_tokens(**asked).input_tokens
    assert client.messages.create(**asked, max_tokens=5).usage.input_tokens == count
    assert client.messages.count_tokens(model=MODEL, messages=HI).input_tokens < count
    held: list[MessageParam] = [*HI, {"role": "assistant", "content": "hello"}]
    assert client.messages.count_tokens(model=MODEL, messages=held).input_tokens > 0
    assert len(server.engine.started) == 1


def test_names_that_clients_have_built_in(client: Anthropic, server: Running, tokenizer: Tokenizer) -> None:
    script(server, tokenizer, "x</think>y")
    assert client.messages.create(model="claude-haiku-4-5", max_tokens=5, messages=HI).model == MODEL
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="gpt-5", max_tokens=5, messages=HI)


def test_what_claude_code_sends(client: Anthropic, server: Running, tokenizer: Tokenizer) -> None:
    """Its beta query, its line for accounts, edits that clear nothing, and a late word of the system's."""

    def ask(checksum: str) -> str:
        answer = client.beta.messages.create(
            model="claude-sonnet-5",
            max_tokens=50,
            betas=["interleaved-thinking-2025-05-14"],
            system=f"X-Anthropic-Billing-Header: cc_version=2.1; cch={checksum};\nYou are an agent.",
            messages=cast("Any", [*HI, {"role": "system", "content": "Agents: none."}]),
            thinking={"type": "adaptive"},
            context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        )
        assert answer.stop_reason == "end_turn"
        return prompt_of(server, tokenizer)

    script(server, tokenizer, "x</think>y")
    assert ask("1a2b3") == ask("4c5d6")
    assert "<|im_start|>system\nYou are an agent.<|im_end|>" in ask("7")
    late = "<|im_start|>user\n<system-reminder>\nAgents: none.\n</system-reminder><|im_end|>"
    assert f"<|im_start|>user\nhi<|im_end|>\n{late}" in ask("7")


def test_errors_have_the_right_classes(client: Anthropic, server: Running) -> None:
    with pytest.raises(anthropic.BadRequestError) as bad:
        client.messages.create(model=MODEL, max_tokens=5, messages=HI, extra_body={"temperature": -1})
    assert bad.value.request_id
    assert bad.value.type == "invalid_request_error"
    body = cast("dict[str, Any]", bad.value.body)
    assert body["type"] == "error"
    assert body["error"]["message"].startswith("temperature is -1")
    assert body["request_id"] == bad.value.request_id
    for key in ({"api_key": "wrong"}, {"auth_token": "wrong", "api_key": None}):
        with Anthropic(base_url=server.url, max_retries=0, **cast("Any", key)) as stranger:
            with pytest.raises(anthropic.AuthenticationError) as unknown:
                stranger.messages.create(model=MODEL, max_tokens=5, messages=HI)
            assert unknown.value.type == "authentication_error"
    with Anthropic(base_url=server.url, max_retries=0, auth_token="key") as bearer:
        assert bearer.messages.count_tokens(model=MODEL, messages=HI).input_tokens
    with pytest.raises(anthropic.BadRequestError, match="tool_choice"):
        client.messages.create(
            model=MODEL, max_tokens=5, messages=HI, tools=[WEATHER], tool_choice={"type": "tool", "name": "f"}
        )


def test_an_engine_failure_is_an_error_event(
    client: Anthropic, server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    server.engine.fail, server.engine.fail_at = RuntimeError("boom"), 3
    with pytest.raises(anthropic.APIError, match="engine failed") as failed:
        events(client)
    assert cast("dict[str, Any]", failed.value.body)["error"]["type"] == "api_error"
    with pytest.raises(anthropic.InternalServerError):
        client.messages.create(model=MODEL, max_tokens=5, messages=HI)


def test_closing_a_stream_cancels(client: Anthropic, server: Running) -> None:
    server.engine.delay = 0.02
    body: Any = {"extra_body": {"ignore_eos": True}}
    stream = client.messages.create(model=MODEL, max_tokens=900, messages=HI, stream=True, **body)
    next(iter(stream))
    stream.close()
    until(lambda: server.worker.running == 0, 3)


def test_the_async_client(server: Running, tokenizer: Tokenizer) -> None:
    script(server, tokenizer, "one</think>two")

    async def go() -> None:
        async with AsyncAnthropic(base_url=server.url, api_key="key", max_retries=0) as client:
            async with client.messages.stream(model=MODEL, max_tokens=50, messages=HI) as stream:
                texts = [text async for text in stream.text_stream]
            assert "".join(texts) == "two"

    asyncio.run(go())
