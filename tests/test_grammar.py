"""Grammars: what may be said is valid, and what cannot be held to is refused by name and in time."""

import json
import re
import resource
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from grammar_answers import END, PROMPT, Answerer, may
from llguidance import LLMatcher, LLTokenizer

from nanoserve import grammar as grammars
from nanoserve.errors import QueueFull, RequestError
from nanoserve.grammar import Choice, Grammar, JsonSchema, Lark, Regex
from nanoserve.grammar_schema import clean_schema

Schema = dict[str, Any]


@pytest.fixture(scope="module")
def answerer(tmp_path_factory: pytest.TempPathFactory) -> Answerer:
    return Answerer(tmp_path_factory.mktemp("vocabulary"))


def an_object(**properties: Any) -> Schema:
    required = list(properties)
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


SCHEMAS: Mapping[str, Schema] = {
    "any object": {"type": "object"},
    "scalars": an_object(
        a={"type": "integer"}, b={"type": "string", "maxLength": 9}, c={"type": "boolean"}, d={"type": "null"}
    ),
    "bounds": an_object(
        a={"type": "integer", "minimum": -5, "maximum": 17},
        b={"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    ),
    "bounds without a whole number between": an_object(
        a={"type": "number", "exclusiveMinimum": 3, "maximum": 3.5},
        b={"type": "number", "exclusiveMaximum": 0, "minimum": -0.5},
    ),
    "multiples": an_object(a={"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 10**6}),
    "strings": an_object(
        a={"type": "string", "minLength": 3, "maxLength": 8},
        b={"type": "string", "pattern": "^[a-z]{2,5}-[0-9]+$"},
        c={"type": "string", "pattern": "ab+", "maxLength": 20},
    ),
    "formats": an_object(
        a={"type": "string", "format": "date"}, b={"type": "string", "format": "uuid"}, c={"format": "ipv4"}
    ),
    "values": an_object(a={"enum": ["x", 3, None, True, 1.5, {"k": [1]}]}, b={"const": 'a "quoted" é\n'}),
    "arrays": an_object(
        a={"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 4},
        b={"type": "array", "prefixItems": [{"type": "boolean"}, {"type": "null"}], "items": False, "minItems": 2},
    ),
    "a map": {
        "type": "object",
        "additionalProperties": {"type": "integer"},
        "minProperties": 1,
        "maxProperties": 3,
    },
    "patterns of names": {
        "type": "object",
        "patternProperties": {"^n_": {"type": "integer"}, "^s_": {"type": "boolean"}},
        "additionalProperties": False,
    },
    "unsaid others": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    "one of two kinds": {
        "oneOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}],
        "discriminator": {"propertyName": "kind"},
        "$defs": {
            "A": an_object(kind={"const": "a", "title": "Kind"}, v={"type": "integer"}),
            "B": an_object(kind={"enum": ["b", "c"]}, w={"type": ["boolean", "null"]}),
        },
    },
    "a tree": {
        "$ref": "#/$defs/T",
        "$defs": {
            "T": an_object(
                v={"type": "integer"}, kids={"type": "array", "items": {"$ref": "#/$defs/T"}, "maxItems": 2}
            )
        },
    },
    "all of": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer", "minimum": 3}}, "required": ["a"]},
            {"properties": {"a": {"maximum": 9}, "b": {"type": "boolean"}}, "required": ["b"]},
        ],
        "additionalProperties": True,
    },
    "no object": {"type": ["integer", "null", "array"], "items": {"type": "boolean"}, "maxItems": 3},
}


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS.keys())
def test_every_answer_to_a_schema_validates(answerer: Answerer, schema: Schema) -> None:
    validator = jsonschema.Draft202012Validator(schema)
    texts: set[str] = set()
    for seed in range(16):
        ids, ended = answerer.draw(answerer.constraint(JsonSchema(schema)), seed)
        if ended:  # cut off, it cannot be valid
            texts.add(answerer.text(ids))
            validator.validate(json.loads(answerer.text(ids)))
    assert len(texts) > 5, "too few ended for this to say anything"


@pytest.mark.parametrize(
    "pattern",
    ["a+", "[A-Z][a-z]{2,9}( [0-9]{1,3})?", r"(?i)yes|no", r"\d{4}-\d{2}", "", "(ab|cd)*", r"^x\.\w$", ".{3}"],
)
def test_a_regular_expression_matches_the_whole_answer(answerer: Answerer, pattern: str) -> None:
    for seed in range(20):
        ids, ended = answerer.draw(answerer.constraint(Regex(pattern)), seed)
        assert ended
        assert re.fullmatch(pattern, answerer.text(ids))


def test_a_choice_is_one_of_its_texts(answerer: Answerer) -> None:
    options = ("yes", "no", 'a "quoted"\nline', "€ é 😀", "\\u0041", "yes and no")
    drawn = {answerer.text(answerer.draw(answerer.constraint(Choice(options)), seed)[0]) for seed in range(60)}
    assert drawn == set(options)


@pytest.mark.parametrize(
    "text",
    [
        'start: "(" expr ")"\nexpr: NUMBER ("+" NUMBER)*\nNUMBER: /[0-9]{1,3}/',
        'root ::= "(" expr ")"\nexpr ::= number ("+" number)*\nnumber ::= [0-9] [0-9]? [0-9]?\n',
    ],
    ids=["lark", "ebnf"],
)
def test_a_context_free_grammar_in_both_spellings(answerer: Answerer, text: str) -> None:
    for seed in range(10):
        ids, ended = answerer.draw(answerer.constraint(Lark(text)), seed)
        assert ended
        assert re.fullmatch(r"\(\d{1,3}(\+\d{1,3})*\)", answerer.text(ids))


def test_the_end_may_come_exactly_where_the_grammar_may_end(answerer: Answerer) -> None:
    constraint, a = answerer.constraint(Regex("a{2,3}")), answerer.id("a")
    for count in range(3):
        assert may(constraint, END) == may(constraint, 2) == (count == 2)
        assert not constraint.ended
        assert answerer.take(constraint, a)
    assert constraint.ended, "nothing can follow"


def test_no_control_token_can_come_of_a_clients_grammar(answerer: Answerer) -> None:
    for grammar in (Lark("start: A\nA: ~/abc/"), Regex("(?s:.*)"), JsonSchema({})):
        constraint = answerer.constraint(grammar)
        assert not any(may(constraint, id) for id in range(20) if id not in (2, END))
        assert not any(may(constraint, id) for id in range(512, 521)), "padding"


def test_white_space_is_bounded(answerer: Answerer) -> None:
    constraint = answerer.constraint(JsonSchema({"type": "object"}))
    assert answerer.accepts(constraint, '{\n  "a": 1,')
    assert answerer.accepts(constraint, "\n")
    assert not answerer.accepts(constraint, "\n")


def test_a_known_key_has_one_spelling(answerer: Answerer) -> None:
    """Otherwise "\\u0061" would pass as an unknown key, and overwrite "a" when the JSON is read."""
    constraint = answerer.constraint(JsonSchema(SCHEMAS["unsaid others"]))
    assert answerer.accepts(constraint, '{"a":1,"\\')
    assert not answerer.accepts(constraint, "u")


REFUSED: Mapping[str, tuple[Schema, str]] = {
    "uniqueItems": ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    "not": (an_object(a={"not": {"type": "string"}}), "not"),
    "if": ({"if": {"type": "string"}, "then": {}}, "if"),
    "contains": ({"type": "array", "contains": {}}, "contains"),
    "propertyNames": ({"type": "object", "propertyNames": {"maxLength": 3}}, "propertyNames"),
    "a misspelt one": (an_object(a={"type": "integer", "minimun": 3}), "minimun"),
    "OpenAPI's": (an_object(a={"type": "string", "nullable": True}), "nullable"),
    "an unknown format": ({"type": "string", "format": "phone"}, "phone"),
    "an array of items": ({"items": [{"type": "string"}]}, "prefixItems"),
    "additionalItems": ({"prefixItems": [True], "additionalItems": False}, "additionalItems"),
    "a remote reference": ({"$ref": "https://example.org/schema.json"}, "example.org"),
    "a file": ({"properties": {"a": {"$ref": "file:///etc/passwd"}}}, "file:"),
    "a dangling reference": ({"$ref": "#/$defs/none"}, "none"),
    "an inner base": (an_object(a={"$id": "https://example.org/", "type": "string"}), "$id"),
    "keys that may repeat": ({"type": "object", "minProperties": 2}, "minProperties"),
    "a number beyond float64": ({"const": 2**60}, "2^53"),
    "infinity": ({"maximum": float("inf")}, "finite"),
    "branches that overlap": ({"oneOf": [{"type": "integer"}, {"type": "integer", "minimum": 3}]}, "anyOf"),
    "a lone surrogate": ({"const": "\ud800"}, "surrogate"),
    "a lone surrogate as a key": ({"properties": {"\ud800": True}}, "surrogate"),
    "look-ahead": ({"type": "string", "pattern": "(?=a)b"}, "look-ahead"),
    "nothing": ({"type": "string", "enum": [3]}, "nsatisfiable"),
    "no schema": (an_object(a=3), "a schema"),
    "no object": ({"properties": ["a"]}, "an object"),
    "no array": ({"anyOf": {"a": True}}, "an array"),
}


@pytest.mark.parametrize(("schema", "word"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_enforced_is_refused_by_name(answerer: Answerer, schema: Schema, word: str) -> None:
    error = refused(answerer, JsonSchema(schema))
    assert word in str(error)


def refused(answerer: Answerer, grammar: Grammar) -> RequestError:
    with pytest.raises(RequestError) as caught:
        answerer.constraints.of(PROMPT, grammar, param="response_format")
    assert (caught.value.param, caught.value.status) == ("response_format", 400)
    assert len(str(caught.value)) < 400
    assert "Traceback" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("bounds", "key"),
    [
        ({"exclusiveMinimum": 3, "maximum": 3.5}, "exclusiveMinimum"),
        ({"exclusiveMinimum": 0, "exclusiveMaximum": 0.5}, "exclusiveMinimum"),
        ({"exclusiveMaximum": -3, "minimum": -3.5}, "exclusiveMaximum"),
    ],
)
def test_an_exclusive_bound_is_kept_where_llguidance_would_let_it_pass(bounds: Schema, key: str) -> None:
    tokens = LLTokenizer("byte")

    def allows(schema: Schema, text: str) -> bool:
        matcher = LLMatcher(tokens, LLMatcher.grammar_from_json_schema(dict(schema)))
        return matcher.try_consume_tokens(tokens.tokenize_str(text)) == len(text) and matcher.is_accepting()

    schema = {"type": "number", **bounds}
    cleaned = clean_schema(schema, "response_format")
    assert not allows(cleaned, str(bounds[key]))
    assert allows(cleaned, str(bounds[key] + (0.25 if key == "exclusiveMinimum" else -0.25)))
    assert allows(schema, str(bounds[key])), "llguidance no longer needs this"


def test_annotations_are_no_conditions(answerer: Answerer) -> None:
    noise = {
        "title": 3,
        "description": {"a": []},
        "default": 10**400,
        "examples": [1],
        "x-guidance": {"lenient": True},
    }
    schema: Schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "$id": "https://x/",
        **noise,
        "const": 7,
    }
    assert answerer.text(answerer.draw(answerer.constraint(JsonSchema(schema)), 0)[0]) == "7"
    assert "minimun" in str(refused(answerer, JsonSchema({"x-guidance": {"lenient": True}, "minimun": 3})))


@pytest.mark.parametrize(
    ("grammar", "word"),
    [
        (Regex("(a)\\1"), "backreferences"),
        (Regex("["), "unclosed"),
        (Regex("a$b"), "not supported"),
        (Regex("\ud800"), "surrogate"),
        (Choice(()), "empty"),
        (Lark("hello"), "Expected"),
        (Lark("start: nobody"), "nobody"),
        (Lark("start: a\na: a"), "no text"),
        (Lark('start: a\na: "x" a'), "items"),
        (Lark('root ::= "a'), "Gbnf"),
    ],
)
def test_other_grammars_are_refused_with_a_reason(answerer: Answerer, grammar: Grammar, word: str) -> None:
    assert word in str(refused(answerer, grammar))


def nested(levels: int, wrap: Callable[[Any], Any], inner: Any = True) -> Any:
    for _ in range(levels):
        inner = wrap(inner)
    return inner


def chained(count: int, link: Callable[[str], Schema]) -> Schema:
    links = {f"d{i}": link(f"#/$defs/d{i + 1}") for i in range(count)}
    return {"$ref": "#/$defs/d0", "$defs": {**links, f"d{count}": {"type": "string"}}}


def optional(count: int, **conditions: Any) -> Schema:
    properties = {f"p{i}": {"type": "string"} for i in range(count)}
    return {"type": "object", "properties": properties, "additionalProperties": False, **conditions}


HOSTILE: Mapping[str, Grammar] = {
    "100,000 schemas in each other": JsonSchema(nested(100_000, lambda inner: {"properties": {"a": inner}})),
    "100,000 branches in each other": JsonSchema(nested(100_000, lambda inner: {"anyOf": [inner]})),
    "100,000 arrays in a value": JsonSchema({"const": nested(100_000, lambda inner: [inner])}),
    "references that overflow the stack": JsonSchema(chained(3000, lambda ref: {"$ref": ref})),
    "objects that overflow the stack": JsonSchema(chained(900, lambda ref: {"properties": {"a": {"$ref": ref}}})),
    "names that overflow the stack": JsonSchema({"type": "object", "required": [f"p{i}" for i in range(9000)]}),
    "a reference to itself": JsonSchema({"$ref": "#"}),
    "a product of branches": JsonSchema(
        {"allOf": [{"anyOf": [optional(1, required=[f"q{i}{j}"]) for j in range(8)]} for i in range(8)]}
    ),
    "an enum of megabytes": JsonSchema({"enum": [f"number {i}" for i in range(100_000)]}),
    "properties that take gigabytes": JsonSchema(optional(1000, minProperties=1)),
    "properties that nobody could follow": JsonSchema(optional(1500)),
    "arrays that nobody could follow": JsonSchema(
        an_object() | {"properties": {f"p{i}": {"type": "array", "maxItems": 10_000} for i in range(700)}}
    ),
    "optional letters": Regex("(x?)" * 3000),
    "nested repetition": Regex("(((a{1,100}){1,100}){1,100}){1,100}"),
    "terminals that double": Lark(
        "start: T40\n" + "".join(f"T{i}: T{i - 1} T{i - 1}\n" for i in range(1, 41)) + 'T0: "a"'
    ),
    "rules that double": Lark(
        "start: t40\n" + "".join(f"t{i}: t{i - 1} t{i - 1}\n" for i in range(1, 41)) + 't0: "a"'
    ),
    "parentheses": Lark(f'start: {"(" * 9000}"a"{")" * 9000}'),
    "parentheses in EBNF": Lark(f'root ::= {"(" * 9000}"a"{")" * 9000}'),
}


@pytest.mark.parametrize("grammar", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_grammars_are_refused_in_time(answerer: Answerer, grammar: Grammar) -> None:
    """S9."""
    started = time.monotonic()
    refused(answerer, grammar)
    assert time.monotonic() - started < 6


def test_other_threads_run_while_a_grammar_takes_its_time(answerer: Answerer) -> None:
    done, gaps = threading.Event(), [0.0]

    def tick() -> None:
        last = time.monotonic()
        while not done.wait(0.005):
            gaps.append(time.monotonic() - last)
            last = time.monotonic()

    thread = threading.Thread(target=tick)
    thread.start()
    started = time.monotonic()
    try:
        refused(answerer, JsonSchema({"allOf": [{"type": "integer", "multipleOf": m} for m in (9973, 9967)]}))
    finally:
        done.set()
        thread.join()
    assert time.monotonic() - started < 6
    assert max(gaps) < 0.5


def test_a_grammar_is_tried_once(answerer: Answerer, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = Choice(("tried", "once")), Regex("tried(once")
    first = answerer.constraint(good)
    message = str(refused(answerer, bad))
    monkeypatch.setattr(grammars, "TRIAL_SECONDS", 0.0)  # another trial would end at once
    again = answerer.constraint(good)
    assert first.allowed() == again.allowed()
    assert str(refused(answerer, bad)) == message


def test_thousands_of_schemas_leave_no_memory_behind(answerer: Answerer, monkeypatch: pytest.MonkeyPatch) -> None:
    """S9. Every one compiled and followed a little; only their trials, in processes of their own, are left out."""

    def passed(compiler: grammars.Compiler, text: str) -> object:
        return grammars._Verdict(text)  # pyright: ignore[reportPrivateUsage]

    monkeypatch.setattr(grammars.Compiler, "_try", passed)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    def use(first: int, count: int) -> None:
        for i in range(first, first + count):
            answerer.constraint(JsonSchema(an_object(**{f"p{i}": {"type": "string", "maxLength": i}}))).allowed()

    use(0, 100)
    before = resident()
    use(100, 2000)
    assert resident() - before < 100e6


def test_one_grammar_is_tried_once_however_many_ask(answerer: Answerer, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the others wait for its verdict, where no other trial would have a place."""
    tried: list[str] = []
    real = grammars.Compiler._try  # pyright: ignore[reportPrivateUsage]

    def slowly(compiler: grammars.Compiler, text: str) -> object:
        tried.append(text)
        time.sleep(0.4)
        return real(compiler, text)

    monkeypatch.setattr(grammars, "PATIENCE", 0.1)
    monkeypatch.setattr(grammars.Compiler, "_try", slowly)
    with ThreadPoolExecutor(8) as pool:
        for grammar in (Choice(("asked", "by many")), Regex("asked(by many")):
            asked = [pool.submit(answerer.constraint, grammar) for _ in range(8)]
            errors = {str(one.exception()) for one in asked}
            assert len(errors) == 1
            assert "waiting" not in errors.pop()
    assert len(tried) == 2


def test_too_many_trials_at_once_are_turned_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "TRIALS", 0)
    monkeypatch.setattr(grammars, "PATIENCE", 0.05)
    with pytest.raises(QueueFull) as caught:
        Answerer(tmp_path).constraint(Regex("a"))
    assert caught.value.status == 503
    assert caught.value.retry_after >= 1


def test_a_grammar_that_outgrows_its_limits_ends_the_answer_with_an_error(answerer: Answerer) -> None:
    constraint = answerer.constraint(Regex("(a{1,1000}){1,1000}"))
    with pytest.raises(RequestError, match="any more"):
        assert answerer.accepts(constraint, "a" * 3000)
