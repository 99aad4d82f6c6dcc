"""openai-agents over chat completions: an agent with a tool, streamed and not. Argument: the server's URL."""
# pyright: basic, reportMissingImports=false

import asyncio
import json
import sys

from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, Runner, function_tool, set_tracing_disabled
from openai import AsyncOpenAI
from openai.types.responses import ResponseTextDeltaEvent
from pydantic import BaseModel

QUESTION = "What is the weather in Oslo?"
ABOUT = "This is about Anna. Anna is 31 years old. Anna lives in Oslo.\n\nAnswer as JSON for this schema: "
KINDS = {"name": {"type": "string"}, "age": {"type": "integer"}, "city": {"type": "string"}}
ABOUT += json.dumps({"type": "object", "properties": KINDS, "required": list(KINDS)})
cities: list[str] = []


class Person(BaseModel):
    name: str
    age: int
    city: str


@function_tool
def get_weather(city: str) -> str:
    """Get the weather of a city."""
    cities.append(city)
    return '{"temperature": 21, "sky": "sunny"}'


async def main() -> None:
    set_tracing_disabled(True)
    client = AsyncOpenAI(base_url=sys.argv[1] + "/v1", api_key="none", max_retries=0)
    name = (await client.models.list()).data[0].id
    model = OpenAIChatCompletionsModel(model=name, openai_client=client)
    settings = ModelSettings(temperature=0)
    talker = Agent(name="Talker", model=model, model_settings=settings)
    assert (await Runner.run(talker, "hello")).final_output.startswith("Hello! ")
    agent = Agent(name="Agent", tools=[get_weather], model=model, model_settings=settings)
    done = await Runner.run(agent, QUESTION)
    assert "21" in done.final_output
    assert "sunny" in done.final_output
    # A further turn, with all that came before: calls, results and reasoning.
    again = await Runner.run(agent, [*done.to_input_list(), {"role": "user", "content": QUESTION}])
    assert again.final_output
    reader = Agent(name="Reader", output_type=Person, model=model, model_settings=settings)
    read = await Runner.run(reader, ABOUT)
    assert read.final_output == Person(name="Anna", age=31, city="Oslo"), read
    stream = Runner.run_streamed(agent, QUESTION)
    pieces = [
        event.data.delta
        async for event in stream.stream_events()
        if event.type == "raw_response_event" and isinstance(event.data, ResponseTextDeltaEvent)
    ]
    assert stream.final_output == done.final_output
    assert "".join(pieces).endswith(stream.final_output)
    assert len(cities) >= 2
    assert set(cities) == {"Oslo"}


asyncio.run(main())
