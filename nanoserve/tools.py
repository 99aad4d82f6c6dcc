"""The tools of a chat request: which are declared, and which calls of them an answer may make. Pure functions."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from nanoserve.errors import RequestError
from nanoserve.protocol import Fields, refuse
from nanoserve.request import brief, clip

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
        forced: an answer calls a tool.
        named: the only one that may be called; None is any of them.
    """

    declared: Sequence[Mapping[str, Any]] = ()
    parallel: bool = True
    forbidden: bool = False
    forced: bool = False
    named: str | None = None
    schemas: Mapping[str, Mapping[str, Any]] = field(init=False)
    """JSON schemas of the parameters, by the tool's name."""

    def __post_init__(self) -> None:
        functions = [tool["function"] for tool in self.declared]
        schemas = {function["name"]: function.get("parameters", {}) for function in functions}
        object.__setattr__(self, "schemas", schemas)

    @property
    def callable(self) -> Mapping[str, Mapping[str, Any]]:
        """Those of ``schemas`` that may be called."""
        return self.schemas if self.named is None else {self.named: self.schemas[self.named]}


def parse_tools(fields: Fields) -> Tools:
    """Fields ``tools``, ``tool_choice``, ``parallel_tool_calls``, and the two that these replaced.

    A call that ``tool_choice`` names comes once, as OpenAI's does. A tool's ``strict`` reaches the template as the
    rest of the declaration does; what holds arguments to their schema is a forced call.

    Raises:
        RequestError: a tool is malformed, or a call is forced that is not declared.
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
    if choice == "none":
        return Tools(forbidden=bool(tools))
    if choice in (None, "auto"):
        return Tools(tools, parallel)
    if choice == "required" and tools:
        return Tools(tools, parallel, forced=True)
    name = None if choice == "required" else _named(choice)
    if name not in names:
        must_be = f"one of the declared tools ({clip(', '.join(names))})" if names else "left out without tools"
        refuse("tool_choice", choice if name is None else name, must_be)
    return Tools(tools, parallel=False, forced=True, named=name)


def _named(choice: object) -> str:
    """The name in ``{"type": "function", "function": {"name": …}}``."""
    wanted = "none, auto, required, or an object of type function that names one"
    if not isinstance(choice, dict):
        refuse("tool_choice", choice, wanted)
    fields = Fields(cast("dict[str, Any]", choice), "tool_choice")
    if fields.take("type") != "function":
        refuse("tool_choice", choice, wanted)
    function = Fields(fields.mapping("function"), "tool_choice.function")
    name = function.take("name")
    if not isinstance(name, str):
        refuse("tool_choice.function.name", name, "the name of a declared tool")
    function.done()
    fields.done()
    return name


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
