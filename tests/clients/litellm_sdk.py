"""litellm, with the prefixes that its users give an OpenAI-style server. Argument: the server's URL."""
# pyright: basic, reportMissingImports=false

import json
import sys
from typing import Any

import litellm
import pytest
from openai import OpenAI

URL = sys.argv[1] + "/v1"
NAME = OpenAI(base_url=URL, api_key="none").models.list().data[0].id
QUESTION = {"role": "user", "content": "What is the weather in Oslo?"}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
HELLO = [{"role": "user", "content": "hello"}]


def check(prefix: str) -> None:
    server = {"model": f"{prefix}/{NAME}", "api_base": URL, "api_key": "none", "temperature": 0, "num_retries": 0}
    answer = litellm.completion(messages=HELLO, **server)
    message = answer.choices[0].message
    assert message.content.startswith("Hello! "), message
    assert message.reasoning_content == "A greeting.", message
    chunks = list(
        litellm.completion(messages=HELLO, stream=True, stream_options={"include_usage": True}, **server)
    )
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == message.content
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "A greeting."
    assert litellm.stream_chunk_builder(chunks).usage.completion_tokens == answer.usage.completion_tokens
    for stream in (False, True):
        check_tools(server, stream)
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion(messages=HELLO, **{**server, "temperature": -1})


def check_tools(server: dict[str, Any], stream: bool) -> None:
    def ask(messages: list[Any]) -> Any:
        answer = litellm.completion(messages=messages, tools=[TOOL], stream=stream, **server)
        return (litellm.stream_chunk_builder(list(answer)) if stream else answer).choices[0]

    asked = ask([QUESTION])
    assert asked.finish_reason == "tool_calls"
    (call,) = asked.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Oslo"})
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"temperature": 21, "sky": "sunny"}'}
    told = ask([QUESTION, asked.message, result])
    assert "21" in told.message.content
    assert "sunny" in told.message.content


check("openai")
check("hosted_vllm")
text = litellm.text_completion(
    model=f"text-completion-openai/{NAME}", prompt="hello", max_tokens=3, api_base=URL, api_key="none"
)
assert text.choices[0].text
