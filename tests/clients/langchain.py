"""langchain-openai: text, streams, tools bound to the model. Argument: the server's URL."""
# pyright: basic, reportMissingImports=false

import json
import sys
from typing import Any

from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from openai import OpenAI as Client
from pydantic import BaseModel

URL = sys.argv[1] + "/v1"
MODEL = Client(base_url=URL, api_key="none").models.list().data[0].id
KINDS = {"name": {"type": "string"}, "age": {"type": "integer"}, "city": {"type": "string"}}
ASK = json.dumps({"type": "object", "properties": KINDS, "required": list(KINDS)})
QUESTION = HumanMessage("What is the weather in Oslo?")


@tool
def get_weather(city: str) -> str:
    """Get the weather of a city."""
    return '{"temperature": 21, "sky": "sunny"}' if city == "Oslo" else "{}"


def check_text(chat: ChatOpenAI) -> None:
    answer = chat.invoke("hello")
    assert answer.text.startswith("Hello! "), answer
    assert answer.usage_metadata["input_tokens"] > 0
    chunks = list(chat.stream("hello"))
    assert len(chunks) > 2
    assert "".join(chunk.text for chunk in chunks) == answer.text
    assert (
        sum(c.usage_metadata["output_tokens"] for c in chunks if c.usage_metadata)
        == (answer.usage_metadata["output_tokens"])
    )


def check_tools(chat: ChatOpenAI, streamed: bool) -> None:
    agent = chat.bind_tools([get_weather])

    def ask(messages: list[Any]) -> Any:
        if not streamed:
            return agent.invoke(messages)
        whole = AIMessageChunk("")
        for chunk in agent.stream(messages):
            whole += chunk
        return whole

    asked = ask([QUESTION])
    (call,) = asked.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Oslo"})
    result = get_weather.invoke(call)
    assert isinstance(result, ToolMessage)
    told = ask([QUESTION, asked, result])
    assert "21" in told.text
    assert "sunny" in told.text


class Person(BaseModel):
    """A person."""

    name: str
    age: int
    city: str


def check_schema(chat: ChatOpenAI) -> None:
    text = (
        f"This is about Anna. Anna is 31 years old. Anna lives in Oslo.\n\nAnswer as JSON for this schema: {ASK}"
    )
    for method in ("json_schema", "json_mode"):
        person = chat.with_structured_output(Person, method=method).invoke(text)
        assert person == Person(name="Anna", age=31, city="Oslo"), (method, person)


def main() -> None:
    chat = ChatOpenAI(base_url=URL, api_key="none", model=MODEL, temperature=0, max_retries=0, stream_usage=True)
    check_text(chat)
    check_tools(chat, streamed=False)
    check_tools(chat, streamed=True)
    check_schema(chat)
    text = OpenAI(base_url=URL, api_key="none", model=MODEL, max_tokens=4, max_retries=0)
    assert text.invoke("hello")
    assert "".join(text.stream("hello"))


main()
