"""What a request holds its answer to: a schema, a pattern, a forced call, a budget of thoughts. Pure functions."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from nanoserve.errors import RequestError
from nanoserve.grammar import Choice, Grammar, JsonSchema, Lark, Regex, ToolCalls
from nanoserve.protocol import Fields, checked_text, refuse
from nanoserve.tools import Tools

MAX_BUDGET = 2**31
MAX_CHOICES = 1024
_BUDGET = "thinking_token_budget"
_ANY_OBJECT = JsonSchema({"type": "object"})


@dataclass(frozen=True, slots=True)
class Held:
    """A checked wish.

    Attributes:
        grammar: what the answer, behind its reasoning, must be; None lets it be anything.
        param: the field that the grammar comes from, for errors.
        budget: tokens of reasoning at most (vLLM's ``thinking_token_budget``).
    """

    grammar: Grammar | None = None
    param: str = "grammar"
    budget: int | None = None

    @property
    def verbatim(self) -> bool:
        """Whether the answer may be something other than calls that is the grammar's, character by character."""
        if isinstance(self.grammar, ToolCalls):
            return self.grammar.otherwise is not None
        return self.grammar is not None


def parse_held(fields: Fields, tools: Tools | None = None) -> Held:
    """``response_format``, vLLM's ``structured_outputs`` and ``guided_…``, a forced call, and the budget.

    Where tools may be called and a format is asked for as well, the answer is either calls or the format.

    Args:
        fields: the body's; ``response_format`` is a chat's alone.
        tools: a chat's, None for a plain completion.

    Raises:
        RequestError: a field is malformed, or two of them ask for different things.
    """
    budget = fields.integer(_BUDGET, 0, MAX_BUDGET)
    found = [*_guided(fields, "guided_"), *_guided_object(fields)]
    if tools is not None and (format_ := _response_format(fields)) is not None:
        found.append(("response_format", format_))
    if len(found) > 1:
        (one, _), (other, _), *_ = found
        raise RequestError(f"{one} and {other} both say what the answer must be: send one of them", param=other)
    param, grammar = found[0] if found else ("grammar", None)
    if tools is None or not tools.declared:
        return Held(grammar, param, budget)
    if tools.forced:
        if grammar is not None:
            raise RequestError(
                f"tool_choice forces a call and {param} another answer: send one of them", param=param
            )
        return Held(ToolCalls(tools.callable, tools.parallel), "tools", budget)
    if grammar is None:
        return Held(None, param, budget)
    if not isinstance(grammar, JsonSchema):
        raise RequestError(f"{param} would forbid every call: send tool_choice none, or no tools", param=param)
    return Held(ToolCalls(tools.callable, tools.parallel, otherwise=grammar), param, budget)


def _response_format(fields: Fields) -> Grammar | None:
    given = fields.take("response_format")
    if given is None:
        return None
    if not isinstance(given, dict):
        refuse("response_format", given, "an object")
    options = Fields(cast("Mapping[str, Any]", given), "response_format")
    kind = options.string("type")
    if kind not in ("text", "json_object", "json_schema"):
        refuse("response_format.type", kind, "text, json_object or json_schema")
    if kind == "json_schema":
        inner = Fields(options.mapping("json_schema"), "response_format.json_schema")
        schema = inner.take("schema")
        for name in ("name", "description"):
            inner.string(name)
        inner.boolean("strict")  # OpenAI's false means "try"; here every schema is kept
        inner.done()
        options.done()
        return _json(schema, "response_format.json_schema.schema")
    options.done()
    return _ANY_OBJECT if kind == "json_object" else None


def _guided(fields: Fields, prefix: str) -> list[tuple[str, Grammar]]:
    makers: Mapping[str, Callable[[Any, str], Grammar]] = {
        "json": _json,
        "regex": lambda value, where: Regex(checked_text(value, where)),
        "choice": _choice,
        "grammar": lambda value, where: Lark(checked_text(value, where)),
    }
    found: list[tuple[str, Grammar]] = []
    for name, make in makers.items():
        if (value := fields.take(f"{prefix}{name}")) is not None:
            path = fields.path(f"{prefix}{name}")
            found.append((path, make(value, path)))
    return found


def _guided_object(fields: Fields) -> list[tuple[str, Grammar]]:
    """The newer spelling of vLLM, an object of the same four, or ``json_object``: true."""
    options = Fields(fields.mapping("structured_outputs"), "structured_outputs")
    found = _guided(options, "")
    if options.boolean("json_object"):
        found.append(("structured_outputs.json_object", _ANY_OBJECT))
    options.done()
    return found


def _json(value: object, where: str) -> Grammar:
    """A JSON schema, or a text of one."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            refuse(where, value, "a JSON schema")
    if not isinstance(value, dict):
        refuse(where, value, "a JSON schema, which is an object")
    return JsonSchema(cast("Mapping[str, Any]", value))


def _choice(value: object, where: str) -> Grammar:
    if not isinstance(value, list) or not 0 < len(cast("list[object]", value)) <= MAX_CHOICES:
        refuse(where, value, f"an array of 1 to {MAX_CHOICES} strings")
    entries = cast("list[object]", value)
    return Choice(tuple(checked_text(entry, f"{where}[{i}]") for i, entry in enumerate(entries)))
