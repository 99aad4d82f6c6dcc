from typing import Any

import pytest
import torch
from torch import Tensor

from nanoserve.kernels import sample as reference
from nanoserve.kernels.sample import NOT_FINITE, RING, SamplerState
from nanoserve.request import SamplingParams
from nanoserve.sampler import begin_sampling, restrict, token_scores

VOCAB = 8
LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, 1.5, -2.0, 0.2])


def state(
    vocab: int = VOCAB, prompt: tuple[int, ...] = (3,), end_ids: tuple[int, ...] = (), **fields: Any
) -> SamplerState:
    own = SamplerState.allocate(vocab, torch.device("cpu"))
    begin_sampling(own, SamplingParams(**fields), torch.tensor(prompt), end_ids)
    return own


def sample(logits: Tensor, own: SamplerState) -> Tensor:
    out = torch.empty(1, dtype=torch.int64)
    reference.sample(logits, own, out)
    return out


def draws(count: int, logits: Tensor = LOGITS, **fields: Any) -> Tensor:
    """Frequencies of tokens over many independent draws."""
    own = state(len(logits), seed=7, **fields)
    drawn = torch.stack([sample(logits, own) for _ in range(count)])
    return torch.bincount(drawn.flatten(), minlength=len(logits)) / count


def test_greedy_takes_the_largest_and_the_lowest_id_of_a_tie() -> None:
    assert sample(LOGITS, state(temperature=0.0)).item() == 0
    assert sample(torch.tensor([0.0, 3.0, 3.0]), state(3, (0,), temperature=0.0)).item() == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    got, want = draws(20_000, temperature=temperature), (LOGITS / temperature).softmax(-1)
    assert (got - want).abs().max() < 0.012  # 3.4 standard errors of the likeliest


def test_truncations_keep_just_the_right_tokens() -> None:
    ordered = LOGITS.softmax(-1).sort(descending=True)
    assert draws(2000, top_k=3).nonzero().flatten().tolist() == sorted(ordered.indices[:3].tolist())
    nucleus = int((ordered.values.cumsum(-1) < 0.7).sum()) + 1
    assert draws(2000, top_p=0.7).nonzero().flatten().tolist() == sorted(ordered.indices[:nucleus].tolist())
    likely = (LOGITS.softmax(-1) >= 0.3 * LOGITS.softmax(-1).max()).nonzero().flatten().tolist()
    assert draws(2000, min_p=0.3).nonzero().flatten().tolist() == likely
    assert draws(500, top_p=1e-6).tolist()[0] == 1.0


def test_top_p_is_of_what_top_k_left() -> None:
    got = draws(4000, top_k=2, top_p=0.72)  # of ids 0 and 5: 0.62 and 0.38
    assert got.nonzero().flatten().tolist() == [0, 5]


def test_a_seed_repeats_and_seeds_differ() -> None:
    flat = torch.zeros(1000)

    def run(seed: int) -> list[int]:
        own = state(1000, seed=seed)
        return [int(sample(flat, own)) for _ in range(20)]

    assert run(5) == run(5)
    assert len({tuple(run(seed)) for seed in (5, 6, -5, 2**62, 5 + 2**32)}) == 5
    assert len(set(run(5))) > 15


def test_penalties_and_bias() -> None:
    own = state(temperature=0.0, presence_penalty=1.2)
    assert [int(sample(LOGITS, own)) for _ in range(3)] == [0, 5, 1]
    own = state(temperature=0.0, frequency_penalty=0.3)
    assert [int(sample(LOGITS, own)) for _ in range(4)] == [0, 0, 5, 0]
    own = state(prompt=(0,), temperature=0.0, repetition_penalty=2.0)  # the prompt counts
    assert [int(sample(LOGITS, own)) for _ in range(2)] == [5, 0]
    assert int(sample(-LOGITS - 3, state(prompt=(6,), temperature=0.0, repetition_penalty=9.0))) == 3
    assert int(sample(LOGITS, state(temperature=0.0, logit_bias={6: 100.0, 0: -1.0}))) == 6


def test_end_tokens_wait_for_min_tokens() -> None:
    own = state(end_ids=(0, 5), temperature=0.0, min_tokens=2)
    assert [int(sample(LOGITS, own)) for _ in range(3)] == [1, 1, 0]


def test_logits_are_not_changed() -> None:
    logits = LOGITS.clone()
    sample(logits, state(temperature=0.7, top_k=2, top_p=0.5, logit_bias={1: 5.0}, repetition_penalty=1.5))
    assert torch.equal(logits, LOGITS)


def test_scores_are_of_the_plain_distribution() -> None:
    rows = torch.randn(3, 50)
    scores = token_scores(rows, torch.tensor([4, 7, 0]), 5)
    want = rows.log_softmax(-1)
    assert [s.logprob for s in scores] == [pytest.approx(float(want[i, j])) for i, j in ((0, 4), (1, 7), (2, 0))]
    for row, score in zip(want, scores, strict=True):
        best = sorted(range(50), key=lambda i, row=row: -float(row[i]))[:5]
        assert [i for i, _ in score.top] == best
    assert token_scores(rows, torch.tensor([1, 1, 1]), 0)[0].top == ()


def test_a_request_leaves_nothing_to_the_next() -> None:
    own = state(
        prompt=(3,), end_ids=(1,), temperature=0.0, logit_bias={6: 100.0}, min_tokens=5, presence_penalty=2.0
    )
    addresses = [tensor.data_ptr() for tensor in (own.bias, own.seen, own.counts, own.ends, own.step)]
    assert int(sample(LOGITS, own)) == 6
    begin_sampling(own, SamplingParams(temperature=0.0), torch.tensor((2,)), ())
    fresh = state(prompt=(2,), temperature=0.0)
    assert (
        [int(sample(LOGITS, own)) for _ in range(3)] == [int(sample(LOGITS, fresh)) for _ in range(3)] == [0] * 3
    )
    assert [tensor.data_ptr() for tensor in (own.bias, own.seen, own.counts, own.ends, own.step)] == addresses


def restricted(ids: set[int], **fields: Any) -> SamplerState:
    own = state(**fields)
    restrict(own, sum(1 << id for id in ids).to_bytes(4, "little"))
    return own


def test_only_what_is_allowed_is_drawn() -> None:
    assert sample(LOGITS, restricted({3, 6}, temperature=0.0)).item() == 3
    own = restricted({3, 6}, seed=1)
    assert {int(sample(LOGITS, own)) for _ in range(200)} == {3, 6}
    restrict(own, None)
    assert {int(sample(LOGITS, own)) for _ in range(200)} > {3, 6}


def test_truncation_is_of_what_is_allowed() -> None:
    for fields in ({"top_k": 1}, {"top_p": 0.01}, {"min_p": 0.9}):
        own = restricted({3, 6}, seed=1, **fields)
        assert {int(sample(LOGITS, own)) for _ in range(50)} == {3}


def test_a_new_request_is_not_restricted() -> None:
    own = restricted({6}, temperature=0.0)
    begin_sampling(own, SamplingParams(temperature=0.0), torch.tensor([3]), ())
    assert sample(LOGITS, own).item() == 0


def test_the_last_tokens_are_kept_in_their_places() -> None:
    own = state(1000, seed=3)
    drawn = [int(sample(torch.zeros(1000), own)) for _ in range(RING + 3)]
    assert own.drawn.tolist() == [*drawn[RING:], *drawn[3:RING]]


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_no_numbers_give_no_token(wrong: float) -> None:
    own, logits = state(temperature=0.0), LOGITS.clone()
    logits[2] = wrong
    assert int(sample(logits, own)) == int(own.drawn[0]) == NOT_FINITE


def test_what_truncates_is_known_on_the_host() -> None:
    assert state(temperature=0.0, top_k=3, top_p=0.5).truncations == ()
    assert state(top_k=VOCAB).truncations == ()
    assert state(top_k=3, top_p=0.5, min_p=0.1).truncations == ("min_p", "top_k", "top_p")
