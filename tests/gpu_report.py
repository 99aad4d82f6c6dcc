"""What scripts on a GPU share: a report that is whole after every line, and times of launches in a CUDA graph."""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Report:
    """What was found, in a file that is whole after every line."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.path, self.end, self.rows = folder / "matvec.json", time.monotonic() + seconds, dict[str, Any]()

    def add(self, key: str, value: Any, line: str) -> None:
        self.rows[key] = value
        self.path.write_text(json.dumps(self.rows, indent=1))
        print(line, flush=True)

    def left(self) -> float:
        return self.end - time.monotonic()


def microseconds(calls: list[Callable[[], object]], repeats: int = 7) -> float:
    """Median time of a call among calls that a CUDA graph makes one after another."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times: list[float] = []
    for _ in range(repeats + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times[1:])
