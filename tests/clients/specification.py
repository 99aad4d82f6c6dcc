"""schemathesis on the three routes of OpenAI's: random bodies, right and wrong ones. Argument: the server's URL.

What answers must look like is taken from the models of the openai package, which are generated from OpenAI's
specification. The bodies that must be taken are our own: the fields that the server has, with their limits.
"""
# pyright: basic, reportMissingImports=false

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from openai import OpenAI
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion

URL = sys.argv[1] + "/v1"
MODEL = OpenAI(base_url=URL, api_key="none").models.list().data[0].id
EXAMPLES = 30
REF = "#/components/schemas/{model}"

TEXT = {"type": "string"}
STOP = {"type": "string", "minLength": 1, "maxLength": 1000}


def closed(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    """An object without other properties; those that may be left out may be null."""
    fields = {
        name: schema if name in required else {"anyOf": [schema, {"type": "null"}]}
        for name, schema in properties.items()
    }
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


def number(low: float, high: float) -> dict[str, Any]:
    return {"type": "number", "minimum": low, "maximum": high}


def integer(low: int, high: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": low, "maximum": high}


SHARED = {
    "model": {"const": MODEL},
    "temperature": number(0, 100),
    "top_p": number(0.01, 1),
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "seed": integer(-(2**63), 2**63 - 1),
    "n": integer(1, 16),
    "stop": {"anyOf": [STOP, {"type": "array", "items": STOP, "maxItems": 16}]},
    "user": {},
}
PART = closed({"type": {"const": "text"}, "text": TEXT}, "type", "text")
PART["additionalProperties"] = True  # hints for caches, under several names
ANSWER = {"anyOf": [TEXT, {"type": "array", "items": PART}]}  # of a model or a tool, which may have found nothing
CONTENT = {"anyOf": [TEXT, {"type": "array", "items": PART, "minItems": 1}]}
ARGUMENTS = {"anyOf": [{"enum": ["{}", '{"a": 1}', ""]}, {"type": "object"}]}
CALLED = closed({"name": TEXT, "arguments": ARGUMENTS}, "name")
CALL = closed({"id": TEXT, "function": CALLED}, "function")
CALLED["additionalProperties"] = CALL["additionalProperties"] = True  # what clients keep beside a call
FIRST = closed({"role": {"enum": ["system", "developer", "user"]}, "content": CONTENT}, "role", "content")
MESSAGE = {
    "anyOf": [
        closed({"role": {"const": "user"}, "content": CONTENT}, "role", "content"),
        closed(
            {
                "role": {"const": "assistant"},
                "content": ANSWER,
                "refusal": {"type": "null"},
                "tool_calls": {"type": "array", "items": CALL},
            },
            "role",
        ),
        closed(
            {"role": {"const": "tool"}, "content": ANSWER, "tool_call_id": TEXT},
            *("role", "content", "tool_call_id"),
        ),
    ]
}
FUNCTION = closed(
    {
        "name": {"type": "string", "pattern": r"^[^\s<>\x1c-\x1f\x85]{1,256}$"},
        "description": TEXT,
        "parameters": {"type": "object"},
    },
    "name",
)
FUNCTION["additionalProperties"] = True  # the template shows the model what else there is
TOOL = closed({"type": {"const": "function"}, "function": FUNCTION}, "type", "function")
CHAT = closed(
    {
        **SHARED,
        # The template takes a system message at the beginning only.
        "messages": {
            "type": "array",
            "anyOf": [{"items": FIRST, "minItems": 1, "maxItems": 1}, {"items": MESSAGE, "minItems": 1}],
        },
        "max_completion_tokens": integer(1, 2**31),
        "tools": {"type": "array", "items": TOOL, "maxItems": 1},
        "tool_choice": {"enum": ["none", "auto"]},
        "reasoning_effort": {"enum": ["none", "high"]},
    },
    "messages",
)
COMPLETION = closed(
    {
        **SHARED,
        "prompt": {**TEXT, "minLength": 1},
        "max_tokens": integer(1, 2**31),
        "logprobs": integer(0, 20),
    },
    "prompt",
)
ERROR = closed(
    {
        "error": closed(
            {
                "message": {"type": "string"},
                "type": {"type": "string"},
                **{name: {"type": ["string", "null"]} for name in ("param", "code")},
            },
            *("message", "type", "param", "code"),
        )
    },
    "error",
)


def operation(answer: dict[str, Any], body: dict[str, Any] | None, *errors: str) -> dict[str, Any]:
    def response(schema: dict[str, Any]) -> dict[str, Any]:
        return {"description": "", "content": {"application/json": {"schema": schema}}}

    return {
        "responses": {"200": response(answer), **{status: response(ERROR) for status in errors}},
        **({"requestBody": {"required": True, "content": {"application/json": {"schema": body}}}} if body else {}),
    }


def specification() -> dict[str, Any]:
    models = {
        model.__name__: model.model_json_schema(ref_template=REF) for model in (ChatCompletion, Completion, Model)
    }
    schemas = {
        name: schema for model in models.values() for name, schema in model.pop("$defs", {}).items()
    } | models
    chat, completion, model = ({"$ref": REF.format(model=name)} for name in models)
    # Of a prompt's first token there is no probability: OpenAI's servers say null, whatever their models say.
    logprobs = schemas["Logprobs"]["properties"]
    logprobs["token_logprobs"]["anyOf"][0]["items"] = {"type": ["number", "null"]}
    logprobs["top_logprobs"]["anyOf"][0]["items"] = {"type": ["object", "null"]}
    listed = closed({"object": {"const": "list"}, "data": {"type": "array", "items": model}}, "object", "data")
    return {
        "openapi": "3.1.0",
        "info": {"title": "three routes", "version": "1"},
        "paths": {
            "/chat/completions": {"post": operation(chat, CHAT, "400", "404", "415")},
            "/completions": {"post": operation(completion, COMPLETION, "400", "404", "415")},
            "/models": {"get": operation(listed, None)},
        },
        "components": {"schemas": schemas},
    }


with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "openapi.json"
    path.write_text(json.dumps(specification()))
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", str(path), "--url", URL, "--seed", "1"]
    options = ["--max-examples", str(EXAMPLES), "--phases", "coverage,fuzzing", "--continue-on-failure"]
    sys.exit(subprocess.run([*command, *options], cwd=folder, check=False).returncode)
