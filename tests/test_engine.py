"""The engine's contract: events, limits, isolation, cancellation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanoserve.checkpoint import open_checkpoint
from nanoserve.config import EngineConfig
from nanoserve.engine import Engine, ForcedRequest
from nanoserve.errors import ContextLengthError, EngineError, RequestError
from nanoserve.request import Event, Finish, PromptScores, Request, SamplingParams, Token
from nanoserve.startup import load_engine, prepare

CONTEXT = 64
PROMPT = (5, 100, 200, 300, 301)


@pytest.fixture(scope="module")
def engine(random_checkpoint: Path) -> Engine:
    options = EngineConfig(device="cpu", max_context=CONTEXT, prefill_chunk=8)
    return load_engine(prepare(open_checkpoint(random_checkpoint), options), lambda done, total: None)


def events(engine: Engine, prompt: tuple[int, ...] = PROMPT, **sampling: Any) -> list[Event]:
    return list(engine.generate(Request(prompt, SamplingParams(**sampling))))


def ids(engine: Engine, prompt: tuple[int, ...] = PROMPT, **sampling: Any) -> list[int]:
    return [event.id for event in events(engine, prompt, **sampling) if isinstance(event, Token)]


def greedy(engine: Engine, count: int, **sampling: Any) -> list[int]:
    return ids(engine, max_tokens=count, temperature=0.0, ignore_eos=True, **sampling)


def test_end_tokens_are_the_union_of_both_files(engine: Engine) -> None:
    assert engine.end_ids == {2, 11}


def test_every_request_ends_in_one_finish(engine: Engine) -> None:
    wanted: list[dict[str, Any]] = [{"max_tokens": 3}, {"max_tokens": 0}, {"max_tokens": 1, "prompt_logprobs": 0}]
    for sampling in wanted:
        finishes = [event for event in events(engine, **sampling) if isinstance(event, Finish)]
        assert len(finishes) == 1


def test_a_stop_token_ends_and_is_part_of_the_answer(engine: Engine) -> None:
    answer = greedy(engine, 12)
    stop = answer[5]
    first = answer.index(stop)
    got = events(engine, max_tokens=12, temperature=0.0, ignore_eos=True, stop_token_ids=(stop,))
    assert [event.id for event in got[:-1] if isinstance(event, Token)] == answer[: first + 1]
    assert got[-1] == Finish("stop")


def test_the_models_end_tokens_stop_unless_ignored(engine: Engine) -> None:
    bias = {11: 100.0}
    assert ids(engine, max_tokens=5, temperature=0.0, logit_bias=bias) == [11]
    assert ids(engine, max_tokens=5, temperature=0.0, logit_bias=bias, ignore_eos=True) == [11] * 5
    late = ids(engine, max_tokens=9, temperature=0.0, logit_bias=bias, min_tokens=3)
    assert (len(late), late[-1]) == (4, 11)
    assert 11 not in late[:-1]


def test_state_is_clean_between_requests(engine: Engine) -> None:
    """R18."""
    before = greedy(engine, 20)
    ids(engine, tuple(range(20, 60)), max_tokens=20, logit_bias={7: 50.0}, repetition_penalty=3.0)
    assert greedy(engine, 20) == before


def test_a_seed_gives_the_same_tokens(engine: Engine) -> None:
    runs = [ids(engine, max_tokens=20, seed=seed, ignore_eos=True) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_unseeded_requests_differ(engine: Engine) -> None:
    assert ids(engine, max_tokens=20, ignore_eos=True) != ids(engine, max_tokens=20, ignore_eos=True)


def test_the_context_ends_an_answer_with_length(engine: Engine) -> None:
    """R15."""
    for room in (1, 2, 30):
        prompt = tuple(range(3, 3 + CONTEXT - room))
        for budget in (None, room, 1000):
            got = events(engine, prompt, max_tokens=budget, temperature=0.0, ignore_eos=True)
            assert (len(got) - 1, got[-1]) == (room, Finish("length"))


def test_a_prompt_must_leave_room(engine: Engine) -> None:
    full = tuple(range(3, 3 + CONTEXT))
    with pytest.raises(ContextLengthError) as caught:
        events(engine, full, max_tokens=1)
    assert caught.value.code == "context_length_exceeded"
    assert str(CONTEXT) in str(caught.value)
    assert len(events(engine, full, max_tokens=0, prompt_logprobs=0)) == 2  # scoring needs no room
    with pytest.raises(ContextLengthError):
        events(engine, (*full, 9), max_tokens=0)


@pytest.mark.parametrize(
    ("prompt", "sampling", "param"),
    [
        ((), {}, "prompt"),
        ((5, 512), {}, "prompt"),
        ((5, -1), {}, "prompt"),
        ((5,), {"logit_bias": {512: 1.0}}, "logit_bias"),
        ((5,), {"stop_token_ids": (9999,)}, "stop_token_ids"),
    ],
)
def test_bad_ids_are_named(engine: Engine, prompt: tuple[int, ...], sampling: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        events(engine, prompt, **sampling)
    assert caught.value.param == param


def test_cancellation_is_seen_within_a_token_and_within_a_chunk(engine: Engine) -> None:
    calls = iter([False, False, False, True])  # one prefill chunk, two more tokens, then gone
    got = list(engine.generate(Request(PROMPT, SamplingParams(ignore_eos=True)), lambda: next(calls)))
    assert (len(got), got[-1]) == (4, Finish("cancelled"))
    calls = iter([False, True])
    got = list(engine.generate(Request(tuple(range(3, 43))), lambda: next(calls)))
    assert got == [Finish("cancelled")]
    assert len(greedy(engine, 3)) == 3


def test_closing_the_iterator_frees_everything(engine: Engine) -> None:
    pages = len(engine.cache.free_pages)
    running = engine.generate(Request(PROMPT))
    next(running)
    assert len(engine.cache.free_pages) < pages
    running.close()
    assert len(engine.cache.free_pages) == pages
    assert len(engine.cache.free_slots) == 1


def test_logprobs_come_with_every_token(engine: Engine) -> None:
    got = [
        e
        for e in events(engine, max_tokens=6, temperature=0.0, logprobs=3, ignore_eos=True)
        if isinstance(e, Token)
    ]
    assert len(got) == 6
    for token in got:
        assert token.score is not None
        assert token.score.top[0] == (token.id, pytest.approx(token.score.logprob))
        assert len(token.score.top) == 3
    biased = events(engine, max_tokens=1, temperature=0.0, logprobs=1, logit_bias={9: 100.0}, ignore_eos=True)[0]
    assert isinstance(biased, Token)
    assert biased.id == 9
    assert biased.score is not None
    assert biased.score.logprob < -1, "the bias must not be in the reported distribution"


def test_answers_continue_the_scored_text(engine: Engine) -> None:
    """ln p of generated tokens equals their score when the whole text is a prompt."""
    tokens = [
        e for e in events(engine, max_tokens=10, logprobs=0, seed=4, ignore_eos=True) if isinstance(e, Token)
    ]
    whole = (*PROMPT, *(token.id for token in tokens))
    scores = events(engine, whole, max_tokens=0, prompt_logprobs=0)[0]
    assert isinstance(scores, PromptScores)
    for token, again in zip(tokens, scores.scores[len(PROMPT) :], strict=True):
        assert token.score is not None
        assert again is not None
        assert token.score.logprob == pytest.approx(again.logprob, abs=1e-4)


def test_the_prefill_chunk_does_not_change_answers(random_checkpoint: Path) -> None:
    prompt = tuple(range(10, 50))
    answers: list[list[int]] = []
    for chunk in (1, 7, 64):
        options = EngineConfig(device="cpu", max_context=CONTEXT, prefill_chunk=chunk)
        own = load_engine(prepare(open_checkpoint(random_checkpoint), options), lambda done, total: None)
        answers.append(ids(own, prompt, max_tokens=16, temperature=0.0, ignore_eos=True))
    assert answers[0] == answers[1] == answers[2]


def test_other_dtypes_run(random_checkpoint: Path) -> None:
    for dtype, kv in (("bfloat16", "auto"), ("float32", "fp8"), ("bfloat16", "fp8"), ("float32", "bfloat16")):
        options = EngineConfig(device="cpu", max_context=CONTEXT, dtype=dtype, kv_dtype=kv)  # type: ignore[arg-type]
        own = load_engine(prepare(open_checkpoint(random_checkpoint), options), lambda done, total: None)
        got = events(own, max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=0)
        assert len(got) == 9


def test_a_model_that_answers_with_nan_fails(make_checkpoint: Callable[..., Path]) -> None:
    directory = make_checkpoint(tokenizer=False)
    tensors = load_file(directory / "model.safetensors")
    tensors["backbone.layers.0.mixer.A_log"][:] = torch.nan
    save_file(tensors, directory / "model.safetensors")
    prepared = prepare(open_checkpoint(directory), EngineConfig(device="cpu", max_context=64))
    engine = load_engine(prepared, lambda done, total: None)
    requests = [Request((5, 6), SamplingParams(max_tokens=4))]
    requests.append(Request((5, 6), SamplingParams(max_tokens=0, prompt_logprobs=0)))
    requests.append(ForcedRequest((5, 6), SamplingParams(max_tokens=0), given=1, deliver=lambda logprobs: None))
    for request in requests:
        with pytest.raises(EngineError, match="damaged"):
            list(engine.generate(request))
