"""The Triton kernels of a decode step, interpreted, against their references: state and rounding too."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import interpreted  # before any kernel
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from nanoserve.checkpoint import open_checkpoint
from nanoserve.config import EngineConfig
from nanoserve.kernels import attention, mamba, sample, table, tiles, triton_attention, triton_mamba, triton_sample
from nanoserve.kernels.attention import LayerKV
from nanoserve.kernels.mamba import MambaState, MambaWeights
from nanoserve.kernels.place import Place
from nanoserve.kernels.sample import NOT_FINITE, SamplerState
from nanoserve.kernels.ssm import SsmWeights
from nanoserve.request import Request, SamplingParams, Token
from nanoserve.sampler import begin_sampling, restrict
from nanoserve.startup import load_engine, prepare

assert interpreted
FP8, BF16, F32 = torch.float8_e4m3fn, torch.bfloat16, torch.float32


def mamba_case(
    tokens: int, heads: int, size: int, groups: int, states: int, width: int, dtype: torch.dtype
) -> tuple[Tensor, MambaWeights, MambaState]:
    inner = heads * size
    channels = inner + 2 * groups * states
    weights = MambaWeights(
        torch.randn(channels, width) * 0.5,
        torch.randn(channels) * 0.1,
        SsmWeights(torch.log(1 + 15 * torch.rand(heads)), torch.randn(heads), torch.randn(heads) - 3),
        1 + 0.1 * torch.randn(inner),
        1e-5,
    )
    state = mamba.state_of(torch.randn(channels, width - 1).to(dtype), torch.randn(heads, size, states), groups)
    # As a slice, for in_proj may leave its output in a wider buffer.
    projected = torch.randn(tokens, inner + channels + heads + 3).to(dtype)[:, : inner + channels + heads]
    return projected, weights, state


def copy(state: MambaState) -> MambaState:
    return MambaState(state.conv.clone(), state.ssm.clone(), state.tickets.clone())


@pytest.mark.parametrize("fused", [1, 0])
@pytest.mark.parametrize(
    ("tokens", "heads", "size", "groups", "states", "width", "dtype"),
    [
        (1, 4, 8, 2, 16, 4, F32),
        (1, 4, 8, 2, 16, 4, BF16),
        (3, 4, 3, 2, 5, 4, BF16),  # nothing is a power of two
        (8, 2, 6, 1, 7, 2, F32),
        (2, 2, 4, 2, 8, 5, F32),  # more state than tokens
        (2, 2, 4, 1, 8, 1, F32),  # a convolution without state
    ],
)
def test_mamba_is_the_reference_and_leaves_its_state(
    fused: int, tokens: int, heads: int, size: int, groups: int, states: int, width: int, dtype: torch.dtype
) -> None:
    projected, weights, state = mamba_case(tokens, heads, size, groups, states, width, dtype)
    wanted, got = copy(state), copy(state)
    tile = {"block_p": 4 if size < 8 else 8, "warps": 4, "fused": fused}
    for _ in range(2):  # the second launch finds the tickets as the first left them
        want = mamba.mamba_decode(projected, weights, wanted)
        out = triton_mamba.mamba_decode(projected, weights, got, tile)
        assert out.dtype == dtype
        assert_close(out, want, rtol=1e-5, atol=1e-5)
        assert_close(got.ssm, wanted.ssm, rtol=1e-5, atol=1e-5)
        assert torch.equal(got.conv, wanted.conv)
        assert not got.tickets.any()


@pytest.mark.parametrize("dt", [-40.0, -9.0, 0.0, 9.0, 90.0])
def test_mamba_takes_any_time_step(dt: float) -> None:
    """softplus has a tail of its own on either side, and log(1 + small) must not round to 0."""
    projected, weights, state = mamba_case(1, 4, 8, 2, 16, 4, F32)
    projected[:, -4:] = dt
    state.ssm.zero_()  # so that the new state is dt * x * B and nothing hides its rounding
    wanted, got = copy(state), copy(state)
    want = mamba.mamba_decode(projected, weights, wanted)
    out = triton_mamba.mamba_decode(projected, weights, got, {"block_p": 4, "warps": 4, "fused": 1})
    assert_close(out, want, rtol=1e-5, atol=1e-5)
    assert_close(got.ssm, wanted.ssm, rtol=1e-5, atol=0)


def cache_of(pages: int, heads: int, dim: int, dtype: torch.dtype) -> LayerKV:
    k, v = (torch.randn(pages, 16, heads, dim).clamp(-3, 3).to(dtype) for _ in range(2))
    return LayerKV(k, v, 0.5, 0.25) if dtype == FP8 else LayerKV(k, v)


SMALL = {"block": 16, "warps": 4, "wide_block": 16, "wide_warps": 4, "stages": 2, "programs": 8}


@pytest.mark.parametrize(
    ("tokens", "length", "heads", "kv_heads", "dim", "dtype", "kv_dtype"),
    [
        (1, 1, 4, 2, 16, F32, F32),
        (1, 17, 16, 1, 32, BF16, BF16),
        (1, 130, 4, 2, 16, BF16, FP8),
        (3, 150, 6, 2, 20, F32, F32),  # groups of 3, a head of 20
        (5, 9, 4, 4, 8, F32, FP8),  # more splits than blocks
        (8, 64, 32, 2, 16, BF16, BF16),  # rows enough for the wide tile
    ],
)
def test_attention_is_the_reference(
    tokens: int, length: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, kv_dtype: torch.dtype
) -> None:
    used = -(-length // 16)
    cache = cache_of(used + 3, kv_heads, dim, kv_dtype)
    table = torch.randperm(used + 3)[:used].int()
    positions = torch.arange(length - tokens, length)
    q = torch.randn(tokens, heads, dim).to(dtype)
    want = attention.attention(q, cache, table, positions)
    got = triton_attention.attend(q, cache, table, positions, SMALL)
    assert got.dtype == dtype
    # Of BF16 the last bit may differ: the sums before it are in another order.
    assert_close(got, want, rtol=1e-5 if dtype == F32 else 2**-7, atol=1e-5)


def test_attention_looks_at_no_position_past_a_token() -> None:
    """What lies in the pages behind the sequence, and later tokens of the same call, must not count."""
    cache, table, q = cache_of(4, 2, 16, F32), torch.tensor([2, 0, 3, 1]).int(), torch.randn(3, 4, 16)
    before = triton_attention.attend(q, cache, table, torch.arange(20, 23), SMALL)
    for page, slot in ((0, 7), (0, 8), (3, 0), (1, 5)):  # positions 23, 24, 32 and 53
        cache.k[page, slot] = 1e4
        cache.v[page, slot] = torch.nan
    assert torch.equal(triton_attention.attend(q, cache, table, torch.arange(20, 23), SMALL), before)
    cache.k[0, 6], cache.v[0, 6] = 100.0, 100.0  # position 22
    after = triton_attention.attend(q, cache, table, torch.arange(20, 23), SMALL)
    assert torch.equal(after[:2], before[:2])
    assert not torch.equal(after[2], before[2])


@pytest.mark.parametrize(("kv_dtype", "dtype"), [(F32, F32), (BF16, BF16), (FP8, BF16), (FP8, F32)])
def test_append_stores_the_references_bits(kv_dtype: torch.dtype, dtype: torch.dtype) -> None:
    first, second = cache_of(4, 2, 20, kv_dtype), cache_of(4, 2, 20, kv_dtype)
    second.k.copy_(first.k)
    second.v.copy_(first.v)
    table, positions = torch.tensor([2, 0, 3]).int(), torch.arange(13, 19)
    k, v = torch.randn(6, 2, 20).to(dtype), 200 * torch.randn(6, 2, 20).to(dtype)  # v leaves FP8's range
    k[0, 0, 0] = torch.nan
    attention.kv_append(k, v, first, table, positions)
    triton_attention.kv_append(k, v, second, table, positions)
    for one, other in ((first.k, second.k), (first.v, second.v)):
        assert_close(other.float(), one.float(), rtol=0, atol=0, equal_nan=True)


TILE = {"block": 64, "chunk": 32, "warps": 4}


def same_draws(
    vocab: int, count: int, logits: list[Tensor], allowed: bytes | None = None, **sampling: Any
) -> list[int]:
    """Draw from both; every token and all state must agree."""
    states: list[SamplerState] = []
    for _ in range(2):
        state = SamplerState.allocate(vocab, torch.device("cpu"))
        wanted: dict[str, Any] = {"seed": 5, **sampling}
        begin_sampling(state, SamplingParams(**wanted), torch.tensor([1, 2, 3]), [4, 5])
        restrict(state, allowed)
        states.append(state)
    drawn: list[int] = []
    for step in range(count):
        outs = torch.zeros(2, 1, dtype=torch.int64)
        sample.sample(logits[step % len(logits)], states[0], outs[0])
        triton_sample.sample(logits[step % len(logits)], states[1], outs[1], TILE)
        assert torch.equal(outs[0], outs[1])
        drawn.append(int(outs[0]))
    tensors = [f.name for f in fields(SamplerState) if isinstance(getattr(states[0], f.name), Tensor)]
    for name in tensors:
        assert torch.equal(getattr(states[0], name), getattr(states[1], name)), name
    return drawn


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0},
        {},
        {"temperature": 0.7, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
        {"temperature": 0.0, "logit_bias": {7: 30.0, 4: 50.0}, "min_tokens": 4},
        {"top_p": 0.5},
        {"top_k": 3, "seed": 2**40 + 9},
        {"min_p": 0.3},
        {"min_p": 0.01, "top_k": 20, "top_p": 0.6, "temperature": 2.0},
        {"top_p": 1e-6},
    ],
)
def test_draws_are_the_references(sampling: dict[str, Any]) -> None:
    truncated = len(set(sampling) & {"top_p", "top_k"})
    count = 6 if truncated else 12
    drawn = same_draws(150, count, [torch.randn(150) * 3 for _ in range(count)], **sampling)
    if sampling.get("temperature", 1.0) and sampling.get("top_p") != 1e-6:
        assert len(set(drawn)) > 2


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {}, {"top_p": 0.9}])
def test_only_what_is_allowed_is_drawn(sampling: dict[str, Any]) -> None:
    allowed = {31, 32, 100, 149}
    words = sum(1 << id for id in allowed).to_bytes(20, "little")  # five words for 150 ids
    drawn = same_draws(150, 6, [torch.randn(150) for _ in range(6)], words, **sampling)
    assert set(drawn) <= allowed


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 1.0}])
def test_ties_stay_as_in_the_reference(sampling: dict[str, Any]) -> None:
    """Equal scores, in several blocks; 150 of them, and two more that are lower."""
    logits = torch.zeros(152)
    logits[[3, 80]] = -1.0
    drawn = same_draws(152, 6, [logits], **sampling)
    assert not {3, 80} & set(drawn)
    assert len(set(drawn)) == 1 if sampling == {"temperature": 0.0} else len(set(drawn)) > 2


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's of infinities, in the interpreter
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"top_p": 0.9}])
def test_logits_that_are_no_numbers_give_no_token(wrong: float, sampling: dict[str, Any]) -> None:
    logits = torch.randn(150)
    logits[77] = wrong
    state = SamplerState.allocate(150, torch.device("cpu"))
    begin_sampling(state, SamplingParams(**sampling), torch.tensor([1]), [])
    out = torch.zeros(1, dtype=torch.int64)
    triton_sample.sample(logits, state, out, TILE)
    assert int(out) == int(state.drawn[0]) == NOT_FINITE
    assert (int(state.step), float(state.counts.sum())) == (1, 0.0)


def test_the_engine_answers_alike_on_these_kernels(
    random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decode steps interpreted: the reference's tokens and logprobs."""

    def anywhere(place: Place) -> None:
        return None

    monkeypatch.setattr(table, "REQUIREMENTS", {**table.REQUIREMENTS, "triton": anywhere})
    coarse = {"mamba_decode": {"block_p": 32, "warps": 4, "fused": 1}, "attention_decode": SMALL, "sample": TILE}
    monkeypatch.setattr(tiles, "_BASE", coarse)
    plain = dict.fromkeys(table.BACKENDS, "torch")
    own = plain | dict.fromkeys(coarse, "triton") | {"kv_append": "triton"}
    answers: list[list[tuple[int, float]]] = []
    for ops in (plain, own):
        options = EngineConfig(device="cpu", max_context=64, ops=ops)
        engine = load_engine(prepare(open_checkpoint(random_checkpoint), options), lambda done, total: None)
        wanted = SamplingParams(max_tokens=4, seed=7, min_p=0.01, logprobs=0, ignore_eos=True)
        events = engine.generate(Request(tuple(range(30, 50)), wanted))
        tokens = [event for event in events if isinstance(event, Token)]
        answers.append([(token.id, token.score.logprob if token.score else 0.0) for token in tokens])
    assert [id for id, _ in answers[0]] == [id for id, _ in answers[1]]
    assert [score for _, score in answers[0]] == pytest.approx([score for _, score in answers[1]], abs=1e-4)
