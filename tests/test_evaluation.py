"""Evaluations: questions, grading, candidates side by side, and the command."""

import io
import json
import math
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from fake_engine import FakeEngine, running

import nanoserve
from nanoserve import gsm8k
from nanoserve.cli import main
from nanoserve.config import EngineConfig
from nanoserve.errors import ConfigError, EngineError, NanoserveError, RequestError
from nanoserve.eval_local import Answer, LocalCandidate, parse_spec
from nanoserve.eval_questions import Question, Suite, read_suite
from nanoserve.eval_report import Comparison, Report, Row
from nanoserve.eval_server import ServerCandidate
from nanoserve.evaluation import Reference, evaluate, kl_divergence
from nanoserve.local import LocalEngine
from nanoserve.models.demo.tasks import Problem, grade
from nanoserve.progress import QuestionBar
from nanoserve.signals import Interrupt
from nanoserve.tokenizer import Tokenizer

SEED = 77
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def quiet(prepared: object, has_tokenizer: bool) -> None:
    """Announces nothing."""


@dataclass(frozen=True, slots=True)
class StubProblem:
    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...]
    answer: Any
    max_tokens: int


def stub_problems(task: str, count: int, seed: int, length: int | None = None) -> list[StubProblem]:
    tools = (TOOL,) if task == "tools" else ()
    return [
        StubProblem(({"role": "user", "content": f"{task} {seed} {length} {i}"},), tools, i % 2, 6)
        for i in range(count)
    ]


def stub_grade(task: str, problem: StubProblem, text: str) -> bool:
    return len(text) % 2 == problem.answer


@pytest.fixture(autouse=True)
def stub_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that a random model can be graded on."""
    module = ModuleType("nanoserve.models.demo.tasks")
    module.__dict__.update(problems=stub_problems, grade=stub_grade, HELD_OUT_SEED=SEED)
    monkeypatch.setitem(sys.modules, module.__name__, module)


def suite(count: int = 4, task: Any = "arithmetic") -> Suite:
    return read_suite(task, count=count, seed=None, length=None, data=None)


def candidate(path: Path, label: str = "first", **options: Any) -> LocalCandidate:
    return LocalCandidate(label, path, EngineConfig(device="cpu", max_context=512, **options), quiet)


class TestQuestions:
    def test_demo_problems_become_questions(self) -> None:
        got = read_suite("recall", count=3, seed=None, length=90, data=None)
        assert got.origin == {"seed": SEED, "length": 90}
        assert len(got.questions) == 3
        assert got.questions[1].prompt == ({"role": "user", "content": "recall 77 90 1"},)
        assert got.questions[1].is_right("abc")
        assert not got.questions[1].is_right("ab")
        assert len(read_suite("json", count=None, seed=5, length=None, data=None).questions) == 200

    @pytest.mark.parametrize(
        ("task", "options", "words"),
        [
            ("json", {"count": 0}, "count is 0"),
            ("json", {"length": 5}, "recall's alone"),
            ("recall", {"length": 0}, "at least 1"),
            ("json", {"data": Path("x")}, "gsm8k's alone"),
            ("gsm8k", {}, "--data FILE"),
            ("gsm8k", {"data": Path("x"), "seed": 3}, "leave it out"),
        ],
    )
    def test_settings_that_do_not_belong(self, task: Any, options: dict[str, Any], words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            read_suite(task, **{"count": None, "seed": None, "length": None, "data": None, **options})


class TestGsm8k:
    def write(self, path: Path, *answers: str) -> Path:
        lines = [json.dumps({"question": f"Q{i}\u2028?", "answer": a}) for i, a in enumerate(answers)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    def test_the_public_form_is_read(self, tmp_path: Path) -> None:
        file = self.write(
            tmp_path / "test.jsonl", "1 + 1 = <<1+1=2>>2\n#### 2", "#### 1,234", "x #### -5", "#### $3.50"
        )
        numbers = [Decimal(text) for text in ("2", "1234", "-5", "3.5")]
        assert [p.answer for p in gsm8k.read_problems(file)] == numbers
        got = read_suite("gsm8k", count=2, seed=None, length=None, data=file)
        assert len(got.questions) == 2
        assert got.origin == {"data": "test.jsonl"}
        assert got.questions[0].is_right(" 1 + 1 = 2. The answer is 2.")
        with pytest.raises(ConfigError, match="has 4 questions"):
            read_suite("gsm8k", count=5, seed=None, length=None, data=file)

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b"", "is empty"),
            (b"\xff\xfe", "UTF-8"),
            (b'{"question": "a", "answer": "#### 1"}\n{', "line 2: is not JSON"),
            (b'{"question": "a", "answer": "#### 1"}\n\n', "line 2: is not JSON"),
            (b"[1]", "line 1: must be a JSON object"),
            (b'{"question": "a"}', "line 1: answer must be a string"),
            (b'{"question": " ", "answer": "#### 1"}', "line 1: question must be a string"),
            (b'{"question": "a", "answer": "42"}', "line 1: answer must end in '#### '"),
            (b'{"question": "a", "answer": "#### about 42"}', "line 1: answer must end in '#### '"),
            (b"[" * 100_000, "line 1: is not JSON"),
        ],
    )
    def test_a_broken_file_is_named_with_its_line(self, tmp_path: Path, content: bytes, words: str) -> None:
        file = tmp_path / "test.jsonl"
        file.write_bytes(content)
        with pytest.raises(ConfigError) as caught:
            gsm8k.read_problems(file)
        assert words in str(caught.value)
        assert str(caught.value).startswith(f"data {file}")
        assert str(caught.value).isprintable()

    def test_a_missing_file(self, tmp_path: Path) -> None:
        for path in (tmp_path / "nowhere", tmp_path):
            with pytest.raises(ConfigError, match="data "):
                gsm8k.read_problems(path)

    def test_the_prompt_holds_eight_right_examples(self) -> None:
        prompt = gsm8k.prompt_of("How many?")
        assert prompt.endswith("\n\nQuestion: How many?\nAnswer:")
        assert prompt.count("Question: ") == prompt.count("Answer:") == 9
        assert len(gsm8k.EXAMPLES) == 8
        for _, worked in gsm8k.EXAMPLES:
            assert re.search(r"The answer is \d+\.$", worked)
            for left, a, sign, b, right in re.findall(r"((\d+) ([*/+-]) (\d+)) = \$?(\d+)", worked):
                first, second = int(a), int(b)
                results = {"*": first * second, "+": first + second, "-": first - second}
                assert (results[sign] if sign in results else first / second) == int(right), left
        assert max(gsm8k.prompt_of("").count(stop) for stop in gsm8k.STOP) == 9

    @pytest.mark.parametrize(
        ("text", "number"),
        [
            ("The answer is 42.", "42"),
            ("so 3 * 14 = 42", "42"),
            ("She pays $1,234.50 in all.", "1234.5"),
            ("That is 10-4", "4"),
            ("It falls to -4 degrees", "-4"),
            ("He owes -$7.", "-7"),
            ("1,2", "2"),
            ("half is .5", "0.5"),
            ("42.00", "42"),
            ("<think>7 or 8</think>The answer is 9", "9"),
            ("none", None),
            ("", None),
            ("٤٢", None),
        ],
    )
    def test_the_last_number_counts(self, text: str, number: str | None) -> None:
        assert gsm8k.last_number(text) == (None if number is None else Decimal(number))


@pytest.fixture(scope="module")
def engine(random_checkpoint: Path) -> Iterator[LocalEngine]:
    with nanoserve.load(random_checkpoint, device="cpu", max_context=128, prefill_chunk=8) as engine:
        yield engine


class TestDistributions:
    def test_they_are_those_of_the_answer(self, engine: LocalEngine) -> None:
        prompt = list(range(20, 40))
        answer = engine.generate(prompt, max_tokens=10, temperature=0.0, ignore_eos=True, logprobs=0)
        got = engine.logprobs(prompt, answer.token_ids)
        assert got.shape == (10, 512)
        assert got.dtype == torch.float32
        assert got.argmax(1).tolist() == answer.token_ids
        assert answer.logprobs is not None
        chosen = [got[i, token].item() for i, token in enumerate(answer.token_ids)]
        assert chosen == pytest.approx([score.logprob for score in answer.logprobs], abs=1e-6)
        assert got.exp().sum(1).tolist() == pytest.approx([1.0] * 10, abs=1e-5)

    def test_they_are_those_of_the_prefill(self, engine: LocalEngine) -> None:
        ids = [5, 9, 100, 7, 300, 44]
        got = engine.logprobs(ids[:2], ids[2:])
        assert [got[i, token].item() for i, token in enumerate(ids[2:])] == pytest.approx(
            engine.score(ids)[1:], abs=1e-4
        )

    def test_wrong_ids_break_nothing(self, engine: LocalEngine) -> None:
        for prompt, answer in (([], [1]), ([1], []), ([1], [512]), ([1] * 100, [1] * 29)):
            with pytest.raises(RequestError):
                engine.logprobs(prompt, answer)
        assert engine.logprobs([1] * 100, [1] * 28).shape == (28, 512)

    def test_kl_is_the_definition(self) -> None:
        p, q = (
            torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]]),
            torch.tensor([[0.25, 0.5, 0.25], [0.5, 0.5, 0.0]]),
        )
        assert kl_divergence(p.log(), q.log()).tolist() == pytest.approx([0.25 * math.log(2), math.log(2)])
        rows = torch.randn(200, 50).log_softmax(-1)
        assert kl_divergence(rows, rows).tolist() == [0.0] * 200
        others = torch.randn(200, 50).log_softmax(-1)
        by_hand = (rows.exp() * (rows - others)).sum(-1)
        assert kl_divergence(rows, others).tolist() == pytest.approx(by_hand.tolist(), rel=1e-4)

    def test_positions_are_bounded(self, engine: LocalEngine) -> None:
        answers = [Answer("", 4, 0.1, (20, 21), (30, 31, 32, 33)) for _ in range(3)]
        taken = Reference.take(engine, answers, 6)
        assert [len(ids) for _, ids, _ in taken.items] == [4, 2]
        drift, logprobs = taken.compare(engine)
        assert (drift.mean, drift.p999, drift.positions, drift.questions) == (0.0, 0.0, 6, 2)
        assert logprobs == taken.own_logprobs()


class TestSideBySide:
    def test_a_candidate_equals_itself(self, random_checkpoint: Path) -> None:
        same = [candidate(random_checkpoint), candidate(random_checkpoint, "second")]
        report = evaluate(suite(), same, kl_questions=3)
        first, second = report.rows
        assert first.right == second.right
        assert first.perplexity == second.perplexity
        assert first.perplexity is not None
        assert first.perplexity >= 1
        assert 0 < first.mean_tokens <= 6
        (pair,) = report.comparisons
        assert (pair.p_value, pair.points) == (1.0, 0.0)
        assert pair.drift is not None
        assert (pair.drift.mean, pair.drift.p999, pair.drift.questions) == (0.0, 0.0, 3)

    def test_precisions_differ_a_little(self, random_checkpoint: Path) -> None:
        both = [candidate(random_checkpoint), candidate(random_checkpoint, "bf16", dtype="bfloat16")]
        report = evaluate(suite(task="tools"), both, kl_questions=50)
        assert [row.facts["dtype"] for row in report.rows] == ["float32", "bfloat16"]
        drift = report.comparisons[0].drift
        assert drift is not None
        assert 0 < drift.mean <= drift.p999 < 0.5
        assert drift.questions == 4
        assert report.rows[0].perplexity != report.rows[1].perplexity

    def test_what_cannot_run_is_told_before_the_first_question(
        self, random_checkpoint: Path, make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(LocalCandidate, "open", pytest.fail)
        bare = make_checkpoint("bare", tokenizer=False)
        wider = make_checkpoint("wider", overrides={"vocab_size": 640})
        first = candidate(random_checkpoint)
        cases: list[tuple[list[Any], int | None, str]] = [
            ([first, candidate(random_checkpoint / "nowhere")], None, "nowhere"),
            ([first, candidate(random_checkpoint, ops={"router": "fast"})], None, "fast"),
            ([first, candidate(bare)], None, r"tokenizer\.json"),
            ([first, candidate(wider, "wider")], 5, "wider has another"),
            ([first], 0, "kl-questions is 0"),
            ([ServerCandidate("http://127.0.0.1:9/v1")], 5, "--url"),
        ]
        for candidates, kl_questions, words in cases:
            with pytest.raises(NanoserveError, match=words):
                evaluate(suite(), candidates, kl_questions=kl_questions)

    def test_an_answer_that_could_be_cut_is_refused(self, random_checkpoint: Path) -> None:
        short = LocalCandidate("short", random_checkpoint, EngineConfig(device="cpu", max_context=32), quiet)
        with pytest.raises(RequestError, match="holds 32"):
            evaluate(suite(), [short])

    def test_specs(self, random_checkpoint: Path) -> None:
        base = EngineConfig(device="cpu", max_context=99, ops={"router": "torch"})
        got = parse_spec("dtype=bfloat16, kv-dtype=fp8,op:head=torch", random_checkpoint, base, quiet)
        assert got.path == random_checkpoint
        ops = {"router": "torch", "head": "torch"}
        assert got.config == EngineConfig("cpu", "bfloat16", "fp8", 99, ops=ops)
        assert parse_spec("model=/a/b", None, base, quiet).path == Path("/a/b")
        for spec, words in (
            ("dtyp=float32", "'dtyp'; known are model, device, dtype, kv-dtype, op:NAME"),
            ("dtype", "NAME=VALUE"),
            ("", "NAME=VALUE"),
            ("dtype=", "NAME=VALUE"),
            ("dtype=float64", "float64"),
            ("dtype=float32,dtype=float32", "twice"),
            ("op:=torch", "NAME=BACKEND"),
        ):
            with pytest.raises(ConfigError, match=words):
                parse_spec(spec, random_checkpoint, base, quiet)
        with pytest.raises(ConfigError, match="model=DIR"):
            parse_spec("dtype=float32", None, base, quiet)


class TestReport:
    def test_pairs_and_table(self) -> None:
        first = Row("a", {}, (True,) * 6 + (False,) * 4, 50, 2.0)
        second = Row("longer name", {}, (True,) * 5 + (False,) + (True,) * 2 + (False,) * 2, 70, 7.0)
        pair = Comparison(first, second, None)
        assert pair.pairs() == {"both_right": 5, "only_first": 1, "only_second": 2, "both_wrong": 2}
        assert pair.points == pytest.approx(10.0)
        assert pair.p_value == 1.0
        lines = Report(suite(10), (first, second), (pair,)).text().splitlines()
        assert lines[0] == "arithmetic: 10 questions, seed 77, greedy"
        assert lines[3].split() == ["a", "6", "of", "10", "60.0%", "31.3%", "to", "83.2%", "5.0", "25.0", "2.0"]
        assert len({len(line) for line in lines[2:5]}) == 1
        assert "kl" not in pair.data()

    def test_the_bar(self) -> None:
        stream = io.StringIO()
        bar = QuestionBar("demo", stream)
        bar(1, 3, "x")
        bar(3, 3, "66.7% right")
        assert stream.getvalue() == "demo 100%  3 of 3 questions  66.7% right\n"

    def test_pairs_of_a_run_that_was_cut_short(self) -> None:
        first, second = (Row(name, {}, (True, False, True, True)[:n], n, 1.0) for name, n in (("a", 4), ("b", 2)))
        for pair in (Comparison(first, second, None), Comparison(second, first, None)):
            assert pair.pairs() == {"both_right": 1, "only_first": 0, "only_second": 0, "both_wrong": 1}
            assert pair.points == 0

    def test_a_signal_ends_the_process_unless_there_is_something_to_show(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("nanoserve.signals.os._exit", sys.exit)
        interrupt = Interrupt()
        with pytest.raises(SystemExit) as ended:
            interrupt.hear(signal.SIGTERM, None)
        assert ended.value.code == 143
        interrupt.worthwhile = True
        interrupt.check()
        with pytest.raises(KeyboardInterrupt):
            interrupt.hear(signal.SIGINT, None)
        with pytest.raises(KeyboardInterrupt):
            interrupt.check()
        with pytest.raises(SystemExit) as ended:
            interrupt.hear(signal.SIGINT, None)
        assert ended.value.code == 130

    def test_what_a_handler_raised_in_vain_is_heard_at_the_next_question(
        self, random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        interrupt = Interrupt()

        def grade(task: str, problem: StubProblem, text: str) -> bool:
            interrupt.number = signal.SIGTERM
            return True

        monkeypatch.setattr(sys.modules["nanoserve.models.demo.tasks"], "grade", grade)
        report = evaluate(suite(), [candidate(random_checkpoint)], interrupt=interrupt)
        assert report.cut_short == (("first", 1),)


class TestServer:
    def question(self, prompt: Any = ({"role": "user", "content": "hi"},), **options: Any) -> Question:
        fields: dict[str, Any] = {"tools": (), "stop": (), "max_tokens": 5, "is_right": bool}
        return Question(prompt, **{**fields, **options})

    def test_chats_and_texts_are_answered(self, tokenizer: Tokenizer) -> None:
        engine = FakeEngine()
        engine.script = tokenizer.encode("abc Question: d")
        with running(tokenizer, engine, api_key="k") as server:
            with ServerCandidate(f"{server.url}/v1/", "k").open() as runner:
                assert runner.facts()["model"] == "org/fake"
                chat = runner.answer(self.question())
                text = runner.answer(self.question("hi", stop=("Question:",), max_tokens=60))
            with pytest.raises(RequestError, match="401"), ServerCandidate(f"{server.url}/v1", "x").open():
                pass
        assert (chat.tokens, chat.ids) == (5, ())
        assert chat.text == f"<think>{tokenizer.decode(engine.script[:5]).strip()}</think>"
        assert text.text == "abc "
        assert text.seconds > 0

    def test_a_refusal_is_told(self, tokenizer: Tokenizer) -> None:
        with running(tokenizer, FakeEngine()) as server:
            url = f"{server.url}/v1"
            with ServerCandidate(url).open() as runner, pytest.raises(RequestError) as caught:
                runner.answer(self.question(stop=("",)))
            assert str(caught.value).startswith(f"{url}/chat/completions answered 400: stop is ''")
            report = evaluate(suite(3), [ServerCandidate(url)])
        assert report.rows[0].facts == {"model": "org/fake", "device": url}
        assert json.loads(json.dumps(report.data()))["candidates"][0]["total"] == 3

    @pytest.mark.parametrize(
        ("written", "right"), [({"a": "7", "s": "x\ny"}, True), ({"a": "seven", "s": "x"}, False), ({}, False)]
    )
    def test_calls_are_graded_as_they_were_written(
        self, tokenizer: Tokenizer, written: Mapping[str, str], right: bool
    ) -> None:
        properties = {"a": {"type": "integer"}, "s": {"type": "string"}}
        function = {"name": "add", "parameters": {"type": "object", "properties": properties}}
        tools = ({"type": "function", "function": function},)
        lines = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in written.items())
        engine = FakeEngine(max_context=2048)
        engine.script = tokenizer.encode(
            f"Hm.\n</think>\n<tool_call>\n<function=add>\n{lines}</function>\n</tool_call>"
        )
        earlier = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
        prompt = (
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "", "tool_calls": [earlier]},
            {"role": "tool", "content": "2"},
            {"role": "user", "content": "again"},
        )
        with running(tokenizer, engine) as server, ServerCandidate(f"{server.url}/v1").open() as runner:
            text = runner.answer(self.question(prompt, tools=tools, max_tokens=400)).text
        assert engine.started == [tuple(tokenizer.encode_chat(prompt, tools=tools))]
        assert text.startswith("<think>Hm.</think><tool_call>")
        problem = Problem((), tools, {"name": "add", "arguments": {"a": 7, "s": "x\ny"}}, 9)
        assert grade("tools", problem, text) is right

    def test_a_full_server_is_asked_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        slept: list[float] = []
        monkeypatch.setattr("nanoserve.eval_server.time.sleep", slept.append)
        busy = b"HTTP/1.1 503 Full\r\nRetry-After: 7\r\nContent-Length: 2\r\n\r\n{}"
        models = b'HTTP/1.1 200 OK\r\nContent-Length: 23\r\n\r\n{"data": [{"id":"m" }]}'
        with self.replies([busy, busy, models]) as url, ServerCandidate(url).open() as runner:
            assert runner.model == "m"
        assert slept == [7, 7]
        with (
            self.replies([busy.replace(b"7", b"301")] * 2) as url,
            pytest.raises(EngineError, match="503"),
            ServerCandidate(url).open(),
        ):
            pass
        assert slept == [7, 7, 301]

    @contextmanager
    def replies(self, replies: Sequence[bytes]) -> Generator[str]:
        """A server that answers one connection after another, in these words."""
        with socket.create_server(("127.0.0.1", 0)) as listener:

            def serve() -> None:
                for reply in replies:
                    connection, _ = listener.accept()
                    with connection:
                        connection.recv(65536)
                        connection.sendall(reply)

            thread = threading.Thread(target=serve)
            thread.start()
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
            thread.join(10)

    @pytest.mark.parametrize(
        "url", ["", "localhost:8000", "ftp://x/v1", "http://", "http://h:99999/", "http://u@h/"]
    )
    def test_a_url_that_is_none(self, url: str) -> None:
        with pytest.raises(ConfigError, match="base URL"):
            ServerCandidate(url)

    @pytest.mark.parametrize(
        ("reply", "words"),
        [
            (b"", "is the server running"),
            (b"nonsense\r\n\r\n", "is the server running"),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", "no data.0.id"),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{]", "answered 200: {]"),
            (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/\r\nContent-Length: 0\r\n\r\n", "answered 302"),
            (b"HTTP/1.1 500 Oh\r\nContent-Length: 5\r\n\r\na\n\nb ", "answered 500: a b"),
            (b"HTTP/1.1 503 Oh\r\nRetry-After: soon\r\nContent-Length: 2\r\n\r\n{}", "answered 503"),
        ],
    )
    def test_what_is_no_such_server(self, reply: bytes, words: str) -> None:
        with (
            self.replies([reply]) as url,
            pytest.raises(EngineError, match=re.escape(words)),
            ServerCandidate(url).open(),
        ):
            pass

    def test_nobody_there(self) -> None:
        with pytest.raises(EngineError, match="running"), ServerCandidate("http://127.0.0.1:9/v1").open():
            pass


class TestCommand:
    def run(self, capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
        code = main(["eval", *(str(argument) for argument in arguments)])
        out, err = capsys.readouterr()
        return code, out, err

    def test_json(self, capsys: pytest.CaptureFixture[str], random_checkpoint: Path) -> None:
        options = (
            "--count",
            "3",
            "--device",
            "cpu",
            "--max-context",
            "512",
            "--kl",
            "--kl-questions",
            "2",
            "--json",
        )
        code, out, err = self.run(capsys, "recall", random_checkpoint, "--against", "dtype=bfloat16", *options)
        assert code == 0
        assert "dtype=bfloat16 100%  3 of 3 questions" in err
        data = json.loads(out)
        assert list(data) == ["task", "count", "seed", "method", "version", "candidates", "comparisons"]
        assert (data["task"], data["count"], data["seed"]) == ("recall", 3, SEED)
        first, second = data["candidates"]
        assert list(first) == list(second)
        assert first["label"] == "model"
        assert first["ops"]["router"] == "torch"
        assert (first["device"], first["dtype"], second["dtype"]) == ("cpu", "float32", "bfloat16")
        assert first["accuracy_95"][0] <= first["accuracy"] == first["correct"] / 3 <= first["accuracy_95"][1]
        (pair,) = data["comparisons"]
        assert sum(pair[name] for name in ("both_right", "only_first", "only_second", "both_wrong")) == 3
        assert pair["kl"]["questions"] == 2
        assert 0 < pair["kl"]["mean"] <= pair["kl"]["p99.9"]

    def test_a_table(
        self,
        capsys: pytest.CaptureFixture[str],
        random_checkpoint: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(gsm8k, "MAX_TOKENS", 4)
        file = TestGsm8k().write(tmp_path / "g.jsonl", "#### 2")
        code, out, _ = self.run(capsys, "gsm8k", random_checkpoint, "--data", file)
        assert code == 0
        assert out.startswith("gsm8k: 1 questions, data g.jsonl, greedy\n")

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (("json", "--data", "x"), "gsm8k's alone"),
            (("json", "--kl-questions", "5"), "needs --kl"),
            (("json", "--url", "nowhere"), "base URL"),
            (("json", "--url", "http://127.0.0.1:9/v1", "--against", "dtype=float32"), "model=DIR"),
            (("json", "MODEL", "--url", "http://127.0.0.1:9/v1"), "give one of them"),
            (("json", "MODEL", "--against", "precision=4"), "'precision'"),
            (("gsm8k", "MODEL", "--data", "nowhere.jsonl"), "nowhere.jsonl"),
        ],
    )
    def test_a_mistake_is_one_line(
        self, capsys: pytest.CaptureFixture[str], random_checkpoint: Path, arguments: tuple[str, ...], words: str
    ) -> None:
        code, out, err = self.run(capsys, *(str(random_checkpoint) if a == "MODEL" else a for a in arguments))
        assert (code, out) == (1, "")
        assert err.startswith("nanoserve: error: ")
        assert err.count("\n") == 1
        assert words in err

    def ended_at(self, monkeypatch: pytest.MonkeyPatch, answers: int, end: Callable[[], None]) -> None:
        """Have so many answers graded before something ends the run."""
        graded: list[str] = []

        def grade(task: str, problem: StubProblem, text: str) -> bool:
            graded.append(text)
            if len(graded) > answers:
                end()
            return True

        monkeypatch.setattr(sys.modules["nanoserve.models.demo.tasks"], "grade", grade)

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    @pytest.mark.parametrize("answers", [1, 4, 6])
    def test_ended_it_prints_what_it_has(
        self,
        capfd: pytest.CaptureFixture[str],
        random_checkpoint: Path,
        monkeypatch: pytest.MonkeyPatch,
        answers: int,
        number: signal.Signals,
    ) -> None:
        self.ended_at(monkeypatch, answers, lambda: os.kill(os.getpid(), number))
        before = signal.getsignal(number)
        options = ("--count", "4", "--device", "cpu", "--max-context", "512", "--json")
        code, out, err = self.run(capfd, "json", random_checkpoint, "--against", "dtype=bfloat16", *options)
        assert code == 128 + number
        assert "another signal leaves at once" in err
        assert signal.getsignal(number) is before
        data, counts = json.loads(out), (min(answers, 4), max(answers - 4, 0))
        assert data["cut_short"] == [
            {"label": label, "answered": count, "of": 4}
            for label, count in zip(("model", "dtype=bfloat16"), counts, strict=True)
        ]
        assert [row["total"] for row in data["candidates"]] == [count for count in counts if count]
        assert [pair["both_right"] for pair in data["comparisons"]] == [count for count in counts[1:] if count]

    def test_a_table_that_was_cut_short(
        self, capfd: pytest.CaptureFixture[str], random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.ended_at(monkeypatch, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
        options = ("--count", "4", "--device", "cpu", "--max-context", "512", "--kl")
        code, out, _ = self.run(capfd, "json", random_checkpoint, "--against", "dtype=bfloat16", *options)
        assert code == 128 + signal.SIGTERM
        lines = out.splitlines()
        assert lines[1:3] == [
            "CUT SHORT: model has answered 4 of 4",
            "CUT SHORT: dtype=bfloat16 has answered 2 of 4",
        ]
        assert len({len(line) for line in lines[4:7]}) == 1
        assert "on the 2 questions that both have answered" in out

    def test_interrupted_it_prints_no_result(
        self, capsys: pytest.CaptureFixture[str], random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(task: str, problem: StubProblem, text: str) -> bool:
            raise KeyboardInterrupt

        monkeypatch.setattr(sys.modules["nanoserve.models.demo.tasks"], "grade", interrupt)
        code, out, _ = self.run(capsys, "json", random_checkpoint, "--count", "2")
        assert (code, out) == (130, "")
