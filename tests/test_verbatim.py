"""Answers held to a grammar: what a client gets is the grammar's text, tags and white space included."""

import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from fake_engine import PLAIN, FakeEngine
from grammar_answers import CLOSE, PROMPT, THINKING, Answerer
from in_process import Said, ask, client_of
from starlette.testclient import TestClient
from test_parsing import TOOLS, Whole, call, whole

from nanoserve.chat import parse_chat
from nanoserve.constraint import Answer, Constraints, ReasoningTokens
from nanoserve.grammar import Matcher, Regex, ToolCalls
from nanoserve.parameters import Limits
from nanoserve.parsing import Parser, Part
from nanoserve.request import Event, Request
from nanoserve.tokenizer import Tokenizer

TAGGED = json.dumps("</think> <think>a</think> <tool_call>\n<function=f>\n</tool_call></tool_response> ")
SPACED = "  \t<tool_call> two words </think>\n\n \n"


def parse(text: str, *, thinking: bool, tools: Any = None, cuts: Sequence[int] = ()) -> Whole:
    parser, parts, at = Parser(tools or {}, thinking, verbatim=True), list[Part](), 0
    for cut in (*cuts, len(text)):
        parts += parser.push(text[at:cut])
        at = cut
    return whole(parts + parser.finish())


def everywhere(text: str, **reading: Any) -> Whole:
    """What is read, if it is the same in one piece, in two however cut, and character by character."""
    first = parse(text, **reading)
    for cut in range(len(text)):
        assert parse(text, cuts=[cut], **reading) == first
    assert parse(text, cuts=range(len(text)), **reading) == first
    return first


@pytest.mark.parametrize("content", [TAGGED, SPACED, "", " ", "<", "<think>", "</think>x", "<tool_call>"])
@pytest.mark.parametrize("lead", ["", "\n", "\n\n"])
def test_content_is_given_as_it_is(content: str, lead: str) -> None:
    thoughts = "a <tool_call>and a </tool_response> \n"
    assert everywhere(f"{thoughts}</think>{lead}{content}", thinking=True) == ("a and a", content, [])
    assert everywhere(lead + content, thinking=False) == ("", lead + content, [])


def test_line_feeds_beyond_the_lead_are_content() -> None:
    assert everywhere("</think>\n\n\n\nx", thinking=True)[1] == "\n\nx"
    assert everywhere("</think> \nx", thinking=True)[1] == " \nx"


def test_beside_tools_it_is_calls_or_the_format() -> None:
    calls = call("f", n="1") + "\n" + call("get_weather", city="Oslo") + "\n"
    for thinking, before in ((True, "r</think>"), (False, ""), (False, "\n"), (True, "r</think>\n\n")):
        read = everywhere(before + calls, thinking=thinking, tools=TOOLS)
        assert read[1:] == ("", [("f", '{"n": 1}'), ("get_weather", '{"city": "Oslo"}')])
        assert everywhere(before + TAGGED, thinking=thinking, tools=TOOLS)[1:] == (TAGGED, [])


def test_reasoning_that_never_ends_is_no_content() -> None:
    assert everywhere("r <think> ", thinking=True) == ("r", "", [])


@pytest.mark.parametrize("prompt", [THINKING, PROMPT], ids=["thinking", "not"])
def test_what_a_grammar_lets_through_matches_it_when_it_is_read(
    tmp_path_factory: pytest.TempPathFactory, prompt: tuple[int, ...]
) -> None:
    answerer = Answerer(tmp_path_factory.mktemp("vocabulary"))
    pattern, line_feeds = r"\n{0,4}[ab]? ?(</?think>|<tool_call>)[ \n]{0,3}", set[int]()
    for seed in range(60):
        bias = {CLOSE: 9.0, answerer.id("\n"): 6.0}
        ids, ended = answerer.draw(answerer.constraint(Regex(pattern), prompt), seed, logit_bias=bias)
        assert ended
        _, content, calls = parse(answerer.text([id for id in ids if id != 11]), thinking=prompt == THINKING)
        assert re.fullmatch(pattern, content), (seed, content)
        assert not calls
        line_feeds.add(len(content) - len(content.lstrip("\n")))
    assert len(line_feeds) > 2


WORDS = ["", "\n", "\n\n", "\n\n\n", "\nx", "x", " "]
"""A vocabulary; 0 is the end token, and the one behind the last is ``</think>``."""


class Anything(Matcher):
    """Lets all words come, and notes those that are the grammar's."""

    def __init__(self) -> None:
        self.ended, self.said = False, list[int]()

    def allowed(self) -> int:
        return (1 << len(WORDS)) - 1

    def push(self, token: int) -> None:
        self.said.append(token)


@pytest.mark.parametrize("thinking", [True, False])
def test_the_parser_finds_where_the_grammar_began(thinking: bool) -> None:
    """For all answers of four words: line feeds are the content's or not, by the text alone."""
    known = ReasoningTokens.of([*(word.encode() for word in WORDS), b""], {"<think>": 8, "</think>": 7})
    most = 0
    for ids in itertools.product(range(1, len(WORDS)), repeat=4):
        matcher = Anything()
        answer = Answer(known, matcher, None, thinking, 0, b"")
        for id in (7, *ids) if thinking else ids:
            if not (answer.allowed() or b"")[0] >> id & 1:
                break
            answer.push(id)
        else:
            text = "".join(WORDS[id] for id in ids)
            content = "".join(WORDS[id] for id in matcher.said)
            assert parse("</think>" * thinking + text, thinking=thinking)[1] == content, ids
            most = max(most, len(content) - len(content.lstrip("\n")))
    assert most == 9 + 3 * (not thinking), "content may begin with as many as it likes"


@pytest.mark.parametrize(
    ("body", "verbatim"),
    [
        ({}, False),
        ({"thinking_token_budget": 5}, False),
        ({"guided_regex": "a"}, True),
        ({"response_format": {"type": "json_object"}}, True),
        ({"tools": True}, False),
        ({"tools": True, "tool_choice": "required"}, False),
        ({"tools": True, "response_format": {"type": "json_object"}}, True),
    ],
)
def test_which_answers_are_read_so(tokenizer: Tokenizer, body: dict[str, Any], verbatim: bool) -> None:
    tools = {"tools": [{"type": "function", "function": {"name": "f"}}]} if "tools" in body else {}
    messages = [{"role": "user", "content": "hi"}]
    made = parse_chat({"messages": messages, **body, **tools}, Limits("m", 512, {}, has_text=True))
    assert made.reading(tokenizer, [5]).verbatim is verbatim
    assert isinstance(made.held.grammar, ToolCalls) == ("tools" in body and len(body) > 1)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(max_context=2048)


@pytest.fixture
def client(engine: FakeEngine, tokenizer: Tokenizer) -> Iterator[TestClient]:
    with client_of(engine, tokenizer) as client:
        yield client


@pytest.mark.parametrize("spelled", [True, False], ids=["letters", "controls"])
def test_through_the_server(client: TestClient, engine: FakeEngine, tokenizer: Tokenizer, spelled: bool) -> None:
    """Streamed and not, which `ask` compares."""
    encode = tokenizer.encode_text if spelled else tokenizer.encode
    for body, content in (({"guided_json": {"type": "string"}}, TAGGED), ({"guided_regex": "(?s:.*)"}, SPACED)):
        engine.script = [*tokenizer.encode("r\n</think>\n\n"), *encode(content)]
        assert ask(client, **body) == Said("r", content, (), "stop")
        engine.script = list(encode(content))
        assert ask(client, **PLAIN, **body) == Said("", content, (), "stop")
    engine.script = list(encode(SPACED))
    assert ask(client, **PLAIN).content != SPACED, "and what is held to nothing is read as before"


def test_a_constraint_is_made_once_a_prompt_and_followed_once_a_choice(
    client: TestClient, engine: FakeEngine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, given = list[tuple[int, ...]](), list[Any]()
    of, generate = Constraints.of, engine.generate

    def counted(self: Constraints, prompt: tuple[int, ...], **options: Any) -> Any:
        made.append(prompt)
        return of(self, prompt, **options)

    def seen(request: Request, cancelled: Callable[[], bool]) -> Iterator[Event]:
        given.append(request.constraint)
        return generate(request, cancelled)

    monkeypatch.setattr(Constraints, "of", counted)
    monkeypatch.setattr(engine, "generate", seen)
    engine.script = list(tokenizer.encode("a"))
    body = {"prompt": [[30], [31], [30]], "n": 4, "guided_regex": "a*", "max_tokens": 5}
    assert len(client.post("/v1/completions", json=body).json()["choices"]) == 12
    assert made == [(30,), (31,)]
    assert len(given) == 12
    assert all(given)
    assert given[0]() is not given[1](), "each answer is followed by itself"
