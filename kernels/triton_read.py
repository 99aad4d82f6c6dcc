"""Reads memory and does nothing else: what a chip's bus gives at best."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoserve.kernels.tiles import blocks, launch


@triton.jit
def read_kernel(
    source: tl.tensor, sums: tl.tensor, count: tl.tensor, BLOCK: tl.constexpr, STEPS: tl.constexpr
) -> None:
    """Grid (blocks of BLOCK * STEPS words,): their sum, so that no load can be left out."""
    program = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.int32)
    for step in tl.static_range(STEPS):  # pyright: ignore[reportGeneralTypeIssues]
        place = (program.to(tl.int64) * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        total += tl.load(source + place, mask=place < count, other=0)
    tl.store(sums + program, tl.sum(total, axis=0))


def read(source: Tensor, sums: Tensor, block: int, steps: int, warps: int) -> None:
    """Sum int32 ``source`` into ``sums``, int32 [blocks of block * steps]."""
    grid = blocks(len(source), block * steps)
    launch(read_kernel, (grid,), source, sums, len(source), block, steps, num_warps=warps)


SHAPES = ((4096, 4, 8), (4096, 8, 8), (2048, 8, 4), (8192, 2, 16), (8192, 4, 16))
"""(block, steps, warps) to try; the best is the bus."""


def read_bandwidth(size: int, device: torch.device, repeats: int = 10) -> float:
    """The best of several ways to read ``size`` bytes, in bytes a second, by events around each."""
    source = torch.randint(-(2**31), 2**31 - 1, (size // 4,), dtype=torch.int32, device=device)
    sums = torch.empty(blocks(len(source), 4096), dtype=torch.int32, device=device)
    best = float("inf")
    for block, steps, warps in SHAPES:
        read(source, sums, block, steps, warps)
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            read(source, sums, block, steps, warps)
            end.record()
            end.synchronize()
            best = min(best, start.elapsed_time(end) / 1e3)
    return source.nbytes / best
