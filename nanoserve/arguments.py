"""A tool call's parameter, written between tags, as JSON of the type that the tool's schema gives it."""

import json
from collections.abc import Mapping
from typing import Any, cast

_NULLS = ("null", "none")
_TRUTHS = {"true": True, "false": False}


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
    properties: object = schema.get("properties")
    own = cast("Mapping[str, Any]", properties).get(key) if isinstance(properties, Mapping) else None
    return f"{_json(key)}: {_json(_typed(value, _types(own)))}"


def _types(schema: object) -> tuple[str, ...]:
    """The JSON types that a parameter's schema allows, in its order."""
    if not isinstance(schema, Mapping):
        return ()
    table = cast("Mapping[str, Any]", schema)
    kind: object = table.get("type")
    found = [kind] if isinstance(kind, str) else [*cast("list[Any]", kind)] if isinstance(kind, list) else []
    for union in ("anyOf", "oneOf"):
        choices: object = table.get(union)
        for one in cast("list[object]", choices) if isinstance(choices, list) else []:
            found += _types(one)
    values: object = table.get("enum")
    if not found and isinstance(values, list):
        found += [_type_of(item) for item in cast("list[object]", values)]
    return tuple(str(name) for name in found)


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
    return json.dumps(value, ensure_ascii=False)
