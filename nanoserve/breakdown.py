"""Where a decode step's time goes: its ops, watched while one step runs, are run again by family and timed.

A family's time is that of its calls one after another, on a GPU as a CUDA graph where their backends allow it,
gaps between launches included; so families add up to about the step. Kernel time and launches are the profiler's.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
from torch import Tensor

from nanoserve.engine import Engine
from nanoserve.graph import Capture, Decoder
from nanoserve.kernels.attention import LayerKV
from nanoserve.kernels.fused import MoeWeights, Norm
from nanoserve.kernels.mamba import MambaState
from nanoserve.kernels.sample import SamplerState
from nanoserve.kernels.table import HOST_BOUND, Ops
from nanoserve.models.layers import Attention, Mamba, Mixer, MoE
from nanoserve.request import Request, SamplingParams
from nanoserve.traffic import moe_traffic, nbytes

_REPEATS = 20
_TOKENS = 64
"""Decoded to see which experts are chosen."""

Function = Callable[..., Any]
Watch = Callable[[str, str, Function], Function]
"""(where the op is called from, op, function) → what is called in its place."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of an op; ``bytes`` are of weights, state and activations that it must read or write."""

    family: str
    op: str
    function: Function
    arguments: tuple[Any, ...]
    bytes: int

    def __call__(self) -> None:
        """Make it again."""
        self.function(*self.arguments)


def watched(engine: Engine, watch: Watch) -> Engine:
    """The engine, op by op, with every op replaced by what ``watch`` makes of it."""

    def ops(place: str) -> Ops:
        names = [field.name for field in fields(Ops) if field.name != "report"]
        made = {name: watch(place, name, getattr(engine.model.ops, name)) for name in names}
        return replace(engine.model.ops, **made)

    def mixer(mixer: Mixer) -> Mixer:
        match mixer:
            case MoE():
                return replace(mixer, ops=ops("moe"))
            case Mamba():
                return replace(mixer, ops=ops("mamba"))
            case Attention():
                return replace(mixer, ops=ops("attention"))
            case _:
                return replace(mixer, ops=ops("mlp"))

    layers = tuple(mixer(layer) for layer in engine.model.layers)
    model = replace(engine.model, ops=ops("model"), layers=layers)
    decoder = Decoder.make(model, engine.cache, engine.buffers, engine.sampler, None)
    return replace(engine, model=model, decoder=decoder)


def routing_spread(engine: Engine) -> dict[str, float] | None:
    """How many experts of a layer some tokens choose, beside what chance would give; None without experts."""
    config, chosen = engine.model.config, dict[int, list[Tensor]]()
    if not config.experts:
        return None

    def watch(place: str, op: str, function: Function) -> Function:
        def routed(stream: Tensor, norm: Norm, w: MoeWeights) -> Any:
            x = engine.model.ops.norm(stream, norm.weight, norm.eps)
            ids, _ = engine.model.ops.router(x, w.gate, w.bias, w.top_k, w.scale, w.normalize)
            chosen.setdefault(id(w), []).append(ids)
            return function(stream, norm, w)

        return routed if op == "moe_add" else function

    tokens = min(_TOKENS, engine.max_context - 1)
    sampling = SamplingParams(max_tokens=tokens, seed=1, ignore_eos=True)
    for _ in watched(engine, watch).generate(Request((config.vocab_size // 2,), sampling)):
        pass
    distinct = [len(torch.cat(ids).unique()) for ids in chosen.values()]
    missed = (1 - config.top_k / config.experts) ** tokens
    return {
        "tokens": tokens,
        "distinct_experts": sum(distinct) / len(distinct),
        "by_chance": config.experts * (1 - missed),
    }


def record(engine: Engine, context: int) -> list[Call]:
    """The calls of one decode step at a context, over a sequence of no meaning that is thrown away."""
    calls: list[Call] = []

    def watch(place: str, op: str, function: Function) -> Function:
        def noted(*arguments: Any) -> Any:
            family = op if place == "model" else f"{place} {op}"
            calls.append(Call(family, op, function, arguments, call_bytes(op, arguments, context)))
            return function(*arguments)

        return noted

    other = watched(engine, watch)
    with engine.cache.sequence(min(context + 1, engine.max_context)) as sequence:
        engine.buffers.positions.fill_(context)
        engine.buffers.ids.fill_(1)
        other.decoder.step(sequence)
    return calls


def break_down(engine: Engine, context: int, bandwidth: float) -> list[dict[str, Any]]:
    """Op families, the longest first, then the whole step and what is in no family.

    Args:
        engine: whose step is taken apart.
        context: tokens that the step sees.
        bandwidth: of the bus, bytes a second.
    """
    context = min(context, engine.max_context - 1)
    families: dict[str, list[Call]] = {}
    for call in record(engine, context):
        families.setdefault(call.family, []).append(call)
    backends = {row.op: row.backend for row in engine.model.ops.report}
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for family, calls in families.items():
            fits = (calls[0].op, backends[calls[0].op]) not in HOST_BOUND
            row = _timed(calls, engine.device, fits)
            moved = sum(call.bytes for call in calls)
            rate = moved / row["us"] * 1e6 if row["us"] else None
            share = {"tb_s": rate / 1e12, "of_bus": rate / bandwidth} if rate else {"tb_s": None, "of_bus": None}
            rows.append({"family": family, "calls": len(calls), **row, "bytes": moved, **share})
    rows.sort(key=lambda row: row["us"] or row["kernel_us"] or 0, reverse=True)
    return [*rows, *_whole(engine, context, rows)]


def _whole(engine: Engine, context: int, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The step as it is run, and the rest: what lies between ops, or is in none."""
    with engine.cache.sequence(context) as sequence:

        def step() -> None:
            engine.buffers.positions.fill_(context - 1)
            engine.decoder.step(sequence)

        step()
        engine.decoder.begin()
        whole = _timed([step], engine.device, capturable=False)
        if engine.device.type == "cuda":
            whole["us"] = _replayed(step, engine.device)
    rest = {
        name: None
        if whole[name] is None or None in (own := [row[name] for row in rows])
        else whole[name] - sum(own)
        for name in ("us", "kernel_us", "launches")
    }
    return [{"family": "step", **whole}, {"family": "rest", **rest}]


def _timed(
    calls: "list[Call] | list[Callable[[], None]]", device: torch.device, capturable: bool
) -> dict[str, Any]:
    """Microseconds of the calls one after another, of their kernels, and launches; None where not known."""

    def work() -> None:
        for call in calls:
            call()

    if device.type != "cuda":
        return {"us": min(_host_us(work) for _ in range(3)), "kernel_us": None, "launches": None}
    work()
    kernels = _kernels_us(work)
    us = _replayed(Capture.new()(work), device) if capturable else None
    return {"us": us, "kernel_us": sum(kernels) if kernels else None, "launches": len(kernels) or None}


def _host_us(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1e6


def _replayed(work: Callable[[], None], device: torch.device) -> float:
    """Microseconds by events around many runs."""
    work()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(_REPEATS):
        work()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / _REPEATS * 1e3


def _kernels_us(work: Callable[[], None]) -> list[float]:
    """Microseconds of each kernel and copy that the work launches; nothing where the profiler sees none."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    events = cast("list[Any]", profile.events() or [])
    return [event.time_range.elapsed_us() for event in events if event.device_type.name == "CUDA"]


def call_bytes(op: str, arguments: tuple[Any, ...], context: int) -> int:
    """What a call must move: weights as often as they are used, state both ways, the cache up to the context."""
    total = 0
    for argument in arguments:
        match argument:
            case MoeWeights():
                total += sum(moe_traffic(argument).values())
            case Norm():
                total += argument.weight.nbytes
            case MambaState():
                total += 2 * nbytes((argument.conv, argument.ssm))
            case LayerKV():
                positions = len(arguments[0]) if op == "kv_append" else context + 1
                total += (argument.k[0, 0].nbytes + argument.v[0, 0].nbytes) * positions
            case SamplerState():
                pass
            case Tensor() if not argument.is_floating_point():
                pass
            case _:
                total += nbytes(argument)
    return total
