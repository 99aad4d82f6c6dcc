"""The Python API: text in, text out, in this process."""

import gc
import json
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import DATA
from torch import Tensor

import nanoserve
from nanoserve.engine import Engine
from nanoserve.errors import CheckpointError, ConfigError, EngineError, RequestError
from nanoserve.grammar import Choice, JsonSchema
from nanoserve.local import LocalEngine
from nanoserve.request import sampling_defaults
from nanoserve.startup import Prepared, load_engine
from nanoserve.warm_up import Say
from nanoserve.weights import Progress

CHAT = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def engine(random_checkpoint: Path) -> Iterator[LocalEngine]:
    with nanoserve.load(random_checkpoint, device="cpu", max_context=512) as engine:
        yield engine


def test_prompts_are_strings_messages_or_ids(engine: LocalEngine) -> None:
    assert engine.tokenizer is not None
    ids = engine.tokenizer.encode("Hello there")
    by_text = engine.generate("Hello there", max_tokens=8, temperature=0.0)
    by_ids = engine.generate(ids, max_tokens=8, temperature=0.0)
    assert by_text == by_ids
    assert by_text.usage.prompt_tokens == len(ids)
    chat = engine.generate(CHAT, max_tokens=8, temperature=0.0)
    assert chat.usage.prompt_tokens == len(engine.tokenizer.encode_chat(CHAT))
    for wrong in ([], "", [CHAT[0], 5], [[1]]):
        with pytest.raises(RequestError):
            engine.generate(wrong, max_tokens=1)  # type: ignore[arg-type]  # wrong on purpose


def test_a_completion_is_complete(engine: LocalEngine) -> None:
    answer = engine.generate("abc", max_tokens=12, seed=3, logprobs=2, ignore_eos=True)
    assert engine.tokenizer is not None
    assert answer.text == engine.tokenizer.decode(answer.token_ids)
    assert answer.finish_reason == "length"
    assert answer.usage.completion_tokens == len(answer.token_ids) == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12
    assert answer.logprobs is not None
    assert len(answer.logprobs) == 12
    assert engine.generate("abc", max_tokens=2).logprobs is None


def test_streaming_gives_the_same_text(engine: LocalEngine) -> None:
    whole = engine.generate("abc", max_tokens=40, seed=5, ignore_eos=True)
    deltas = list(engine.stream("abc", max_tokens=40, seed=5, ignore_eos=True))
    assert "".join(delta.text for delta in deltas) == whole.text
    assert [token for delta in deltas for token in delta.token_ids] == whole.token_ids
    assert {delta.finish_reason for delta in deltas[:-1]} == {None}
    assert deltas[-1].finish_reason == "length"


def test_stop_strings_never_show(engine: LocalEngine) -> None:
    whole = engine.generate("abc", max_tokens=60, seed=5, ignore_eos=True)
    stop = whole.text[10:13]
    cut = whole.text.index(stop)
    for got in (
        engine.generate("abc", max_tokens=60, seed=5, ignore_eos=True, stop=stop),
        engine.generate("abc", max_tokens=60, seed=5, ignore_eos=True, stop=["never there", stop]),
    ):
        assert (got.text, got.finish_reason) == (whole.text[:cut], "stop")
        assert len(got.token_ids) < 60


def test_closing_a_stream_cancels_it_and_the_next_request_runs(engine: LocalEngine) -> None:
    stream = engine.stream("abc", ignore_eos=True)
    next(stream)
    stream.close()
    assert len(engine.generate("abc", max_tokens=2, ignore_eos=True).token_ids) == 2


def test_two_open_streams_in_one_thread_do_not_block_one_another(engine: LocalEngine) -> None:
    first = engine.stream("abc", max_tokens=5, temperature=0.0, ignore_eos=True)
    second = engine.stream("abc", max_tokens=5, temperature=0.0, ignore_eos=True)
    pairs = list(zip(first, second, strict=True))
    assert all(a == b for a, b in pairs)


def test_threads_share_an_engine(engine: LocalEngine) -> None:
    want = engine.generate("xyz", max_tokens=10, temperature=0.0)
    got: list[object] = []
    work: Callable[[], None] = lambda: got.append(engine.generate("xyz", max_tokens=10, temperature=0.0))  # noqa: E731
    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert got == [want] * 6


def test_nothing_of_one_request_is_left_in_the_next(engine: LocalEngine) -> None:
    """R18. Of its text, bias, penalties, grammar, stop strings, or what it was cancelled amid."""
    secret = [{"role": "user", "content": "The secret word is Xylophone7. Keep it."}]

    def ask() -> tuple[list[int], str]:
        answer = engine.generate(CHAT, max_tokens=24, temperature=0.0, ignore_eos=True)
        return answer.token_ids, answer.text

    before = ask()
    engine.generate(secret, max_tokens=24, seed=1, ignore_eos=True, logit_bias={7: 60.0}, repetition_penalty=3.0)
    assert ask() == before
    engine.generate(
        secret, max_tokens=24, presence_penalty=2.0, stop=[before[1][:3], before[1][3:6]], min_tokens=4
    )
    assert ask() == before
    for grammar in (Choice(("yes", "no")), JsonSchema({"type": "object"})):
        engine.generate(secret, max_tokens=6, grammar=grammar, thinking_budget=3)
        assert ask() == before
    stream = engine.stream(secret, max_tokens=200, ignore_eos=True, logit_bias={9: 60.0})
    next(stream)
    stream.close()
    assert ask() == before


def test_score_is_of_each_following_token(engine: LocalEngine) -> None:
    ids = [5, 9, 100, 7, 300]
    scores = engine.score(ids)
    assert len(scores) == 4
    assert engine.score(ids[:3]) == pytest.approx(scores[:2], abs=1e-4)
    assert engine.score([5]) == []
    with pytest.raises(RequestError):
        engine.score([])
    with pytest.raises(RequestError):
        engine.score([5, 512])


@pytest.mark.parametrize(
    ("sampling", "param"),
    [
        ({"temprature": 1.0}, "temprature"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"min_tokens": 9, "max_tokens": 3}, "min_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"stop": [""]}, "stop"),
        ({"logit_bias": {3: 101}}, "logit_bias"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"min_p": 2}, "min_p"),
        ({"top_k": -3}, "top_k"),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"logprobs": True}, "logprobs"),
        ({"seed": 1.5}, "seed"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"logit_bias": {"5": 1.0}}, "logit_bias"),
        ({"logit_bias": [5]}, "logit_bias"),
        ({"stop": [5]}, "stop"),
        ({"stop_token_ids": 5}, "stop_token_ids"),
        ({"stop_token_ids": [5.5]}, "stop_token_ids"),
        ({"ignore_eos": "no"}, "ignore_eos"),
    ],
)
def test_bad_fields_are_named(engine: LocalEngine, sampling: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        engine.stream("abc", **sampling)  # before the first delta is asked for
    assert caught.value.param == param


def test_wrong_prompts_are_typed_errors_and_break_nothing(engine: LocalEngine) -> None:
    wrong: list[Any] = [None, 5, b"abc", [1.0, 2.0], [True, True], {"role": "user"}, [[1]]]
    for prompt in wrong:
        with pytest.raises(RequestError):
            engine.generate(prompt, max_tokens=1)
    wrong.append("abc")
    for ids in wrong:
        with pytest.raises(RequestError):
            engine.score(ids)
    assert len(engine.generate(np.array([1, 2, 3]), max_tokens=2, ignore_eos=True).token_ids) == 2  # type: ignore[arg-type]
    biased = engine.generate([1, 2], max_tokens=2, temperature=0.0, logit_bias={5: 100}, ignore_eos=True)
    assert biased.token_ids == [5, 5]


@pytest.mark.parametrize(
    "entry", [{"top_k": 5.5}, {"temperature": -1}, {"top_p": 0}, {"temperature": "0.6"}, {"temperature": True}]
)
def test_a_generation_config_that_no_request_could_use_is_refused(
    make_checkpoint: Callable[..., Path], entry: dict[str, object]
) -> None:
    directory = make_checkpoint()
    (directory / "generation_config.json").write_text(json.dumps(entry))
    with pytest.raises(CheckpointError) as caught:
        nanoserve.load(directory, device="cpu", max_context=64)
    assert caught.value.file == "generation_config.json"
    assert next(iter(entry)) in str(caught.value)


def test_spellings_of_off_in_a_generation_config() -> None:
    assert sampling_defaults({"top_k": -1, "temperature": 1, "do_sample": True}) == {"top_k": 0, "temperature": 1}
    assert sampling_defaults({"top_k": 50.0, "top_p": None}) == {"top_k": 50}


def test_generation_config_gives_the_defaults(make_checkpoint: Callable[..., Path]) -> None:
    directory = make_checkpoint()
    (directory / "generation_config.json").write_text(
        '{"temperature": 0.0, "top_p": 0.95, "eos_token_id": [2, 11]}'
    )
    with nanoserve.load(directory, device="cpu", max_context=64) as engine:
        runs = [engine.generate("abc", max_tokens=8).token_ids for _ in range(2)]
        assert runs[0] == runs[1] == engine.generate("abc", max_tokens=8, temperature=0.0).token_ids


def test_without_a_tokenizer_ids_go_in_and_out() -> None:
    answer = nanoserve.generate(DATA / "nano_nvfp4", [5, 6, 7], options={"device": "cpu"}, max_tokens=4)
    assert (answer.text, len(answer.token_ids)) == ("", 4)
    with nanoserve.load(DATA / "nano_nvfp4", device="cpu", max_context=64) as engine:
        for prompt in ("text", CHAT):
            with pytest.raises(RequestError, match=r"tokenizer\.json"):
                engine.generate(prompt)
        with pytest.raises(RequestError, match=r"tokenizer\.json"):
            engine.generate([5], stop="x")


def test_bad_options_and_paths_are_typed(tmp_path: Path, random_checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="max_contxt"):
        nanoserve.load(random_checkpoint, max_contxt=5)
    with pytest.raises(CheckpointError):
        nanoserve.load(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="GPU"):
        nanoserve.load(random_checkpoint, device="cuda")


def test_closing_frees_the_weights(random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[weakref.ref[Tensor]] = []

    def loaded(prepared: Prepared, progress: Progress, say: Say) -> Engine:
        engine = load_engine(prepared, progress, say)
        seen.append(weakref.ref(engine.model.embeddings))
        return engine

    monkeypatch.setattr("nanoserve.local.load_engine", loaded)
    engine = nanoserve.load(random_checkpoint, device="cpu", max_context=64)
    engine.generate("abc", max_tokens=2)
    gc.collect()
    assert seen[0]() is not None
    engine.close()
    gc.collect()
    assert seen[0]() is None


def test_a_closed_engine_says_so(random_checkpoint: Path) -> None:
    engine = nanoserve.load(random_checkpoint, device="cpu", max_context=64)
    engine.close()
    engine.close()
    with pytest.raises(EngineError):
        engine.generate("abc")
