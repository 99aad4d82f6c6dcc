"""OpenAI's own client against the server, sync and async."""

import asyncio
import json
import time
from collections.abc import Iterator
from typing import cast

import openai
import pytest
from fake_engine import PLAIN, Running, script, until
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import (
    ChatCompletion,
    ChatCompletionMessageParam,
    ChatCompletionToolParam,
    ParsedChatCompletion,
)

from nanoserve.tokenizer import Tokenizer

MODEL = "org/fake"
HI: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]


@pytest.fixture
def client(server: Running) -> Iterator[OpenAI]:
    with OpenAI(base_url=server.url + "/v1", api_key="key", max_retries=0) as client:
        yield client


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "nanoserve"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_a_chat(client: OpenAI, server: Running, tokenizer: Tokenizer) -> None:
    script(server, tokenizer, "Hello wörld 😀")
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "developer", "content": "be kind"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        ],
        temperature=0,
        user="someone",
        extra_body={"top_k": 5, "chat_template_kwargs": {"enable_thinking": False}},
    )
    (choice,) = answer.choices
    assert choice.message.content == "Hello wörld 😀"
    assert (choice.message.role, choice.finish_reason) == ("assistant", "stop")
    assert answer.id.startswith("chatcmpl-")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_streamed_chat(client: OpenAI, server: Running, tokenizer: Tokenizer) -> None:
    script(server, tokenizer, "Hello wörld 😀")
    stream = client.chat.completions.create(
        model=MODEL, messages=HI, stream=True, stream_options={"include_usage": True}, extra_body=PLAIN
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "Hello wörld 😀"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(tokenizer.encode(text)) + 1
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_streaming_helper(client: OpenAI, server: Running, tokenizer: Tokenizer) -> None:
    script(server, tokenizer, "one two")
    with client.chat.completions.stream(model=MODEL, messages=HI, extra_body=PLAIN) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "content.delta" in kinds
    assert final.choices[0].message.content == "one two"


WEATHER: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
        "strict": True,
    },
}
CALL = (
    "Let me look.\n</think>\n<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n"
    "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"
)


def test_reasoning_is_apart(client: OpenAI, server: Running, tokenizer: Tokenizer) -> None:
    script(server, tokenizer, "one two</think>three")
    answer = client.chat.completions.create(model=MODEL, messages=HI)
    message = answer.choices[0].message
    assert message.content == "three"
    assert message.model_extra == {"reasoning": "one two", "reasoning_content": "one two"}
    assert answer.usage is not None
    assert answer.usage.completion_tokens_details is not None
    assert answer.usage.completion_tokens_details.reasoning_tokens == len(tokenizer.encode("one two")) + 1
    assert answer.model_extra is not None
    assert answer.model_extra["timings"]["predicted_n"] == answer.usage.completion_tokens
    stream = client.chat.completions.create(model=MODEL, messages=HI, stream=True)
    deltas = [chunk.choices[0].delta for chunk in stream]
    assert "".join((delta.model_extra or {}).get("reasoning_content", "") for delta in deltas) == "one two"
    assert "".join(delta.content or "" for delta in deltas) == "three"
    off = client.chat.completions.create(model=MODEL, messages=HI, reasoning_effort="none")
    assert off.choices[0].message.content == "one twothree"


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("exclude_none", [False, True])
def test_a_round_of_tools(
    client: OpenAI, server: Running, tokenizer: Tokenizer, streamed: bool, exclude_none: bool
) -> None:
    """As an agent goes about it: the answer is put back into the history as it came."""

    def ask() -> ParsedChatCompletion[None] | ChatCompletion:
        if not streamed:
            return client.chat.completions.create(model=MODEL, messages=messages, tools=[WEATHER])
        with client.chat.completions.stream(model=MODEL, messages=messages, tools=[WEATHER]) as stream:
            for _ in stream:
                pass
            return stream.get_final_completion()

    messages = list(HI)
    script(server, tokenizer, CALL)
    (choice,) = ask().choices
    assert choice.finish_reason == "tool_calls"
    assert not choice.message.content
    assert choice.message.tool_calls
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Oslo", "days": 3}
    echo = choice.message.model_dump(exclude_none=exclude_none)
    messages.append(cast("ChatCompletionMessageParam", echo))
    messages.append({"role": "tool", "tool_call_id": call.id, "content": "sunny"})
    script(server, tokenizer, "It shines.</think>Sunny.")
    (choice,) = ask().choices
    assert (choice.message.content, choice.finish_reason) == ("Sunny.", "stop")
    prompt = tokenizer.decode(server.engine.started[-1], skip_special=False)
    assert CALL.removesuffix("\n</tool_call>").partition("</think>\n")[2] in prompt
    assert "<tool_response>\nsunny\n</tool_response>" in prompt
    # A further question, after an answer of nothing at all.
    for text in ("Sunny.", None):
        messages.append(cast("ChatCompletionMessageParam", {"role": "assistant", "content": text}))
        messages += HI
        assert ask().choices[0].message.content == "Sunny."


def test_tools_with_several_choices(client: OpenAI, server: Running, tokenizer: Tokenizer) -> None:
    script(server, tokenizer, CALL)
    answer = client.chat.completions.create(
        model=MODEL, messages=HI, tools=[WEATHER], n=2, parallel_tool_calls=False
    )
    assert [len(choice.message.tool_calls or []) for choice in answer.choices] == [1, 1]
    none = client.chat.completions.create(model=MODEL, messages=HI, tools=[WEATHER], tool_choice="none")
    assert none.choices[0].message.tool_calls is None


def test_logprobs(client: OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HI, max_tokens=5, logprobs=True, top_logprobs=3)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 5
    assert all(len(entry.top_logprobs) == 3 and entry.bytes is not None for entry in logprobs.content)
    streamed = client.chat.completions.create(
        model=MODEL, messages=HI, max_tokens=5, logprobs=True, top_logprobs=3, stream=True
    )
    entries = [
        entry
        for chunk in streamed
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content or []
    ]
    assert len(entries) == 5


def test_stop_n_and_seed(client: OpenAI, server: Running, tokenizer: Tokenizer) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HI, n=3, max_tokens=8, seed=1, extra_body=PLAIN)
    assert len({choice.message.content for choice in answer.choices}) == 3
    again = client.chat.completions.create(model=MODEL, messages=HI, n=3, max_tokens=8, seed=1, extra_body=PLAIN)
    assert [c.message.content for c in again.choices] == [c.message.content for c in answer.choices]
    script(server, tokenizer, "count one two three")
    stopped = client.chat.completions.create(model=MODEL, messages=HI, stop=[" two", "zzz"], extra_body=PLAIN)
    assert stopped.choices[0].message.content == "count one"
    assert stopped.choices[0].finish_reason == "stop"


def test_completions(client: OpenAI, server: Running, tokenizer: Tokenizer) -> None:
    script(server, tokenizer, " world")
    answer = client.completions.create(model=MODEL, prompt=["hello", "bye"], echo=True, logprobs=2)
    assert [choice.text for choice in answer.choices] == ["hello world", "bye world"]
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert "".join(logprobs.tokens[:-1]) == "hello world"  # the last is the end token
    chunks = list(client.completions.create(model=MODEL, prompt=[30, 31], stream=True, max_tokens=3))
    assert "".join(chunk.choices[0].text for chunk in chunks) == " world"


def test_errors_have_the_right_classes(client: OpenAI, server: Running) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL, messages=HI, temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as forced:
        client.chat.completions.create(
            model=MODEL,
            messages=HI,
            tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
            tool_choice={"type": "function", "function": {"name": "g"}},
        )
    assert forced.value.param == "tool_choice"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-5", messages=HI)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        OpenAI(base_url=server.url + "/v1", api_key="wrong", max_retries=0).models.list()


def test_an_engine_failure_ends_a_stream_with_an_error(
    client: OpenAI, server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    server.engine.fail, server.engine.fail_at = RuntimeError("boom"), 3
    stream = client.chat.completions.create(model=MODEL, messages=HI, stream=True)
    with pytest.raises(openai.APIError, match="engine failed"):
        list(stream)
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(model=MODEL, messages=HI)


def test_closing_a_stream_cancels(client: OpenAI, server: Running) -> None:
    server.engine.delay = 0.02
    stream = client.chat.completions.create(model=MODEL, messages=HI, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    until(lambda: server.worker.running == 0, 3)


def test_a_timeout_of_the_client_cancels(client: OpenAI, server: Running) -> None:
    """R2."""
    server.engine.delay = 0.02
    with pytest.raises(openai.APITimeoutError):
        client.chat.completions.create(model=MODEL, messages=HI, timeout=0.3, extra_body={"ignore_eos": True})
    until(lambda: server.worker.running == 0, 3)


def test_async_streams_and_cancellations(server: Running) -> None:
    """R2."""
    server.engine.delay = 0.005

    async def go() -> None:
        async with AsyncOpenAI(base_url=server.url + "/v1", api_key="key", max_retries=0) as client:

            async def one(tokens: int) -> str:
                stream = await client.chat.completions.create(
                    model=MODEL, messages=HI, max_tokens=tokens, stream=True, seed=3, extra_body=PLAIN
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            texts = await asyncio.gather(*(one(6) for _ in range(8)))
            assert len(set(texts)) == 1
            tasks = [asyncio.create_task(one(400)) for _ in range(6)]
            await asyncio.sleep(0.2)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            start = time.monotonic()
            await one(1)
            assert time.monotonic() - start < 5

    asyncio.run(go())
    until(lambda: (server.worker.running, server.worker.waiting) == (0, 0))
