"""By hand, on a machine with a GPU: the CUDA C++ kernels against their references, and how long layers take.

    PYTHONPATH=. python tests/gpu_cuda.py [SHAPE ...]          checks and times
    PYTHONPATH=. python tests/gpu_cuda.py --trace SHAPE        where the time of each launch of two layers goes

Times are of layers behind one another in a CUDA graph, each over weights of its own that no cache holds: launches
overlap, and what a launch takes alone says little.
"""

import ctypes
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from gpu_inputs import moe_on, norm_on, random_tokens, random_weight
from torch import Tensor

from nanoserve.kernels import attention, cuda_attention, cuda_mamba, cuda_ops, fused, mamba, nvrtc
from nanoserve.kernels.attention import LayerKV
from nanoserve.kernels.fused import MoeWeights, Norm
from nanoserve.kernels.linear import Weight
from nanoserve.kernels.random_inputs import mamba_inputs
from nanoserve.kernels.weight_launches import SHAPES, Shape

DEVICE = torch.device("cuda")
GROUPS, STATES, HEAD = 8, 128, 64
SETS = {"nano": 12, "lightning": 10, "super": 5}
PLACES = (
    "begin", "waits", "waited", "loaded", "prepared", "first job", "end", "",
    "copier waits", "copier waited", "filled", "", "last stage", "writer ends", "chosen", "mamba sent",
)  # fmt: skip
"""Of the trace: the first consumer warp, then those that copy and write."""
WAITED = PLACES.index("copier waited")
HEADER = """
__device__ unsigned long long trace_[4096 * 16];
__device__ __forceinline__ void trace(int i, bool mine) {
  if (mine) asm volatile("mov.u64 %0, %globaltimer;" : "=l"(trace_[blockIdx.x * 16 + i]));
}
#define CONSUMER(i) trace(i, threadIdx.x == 0);
#define COPIER(i) trace(i, threadIdx.x % 32 == 0);
"""
MARKS = {  # of a kernel: (what stands once in it, what goes in front of it, what behind)
    "products.cu": (
        ("DEVICE u32 place(", HEADER, ""),
        ("  Cursor c = Cursor::of_block();\n", "CONSUMER(0)\n", ""),
        ("  wait_for_producers();\n  if (V_NORMED(0)) {\n", "CONSUMER(1)\n", ""),
        ("  load_plain<0>(a, x);", "CONSUMER(3)\n", ""),
        ("  prepare(a, x);\n", "", "CONSUMER(4)\n  bool first_job = true;\n"),
        (
            "    begin = (begin - c.stages())",
            "if (first_job) { CONSUMER(5) }\n first_job = false;\n CONSUMER(6)\n",
            "",
        ),
        ("  wait_for_producers();\n  if (SUMMED(0) && lane < filled)", "COPIER(8)\n", ""),
        ("  if (SUMMED(0) && lane < filled)", "COPIER(9)\n", ""),
        ("  if (lane > 0) return;\n", "COPIER(10)\n", ""),
        ("    wait_phase(s.done(stage), parity);\n", "", "COPIER(12)\n"),
        ("#if CHOOSE == 1\n  if (blockIdx.x >= routers) return;\n", "COPIER(13)\n", ""),
        ("s.ids(), a.ids, a.chosen);\n", "", "COPIER(14)\n"),
    ),
    "mamba.cu": (
        ("DEVICE u32 place(", HEADER, ""),
        ("  if (tid == 0) {\n    begin_barrier(there, 1);\n", "CONSUMER(0)\n", ""),
        ("  cluster_wait();\n  wait_for_producers();\n", "CONSUMER(8)\n", "CONSUMER(9)\n"),
        ("    send_one(squares", "CONSUMER(15)\n", ""),
        ("  wait_phase(there, 0);\n", "", "CONSUMER(12)\n"),
        ("  // All blocks of the group have read what", "CONSUMER(13)\n", ""),
    ),
}


@dataclass(frozen=True, slots=True)
class Layers:
    """Random layers of a released shape, some of each kind."""

    name: str
    shape: Shape
    norm: Norm
    in_proj: list[Weight]
    out_proj: list[Weight]
    between: list[tuple[Tensor, Any, Any]]
    mixtures: list[MoeWeights]
    streams: list[Tensor]

    @classmethod
    def of(cls, name: str) -> "Layers":
        """As many as no cache holds."""
        s, sets = SHAPES[name], SETS[name]
        sizes = (s.inner // HEAD, HEAD, GROUPS, STATES, 4)
        return cls(
            name,
            s,
            norm_on(s.hidden),
            [random_weight(s.mamba_bits, s.projected, s.hidden) for _ in range(sets)],
            [random_weight(s.mamba_bits, s.hidden, s.inner) for _ in range(sets)],
            [mamba_inputs(1, sizes, DEVICE, torch.bfloat16) for _ in range(sets)],
            [moe_on(s) for _ in range(max(2, sets // 4))],
            [random_tokens(1, s.hidden) for _ in range(sets)],
        )

    def mamba(self, i: int) -> Tensor:
        """A Mamba layer."""
        n = i % len(self.streams)
        (projected,) = cuda_ops.norm_linears(self.streams[n], self.norm, (self.in_proj[n],))
        y = cuda_mamba.mamba_decode(projected, *self.between[n][1:])
        return cuda_ops.linear_add(y, self.out_proj[n], self.streams[n])

    def mixture(self, i: int, stream: Tensor | None = None) -> Tensor:
        """A layer of experts."""
        of = self.streams[i % len(self.streams)] if stream is None else stream
        return cuda_ops.moe_add(of, self.norm, self.mixtures[i % len(self.mixtures)])

    def both(self, i: int) -> Tensor:
        """One behind the other."""
        return self.mixture(i, self.mamba(i))


def error(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


def checks(of: Layers) -> Iterator[tuple[str, float, float]]:
    """(what, error, what it may be)."""
    s, x = of.shape, of.streams[0]
    for bits, rows, columns in ((4, s.projected, s.hidden), (8, 520, s.hidden), (16, 300, 1024), (4, 40, 448)):
        w, stream, norm = random_weight(bits, rows, columns), random_tokens(1, columns), norm_on(columns)
        got, want = (op.norm_linears(stream, norm, (w,))[0] for op in (cuda_ops, fused))
        yield f"norm_linears {rows}x{columns}, {bits} bits", error(got, want), 3e-3
        y, into = random_tokens(1, columns), random_tokens(1, rows)
        got, want = (op.linear_add(y, w, into) for op in (cuda_ops, fused))
        yield f"linear_add {rows}x{columns}, {bits} bits", error(got, want), 3e-3
    head = random_weight(s.head_bits, s.vocab, s.hidden)
    yield "head", error(cuda_ops.head(x, of.norm, head), fused.head(x, of.norm, head)), 4e-3
    for i, w in enumerate(of.mixtures[:2]):
        got = cuda_ops.moe_add(of.streams[i], of.norm, w)
        yield f"moe_add {i}", error(got, fused.moe_add(of.streams[i], of.norm, w)), 4e-3
        yield f"moe_add {i} again", float((got != cuda_ops.moe_add(of.streams[i], of.norm, w)).sum()), 0.0
    projected, weights, state = of.between[0]
    other = mamba.MambaState(state.conv.clone(), state.ssm.clone(), state.tickets.clone())
    for i in range(3):
        got = cuda_mamba.mamba_decode(projected, weights, state)
        yield f"mamba_decode {i}", error(got, mamba.mamba_decode(projected, weights, other)), 4e-3
    yield "its state", error(state.ssm, other.ssm), 1e-5
    yield from attention_checks()


def attention_checks() -> Iterator[tuple[str, float, float]]:
    """One token behind another, at contexts of several lengths."""
    for kind, at in ((torch.bfloat16, 700), (torch.float8_e4m3fn, 0), (torch.float8_e4m3fn, 5000)):
        pages = [(torch.randn(400, 16, 2, 128, device=DEVICE) * 2).to(kind) for _ in range(2)]
        ours, theirs = (LayerKV(pages[0].clone(), pages[1].clone(), 0.5, 0.25) for _ in range(2))
        table = torch.randperm(400, device=DEVICE).int()
        for position in (at, at + 1):
            q = random_tokens(32, 128).view(1, 32, 128)
            k, v = (random_tokens(2, 128).view(1, 2, 128) for _ in range(2))
            where = torch.tensor([position], device=DEVICE)
            got = cuda_attention.attention_decode(q, k, v, ours, table, where)
            want = attention.attention_decode(q, k, v, theirs, table, where)
            yield f"attention_decode {kind} at {position}", error(got, want), 5e-3
        same = all(
            torch.equal(a.view(torch.uint8), b.view(torch.uint8))
            for a, b in ((ours.k, theirs.k), (ours.v, theirs.v))
        )
        yield "its cache", float(not same), 0.0


def chain_us(work: Callable[[int], object], count: int) -> float:
    """Microseconds of each of so many in a CUDA graph: the median of 15 replays."""
    for i in range(2):
        work(i)
    torch.cuda.synchronize()
    graph, times = torch.cuda.CUDAGraph(), list[float]()
    with torch.cuda.graph(graph):
        for i in range(count):
            work(i)
    for _ in range(17):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[2:]) * 1e3 / count


def attention_us(length: int) -> float:
    """A layer's attention alone."""
    pages = [torch.randn(4096, 16, 2, 128, device=DEVICE).to(torch.float8_e4m3fn) for _ in range(2)]
    table, where = torch.arange(4096, device=DEVICE).int(), torch.tensor([length - 1], device=DEVICE)
    q, k, v = random_tokens(32, 128).view(1, 32, 128), *(random_tokens(2, 128).view(1, 2, 128) for _ in range(2))
    cache = LayerKV(pages[0], pages[1])
    return chain_us(lambda _: cuda_attention.attention_decode(q, k, v, cache, table, where), 12)


def marked(source: Callable[[str], str], name: str) -> str:
    """A kernel's source with the trace's marks."""
    text = source(name)
    for anchor, front, behind in MARKS.get(name, ()):
        assert text.count(anchor) == 1, anchor
        text = text.replace(anchor, front + anchor + behind)
    return text


def trace(name: str) -> None:
    """Run two layers often, and tell for each launch of the last round when its blocks were where."""
    from cuda.bindings import driver  # pyright: ignore[reportAttributeAccessIssue]

    modules: list[Any] = []
    load = driver.cuModuleLoadData

    def noted(code: bytes) -> Any:
        result = load(code)
        modules.append(result[1])
        return result

    with (
        patch.object(nvrtc, "source", partial(marked, nvrtc.source)),
        patch.object(driver, "cuModuleLoadData", noted),
    ):
        of = Layers.of(name)
        print(f"{name}: {chain_us(of.both, 12):.2f} us two layers")
    tables: list[Tensor] = []
    for module in modules:
        failed, place, _ = driver.cuModuleGetGlobal(module, b"trace_")
        host = (ctypes.c_uint64 * (4096 * 16))()
        if (
            int(failed) == 0
            and int(driver.cuMemcpyDtoH(ctypes.addressof(host), place, ctypes.sizeof(host))[0]) == 0
        ):
            times = torch.tensor(list(host), dtype=torch.int64).view(4096, 16)
            tables.append(times[times[:, WAITED] > 0])
    tables = sorted((t for t in tables if len(t)), key=lambda t: int(t[:, WAITED].min()))
    start = int(tables[0][:, WAITED].min())
    for times in tables:
        first = int(times[:, WAITED].min())
        print(f"{len(times)} blocks, the first has waited at {(first - start) / 1e3:.2f} us; least, median, most")
        for place, what in enumerate(PLACES):
            some = times[:, place][times[:, place] > 0]
            if what and len(some):
                us = (some - first).double() / 1e3
                print(f"  {what:14} {us.min():8.2f} {us.median():8.2f} {us.max():8.2f}")


def main() -> None:
    """Checks and times, or the trace."""
    if sys.argv[1:2] == ["--trace"]:
        trace(sys.argv[2])
        return
    wrong = sum(checked(Layers.of(name)) for name in sys.argv[1:] or SHAPES)
    print(f"attention: us at 2,560 and 32,768 {attention_us(2560):.2f}, {attention_us(32768):.2f}")
    sys.exit(1 if wrong else 0)


def checked(of: Layers) -> int:
    """Check and time a shape's layers; how many checks failed."""
    wrong, count, s = 0, len(of.streams), of.shape
    for what, got, most in checks(of):
        wrong += (bad := not got <= most)
        print(f"{of.name} {what}: {got:.1e}{f'  WRONG, at most {most:.1e}' if bad else ''}")
    weight = random_weight(s.head_bits, s.vocab, s.hidden)
    head = chain_us(lambda _: cuda_ops.head(of.streams[0], of.norm, weight), 3)
    layers = ", ".join(f"{work.__name__} {chain_us(work, count):.2f}" for work in (of.mamba, of.mixture, of.both))
    print(f"{of.name}: us {layers}, head {head:.1f}", flush=True)
    return wrong


if __name__ == "__main__":
    main()
