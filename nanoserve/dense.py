"""``nanoserve bench --dense``: the NVFP4 weight-only product alone, cold, at shapes known from large engines."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nanoserve.graph import Capture
from nanoserve.kernels.linear import Nvfp4, expert
from nanoserve.kernels.nvfp4 import GROUP
from nanoserve.kernels.table import HOST_BOUND, backends

OP = "linear_nvfp4"
SHAPES = ((4096, 2688), (256, 2688), (2688, 4096), (3712, 2688), (2688, 3712), (131072, 2688))
"""N × K: y [M, N] = x [M, K] @ w.T."""

TOKENS = (1, 2, 4, 8, 16)

_COLD = 512 << 20
"""Bytes of copies of a weight that take turns: more than any cache holds."""

_CALLS = 256
"""Of copies, at most."""


def dense(
    device: torch.device,
    bandwidth: float,
    say: Callable[[str], None],
    *,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    tokens: Sequence[int] = TOKENS,
    cold: int = _COLD,
) -> list[dict[str, Any]]:
    """A row for each backend that can run here, shape and number of tokens: µs, TB/s and share of the bus.

    Args:
        device: where to run.
        bandwidth: of its bus, bytes a second.
        say: called with a line for each row.
        shapes: N × K.
        tokens: M.
        cold: bytes of weights that take turns.
    """
    rows: list[dict[str, Any]] = []
    able, rejected = backends(OP, device, torch.bfloat16)
    for name, reason in rejected:
        say(f"{OP} on {name}: {reason}")
    for n, k in shapes:
        stack = _random(n, k, cold if device.type == "cuda" else 2, device)
        size = n * k // 2 + n * k // GROUP
        for name, function in able.items():
            for m in tokens:
                x = torch.randn((m, k), device=device).bfloat16()
                us = _time_us(function, x, stack, captured=(OP, name) not in HOST_BOUND)
                rate = size / us * 1e6
                row = {"backend": name, "n": n, "k": k, "m": m, "us": us, "tb_s": rate / 1e12}
                rows.append({**row, "of_bus": rate / bandwidth})
                say(f"{name:<8} {n:>7} × {k:<5} M {m:<3} {us:10.1f} µs {rate / 1e12:7.3f} TB/s")
    return rows


def _random(n: int, k: int, cold: int, device: torch.device) -> Nvfp4:
    """A stack of random weights [copies, N, K], ``cold`` bytes of them, at least two and at most `_CALLS`."""
    copies = min(max(cold // (n * k // 2), 2), _CALLS)
    data = torch.randint(0, 256, (copies, n, k // 2), dtype=torch.uint8, device=device)
    scales = torch.randint(0x38, 0x40, (copies, n, k // GROUP), dtype=torch.uint8, device=device)
    return Nvfp4(data, scales.view(torch.float8_e4m3fn), torch.full((copies,), 0.01, device=device))


def _time_us(function: Callable[..., Any], x: Tensor, stack: Nvfp4, *, captured: bool) -> float:
    """Microseconds a product, each of the copies in its turn."""
    copies = len(stack.data)

    def work() -> None:
        for index in range(copies):
            function(x, expert(stack, index))

    work()
    if x.device.type != "cuda":
        started = time.perf_counter()
        work()
        return (time.perf_counter() - started) / copies * 1e6
    run = Capture.new()(work) if captured else work
    run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(5):
        run()
    end.record()
    torch.cuda.synchronize(x.device)
    return start.elapsed_time(end) / 5 / copies * 1e3
