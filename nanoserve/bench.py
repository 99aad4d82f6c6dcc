"""``nanoserve bench``: how fast one sequence decodes, against the time that its bytes take on this memory's bus.

Terms as in vLLM's benchmark: TTFT is the time from a request to its first token; TPOT is a request's (time from
the first token to the last) / (tokens - 1); ITL is every gap between two tokens, over all requests.
"""

import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch

from nanoserve import __version__
from nanoserve.breakdown import break_down, routing_spread
from nanoserve.config import EngineConfig
from nanoserve.energy import Energy, metered
from nanoserve.engine import Engine
from nanoserve.errors import ConfigError
from nanoserve.request import Request, SamplingParams, Token
from nanoserve.startup import Prepared
from nanoserve.traffic import nbytes, read_bandwidth, token_traffic


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What to run.

    Attributes:
        isl, osl: tokens of a prompt and of an answer.
        requests: how many, one after another; the first is not counted.
        temperature: 0 is greedy.
        seed: of prompts, and of draws.
        breakdown: time every op family too.
    """

    isl: int = 2048
    osl: int = 1024
    requests: int = 5
    temperature: float = 1.0
    seed: int = 0
    breakdown: bool = False

    def __post_init__(self) -> None:
        for name, least in (("isl", 1), ("osl", 2), ("requests", 2)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)} and must be at least {least}")
        if not 0 <= self.temperature <= 100:
            raise ConfigError(f"temperature is {self.temperature} and must be in [0, 100]")

    @property
    def context(self) -> float:
        """Mean context of a decode step."""
        return self.isl + self.osl / 2


@dataclass(frozen=True, slots=True)
class Timing:
    """One request, in seconds."""

    ttft: float
    gaps: tuple[float, ...]

    @property
    def tpot(self) -> float:
        """Mean time a token after the first."""
        return sum(self.gaps) / len(self.gaps)


def bench(
    prepared: Prepared, load: Callable[[], Engine], options: BenchOptions, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measure the bus, load, run the requests, and compare.

    Args:
        prepared: what will be loaded, and where.
        load: loads it.
        options: what to run.
        say: called with a line now and then.

    Returns:
        The result, as JSON.
    """
    device = prepared.device
    bandwidth = read_bandwidth(device)
    say(f"the bus reads {bandwidth / 1e12:.3g} TB/s")
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    engine = load()
    timings: list[Timing] = [run(engine, options, 0)]
    say(f"request 0: {_told(timings[0])} (not counted)")
    started = time.perf_counter()
    with metered(device) as energy:
        for number in range(1, options.requests):
            timings.append(run(engine, options, number))
            say(f"request {number}: {_told(timings[-1])}")
    seconds = time.perf_counter() - started
    peak = _peak_memory(device)
    traffic = token_traffic(engine, options.context)
    result = _header(prepared, options) | _measures(timings[1:], seconds, options) | _energy(energy, options)
    total = sum(traffic.values())
    floor = total / bandwidth * 1e3
    result |= {
        "bandwidth_tb_s": bandwidth / 1e12,
        "bytes_per_token": {**traffic, "total": total},
        "context": options.context,
        "floor_ms": floor,
        "tpot_over_floor": result["tpot_ms"]["p50"] / floor,
        "memory": _memory(engine, peak),
        "routing": routing_spread(engine),
    }
    if options.breakdown:
        result["breakdown"] = break_down(engine, round(options.context), bandwidth)
    return result


def run(engine: Engine, options: BenchOptions, number: int) -> Timing:
    """One request of random token ids, timed."""
    random = torch.Generator().manual_seed(options.seed * 1_000_003 + number)
    prompt = torch.randint(0, engine.model.config.vocab_size, (options.isl,), generator=random).tolist()
    sampling = SamplingParams(
        max_tokens=options.osl, temperature=options.temperature, seed=options.seed + number, ignore_eos=True
    )
    started = time.perf_counter()
    stamps = [
        time.perf_counter()
        for event in engine.generate(Request(tuple(prompt), sampling))
        if isinstance(event, Token)
    ]
    return Timing(stamps[0] - started, tuple(b - a for a, b in pairwise(stamps)))


def _told(timing: Timing) -> str:
    return f"TTFT {timing.ttft * 1e3:.4g} ms, TPOT {timing.tpot * 1e3:.4g} ms"


def _header(prepared: Prepared, options: BenchOptions) -> dict[str, Any]:
    """What was run, on what."""
    on_gpu = prepared.device.type == "cuda"
    chosen: EngineConfig = prepared.options
    return {
        "nanoserve": __version__,
        "torch": torch.__version__,
        "model": prepared.checkpoint.name,
        "device": torch.cuda.get_device_name(prepared.device) if on_gpu else "cpu",
        "activations": str(prepared.shape.conv_dtype).removeprefix("torch."),
        "kv": str(prepared.shape.kv_dtype).removeprefix("torch."),
        "page_size": chosen.page_size,
        "prefill_chunk": prepared.prefill_chunk,
        "decode": prepared.decode,
        "ops": {row.op: row.backend for row in prepared.ops.report},
        "options": asdict(options),
    }


def _measures(timings: Sequence[Timing], seconds: float, options: BenchOptions) -> dict[str, Any]:
    gaps = [gap for timing in timings for gap in timing.gaps]
    tpots = [timing.tpot for timing in timings]
    return {
        "ttft_ms": {"p50": 1e3 * statistics.median(timing.ttft for timing in timings)},
        "tpot_ms": {"p50": 1e3 * statistics.median(tpots), "p99": 1e3 * percentile(tpots, 99)},
        "itl_ms": {"p50": 1e3 * statistics.median(gaps), "p99": 1e3 * percentile(gaps, 99)},
        "output_tok_s": len(timings) * options.osl / seconds,
        "total_tok_s": len(timings) * (options.isl + options.osl) / seconds,
        "requests": [{"ttft_ms": 1e3 * timing.ttft, "tpot_ms": 1e3 * timing.tpot} for timing in timings],
    }


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` percent lie, between neighbours in proportion."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * share / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _energy(energy: Energy, options: BenchOptions) -> dict[str, Any]:
    """Answered tokens a joule; the prompts' share of the energy is in it."""
    tokens = (options.requests - 1) * options.osl
    per_joule = tokens / energy.joules if energy.joules else None
    return {"tokens_per_joule": per_joule, "energy": {"joules": energy.joules, "source": energy.source}}


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _memory(engine: Engine, peak: int) -> dict[str, int]:
    """Peak, and what of it is neither weights nor planned pages and states (on a CPU the program itself too)."""
    cache = engine.cache
    weights, pages = nbytes(engine.model), nbytes((cache.kv, cache.conv, cache.ssm))
    return {"peak": peak, "weights": weights, "cache": pages, "extra": peak - weights - pages}
