"""Reasoning apart from content: the template's switches, what the prompt's end decides, and what is counted."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from fake_engine import PLAIN, FakeEngine, make_tokenizer
from in_process import CHAT, Said, ask, client_of, events_of, of_choice
from starlette.testclient import TestClient

from nanoserve.errors import RequestError
from nanoserve.protocol import Fields
from nanoserve.reasoning import opening, parse_thinking
from nanoserve.template import check_template
from nanoserve.tokenizer import Tokenizer

HI = [{"role": "user", "content": "hi"}]

NANO = frozenset({"enable_thinking", "truncate_history_thinking"})
SUPER, ULTRA = NANO | {"low_effort"}, NANO | {"medium_effort"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizer")


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return make_tokenizer(directory)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(max_context=2048)


@pytest.fixture
def client(engine: FakeEngine, tokenizer: Tokenizer) -> Iterator[TestClient]:
    with client_of(engine, tokenizer) as client:
        yield client


def with_template(directory: Path, tokenizer: Tokenizer, template: str) -> Tokenizer:
    assert tokenizer.has_chat_template
    return Tokenizer(json.loads((directory / "tokenizer.json").read_text()), template)


class TestSwitches:
    @pytest.mark.parametrize(
        ("effort", "known", "wanted"),
        [
            ("none", NANO, {"enable_thinking": False}),
            ("minimal", SUPER, {"enable_thinking": True, "low_effort": True}),
            ("low", SUPER, {"enable_thinking": True, "low_effort": True}),
            ("medium", NANO, {"enable_thinking": True}),
            ("medium", SUPER, {"enable_thinking": True}),
            ("medium", ULTRA, {"enable_thinking": True, "medium_effort": True}),
            ("high", SUPER, {"enable_thinking": True}),
            ("xhigh", NANO, {"enable_thinking": True}),
            ("max", ULTRA, {"enable_thinking": True}),
        ],
    )
    def test_an_effort_in_the_templates_terms(
        self, effort: str, known: frozenset[str], wanted: Mapping[str, bool]
    ) -> None:
        assert parse_thinking(Fields({"reasoning_effort": effort})).switches(known) == wanted

    @pytest.mark.parametrize(
        ("effort", "known", "words"),
        [
            ("low", NANO, "one of none, medium, high, xhigh, max: .* no low_effort"),
            ("minimal", ULTRA, "no low_effort"),
            ("none", frozenset[str](), "left out: .* no enable_thinking"),
            ("medium", frozenset({"truncate_history_thinking"}), "left out"),
        ],
    )
    def test_an_effort_that_the_template_cannot_do(self, effort: str, known: frozenset[str], words: str) -> None:
        with pytest.raises(RequestError, match=words) as refused:
            parse_thinking(Fields({"reasoning_effort": effort})).switches(known)
        assert refused.value.param == "reasoning_effort"

    @pytest.mark.parametrize(
        ("effort", "switch"),
        [
            ("none", {"enable_thinking": True}),
            ("high", {"enable_thinking": False}),
            ("low", {"low_effort": False}),
        ],
    )
    def test_two_fields_that_contradict_each_other(self, effort: str, switch: dict[str, bool]) -> None:
        thinking = parse_thinking(Fields({"reasoning_effort": effort, "chat_template_kwargs": switch}))
        with pytest.raises(RequestError, match="the contrary") as refused:
            thinking.switches(SUPER)
        assert refused.value.param == "reasoning_effort"

    def test_two_fields_that_agree(self) -> None:
        kwargs = {"low_effort": True, "truncate_history_thinking": False}
        thinking = parse_thinking(Fields({"reasoning_effort": "low", "chat_template_kwargs": kwargs}))
        assert thinking.switches(SUPER) == {**kwargs, "enable_thinking": True}

    def test_null_leaves_a_switch_to_the_template_and_the_parsers_own_is_not_for_it(self) -> None:
        kwargs = {"enable_thinking": None, "force_nonempty_content": True}
        thinking = parse_thinking(Fields({"chat_template_kwargs": kwargs}))
        assert thinking.switches(NANO) == {}
        assert thinking.nonempty

    @pytest.mark.parametrize(
        ("template", "variables"),
        [
            ("{% set thinking = thinking if thinking is defined else true %}{{ thinking }}", {"thinking"}),
            ("{% set a = b %}{{ a }}{{ c | default('x') }}", {"b", "c"}),
            ("{% for m in messages %}{% set t = m.x %}{% if t %}{% set t = t ~ 1 %}{% endif %}{{ t }}{% endfor %}",
             {"messages"}),
            ("{% for tool in tools %}{% set tool = tool.function %}{{ tool.name }}{% endfor %}", {"tools"}),
            ("{% generation %}{{ marked }}{% endgeneration %}", {"marked"}),
            ("{% macro m(x) %}{{ x }}{{ y }}{% endmacro %}{{ m(z) }}", {"y", "z"}),
            ("no variables", set[str]()),
        ],
    )  # fmt: skip
    def test_the_variables_that_a_template_reads(self, template: str, variables: set[str]) -> None:
        assert check_template(template, "x") == variables

    def test_our_template_has_the_two_of_nano(self, tokenizer: Tokenizer) -> None:
        assert tokenizer.switches == NANO

    def test_they_reach_the_template(self, client: TestClient) -> None:
        def prompt(**fields: Any) -> str:
            ids = client.post("/tokenize", json={"messages": HI, **fields}).json()["tokens"]
            return client.post("/detokenize", json={"tokens": ids}).json()["prompt"]

        assert prompt(reasoning_effort="none").endswith("<think></think>")
        assert prompt(reasoning_effort="high") == prompt()
        history = [*HI, {"role": "assistant", "content": "c", "reasoning": "r"}, *HI]
        assert "<think>\nr\n</think>\nc" not in prompt(messages=history)
        kept = prompt(messages=history, chat_template_kwargs={"truncate_history_thinking": False})
        assert "<think>\nr\n</think>\nc" in kept
        other_name = [*HI, {"role": "assistant", "content": "c", "reasoning_content": "r"}, *HI]
        assert kept == prompt(messages=other_name, chat_template_kwargs={"truncate_history_thinking": False})


class TestOpening:
    @pytest.mark.parametrize(
        ("end", "thinking", "closed"),
        [
            ("<think>\n", True, False),
            ("<think>", True, False),
            ("<think></think>", False, True),
            ("<think>\n\n</think>\n\n", False, True),
            ("assistant\n", False, False),
        ],
    )
    def test_the_prompts_end_decides(
        self, directory: Path, tokenizer: Tokenizer, end: str, thinking: bool, closed: bool
    ) -> None:
        # As control tokens, and as the text of a vocabulary that has none of them.
        other = with_template(directory, tokenizer, "{{ messages[0].content }}" + json.dumps(end)[1:-1])
        for ids in (tokenizer.encode("long before " * 9 + end), other.encode("x" + end.replace("<", "< "))):
            begins = opening(tokenizer, ids)
            spaced = "< " in tokenizer.decode(ids, skip_special=False)
            assert (begins.thinking, begins.closed) == ((thinking, closed) if not spaced else (False, False))

    def test_a_template_without_thinking(self, directory: Path, tokenizer: Tokenizer, engine: FakeEngine) -> None:
        plain = with_template(directory, tokenizer, "{% for m in messages %}{{ m.content }}\n{% endfor %}A: ")
        with client_of(engine, plain) as client:
            engine.script = plain.encode("just an answer")
            assert ask(client) == Said(content="just an answer", finish="stop")
            engine.script = plain.encode("<think>it thinks of itself</think>so")
            assert ask(client) == Said("it thinks of itself", "so", finish="stop")
            for refused in ({"reasoning_effort": "none"}, PLAIN):
                response = client.post(CHAT, json={"messages": HI, **refused})
                assert response.status_code == 400
                assert "enable_thinking" in response.json()["error"]["message"]


class TestAnswers:
    @pytest.mark.parametrize(
        ("text", "extra", "reasoning", "content"),
        [
            ("I see.\n</think>\nHello", {}, "I see.", "Hello"),
            ("I see.</think>Hello", {}, "I see.", "Hello"),
            ("never closed", {}, "never closed", ""),
            ("</think>Hello", {}, "", "Hello"),
            ("", {}, "", ""),
            ("a <think> b </think> c </think> d", {}, "a b", "c d"),
            ("Hello", PLAIN, "", "Hello"),
            ("  Hello </think> you", PLAIN, "", "Hello you"),
            ("<think>all the same</think>Hello", PLAIN, "all the same", "Hello"),
            # Switched off, and yet there is nothing else: the thoughts are what the user gets.
            ("<think>never closed", PLAIN, "never closed", "never closed"),
            ("Hello", {"reasoning_effort": "none"}, "", "Hello"),
            ("never closed", {"chat_template_kwargs": {"force_nonempty_content": True}}, *["never closed"] * 2),
            ("r</think> \n", {"chat_template_kwargs": {"force_nonempty_content": True}}, "r", "r"),
            ("r</think>c", {"chat_template_kwargs": {"force_nonempty_content": True}}, "r", "c"),
            ("r</think>", {"chat_template_kwargs": {"force_nonempty_content": False}}, "r", ""),
        ],
    )
    def test_the_rules(
        self,
        client: TestClient,
        engine: FakeEngine,
        tokenizer: Tokenizer,
        text: str,
        extra: dict[str, Any],
        reasoning: str,
        content: str,
    ) -> None:
        engine.script = tokenizer.encode(text)
        said = ask(client, **extra)
        assert " ".join(said.reasoning.split()) == reasoning
        assert " ".join(said.content.split()) == content
        assert said.finish == "stop"

    def test_it_comes_as_it_is_made(self, client: TestClient, engine: FakeEngine, tokenizer: Tokenizer) -> None:
        engine.script = tokenizer.encode("one two</think>three four")
        chunks = events_of(client.post(CHAT, json={"messages": HI, "stream": True}).text)[:-1]
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert deltas == [
            {"role": "assistant", "content": ""},
            *({"reasoning_content": text, "reasoning": text} for text in self.pieces(tokenizer, "one two")),
            *({"content": text} for text in self.pieces(tokenizer, "three four")),
            {},
        ]

    def pieces(self, tokenizer: Tokenizer, text: str) -> list[str]:
        return [tokenizer.token_text(id) for id in tokenizer.encode(text)]

    @pytest.mark.parametrize("cut", [1, 3, 5])
    def test_an_answer_that_is_cut_off(
        self, client: TestClient, engine: FakeEngine, tokenizer: Tokenizer, cut: int
    ) -> None:
        engine.script = tokenizer.encode("abc def ghi</think>jkl")
        said = ask(client, max_tokens=cut)
        assert said == Said(tokenizer.decode(engine.script[:cut]).rstrip(), "", (), "length")

    def test_reasoning_is_counted_with_its_end(
        self, client: TestClient, engine: FakeEngine, tokenizer: Tokenizer
    ) -> None:
        def counts(text: str, **extra: Any) -> tuple[int, int]:
            engine.script = tokenizer.encode(text)
            usage = client.post(CHAT, json={"messages": HI, **extra}).json()["usage"]
            assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
            return usage["completion_tokens"], usage["completion_tokens_details"]["reasoning_tokens"]

        thoughts, answer = len(tokenizer.encode("let us see")), len(tokenizer.encode("so"))
        assert counts("let us see</think>so") == (thoughts + 1 + answer + 1, thoughts + 1)
        assert counts("so", **PLAIN) == (answer + 1, 0)
        assert counts("let us see</think>so", n=2) == (2 * (thoughts + answer + 2), 2 * (thoughts + 1))
        assert counts("let us see", max_tokens=1) == (1, 1)

    def test_stop_strings_are_searched_in_the_content(
        self, client: TestClient, engine: FakeEngine, tokenizer: Tokenizer
    ) -> None:
        engine.script = tokenizer.encode("first a stop here\n</think>\n\nthen stop there")
        assert ask(client, stop=["stop"]) == Said("first a stop here", "then ", (), "stop")
        # The line feeds between reasoning and content are no content, and end nothing.
        assert ask(client, stop="\n").content == "then stop there"

    def test_every_token_has_its_logprob(
        self, client: TestClient, engine: FakeEngine, tokenizer: Tokenizer
    ) -> None:
        engine.script = tokenizer.encode("why\n</think>\nso")
        body = {"messages": HI, "logprobs": True, "top_logprobs": 1}
        (choice,) = client.post(CHAT, json=body).json()["choices"]
        whole = choice["logprobs"]["content"]
        assert "".join(entry["token"] for entry in whole) == "why\n</think>\nso<|im_end|>"
        chunks = events_of(client.post(CHAT, json={**body, "stream": True}).text)[:-1]
        streamed = [c["choices"][0]["logprobs"]["content"] for c in chunks if c["choices"][0]["logprobs"]]
        assert [entry for entries in streamed for entry in entries] == whole

    def test_text_completions_stay_raw(self, client: TestClient, engine: FakeEngine, tokenizer: Tokenizer) -> None:
        engine.script = tokenizer.encode("a</think>b<tool_call>c")
        answer = client.post("/v1/completions", json={"prompt": "x <think>", "max_tokens": 50}).json()
        assert answer["choices"][0]["text"] == "a</think>b<tool_call>c"
        assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}

    def test_an_answer_goes_back_as_it_came(
        self, client: TestClient, engine: FakeEngine, tokenizer: Tokenizer
    ) -> None:
        for text in ("why</think>so", "never closed", "</think>so", "</think>"):
            engine.script = tokenizer.encode(text)
            message = client.post(CHAT, json={"messages": HI}).json()["choices"][0]["message"]
            again = client.post(CHAT, json={"messages": [*HI, message, *HI]})
            assert again.status_code == 200, again.text
            said = of_choice(again.json()["choices"][0])
            assert (said.reasoning, said.content) == (message["reasoning"] or "", message["content"])
