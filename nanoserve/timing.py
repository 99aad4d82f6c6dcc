"""How long a call takes when its data are in no cache: calls over several sets of arguments take turns."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from nanoserve.graph import Capture

COLD = 256 << 20
"""Bytes that a timing rotates through: more than any second cache holds."""
ROOM = 4 << 30
"""Bytes of arguments at most: they are made beside what else is on the card."""
_MOST = 64
_SECONDS = 0.3


def sets_for(touched: int, held: int) -> int:
    """How many sets of arguments to take turns.

    Args:
        touched: bytes that a call reads and writes.
        held: bytes that its arguments take.
    """
    return max(2, min(_MOST, COLD // max(touched, 1) + 1, ROOM // max(held, 1)))


def median_us(calls: Sequence[Callable[[], object]], device: torch.device, *, captured: bool) -> float:
    """Median microseconds of a call, of rounds of all calls one after another.

    Args:
        calls: each over arguments of its own.
        device: where they run.
        captured: as one CUDA graph, which leaves out what the host takes.

    Raises:
        EngineError: they cannot be captured.
    """

    def work() -> None:
        for call in calls:
            call()

    work()
    run = Capture.new()(work) if captured and device.type == "cuda" else work
    first = _round_us(run, device)
    rounds = max(3, min(20, int(_SECONDS * 1e6 / max(first, 1.0))))
    return statistics.median(_round_us(run, device) for _ in range(rounds)) / len(calls)


def _round_us(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return (time.perf_counter() - started) * 1e6
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) * 1e3
