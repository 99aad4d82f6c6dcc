"""Decode steps launched ahead, and as graphs: the same answers as one after another. Graphs are stood in for here:
what would be captured is run at each replay, by the same code."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nanoserve.checkpoint import open_checkpoint
from nanoserve.config import EngineConfig
from nanoserve.engine import Engine
from nanoserve.errors import BackendError, EngineError
from nanoserve.graph import AHEAD, Decoder, Work, obstacles
from nanoserve.kernels.sample import RING
from nanoserve.kernels.table import BACKENDS, Ops, Resolution, select
from nanoserve.request import Event, Finish, Request, SamplingParams, Token
from nanoserve.startup import load_engine, prepare

PROMPT = (5, 100, 200, 300, 301)
CONTEXT = 64


@pytest.fixture(scope="module")
def plain(random_checkpoint: Path) -> Engine:
    options = EngineConfig(device="cpu", max_context=CONTEXT, prefill_chunk=8)
    return load_engine(prepare(open_checkpoint(random_checkpoint), options), lambda done, total: None)


def captured_by_name(work: Work) -> Work:
    return work


def with_decoder(engine: Engine, *, ahead: int, graph: bool) -> Engine:
    """The engine with steps launched in another way, over the same weights and buffers."""
    parts = (engine.model, engine.cache, engine.buffers, engine.sampler)
    decoder = Decoder.make(*parts, captured_by_name if graph else None)
    decoder.ahead = ahead
    return replace(engine, decoder=decoder)


def events(engine: Engine, **sampling: Any) -> list[Event]:
    return list(engine.generate(Request(PROMPT, SamplingParams(**sampling))))


def ids(engine: Engine, **sampling: Any) -> list[int]:
    return [event.id for event in events(engine, **sampling) if isinstance(event, Token)]


SAMPLINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"seed": 3},
    {"seed": 4, "top_p": 0.9, "top_k": 20, "min_p": 0.01},
    {"seed": 5, "logprobs": 2, "repetition_penalty": 1.2},
)


@pytest.mark.parametrize(("ahead", "graph"), [(0, True), (AHEAD, True), (5, False)])
def test_answers_do_not_depend_on_how_steps_are_launched(plain: Engine, ahead: int, graph: bool) -> None:
    other = with_decoder(plain, ahead=ahead, graph=graph)
    for sampling in SAMPLINGS:
        for budget in (1, 2, 12):
            wanted = {"max_tokens": budget, "ignore_eos": True, **sampling}
            assert events(other, **wanted) == events(plain, **wanted)


@pytest.mark.parametrize("graph", [False, True])
def test_steps_past_the_end_leave_nothing_behind(plain: Engine, graph: bool) -> None:
    other = with_decoder(plain, ahead=AHEAD, graph=graph)
    before = ids(plain, max_tokens=16, temperature=0.0, ignore_eos=True)
    stop = before[7]
    got = events(other, max_tokens=16, temperature=0.0, ignore_eos=True, stop_token_ids=(stop,))
    assert (got[-1], len(got) - 2) == (Finish("stop"), before.index(stop))
    assert other.decoder.launched == before.index(stop) + 1 + AHEAD
    assert len(other.cache.free_pages) == other.cache.shape.pages
    assert ids(other, max_tokens=16, temperature=0.0, ignore_eos=True) == before


def test_no_step_is_launched_past_the_budget(plain: Engine) -> None:
    """It would write to pages that the sequence does not have."""
    other = with_decoder(plain, ahead=AHEAD, graph=True)
    ids(other, max_tokens=6, temperature=0.0, ignore_eos=True)
    assert other.decoder.launched == 6


def test_damaged_weights_are_told_though_steps_were_launched_ahead(plain: Engine) -> None:
    other = with_decoder(plain, ahead=AHEAD, graph=True)
    head = plain.model.ops.head

    def broken(*args: Any) -> torch.Tensor:
        return head(*args).mul_(torch.nan)

    model = replace(plain.model, ops=replace(plain.model.ops, head=broken))
    other.decoder.model = model
    assert other.decoder.graph is not None
    other.decoder.graph = replace(other.decoder.graph, model=model, captured={})
    with pytest.raises(EngineError, match="damaged"):
        events(other, max_tokens=20, ignore_eos=True)
    assert len(ids(plain, max_tokens=3, ignore_eos=True)) == 3


def test_a_graph_is_captured_once_for_each_way_of_sampling(plain: Engine) -> None:
    captures: list[int] = []

    def capture(work: Work) -> Work:
        captures.append(1)
        return work

    decoder = Decoder.make(plain.model, plain.cache, plain.buffers, plain.sampler, capture)
    other = replace(plain, decoder=decoder)
    common = len(captures)
    for seed in (1, 2):
        ids(other, max_tokens=4, seed=seed, ignore_eos=True)
        ids(other, max_tokens=4, seed=seed, top_p=0.3, ignore_eos=True)
        ids(other, max_tokens=4, temperature=0.0, top_k=7, ignore_eos=True)
    assert len(captures) == common, "plain, greedy and top_p draws are captured when the engine starts"
    ids(other, max_tokens=4, top_k=7, ignore_eos=True)
    ids(other, max_tokens=4, top_k=9, ignore_eos=True)
    assert len(captures) == common + 1


def test_the_ring_holds_what_is_ahead() -> None:
    assert AHEAD + 1 < RING


def ops_on(backends: dict[str, str]) -> Ops:
    """An op table as it would be resolved where those backends run."""
    rows = tuple(Resolution(op, backends.get(op, "triton"), "", ()) for op in BACKENDS)
    return replace(select(torch.device("cpu"), torch.bfloat16, {}), report=rows)


def test_what_asks_the_host_is_named() -> None:
    assert not obstacles(ops_on({}), torch.device("cuda"))
    found = obstacles(ops_on({"moe_add": "torch", "attention_prefill": "torch"}), torch.device("cuda"))
    assert [str(obstacle) for obstacle in found] == ["moe_add on torch asks which experts were chosen"]
    (only,) = obstacles(ops_on({}), torch.device("cpu"))
    assert str(only) == "a CPU has no CUDA graphs"


def test_a_graph_that_cannot_be_is_refused_and_else_the_reason_is_told(random_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(random_checkpoint)
    with pytest.raises(
        BackendError, match=r"decode is 'graph', and a CPU has no CUDA graphs: use 'auto' or 'eager'"
    ):
        prepare(checkpoint, EngineConfig(device="cpu", max_context=CONTEXT, decode="graph"))
    told = {
        choice: prepare(checkpoint, EngineConfig(device="cpu", max_context=CONTEXT, decode=choice)).decode
        for choice in ("auto", "eager")
    }
    assert told == {"auto": "op by op (a CPU has no CUDA graphs)", "eager": "op by op (chosen by name)"}
