"""By hand, on a machine with a GPU: tiles and early launches, judged by the time of whole decode steps.

    PYTHONPATH=. python tests/gpu_step.py OUT SECONDS [SHAPE[:KIND,KIND ...] ...]

A launch that is timed in a chain of its like can mislead: in a step it shares the chip with what stands before
and behind it. So each choice is captured in the step of a released shape with random weights, and the step is
timed. First the ways of launching early, with the tiles that are in the tree; then, with the best way, the tile of
one kind of weight after the other. What is best goes to OUT/sm_NM.json, whose place is kernels/tiles/.
"""

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton

from nanoserve.config import EngineConfig
from nanoserve.engine import Engine
from nanoserve.kernels import table, tiles, triton_experts, triton_linear, weight_tiles
from nanoserve.kernels.weight_launches import SHAPES, Shape, launches
from nanoserve.kernels.weight_tiles import Tile, untuned
from nanoserve.models.nemotron_h import Fields
from nanoserve.shapes import prepare_shape, random_fields
from nanoserve.startup import Prepared, assemble

Key = tuple[int, int, int]
CONTEXT, STEPS = 512, 25
SHARES = {"nano": 0.35, "lightning": 0.2, "super": 0.45}
DEVICE = torch.device("cuda")
CUTS = [
    (1, 128, 4), (2, 64, 4), (2, 128, 3), (2, 128, 4), (2, 256, 3), (4, 64, 4), (4, 128, 3), (4, 128, 4),
    (4, 256, 3), (8, 64, 3),
]  # fmt: skip
"""Slots, chunk and stages that are tried."""


@dataclass(frozen=True)
class Choice:
    """Tiles by weight; how weights' and others' launches begin (see `producers_done`); and fetching."""

    tiles: dict[Key, Tile]
    early: int = 0
    others: int = 0
    ahead: bool = True


@contextmanager
def chosen(choice: Choice) -> Generator[None]:
    """With these tiles in the place of the tree's."""

    def tuned(chip: tuple[int, int]) -> dict[Key, Tile]:
        return {key: replace(tile, early=choice.early) for key, tile in choice.tiles.items()}

    def default(*arguments: Any) -> Tile:
        return replace(untuned(*arguments), early=choice.early)

    whole = triton_linear.ahead
    with (
        patch.object(weight_tiles, "tuned_tiles", tuned),
        patch.object(weight_tiles, "untuned", default),
        patch.object(triton_linear, "ahead", whole if choice.ahead else nothing),
        patch.object(triton_experts, "ahead", whole if choice.ahead else nothing),
        patch.object(tiles.dependent, "__kwdefaults__", {"early": choice.others}),
    ):
        yield


def nothing(*arguments: object) -> int:
    """No bytes ahead."""
    return 0


def keys(s: Shape) -> dict[str, Key]:
    """Kind → the weight that its tile is chosen by."""
    width = s.latent or s.hidden
    found = {
        "up": (4, s.size, width),
        "down": (4, width, s.size),
        "front": (s.shared_bits, s.shared, s.hidden),
        "in_proj": (s.mamba_bits, s.projected, s.hidden),
        "out_proj": (s.mamba_bits, s.hidden, s.inner),
        "plain in_proj": (16, s.projected, s.hidden),
        "plain out_proj": (16, s.hidden, s.inner),
        "qkv": (16, s.heads + 2 * s.kv, s.hidden),
        "head": (s.head_bits, s.vocab, s.hidden),
    }
    if s.latent:
        found["back"] = (16, s.hidden, s.latent)
    if s.heads != s.inner:
        found["o_proj"] = (16, s.hidden, s.heads)
    return found


def compile_one(job: tuple[str, str, Choice]) -> str:
    """In a worker: compile a shape's launches with a choice, into the cache that all processes share."""
    name, what, choice = job
    cut = weight_tiles.tiles_for(torch.cuda.get_device_capability())
    run = triton.runtime.jit.JITFunction.run

    def warm(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    try:
        with chosen(choice), patch.object(triton.runtime.jit.JITFunction, "run", warm):
            for kind, call in launches(SHAPES[name], 1, cut):
                if kind == what:
                    call()
    except Exception as error:  # noqa: BLE001 it will show when the kernel is launched
        return repr(error)
    return ""


def step_us(prepared: Prepared, fields: Fields, choice: Choice) -> float:
    """Microseconds of a step: the median of five runs of `STEPS` replays."""
    with chosen(choice):
        engine: Engine = assemble(prepared, fields)
        times: list[float] = []
        with engine.cache.sequence(CONTEXT + 6 * STEPS) as sequence:
            engine.buffers.positions.fill_(CONTEXT)
            engine.decoder.begin()
            for _ in range(6):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                for _ in range(STEPS):
                    engine.decoder.step(sequence)
                end.record()
                torch.cuda.synchronize()
                times.append(start.elapsed_time(end) / STEPS * 1e3)
    del engine
    gc.collect()
    torch.cuda.empty_cache()
    return statistics.median(times[1:])


def quiet(done: int, total: int) -> None:
    """No progress."""


MAMBA = ((8, 4), (16, 4), (16, 8), (32, 8), (8, 2), (4, 2), (4, 4))
"""Rows and warps of a program of Mamba's step."""


def mamba_step(prepared: Prepared, fields: Fields, best: Choice, say: Callable[..., None]) -> None:
    """Tell how long a step takes with each."""
    base = tiles.TILES[torch.cuda.get_device_capability()]
    for (rows, warps), fused in product(MAMBA, (1, 0)):
        own = {**base, "mamba_decode": {"block_p": rows, "warps": warps, "fused": fused}}
        with patch.object(tiles, "TILES", {torch.cuda.get_device_capability(): own}):
            us = step_us(prepared, fields, best)
        say(f"mamba rows {rows} warps {warps} fused {fused}: {us:.1f} us")


LAUNCH_OF = {"up": "moe", "down": "moe", "front": "moe", "back": "moe", "plain out_proj": "o_proj"}
"""Kind → the launch of `launches` that holds it, where the names differ."""


def search(
    name: str,
    pool: ProcessPoolExecutor,
    best: Choice,
    kinds: list[str],
    done: set[Key],
    end: float,
    say: Callable[..., None],
) -> Choice:
    """The shape's best choice that was found before ``end``; of some kinds only, where they are named."""
    options = EngineConfig(
        max_context=4096,
        ops={op: "triton" for op, backends in table.BACKENDS.items() if "triton" in backends},
        device="cuda",
    )
    prepared = prepare_shape(name, options)  # pyright: ignore[reportArgumentType]
    fields = random_fields(prepared.manifest, DEVICE, quiet)
    flags = ((0, 0, True), (3, 0, True), (0, 3, True), (3, 3, True))
    ways = [replace(best, early=early, others=others, ahead=ahead) for early, others, ahead in flags]
    first = ("moe", "in_proj", "o_proj", "head")
    list(pool.map(compile_one, [(name, what, way) for way in ways for what in first]))
    if "mamba" in kinds:
        mamba_step(prepared, fields, best, say)
    least = float("inf")
    for way in ways:
        label = f"early {way.early} others {way.others} ahead {way.ahead} {'tuned' if way.tiles else 'untuned'}"
        try:
            us = step_us(prepared, fields, way)
        except Exception as error:  # noqa: BLE001 what fails is not chosen
            say(f"{name} {label} FAILED {error!r}"[:300])
            continue
        say(f"{name} {label}: {us:.1f} us")
        if us < least:
            least, best = us, way
    places = {kind: place for kind, place in keys(SHAPES[name]).items() if place not in done}
    places = {kind: place for kind, place in places.items() if not kinds or kind in kinds}
    trials = {kind: [Tile(chunk=c, slots=s, stages=g) for s, c, g in CUTS] for kind in places}
    jobs = [
        (name, LAUNCH_OF.get(kind, kind), replace(best, tiles={**best.tiles, places[kind]: tile}))
        for kind, tried in trials.items()
        for tile in tried
    ]
    list(pool.map(compile_one, jobs, chunksize=4))
    for kind, tried in trials.items():
        before, won = least, "as it was"
        for tile in tried:
            if time.monotonic() > end:
                return best
            other = replace(best, tiles={**best.tiles, places[kind]: tile})
            try:
                us = step_us(prepared, fields, other)
            except Exception as error:  # noqa: BLE001
                say(f"{name} {kind} {tile} FAILED {error!r}"[:300])
                continue
            if us < least * 0.998:
                least, best, won = us, other, f"slots {tile.slots} chunk {tile.chunk} stages {tile.stages}"
        done.add(places[kind])
        say(f"{name} {kind}: {before:.1f} -> {least:.1f} us, {won}")
    return best


def main() -> None:
    folder, seconds, *names = sys.argv[1:]
    began, lines = time.monotonic(), list[str]()

    def say(line: str) -> None:
        lines.append(line)
        print(f"{time.monotonic() - began:4.0f} s  {line}", flush=True)
        (Path(folder) / "step.txt").write_text("\n".join(lines) + "\n")

    parts = [name.partition(":") for name in names or ["nano", "super", "lightning"]]
    asked = {name: kinds.split(",") if kinds else [] for name, _, kinds in parts}
    wanted = list(asked)
    whole = sum(SHARES[name] for name in wanted)
    found, done, end = dict(weight_tiles.tuned_tiles(torch.cuda.get_device_capability())), set[Key](), began
    with ProcessPoolExecutor(14, mp_context=get_context("spawn")) as pool:
        for name in wanted:
            end += float(seconds) * SHARES[name] / whole
            best = search(name, pool, Choice(found), asked[name], done, end, say)
            for place in keys(SHAPES[name]).values():
                if place in best.tiles:
                    found[place] = replace(best.tiles[place], early=best.early)
            save(Path(folder), found)
            gc.collect()
            torch.cuda.empty_cache()


def save(folder: Path, found: dict[Key, Tile]) -> None:
    """As `weight_tiles.tuned_tiles` reads them."""
    rows = [
        json.dumps({**dict(zip(("bits", "rows", "columns"), key, strict=True)), "tile": asdict(tile)})
        for key, tile in sorted(found.items())
    ]
    (folder / "sm_{}{}.json".format(*torch.cuda.get_device_capability())).write_text(
        "[\n" + ",\n".join(rows) + "\n]\n"
    )


if __name__ == "__main__":
    main()
