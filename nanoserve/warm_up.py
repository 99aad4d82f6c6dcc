"""A start on a GPU: what most requests need is compiled before the first one comes, and the user is told.

Compilers keep what they make: NVRTC's kernels stand in `nanoserve.cached.cache_folder`, Triton's in a folder of
its own. A start with the same versions, model and chip compiles nothing again.
"""

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from nanoserve.cached import cache_folder
from nanoserve.engine import Engine
from nanoserve.request import Request, SamplingParams

Say = Callable[[str], None]
"""Is called with a line for the user."""

PROMPTS = (32, 64, 512)
"""Tokens of prompts that have kernels of their own, beside a whole chunk.

So has each number from 2 to 16: those, of short prompts and of the ends of long ones, are compiled when they come.
"""


def silent(line: str) -> None:
    """Libraries do not print."""


@contextmanager
def compiling(what: str, say: Say) -> Generator[None]:
    """Say how many kernels the work inside made a compiler compile, if it did.

    Args:
        what: the work.
        say: called with a line.
    """
    before, begun = _kept(), time.perf_counter()
    yield
    if made := _kept() - before:
        seconds = time.perf_counter() - begun
        say(f"  kernels          {what}: {made} compiled in {seconds:.1f} s, and kept for the next start")


def warm_up(engine: Engine, say: Say) -> None:
    """Answer prompts of several lengths with a token each.

    Args:
        engine: of a GPU, captured already where decode steps are a graph.
        say: called with a line for each length that made a compiler compile.

    Raises:
        EngineError: as `Engine.generate`: a weight is damaged.
    """
    longest = engine.max_context - 1
    for tokens in sorted({min(n, longest) for n in (*PROMPTS, engine.prefill_chunk)} - {0}):
        with compiling(f"a prompt of {tokens:,} tokens", say):
            for _ in engine.generate(Request((0,) * tokens, SamplingParams(max_tokens=1))):
                pass


def _kept() -> int:
    """Kernels in the compilers' folders."""
    from triton import knobs

    return sum(1 for folder in (cache_folder(), Path(knobs.cache.dir)) for _ in folder.rglob("*.cubin"))
