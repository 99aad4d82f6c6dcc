"""Constraints of whole answers: where the grammar begins, where the reasoning ends, and what the engine does."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from grammar_answers import CLOSE, END, OPEN, PROMPT, THINKING, VOCAB, Answerer, allowed, may
from test_parsing import whole

import nanoserve
from nanoserve.arguments import ENDS
from nanoserve.checkpoint import open_checkpoint
from nanoserve.config import EngineConfig
from nanoserve.constraint import Constraints
from nanoserve.engine import Engine
from nanoserve.errors import RequestError
from nanoserve.grammar import Choice, JsonSchema, Regex, ToolCalls
from nanoserve.local import LocalEngine
from nanoserve.parsing import CallArguments, CallBegun, Content, Parser, Reasoning
from nanoserve.random_tokenizer import write_tokenizer
from nanoserve.request import Event, Finish, Request, SamplingParams, Token
from nanoserve.startup import load_engine, prepare
from nanoserve.tokenizer import Tokenizer
from nanoserve.worker import Worker

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "string"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
TOOLS: Mapping[str, Mapping[str, Any]] = {
    "weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "free text"},
            "days": {"type": "integer", "minimum": 1, "maximum": 14},
            "unit": {"type": "string", "enum": ["C", "F"]},
        },
        "required": ["unit", "city"],
    },
    "set": {
        "type": "object",
        "properties": {
            "on": {"type": "boolean"},
            "tags": {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
            "options": {"$ref": "#/$defs/Options"},
            "five": {"const": 5},
            "note": {"type": ["string", "null"]},
            "mixed": {"enum": ["a", 1, None, "null", "1"]},
            "kind": {"anyOf": [{"enum": ["p", "q"], "type": "string"}, {"type": "null"}]},
            "day": {"type": "string", "format": "date"},
            "word": {"type": "string", "pattern": "^[a-c]+$", "maxLength": 5},
            "short": {"type": "string", "minLength": 2, "maxLength": 4},
            "any": {},
            "colour": {"$ref": "#/$defs/Colour"},
        },
        "required": ["on", "tags"],
        "$defs": {
            "Options": {
                "type": "object",
                "properties": {"x": {"type": "number"}},
                "required": ["x"],
                "additionalProperties": False,
            },
            "Colour": {"enum": ["red", "green"], "type": "string"},
        },
    },
    "now": {},
}


@pytest.fixture(scope="module")
def answerer(tmp_path_factory: pytest.TempPathFactory) -> Answerer:
    return Answerer(tmp_path_factory.mktemp("vocabulary"))


def parsed(answerer: Answerer, ids: list[int], *, thinking: bool) -> tuple[str, str, list[tuple[str, Any]]]:
    """(reasoning, content, calls) as the server takes an answer apart."""
    parser = Parser(TOOLS, thinking=thinking)
    parts = [*parser.push(answerer.text(ids)), *parser.finish()]
    names = [part.name for part in parts if isinstance(part, CallBegun)]
    texts = [
        "".join(p.json for p in parts if isinstance(p, CallArguments) and p.index == i) for i in range(len(names))
    ]
    reasoning = "".join(part.text for part in parts if isinstance(part, Reasoning))
    content = "".join(part.text for part in parts if isinstance(part, Content))
    return reasoning, content, list(zip(names, map(json.loads, texts), strict=True))


def test_the_grammar_begins_behind_the_reasoning(answerer: Answerer) -> None:
    reasoned = 0
    for seed in range(30):
        constraint = answerer.constraint(JsonSchema(SCHEMA), THINKING)
        ids, ended = answerer.draw(constraint, seed, logit_bias={CLOSE: 4.0, END: 9.0, 10: 9.0, 14: 9.0})
        assert ended
        assert ids.count(CLOSE) == 1
        reasoning, content, calls = parsed(answerer, ids, thinking=True)
        jsonschema.validate(json.loads(content), SCHEMA)
        assert not calls
        reasoned += bool(reasoning)
    assert reasoned > 10, "the model must have had its say"


@pytest.mark.parametrize("tag", ["</think>", "<tool_call>", "<function="])
def test_reasoning_cannot_spell_what_would_end_it(answerer: Answerer, tag: str) -> None:
    for cut in range(1, len(tag)):
        constraint = answerer.constraint(Choice(("yes",)), THINKING)
        assert answerer.accepts(constraint, f"x {tag[:cut]}")
        assert answerer.accepts(constraint, f" {tag[:-1]}"), "a tag that is broken off is text"
        assert not answerer.accepts(constraint, tag[-1])
        assert answerer.accepts(constraint, "x" + tag[-1])


@pytest.mark.parametrize("tag", ["</think>", "<tool_call>", "<function="])
def test_tokens_of_several_characters_spell_no_tag_either(answerer: Answerer, tag: str) -> None:
    texts = {id: answerer.tokenizer.token_bytes(id) for id in range(20, 512)}
    for first, text in texts.items():
        constraint = answerer.constraint(Choice(("yes",)), THINKING)
        assert answerer.accepts(constraint, tag[:-4])
        if answerer.take(constraint, first):
            assert texts.keys() - allowed(constraint) == {
                id for id in texts if tag.encode() in tag[:-4].encode() + text + texts[id]
            }


def test_without_open_reasoning_the_grammar_begins_at_once(answerer: Answerer) -> None:
    for prompt in (PROMPT, (*THINKING, CLOSE), (*THINKING, CLOSE, OPEN, CLOSE, 300)):
        constraint = answerer.constraint(Regex("\\{.*"), prompt)
        assert may(constraint, answerer.id("{"))
        assert not may(constraint, answerer.id("\n"))
        assert not may(constraint, CLOSE)


def test_two_line_feeds_may_stand_before_the_content(answerer: Answerer) -> None:
    constraint = answerer.constraint(Choice(("yes",)), THINKING)
    assert answerer.take(constraint, CLOSE)
    assert not may(constraint, END)
    assert answerer.accepts(constraint, "\n\n")
    assert not may(constraint, answerer.id("\n"))
    assert answerer.accepts(constraint, "yes")
    assert constraint.ended


def closed_after(answerer: Answerer, constraint: Any, ids: list[int]) -> list[int]:
    """The tokens that are forced once these have been said."""
    for id in ids:
        assert answerer.take(constraint, id)
    forced: list[int] = []
    while CLOSE not in forced:
        (id,) = allowed(constraint)
        constraint.push(id)
        forced.append(id)
    return forced


@pytest.mark.parametrize("grammar", [None, Choice(("yes",))], ids=["alone", "with a grammar"])
def test_a_budget_closes_the_reasoning_on_a_line_of_its_own(answerer: Answerer, grammar: Choice | None) -> None:
    a, feed = answerer.id("a"), answerer.id("\n")
    assert closed_after(answerer, answerer.constraint(grammar, THINKING, 3), [a, a, a]) == [feed, CLOSE]
    assert closed_after(answerer, answerer.constraint(grammar, THINKING, 3), [a, a, feed]) == [CLOSE]
    assert closed_after(answerer, answerer.constraint(grammar, THINKING, 0), []) == [feed, CLOSE]
    assert closed_after(answerer, answerer.constraint(grammar, (*THINKING, feed), 0), []) == [CLOSE]


def test_behind_a_forced_end_comes_what_would_have_come(answerer: Answerer) -> None:
    free = answerer.constraint(None, THINKING, 0)
    closed_after(answerer, free, [])
    assert free.allowed() is None
    held = answerer.constraint(Choice(("yes",)), THINKING, 0)
    closed_after(answerer, held, [])
    assert answerer.accepts(held, "\nyes")
    assert held.ended


def test_a_budget_leaves_an_answer_alone_that_has_closed_its_reasoning(answerer: Answerer) -> None:
    by_token = answerer.constraint(None, THINKING, 5)
    by_token.push(CLOSE)
    spelled = answerer.constraint(None, THINKING, 5)
    for id in answerer.tokenizer.encode_text("ab</think>"):
        spelled.push(id)
    for constraint in (by_token, spelled, answerer.constraint(None, PROMPT, 5)):
        for _ in range(20):
            assert constraint.allowed() is None
            constraint.push(300)


def test_a_budget_also_ends_reasoning_that_the_model_opened_itself(answerer: Answerer) -> None:
    constraint = answerer.constraint(None, PROMPT, 2)
    for id in (OPEN, 300, 300):
        assert constraint.allowed() is None
        constraint.push(id)
    assert constraint.allowed() is not None


@pytest.mark.parametrize("budget", [-1, True, 2.5, "3"])
def test_a_wrong_budget_is_refused(answerer: Answerer, budget: Any) -> None:
    with pytest.raises(RequestError) as caught:
        answerer.constraints.of(THINKING, None, budget)
    assert caught.value.param == "thinking_budget"


def test_a_vocabulary_without_the_tags_cannot_have_a_budget(answerer: Answerer, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, 512)
    spec = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    spec["added_tokens"] = [token for token in spec["added_tokens"] if "think" not in token["content"]]
    constraints = Constraints(Tokenizer(spec), VOCAB, {END})
    with pytest.raises(RequestError, match="</think>"):
        constraints.of(PROMPT, None, 5)
    with pytest.raises(RequestError, match="end token"):
        Constraints(answerer.tokenizer, VOCAB, ()).of(PROMPT, Regex("a"))


@pytest.mark.parametrize("several", [True, False])
def test_required_calls_are_complete_and_typed(answerer: Answerer, several: bool) -> None:
    names: set[str] = set()
    most = 0
    for seed in range(24):
        ids, ended = answerer.draw(answerer.constraint(ToolCalls(TOOLS, several)), seed, limit=500)
        _, content, calls = parsed(answerer, ids, thinking=False)
        if not ended:
            continue
        assert not content
        assert calls
        most = max(most, len(calls))
        for name, arguments in calls:
            names.add(name)
            schema = {"additionalProperties": False, "properties": {}, **TOOLS[name]}
            jsonschema.Draft202012Validator(schema).validate(arguments)
    assert names == set(TOOLS)
    assert (most > 1) == several


def test_a_named_call_comes_after_the_reasoning(answerer: Answerer) -> None:
    grammar = ToolCalls({"weather": TOOLS["weather"]}, several=False)
    for seed in range(10):
        ids, ended = answerer.draw(answerer.constraint(grammar, THINKING, 20), seed)
        assert ended
        _, content, calls = parsed(answerer, ids, thinking=True)
        assert not content
        assert [name for name, _ in calls] == ["weather"]


CALL = "\n<function=weather>\n<parameter=city>\nOslo <b> & </parameters>\n\n</parameter>\n"


def test_what_a_call_may_say(answerer: Answerer) -> None:
    def begun() -> Any:
        constraint = answerer.constraint(ToolCalls(TOOLS))
        assert answerer.accepts(constraint, "\n\n")
        assert not may(constraint, END)
        assert answerer.take(constraint, 14)
        return constraint

    constraint = begun()
    assert answerer.accepts(constraint, CALL + "<parameter=unit>\nC\n</parameter>\n</function>\n")
    assert answerer.take(constraint, 15)
    assert may(constraint, END)
    assert may(constraint, answerer.id("\n"))
    for right, wrong in (
        ("\n<function=", "other"),
        ("\n<function=weather>\n<parameter=", "wind"),
        ("\n<function=weather>\n<parameter=days>\n1", "5"),
        ("\n<function=weather>\n<parameter=unit>\n", "K"),
        ("\n<function=weather>\n<", "/function>"),
        (CALL + "<", "/function>"),
        (CALL + "<parameter=", "city>"),
        ("\n<function=weather>\n<parameter=city>\n</function", ">"),
        ("\n<function=weather>\n<parameter=city>\n<parameter", "="),
        ("\n<function=weather>\n<parameter=city>\n<tool_call", ">"),
    ):
        constraint = begun()
        assert answerer.accepts(constraint, right), right
        assert not answerer.accepts(constraint, wrong), (right, wrong)


@pytest.mark.parametrize("tag", ENDS)
def test_what_a_call_says_in_json_is_read_back(answerer: Answerer, tag: str) -> None:
    code = {"type": "array", "items": {"type": "integer"}, "maxItems": 0}
    name = {"type": "array", "items": {"type": "string"}, "maxItems": 2}
    schema = {"type": "object", "properties": {"code": code, "name": name}, "required": ["code"]}
    constraint = answerer.constraint(ToolCalls({"save": schema}, several=False))
    text = f'<function=save>\n<parameter=name>\n["{tag}"]\n</parameter>\n<parameter=code>\n[]\n</parameter>\n'
    assert answerer.take(constraint, 14)
    assert answerer.accepts(constraint, f"\n{text}</function>\n")
    parser = Parser({"save": schema}, thinking=False, single=True)
    parts = parser.push(f"<tool_call>\n{text}</function>\n</tool_call>")
    assert json.loads(whole(parts + parser.finish())[2][0][1]) == {"name": [tag], "code": []}


def test_a_text_from_a_list_is_never_one_that_ends_its_parameter(answerer: Answerer) -> None:
    kind = {"enum": ["see </function>", "see it"]}
    constraint = answerer.constraint(ToolCalls({"f": {"properties": {"kind": kind}}}))
    assert answerer.take(constraint, 14)
    assert answerer.accepts(constraint, "\n<function=f>\n<parameter=kind>\nsee ")
    assert not answerer.accepts(constraint, "<")


@pytest.mark.parametrize(
    ("parameters", "word"),
    [
        ({"properties": {"a": {"type": "string", "format": "phone"}}}, "phone"),
        ({"properties": {"a": {"type": "string", "uniqueItems": True}}}, "uniqueItems"),
        ({"properties": {"a": {"anyOf": [{"type": "string"}, {"type": "integer", "minimum": 3}]}}}, "conditions"),
        ({"properties": {"a": {"enum": ["5", "null"], "type": ["integer", "null", "string"]}}}, "values"),
        ({"properties": {"a": {"enum": ["</parameter>"]}}}, "values"),
        ({"properties": {"a": {"allOf": [{"type": "string"}, {"minLength": 3}]}}}, "type"),
        ({"properties": {"a": {"type": "string", "minLength": "9}"}}}, "whole number"),
        ({"properties": {"a": {"type": "string", "pattern": 3}}}, "pattern"),
        ({"properties": {"a": {"type": [{}]}}}, "strings"),
        ({"properties": {"a": {"enum": "abc"}}}, "an array"),
        ({"required": [{}]}, "strings"),
        ({"type": "string"}, "object"),
        ({"properties": {"a": {"enum": [str(i) for i in range(60_000)]}}}, "50000"),
        ({"properties": {"a": {"enum": [f"number {i}" for i in range(40_000)]}}}, "262144"),
        (
            {
                "properties": {f"p{i}": {"type": "array", "items": {"$ref": "#/$defs/D"}} for i in range(64)},
                "$defs": {"D": {"enum": [f"value {i}" for i in range(1000)]}},
            },
            "262144",
        ),
        ({"properties": {"a>": {"type": "string"}}}, "a>"),
        ({"properties": {f"p{i}": {"type": "string"} for i in range(65)}}, "64"),
        ({"minProperties": 1}, "minProperties"),
    ],
)
def test_tools_that_no_call_can_be_held_to_are_refused(answerer: Answerer, parameters: Any, word: str) -> None:
    with pytest.raises(RequestError) as caught:
        answerer.constraints.of(PROMPT, ToolCalls({"weather": TOOLS["weather"], "odd": parameters}), param="tools")
    assert caught.value.param == "tools"
    assert word in str(caught.value)


@pytest.fixture(scope="module")
def local(random_checkpoint: Path) -> Iterator[LocalEngine]:
    with nanoserve.load(random_checkpoint, device="cpu", max_context=1024) as engine:
        yield engine


CHAT = [{"role": "user", "content": "Hello"}]


def test_a_random_model_answers_as_it_must(local: LocalEngine) -> None:
    """Its greedy answer too: no probability is so small that the mask would let it through, or so large."""
    schema = {**SCHEMA, "properties": {"a": {"type": "integer", "maximum": 99}, "b": {"enum": ["x", "y"]}}}
    for seed, temperature in enumerate((0.0, 1.0, 1.0, 2.0)):
        answer = local.generate(
            CHAT, grammar=JsonSchema(schema), thinking_budget=4, temperature=temperature, seed=seed, max_tokens=500
        )
        assert answer.finish_reason == "stop"
        content = answer.text.rpartition("</think>")[2]
        jsonschema.validate(json.loads(content), schema)
    choice = local.generate("abc", grammar=Choice(("yes",)), top_k=1, top_p=0.1, min_p=0.5, max_tokens=9)
    assert (choice.text, choice.finish_reason) == ("yes", "stop")
    assert "".join(d.text for d in local.stream("abc", grammar=Choice(("no",)), max_tokens=9)) == "no"


def test_an_answer_that_is_complete_with_its_last_token_has_not_been_cut(local: LocalEngine) -> None:
    whole = local.generate("abc", grammar=Regex("[ab]{12}"), max_tokens=12, seed=1)
    assert (len(whole.text), whole.finish_reason) == (12, "stop")
    fewer = len(whole.token_ids) - 1
    assert local.generate("abc", grammar=Regex("[ab]{12}"), max_tokens=fewer, seed=1).finish_reason == "length"


def test_the_end_of_a_grammar_is_the_end_whatever_min_tokens_says(local: LocalEngine) -> None:
    answer = local.generate("abc", grammar=Regex("ab?"), min_tokens=50, max_tokens=60, temperature=0.0)
    assert (answer.text, answer.finish_reason) == ("ab", "stop")


def test_logprobs_are_of_the_models_own_distribution(local: LocalEngine) -> None:
    free = local.generate("abc", max_tokens=1, temperature=0.0, logprobs=5)
    held = local.generate("abc", grammar=Choice(("yes",)), max_tokens=9, temperature=0.0, logprobs=5)
    assert free.logprobs is not None
    assert held.logprobs is not None
    assert held.logprobs[0].top == free.logprobs[0].top
    assert held.logprobs[0].logprob < free.logprobs[0].logprob


def test_what_does_not_go_together_is_refused(local: LocalEngine, random_checkpoint: Path) -> None:
    with pytest.raises(RequestError) as caught:
        local.generate("abc", grammar=Regex("a"), ignore_eos=True)
    assert caught.value.param == "ignore_eos"
    with pytest.raises(RequestError) as caught:
        local.generate([5, 9999], grammar=Regex("a"))
    assert caught.value.param == "prompt"
    assert local.generate("abc", max_tokens=2, ignore_eos=True).finish_reason == "length", "and nothing is broken"


@pytest.fixture(scope="module")
def engine(random_checkpoint: Path) -> Engine:
    options = EngineConfig(device="cpu", max_context=64)
    return load_engine(prepare(open_checkpoint(random_checkpoint), options), lambda done, total: None)


class Anything:
    """Allows every id, by a mask."""

    ended = False

    def allowed(self) -> bytes | None:
        return b"\xff" * (512 // 8)

    def push(self, token: int) -> None:
        pass


class Failing(Anything):
    def push(self, token: int) -> None:
        raise RequestError("too complex")


def events(engine: Engine, **fields: Any) -> list[Event]:
    sampling = SamplingParams(max_tokens=20, seed=3, logprobs=2, top_p=0.9)
    return list(engine.generate(Request((5, 100, 200), sampling, **fields)))


def test_a_mask_changes_nothing_but_what_it_forbids(engine: Engine) -> None:
    before = events(engine)
    assert events(engine, constraint=Anything) == before
    events(engine, constraint=lambda: Only(7))
    assert events(engine) == before, "and it is gone with its request"


class Only(Anything):
    def __init__(self, id: int) -> None:
        self._mask = (1 << id).to_bytes(512 // 8, "little")

    def allowed(self) -> bytes | None:
        return self._mask


@pytest.mark.parametrize("id", [0, 7, 31, 32, 63, 500, 511])
def test_a_mask_of_one_forces_it(engine: Engine, id: int) -> None:
    got = [event.id for event in events(engine, constraint=lambda: Only(id)) if isinstance(event, Token)]
    assert got == [id] * 20


def test_a_constraint_that_fails_ends_its_request_and_no_other(engine: Engine) -> None:
    worker = Worker(lambda: engine, max_queue=4)
    try:
        worker.wait_ready(10)
        got = list(worker.stream(Request((5,), constraint=Failing)))
        assert got[-1] == Finish("error", "too complex")
        end = list(worker.stream(Request((5,), SamplingParams(max_tokens=1))))[-1]
        assert isinstance(end, Finish)
        assert end.reason in ("length", "stop")
    finally:
        worker.close(10)
