"""What a client's chat must become before a template sees it: checked, in one shape, and disarmed.

Disarmed means that no text of a client can turn into a control token. Every character of it that could begin
or end a control token's text gets a marker beside it, a private-use character that occurs nowhere else in the
request. What the template writes has no marker, so after rendering only the template's own control texts are
whole, and the marker is taken out of the rest.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, cast

from nanoserve.errors import RequestError
from nanoserve.request import brief, clip

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
"""Roles of the wire and what the template calls them."""

# What a message may hold, by the template's role. The template gets a name; Lightning's does not read it.
_COMMON_KEYS = frozenset({"role", "content", "name"})
_KEYS = {
    "system": _COMMON_KEYS,
    "user": _COMMON_KEYS,
    "assistant": _COMMON_KEYS
    | {"tool_calls", "reasoning_content", "reasoning", "annotations", "provider_specific_fields"},
    "tool": _COMMON_KEYS | {"tool_call_id"},
}
_STRINGS = ("name", "tool_call_id", "reasoning_content", "reasoning")

LIVE_TEXTS = frozenset(
    {"<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"}
)
"""Control texts that are part of an answer: shown to the parser, and alive in an assistant's own content."""

_RESERVED_KWARGS = frozenset(
    {
        *("messages", "tools", "documents", "conversations", "chat_template", "add_generation_prompt"),
        *("continue_final_message", "return_assistant_tokens_mask", "self", "range", "dict", "namespace"),
        *("raise_exception", "strftime_now", "cycler", "joiner", "lipsum", "loop", "caller", "varargs"),
    }
)
# Keys by which templates look into tools and calls: a marker in one of these would hide the entry.
_TEMPLATE_KEYS = frozenset(
    {
        *("type", "function", "name", "description", "parameters", "properties", "required", "strict", "enum"),
        *("items", "arguments", "id", "role", "content", "reasoning_content", "tool_calls", "tool_call_id"),
    }
)


def normalize_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """OpenAI messages in the one shape templates expect; the input is not changed.

    Content is one string (text parts are concatenated), null entries are left out, tool arguments are
    objects, ``developer`` is ``system``, and ``reasoning`` is ``reasoning_content``.

    Raises:
        RequestError: a message is malformed, or has a field that would be dropped; ``param`` is the path,
            such as ``messages[2].role``.
    """
    if not messages:
        raise RequestError("messages is empty: send at least one message", param="messages")
    return _in_order([_message(message, f"messages[{i}]") for i, message in enumerate(messages)])


def _in_order(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results of one turn's calls in the order of the calls: templates show no ids, and clients go by them."""
    sorted_messages: list[dict[str, Any]] = []
    place: dict[object, int] = {}
    for results, group in itertools.groupby(messages, key=lambda message: message["role"] == "tool"):
        run = list(group)
        if results:
            run.sort(key=lambda result: place.get(result.get("tool_call_id"), len(place)))
        else:
            place = {call.get("id"): i for i, call in enumerate(run[-1].get("tool_calls", ()))}
        sorted_messages += run
    return sorted_messages


def _message(message: object, where: str) -> dict[str, Any]:
    given = {key: value for key, value in _mapping(message, where).items() if value is not None}
    role = given.get("role")
    if not isinstance(role, str) or role not in ROLES:
        _refuse(f"{where}.role", role, f"one of {', '.join(ROLES)}")
    given["role"] = ROLES[role]
    _check_keys(given, where)
    # Citations, and litellm's copy of unusual fields: an answer comes back with them, and no prompt has them.
    if "annotations" in given:
        _list(given.pop("annotations"), f"{where}.annotations")
    if "provider_specific_fields" in given:
        _mapping(given.pop("provider_specific_fields"), f"{where}.provider_specific_fields")
    _merge_reasoning(given, where)
    if "tool_calls" in given:
        calls = _list(given["tool_calls"], f"{where}.tool_calls")
        given["tool_calls"] = [_tool_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    given["content"] = _content(given, f"{where}.content")
    return given


def _check_keys(given: Mapping[str, Any], where: str) -> None:
    role = given["role"]
    for key in given:
        if key not in _KEYS[role]:
            path = f"{where}.{clip(str(key))}"
            message = f"{path} is not supported in a message of role {role}: leave it out"
            raise RequestError(message, param=path, code="unsupported_parameter")
    for key in _STRINGS:
        if not isinstance(given.get(key, ""), str):
            _refuse(f"{where}.{key}", given[key], "a string")


def _merge_reasoning(given: dict[str, Any], where: str) -> None:
    """Both of its names may come, as some servers answer with both; they may not disagree."""
    if "reasoning" not in given:
        return
    older, newer = given.get("reasoning_content"), given.pop("reasoning")
    if older and newer and older != newer:
        path = f"{where}.reasoning"
        raise RequestError(f"{path} and reasoning_content differ: send one of them", param=path)
    given["reasoning_content"] = older or newer


def _content(given: Mapping[str, Any], where: str) -> str:
    """The message's text; an assistant may have said nothing, and a tool may have found nothing."""
    content: object = given.get("content")
    if isinstance(content, str):
        return content
    if content is None or content in ([], ()):
        if given["role"] == "assistant" or (content is not None and given["role"] == "tool"):
            return ""
        _refuse(where, content, "a string or a list of at least one text part")
    return _joined(content, where)


def _joined(content: object, where: str) -> str:
    if not isinstance(content, list | tuple):
        _refuse(where, content, "a string or a list of text parts")
    parts = enumerate(cast("Sequence[object]", content))
    return "".join(_part(_mapping(part, f"{where}[{j}]"), f"{where}[{j}]") for j, part in parts)


def _part(part: Mapping[str, Any], where: str) -> str:
    if part.get("type") != "text":
        _refuse(f"{where}.type", part.get("type"), "'text': this model reads text only")
    text = part.get("text")
    if not isinstance(text, str):
        _refuse(f"{where}.text", text, "a string")
    return text


def _tool_call(call: object, where: str) -> dict[str, Any]:
    given = {key: value for key, value in _mapping(call, where).items() if value is not None}
    if not isinstance(given.get("id", ""), str):
        _refuse(f"{where}.id", given["id"], "a string")
    function = dict(_mapping(given.get("function"), f"{where}.function"))
    if not isinstance(function.get("name"), str):
        _refuse(f"{where}.function.name", function.get("name"), "a string")
    function["arguments"] = call_arguments(function.get("arguments"), f"{where}.function.arguments")
    return {**given, "function": function}


def call_arguments(value: object, where: str) -> dict[str, Any]:
    """A call's arguments: an object, its JSON, or nothing.

    Raises:
        RequestError: it is none of these; ``param`` is `where`.
    """
    if isinstance(value, str):
        value = _parsed(value, where) if value.strip() else {}
    return {} if value is None else dict(_mapping(value, where))


def _parsed(text: str, where: str) -> object:
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where} is not valid JSON: {clip(str(error))}", param=where) from error


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


def _mapping(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        _refuse(where, value, "an object")
    return cast("Mapping[str, Any]", value)


def _list(value: object, where: str) -> Sequence[object]:
    if not isinstance(value, list | tuple):
        _refuse(where, value, "a list")
    return cast("Sequence[object]", value)


def normalize_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """The tools as plain dicts.

    Raises:
        RequestError: an entry is not an object.
    """
    if tools is None:
        return None
    return [dict(_mapping(tool, f"tools[{i}]")) for i, tool in enumerate(_list(tools, "tools"))]


def switches_of(variables: Iterable[str], taken: Iterable[str]) -> frozenset[str]:
    """Those of a template's variables that a request may set.

    Args:
        variables: all that the template reads.
        taken: those that the checkpoint sets itself, such as ``bos_token``.
    """
    return frozenset(variables) - _RESERVED_KWARGS - set(taken)


def check_template_kwargs(kwargs: Mapping[str, Any], switches: frozenset[str]) -> None:
    """Let JSON scalars through, under names that the template reads.

    Raises:
        RequestError: ``param`` is ``chat_template_kwargs.NAME``.
    """
    for name, value in kwargs.items():
        where = f"chat_template_kwargs.{clip(name)}"
        if name not in switches:
            known = ", ".join(sorted(switches)) or "no switches"
            raise RequestError(
                f"{where} is no switch of this checkpoint's chat template: it has {known}", param=where
            )
        if not (value is None or isinstance(value, str | bool | int | float)):
            _refuse(where, value, "null, a boolean, a number or a string")


def _refuse(where: str, value: object, must_be: str) -> NoReturn:
    raise RequestError(f"{where} is {brief(value)} and must be {must_be}", param=where)


def check_unicode(text: str, where: str) -> None:
    """Refuse lone surrogates, which JSON lets through and UTF-8 does not have.

    Raises:
        RequestError: ``param`` is `where`.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        message = f"{where} holds a lone surrogate at character {error.start}: send valid Unicode"
        raise RequestError(message, param=where) from error


def strings(value: object) -> Iterator[str]:
    """Every string in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in cast("Mapping[object, object]", value).items():
            yield from strings(key)
            yield from strings(item)
    elif isinstance(value, list | tuple):
        for item in cast("Sequence[object]", value):
            yield from strings(item)


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of a JSON value with every string changed, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        table = cast("Mapping[Any, Any]", value)
        return {map_strings(key, change): map_strings(item, change) for key, item in table.items()}
    if isinstance(value, list | tuple):
        return [map_strings(item, change) for item in cast("Sequence[Any]", value)]
    return value


def choose_marker(texts: Iterable[str]) -> str:
    """A private-use character that occurs in none of the texts, neither itself nor as a JSON escape.

    Raises:
        RequestError: the texts use all 6,400 of them.
    """
    used: set[int] = set()
    for text in texts:
        used.update(map(ord, set(text)))
        used.update(int(digits, 16) for digits in re.findall(r"\\u([0-9a-fA-F]{4})", text))
    free = next((code for code in range(0xE000, 0xF900) if code not in used), None)
    if free is None:
        raise RequestError("messages use every private-use character: leave one unused", param="messages")
    return chr(free)


def remove_marker(text: str, marker: str) -> str:
    r"""Take the marker out, also where a template's JSON escaped it as ``\uXXXX``."""
    return text.replace(marker, "").replace(f"\\u{ord(marker):04x}", "")


class ControlTexts:
    """The control tokens' texts: finds them in a rendered chat, and disarms what clients wrote.

    Args:
        texts: at least two characters each, beginning and ending with a punctuation character.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        known = sorted(set(texts), key=len, reverse=True)
        heads, tails = {text[0] for text in known}, {text[-1] for text in known}
        live = [re.escape(text) for text in known if text in LIVE_TEXTS]
        edges = [re.escape(char) for char in sorted(heads | tails)]
        self._heads, self._tails = heads, tails
        self._edges = _alternatives(edges)
        self._edges_but_live = _alternatives(live + edges)
        self._inner = frozenset(
            inner for text in known for inner in _inner_texts(text) if not self._edges.search(inner)
        )

    def disarm(self, text: str, marker: str) -> str:
        """Mark every edge, and a text that is all of a control text but its edges.

        A template may write the edges itself, as in ``'<' ~ key ~ '>'``.

        Args:
            text: what the client wrote.
            marker: occurs nowhere in the request.
        """
        core = text.strip()
        if core in self._inner and core not in _TEMPLATE_KEYS:
            at = text.index(core) + 1
            return text[:at] + marker + text[at:]
        return self.mark_edges(text, marker)

    def mark_edges(self, text: str, marker: str, *, keep_live: bool = False) -> str:
        """Mark every character that could begin or end a control text.

        Args:
            text: what the client wrote.
            marker: occurs nowhere in the request.
            keep_live: leave `LIVE_TEXTS` whole.
        """

        def mark(match: re.Match[str]) -> str:
            found = match.group()
            if len(found) > 1:
                return found
            return marker * (found in self._tails) + found + marker * (found in self._heads)

        return (self._edges_but_live if keep_live else self._edges).sub(mark, text)

    def disarm_message(self, message: Mapping[str, Any], marker: str) -> dict[str, Any]:
        """Disarm a normalised message; only an assistant's own content keeps its `LIVE_TEXTS`."""
        result: dict[str, Any] = map_strings(
            {key: value for key, value in message.items() if key != "role"},
            lambda text: self.disarm(text, marker),
        )
        if message["role"] == "assistant":
            result["content"] = self.mark_edges(message["content"], marker, keep_live=True)
        return {"role": message["role"], **result}


def _alternatives(patterns: list[str]) -> re.Pattern[str]:
    return re.compile("|".join(patterns) or r"(?!)")


def _inner_texts(text: str) -> Iterator[str]:
    """Parts of a control text that lack both edges but hold its whole word: ``think``, ``/think``."""
    word = re.sub(r"^\W+|\W+$", "", text)
    start = text.index(word)
    for begin in range(1, start + 1):
        for end in range(start + len(word), len(text)):
            yield text[begin:end]
