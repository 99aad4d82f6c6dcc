"""Varied JSON schemas from a seed, for `many_schemas.py`: small, so that most answers to them are short."""

from random import Random
from typing import Any

Schema = dict[str, Any]
NAMES = ("name", "age", "city", "price", "colour", "tags", "code", "owner", "size", "note")
WORDS = ("red", "green", "naïve", "two words", 'a "quote"', "日本", "x/y", "")
PATTERNS = (r"^[A-Z]{2}-[0-9]{3}$", r"^(red|green) [a-z]{2,6}$", r"^\+?[0-9]{3,8}$", r"^[a-z]+@[a-z]+\.org$")
TREE: Schema = {
    "type": "object",
    "properties": {
        "v": {"type": "integer", "minimum": 0, "maximum": 9},
        "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/tree"}]},
    },
    "required": ["v", "next"],
    "additionalProperties": False,
}


class _Maker:
    """Draws parts, and keeps what it has used."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.used = set[str]()
        self.defs: Schema = {}

    def value(self, depth: int) -> Schema:
        simple = (self.string, self.pattern, self.integer, self.number, self.enum, self.plain)
        nested = (self.array, self.array, self.inner, self.union, self.reference)
        make = self.rng.choice(simple if depth > 1 else simple + nested)
        self.used.add(make.__name__)
        return make(depth)

    def string(self, _: int) -> Schema:
        if self.rng.random() < 0.3:
            return {"type": "string"}
        return {"type": "string", "minLength": self.rng.randint(0, 3), "maxLength": self.rng.randint(3, 20)}

    def pattern(self, _: int) -> Schema:
        return {"type": "string", "pattern": self.rng.choice(PATTERNS)}

    def integer(self, _: int) -> Schema:
        low = self.rng.randint(-200, 200)
        return {"type": "integer", "minimum": low, "maximum": low + self.rng.randint(0, 300)}

    def number(self, _: int) -> Schema:
        low = round(self.rng.uniform(-5, 5), 1)
        return {"type": "number", "exclusiveMinimum": low, "maximum": low + self.rng.choice((0.5, 3, 100))}

    def enum(self, _: int) -> Schema:
        if self.rng.random() < 0.7:
            return {"type": "string", "enum": self.rng.sample(WORDS, self.rng.randint(1, 4))}
        return {"type": "integer", "enum": self.rng.sample(range(-9, 99), 3)}

    def plain(self, _: int) -> Schema:
        return {"type": self.rng.choice(("boolean", "null", "integer"))}

    def array(self, depth: int) -> Schema:
        least = self.rng.randint(0, 2)
        return {
            "type": "array",
            "items": self.value(depth + 1),
            "minItems": least,
            "maxItems": least + self.rng.randint(0, 2),
        }

    def inner(self, depth: int) -> Schema:
        return self.object(depth + 1)

    def union(self, depth: int) -> Schema:
        return {
            "anyOf": [{"type": "null"}, self.inner(depth), {"type": "array", "items": self.enum(0), "maxItems": 2}]
        }

    def reference(self, _: int) -> Schema:
        if self.rng.random() < 0.3:
            self.used.add("recursion")
            self.defs["tree"] = TREE
            return {"$ref": "#/$defs/tree"}
        self.defs.setdefault("part", self.object(2))
        return {"$ref": "#/$defs/part"}

    def object(self, depth: int) -> Schema:
        names = self.rng.sample(NAMES, self.rng.randint(1, 3 if depth else 4))
        required = [name for name in names if self.rng.random() < 0.7]
        if len(required) < len(names):
            self.used.add("optional")
        return {
            "type": "object",
            "properties": {name: self.value(depth) for name in names},
            "required": required,
            "additionalProperties": False,
        }


def make_schema(rng: Random) -> tuple[Schema, frozenset[str]]:
    """(an object's schema, what it is made of)."""
    maker = _Maker(rng)
    schema = maker.object(0)
    if maker.defs:
        schema["$defs"] = maker.defs
    return schema, frozenset(maker.used)
