"""The wire format, pure: what fields become, and what events become."""

import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
from fake_engine import MODEL, VOCAB

from nanoserve.chat import MAX_MESSAGES, parse_chat
from nanoserve.chat_answer import ChatWriter
from nanoserve.choice import AnswerFailed, Choice, Piece
from nanoserve.completions import CompletionWriter, parse_completion
from nanoserve.errors import EngineError, NanoserveError, QueueFull, RequestError
from nanoserve.logprobs import CompletionLogprobs, chat_logprob
from nanoserve.metrics import Histogram, Metrics, RequestRecord
from nanoserve.parameters import Limits, choice_requests, usage, wire_logprob
from nanoserve.parsing import Content
from nanoserve.protocol import decode_json, error_answer, error_object
from nanoserve.request import Event, Finish, PromptScores, SamplingParams, Token, TokenScore, brief
from nanoserve.tokenizer import Tokenizer

LIMITS = Limits(MODEL, VOCAB, {"temperature": 0.6, "top_p": 0.95}, has_text=True)
HI = [{"role": "user", "content": "hi"}]
HEAD = {"id": "x-1", "created": 7, "model": MODEL}


def chat(**fields: Any) -> SamplingParams:
    return parse_chat({"messages": HI, **fields}, LIMITS).sampling


def completion(**fields: Any) -> SamplingParams:
    return parse_completion({"prompt": "hi", **fields}, LIMITS).sampling


class TestFields:
    def test_what_is_left_out_comes_from_the_checkpoint_then_openai(self) -> None:
        assert chat() == SamplingParams(temperature=0.6, top_p=0.95)
        assert completion() == SamplingParams(max_tokens=16, temperature=0.6, top_p=0.95)
        bare = Limits(MODEL, VOCAB, {}, has_text=True)
        assert parse_chat({"messages": HI}, bare).sampling == SamplingParams()

    def test_every_field_arrives(self) -> None:
        given = {
            "temperature": 0,
            "top_p": 0.5,
            "top_k": 7,
            "min_p": 0.1,
            "presence_penalty": 1,
            "frequency_penalty": -1.5,
            "repetition_penalty": 1.2,
            "seed": -3,
            "min_tokens": 2,
            "max_tokens": 9,
            "ignore_eos": True,
            "stop": ["a", "b"],
            "stop_token_ids": [4],
            "logit_bias": {"5": -100, "6": 1.5},
        }
        expected = SamplingParams(
            temperature=0.0,
            top_p=0.5,
            top_k=7,
            min_p=0.1,
            presence_penalty=1.0,
            frequency_penalty=-1.5,
            repetition_penalty=1.2,
            seed=-3,
            min_tokens=2,
            max_tokens=9,
            ignore_eos=True,
            stop=("a", "b"),
            stop_token_ids=(4,),
            logit_bias={5: -100.0, 6: 1.5},
        )
        assert chat(**given) == completion(**given) == expected

    @pytest.mark.parametrize(("given", "kept"), [(-1, 0), (0, 0), (1, 1)])
    def test_top_k_minus_one_is_off(self, given: int, kept: int) -> None:
        assert chat(top_k=given).top_k == kept

    def test_stop_may_be_one_string(self) -> None:
        assert chat(stop="x").stop == ("x",)

    def test_both_names_of_max_tokens(self) -> None:
        assert chat(max_completion_tokens=5).max_tokens == 5
        assert chat(max_completion_tokens=5, max_tokens=5).max_tokens == 5
        assert chat().max_tokens is None

    def test_logprobs_mean_different_things(self) -> None:
        assert chat().logprobs is chat(logprobs=False).logprobs is completion().logprobs is None
        assert chat(logprobs=True).logprobs == 0
        assert chat(logprobs=True, top_logprobs=3).logprobs == 3
        assert completion(logprobs=0).logprobs == 0
        assert completion(logprobs=5).prompt_logprobs is None
        assert completion(logprobs=5, echo=True).prompt_logprobs == 5
        assert completion(logprobs=5, echo=True, max_tokens=0).max_tokens == 0

    def test_whole_numbers_may_have_a_point(self) -> None:
        assert chat(max_tokens=8.0, n=1.0, seed=-3.0) == chat(max_tokens=8, n=1, seed=-3)
        assert isinstance(chat(seed=-3.0).seed, int)
        for wrong in (8.5, 0.0, -8.0, 1e300):
            with pytest.raises(RequestError, match=r"max_tokens is .* and must be a whole number"):
                chat(max_tokens=wrong)

    @pytest.mark.parametrize(
        ("prompt", "parsed"),
        [
            ("a", ["a"]),
            (["a", "b"], ["a", "b"]),
            ([1, 2], [(1, 2)]),
            ([[1, 2], [3]], [(1, 2), (3,)]),
        ],
    )
    def test_the_four_kinds_of_prompt(self, prompt: Any, parsed: list[Any]) -> None:
        assert parse_completion({"prompt": prompt}, LIMITS).prompts == parsed

    def test_without_a_tokenizer_only_ids_pass(self) -> None:
        limits = Limits(MODEL, VOCAB, {}, has_text=False)
        assert parse_completion({"prompt": [1]}, limits).prompts == [(1,)]
        with pytest.raises(RequestError, match="no tokenizer"):
            parse_completion({"prompt": "a"}, limits)
        with pytest.raises(RequestError, match="stop_token_ids"):
            parse_completion({"prompt": [1], "stop": "a"}, limits)

    def test_choices_draw_with_seeds_of_their_own(self) -> None:
        requests = choice_requests([(1,), (2,)], SamplingParams(seed=5), 2, "id")
        assert [(r.prompt, r.sampling.seed) for r in requests] == [((1,), 5), ((1,), 6), ((2,), 5), ((2,), 6)]
        assert [r.sampling.seed for r in choice_requests([(1,)], SamplingParams(), 2, "")] == [None, None]

    @pytest.mark.parametrize(
        "extra",
        [
            {"prompt_cache_options": {"ttl": "1h"}, "request_id": "x", "cache_prompt": True},
            {"skip_special_tokens": True, "spaces_between_special_tokens": True, "add_special_tokens": True},
            {"include_stop_str_in_output": False, "return_token_ids": False, "priority": 0, "echo": False},
        ],
    )
    def test_fields_that_ask_for_nothing_pass(self, extra: dict[str, Any]) -> None:
        assert chat(**extra) == chat()
        assert completion(**extra) == completion()

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("skip_special_tokens", False),
            ("spaces_between_special_tokens", False),
            ("include_stop_str_in_output", True),
            ("return_token_ids", True),
            ("priority", 1),
            ("priority", False),
            ("echo", True),
            ("add_special_tokens", 1),
        ],
    )
    def test_their_other_values_are_refused(self, field: str, value: object) -> None:
        with pytest.raises(RequestError) as refused:
            chat(**{field: value})
        assert refused.value.param == field

    def test_completions_always_add_special_tokens(self) -> None:
        with pytest.raises(RequestError, match="add_special_tokens is not supported"):
            completion(add_special_tokens=False)

    def test_too_many_messages_are_refused_before_they_are_read(self) -> None:
        assert parse_chat({"messages": HI * MAX_MESSAGES}, LIMITS)
        with pytest.raises(RequestError, match=f"150001 entries and may have at most {MAX_MESSAGES}") as refused:
            parse_chat({"messages": [None] * 150_001}, LIMITS)
        assert refused.value.param == "messages"

    def test_a_tools_result_names_its_call(self) -> None:
        result = {"role": "tool", "content": "r"}
        assert parse_chat({"messages": [*HI, {**result, "tool_call_id": "1"}]}, LIMITS)
        for lacking in (result, {**result, "tool_call_id": None}):
            with pytest.raises(RequestError, match="the id of the call") as refused:
                parse_chat({"messages": [*HI, lacking]}, LIMITS)
            assert refused.value.param == "messages[1].tool_call_id"

    def test_a_body_is_left_as_it_was(self) -> None:
        body = {"messages": HI, "stop": ["a"]}
        copy = json.dumps(body)
        parse_chat(body, LIMITS)
        assert json.dumps(body) == copy


class TestSamplingParams:
    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"temperature": 10**5000}, "temperature"),
            ({"max_tokens": -(10**5000)}, "max_tokens"),
            ({"min_tokens": 10**5001, "max_tokens": 10**5000}, "min_tokens"),
            ({"top_k": -(10**5000)}, "top_k"),
            ({"logprobs": 10**5000}, "logprobs"),
            ({"logit_bias": {5: 10**5000}}, "logit_bias"),
            ({"logit_bias": {5: [10**5000]}}, "logit_bias"),
            ({"stop": (10**5000,)}, "stop"),
        ],
    )
    def test_huge_numbers_are_refused_by_name(self, fields: dict[str, Any], param: str) -> None:
        with pytest.raises(RequestError, match="must be") as refused:
            SamplingParams(**fields)
        assert refused.value.param == param
        assert len(str(refused.value)) < 200

    def test_a_huge_limit_is_no_fault(self) -> None:
        assert SamplingParams(max_tokens=10**5000, min_tokens=1).min_tokens == 1

    def test_what_is_nested_deeply_is_not_written_out(self) -> None:
        deep: Any = []
        for _ in range(100_000):
            deep = [deep]
        wrong: list[dict[str, Any]] = [{"temperature": deep}, {"stop": (deep,)}, {"logit_bias": {1: deep}}]
        for fields in wrong:
            with pytest.raises(RequestError, match="is an array and must be"):
                SamplingParams(**fields)
        while deep:  # or freeing it would recurse as deeply
            deep = deep.pop()

    def test_top_k_minus_one_is_off(self) -> None:
        assert SamplingParams(top_k=-1) == SamplingParams()
        with pytest.raises(RequestError, match="top_k is -2"):
            SamplingParams(top_k=-2)


class TestErrors:
    def test_error_objects_have_four_printable_keys(self) -> None:
        body = error_object("bad \ud800 " + "x" * 5000, kind="k", param="\udfff", code=None)
        assert list(body["error"]) == ["message", "type", "param", "code"]
        assert len(json.dumps(body).encode("utf-8")) < 1500
        json.dumps(body, ensure_ascii=False).encode("utf-8")

    def test_statuses(self) -> None:
        assert error_answer(RequestError("x", param="p"))[0] == 400
        assert error_answer(QueueFull(3, 4))[0] == 503
        assert error_answer(EngineError("x"))[0] == 503
        status, body = error_answer(NanoserveError("secret path"))
        assert status == 500
        assert "secret" not in str(body)

    @pytest.mark.parametrize(
        "value",
        ["\ud800" * 500, "\x1b[31m\n", 10**5000, {"a": 1}, [1], (10**5000,), None, True, 1.5],
        ids=range(9),
    )
    def test_values_are_shown_short_and_printable(self, value: object) -> None:
        text = brief(value)
        assert len(text) <= 80
        assert text.isprintable()
        text.encode("utf-8")

    @pytest.mark.parametrize("body", [b'{"a": NaN}', b'{"a": 1e400}', b'{"a": -1e400}', b"[1]", b"\xff"])
    def test_json_is_strict(self, body: bytes) -> None:
        with pytest.raises(RequestError) as refused:
            decode_json(body)
        assert refused.value.code == "invalid_json"

    def test_json_objects_pass(self) -> None:
        assert decode_json('{"a": [1, 2.5e3, "ä\\ud83d\\ude00"]}'.encode()) == {"a": [1, 2500.0, "ä😀"]}


def texts(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def push_all(choice: Choice, events: Sequence[Event]) -> list[Piece]:
    return [piece for event in events for piece in choice.push(event)]


class TestChoice:
    def test_tokens_become_text_and_an_end(self, tokenizer: Tokenizer) -> None:
        ids = tokenizer.encode("héllo 😀")
        pieces = push_all(Choice(2, (), tokenizer), [*map(Token, ids), Finish("length")])
        assert texts(pieces) == "héllo 😀"
        assert {piece.index for piece in pieces} == {2}
        assert [piece.finish for piece in pieces if piece.finish] == ["length"]
        assert pieces[-1].finish == "length"

    def test_a_stop_string_ends_before_the_engine_knows(self, tokenizer: Tokenizer) -> None:
        choice = Choice(0, ["lo wo"], tokenizer)
        pieces = push_all(choice, [Token(id) for id in tokenizer.encode("hello world")])
        assert choice.ended
        assert texts(pieces) == "hel"
        assert pieces[-1].finish == "stop"
        assert choice.push(Token(30)) == choice.push(Finish("cancelled")) == []

    def test_held_text_comes_before_the_end(self, tokenizer: Tokenizer) -> None:
        choice = Choice(0, ["lo wonder"], tokenizer)
        ids = tokenizer.encode("hello wo")
        pieces = push_all(choice, [*map(Token, ids), Finish("length")])
        assert texts(pieces) == "hello wo"
        assert pieces[-1] == Piece(0, finish="length")

    def test_a_failure_is_an_error_and_a_shutdown_another(self) -> None:
        with pytest.raises(AnswerFailed, match="boom"):
            Choice(0, (), None).push(Finish("error", "boom"))
        with pytest.raises(EngineError, match="engine is closing") as gone:
            Choice(0, (), None).push(Finish("cancelled"))
        assert not isinstance(gone.value, AnswerFailed)

    def test_without_a_tokenizer_there_is_no_text(self) -> None:
        pieces = push_all(Choice(0, (), None), [Token(5), Finish("stop")])
        assert pieces == [Piece(0, token=Token(5)), Piece(0, finish="stop")]


def said(index: int, text: str, token: Token | None = None) -> Piece:
    return Piece(index, token=token, parts=(Content(text),))


class TestChatWriter:
    def write(self, tokenizer: Tokenizer, **fields: Any) -> ChatWriter:
        return ChatWriter(HEAD, tokenizer, parse_chat({"messages": HI, **fields}, LIMITS))

    def test_chunks_role_first_end_last(self, tokenizer: Tokenizer) -> None:
        writer = self.write(tokenizer, stream=True)
        pieces = [
            said(0, "a", Token(5)),
            Piece(0, token=Token(6)),
            said(0, "b", Token(7)),
            Piece(0, finish="stop"),
        ]
        chunks = [chunk for piece in pieces for chunk in writer.chunks(piece)]
        assert {chunk["id"] for chunk in chunks} == {"x-1"}
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
        assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
            {"role": "assistant", "content": ""},
            {"content": "a"},
            {"content": "b"},
            {},
        ]
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
        assert all("usage" not in chunk for chunk in chunks)

    def test_each_choice_has_a_role(self, tokenizer: Tokenizer) -> None:
        writer = self.write(tokenizer, stream=True, n=2)
        pieces = [said(0, "a"), Piece(0, finish="stop"), Piece(1, finish="length")]
        chunks = [chunk for piece in pieces for chunk in writer.chunks(piece)]
        roles = [c["choices"][0]["index"] for c in chunks if "role" in c["choices"][0]["delta"]]
        assert roles == [0, 1]

    def test_usage_is_null_until_its_own_chunk(self, tokenizer: Tokenizer) -> None:
        writer = self.write(tokenizer, stream=True, stream_options={"include_usage": True})
        assert all(chunk["usage"] is None for chunk in writer.chunks(said(0, "a", Token(5))))
        last = writer.usage_chunk(usage(3, 4))
        assert last["choices"] == []
        assert last["usage"]["total_tokens"] == 7

    def test_whole_answer(self, tokenizer: Tokenizer) -> None:
        writer = self.write(tokenizer, n=2, logprobs=True)
        score = TokenScore(-0.5)
        pieces = [
            said(0, "a", Token(5, score)),
            Piece(0, finish="stop"),
            said(1, "b", Token(6, score)),
            Piece(1, finish="length"),
        ]
        answer = writer.answer(pieces)
        assert answer["object"] == "chat.completion"
        assert [c["message"]["content"] for c in answer["choices"]] == ["a", "b"]
        assert [c["finish_reason"] for c in answer["choices"]] == ["stop", "length"]
        assert [len(c["logprobs"]["content"]) for c in answer["choices"]] == [1, 1]
        assert answer["choices"][0]["logprobs"]["refusal"] is None


class TestLogprobs:
    def test_infinity_is_clamped(self) -> None:
        assert wire_logprob(-math.inf) == wire_logprob(math.nan) == -9999.0
        assert wire_logprob(-1.5) == -1.5

    def test_chat_entries_have_exact_bytes(self, tokenizer: Tokenizer) -> None:
        first = tokenizer.encode("😀")[0]
        entry = chat_logprob(tokenizer, Token(first, TokenScore(-1.0, ((first, -1.0), (30, -math.inf)))))
        assert bytes(entry["bytes"]) == tokenizer.token_bytes(first)
        assert "😀".encode().startswith(bytes(entry["bytes"]))
        assert [top["logprob"] for top in entry["top_logprobs"]] == [-1.0, -9999.0]
        json.dumps(entry, allow_nan=False)

    def test_of_two_ids_with_one_text_the_likelier_stays(self, tokenizer: Tokenizer) -> None:
        broken = [id for id in range(VOCAB) if tokenizer.token_text(id) == "\ufffd"][:2]
        logprobs = CompletionLogprobs(tokenizer, 2)
        logprobs.add(Token(30, TokenScore(-3.0, ((broken[0], -0.5), (broken[1], -0.7)))))
        table = logprobs.take()
        assert table is not None
        assert table["top_logprobs"] == [{"\ufffd": -0.5}]
        assert logprobs.take() is None

    def test_offsets_point_into_the_text(self, tokenizer: Tokenizer) -> None:
        prompt, answer = "naïve 😀 prompt", " and ünswer"
        ids, more = tuple(tokenizer.encode(prompt)), tokenizer.encode(answer)
        logprobs = CompletionLogprobs(tokenizer, 0)
        scores = PromptScores((None, *[TokenScore(-1.0)] * len(ids)))
        # a token that the tokenizer put before the text has no width in it
        logprobs.add_prompt(prompt, (1, *ids), scores)
        for id in more:
            logprobs.add(Token(id, TokenScore(-1.0)))
        table = logprobs.take()
        assert table is not None
        text = prompt + answer
        assert table["text_offset"][:2] == [0, 0]
        assert table["token_logprobs"][0] is None
        for token, offset in zip(table["tokens"], table["text_offset"], strict=True):
            if "\ufffd" not in token and token != "<s>":
                assert text.startswith(token, offset)
        assert table["text_offset"][1 + len(ids)] == len(prompt)

    def test_completion_answer_with_echo(self, tokenizer: Tokenizer) -> None:
        call = parse_completion({"prompt": ["ab", "cd"], "echo": True, "logprobs": 1, "n": 2}, LIMITS)
        prompts = [tuple(tokenizer.encode(str(prompt))) for prompt in call.prompts]
        writer = CompletionWriter(HEAD, tokenizer, call, prompts)
        pieces: list[Piece] = []
        for index in range(4):
            count = len(prompts[index // 2])
            scores = PromptScores((None, *[TokenScore(-1.0, ((30, -1.0),))] * (count - 1)))
            pieces += [Piece(index, scores=scores), Piece(index, "x", Token(30, TokenScore(-2.0)))]
            pieces.append(Piece(index, finish="length"))
        answer = writer.answer(pieces)
        assert [c["text"] for c in answer["choices"]] == ["abx", "abx", "cdx", "cdx"]
        for choice in answer["choices"]:
            lengths = {len(values) for values in choice["logprobs"].values()}
            assert lengths == {len(prompts[0]) + 1}
            assert choice["logprobs"]["token_logprobs"][0] is None

    def test_without_a_tokenizer_tokens_are_named_by_id(self) -> None:
        call = parse_completion(
            {"prompt": [5, 6], "logprobs": 1, "return_token_ids": True}, Limits(MODEL, VOCAB, {}, has_text=False)
        )
        writer = CompletionWriter(HEAD, None, call, [(5, 6)])
        token = Token(7, TokenScore(-1.0, ((8, -0.5),)))
        chunks = [*writer.chunks(Piece(0, token=token)), *writer.chunks(Piece(0, finish="stop"))]
        assert chunks[0]["choices"][0]["token_ids"] == [7]
        assert chunks[0]["choices"][0]["logprobs"]["tokens"] == ["token_id:7"]
        assert chunks[0]["choices"][0]["logprobs"]["top_logprobs"] == [{"token_id:8": -0.5}]
        assert chunks[1]["choices"][0]["finish_reason"] == "stop"


class TestMetrics:
    def test_buckets_are_cumulative_and_inclusive(self) -> None:
        histogram = Histogram((0.1, 1.0))
        for seconds in (0.1, 0.5, 1.0, 2.0):
            histogram.observe(seconds)
        assert histogram.lines("x") == [
            'x_bucket{le="0.1"} 1',
            'x_bucket{le="1.0"} 3',
            'x_bucket{le="+Inf"} 4',
            "x_sum 3.6",
            "x_count 4",
        ]

    def test_timings_of_two_choices(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now = [100.0]
        monkeypatch.setattr("nanoserve.metrics.time.monotonic", lambda: now[0])

        def after(seconds: float) -> None:
            now[0] += seconds

        record = RequestRecord(Metrics())
        after(5.0)  # reading and tokenising the body
        record.prompt(30)
        for choice, (prefill, steps) in enumerate(((2.0, [0.5, 0.5]), (1.0, [0.25, 0.25, 0.25, 0.25]))):
            after(prefill)
            record.token(choice, reasoning=True)
            for step in steps:
                after(step)
                record.token(choice)
            after(0.125)
            record.end("stop")
        assert record.timings(60) == {
            "cache_n": 0,
            "prompt_n": 60,
            "prompt_ms": 3000.0,
            "prompt_per_second": 20.0,
            "predicted_n": 8,
            "predicted_ms": 2000.0,
            "predicted_per_second": 3.0,
        }
        assert (record.ttft, record.tokens_per_second()) == (7.0, 3.0)
        assert (record.completion_tokens, record.reasoning_tokens) == (8, 2)

    def test_timings_of_a_prompt_that_is_only_scored(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now = [100.0]
        monkeypatch.setattr("nanoserve.metrics.time.monotonic", lambda: now[0])
        record = RequestRecord(Metrics())
        record.prompt(10)
        assert record.timings(10)["prompt_per_second"] is None
        now[0] += 2.0
        record.end("length")
        timings = record.timings(10)
        assert (timings["prompt_ms"], timings["prompt_per_second"]) == (2000.0, 5.0)
        assert (timings["predicted_n"], timings["predicted_per_second"]) == (0, None)

    def test_a_record_adds_to_the_totals(self) -> None:
        metrics = Metrics()
        record = RequestRecord(metrics)
        record.prompt(5)
        for choice in (0, 0, 1):
            record.token(choice)
        record.end("stop")
        record.close()
        text = metrics.text(running=1, waiting=2)
        for line in (
            "nanoserve_num_requests_running 1",
            "nanoserve_num_requests_waiting 2",
            "nanoserve_prompt_tokens_total 5",
            "nanoserve_generation_tokens_total 3",
            "nanoserve_time_to_first_token_seconds_count 1",
            "nanoserve_inter_token_latency_seconds_count 1",
            "nanoserve_e2e_request_latency_seconds_count 1",
            'nanoserve_request_success_total{finished_reason="stop"} 1',
        ):
            assert line in text.splitlines()
