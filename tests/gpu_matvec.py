"""By hand, on a machine with a GPU: the weight-reading Triton kernels, checked and timed. Not collected by pytest.

    PYTHONPATH=. python tests/gpu_matvec.py OUT [SECONDS] [--checks | --tiles]

1. Every kernel against its reference, on fresh random inputs at released sizes; twice, which must give equal bits.
2. A chain of layers as a CUDA graph with early launches, against the same chain with a stop after every launch.
3. What the card gives at most: a read of 4 GiB. What a launch costs.
4. Tiles: microseconds of every cut worth trying at the released shapes, cold (weights rotate through more than
   the second cache holds), in a CUDA graph, one launch after another; the best go to OUT/sm_NM.json, whose place
   is kernels/tiles/.
5. Whole layers with the best tiles; the products of `bench --dense` at 1 … 16 tokens; many tokens.

With --checks it ends after 2; with --tiles only 5's layers are timed. Everything is compiled beforehand by worker
processes. What does not fit the SECONDS (480) is left out, and said. Numbers go to OUT/matvec.json as they come.
"""

import json
import os
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
import triton
import triton.language as tl
from gpu_inputs import CUDA, case_of, cases, random_tokens, random_weight
from gpu_matvec_checks import check_chain, check_layers, check_products
from gpu_report import Report, microseconds

from nanoserve.kernels import triton_linear
from nanoserve.kernels.triton_linear import linears_add, products
from nanoserve.kernels.weight_launches import SHAPES, Shape
from nanoserve.kernels.weight_tiles import Cut, Tile, fitted, tile_of

COLD = 256 << 20
"""Bytes of weights that a timing rotates through."""
DENSE = ((4096, 2688), (256, 2688), (2688, 4096), (3712, 2688), (2688, 3712), (131072, 2688))
"""Rows and columns that `nanoserve bench --dense` times."""
FIRST = [Tile(chunk=c, slots=s, stages=g) for s, c, g in product((1, 2, 4, 8), (64, 128, 256), (3, 4, 6))]
"""Tiles tried at every shape; the best of them is tried with more rows."""


def fixed(tile: Tile) -> Cut:
    """The same tile for every weight."""

    def cut(bits: int, rows: int, columns: int, device: torch.device, *, tokens: int = 1, copies: int = 1) -> Tile:
        return fitted(tile, bits, tokens)

    return cut


@triton.jit
def read_kernel(x: tl.tensor, out: tl.tensor, STEPS: tl.constexpr, BLOCK: tl.constexpr) -> None:
    """Or of everything, so that it must be read."""
    at = tl.program_id(0).to(tl.int64) * STEPS * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.int32)
    for i in tl.static_range(STEPS):  # pyright: ignore[reportGeneralTypeIssues]
        acc |= tl.load(x + at + i * BLOCK)
    tl.store(out + tl.program_id(0), tl.max(acc, 0))


def read_ceiling() -> float:
    """TB/s of the best of a few plain reads of 4 GiB."""
    x = torch.randint(-(1 << 31), 1 << 31, (1 << 30,), dtype=torch.int32, device=CUDA)
    best = 0.0
    for block, steps, warps in ((4096, 8, 8), (8192, 4, 8), (2048, 16, 4), (4096, 4, 16)):
        programs = x.numel() // (block * steps)
        out = torch.empty(programs, dtype=torch.int32, device=CUDA)
        options: dict[str, Any] = {"STEPS": steps, "BLOCK": block, "num_warps": warps}
        call = partial(triton_linear.launch, read_kernel, (programs,), x, out, **options)
        best = max(best, x.numel() * 4 / microseconds([call], 5) / 1e6)
    return best


# -- 4.: how fast, cut how? ---------------------------------------------------------------------------------------


def compile_case(job: tuple[str, str, int, Tile]) -> str:
    """In a worker: compile one case's kernel for the card, into the cache that all processes share."""
    shape, kind, count, tile = job
    run = triton.runtime.jit.JITFunction.run

    def warm(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    triton.runtime.jit.JITFunction.run = warm  # pyright: ignore[reportAttributeAccessIssue]
    try:
        case_of(SHAPES[shape], kind, count, fixed(tile), torch.device("meta"))[0][0]()
    except Exception as error:  # noqa: BLE001 whatever it is, it will show when the kernel is launched
        return f"{job}: {error}"
    finally:
        triton.runtime.jit.JITFunction.run = run
    return ""


def compile_all(pool: ProcessPoolExecutor, jobs: list[tuple[str, str, int, Tile]]) -> None:
    started = time.monotonic()
    failed = [line for line in pool.map(compile_case, jobs, chunksize=4) if line]
    print(f"compiled {len(jobs)} in {time.monotonic() - started:.0f} s; failed: {failed[:3]}", flush=True)


def distinct(bits: int, tiles: list[Tile]) -> list[Tile]:
    return list(dict.fromkeys(fitted(tile, bits, 1) for tile in tiles))


def time_tiles(
    report: Report, s: Shape, kind: str, tiles: list[Tile], count: int = 1
) -> tuple[dict[Tile, float], float]:
    """Microseconds of a launch with each tile, and the bytes that it reads."""
    current: list[Tile] = []

    def cut(*args: Any, **options: Any) -> Tile:
        return fixed(current[-1])(*args, **options)

    calls, size = case_of(s, kind, count, cut, CUDA, COLD)
    times: dict[Tile, float] = {}
    for tile in tiles:
        if report.left() < 40:
            break
        current.append(tile)
        times[tile] = microseconds(calls, 5)
    return times, size


def tune(report: Report, pool: ProcessPoolExecutor, ceiling: float) -> dict[tuple[str, str], Tile]:
    """(shape, kind) → best tile; kinds that two shapes share are timed once."""
    jobs: dict[tuple[str, int, float], str] = {}
    for name, s in SHAPES.items():
        for case in cases(s):
            jobs.setdefault(case, name)
    first = [(name, kind, 1, tile) for (kind, bits, _), name in jobs.items() for tile in distinct(bits, FIRST)]
    compile_all(pool, first)
    found: dict[tuple[str, str], dict[Tile, float]] = {}
    for (kind, bits, size), name in jobs.items():
        found[name, kind], _ = time_tiles(report, SHAPES[name], kind, distinct(bits, FIRST))
        print_best(report, name, kind, size, found[name, kind], ceiling)
    if report.left() > 180:
        second = {
            key: [replace(tile, rows=32) for tile in sorted(times, key=lambda t: times[t])[:2]]
            for key, times in found.items()
        }
        compile_all(pool, [(*key, 1, tile) for key, tiles in second.items() for tile in tiles])
        for (kind, _, size), name in jobs.items():
            found[name, kind] |= time_tiles(report, SHAPES[name], kind, second[name, kind])[0]
            print_best(report, name, kind, size, found[name, kind], ceiling)
    return {key: min(times, key=lambda t: times[t]) for key, times in found.items() if times}


def print_best(
    report: Report, name: str, kind: str, size: float, times: dict[Tile, float], ceiling: float
) -> None:
    if not times:
        return
    tile = min(times, key=lambda t: times[t])
    us, rate = times[tile], size / times[tile] / 1e6
    everything = sorted(((us, asdict(t)) for t, us in times.items()), key=lambda row: row[0])
    line = (
        f"{name:9} {kind:8} {size / 1e6:6.1f} MB {us:7.2f} us {rate:5.2f} TB/s {100 * rate / ceiling:3.0f} %"
        f"  rows {tile.rows} chunk {tile.chunk} slots {tile.slots} stages {tile.stages}"
        f" | worst {everything[-1][0]:.2f}"
    )
    report.add(f"tiles {name} {kind}", {"MB": size / 1e6, "us": us, "all": everything}, line)


# -- 5.: altogether -----------------------------------------------------------------------------------------------


def time_layers(report: Report, best: dict[tuple[str, str], Tile], ceiling: float) -> None:
    for name, s in SHAPES.items():
        tiles = {kind: tile for (_, kind), tile in best.items()}
        tiles |= {kind: tile for (shape, kind), tile in best.items() if shape == name}
        for label, cut in (("default", tile_of), ("tuned", tuned_cut(s, tiles))):
            calls, size = case_of(s, "moe", 1, cut, CUDA, COLD)
            us = microseconds(calls)
            rate = size / us / 1e6
            line = f"{name:9} moe layer, {label}: {us:.2f} us {rate:.2f} TB/s {100 * rate / ceiling:.0f} %"
            report.add(f"layer {name} {label}", {"us": us, "MB": size / 1e6}, line)


def tuned_cut(s: Shape, tiles: dict[str, Tile]) -> Cut:
    """The best tile of each of a mixture's launches, known by its weight's shape."""
    kinds = {
        (s.shared, s.hidden): "front",
        (s.size, s.latent or s.hidden): "up",
        (s.latent or s.hidden, s.size): "down",
        (s.hidden, s.latent): "back",
    }

    def cut(bits: int, rows: int, columns: int, device: torch.device, *, tokens: int = 1, copies: int = 1) -> Tile:
        tile = tiles.get(kinds.get((rows, columns), ""))
        if tile is None:
            return tile_of(bits, rows, columns, device, tokens=tokens, copies=copies)
        return fitted(tile, bits, tokens)

    return cut


def time_dense(report: Report, pool: ProcessPoolExecutor, ceiling: float) -> None:
    tiles = distinct(4, [tile for tile in FIRST if tile.stages == 4])
    kinds = [(f"dense {rows} {columns}", count) for rows, columns in DENSE for count in (1, 2, 4, 8, 16)]
    compile_all(pool, [("nano", kind, count, tile) for kind, count in kinds for tile in tiles])
    for kind, count in kinds:
        if report.left() < 40:
            return
        times, size = time_tiles(report, SHAPES["nano"], kind, tiles, count)
        tile = min(times, key=lambda t: times[t])
        us, rate = times[tile], size / times[tile] / 1e6
        cut = f"slots {tile.slots} chunk {tile.chunk}"
        line = f"{kind:17} M {count:2}: {us:7.2f} us {rate:5.2f} TB/s {100 * rate / ceiling:3.0f} %  {cut}"
        report.add(f"{kind} {count}", {"us": us, "TB/s": rate, "tile": asdict(tile)}, line)


def time_many(report: Report) -> None:
    for bits, (rows, columns), count in product((4, 8, 16), ((10304, 2688), (4096, 8192)), (64, 512, 2048)):
        if report.left() < 20:
            return
        w, x = random_weight(bits, rows, columns), random_tokens(count, columns)
        us = microseconds([partial(products, x, (w,), torch.bfloat16)] * 3, 3)
        rate = 2 * rows * columns * count / us / 1e6
        line = f"{bits:2} bits {rows} x {columns}, {count} tokens: {us:.0f} us, {rate:.0f} TFLOP/s"
        report.add(f"many {bits} {rows}x{columns} {count}", {"us": us, "TFLOPs": rate}, line)


def time_launches(report: Report) -> None:
    """One small kernel after another."""
    x, weight = random_tokens(1, 512), torch.ones(512, device=CUDA)
    us = microseconds([partial(triton_linear.norm, x, weight, 1e-5)] * 100)
    back = random_weight(4, 512, 512)
    tail = microseconds([partial(linears_add, x, back, None, None, x)] * 100)
    report.add(
        "launch",
        {"norm": us, "linear_add": tail},
        f"small launches: {us:.2f} us, {tail:.2f} us with a product",
    )


def save_tiles(folder: Path, best: dict[tuple[str, str], Tile]) -> None:
    """As `weight_tiles.tuned_tiles` reads them."""
    rows: dict[tuple[int, int, int], dict[str, Any]] = {}
    for (name, kind), tile in best.items():
        s = SHAPES[name]
        place = {
            "in_proj": (s.mamba_bits, s.projected, s.hidden),
            "out_proj": (s.mamba_bits, s.hidden, s.inner),
            "qkv": (16, s.heads + 2 * s.kv, s.hidden),
            "o_proj": (16, s.hidden, s.heads),
            "head": (s.head_bits, s.vocab, s.hidden),
            "front": (s.shared_bits, s.shared, s.hidden),
            "up": (4, s.size, s.latent or s.hidden),
            "down": (4, s.latent or s.hidden, s.size),
            "back": (16, s.hidden, s.latent),
        }[kind]
        rows[place] = asdict(tile)
    named = [dict(zip(("bits", "rows", "columns"), place, strict=True)) for place in rows]
    lines = [json.dumps({**key, "tile": tile}) for key, tile in zip(named, rows.values(), strict=True)]
    major, minor = torch.cuda.get_device_capability()
    (folder / f"sm_{major}{minor}.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")


def main() -> None:
    only_checks = "--checks" in sys.argv
    folder, *rest = [word for word in sys.argv[1:] if not word.startswith("--")]
    folder, seconds = Path(folder), float(rest[0]) if rest else 480.0
    report = Report(folder, seconds)
    card = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    report.add("card", card, str(card))
    torch.manual_seed(time.time_ns() % (1 << 31))
    # Fills what torch.empty gives with NaN, so that what no program wrote is seen.
    torch.use_deterministic_algorithms(True)
    for check in (check_products, check_layers, check_chain):
        if check is check_chain:  # a fill between two launches would hide what they do to each other
            torch.use_deterministic_algorithms(False)
        try:
            check(report)
        except Exception as error:  # noqa: BLE001 what one finds must not hide what the next would
            traceback.print_exc()
            report.add(check.__name__, {"error": repr(error)}, f"{check.__name__} FAILED: {error!r}")
    if only_checks:
        return
    torch.cuda.empty_cache()
    ceiling = read_ceiling()
    report.add("ceiling", ceiling, f"read only: {ceiling:.2f} TB/s; {report.left():.0f} s left")
    time_launches(report)
    workers = max(2, (os.cpu_count() or 4) - 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        best = tune(report, pool, ceiling)
        save_tiles(folder, best)
        time_layers(report, best, ceiling)
        if "--tiles" not in sys.argv:
            time_dense(report, pool, ceiling)
    if "--tiles" not in sys.argv:
        time_many(report)
    print(f"{report.left():.0f} s left")


if __name__ == "__main__":
    main()
