"""Logits equal transformers' NemotronH within 1e-4 in float32, however a prompt arrives."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DATA
from hf_reference import reference_greedy, reference_logits, reference_model, write_twin
from torch import Tensor

from nanoserve.checkpoint import open_checkpoint
from nanoserve.config import EngineConfig
from nanoserve.engine import Engine
from nanoserve.models.layers import span_of
from nanoserve.random_checkpoint import write_random_checkpoint
from nanoserve.request import Finish, PromptScores, Request, SamplingParams, Token
from nanoserve.startup import load_engine, prepare
from nanoserve.step import prefill

TOLERANCE = 1e-4
LENGTH = 77
OPTIONS = EngineConfig(device="cpu", max_context=256, prefill_chunk=32)

GEOMETRIES: dict[str, dict[str, Any]] = {
    "lightning, shards, mtp": {"shards": 3, "mtp": True},
    "bf16": {"recipe": "bf16"},
    "nano without latent": {"recipe": "nano", "overrides": {"moe_latent_size": None}},
    "super": {"recipe": "super", "seed": 3},
    "dense only": {"overrides": {"hybrid_override_pattern": "M-*-M-*-"}},
    "mamba only": {"overrides": {"hybrid_override_pattern": "MM", "n_groups": 8, "chunk_size": 7}},
    "attention and dense": {"overrides": {"hybrid_override_pattern": "*-*", "num_key_value_heads": 1}},
    "experts first": {"overrides": {"hybrid_override_pattern": "EM*E", "num_experts_per_tok": 1}},
    "other sizes": {
        "recipe": "super",
        "overrides": {
            "hybrid_override_pattern": None,
            "layers_block_type": ["linear_attention", "full_attention", "moe", "mlp", "mamba", "attention", "moe"],
            "hidden_size": 80,
            "head_dim": 16,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "mamba_num_heads": 6,
            "mamba_head_dim": 24,
            "n_groups": 3,
            "ssm_state_size": 20,
            "n_routed_experts": 11,
            "num_experts_per_tok": 5,
            "moe_intermediate_size": 48,
            "moe_shared_expert_intermediate_size": 112,
            "moe_latent_size": 32,
            "norm_topk_prob": False,
            "routed_scaling_factor": 5.0,
            "vocab_size": 777,
        },
    },
}


@dataclass
class Pair:
    engine: Engine
    reference: Any
    ids: list[int]
    logits: Tensor


def pair_of(directory: Path, folder: Path) -> Pair:
    reference = reference_model(write_twin(directory, folder / "twin"))
    engine = load_engine(prepare(open_checkpoint(directory), OPTIONS), lambda done, total: None)
    generator = torch.Generator().manual_seed(99)
    ids = torch.randint(0, engine.model.config.vocab_size, (LENGTH,), generator=generator).tolist()
    return Pair(engine, reference, ids, reference_logits(reference, ids))


@pytest.fixture(scope="module", params=["nano_nvfp4", "super_mixed", "lightning_w4a16", *GEOMETRIES])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("pair")
    directory = DATA / request.param
    if request.param in GEOMETRIES:
        directory = write_random_checkpoint(folder / "model", tokenizer=False, **GEOMETRIES[request.param])
    return pair_of(directory, folder)


def run(pair: Pair, prefills: list[int]) -> Tensor:
    """Logits of every token: prefill chunks of these sizes, the rest token by token."""
    engine, ids, outputs = pair.engine, torch.tensor(pair.ids), list[Tensor]()
    with engine.cache.sequence(LENGTH) as sequence, torch.inference_mode():
        for size in prefills:
            chunk = ids[sequence.length : sequence.length + size]
            outputs.append(engine.model.logits(prefill(engine.model, engine.cache, sequence, chunk)))
        while sequence.length < LENGTH:
            chunk = ids[sequence.length : sequence.length + 1]
            hidden = engine.model.forward(span_of(chunk, sequence, engine.cache, decode=True))
            outputs.append(engine.model.logits(hidden))
            sequence.length += 1
    return torch.cat(outputs)


@pytest.mark.parametrize(
    "prefills", [[LENGTH], [1] * LENGTH, [16, 1, 31, 29], [40], [], [5, 8]], ids=lambda p: f"{len(p)} prefills"
)
def test_logits_do_not_depend_on_how_the_prompt_arrives(pair: Pair, prefills: list[int]) -> None:
    assert (run(pair, prefills) - pair.logits).abs().max() < TOLERANCE


def test_decode_of_several_tokens_at_once(pair: Pair) -> None:
    """The step takes m tokens of one sequence, which speculation will need."""
    engine, ids, outputs = pair.engine, torch.tensor(pair.ids), list[Tensor]()
    with engine.cache.sequence(LENGTH) as sequence, torch.inference_mode():
        for chunk in ids.split(5):
            hidden = engine.model.forward(span_of(chunk, sequence, engine.cache, decode=True))
            outputs.append(engine.model.logits(hidden))
            sequence.length += len(chunk)
    assert (torch.cat(outputs) - pair.logits).abs().max() < TOLERANCE


def test_greedy_tokens_are_equal(pair: Pair) -> None:
    want = reference_greedy(pair.reference, pair.ids[:20], 64)
    params = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)
    events = list(pair.engine.generate(Request(tuple(pair.ids[:20]), params)))
    assert [event.id for event in events if isinstance(event, Token)] == want
    assert events[-1] == Finish("length")


def test_scores_are_the_references(pair: Pair) -> None:
    request = Request(tuple(pair.ids), SamplingParams(max_tokens=0, prompt_logprobs=2))
    scores = next(event for event in pair.engine.generate(request) if isinstance(event, PromptScores)).scores
    want = pair.logits.log_softmax(-1)
    assert len(scores) == LENGTH
    assert scores[0] is None
    for row, following, score in zip(want[:-1], pair.ids[1:], scores[1:], strict=True):
        assert score is not None
        assert abs(score.logprob - float(row[following])) < TOLERANCE
        best = row.topk(2).values.tolist()
        assert [value for _, value in score.top] == pytest.approx(best, abs=TOLERANCE)
