"""OpenAI's own client at /v1/responses."""

import json
from collections.abc import Iterator
from typing import Any, cast

import openai
import pytest
from fake_engine import MODEL, Running, prompt_of, script
from openai import OpenAI
from openai.types.responses import FunctionToolParam, Response, ResponseInputParam

from nanoserve.tokenizer import Tokenizer

CALL = (
    "Let me look.\n</think>\nA moment.\n<tool_call>\n<function=get_weather>\n"
    "<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"
)
OFF: Any = {"reasoning": {"effort": "none"}}
WEATHER: FunctionToolParam = {
    "type": "function",
    "name": "get_weather",
    "description": "Weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
    "strict": False,
}


@pytest.fixture
def client(server: Running) -> Iterator[OpenAI]:
    with OpenAI(base_url=server.url + "/v1", api_key="key", max_retries=0) as client:
        yield client


def test_a_response(client: OpenAI, server: Running, tokenizer: Tokenizer) -> None:
    script(server, tokenizer, "one two</think>Hello wörld 😀")
    answer = client.responses.create(
        model=MODEL,
        instructions="be kind",
        input=[
            {"role": "developer", "content": "and short"},
            {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
        ],
        metadata={"a": "b"},
        store=False,
        max_output_tokens=100,
        temperature=0.5,
        include=["reasoning.encrypted_content"],
    )
    reasoning, message = answer.output
    assert reasoning.type == "reasoning"
    assert reasoning.content
    assert (reasoning.content[0].text, reasoning.summary) == ("one two", [])
    assert message.type == "message"
    assert (message.role, message.status) == ("assistant", "completed")
    assert answer.output_text == "Hello wörld 😀"
    assert (answer.status, answer.error, answer.incomplete_details) == ("completed", None, None)
    assert (answer.model, answer.temperature, answer.max_output_tokens) == (MODEL, 0.5, 100)
    assert (answer.instructions, answer.metadata, answer.tools) == ("be kind", {"a": "b"}, [])
    assert answer.usage is not None
    assert answer.usage.input_tokens == len(server.engine.started[-1])
    assert answer.usage.output_tokens_details.reasoning_tokens == len(tokenizer.encode("one two</think>"))
    assert "<|im_start|>system\nbe kind\n\nand short<|im_end|>\n<|im_start|>user\na" in prompt_of(
        server, tokenizer
    )


def events(client: OpenAI, **body: Any) -> list[Any]:
    return list(cast("Iterator[Any]", client.responses.create(model=MODEL, input="hi", stream=True, **body)))


def test_the_events_come_in_their_order(client: OpenAI, server: Running, tokenizer: Tokenizer) -> None:
    script(server, tokenizer, CALL)
    seen = events(client, tools=[WEATHER])
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    kinds = [
        kind for kind, before in zip(seen, [None, *seen], strict=False) if not before or kind.type != before.type
    ]
    names = [event.type.removeprefix("response.") for event in kinds]
    opened = ["output_item.added", "content_part.added"]
    closed = ["content_part.done", "output_item.done"]
    assert names == [
        *("created", "in_progress"),
        *(*opened, "reasoning_text.delta", "reasoning_text.done", *closed),
        *(*opened, "output_text.delta", "output_text.done", *closed),
        *(
            "output_item.added",
            "function_call_arguments.delta",
            "function_call_arguments.done",
            "output_item.done",
        ),
        "completed",
    ]
    added = [event for event in seen if event.type == "response.output_item.added"]
    done = [event for event in seen if event.type == "response.output_item.done"]
    assert [event.output_index for event in added] == [event.output_index for event in done] == [0, 1, 2]
    assert [event.item.id for event in added] == [event.item.id for event in done]
    assert {event.item.status for event in added} == {"in_progress"}
    final = seen[-1].response
    assert [event.item for event in done] == final.output
    assert {event.response.id for event in (seen[0], seen[1], seen[-1])} == {final.id}
    for name, index in (("reasoning_text", 0), ("output_text", 1), ("function_call_arguments", 2)):
        deltas = [event for event in seen if event.type == f"response.{name}.delta"]
        whole = next(event for event in seen if event.type == f"response.{name}.done")
        assert {(event.item_id, event.output_index) for event in deltas} == {(added[index].item.id, index)}
        text = whole.arguments if name == "function_call_arguments" else whole.text
        assert "".join(event.delta for event in deltas) == text


@pytest.mark.parametrize("streamed", [False, True])
def test_a_round_of_tools(client: OpenAI, server: Running, tokenizer: Tokenizer, streamed: bool) -> None:
    """As an agent goes about it: the output is put back into the input as it came."""

    def ask() -> Response:
        if not streamed:
            return client.responses.create(model=MODEL, input=history, tools=[WEATHER])
        with client.responses.stream(model=MODEL, input=history, tools=[WEATHER]) as stream:
            return stream.get_final_response()

    history: ResponseInputParam = [{"role": "user", "content": "hi"}]
    script(server, tokenizer, CALL)
    answer = ask()
    reasoning, message, call = answer.output
    assert (reasoning.type, message.type, call.type) == ("reasoning", "message", "function_call")
    assert call.type == "function_call"
    assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Oslo", "days": 3})
    assert call.call_id.startswith("call_")
    history += cast("ResponseInputParam", [item.model_dump(exclude_none=True) for item in answer.output])
    history.append({"type": "function_call_output", "call_id": call.call_id, "output": "sunny"})
    script(server, tokenizer, "It shines.</think>Sunny.")
    assert ask().output_text == "Sunny."
    prompt = prompt_of(server, tokenizer)
    turn = prompt.index("<think>\nLet me look.\n</think>\nA moment.\n<tool_call>\n<function=get_weather>")
    assert turn < prompt.index("<tool_response>\nsunny\n</tool_response>")
    assert prompt.count("<|im_start|>assistant") == 2


def test_assistant_turns_stay_apart(client: OpenAI, server: Running, tokenizer: Tokenizer) -> None:
    script(server, tokenizer, "x")
    call = {"type": "function_call", "arguments": "", "name": "get_weather"}
    history: Any = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "one"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "two", "annotations": []}]},
        {"role": "user", "content": "more"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {**call, "call_id": "a"},
        {**call, "call_id": "b"},
        {"type": "function_call_output", "call_id": "b", "output": [{"type": "input_text", "text": "second"}]},
        {"type": "function_call_output", "call_id": "a", "output": "first"},
        {"type": "reasoning", "id": "rs_2", "summary": [], "encrypted_content": "xyz"},
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": "last"},
    ]
    client.responses.create(model=MODEL, input=history, tools=[WEATHER], **OFF)
    prompt = prompt_of(server, tokenizer)
    assert prompt.count("<|im_start|>assistant") == 5
    assert "one<|im_end|>\n<|im_start|>assistant\n<think></think>two<|im_end|>" in prompt
    assert prompt.count("<tool_call>\n<function=get_weather>\n</function>") == 2
    assert "<tool_response>\nfirst\n</tool_response>\n<tool_response>\nsecond\n</tool_response>" in prompt


def test_reasoning_comes_back_sealed(client: OpenAI, server: Running, tokenizer: Tokenizer) -> None:
    """As clients do it that keep only what they take for encrypted."""
    script(server, tokenizer, CALL.replace("look", "lök"))
    reasoning, _, call = client.responses.create(model=MODEL, input="hi", tools=[WEATHER]).output
    assert reasoning.type == "reasoning"
    assert call.type == "function_call"
    thoughts: Any = {
        "type": "reasoning",
        "id": "rs_1",
        "summary": [],
        "encrypted_content": reasoning.encrypted_content,
    }
    history: Any = [{"role": "user", "content": "hi"}, thoughts, call.model_dump(exclude_none=True)]
    history.append({"type": "function_call_output", "call_id": call.call_id, "output": "sunny"})
    client.responses.create(model=MODEL, input=history, tools=[WEATHER])
    assert "<think>\nLet me lök.\n</think>" in prompt_of(server, tokenizer)
    for broken in ("nanoserve:Zg", "nanoserve:/w==", "nanoserve:é"):
        with pytest.raises(openai.BadRequestError) as refused:
            client.responses.create(model=MODEL, input=cast("Any", [{**thoughts, "encrypted_content": broken}]))
        assert refused.value.param == "input[0].encrypted_content"


def test_what_ends_an_answer(client: OpenAI, server: Running, tokenizer: Tokenizer) -> None:
    script(server, tokenizer, "count one two three")
    cut = client.responses.create(model=MODEL, input="hi", max_output_tokens=2, **OFF)
    assert cut.status == "incomplete"
    assert cut.incomplete_details is not None
    assert cut.incomplete_details.reason == "max_output_tokens"
    (message,) = cut.output
    assert message.type == "message"
    assert message.status == "incomplete"
    assert events(client, max_output_tokens=2, **OFF)[-1].type == "response.incomplete"
    script(server, tokenizer, "")
    silent = client.responses.create(model=MODEL, input="hi", **OFF)
    assert (silent.output, silent.output_text, silent.status) == ([], "", "completed")


@pytest.mark.parametrize("thoughts", ["", "r\n</think>\n\n"])
def test_a_format_is_given_as_it_is(client: OpenAI, server: Running, tokenizer: Tokenizer, thoughts: str) -> None:
    held: Any = {"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}}}
    if not thoughts:
        held |= OFF
    said = '{"a": " <think></think> <tool_call> "}'
    server.engine.script = [*tokenizer.encode(thoughts), *tokenizer.encode_text(said)]
    answer = client.responses.create(model=MODEL, input="hi", **held)
    assert (answer.output_text, len(answer.output)) == (said, 1 + bool(thoughts))
    deltas = [event.delta for event in events(client, **held) if event.type == "response.output_text.delta"]
    assert "".join(deltas) == said


def test_what_would_need_a_memory_is_refused(client: OpenAI) -> None:
    bodies: dict[str, Any] = {
        "previous_response_id": "resp_1",
        "conversation": "conv_1",
        "store": True,
        "background": True,
    }
    for name, value in bodies.items():
        with pytest.raises(openai.BadRequestError, match="keeps nothing between requests") as refused:
            client.responses.create(model=MODEL, input="hi", **{name: value})
        assert (refused.value.param, refused.value.code) == (name, "unsupported_parameter")


def test_errors_have_the_right_classes(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.responses.create(model=MODEL, input="hi", max_output_tokens=-1)
    assert bad.value.param == "max_output_tokens"
    assert bad.value.message.count("max_output_tokens") > 0
    with pytest.raises(openai.BadRequestError) as long:
        client.responses.create(model=MODEL, input="word " * 4000)
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "input")
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="gpt-5", input="hi")


def test_an_engine_failure_ends_a_stream_as_failed(
    client: OpenAI, server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    server.engine.fail, server.engine.fail_at = RuntimeError("boom"), 3
    last = events(client)[-1]
    assert (last.type, last.response.status, last.response.error.code) == (
        "response.failed",
        "failed",
        "server_error",
    )
    with pytest.raises(openai.InternalServerError):
        client.responses.create(model=MODEL, input="hi")
