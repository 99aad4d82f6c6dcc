"""By hand, on a machine with a GPU: the prefill kernels, checked and timed. Not collected by pytest.

    cd tests && PYTHONPATH=..:. python gpu_prefill.py OUT [SECONDS]

On a CPU, in Triton's interpreter and at tiny sizes, to see that the script itself is in order:

    cd tests && PYTHONPATH=..:. python -c 'import interpreted, gpu_prefill; gpu_prefill.main()' /tmp 60

1. Every kernel against its reference, twice, which must give equal bits.
2. Microseconds of each op over 2,048 tokens, in a CUDA graph (which also shows that none waits for the host), with
   every tile worth trying; of the experts without a graph, too.
3. What 2,048 tokens cost altogether, Nano and Super, by family, with the best tile of each.

Kernels are compiled beforehand by worker processes. What does not fit the SECONDS (200) is left out, and said.
Numbers go to OUT/prefill.json as they come; a fault in one op leaves the others to run.
"""

import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


import torch
import triton
from gpu_inputs import random_tokens
from gpu_prefill_checks import checks
from gpu_report import Report, microseconds
from prefill_cases import (
    BF16,
    DENSE,
    DEVICE,
    FP8,
    LAYERS,
    REHEARSE,
    SCANS,
    attention_case,
    dense_weights,
    experts_case,
    mamba_case,
    routing,
)

from nanoserve.kernels import prefill_launches, triton_linear
from nanoserve.kernels.linear import Plain, relu2
from nanoserve.kernels.prefill_experts import experts_prefill, group, planes
from nanoserve.kernels.prefill_router import router_many
from nanoserve.kernels.prefill_tiles import EXPERT_TILES, ExpertTile
from nanoserve.kernels.router import router
from nanoserve.kernels.triton_flash import attention_prefill
from nanoserve.kernels.triton_prefill import conv_prefill, gated_norm
from nanoserve.kernels.triton_scan import ssm_prefill
from nanoserve.kernels.weight_launches import SHAPES
from nanoserve.kernels.weight_tiles import GemmTile

TOKENS = 17 if REHEARSE else 2048
RESERVE = 8.0
EXPERTS = EXPERT_TILES[:1] if REHEARSE else (
    *EXPERT_TILES[:6],
    ExpertTile(128, 128, 256, 8, 2), ExpertTile(128, 256, 128, 8, 3), ExpertTile(64, 128, 256, 4, 3),
)  # fmt: skip
GEMMS = {
    8: (GemmTile(128, 128, 64, 8, 3), GemmTile(128, 128, 128, 8, 3), GemmTile(128, 256, 64, 8, 3)),
    4: (GemmTile(128, 128, 128, 8, 3), GemmTile(128, 256, 128, 8, 3), GemmTile(128, 128, 256, 8, 2)),
}
FLASHES = ((128, 64, 8, 3), (128, 128, 8, 2), (128, 64, 4, 2), (64, 64, 4, 3))
SCAN_TILES = ((128, 64, 4, 4), (128, 64, 8, 8), (128, 128, 8, 8), (64, 64, 4, 4))
CONV_TILES = ((32, 128, 4), (16, 128, 4), (64, 64, 4), (16, 256, 4))

Sums = dict[str, dict[str, float]]
"""Model → family → microseconds of all its layers."""


def time_us(*calls: Callable[[], object]) -> float:
    if REHEARSE:
        calls[0]()
        return 1.0
    return microseconds(list(calls), 3)


def compile_job(job: tuple[str, tuple[Any, ...]]) -> str:
    """In a worker: compile one op's kernels for the card, into the cache that all processes share."""
    name, arguments = job
    run = triton.runtime.jit.JITFunction.run

    def warm(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    triton.runtime.jit.JITFunction.run = warm  # pyright: ignore[reportAttributeAccessIssue]
    try:
        getattr(prefill_launches, name)(*arguments)
    except Exception as error:  # noqa: BLE001 whatever it is, it will show when the kernel is launched
        return f"{job}: {error}"
    finally:
        triton.runtime.jit.JITFunction.run = run
    return ""


def compile_all() -> None:
    started = time.monotonic()
    jobs: list[tuple[str, tuple[Any, ...]]] = [
        *(("experts", (name, 4, tile)) for tile in (*EXPERTS, EXPERT_TILES[6]) for name in ("nano", "super")),
        *(("attend", (kv, tile)) for kv in (BF16, FP8) for tile in FLASHES),
        *(("gemm", (bits, columns, t)) for bits, columns, ts in GEMM_JOBS for t in ts),
        *(("scan", (heads, tile)) for heads in (64, 128) for tile in SCAN_TILES),
    ]
    workers = max(2, min(16, os.cpu_count() or 4))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        failed = [line for line in pool.map(compile_job, jobs) if line]
    print(f"compiled {len(jobs)} jobs in {time.monotonic() - started:.0f} s; failed: {failed[:3]}", flush=True)


GEMM_JOBS = [
    *((8, columns, GEMMS[8]) for columns in (4096, 8192, 5376)),
    *((4, columns, GEMMS[4]) for columns in (2688, 4096, 3712)),
]


def best_of(report: Report, key: str, flops: float, times: dict[str, float]) -> float:
    """Note all, tell the best and the others' distance."""
    if not times:
        print(f"{key}: no time left", flush=True)
        return float("nan")
    ranked = sorted(times.items(), key=lambda row: row[1])
    name, us = ranked[0]
    rate = f", {flops / us / 1e6:.0f} TFLOP/s" if flops else ""
    others = "; ".join(f"{other} {t:.0f}" for other, t in ranked[1:])
    report.add(
        f"time {key}", {"us": us, "flops": flops, "all": times}, f"{key}: {us:.1f} us{rate} {name} | {others}"
    )
    return us


def tried(report: Report, key: str, ways: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Microseconds of each way; one that fails is told, and left out."""
    times: dict[str, float] = {}
    for name, call in ways.items():
        if report.left() < RESERVE:
            break
        try:
            times[name] = time_us(call, call, call)
        except Exception as error:  # noqa: BLE001 the others may do
            print(f"FAILED {key} {name}: {str(error)[:300]}", flush=True)
    return times


def time_experts(report: Report, sums: Sums, name: str) -> None:
    up, down, s = experts_case("odd" if REHEARSE else name, 4)
    width = s.latent or s.hidden
    x, (ids, weights) = random_tokens(TOKENS, width, DEVICE), routing(TOKENS, s.experts, s.top_k)
    flops = 4.0 * TOKENS * s.top_k * s.size * width
    ways = {str(astuple(t)): partial(experts_prefill, x, ids, weights, up, down, t) for t in EXPERTS}
    us = best_of(report, f"experts {name}", flops, tried(report, f"experts {name}", ways))
    sums[name]["experts"] = us * LAYERS[name][1]
    parts = {
        "group": partial(group, ids, s.experts, 128),
        "planes": partial(planes, x, 4),
        "few (tile 64 32)": partial(experts_prefill, x[:64], ids[:64], weights[:64], up, down),
    }
    for part, us in tried(report, f"experts {name}", parts).items():
        report.add(f"time experts {name} {part}", us, f"   {part}: {us:.1f} us")
    if not REHEARSE:
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(5):
            experts_prefill(x, ids, weights, up, down)
        issued = (time.perf_counter() - started) / 5e-6
        torch.cuda.synchronize()
        report.add(f"host experts {name}", issued, f"   the host issues it in {issued:.0f} us")


def astuple(tile: ExpertTile) -> tuple[int, ...]:
    return (tile.rows, tile.tokens, tile.columns, tile.warps, tile.stages)


def time_dense(report: Report, sums: Sums, name: str) -> None:
    for family, bits, rows, columns, layers in DENSE[name][:1] if REHEARSE else DENSE[name]:
        rows, columns = (37, 272) if REHEARSE else (rows, columns)
        x, w = random_tokens(TOKENS, columns, DEVICE), dense_weights(bits, rows, columns, 1)[0]
        ways: dict[str, Callable[[], object]] = {}
        if isinstance(w, Plain):
            ways["cublas"] = partial(triton_linear.linear, x, w)
        else:
            for t in GEMMS[bits][:1] if REHEARSE else GEMMS[bits]:
                ways[f"gemm {t.rows} {t.tokens} {t.columns} {t.stages}"] = partial(with_tile, t, x, w)
        key = f"{name} {family} {rows}x{columns} {bits} bits"
        us = best_of(report, key, 2.0 * TOKENS * rows * columns, tried(report, key, ways))
        sums[name]["dense"] = sums[name].get("dense", 0.0) + us * layers
        del x, w


def with_tile(tile: GemmTile, x: torch.Tensor, w: Any) -> torch.Tensor:
    with patch.object(triton_linear, "gemm_tile", lambda bits, tokens: tile):  # pyright: ignore[reportUnknownLambdaType, reportUnknownArgumentType]
        return triton_linear.linear(x, w)


def time_mamba(report: Report, sums: Sums, name: str) -> None:
    sizes = SCANS["odd" if REHEARSE else name]
    heads, size, groups, states = sizes
    inner, layers = heads * size, LAYERS[name][0]
    projected, w, state = mamba_case(TOKENS, *sizes)
    z, xbc, dt = projected.split([inner, inner + 2 * groups * states, heads], dim=-1)
    tiles = CONV_TILES[:1] if REHEARSE else CONV_TILES
    ways: dict[str, Callable[[], object]] = {
        str(t): partial(conv_prefill, xbc, w.conv, w.conv_bias, state.conv, t) for t in tiles
    }
    us = best_of(report, f"conv {name}", 0, tried(report, f"conv {name}", ways))
    rate = 4 * xbc.numel() / us / 1e6
    report.add(f"rate conv {name}", rate, f"   {rate:.2f} TB/s")
    sums[name]["conv"] = us * layers
    mixed = conv_prefill(xbc, w.conv, w.conv_bias, state.conv)
    x, b, c = mixed.split([inner, groups * states, groups * states], dim=-1)
    x, (b, c) = x.unflatten(1, (heads, size)), (m.unflatten(1, (groups, states)) for m in (b, c))
    scans = SCAN_TILES[:1] if REHEARSE else SCAN_TILES
    ways = {str(t): partial(ssm_prefill, x, dt, b, c, w.ssm, state.ssm, 128, t) for t in scans}
    flops = 2.0 * TOKENS * heads * (128 / 2 * (states + size) + 2 * size * states)
    us = best_of(report, f"scan {name}", flops, tried(report, f"scan {name}", ways))
    sums[name]["scan"] = us * layers
    y = ssm_prefill(x, dt, b, c, w.ssm, state.ssm, 128).flatten(1)
    ways = {"": partial(gated_norm, y, z, w.norm, groups, 1e-5)}
    us = best_of(report, f"gated norm {name}", 0, tried(report, f"gated norm {name}", ways))
    sums[name]["gated norm"] = us * layers


def time_attention(report: Report, sums: Sums, name: str) -> None:
    sizes = (6, 2, 20) if REHEARSE else (32, 2, 128)
    for kv, before in ((FP8, 0), (BF16, 0), (FP8, 16384)):
        case = attention_case(TOKENS, TOKENS + (3 if REHEARSE else before), *sizes, kv)
        ways: dict[str, Callable[[], object]] = {
            str(t): partial(attention_prefill, *case, t) for t in (FLASHES[:1] if REHEARSE else FLASHES)
        }
        key = f"attention {'FP8' if kv == FP8 else 'BF16'} after {before}"
        us = best_of(report, key, 4.0 * 32 * 128 * TOKENS * (TOKENS / 2 + before), tried(report, key, ways))
        if kv == FP8 and not before:
            for model in sums:
                sums[model][name] = us * LAYERS[model][2]


def time_rest(report: Report, sums: Sums, name: str) -> None:
    """What stands between the products, and is no kernel of ours or not a new one."""
    s, (mamba, moe, attention) = SHAPES[name], LAYERS[name]
    x, delta = random_tokens(TOKENS, s.hidden, DEVICE), random_tokens(TOKENS, s.hidden, DEVICE)
    weight, shared = torch.ones(s.hidden, device=DEVICE), random_tokens(TOKENS, s.shared, DEVICE)
    gate = (torch.randn(s.experts, s.hidden, device=DEVICE) * s.hidden**-0.5).to(s.gate)
    bias = torch.randn(s.experts, device=DEVICE) * 0.1
    arguments: tuple[Any, ...] = (x, gate, bias, s.top_k, 2.5, True)
    rows: list[tuple[str, dict[str, Callable[[], object]], int]] = [
        ("norm", {"": partial(triton_linear.norm, x, weight, 1e-5)}, mamba + moe + attention),
        ("relu2", {"": partial(relu2, shared)}, moe),
        ("add", {"": partial(torch.add, x, delta)}, 2 * moe + mamba + attention),
        ("router", {"many": partial(router_many, *arguments), "torch": partial(router, *arguments)}, moe),
    ]
    for family, ways, layers in rows:
        us = best_of(report, f"{family} {name}", 0, tried(report, f"{family} {name}", ways))
        sums[name][family] = us * layers


def guarded(report: Report, name: str, work: Callable[[], None]) -> None:
    if report.left() < RESERVE:
        print(f"{name}: left out, no time", flush=True)
        return
    try:
        work()
    except Exception as error:  # noqa: BLE001 what one finds must not hide what the next would
        traceback.print_exc(limit=4)
        report.add(f"failed {name}", repr(error)[:500], f"{name} FAILED: {repr(error)[:300]}")
    if not REHEARSE:
        torch.cuda.empty_cache()


def main() -> None:
    folder, seconds = Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 200.0
    report = Report(folder, seconds)
    report.path = folder / "prefill.json"
    card = {"torch": torch.__version__, "triton": triton.__version__}
    card |= {} if REHEARSE else {"device": torch.cuda.get_device_name()}
    report.add("card", card, str(card))
    if not REHEARSE:
        compile_all()
    torch.manual_seed(time.time_ns() % (1 << 31))
    # Fills what torch.empty gives with NaN, so that what no program wrote is seen.
    warnings.simplefilter("ignore")
    torch.use_deterministic_algorithms(True, warn_only=True)
    for name, check in checks(report):
        guarded(report, name, check)
    torch.use_deterministic_algorithms(False)
    print(f"checked; {report.left():.0f} s left", flush=True)
    sums: Sums = {"nano": {}, "super": {}}
    for name in sums:
        guarded(report, f"time experts {name}", partial(time_experts, report, sums, name))
    for name in sums:
        guarded(report, f"time dense {name}", partial(time_dense, report, sums, name))
        guarded(report, f"time mamba {name}", partial(time_mamba, report, sums, name))
        guarded(report, f"time rest {name}", partial(time_rest, report, sums, name))
    guarded(report, "time attention", partial(time_attention, report, sums, "attention"))
    for name, families in sums.items():
        shown = ", ".join(f"{family} {us / 1e3:.2f}" for family, us in families.items())
        total = sum(families.values()) / 1e3
        report.add(f"sum {name}", families, f"{name}: {TOKENS} tokens in {total:.1f} ms without the head: {shown}")
    print(f"{report.left():.0f} s left")


if __name__ == "__main__":
    main()
