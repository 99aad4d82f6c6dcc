"""The CPU machine finds what a GPU would leave undefined."""

import ctypes

import pytest
import torch
from cuda_on_cpu import HAS_COMPILER, Fault, run

pytestmark = pytest.mark.skipif(not HAS_COMPILER, reason="g++ is not installed: CUDA C++ is not run on the CPU")

KERNEL = """
typedef unsigned char u8; typedef unsigned long long u64; typedef unsigned u32;
struct Arguments {{ const float* from; float* to; }};
extern "C" __global__ void tried(const __grid_constant__ Arguments a) {{
  extern __shared__ __align__(128) u8 memory[];
  const int t = threadIdx.x, rank = blockIdx.x % CLUSTER;
  u64* barrier = (u64*)memory;
  float* x = (float*)(memory + 128);
  {body}
}}
"""
COPY = """
  if (t == 0) begin_barrier(barrier, 1);
  __syncthreads();
  wait_for_producers();
  if (t == 0) arrive_and_expect(barrier, 128), copy_bulk(x, a.from, 128, barrier);
  wait_phase(barrier, 0);
  if (t < 32) a.to[t] = x[t];
"""
MEET = """
  if (t == 0) begin_barrier(barrier, 1), arrive_and_expect(barrier, 4);
  __syncthreads();
  cluster_arrive();
  cluster_wait();
  if (t == 0) send_one(x, 1 - rank, a.from[rank], barrier);
  wait_phase(barrier, 0);
  if (t == 0) a.to[rank] = x[0];
"""
BODIES = {
    "waits for ever": COPY.replace("expect(barrier, 128)", "expect(barrier, 144)"),
    "before its copies": COPY.replace("wait_phase(barrier, 0);", "").replace("x[t]", "0"),
    "more arrive": COPY.replace(
        "  wait_phase", "  if (t == 1) arrive(barrier), arrive(barrier);\n  wait_phase"
    ).replace("barrier, 128)", "barrier, 16)"),
    "nobody has begun": COPY.replace("begin_barrier(barrier, 1)", "0"),
    "a copy of 120 bytes": COPY.replace("128, barrier", "120, barrier"),
    "out of any tensor": COPY.replace("a.from, 128", "a.from + 4, 128"),
    "nobody waited": COPY.replace("wait_for_producers();", ""),
    "before this one has waited": COPY.replace(
        "wait_for_producers();", "let_next_begin();\n  wait_for_producers();"
    ),
    "out of shared memory": COPY.replace("copy_bulk(x,", "copy_bulk(x + 4,"),
    "mma meets __syncwarp": "if (t < 16) __syncwarp(); else { float c[4] = {}; mma(c, 0, 0, 0, 0, 0, 0); }",
    "not aligned, or null": "a.to[0] = *(const float*)(memory + 1);",
    "an index out of bounds": "float v[4] = {}; a.to[0] = v[t];",
    "wrote past": "if (t == 0) x[32] = 1; wait_for_producers();",
    "has not begun": MEET.replace("__syncthreads();\n  cluster_arrive();\n  cluster_wait();\n", ""),
    "without cluster_arrive": "cluster_wait();",
}


class _Arguments(ctypes.Structure):
    _fields_ = [("from_", ctypes.c_void_p), ("to", ctypes.c_void_p)]


def tried(body: str, cluster: int = 1, seed: int = 0, late: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """(what the kernel reads, what it wrote); two warps and 256 bytes a block."""
    read, wrote = torch.randn(32), torch.full((32,), torch.nan)
    text = KERNEL.format(body=body)
    arguments = _Arguments(read.data_ptr(), wrote.data_ptr())
    run(
        "tried.cu", {"CLUSTER": str(cluster)}, arguments, cluster, 64, 256, [read, wrote], [read] if late else [],
        cluster=cluster, seed=seed, text=text,
    )  # fmt: skip
    return read, wrote


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_what_is_right_runs(seed: int) -> None:
    read, wrote = tried(COPY, seed=seed)
    assert torch.equal(read, wrote)
    read, wrote = tried(MEET, 2, seed, late=False)
    assert torch.equal(read[:2].flip(0), wrote[:2])


@pytest.mark.parametrize("message", BODIES)
def test_faults(message: str) -> None:
    cluster = 2 if "cluster" in BODIES[message] or "send_one" in BODIES[message] else 1
    with pytest.raises(Fault, match=message):
        tried(BODIES[message], cluster, late=cluster == 1)


def test_what_is_read_too_early_is_nan() -> None:
    _, wrote = tried(COPY.replace("wait_phase(barrier, 0);", "if (t >= 32) wait_phase(barrier, 0);"))
    assert wrote.isnan().all()
    _, wrote = tried("if (t < 32) a.to[t] = a.from[t]; wait_for_producers();")
    assert wrote.isnan().all()
