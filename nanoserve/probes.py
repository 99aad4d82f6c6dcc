"""Looks at this machine: driver, toolkit, packages, and what its compilers make of an E2M1 conversion.

Each probe answers what it found or why it could not; none raises.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from nanoserve.machine import driver_version

PACKAGES = (
    "torch",
    "triton",
    "flashinfer-python",
    "nvidia-cutlass-dsl",
    "nvidia-cutlass-dsl-libs-base",
    "nvidia-cutlass-dsl-libs-core",
    "nvidia-cutlass-dsl-libs-cu13",
)
"""Whose versions matter."""

VARIABLES = ("FLASHINFER_CUDA_ARCH_LIST", "CUTE_DSL_ARCH", "TORCH_CUDA_ARCH_LIST")
"""Which set the chip that kernels are compiled for."""

_SECONDS = 120

_PTX = """.version 8.7
.target {target}
.address_size 64
.visible .entry probe(.param .u64 out, .param .f32 a) {{
 .reg .b64 p; .reg .f32 f; .reg .b8 c; .reg .b16 h;
 ld.param.u64 p, [out];
 ld.param.f32 f, [a];
 cvt.rn.satfinite.e2m1x2.f32 c, f, f;
 cvt.u16.u8 h, c;
 st.global.u16 [p], h;
 ret;
}}
"""

_CUDA = """#include <cuda_fp4.h>
extern "C" __global__ void probe(float2 const *x, __nv_fp4x2_storage_t *y) {
  y[threadIdx.x] = __nv_cvt_float2_to_fp4x2(x[threadIdx.x], __NV_E2M1, cudaRoundNearest);
}
"""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A card: name, compute capability, multiprocessors, bytes of memory, and whether the CPU shares them."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    memory: int
    unified: bool


@dataclass(frozen=True, slots=True)
class Toolkit:
    """A CUDA toolkit: the compiler's path and its version."""

    nvcc: str
    version: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Conversion:
    """What compilers make of a conversion to E2M1 for a chip.

    Attributes:
        target: the chip, such as sm_120a.
        assembler: whether Triton's ptxas takes the instruction; None where there is none, and ``why`` says so.
        nvcc: whether the CUDA headers' conversion becomes the instruction; None where there is no nvcc.
        why: what a compiler said, or what is missing.
    """

    target: str
    assembler: bool | None
    nvcc: bool | None
    why: str


@dataclass(frozen=True, slots=True)
class Machine:
    """All that the probes found; a version is None where the package is absent."""

    gpu: Gpu | None
    driver: str | None
    driver_cuda: tuple[int, int] | None
    toolkit: Toolkit | None
    torch_cuda: str | None
    versions: Mapping[str, str | None]
    flashinfer_fault: str | None
    variables: Mapping[str, str]
    conversion: Conversion


def look() -> Machine:
    """Run every probe; takes about ten seconds."""
    import torch

    gpu = gpu_here()
    toolkit = find_toolkit()
    major, minor = gpu.capability if gpu else (12, 0)
    target = f"sm_{major}{minor}a"
    return Machine(
        gpu=gpu,
        driver=driver_version(),
        driver_cuda=_driver_cuda(),
        toolkit=toolkit,
        torch_cuda=torch.version.cuda,
        versions={name: _version(name) for name in PACKAGES},
        flashinfer_fault=_flashinfer_fault(),
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
        conversion=probe_conversion(target, toolkit),
    )


def gpu_here() -> Gpu | None:
    """The first card that torch sees."""
    import torch

    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    shared = bool(getattr(found, "is_integrated", False))
    return Gpu(found.name, (found.major, found.minor), found.multi_processor_count, found.total_memory, shared)


def find_toolkit() -> Toolkit | None:
    """The toolkit of CUDA_HOME, of the PATH, or at its usual place."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [str(Path(home) / "bin" / "nvcc") if home else None, shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    for nvcc in places:
        if nvcc and Path(nvcc).exists():
            text = _output([nvcc, "--version"])
            if match := re.search(r"release (\d+)\.(\d+)", text):
                return Toolkit(nvcc, (int(match[1]), int(match[2])))
    return None


def probe_conversion(target: str, toolkit: Toolkit | None) -> Conversion:
    """Assemble and compile a tiny kernel that converts to E2M1.

    Args:
        target: the chip, such as sm_120a.
        toolkit: to compile CUDA with.
    """
    assembler, why = _assembled(target)
    nvcc = None
    if toolkit:
        ptx, told = _ptx_of(toolkit, target)
        nvcc = None if ptx is None else bool(re.search(r"\bcvt\.\w+\.satfinite\.e2m1x2", ptx))
        why = why or told
    return Conversion(target, assembler, nvcc, why)


def _assembled(target: str) -> tuple[bool | None, str]:
    """Whether Triton's assembler takes the instruction, and what it says if not."""
    if not find_spec("triton"):
        return None, "triton is not installed"
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.ptx"
        source.write_text(_PTX.format(target=target), encoding="ascii")
        number = int(re.sub(r"\D", "", target))
        command = [get_ptxas(number).path, f"--gpu-name={target}", str(source), "-o", str(Path(folder) / "out")]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SECONDS)
    return done.returncode == 0, done.stderr.strip().splitlines()[0] if done.stderr.strip() else ""


def _ptx_of(toolkit: Toolkit, target: str) -> tuple[str | None, str]:
    """The assembly of the CUDA headers' conversion, or why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "probe.cu", Path(folder) / "probe.ptx"
        source.write_text(_CUDA, encoding="ascii")
        arch = target.replace("sm_", "compute_")
        command = [toolkit.nvcc, "-ptx", f"-arch={arch}", str(source), "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SECONDS)
        if done.returncode:
            return None, (done.stderr.strip().splitlines() or ["nvcc failed"])[0]
        return out.read_text(encoding="utf-8"), ""


def _flashinfer_fault() -> str | None:
    """Why FlashInfer's expert kernels cannot be imported, though the package is there; None otherwise.

    In a process of its own: its import takes seconds, and it swallows the errors of its own parts.
    """
    if not find_spec("flashinfer"):
        return None
    command = [sys.executable, "-c", "import flashinfer.fused_moe.cute_dsl.b12x_moe"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return f"its import did not end within {_SECONDS} s"
    return (done.stderr.strip().splitlines() or ["it ended without a word"])[-1] if done.returncode else None


def _driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA that the driver takes; None where there is no driver."""
    number = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    except OSError:
        return None
    return None if failed else (number.value // 1000, number.value % 1000 // 10)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SECONDS).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
