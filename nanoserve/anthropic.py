"""POST /v1/messages: Anthropic's body as a chat's. Pure functions; `anthropic_answer.py` writes the answer."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from nanoserve.chat import MAX_MESSAGES
from nanoserve.doors import (
    ANTHROPIC_BLOCK_HINTS,
    ANTHROPIC_HINTS,
    ANTHROPIC_TOOL_HINTS,
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
from nanoserve.parameters import MAX_STOPS
from nanoserve.protocol import Fields, refuse
from nanoserve.tools import MAX_TOOLS

NAMES: Names = (
    (r"tools\[(\d+)\]\.function\.parameters", r"tools[\1].input_schema"),
    (r"tools\[(\d+)\]\.function", r"tools[\1]"),
    (r"stop", "stop_sequences"),
    (r"reasoning_effort", "output_config.effort"),
    (r"response_format\.json_schema", "output_config.format"),
    (r"response_format", "output_config.format"),
    (r"thinking_token_budget", "thinking.budget_tokens"),
)

_BILLING = "x-anthropic-billing-header:"
_NEUTRAL = {"container": (), "mcp_servers": ([],), "inference_geo": ()}
_TOOL_NEUTRAL = {"allowed_callers": (["direct"],), "defer_loading": (False,)}
_FOREIGN_MODELS = "claude-"
_EFFORTS = ("low", "medium", "high", "xhigh", "max")


def chat_body(body: Mapping[str, Any], *, counting: bool = False) -> dict[str, Any]:
    """The body that asks a chat for the same.

    A model's name that begins with ``claude-`` means the one model there is: clients have such names built in, and
    the answer says who gave it.

    Args:
        body: Anthropic's.
        counting: it is one of count_tokens, of which nothing is generated.

    Raises:
        RequestError: a field is unknown, ill-typed, or asks for what is not implemented.
    """
    fields = Fields(body)
    model = fields.string("model")
    messages = _messages(fields)
    chat = given(
        model=None if model and model.startswith(_FOREIGN_MODELS) else model,
        messages=one_system([*_system(fields.take("system")), *messages]),
        tools=[_tool(tool, f"tools[{i}]") for i, tool in enumerate(fields.array("tools", MAX_TOOLS))],
        stop=fields.array("stop_sequences", MAX_STOPS),
        max_tokens=fields.take("max_tokens"),
        stream=fields.take("stream"),
        **{name: fields.take(name) for name in ("temperature", "top_p", "top_k")},
        **_tool_choice(fields.mapping("tool_choice")),
        **_thinking(fields),
        **extensions(fields),
    )
    if "max_tokens" not in chat and not counting:
        refuse("max_tokens", None, "a whole number: an answer's most tokens, reasoning included")
    if not counting and chat["messages"][-1]["role"] == "assistant":
        message = "messages ends with a turn of the assistant's and must end with a user's"
        raise RequestError(f"{message}: this server cannot continue an answer that was begun", param="messages")
    _context_management(fields.mapping("context_management"))
    fields.done(ANTHROPIC_HINTS, _NEUTRAL)
    return chat


def _system(value: object) -> list[dict[str, Any]]:
    """The system prompt, without the line that some clients put first for their accounts.

    It changes with every request, and would make every prompt another one.
    """
    if value is None:
        return []
    texts = [text_of(fields) for _, fields in _blocks(value, "system", ("text",))]
    if texts and texts[0].lower().startswith(_BILLING):
        texts[0] = texts[0].partition("\n")[2].lstrip("\n")
    return [{"role": "system", "content": "\n".join(filter(None, texts))}] if any(texts) else []


def _messages(fields: Fields) -> list[dict[str, Any]]:
    messages = fields.array("messages", MAX_MESSAGES)
    if not messages:
        refuse("messages", messages, "an array of at least one message")
    return [made for i, message in enumerate(messages) for made in _message(message, f"messages[{i}]")]


def _message(value: object, where: str) -> list[dict[str, Any]]:
    fields = object_at(value, where)
    role, content = fields.take("role"), fields.take("content")
    fields.done()
    path = f"{where}.content"
    if role == "user":
        return _user(content, path)
    if role == "assistant":
        return [_assistant(content, path)]
    if role != "system":
        refuse(f"{where}.role", role, "user, assistant or system")
    texts = [text_of(block) for _, block in _blocks(content, path, ("text",))]
    return [{"role": "system", "content": "\n".join(texts)}]


def _user(content: object, where: str) -> list[dict[str, Any]]:
    """Results of calls, which answer the turn before, and then what the user says."""
    results: list[dict[str, Any]] = []
    texts: list[str] = []
    for kind, block in _blocks(content, where, ("text", "tool_result")):
        if kind == "text":
            texts.append(text_of(block))
        else:
            results.append(_result(block))
    if not (results or texts):
        refuse(where, content, "a string or an array of at least one block")
    return [*results, {"role": "user", "content": "\n".join(texts)}] if texts else results


def _result(block: Fields) -> dict[str, Any]:
    """A call's result; templates have no mark for a failed one, so its text says so."""
    call, failed, content = text_of(block, "tool_use_id"), block.boolean("is_error"), block.take("content")
    where = block.path("content")
    texts = [] if content is None else [text_of(part) for _, part in _blocks(content, where, ("text",))]
    text = "\n".join(texts)
    return {"role": "tool", "tool_call_id": call, "content": f"Error: {text}" if failed else text}


def _assistant(content: object, where: str) -> dict[str, Any]:
    """A turn of the model's: what it thought, said and called. Redacted thoughts are another's, and unreadable."""
    thoughts: list[str] = []
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    for kind, block in _blocks(content, where, ("text", "thinking", "redacted_thinking", "tool_use")):
        match kind:
            case "text":
                texts.append(text_of(block))
            case "thinking":
                thoughts.append(text_of(block, "thinking"))
            case "redacted_thinking":
                text_of(block, "data")
            case _:
                calls.append(_call(block))
    turn = {"role": "assistant", "content": "".join(texts), "reasoning_content": "\n".join(filter(None, thoughts))}
    return {**turn, "tool_calls": calls} if calls else turn


def _call(block: Fields) -> dict[str, Any]:
    input = block.take("input")
    if not isinstance(input, dict):
        refuse(block.path("input"), input, "an object")
    function = {"name": text_of(block, "name"), "arguments": call_arguments(input, block.path("input"))}
    return {"id": text_of(block, "id"), "type": "function", "function": function}


def _blocks(content: object, where: str, kinds: Sequence[str]) -> Iterator[tuple[str, Fields]]:
    """Each block's type and other fields; what is left of them behind the caller is refused."""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        refuse(where, content, "a string or an array of blocks")
    for i, entry in enumerate(cast("list[object]", content)):
        fields = object_at(entry, f"{where}[{i}]")
        kind = fields.take("type")
        if kind not in kinds:
            refuse(fields.path("type"), kind, f"{' or '.join(kinds)}: this model reads text only")
        yield kind, fields
        fields.done(ANTHROPIC_BLOCK_HINTS)


def _thinking(fields: Fields) -> dict[str, Any]:
    """Fields ``thinking`` and ``output_config``, in a chat's terms.

    Where thinking is off, there is nothing for the effort to scale.
    """
    kwargs = dict(fields.mapping("chat_template_kwargs"))
    asked = fields.mapping("thinking")
    thinking = Fields(asked, "thinking")
    config = Fields(fields.mapping("output_config"), "output_config")
    kind, effort, budget = thinking.take("type"), config.take("effort"), None
    if kind in ("enabled", "adaptive"):
        if (display := thinking.take("display")) not in (None, "summarized"):
            refuse("thinking.display", display, "summarized: this server shows what the model thinks")
        budget = thinking.take("budget_tokens") if kind == "enabled" else None
    elif kind != "disabled" and asked:
        refuse("thinking.type", kind, "enabled, adaptive or disabled")
    thinking.done()
    if effort is not None and effort not in _EFFORTS:
        refuse("output_config.effort", effort, f"one of {', '.join(_EFFORTS)}")
    if kind is not None and kwargs.setdefault("enable_thinking", kind != "disabled") != (kind != "disabled"):
        message = "thinking and chat_template_kwargs.enable_thinking say different things: send one of them"
        raise RequestError(message, param="thinking")
    made = given(
        chat_template_kwargs=kwargs or None,
        thinking_token_budget=budget,
        reasoning_effort=None if kind == "disabled" else effort,
        response_format=_format(config.mapping("format")),
    )
    config.done()
    return made


def _format(value: Mapping[str, Any]) -> dict[str, Any] | None:
    if not value:
        return None
    fields = Fields(value, "output_config.format")
    if (kind := fields.take("type")) != "json_schema":
        refuse("output_config.format.type", kind, "json_schema")
    schema = fields.mapping("schema")
    fields.done()
    return {"type": "json_schema", "json_schema": {"name": "output", "schema": schema, "strict": True}}


def _tool(value: object, where: str) -> dict[str, Any]:
    fields = object_at(value, where)
    if (kind := fields.take("type")) not in (None, "custom"):
        refuse(f"{where}.type", kind, "custom: this server runs no tools of its own")
    tool = function_tool(fields, "input_schema", "input_examples")
    if "parameters" not in tool["function"]:
        refuse(f"{where}.input_schema", None, "the JSON schema of the tool's input")
    fields.done(ANTHROPIC_TOOL_HINTS, _TOOL_NEUTRAL)
    return tool


def _tool_choice(value: Mapping[str, Any]) -> dict[str, Any]:
    if not value:
        return {}
    fields = Fields(value, "tool_choice")
    match kind := fields.take("type"):
        case "auto" | "none":
            choice: Any = kind
        case "any":
            choice = "required"
        case "tool":
            choice = {"type": "function", "function": {"name": text_of(fields, "name")}}
        case _:
            refuse("tool_choice.type", kind, "auto, any, tool or none")
    single = fields.boolean("disable_parallel_tool_use")
    fields.done()
    return {"tool_choice": choice, "parallel_tool_calls": not single}


def _context_management(value: Mapping[str, Any]) -> None:
    """Clients that never want thoughts cleared say so; to clear some would change the prompt."""
    fields = Fields(value, "context_management")
    for i, edit in enumerate(fields.array("edits", MAX_MESSAGES)):
        path = f"context_management.edits[{i}]"
        entry = object_at(edit, path)
        kind, keep = entry.take("type"), entry.take("keep")
        if not str(kind).startswith("clear_thinking_") or keep != "all":
            refuse(path, edit, "left out: this server clears nothing of a conversation")
        entry.done()
    fields.done()
