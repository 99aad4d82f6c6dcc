"""By hand, on a machine with a GPU: the fastest cuts of products.cu's launches, for MEASURED in cuda_plans.py.

    PYTHONPATH=. python tests/gpu_cuda_tune.py SHAPE [SECONDS]

Launches in a chain overlap, so a cut is judged by the time of a whole chain: a Mamba layer and a mixture,
attention and its projections, the head. One launch's cut after another is changed, for so many seconds (60) a
chain: how many copies are on their way, ring and rows, and the copies again. The cuts of a launch are compiled at
once, by as many threads as the host has processors: one takes longer to compile than a chain to time.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product

import torch
from gpu_cuda import DEVICE, Layers, chain_us
from gpu_inputs import random_weight
from torch import Tensor

from nanoserve.errors import NanoserveError
from nanoserve.kernels import cuda_attention, cuda_ops, cuda_plans, cuda_products, nvrtc
from nanoserve.kernels.attention import LayerKV
from nanoserve.kernels.cuda_products import Cut, Plan

GAIN = 0.05
"""Microseconds that are no chance."""
SHAPES_OF_RINGS = (
    (2, 4, 4),
    (2, 6, 4),
    (2, 8, 4),
    (4, 4, 4),
    (4, 8, 4),
    (2, 4, 8),
    (2, 6, 8),
    (1, 3, 8),
    (1, 4, 8),
)
"""Groups, stages, warps of a group."""
LENGTHS = (2048, 4096)
"""Bytes of a row that are copied at once."""

Key = tuple[str, int, int]
Choice = tuple[Cut, *tuple[int, ...]]


@dataclass(slots=True)
class Tuning:
    """A search over the cuts of a chain's launches.

    Attributes:
        table: of a chip, as in `cuda_plans.MEASURED`; changed in place.
        chain: its time in microseconds; it raises where a cut does not fit.
        until: `time.monotonic` at which it ends.
        seen: the launches of the chain, and the cuts that they have.
    """

    table: dict[Key, Choice]
    chain: Callable[[], float]
    until: float
    seen: dict[Key, tuple[Plan, Cut]] = field(default_factory=dict[Key, tuple[Plan, Cut]])

    def run(self) -> float:
        """Change one launch's cut after another; the chain's time with the best."""
        best = self.time(4)
        for key, (plan, _) in list(self.seen.items()):
            best = self._try(key, list(flights(self._choice(key))), best)
            best = self._try(key, list(rings(plan)), best)
            best = self._try(key, list(flights(self._choice(key))), best)
        return best

    def _choice(self, key: Key) -> Choice:
        plan, cut = self.seen[key]
        return self.table.get(key) or (cut, *(part.eights for part in plan.parts))

    def _try(self, key: Key, choices: list[Choice], best: float) -> float:
        kept = self.table.get(key)
        if time.monotonic() < self.until:
            self._compile(key, choices)
        for choice in choices:
            if time.monotonic() > self.until:
                break
            self.table[key] = choice
            if self.time() < best - GAIN and (us := self.time(2)) < best - GAIN:
                best, kept = us, choice
                print(f"  {best:8.2f} us: {key}: {choice}", flush=True)
        if kept is None:
            self.table.pop(key, None)
        else:
            self.table[key] = kept
        return best

    def _compile(self, key: Key, choices: list[Choice]) -> None:
        chip, kept, plan = torch.cuda.get_device_capability(), self.table.get(key), self.seen[key][0]
        launches: list[tuple[Plan, Cut]] = []
        for self.table[key] in choices:
            cuda_plans.fitted.cache_clear()
            launches.append(cuda_plans.fitted(plan, chip[0]))
        self.table.pop(key)
        if kept is not None:
            self.table[key] = kept
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            defines = [cuda_products.defines(plan, cut, DEVICE) for plan, cut in set(launches)]
            list(pool.map(partial(nvrtc.compiled, "products.cu", chip), defines))

    def time(self, turns: int = 1) -> float:
        """Of the chain as the table is, the least of so many; infinite where a cut does not fit.

        Notes the chain's launches.
        """
        fitted = cuda_plans.fitted
        fitted.cache_clear()

        def noted(plan: Plan, major: int) -> tuple[Plan, Cut]:
            other, cut = fitted(plan, major)
            self.seen.setdefault(cuda_plans.key(plan), (plan, cut))
            return other, cut

        cuda_plans.fitted = noted  # pyright: ignore[reportAttributeAccessIssue]
        try:
            return min(self.chain() for _ in range(turns))
        except NanoserveError:
            return float("inf")
        finally:
            cuda_plans.fitted = fitted


def rings(plan: Plan) -> Iterator[Choice]:
    """Cuts by their rings, and eights of rows for each large part."""
    lengths = LENGTHS if any(part.bits > 4 for part in plan.parts) else LENGTHS[-1:]
    eights = [sorted({p.eights, 1, 2} if p.columns > 1280 and p.rows > 256 else {p.eights}) for p in plan.parts]
    for (groups, stages, warps), longest, flight, own in product(
        SHAPES_OF_RINGS, lengths, (0, 2), product(*eights)
    ):
        yield (Cut(groups, stages, warps, longest, flight), *own)


def flights(of: Choice) -> Iterator[Choice]:
    """The same with other numbers of copies on their way."""
    cut, *own = of
    for flight, paced in product(range(min(cut.stages, 5)), (False, True)):
        if flight or not paced:
            yield (replace(cut, in_flight=flight, paced=paced), *own)


def chains(of: Layers) -> Iterator[tuple[str, Callable[[], float]]]:
    """(name, its time)."""
    s, count = of.shape, 4
    yield "a Mamba layer and a mixture", lambda: chain_us(of.both, len(of.streams))
    qkv = [tuple(random_weight(16, rows, s.hidden) for rows in (4096, 256, 256)) for _ in range(count)]
    out = [random_weight(16, s.hidden, 4096) for _ in range(count)]
    pages = [torch.randn(2, 200, 16, 2, 128, device=DEVICE).to(torch.float8_e4m3fn) for _ in out]
    table, where = torch.arange(200, device=DEVICE).int(), torch.tensor([2559], device=DEVICE)

    def attention(i: int) -> Tensor:
        n = i % count
        q, k, v = cuda_ops.norm_linears(of.streams[n], of.norm, qkv[n])
        k, v = k.view(1, 2, 128), v.view(1, 2, 128)
        y = cuda_attention.attention_decode(
            q.view(1, 32, 128), k, v, LayerKV(pages[n][0], pages[n][1]), table, where
        )
        return cuda_ops.linear_add(y.view(1, 4096), out[n], of.streams[n])

    yield "an attention layer", lambda: chain_us(attention, 3 * count)
    head = random_weight(s.head_bits, s.vocab, s.hidden)
    yield "the head", lambda: chain_us(lambda _: cuda_ops.head(of.streams[0], of.norm, head), 3)


def main() -> None:
    """Tune each chain of a shape, and print what the table is to have."""
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 60.0
    table = cuda_plans.MEASURED.setdefault(torch.cuda.get_device_capability()[0], {})
    found: dict[Key, Choice] = {}
    for name, chain in chains(Layers.of(sys.argv[1])):
        tuning = Tuning(table, chain, time.monotonic() + seconds)
        print(f"{name}: {tuning.time(4):.2f} us")
        print(f"{name}: {tuning.run():.2f} us with the best cuts", flush=True)
        found |= {key: table[key] for key in tuning.seen if key in table}
    for key, choice in found.items():
        print(f"        {key}: {choice},")


if __name__ == "__main__":
    main()
