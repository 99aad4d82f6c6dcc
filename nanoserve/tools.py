"""The tools of a chat request: which are declared, and which calls of them an answer may make. Pure functions."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from nanoserve.errors import RequestError
from nanoserve.protocol import Fields, refuse
from nanoserve.request import brief

MAX_TOOLS = 128
_NAME = re.compile(r"[^\s<>]{1,256}")
"""What the parser of answers can find again."""


@dataclass(frozen=True, slots=True)
class Tools:
    """What a request says of tools.

    Attributes:
        declared: OpenAI tools for the prompt. ``tool_choice`` "none" leaves them out of it: a model that is
            shown none is the surest not to call one.
        parallel: several calls an answer; without it, generation ends behind the first.
        forbidden: there are tools, and none may be called.
    """

    declared: Sequence[Mapping[str, Any]] = ()
    parallel: bool = True
    forbidden: bool = False
    schemas: Mapping[str, Mapping[str, Any]] = field(init=False)
    """JSON schemas of the parameters, by the tool's name."""

    def __post_init__(self) -> None:
        functions = [tool["function"] for tool in self.declared]
        schemas = {function["name"]: function.get("parameters", {}) for function in functions}
        object.__setattr__(self, "schemas", schemas)


def parse_tools(fields: Fields) -> Tools:
    """Fields ``tools``, ``tool_choice``, ``parallel_tool_calls``, and the two that these replaced.

    A tool's ``strict`` reaches the template as the rest of the declaration does, and enforces nothing yet.

    Raises:
        RequestError: a tool is malformed, or a call would have to be enforced, which this server cannot yet.
    """
    _refuse_old(fields)
    given = fields.array("tools", MAX_TOOLS)
    tools = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(given)]
    names = [tool["function"]["name"] for tool in tools]
    for i, name in enumerate(names):
        if name in names[:i]:
            path = f"tools[{i}].function.name"
            raise RequestError(f"{path} is {brief(name)}, as another tool's: give each its own", param=path)
    choice, parallel = fields.take("tool_choice"), fields.boolean("parallel_tool_calls", default=True)
    if choice not in (None, "none", "auto"):
        # Here a forced call becomes a constraint on the answer, as soon as the engine takes one.
        message = f"tool_choice is {brief(choice)} and must be none or auto: this server cannot enforce a call"
        raise RequestError(message, param="tool_choice", code="unsupported_parameter")
    if choice == "none":
        return Tools(forbidden=bool(tools))
    return Tools(tools, parallel)


def _refuse_old(fields: Fields) -> None:
    for name, neutral, successor in (
        ("functions", [[]], "tools"),
        ("function_call", ["none", "auto"], "tools and tool_choice"),
    ):
        value = fields.take(name)
        if value is not None and value not in neutral:
            message = f"{name} is not supported: send {successor}, which replaced it"
            raise RequestError(message, param=name, code="unsupported_parameter")


def _tool(tool: object, where: str) -> dict[str, Any]:
    if not isinstance(tool, dict):
        refuse(where, tool, "an object")
    fields = Fields(cast("dict[str, Any]", tool), where)
    if (kind := fields.take("type")) != "function":
        refuse(f"{where}.type", kind, "'function': this server runs no tools of its own")
    function = fields.take("function")
    if not isinstance(function, dict):
        refuse(f"{where}.function", function, "an object")
    fields.done()
    table = {key: value for key, value in cast("dict[str, Any]", function).items() if value is not None}
    return {"type": "function", "function": _checked(table, f"{where}.function")}


def _checked(function: dict[str, Any], where: str) -> dict[str, Any]:
    """The function; keys beside these are the template's affair, which shows them to the model."""
    fields = Fields(function, where)
    name = fields.take("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        refuse(f"{where}.name", name, "1 to 256 characters without white space, < and >")
    fields.string("description")
    fields.mapping("parameters")
    fields.boolean("strict")
    return function
