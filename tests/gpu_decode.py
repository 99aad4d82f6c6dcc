"""By hand, on a machine with a GPU: decode kernels and graph, in one call of under 9 minutes.

    PYTHONPATH=. python tests/gpu_decode.py COMMIT $OUT [SECTION ...]

On a CPU, in Triton's interpreter and at tiny sizes, to see that the script itself is in order:

    PYTHONPATH=.:tests python -c 'import interpreted, gpu_decode; gpu_decode.main()' COMMIT /tmp

1. kernels against their references at released and odd sizes, on fresh inputs, bit for bit the same when repeated;
2. their times, in a CUDA graph over as many states as the model has layers, and those of other tiles;
3. greedy and seeded tokens: torch, Triton op by op, and Triton as a graph (the last two bit for bit).

Every section writes what it has to gpu_decode.json at once (gpu_decode_SECTION.json where sections are named), and
a fault in one leaves the others to run.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanoserve.checkpoint import open_checkpoint
from nanoserve.config import EngineConfig, build
from nanoserve.engine import Engine
from nanoserve.files import DEMO_MODEL
from nanoserve.graph import Capture, obstacles
from nanoserve.kernels import attention, mamba, sample, table, tiles, triton_attention, triton_mamba, triton_sample
from nanoserve.kernels.attention import LayerKV
from nanoserve.kernels.mamba import MambaState, MambaWeights
from nanoserve.kernels.sample import SamplerState
from nanoserve.kernels.ssm import SsmWeights
from nanoserve.request import Request, SamplingParams, Token
from nanoserve.sampler import begin_sampling
from nanoserve.startup import load_engine, prepare

REHEARSE = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if REHEARSE else "cuda")
DATA = Path(__file__).parent / "data"
LIMIT = 8.5 * 60
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
REPEATS = 1 if REHEARSE else 20
STARTED = time.monotonic()


@dataclass
class Report:
    """What is known so far, on the disk after every addition."""

    path: Path
    data: dict[str, Any] = field(default_factory=dict[str, Any])

    def add(self, name: str, value: Any) -> None:
        self.data[name] = value
        self.path.write_text(json.dumps(self.data, indent=1) + "\n")

    def section(self, name: str, work: Callable[["Report"], None]) -> None:
        began = time.monotonic()
        if began - STARTED > LIMIT:
            self.add(name, "not run: out of time")
            return
        try:
            work(self)
        except Exception:  # noqa: BLE001  # the others are to run all the same
            say(f"!! {name} failed\n{traceback.format_exc()}")
            self.add(f"{name}_error", traceback.format_exc())
        say(f"-- {name}: {time.monotonic() - began:.0f} s, {time.monotonic() - STARTED:.0f} s in all")


def say(text: str) -> None:
    print(text, flush=True)


def error_of(got: Tensor, want: Tensor) -> float:
    """‖got - want‖ / ‖want‖; NaN never passes a comparison."""
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))


def time_us(works: Sequence[Callable[[], object]]) -> float:
    """Microseconds a work, one after another in a graph; each has its own memory, so that caches stay cold."""

    def run() -> None:
        for work in works:
            work()

    run()
    if REHEARSE:
        return 0.0
    replay = Capture.new()(run)
    replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(REPEATS):
        replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / REPEATS / len(works) * 1e3


# 1 and 2: Mamba


def mamba_case(tokens: int, heads: int, size: int, groups: int, states: int, width: int = 4) -> Any:
    inner = heads * size
    channels = inner + 2 * groups * states

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE)

    ssm = SsmWeights(torch.log(1 + 15 * torch.rand(heads, device=DEVICE)), normal(heads), normal(heads) - 3)
    weights = MambaWeights(
        normal(channels, width) * 0.5, normal(channels) * 0.1, ssm, 1 + 0.1 * normal(inner), 1e-5
    )
    state = mamba.state_of(normal(channels, width - 1).to(BF16), normal(heads, size, states), groups)
    return normal(tokens, inner + channels + heads).to(BF16), weights, state


def copy_of(state: MambaState) -> MambaState:
    return MambaState(state.conv.clone(), state.ssm.clone(), state.tickets.clone())


NANO, SUPER, ODD = (64, 64, 8, 128), (128, 64, 8, 128), (6, 20, 2, 24)
SIZES = {"odd": ODD} if REHEARSE else {"nano": NANO, "super": SUPER, "odd": ODD}


def check_mamba(report: Report) -> None:
    rows: list[dict[str, Any]] = []
    for name, sizes in SIZES.items():
        for tokens in (1, 3) if REHEARSE else (1, 2, 5, 8):
            for fused in (1, 0):
                tile = {**tiles.tile_of("mamba_decode", DEVICE), "fused": fused}
                projected, weights, state = mamba_case(tokens, *sizes)
                want_state, got_state = copy_of(state), copy_of(state)
                want = mamba.mamba_decode(projected, weights, want_state)
                got = triton_mamba.mamba_decode(projected, weights, got_state, tile)
                same = True
                for _ in range(0 if REHEARSE else 50):  # a race would show as a result that moves
                    again = copy_of(state)
                    out = triton_mamba.mamba_decode(projected, weights, again, tile)
                    same &= torch.equal(out, got) and torch.equal(again.ssm, got_state.ssm)
                    same &= torch.equal(again.conv, got_state.conv) and not bool(again.tickets.any())
                row: dict[str, Any] = {
                    "shape": name, "tokens": tokens, "fused": fused, "y": error_of(got, want),
                    "ssm": error_of(got_state.ssm, want_state.ssm),
                    "conv_equal": torch.equal(got_state.conv, want_state.conv), "repeats_equal": same,
                }  # fmt: skip
                row["right"] = row["y"] < 5e-3 and row["ssm"] < 1e-3 and row["conv_equal"] and same
                rows.append(row)
    told(report, "mamba", rows)


def told(report: Report, name: str, rows: list[dict[str, Any]]) -> None:
    report.add(name, rows)
    wrong = [row for row in rows if not row["right"]]
    say(f"{name}: {len(rows) - len(wrong)} of {len(rows)} right")
    for row in wrong:
        say(f"   WRONG {row}")


def time_mamba(report: Report) -> None:
    rows: list[dict[str, Any]] = []
    cuts = few((8, 4), (4, 2), (8, 2), (16, 4), (16, 8), (32, 8))
    for name, sizes, layers in (("odd", ODD, 2),) if REHEARSE else (("nano", NANO, 23), ("super", SUPER, 40)):
        cases = [mamba_case(1, *sizes) for _ in range(layers)]
        moved = 2 * cases[0][2].ssm.nbytes
        for (block, warps), fused in product(cuts, (1, 0)):
            tile = {"block_p": block, "warps": warps, "fused": fused}
            us = time_us([partial(triton_mamba.mamba_decode, *case, tile) for case in cases])
            rows.append({"shape": name, **tile, "us": us, "tb_s": moved / max(us, 1e-9) / 1e6})
    best(report, "mamba_times", rows)


def few(*choices: Any) -> tuple[Any, ...]:
    """All of them, or one in a rehearsal."""
    return choices[:1] if REHEARSE else choices


def best(report: Report, name: str, rows: list[dict[str, Any]]) -> None:
    """Note all, tell the best of each case."""
    report.add(name, rows)
    grouped: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = tuple(row.get(part) for part in ("shape", "context", "kv", "sampling", "tokens"))
        grouped.setdefault(key, []).append(row)
    for own in grouped.values():
        for row in sorted(own, key=lambda row: row["us"])[:3]:
            say(f"   {name} { ({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}) }")


# 1 and 2: attention


def attention_case(tokens: int, length: int, heads: int, kv_heads: int, dim: int, kv: torch.dtype) -> Any:
    used = -(-length // 16)
    k, v = (torch.randn((used + 3, 16, kv_heads, dim), device=DEVICE).clamp(-3, 3).to(kv) for _ in range(2))
    cache = LayerKV(k, v, 0.5, 0.25) if kv == FP8 else LayerKV(k, v)
    pages = torch.randperm(used + 3, device=DEVICE)[:used].int()
    q = torch.randn((tokens, heads, dim), device=DEVICE).to(BF16)
    return q, cache, pages, torch.arange(length - tokens, length, device=DEVICE)


def check_attention(report: Report) -> None:
    rows: list[dict[str, Any]] = []
    lengths = (1, 33) if REHEARSE else (1, 15, 64, 2048, 2049, 5000, 32768)
    for kv in (BF16, FP8):
        for heads, kv_heads, dim in ((6, 2, 20),) if REHEARSE else ((32, 2, 128), (6, 2, 20), (40, 8, 128)):
            for length in lengths:
                for tokens in (t for t in ((1,) if REHEARSE else (1, 2, 3, 8)) if t <= length):
                    _, cache, pages, positions = attention_case(tokens, length, heads, kv_heads, dim, kv)
                    first = LayerKV(cache.k.clone(), cache.v.clone(), cache.k_scale, cache.v_scale)
                    k, v = (torch.randn((tokens, kv_heads, dim), device=DEVICE).to(BF16) * 200 for _ in range(2))
                    attention.kv_append(k, v, first, pages, positions)
                    triton_attention.kv_append(k, v, cache, pages, positions)
                    equal = all(
                        torch.equal(a.view(torch.uint8), b.view(torch.uint8))
                        for a, b in ((first.k, cache.k), (first.v, cache.v))
                    )
                    case = attention_case(tokens, length, heads, kv_heads, dim, kv)
                    want = attention.attention(*case)
                    got = triton_attention.attend(*case)
                    same = all(
                        torch.equal(triton_attention.attend(*case), got) for _ in range(0 if REHEARSE else 5)
                    )
                    row: dict[str, Any] = {
                        "kv": str(kv), "heads": heads, "length": length, "tokens": tokens,
                        "error": error_of(got, want), "append_equal": equal, "repeats_equal": same,
                    }  # fmt: skip
                    row["right"] = row["error"] < 4e-3 and equal and same
                    rows.append(row)
    told(report, "attention", rows)


def time_attention(report: Report) -> None:
    rows: list[dict[str, Any]] = []
    base = tiles.tile_of("attention_decode", DEVICE)
    cuts = few(
        (64, 128, 4, 2), (64, 64, 4, 2), (64, 256, 4, 2), (64, 128, 4, 3), (32, 128, 4, 3), (128, 128, 8, 2),
        (64, 128, 8, 2),
    )  # fmt: skip
    for context, kv in product((40,) if REHEARSE else (2048, 32768), (BF16, FP8)):
        cases = [attention_case(1, context, 32, 2, 16 if REHEARSE else 128, kv) for _ in range(6)]
        moved = 2 * context * 2 * 128 * kv.itemsize
        for cut in cuts:
            own = dict(zip(("block", "programs", "warps", "stages"), cut, strict=True))
            us = time_us([partial(triton_attention.attend, *case, {**base, **own}) for case in cases])
            row = {"context": context, "kv": str(kv), **own, "us": us}
            rows.append({**row, "tb_s": moved / max(us, 1e-9) / 1e6})
    best(report, "attention_times", rows)
    q, cache, pages, positions = attention_case(1, 40, 32, 2, 128, BF16)
    k = torch.randn((1, 2, q.shape[2]), device=DEVICE).to(BF16)
    us = time_us([partial(triton_attention.kv_append, k, k, cache, pages, positions)] * 6)
    report.add("append_us", us)
    say(f"   kv_append {us:.2f} µs")


# 1 and 2: the sampler

SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "top_p": {"top_p": 0.95},
    "top_k": {"top_k": 20},
    "all": {"top_k": 50, "top_p": 0.9, "min_p": 0.01, "temperature": 0.7, "repetition_penalty": 1.2},
}


def sampler(vocab: int, sampling: dict[str, Any]) -> SamplerState:
    state = SamplerState.allocate(vocab, DEVICE)
    wanted: dict[str, Any] = {"seed": 11, **sampling}
    begin_sampling(state, SamplingParams(**wanted), torch.tensor([1, 2, 3], device=DEVICE), [4])
    return state


def check_sampler(report: Report) -> None:
    """Draws are the reference's but where rounding decides: what lies within an ulp of a threshold or the best."""
    vocab, count, rows = (150, 3) if REHEARSE else (131072, 200), 0, list[dict[str, Any]]()
    for name, sampling in SAMPLINGS.items():
        states = [sampler(vocab[0], sampling) for _ in range(2)]
        count, equal = vocab[1], 0
        outs = [torch.zeros(1, dtype=torch.int64, device=DEVICE) for _ in range(2)]
        for _ in range(count):
            logits = torch.randn(vocab[0], device=DEVICE) * 3
            sample.sample(logits, states[0], outs[0])
            triton_sample.sample(logits, states[1], outs[1])
            equal += int(torch.equal(*outs))
            states[1].counts.copy_(states[0].counts)
            states[1].seen.copy_(states[0].seen)
        row = {"sampling": name, "draws": count, "equal": equal}
        rows.append({**row, "right": equal >= (count if name == "greedy" else 0.99 * count)})
    told(report, "sampler", rows)


def time_sampler(report: Report) -> None:
    rows: list[dict[str, Any]] = []
    vocab = 150 if REHEARSE else 131072
    logits, out = torch.randn(vocab, device=DEVICE) * 3, torch.zeros(1, dtype=torch.int64, device=DEVICE)
    for (name, sampling), cut in product(
        SAMPLINGS.items(), few((1024, 128, 4), (2048, 128, 8), (512, 128, 4), (1024, 256, 8))
    ):
        tile: dict[str, int] = dict(zip(("block", "chunk", "warps"), cut, strict=True))
        us = time_us([partial(triton_sample.sample, logits, sampler(vocab, sampling), out, tile)])
        rows.append({"sampling": name, **tile, "us": us})
    best(report, "sampler_times", rows)


# 3: tokens


def in_triton() -> dict[str, str]:
    return {op: "triton" for op, backends in table.BACKENDS.items() if "triton" in backends}


def engine_of(path: Path, **options: Any) -> Engine:
    given = {"max_context": 512, "device": DEVICE.type, "dtype": "bfloat16", **options}
    config = build(EngineConfig, given, env={})
    return load_engine(prepare(open_checkpoint(path), config), lambda done, total: None)


def ids(engine: Engine, prompt: list[int], **sampling: Any) -> list[int]:
    request = Request(tuple(prompt), SamplingParams(ignore_eos=True, **sampling))
    return [event.id for event in engine.generate(request) if isinstance(event, Token)]


def check_tokens(report: Report) -> None:
    """The same tokens from the torch column, from Triton op by op, and from graphs of it."""
    rows: list[dict[str, Any]] = []
    names = [DATA / name for name in ("nano_nvfp4", "super_mixed", "lightning_w4a16")] + [DEMO_MODEL]
    samplings: tuple[dict[str, Any], ...] = (
        {"temperature": 0.0},
        {"seed": 3},
        {"seed": 4, "top_p": 0.9, "top_k": 30},
    )
    for path in names[:1] if REHEARSE else names:
        engines = {
            "torch": engine_of(path, decode="eager"),
            "triton": engine_of(path, decode="eager", ops=in_triton()),
            "graph": engine_of(path, ops=in_triton()),
        }
        blocked = [str(obstacle) for obstacle in obstacles(engines["graph"].model.ops, DEVICE)]
        prompt = torch.randint(5, 500, (20,)).tolist()
        for sampling in samplings[:1] if REHEARSE else samplings:
            count = 2 if REHEARSE else 128
            answers = {name: ids(engine, prompt, max_tokens=count, **sampling) for name, engine in engines.items()}
            agree = sum(a == b for a, b in zip(answers["torch"], answers["triton"], strict=True))
            row = {"model": path.name, "sampling": sampling, "torch_agrees": agree / count, "blocked": blocked}
            rows.append({**row, "right": answers["graph"] == answers["triton"]})
            say(f"   {path.name} {sampling}: torch and Triton agree on {agree} of {count} in BF16; {blocked}")
        long = ids(engines["graph"], prompt, max_tokens=4 if REHEARSE else 450, temperature=0.0)
        same = ids(engines["graph"], prompt, max_tokens=4 if REHEARSE else 450, temperature=0.0) == long
        rows.append({"model": path.name, "sampling": "repeated", "right": same})
    told(report, "tokens", rows)


def main() -> None:
    torch.manual_seed(int(time.time()))
    if REHEARSE:
        table.REQUIREMENTS = {**table.REQUIREMENTS, "triton": lambda place: None}  # pyright: ignore
    report = Report(Path(sys.argv[2]) / f"{'_'.join(('gpu_decode', *sys.argv[3:4]))}.json")
    name = "rehearsal" if REHEARSE else torch.cuda.get_device_name()
    report.add("head", {"commit": sys.argv[1], "torch": torch.__version__, "device": name})
    say(f"{name}, torch {torch.__version__}, triton ops: {', '.join(in_triton())}")
    sections = (
        check_mamba, check_attention, check_sampler, check_tokens,
        time_mamba, time_attention, time_sampler,
    )  # fmt: skip
    for section in sections:
        if not (wanted := sys.argv[3:]) or section.__name__ in wanted:
            report.section(section.__name__, section)


if __name__ == "__main__":
    main()
