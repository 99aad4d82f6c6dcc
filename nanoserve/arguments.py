"""A tool call's parameter, written between tags, as JSON of the type that the tool's schema gives it."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, cast

_NULLS = ("null", "none")
_TRUTHS = {"true": True, "false": False}
_UNIONS = ("anyOf", "oneOf", "allOf")
_MAX_DEPTH = 16
"""Unions and references inside each other that are followed."""


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


def has_strings(schema: Mapping[str, Any], key: str) -> bool:
    """Whether a parameter's value is JSON that may have strings in it, and no string itself."""
    types = _types_of(schema, key)
    return "string" not in types and not {"array", "object"}.isdisjoint(types)


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
