"""pydantic-ai: text, reasoning, an agent with a tool, streamed and not. Argument: the server's URL."""
# pyright: basic, reportMissingImports=false

import asyncio
import json
import sys

from openai import AsyncOpenAI
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.messages import ThinkingPart
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

QUESTION = "What is the weather in Oslo?"
ABOUT = "This is about Anna. Anna is 31 years old. Anna lives in Oslo.\n\nAnswer as JSON for this schema: "
KINDS = {"name": {"type": "string"}, "age": {"type": "integer"}, "city": {"type": "string"}}
ABOUT += json.dumps({"type": "object", "properties": KINDS, "required": list(KINDS)})
cities: list[str] = []


class Person(BaseModel):
    name: str
    age: int
    city: str


def get_weather(city: str) -> dict[str, object]:
    """Get the weather of a city."""
    cities.append(city)
    return {"temperature": 21, "sky": "sunny"}


async def main() -> None:
    client = AsyncOpenAI(base_url=sys.argv[1] + "/v1", api_key="none", max_retries=0)
    name = (await client.models.list()).data[0].id
    model = OpenAIChatModel(name, provider=OpenAIProvider(openai_client=client))
    talker = Agent(model, model_settings={"temperature": 0})
    answer = await talker.run("hello")
    assert answer.output.startswith("Hello! ")
    thoughts = [part.content for part in answer.response.parts if isinstance(part, ThinkingPart)]
    assert thoughts == ["A greeting."], answer.response
    async with talker.run_stream("hello") as stream:
        pieces = [piece async for piece in stream.stream_text(delta=True, debounce_by=None)]
    assert len(pieces) > 2
    assert "".join(pieces) == answer.output
    agent = Agent(model, tools=[get_weather], model_settings={"temperature": 0})
    done = await agent.run(QUESTION)
    assert "21" in done.output
    assert "sunny" in done.output
    # A further turn, with all that came before: calls, results and reasoning.
    assert (await agent.run(QUESTION, message_history=done.all_messages())).output
    reader = Agent(model, output_type=NativeOutput(Person), model_settings={"temperature": 0})
    read = await reader.run(ABOUT)
    assert read.output == Person(name="Anna", age=31, city="Oslo"), read
    async with agent.run_stream(QUESTION) as stream:
        assert await stream.get_output() == done.output
    assert len(cities) >= 2
    assert set(cities) == {"Oslo"}


asyncio.run(main())
