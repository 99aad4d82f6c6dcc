"""instructor in its modes: a forced call, response_format, and JSON asked for in the prompt. Argument: the URL."""
# pyright: basic, reportMissingImports=false

import json
import sys

import instructor
from openai import OpenAI
from pydantic import BaseModel

KINDS = {"name": {"type": "string"}, "age": {"type": "integer"}, "city": {"type": "string"}}
SCHEMA = {"type": "object", "properties": KINDS, "required": list(KINDS)}
ASK = f"Answer as JSON for this schema: {json.dumps(SCHEMA)}"


class Person(BaseModel):
    name: str
    age: int
    city: str


def main() -> None:
    client = OpenAI(base_url=sys.argv[1] + "/v1", api_key="none", max_retries=0)
    model = client.models.list().data[0].id
    text = f"This is about Anna. Anna is 31 years old. Anna lives in Oslo.\n\n{ASK}"
    asked = {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_retries": 1}
    for mode in (instructor.Mode.MD_JSON, instructor.Mode.JSON, instructor.Mode.JSON_SCHEMA):
        person = instructor.from_openai(client, mode=mode).chat.completions.create(response_model=Person, **asked)
        assert person.model_dump() == {"name": "Anna", "age": 31, "city": "Oslo"}, (mode, person)
    # Which name it finds is the model's affair: the demonstration model was not trained on calls for such texts.
    asked["messages"] = [{"role": "user", "content": "Keep the person Anna with age 31 and city Oslo."}]
    caller = instructor.from_openai(client, mode=instructor.Mode.TOOLS)
    person = caller.chat.completions.create(response_model=Person, **asked)
    assert (person.age, person.city) == (31, "Oslo"), person


main()
