"""By hand, on a machine with a GPU: the torch column on CUDA against the CPU. Not collected by pytest.

    PYTHONPATH=. python tests/gpu_check.py COMMIT > tests/results/torch_column_NAME.json

Float32 on both: logits of 150 tokens, and 64 tokens of ModelOpt's checkpoints, greedy, seeded and constrained
(they have vocabularies of 512). Then the default GPU types (BF16, FP8 KV where declared) against float32 on the
CPU, for information: these are noise models, whose router choices flip on any rounding. Last, Nano's geometry cut
to 12 layers and 16 experts, which shows that real sizes run and what the reference costs there: medians of three.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanoserve.checkpoint import open_checkpoint
from nanoserve.config import EngineConfig, build
from nanoserve.engine import Engine
from nanoserve.random_checkpoint import write_random_checkpoint
from nanoserve.request import Request, SamplingParams, Token
from nanoserve.startup import load_engine, prepare
from nanoserve.step import prefill

DATA = Path(__file__).parent / "data"
NANO_CUT: dict[str, Any] = {
    "hybrid_override_pattern": "MEMEM*EMEMEM",
    "hidden_size": 2688,
    "vocab_size": 131072,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "mamba_num_heads": 64,
    "mamba_head_dim": 64,
    "ssm_state_size": 128,
    "n_groups": 8,
    "chunk_size": 128,
    "n_routed_experts": 16,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "moe_latent_size": None,
}


def engine_of(path: Path, **options: object) -> Engine:
    config = build(EngineConfig, {"max_context": 4096, **options}, env={})
    return load_engine(prepare(open_checkpoint(path), config), lambda done, total: None)


def logits(engine: Engine, ids: list[int]) -> Tensor:
    with engine.cache.sequence(len(ids)) as sequence, torch.inference_mode():
        prompt = torch.tensor(ids, device=engine.device)
        return engine.model.logits(prefill(engine.model, engine.cache, sequence, prompt)).cpu()


def tokens(engine: Engine, ids: list[int], **sampling: Any) -> list[int]:
    request = Request(tuple(ids), SamplingParams(ignore_eos=True, **sampling))
    return [event.id for event in engine.generate(request) if isinstance(event, Token)]


class Residues:
    """Allows the ids of one residue modulo 3 after another: a mask of its own for every token."""

    ended = False

    def __init__(self) -> None:
        self._step = 0

    def allowed(self) -> bytes:
        return sum(1 << id for id in range(20 + self._step % 3, 512, 3)).to_bytes(64, "little")

    def push(self, token: int) -> None:
        assert token % 3 == (20 + self._step) % 3
        self._step += 1


def constrained(engine: Engine, ids: list[int]) -> list[int]:
    request = Request(tuple(ids), SamplingParams(max_tokens=64, seed=3), constraint=Residues)
    return [event.id for event in engine.generate(request) if isinstance(event, Token)]


def compare(path: Path) -> dict[str, Any]:
    ids = torch.randint(0, 512, (150,)).tolist()
    cpu = engine_of(path, device="cpu")
    gpu = engine_of(path, device="cuda", dtype="float32", kv_dtype="float32")
    usual = engine_of(path, device="cuda")
    want = logits(cpu, ids)
    seeded = {"max_tokens": 64, "seed": 3, "top_p": 0.9, "top_k": 40}
    return {
        "float32_max_logit_difference": (want - logits(gpu, ids)).abs().max().item(),
        "greedy_64_equal": tokens(cpu, ids[:20], max_tokens=64, temperature=0.0)
        == tokens(gpu, ids[:20], max_tokens=64, temperature=0.0),
        "seeded_64_equal": tokens(cpu, ids[:20], **seeded) == tokens(gpu, ids[:20], **seeded),
        "constrained_64_equal": constrained(cpu, ids[:20]) == constrained(gpu, ids[:20]),
        "default_types": [str(usual.model.dtype), str(usual.cache.shape.kv_dtype)],
        "default_relative_logit_error": ((want - logits(usual, ids)).norm() / want.norm()).item(),
    }


def time_real_sizes(folder: Path) -> dict[str, float]:
    path = write_random_checkpoint(folder / "nano", recipe="lightning", overrides=NANO_CUT, tokenizer=False)
    engine = engine_of(path, device="cuda")
    ids = torch.randint(0, 131072, (2048,)).tolist()
    tokens(engine, ids, max_tokens=2)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    first: list[float] = []
    step: list[float] = []
    for _ in range(3):
        for count, times in ((1, first), (33, step)):
            started = time.perf_counter()
            tokens(engine, ids, max_tokens=count)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
    ttft = statistics.median(first)
    return {
        "ttft_ms_2048": ttft * 1e3,
        "tpot_ms": (statistics.median(step) - ttft) / 32 * 1e3,
        "memory_grew_bytes": torch.cuda.memory_allocated() - before,
    }


def main() -> None:
    torch.manual_seed(0)
    names = ("nano_nvfp4", "super_mixed", "lightning_w4a16")
    with tempfile.TemporaryDirectory() as folder:
        result = {
            "commit": sys.argv[1],
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(),
            **{name: compare(DATA / name) for name in names},
            "nano_12_layers_16_experts": time_real_sizes(Path(folder)),
        }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
