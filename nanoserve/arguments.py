"""A tool call's parameter, written between tags: where it ends, and its JSON, of the type its schema gives it."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

_NULLS = ("null", "none")
_TRUTHS = {"true": True, "false": False}
_UNIONS = ("anyOf", "oneOf", "allOf")
_MAX_DEPTH = 16
"""Unions and references inside each other that are followed."""

ENDS = ("</parameter>", "<parameter=", "</function>", "<tool_call>", "</tool_call>", "<function=")
"""The tags that end a parameter's value."""

_END = re.compile("|".join(ENDS))
_END_OR_STRING = re.compile(f'"|{_END.pattern}')
_IN_STRING = re.compile(r'(?:[^"\\\n]|\\[^\n])*+')
"""What may come in a JSON string; a line feed may not."""
_LONGEST = max(map(len, ENDS))


def argument(schema: Mapping[str, Any], key: str, value: str) -> str:
    """``"key": value`` as JSON.

    Args:
        schema: of all the tool's parameters.
        key: the parameter.
        value: as written, with a line feed at either end that does not count.

    Returns:
        The value in the first of the schema's types that it fits; a string where it fits none, or none is given.
    """
    value = value.removeprefix("\n").removesuffix("\n")
    try:
        written = _json(_typed(value, _types_of(schema, key)))
    except ValueError:  # a number that Python takes for infinity
        written = value.strip()
    return f"{_json(key)}: {written}"


class ValueEnd:
    """Finds the tag that ends a parameter's value, in a text that grows; it takes linear time over all of it.

    In an array or an object a tag in a string is text, and a string that is still open may hold the tags in it.

    Args:
        schema: of all the tool's parameters.
        key: the parameter.
    """

    def __init__(self, schema: Mapping[str, Any], key: str) -> None:
        types = _types_of(schema, key)
        strings = "string" not in types and not {"array", "object"}.isdisjoint(types)
        self._what = _END_OR_STRING if strings else _END
        self._searched = 0  # characters that hold no end
        self._string = 0  # where the open string begins, behind its quote; 0: none is open

    def find(self, text: str) -> re.Match[str] | None:
        """The tag, once it is there; ``text`` is the value and whatever comes behind it."""
        while True:
            if self._string:
                inside = _IN_STRING.match(text, self._searched)
                stop = self._searched = inside.end() if inside else self._searched
                if stop >= len(text) - text.endswith("\\"):
                    return None
                # Where its line ends without a quote it is no string, and hides nothing.
                if not text.startswith('"', stop) and (found := _END.search(text, self._string, stop)):
                    return found
                self._searched, self._string = stop + 1, 0
            found = self._what.search(text, self._searched)
            if found is None:
                self._searched = max(self._searched, len(text) - _LONGEST)
            if found is None or found[0] != '"':
                return found
            self._string = self._searched = found.end()


def _types_of(schema: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """The JSON types of a parameter, in its schema's order."""
    properties: object = schema.get("properties")
    own = cast("Mapping[str, Any]", properties).get(key) if isinstance(properties, Mapping) else None
    return tuple(dict.fromkeys(_types(own, schema, set())))


def _types(schema: object, root: Mapping[str, Any], seen: set[str], depth: int = 0) -> Iterator[str]:
    """The JSON types that a parameter's schema allows, in its order.

    Args:
        schema: the parameter's.
        root: what references start from.
        seen: references that were followed. None is followed twice, or a hostile schema would take for ever.
        depth: of the recursion.
    """
    if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
        return
    table = cast("Mapping[str, Any]", schema)
    kind: object = table.get("type")
    if kind is None and not table.keys() & {"$ref", *_UNIONS}:
        values: object = table.get("enum", [table["const"]] if "const" in table else [])
        yield from map(_type_of, _items(values))
    yield from map(str, [kind] if isinstance(kind, str) else _items(kind))
    reference: object = table.get("$ref")
    if isinstance(reference, str) and reference not in seen:
        seen.add(reference)
        yield from _types(_referred(root, reference), root, seen, depth + 1)
    for union in _UNIONS:
        for one in _items(table.get(union)):
            yield from _types(one, root, seen, depth + 1)


def _items(value: object) -> list[object]:
    return cast("list[object]", value) if isinstance(value, list) else []


def _referred(root: object, reference: str) -> object:
    """What a reference inside the tool's own schema, such as ``#/$defs/Colour``, leads to; None if nothing."""
    if not reference.startswith("#"):
        return None
    for step in reference.split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        root = cast("Mapping[str, object]", root).get(name) if isinstance(root, Mapping) else None
    return root


def _type_of(value: object) -> str:
    kinds: dict[type[object], str] = {
        bool: "boolean",
        int: "integer",
        float: "number",
        str: "string",
        list: "array",
        dict: "object",
    }
    return kinds.get(type(value), "null")


def _typed(value: str, types: tuple[str, ...]) -> object:
    """The value as the first type that it fits; strings come last, since everything fits them."""
    for kind in sorted(types, key=lambda kind: kind == "string"):
        if kind == "null" and value.strip().lower() in _NULLS:
            return None
        if kind == "boolean" and value.strip().lower() in _TRUTHS:
            return _TRUTHS[value.strip().lower()]
        if kind in ("integer", "number", "array", "object") and (parsed := _parsed(value, kind)) is not None:
            return parsed
    return value


def _parsed(value: str, kind: str) -> object:
    """The value read as JSON, if it is of that type; None if not."""
    try:
        read: object = json.loads(value, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    if kind == "integer" and isinstance(read, float) and read.is_integer():
        return int(read)
    found = _type_of(read)
    return read if found == kind or (kind, found) == ("number", "integer") else None


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
