"""Tool calls through the endpoint: what the model says, and what a client gets and sends back."""

from collections.abc import Iterator, Mapping, Sequence
from random import Random
from typing import Any

import pytest
from fake_engine import PLAIN, FakeEngine
from in_process import CHAT, Said, ask, client_of, events_of, of_choice, of_chunks
from starlette.testclient import TestClient
from test_parsing import CALL_TAGS, PIECES, TAGS, call
from test_text import random_cut

from nanoserve.chat import parse_chat
from nanoserve.chat_answer import ChatWriter
from nanoserve.choice import ChatChoice, Piece, Reading
from nanoserve.parameters import Limits
from nanoserve.request import Finish, Token
from nanoserve.tokenizer import Tokenizer

HI = [{"role": "user", "content": "hi"}]


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [
    tool(
        "f",
        n={"type": "integer"},
        s={"type": "string"},
        b={"type": "boolean"},
        x={"type": ["number", "null"]},
        list={"type": "array"},
    ),
    tool("get_weather", city={"type": "string"}),
]
SCHEMAS = {entry["function"]["name"]: entry["function"]["parameters"] for entry in TOOLS}


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(max_context=8192)


@pytest.fixture
def client(engine: FakeEngine, tokenizer: Tokenizer) -> Iterator[TestClient]:
    with client_of(engine, tokenizer) as client:
        yield client


@pytest.fixture
def says(engine: FakeEngine, tokenizer: Tokenizer, client: TestClient) -> Any:
    """The message of an answer of these words."""

    def says(text: str, **body: Any) -> Said:
        engine.script = tokenizer.encode(text)
        return ask(client, **{"tools": TOOLS, **body})

    return says


class TestCalls:
    def test_a_call_is_typed_and_complete(self, says: Any) -> None:
        said = says("Hm.\n</think>\nLook:\n" + call("f", n="4", s="4", b="True", x="null", list='["a", 1]'))
        assert (said.reasoning, said.content, said.finish) == ("Hm.", "Look:", "tool_calls")
        assert said.calls[0][0] == "f"
        assert said.arguments == [{"n": 4, "s": "4", "b": True, "x": None, "list": ["a", 1]}]

    def test_several_calls(self, says: Any) -> None:
        text = "r</think>" + call("f", n="1") + "\n" + call("get_weather", city="Oslo") + call("f")
        assert says(text).calls == (("f", '{"n": 1}'), ("get_weather", '{"city": "Oslo"}'), ("f", "{}"))

    def test_parallel_tool_calls_off_ends_behind_the_first(
        self, says: Any, engine: FakeEngine, tokenizer: Tokenizer, client: TestClient
    ) -> None:
        text = "r</think>a" + call("f", n="1") + call("get_weather", city="Oslo") + "b"
        assert says(text, parallel_tool_calls=False) == Said("r", "a", (("f", '{"n": 1}'),), "tool_calls")
        assert len(says(text, parallel_tool_calls=True).calls) == 2
        assert says("</think>no call", parallel_tool_calls=False).content == "no call"
        # Generation ends there too: what would come is neither waited for nor counted.
        first = tokenizer.encode("r</think>a" + call("f", n="1").removesuffix("\n</tool_call>"))
        body = {"messages": HI, "tools": TOOLS, "parallel_tool_calls": False}
        engine.script = tokenizer.encode(text * 50)
        assert client.post(CHAT, json=body).json()["usage"]["completion_tokens"] == len(first)

    def test_a_call_inside_the_reasoning_ends_it(self, says: Any) -> None:
        said = says("I call it. " + call("f", n="1") + "\n</think>\nDone.")
        assert said == Said("I call it.", "Done.", (("f", '{"n": 1}'),), "tool_calls")

    @pytest.mark.parametrize(
        "thought",
        [
            "a <tool_call> block",
            "write <function=NAME> in it",
            "<tool_call>\n<function=unknown>\n<parameter=n>\n1\n</parameter>\n</function>\n</tool_call>",
            "</tool_call>",
            "<tool_call>",
            "<parameter=x>",
        ],
    )
    def test_thoughts_about_calls_stay_thoughts(self, says: Any, thought: str) -> None:
        said = says(f"I think of {thought} first\n</think>\nHello")
        assert (said.content, said.calls) == ("Hello", ())
        assert said.reasoning.startswith("I think of")
        assert said.reasoning.endswith("first")

    def test_a_tool_that_is_not_there_is_content_without_tags(self, says: Any) -> None:
        said = says("</think>Now " + call("get_wether", city="Oslo"))
        assert said.calls == ()
        assert said.finish == "stop"
        assert "Oslo" in said.content
        assert not any(tag in said.content for tag in (*TAGS, *CALL_TAGS))

    @pytest.mark.parametrize(
        ("text", "calls"),
        [
            ("<tool_call><function=f><parameter=n>4<parameter=s>x</function>", ['{"n": 4, "s": "x"}']),
            ("<function=f><parameter=n>4</parameter></function>", ['{"n": 4}']),
            ("<tool_call>\n<function=f>\n<parameter=n>\n4\n</parameter>\n</tool_call>", ['{"n": 4}']),
            ("<tool_call>\n<function=f>\n<parameter=n>\nfour\n</parameter></function>", ['{"n": "four"}']),
            ("<tool_call>\n<function=f>\n<parameter=n>4</parameter>\n<parameter=s>\ncut o", ['{"n": 4}']),
            ("<tool_call>\n<function=f", []),
            ("<tool_call>", []),
            ("<function=>", []),
        ],
    )
    def test_broken_calls(self, says: Any, text: str, calls: list[str]) -> None:
        said = says("</think>" + text)
        assert [arguments for _, arguments in said.calls] == calls
        assert not any(tag in said.content for tag in (*TAGS, *CALL_TAGS))

    def test_a_call_that_is_cut_off_ends_with_length(self, says: Any, tokenizer: Tokenizer) -> None:
        text = "</think>" + call("f", n="1", s="a long text")
        said = says(text, max_tokens=len(tokenizer.encode(text)) - 30)
        assert said.finish == "length"
        assert said.calls == (("f", '{"n": 1}'),)

    def test_content_is_null_only_beside_calls(
        self, client: TestClient, engine: FakeEngine, tokenizer: Tokenizer
    ) -> None:
        for text, content in ((call("f"), None), ("", ""), ("a" + call("f"), "a"), ("a", "a")):
            engine.script = tokenizer.encode("</think>" + text)
            message = client.post(CHAT, json={"messages": HI, "tools": TOOLS}).json()["choices"][0]["message"]
            assert message["content"] == content
            assert ("tool_calls" in message) == ("f" in text)

    def test_the_chunks_of_a_call(self, client: TestClient, engine: FakeEngine, tokenizer: Tokenizer) -> None:
        engine.script = tokenizer.encode("</think>" + call("f", n="1", s="x"))
        chunks = events_of(client.post(CHAT, json={"messages": HI, "tools": TOOLS, "stream": True}).text)[:-1]
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        calls = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
        assert calls[0]["function"] == {"name": "f", "arguments": ""}
        assert [piece["function"]["arguments"] for piece in calls[1:]] == ["{", '"n": 1', ', "s": "x"', "}"]
        assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
        assert chunks[-1]["timings"]["predicted_n"] == len(engine.script) + 1
        assert not any("timings" in chunk for chunk in chunks[:-1])

    def test_several_choices(self, client: TestClient, engine: FakeEngine, tokenizer: Tokenizer) -> None:
        engine.script = tokenizer.encode("r</think>" + call("f", n="1"))
        body = {"messages": HI, "tools": TOOLS, "n": 3}
        choices = client.post(CHAT, json=body).json()["choices"]
        assert {of_choice(choice) for choice in choices} == {Said("r", "", (("f", '{"n": 1}'),), "tool_calls")}
        assert len({choice["message"]["tool_calls"][0]["id"] for choice in choices}) == 3
        chunks = events_of(client.post(CHAT, json={**body, "stream": True}).text)[:-1]
        assert [of_chunks(chunks, i) for i in range(3)] == [of_choice(choice) for choice in choices]

    def test_stop_strings_do_not_cut_arguments(self, says: Any) -> None:
        said = says("</think>go " + call("get_weather", city="stop") + " then stop here", stop="stop")
        assert said.calls == (("get_weather", '{"city": "stop"}'),)
        assert said.content.split() == ["go", "then"]
        assert said.finish == "tool_calls"
        assert says("</think>halt " + call("f"), stop="halt") == Said(finish="stop")

    def test_logprobs_cover_calls_too(self, client: TestClient, engine: FakeEngine, tokenizer: Tokenizer) -> None:
        engine.script = tokenizer.encode("</think>" + call("f", n="1"))
        body = {"messages": HI, "tools": TOOLS, "logprobs": True}
        entries = client.post(CHAT, json=body).json()["choices"][0]["logprobs"]["content"]
        assert "".join(entry["token"] for entry in entries) == "</think>" + call("f", n="1") + "<|im_end|>"

    def test_without_tools_nothing_is_called(self, says: Any) -> None:
        said = says("</think>" + call("f", n="1"), tools=[])
        assert said.calls == ()
        assert "tool_call>" not in said.content

    def test_the_stream_is_not_silent_while_a_long_value_is_written(self, tokenizer: Tokenizer) -> None:
        engine = FakeEngine(max_context=8192, delay=0.02)
        engine.script = tokenizer.encode("</think>" + call("get_weather", city="abcdefgh " * 8))
        with client_of(engine, tokenizer, ping_interval=0.1) as client:
            text = client.post(CHAT, json={"messages": HI, "tools": TOOLS, "stream": True}).text
        assert text.count(": ping\n\n") >= 3
        assert of_chunks(events_of(text)[:-1]).arguments == [{"city": "abcdefgh " * 8}]


class TestPrompt:
    def prompt(self, client: TestClient, messages: Sequence[Mapping[str, Any]] = HI, **fields: Any) -> str:
        response = client.post("/tokenize", json={"messages": messages, **fields})
        assert response.status_code == 200, response.text
        return client.post("/detokenize", json={"tokens": response.json()["tokens"]}).json()["prompt"]

    def test_tools_are_declared(self, client: TestClient, engine: FakeEngine) -> None:
        prompt = self.prompt(client, tools=TOOLS)
        assert "<name>get_weather</name>" in prompt
        assert prompt == self.prompt(client, tools=TOOLS, tool_choice="auto", parallel_tool_calls=False)
        client.post(CHAT, json={"messages": HI, "tools": TOOLS, "max_tokens": 1})
        ids = client.post("/tokenize", json={"messages": HI, "tools": TOOLS}).json()["tokens"]
        assert engine.started == [tuple(ids)]

    def test_with_tool_choice_none_they_are_not(self, client: TestClient, says: Any) -> None:
        assert self.prompt(client, tools=TOOLS, tool_choice="none") == self.prompt(client)
        said = says("</think>so " + call("f", n="1"), tool_choice="none")
        assert said.calls == ()
        assert said.finish == "stop"
        assert not any(tag in said.content for tag in (*TAGS, *CALL_TAGS))

    def test_a_declaration_with_nulls_and_strict(self, client: TestClient) -> None:
        bare = {"type": "function", "function": {"name": "f"}}
        nulls = {"type": "function", "function": {"name": "f", "description": None, "parameters": None}}
        assert self.prompt(client, tools=[bare]) == self.prompt(client, tools=[nulls])
        strict = {"type": "function", "function": {"name": "f", "strict": True}}
        assert "<strict>True</strict>" in self.prompt(client, tools=[strict])

    def test_a_round_goes_back(self, client: TestClient, engine: FakeEngine, tokenizer: Tokenizer) -> None:
        text = "r</think>" + call("f", n="1", list='["a"]') + call("get_weather", city="Oslo")
        engine.script = tokenizer.encode(text)
        message = client.post(CHAT, json={"messages": HI, "tools": TOOLS}).json()["choices"][0]["message"]
        ids = [entry["id"] for entry in message["tool_calls"]]
        results = [{"role": "tool", "tool_call_id": id, "content": f"result {i}"} for i, id in enumerate(ids)]
        prompt = self.prompt(client, [*HI, message, *results], tools=TOOLS)
        assert "<think>\nr\n</think>" in prompt
        assert call("f", n="1", list='["a"]') in prompt
        first, second = (f"<tool_response>\nresult {i}\n</tool_response>\n" for i in (0, 1))
        assert f"<|im_start|>user\n{first}{second}<|im_end|>" in prompt
        # The template shows no ids, so results must stand in the order of the calls.
        assert self.prompt(client, [*HI, message, *reversed(results)], tools=TOOLS) == prompt
        stray = {"role": "tool", "tool_call_id": "of another turn", "content": "x"}
        assert f"{second}<tool_response>\nx" in self.prompt(client, [*HI, message, stray, *results], tools=TOOLS)


def tokens_of(tokenizer: Tokenizer, text: str, rng: Random) -> list[int]:
    """The text as a model might make it: tags as their control tokens or in letters, cut anywhere."""
    return tokenizer.encode(text) if rng.random() < 0.5 else random_cut(tokenizer, text, rng)


def written(tokenizer: Tokenizer, ids: Sequence[int], reading: Reading, finish: Finish) -> tuple[Said, Said]:
    """What is said of the tokens, whole and streamed."""
    choice, pieces = ChatChoice(0, reading, tokenizer), list[Piece]()
    for event in [*map(Token, ids), finish]:
        pieces += choice.push(event)
    assert choice.ended
    limits = Limits("m", tokenizer.vocab_size, {}, has_text=True)
    writer = ChatWriter({"id": "x"}, tokenizer, parse_chat({"messages": HI, "stream": True}, limits))
    chunks = [chunk for piece in pieces for chunk in writer.chunks(piece)]
    return of_choice(writer.answer(pieces)["choices"][0]), of_chunks(chunks)


MORE = ("stop", "st", "op", *(call("f", n="1"), call("get_weather", city="Paris"), "</think>", "<tool_call>\n"))


def test_hundreds_of_random_answers_say_the_same_whole_streamed_and_cut_in_another_way(
    tokenizer: Tokenizer,
) -> None:
    rng = Random(20261125)
    called = 0
    for _ in range(800):
        text = "".join(rng.choice((*PIECES, *MORE)) for _ in range(rng.randint(0, 20)))
        reading = Reading(
            SCHEMAS if rng.random() < 0.8 else {},
            thinking=rng.random() < 0.6,
            nonempty=rng.random() < 0.3,
            single=rng.random() < 0.3,
            hide_calls=True,
            stop=("stop", "tall") if rng.random() < 0.4 else (),
        )
        finish = Finish("stop" if rng.random() < 0.7 else "length")
        whole, streamed = written(tokenizer, tokens_of(tokenizer, text, rng), reading, finish)
        assert whole == streamed, text
        assert written(tokenizer, tokens_of(tokenizer, text, rng), reading, finish)[0] == whole, text
        for tag in (*TAGS, *CALL_TAGS):
            assert tag not in whole.reasoning, text
            assert tag not in whole.content, text
        assert not any(word in whole.content for word in reading.stop), text
        assert all(isinstance(arguments, dict) for arguments in whole.arguments), text
        assert len(whole.calls) <= 1 or not reading.single
        if whole.calls:
            called += 1
            assert whole.finish == ("tool_calls" if finish.reason == "stop" else whole.finish), text
        else:
            assert whole.finish in (finish.reason, "stop"), text
    assert called > 150


def test_two_hundred_random_answers_through_the_server(
    client: TestClient, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    rng = Random(7)
    for _ in range(200):
        text = "".join(rng.choice((*PIECES, *MORE)) for _ in range(rng.randint(0, 20)))
        engine.script = tokens_of(tokenizer, text, rng)
        extra: dict[str, Any] = PLAIN if rng.random() < 0.4 else {}
        said = ask(client, tools=TOOLS, **extra)
        assert not any(tag in shown for tag in (*TAGS, *CALL_TAGS) for shown in (said.content, said.reasoning)), (
            text
        )
