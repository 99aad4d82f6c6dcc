"""The parser of answers: what the forms mean, and that neither cuts nor nonsense change or leak anything."""

import json
import time
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

import pytest

from nanoserve.arguments import ENDS, argument
from nanoserve.parsing import CallArguments, CallBegun, Content, Parser, Part, Reasoning

TOOLS: Mapping[str, Mapping[str, Any]] = {
    "f": {
        "properties": {
            "n": {"type": "integer"},
            "s": {"type": "string"},
            "b": {"type": "boolean"},
            "x": {"type": ["number", "null"]},
            "list": {"type": "array"},
        }
    },
    "get_weather": {"properties": {"city": {"type": "string"}}},
}
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
CALL_TAGS = ("<function=", "</function>", "<parameter=", "</parameter>")

Whole = tuple[str, str, list[tuple[str, str]]]


def whole(parts: Sequence[Part]) -> Whole:
    """(reasoning, content, calls as (name, JSON))."""
    calls: dict[int, tuple[str, str]] = {}
    for part in parts:
        if isinstance(part, CallBegun):
            calls[part.index] = (part.name, "")
        elif isinstance(part, CallArguments):
            calls[part.index] = (calls[part.index][0], calls[part.index][1] + part.json)
    reasoning = "".join(part.text for part in parts if isinstance(part, Reasoning))
    content = "".join(part.text for part in parts if isinstance(part, Content))
    return reasoning, content, [calls[index] for index in sorted(calls)]


def parse(
    text: str,
    tools: Mapping[str, Mapping[str, Any]] = TOOLS,
    *,
    thinking: bool = True,
    nonempty: bool = False,
    cuts: Sequence[int] = (),
) -> Whole:
    parser, parts, at = Parser(tools, thinking, nonempty), list[Part](), 0
    for cut in (*cuts, len(text)):
        parts += parser.push(text[at:cut])
        at = cut
    return whole(parts + parser.finish())


def call(name: str, **parameters: str) -> str:
    body = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters.items())
    return f"<tool_call>\n<function={name}>\n{body}</function>\n</tool_call>"


@pytest.mark.parametrize(
    ("text", "thinking", "expected"),
    [
        ("I see.\n</think>\nHello\n\nworld", True, ("I see.", "Hello\n\nworld")),
        ("I see.</think>Hello", True, ("I see.", "Hello")),
        ("<think>\nI see.\n</think>\nHello", True, ("I see.", "Hello")),
        ("never closed", True, ("never closed", "")),
        ("Hello", False, ("", "Hello")),
        ("<think>I see.</think>Hello", False, ("I see.", "Hello")),
        ("</think>\nHello", True, ("", "Hello")),
        ("a < b and <thing> stay", False, ("", "a < b and <thing> stay")),
        ("line\n", False, ("", "line\n")),
    ],
)
def test_reasoning_and_content(text: str, thinking: bool, expected: tuple[str, str]) -> None:
    assert parse(text, {}, thinking=thinking)[:2] == expected


def test_an_answer_that_is_all_reasoning_can_be_content_too() -> None:
    assert parse("only thoughts ", {}, nonempty=True) == ("only thoughts", "only thoughts", [])
    assert parse("a</think>b", {}, nonempty=True) == ("a", "b", [])
    assert parse("a" + call("f", n="1"), nonempty=True)[1] == ""


def test_calls_are_typed_by_the_schema() -> None:
    text = "Now.\n</think>\nSure.\n" + call("f", n="4", s="a\nb", b="True", x="null", list='["a"]')
    reasoning, content, calls = parse(text)
    assert (reasoning, content) == ("Now.", "Sure.")
    assert calls[0][0] == "f"
    assert json.loads(calls[0][1]) == {"n": 4, "s": "a\nb", "b": True, "x": None, "list": ["a"]}


def test_several_calls_and_a_call_that_ends_the_reasoning() -> None:
    reasoning, content, calls = parse("hm " + call("f", n="1") + "\n" + call("get_weather", city="Oslo") + "\n")
    assert (reasoning, content) == ("hm", "")
    assert [(name, json.loads(data)) for name, data in calls] == [
        ("f", {"n": 1}),
        ("get_weather", {"city": "Oslo"}),
    ]


def test_the_name_comes_before_the_arguments_are_there() -> None:
    parser = Parser(TOOLS, thinking=False)
    assert parser.push("<tool_call>\n<function=f>") == [CallBegun(0, "f"), CallArguments(0, "{")]
    assert parser.push("\n<parameter=n>\n4") == []
    assert parser.push("\n</parameter>") == [CallArguments(0, '"n": 4')]
    assert parser.push("\n<parameter=s>\nx\n</parameter>") == [CallArguments(0, ', "s": "x"')]
    assert parser.finish() == [CallArguments(0, "}")]


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (call("unknown", n="1"), "unknown>\nn>\n1", []),
        ("<tool_call>\nno function</tool_call>", "no function", []),
        ("<function=f>\n<parameter=n>\n4\n</parameter>\n</function>", "", [("f", '{"n": 4}')]),
        ("<tool_call><function=f><parameter=n>4<parameter=s>x</function>", "", [("f", '{"n": 4, "s": "x"}')]),
        ("<tool_call>\n<function=f>\n<parameter=n>4</parameter>\n<parameter=s>\ncut o", "", [("f", '{"n": 4}')]),
        ("<tool_call>\n<function=f>\n</function>", "", [("f", "{}")]),
        ("<tool_call><function=f><parameter=n>1</parameter><parameter=n>2</parameter>", "", [("f", '{"n": 1}')]),
        ("<tool<tool_call>_call>x", "<toolx", []),
    ],
)  # fmt: skip
def test_broken_calls(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    got = parse(text, thinking=False)
    assert got[2] == calls
    if content != "<toolx":
        assert got[1].strip() == content


def test_thoughts_about_calls_stay_thoughts() -> None:
    assert parse("a <tool_call> here\n</think>b") == ("a here", "b", [])
    assert parse("a <function=NAME> here</think>b") == ("a NAME> here", "b", [])
    assert parse("a <tool_call>")[:2] == ("a", "")
    assert parse("a\n<tool_call>\n<tool_call>\n" + call("f", n="1") + "b</think>c") == (
        "a",
        "bc",
        [("f", '{"n": 1}')],
    )


def test_a_single_call_is_the_end() -> None:
    parser = Parser(TOOLS, thinking=True, single=True)
    text = "hm" + call("f", n="1")
    parts = parser.push(text.removesuffix("</function>\n</tool_call>"))
    assert not parser.over
    parts += parser.push("</function>")
    assert parser.over
    parts += parser.push("\n</tool_call>" + call("f") + "more")
    assert whole(parts + parser.finish()) == ("hm", "", [("f", '{"n": 1}')])


def test_a_long_value_takes_linear_time() -> None:
    parser, line = Parser(TOOLS, thinking=False), "<div>text</div>\n"
    parser.push("<tool_call><function=f><parameter=s>")
    began = time.perf_counter()
    for _ in range(20_000):
        assert parser.push(line) == []
    assert time.perf_counter() - began < 5
    (part,) = parser.push("</parameter>")
    assert part == CallArguments(0, f'"s": {json.dumps((line * 20_000).removesuffix(chr(10)))}')


@pytest.mark.parametrize("tag", ENDS)
def test_a_tag_in_a_json_string_is_text(tag: str) -> None:
    """Index 769 of 1,000 answers to many schemas: a grammar of JSON lets a string in an array hold any tag."""
    value = [f'a\\{tag}"', "", {tag: tag}]
    text = call("f", list=json.dumps(value), n="4")
    for cuts in ((), range(len(text))):
        got = parse(text, thinking=False, cuts=cuts)
        assert got[:2] == ("", "")
        assert [json.loads(data) for _, data in got[2]] == [{"list": value, "n": 4}]


@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        ('["a</parameter>\n<parameter=s>x', {"list": '["a', "s": "x"}),
        ('["a\n</parameter><parameter=s>x', {"list": '["a', "s": "x"}),
        ('["a\\\n</parameter><parameter=s>x', {"list": '["a\\', "s": "x"}),
        ('["a", "b</parameter>\n<parameter=s>"x"', {"list": '["a", "b', "s": '"x"'}),
        ('["a"]<parameter=s>x</parameter>"y"', {"list": ["a"], "s": "x"}),
    ],
)
def test_a_string_that_lacks_its_end_hides_no_tag(written: str, arguments: Mapping[str, Any]) -> None:
    text = f"<tool_call><function=f><parameter=list>{written}</parameter></function></tool_call>"
    for cuts in ((), range(len(text))):
        ((name, data),) = parse(text, thinking=False, cuts=cuts)[2]
        assert (name, json.loads(data)) == ("f", arguments)


@pytest.mark.parametrize("rest", ["", "\\", "</parameter>", "</parameter><parameter=s>x</parameter></function>"])
def test_a_string_that_is_cut_off_is_no_value(rest: str) -> None:
    text = f'<tool_call><function=f><parameter=n>1</parameter><parameter=list>["a{rest}'
    assert parse(text, thinking=False, cuts=range(len(text))) == ("", "", [("f", '{"n": 1}')])
    assert parse(text, thinking=False) == ("", "", [("f", '{"n": 1}')])


@pytest.mark.parametrize("piece", ["text ", '\\"', '"', '</function>", "'])
def test_a_long_json_value_takes_linear_time(piece: str) -> None:
    for pieces in ([piece] * 20_000, [piece * 20_000]):
        parser = Parser(TOOLS, thinking=False)
        parser.push('<tool_call><function=f><parameter=list>["')
        began = time.perf_counter()
        for each in (*pieces, "\n</parameter>"):
            parser.push(each)
        parser.finish()
        assert time.perf_counter() - began < 5


def test_without_tools_a_call_is_content_without_its_tags() -> None:
    assert parse(call("f", n="1"), {}, thinking=False)[1].startswith("<function=f>")
    assert "tool_call" not in parse(call("f", n="1"), {}, thinking=False)[1]


PIECES = (
    *TAGS,
    *CALL_TAGS,
    *(
        "<function=f>",
        "<function=g>",
        "<parameter=n>",
        "<parameter=s>",
        "<tool_response>",
        "<function=get_weather>",
    ),
    *(
        "\n",
        " ",
        "4",
        "hello",
        "日本語",
        "é🙂",
        "<",
        "<<",
        "</",
        "think>",
        "tool_call>",
        "<tool",
        "_call>",
        "<th",
        "ink>",
    ),
    *("<parameter=list>", '"', '["', "\\"),
    *('{"a": 1}', "<parameter=city>", "Paris", ">", "\x00", "Привет", "مرحبا"),
)


def test_ten_thousand_random_answers_give_the_same_however_they_are_cut_and_leak_no_tag() -> None:
    rng = Random(20261124)
    for number in range(10_000):
        text = "".join(rng.choice(PIECES) for _ in range(rng.randint(0, 20)))
        tools, thinking, nonempty = (TOOLS if rng.random() < 0.8 else {}), rng.random() < 0.6, rng.random() < 0.3
        first = parse(text, tools, thinking=thinking, nonempty=nonempty)
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randint(0, 12))) if number % 4 else range(len(text))
        assert parse(text, tools, thinking=thinking, nonempty=nonempty, cuts=cuts) == first, text
        for tag in (*TAGS, *CALL_TAGS) if tools else TAGS:
            assert tag not in first[0], text
            assert tag not in first[1], text
        for _, data in first[2]:
            assert isinstance(json.loads(data), dict), text


@pytest.mark.parametrize(
    ("schema", "value", "expected"),
    [
        ({"type": "string"}, "4", "4"),
        ({"type": "string"}, "\n\nx\n", "\nx"),
        ({"type": "integer"}, "4", 4),
        ({"type": "integer"}, "4.0", 4),
        ({"type": "integer"}, "four", "four"),
        ({"type": "integer"}, "true", "true"),
        ({"type": "number"}, "4", 4),
        ({"type": "number"}, "NaN", "NaN"),
        ({"type": "number"}, "2.5", 2.5),
        ({"type": "boolean"}, "False", False),
        ({"type": ["null", "string"]}, "null", None),
        ({"type": "string"}, "null", "null"),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, "7", 7),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, "x", "x"),
        ({"enum": [1, 2]}, "2", 2),
        ({"type": "object"}, '{"a": [1]}', {"a": [1]}),
        ({"type": "array"}, "[" * 100_000, "[" * 100_000),
        ({}, "4", "4"),
        (True, "4", "4"),
        (None, "4", "4"),
    ],
)
def test_arguments(schema: object, value: str, expected: object) -> None:
    got = json.loads("{" + argument({"properties": {"k": schema}}, "k", value) + "}")["k"]
    assert (got, type(got)) == (expected, type(expected))


def test_arguments_whose_schema_stands_elsewhere() -> None:
    """As pydantic writes the schemas of nested models, enumerations and defaults."""
    loop = {"anyOf": [{"$ref": "#/$defs/Loop"}, {"$ref": "#/$defs/Point"}] * 50}
    schema = {
        "properties": {
            "point": {"$ref": "#/$defs/Point"},
            "maybe": {"anyOf": [{"$ref": "#/$defs/Point"}, {"type": "null"}]},
            "level": {"allOf": [{"$ref": "#/$defs/a~1b"}], "default": 1},
            "three": {"const": 3},
            "loop": {"$ref": "#/$defs/Loop"},
            "gone": {"$ref": "#/$defs/x/y"},
            "web": {"$ref": "http://x"},
            "self": {"$ref": "#"},
        },
        "$defs": {"Point": {"type": "object"}, "a/b": {"enum": [1, 2]}, "Loop": loop},
    }
    for key, value, expected in (
        ("point", '{"x": 1}', {"x": 1}),
        ("maybe", "null", None),
        ("maybe", '{"x": 1}', {"x": 1}),
        ("level", "2", 2),
        ("three", "3", 3),
        ("loop", '{"x": 1}', {"x": 1}),
        *((name, "1", "1") for name in ("gone", "web", "self", "unknown")),
    ):
        assert json.loads("{" + argument(schema, key, value) + "}") == {key: expected}


@pytest.mark.parametrize(("kind", "value"), [("number", "1e999"), ("number", "-1E+400"), ("array", "[1, 1e999]")])
def test_a_number_beyond_floats_stays_json(kind: str, value: str) -> None:
    assert argument({"properties": {"k": {"type": kind}}}, "k", f"\n{value}\n") == f'"k": {value}'


def test_arguments_without_properties_are_strings() -> None:
    assert argument({}, "k", "1") == '"k": "1"'
    assert argument({"properties": []}, 'a"b', "1") == '"a\\"b": "1"'
