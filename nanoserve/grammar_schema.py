"""A client's JSON schema to one that llguidance enforces whole: every keyword is known, or refused by name.

llguidance refuses what it knows and has not implemented, but passes over keywords that it does not know, and over
some of the others where they stand together. So nothing reaches it that is not listed here.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, cast

from nanoserve.errors import RequestError
from nanoserve.messages import check_unicode
from nanoserve.request import brief, clip, is_integer

MAX_TEXT = 256 * 1024
"""Characters of a grammar, with its schemas as JSON without their annotations."""
MAX_PARTS = 50_000
"""Schemas and values in a schema."""
MAX_DEPTH = 40
"""Schemas within schemas. Each takes two levels of JSON, and llguidance reads 128 of them."""

_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLES = ("items", "additionalProperties")
_COUNTS = ("minItems", "maxItems", "minProperties", "maxProperties", "minLength", "maxLength")
_TEXTS = ("$ref", "pattern", "format")
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_PLAIN = (
    *("type", "required", "enum", "const", "multipleOf"),
    *_BOUNDS,
    *(*_COUNTS, *_TEXTS),
)
_ANNOTATIONS = (
    *("title", "description", "default", "example", "examples", "$comment", "$schema", "deprecated"),
    *("readOnly", "writeOnly", "contentMediaType", "contentEncoding", "discriminator"),
)
"""They say nothing about which values are valid. Left out, so that what stands in them is nobody's concern."""

_EXACT = 2**53
"""llguidance reads numbers as float64, and would enforce another number than one beyond this."""

_HAIR = 1e-9
"""See `_keep_apart`."""

_MAX_HOPS = 32
"""References that lead to references."""

_OPTIONS = {
    # Bounded, and one line feed at a time: a model in doubt would write white space for ever.
    "whitespace_pattern": r"[ \t]{1,4}|\r?\n[ \t]{0,40}",
    # Without \u: a key in another spelling would pass as another key.
    "json_allowed_escapes": 'nrbtf\\"',
}
"""How llguidance is to write JSON."""

Schema = dict[str, Any]


def clean_schema(schema: Mapping[str, Any], param: str) -> Schema:
    """The schema without annotations, and with anyOf for a oneOf whose branches cannot overlap.

    Args:
        schema: nested as deeply as a client likes.
        param: the request's field, for errors.

    Raises:
        RequestError: a keyword is not supported, a number is not exact, or it is nested too deeply.
    """
    cleaner = _Cleaner(param)
    root = cleaner.clean(schema)
    for node in cleaner.nodes:
        if "oneOf" in node and "anyOf" not in node and _apart(node["oneOf"], root):
            node["anyOf"] = node.pop("oneOf")
    return root


def with_options(schema: Schema) -> Schema:
    """A cleaned schema that tells llguidance how JSON is to be written, too."""
    return {**schema, "x-guidance": _OPTIONS}


def resolve(node: Any, root: Mapping[str, Any]) -> Any:
    """The schema that a cleaned schema stands for: where it is nothing but a reference, or one schema in an allOf.

    Returns:
        The schema itself where the reference leads nowhere: llguidance will say so.
    """
    for _ in range(_MAX_HOPS):
        if not isinstance(node, dict):
            break
        table = cast("Schema", node)
        if set(table) == {"allOf"} and len(table["allOf"]) == 1:
            node = table["allOf"][0]
        elif set(table) == {"$ref"} and (target := _at(table["$ref"], root)) is not None:
            node = target
        else:
            break
    return node


def refuse(problem: str, param: str) -> NoReturn:
    """Raise the error that names the field.

    Raises:
        RequestError: always.
    """
    raise RequestError(f"{param} {problem}", param=param)


@dataclass(slots=True)
class _Cleaner:
    """Goes through a schema with a list and not by recursion: deep nesting would exhaust Python's stack."""

    param: str
    parts: int = 0
    nodes: list[Schema] = field(default_factory=list[Schema])
    todo: list[tuple[Mapping[str, Any], Schema, int]] = field(
        default_factory=list[tuple[Mapping[str, Any], Schema, int]]
    )

    def clean(self, schema: Mapping[str, Any]) -> Schema:
        root = self._child("the schema", schema, 0)
        while self.todo:
            source, target, depth = self.todo.pop()
            if depth > MAX_DEPTH:
                refuse(f"is nested deeper than {MAX_DEPTH} schemas: use $defs, or less of it", self.param)
            self.nodes.append(target)
            for key, value in source.items():
                if not _is_annotation(key, value, depth):
                    target[key] = self._value(key, value, depth + 1)
            self._check_together(target)
            _keep_apart(target)
        return cast("Schema", root)

    def _value(self, key: str, value: object, depth: int) -> object:
        if key in _MAPS:
            if not isinstance(value, Mapping):
                self._wrong(key, value, "an object")
            table = cast("Mapping[str, object]", value)
            self._count(len(table))
            for name in table:
                check_unicode(name, self.param)
            return {name: self._child(key, child, depth) for name, child in table.items()}
        if key in _LISTS:
            if not isinstance(value, list):
                self._wrong(key, value, "an array")
            self._count(len(cast("list[object]", value)))
            return [self._child(key, child, depth) for child in cast("list[object]", value)]
        if key in _SINGLES:
            return self._child(key, value, depth)
        if key not in _PLAIN:
            refuse(f"has the keyword {clip(repr(key))}, which is not supported: leave it out", self.param)
        self._check_shape(key, value)
        for leaf in _leaves(value, self.param):
            self._check_leaf(key, leaf)
        return value

    def _child(self, key: str, child: object, depth: int) -> object:
        """A schema's place in the result; it is filled in later."""
        if isinstance(child, bool) and depth:
            return child
        if not isinstance(child, Mapping):
            remedy = ": use prefixItems" if key == "items" and isinstance(child, list) else ""
            self._wrong(key, child, f"a schema{remedy}")
        target: Schema = {}
        self.todo.append((cast("Mapping[str, Any]", child), target, depth))
        return target

    def _check_shape(self, key: str, value: object) -> None:
        texts = isinstance(value, list) and all(isinstance(item, str) for item in cast("list[object]", value))
        if key in _COUNTS and not (is_integer(value) and cast("int", value) >= 0):
            self._wrong(key, value, "a whole number from 0")
        if key in _TEXTS and not isinstance(value, str):
            self._wrong(key, value, "a string")
        if (key == "type" and not (isinstance(value, str) or texts)) or (key == "required" and not texts):
            self._wrong(key, value, "an array of strings")
        if key == "enum" and not isinstance(value, list):
            self._wrong(key, value, "an array")
        if key == "$ref" and not (value == "#" or str(value).startswith("#/")):
            refuse(f"has $ref {brief(value)}: only references within the schema (#/…) are followed", self.param)

    def _check_leaf(self, key: str, leaf: object) -> None:
        self._count(1)
        if isinstance(leaf, str):
            check_unicode(leaf, self.param)
        elif isinstance(leaf, float) and not math.isfinite(leaf):
            self._wrong(key, leaf, "a finite number")
        elif isinstance(leaf, int | float) and abs(leaf) > _EXACT:
            self._wrong(key, leaf, "a number of at most 2^53")

    def _count(self, more: int) -> None:
        self.parts += more
        if self.parts > MAX_PARTS:
            refuse(f"has more than {MAX_PARTS} schemas and values: make it smaller", self.param)

    def _check_together(self, node: Schema) -> None:
        """What llguidance would not hold to: it cannot tell that a key has come twice."""
        least: int = node.get("minProperties", 0)
        if least > len(node.get("required", ())) + 1:
            refuse(
                f"has minProperties {brief(least)}, and at most one more than the required ones is supported: "
                "name the properties in required",
                self.param,
            )

    def _wrong(self, key: str, value: object, must_be: str) -> NoReturn:
        refuse(f"has {brief(value)} at {clip(key)}, where {must_be} must stand", self.param)


def _keep_apart(node: Schema) -> None:
    """Move an exclusive whole bound by a hair where the other bound lies within one of it.

    There llguidance (1.9.1) lets the bound itself pass, written without a point: 3 for exclusiveMinimum 3 and
    maximum 3.5. What is left out between the two lies closer than anyone asks.
    """
    bounds = {key: node[key] for key in _BOUNDS if isinstance(node.get(key), int | float)}
    low, high = bounds.get("exclusiveMinimum", math.inf), bounds.get("exclusiveMaximum", math.inf)
    ceilings = [bounds[key] for key in ("maximum", "exclusiveMaximum") if key in bounds]
    floors = [bounds[key] for key in ("minimum", "exclusiveMinimum") if key in bounds]
    if float(low).is_integer() and any(low < bound < low + 1 for bound in ceilings):
        node["exclusiveMinimum"] = low + max(_HAIR, abs(low) * _HAIR)
    if float(high).is_integer() and any(high - 1 < bound < high for bound in floors):
        node["exclusiveMaximum"] = high - max(_HAIR, abs(high) * _HAIR)


def _is_annotation(key: str, value: object, depth: int) -> bool:
    """Whether a keyword says nothing about which values are valid."""
    return (
        key in _ANNOTATIONS
        or key.startswith("x-")
        or (key == "$id" and depth == 0)
        or (key == "uniqueItems" and value is False)
    )


def _leaves(value: object, param: str) -> Iterator[object]:
    """Strings and numbers in a value, keys too."""
    todo = [(value, 0)]
    while todo:
        item, depth = todo.pop()
        if depth > MAX_DEPTH:
            refuse(f"has a value nested deeper than {MAX_DEPTH} levels: use less of it", param)
        if isinstance(item, Mapping):
            table = cast("Mapping[str, Any]", item)
            todo += [(child, depth + 1) for pair in table.items() for child in pair]
        elif isinstance(item, list):
            todo += [(child, depth + 1) for child in cast("list[object]", item)]
        else:
            yield item


def _apart(branches: Sequence[Any], root: Schema) -> bool:
    """Whether a property that every branch requires tells which branch an object is of."""
    tags = [_tags(resolve(branch, root)) for branch in branches]
    return any(
        sum(len(tag[name]) for tag in tags) == len(frozenset[str]().union(*(tag[name] for tag in tags)))
        for name in set(tags[0]).intersection(*tags[1:])
    )


def _tags(node: Any) -> Mapping[str, frozenset[str]]:
    """The strings that an object's required properties are restricted to, by property."""
    if not isinstance(node, dict) or cast("Schema", node).get("type") != "object":
        return {}
    table = cast("Schema", node)
    found: dict[str, frozenset[str]] = {}
    for name, child in table.get("properties", {}).items():
        if name in table.get("required", ()) and isinstance(child, dict):
            own = cast("Schema", child)
            values: list[object] = [own["const"]] if "const" in own else own.get("enum", [])
            if values and all(isinstance(value, str) for value in values):
                found[name] = frozenset(cast("list[str]", values))
    return found


def _at(reference: str, root: Any) -> Any:
    """What a reference into the schema leads to; None where it leads nowhere."""
    for part in reference.split("/")[1:]:
        if not isinstance(root, dict):
            return None
        root = cast("Schema", root).get(part.replace("~1", "/").replace("~0", "~"))
    return root
