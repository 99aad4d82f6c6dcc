"""POST /v1/responses: OpenAI's newer body as a chat's. Pure functions; `responses_answer.py` writes the answer.

Nothing is kept between requests: what refers to an earlier one is refused.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, cast

from nanoserve.chat import MAX_MESSAGES
from nanoserve.doors import (
    RESPONSES_HINTS,
    RESPONSES_ITEM_HINTS,
    Names,
    extensions,
    function_tool,
    given,
    object_at,
    one_system,
    text_of,
)
from nanoserve.errors import RequestError
from nanoserve.messages import call_arguments
from nanoserve.protocol import Fields, checked_text, refuse
from nanoserve.tools import MAX_TOOLS

NAMES: Names = (
    (r"tools\[(\d+)\]\.function", r"tools[\1]"),
    (r"max_tokens", "max_output_tokens"),
    (r"messages", "input"),
    (r"reasoning_effort", "reasoning.effort"),
    (r"response_format\.json_schema", "text.format"),
    (r"response_format", "text.format"),
    (r"verbosity", "text.verbosity"),
)

_NEUTRAL = {
    "truncation": ("disabled",),
    "include": ([], ["reasoning.encrypted_content"]),  # it is there in any case
    "top_logprobs": (0,),
    "prompt": (),
    "moderation": (),
    "context_management": ([],),
}
_TOOL_NEUTRAL = {
    "allowed_callers": (["direct"],),
    "defer_loading": (False,),
    "async": (False,),
    "output_schema": (),
}
_SEAL = "nanoserve:"
_STATE = {
    "previous_response_id": "send the whole conversation as input",
    "conversation": "send the whole conversation as input",
    "store": "send false, or leave it out",
    "background": "send false, or leave it out",
}


def chat_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """The body that asks a chat for the same.

    Raises:
        RequestError: a field is unknown, ill-typed, or asks for what is not implemented.
    """
    fields = Fields(body)
    for name, remedy in _STATE.items():
        if (value := fields.take(name)) not in (None, False):
            _refuse_state(name, value, remedy)
    instructions = fields.string("instructions")
    system = [{"role": "system", "content": instructions}] if instructions else []
    chat = given(
        messages=one_system([*system, *_messages(fields.take("input"))]),
        tools=[_tool(tool, f"tools[{i}]") for i, tool in enumerate(fields.array("tools", MAX_TOOLS))],
        tool_choice=_tool_choice(fields.take("tool_choice")),
        max_tokens=fields.take("max_output_tokens"),
        **{name: fields.take(name) for name in ("model", "parallel_tool_calls", "temperature", "top_p", "stream")},
        **_reasoning(fields.mapping("reasoning")),
        **_text(fields.mapping("text")),
        **extensions(fields, "top_k", "stop", "chat_template_kwargs"),
    )
    options = Fields(fields.mapping("stream_options"), "stream_options")
    options.boolean("include_obfuscation")  # padding against eavesdroppers: harmless to leave out
    options.done()
    fields.done(RESPONSES_HINTS, _NEUTRAL)
    return chat


def _refuse_state(name: str, value: object, remedy: str) -> NoReturn:
    message = f"{name} is not supported, because this server keeps nothing between requests: {remedy}"
    raise RequestError(message, param=name, code="unsupported_parameter")


@dataclass(slots=True)
class _Turns:
    """Items to messages: the items of one turn of the assistant's become one message."""

    messages: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    def assistant(self, *fresh: str) -> dict[str, Any]:
        """The assistant's turn to add to; a new one if the last message is none, or has one of these already."""
        last = self.messages[-1] if self.messages else {}
        if last.get("role") != "assistant" or any(last[name] for name in fresh):
            last = {"role": "assistant", "content": "", "reasoning_content": "", "tool_calls": []}
            self.messages.append(last)
        return last


def _messages(value: object) -> list[dict[str, Any]]:
    if isinstance(value, str):
        return [{"role": "user", "content": checked_text(value, "input")}]
    if not isinstance(value, list) or not value:
        refuse("input", value, "a string or an array of at least one item")
    items = cast("list[object]", value)
    if len(items) > MAX_MESSAGES:
        raise RequestError(f"input has {len(items)} items and may have at most {MAX_MESSAGES}", param="input")
    turns = _Turns()
    for i, item in enumerate(items):
        fields = object_at(item, f"input[{i}]")
        _add(turns, fields)
        fields.done(RESPONSES_ITEM_HINTS)
    return [_without_nothing(message) for message in turns.messages]


def _without_nothing(message: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in message.items() if value or name == "content"}


def _add(turns: _Turns, fields: Fields) -> None:
    match kind := fields.take("type"):
        case None | "message":
            _add_message(turns, fields)
        case "reasoning":
            turn = turns.assistant("content", "reasoning_content", "tool_calls")
            turn["reasoning_content"] = _thoughts(fields)
        case "function_call":
            call, name = text_of(fields, "call_id"), text_of(fields, "name")
            arguments = call_arguments(text_of(fields, "arguments"), fields.path("arguments"))
            function = {"name": name, "arguments": arguments}
            turns.assistant()["tool_calls"].append({"id": call, "type": "function", "function": function})
        case "function_call_output":
            call, output = text_of(fields, "call_id"), _joined(fields, "output", ("input_text",))
            turns.messages.append({"role": "tool", "tool_call_id": call, "content": output})
        case _:
            kinds = "message, reasoning, function_call or function_call_output"
            refuse(fields.path("type"), kind, kinds)


def _add_message(turns: _Turns, fields: Fields) -> None:
    match role := fields.take("role"):
        case "assistant":
            text = _joined(fields, "content", ("output_text", "input_text"))
            # Text behind a call is of the same turn; behind text it is another.
            last = turns.messages[-1] if turns.messages else {}
            turn = turns.assistant() if last.get("tool_calls") else turns.assistant("content")
            turn["content"] += text
        case "user" | "system" | "developer":
            shown = "user" if role == "user" else "system"
            turns.messages.append({"role": shown, "content": _joined(fields, "content", ("input_text",))})
        case _:
            refuse(fields.path("role"), role, "user, assistant, system or developer")


def _thoughts(fields: Fields) -> str:
    """Reasoning in the open, or sealed by this server; a summary is only of it."""
    fields.array("summary", MAX_MESSAGES)
    text = _joined(fields, "content", ("reasoning_text",), default=[])
    sealed_text = fields.string("encrypted_content") or ""
    return text or unsealed(sealed_text, fields.path("encrypted_content"))


def sealed(text: str) -> str:
    """Reasoning for clients that send it back only as what they take for encrypted. It is not: it is base64."""
    return _SEAL + base64.b64encode(text.encode("utf-8")).decode("ascii")


def unsealed(text: str, where: str) -> str:
    """The reasoning that `sealed` holds; that of another server is unreadable, and nothing.

    Raises:
        RequestError: it was changed on its way; ``param`` is `where`.
    """
    if not text.startswith(_SEAL):
        return ""
    try:
        return base64.b64decode(text.removeprefix(_SEAL), validate=True).decode("utf-8")
    except ValueError as error:
        raise RequestError(f"{where} was changed: send it as it came", param=where) from error


def _joined(fields: Fields, name: str, kinds: Sequence[str], default: object = None) -> str:
    """A string, or the text of an array of parts."""
    value, where = fields.take(name), fields.path(name)
    value = default if value is None else value
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        refuse(where, value, "a string or an array of parts")
    texts: list[str] = []
    for i, entry in enumerate(cast("list[object]", value)):
        part = object_at(entry, f"{where}[{i}]")
        if (kind := part.take("type")) not in kinds:
            refuse(part.path("type"), kind, f"{' or '.join(kinds)}: this model reads text only")
        texts.append(text_of(part))
        part.done(RESPONSES_ITEM_HINTS)
    return "".join(texts)


def _tool(value: object, where: str) -> dict[str, Any]:
    fields = object_at(value, where)
    if (kind := fields.take("type")) != "function":
        refuse(f"{where}.type", kind, "function: this server runs no tools of its own")
    tool = function_tool(fields, "parameters")
    fields.done((), _TOOL_NEUTRAL)
    return tool


def _tool_choice(value: object) -> object:
    if not isinstance(value, dict):
        return value
    fields = Fields(cast("dict[str, Any]", value), "tool_choice")
    if (kind := fields.take("type")) != "function":
        refuse("tool_choice.type", kind, "function")
    choice = {"type": "function", "function": {"name": text_of(fields, "name")}}
    fields.done()
    return choice


def _reasoning(value: Mapping[str, Any]) -> dict[str, Any]:
    fields = Fields(value, "reasoning")
    effort = fields.take("effort")
    neutral = {"summary": ("auto",), "generate_summary": ("auto",), "context": ("auto",), "mode": ("standard",)}
    fields.done((), neutral)
    return {"reasoning_effort": effort}


def _text(value: Mapping[str, Any]) -> dict[str, Any]:
    fields = Fields(value, "text")
    form, verbosity = fields.mapping("format"), fields.take("verbosity")
    fields.done()
    made: object = form or None
    if form.get("type") == "json_schema":
        inner = {name: value for name, value in form.items() if name != "type"}
        made = {"type": "json_schema", "json_schema": inner}
    return {"response_format": made, "verbosity": verbosity}
