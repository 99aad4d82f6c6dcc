"""Compiles Triton kernels for chips that are not here: launches are recorded over tensors without memory.

with recorded() as launches:
    op(*tensors_on_the_meta_device)
for launch in launches:
    launch.compiled("sm_120")
"""

import re
import subprocess
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

ARCHITECTURES = ("sm_90", "sm_120", "sm_121")
SHARED_LIMIT = {"sm_90": 232_448, "sm_120": 101_376, "sm_121": 101_376}
"""Bytes of shared memory that a block may have."""

_POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of one kernel."""

    name: str
    shared: int
    registers: int
    spilled: int
    ptx: str


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, as its wrapper made it."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    options: Mapping[str, int]

    def signature(self) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], list[list[object]]]]:
        """What the launcher would know of the arguments: their types, the constants, and which divide by 16."""
        names = self.kernel.arg_names
        constants = {p.name for p in self.kernel.params if p.is_constexpr}
        signature: dict[str, str] = {}
        values: dict[str, Any] = {}
        hints: dict[tuple[int, ...], list[list[object]]] = {}
        for index, name in enumerate(names):
            value = self.arguments[name]
            if name in constants or (isinstance(value, int) and value == 1):
                signature[name], values[name] = "constexpr", value
                continue
            if isinstance(value, torch.Tensor):
                signature[name], aligned = _POINTERS[value.dtype], True
            elif isinstance(value, float):
                signature[name], aligned = "fp32", False
            else:
                signature[name], aligned = "i32" if abs(value) < 1 << 31 else "i64", value % 16 == 0
            if aligned:
                hints[index,] = [["tt.divisibility", 16]]
        return signature, values, hints

    def compiled(self, architecture: str) -> Compiled:
        """Compile it."""
        source = ASTSource(self.kernel, *self.signature())  # pyright: ignore[reportArgumentType]
        target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
        built: Any = triton.compile(source, target=target, options=dict(self.options))
        return _resources(self.kernel.__name__, built.metadata.shared, built.asm, architecture)


def _resources(name: str, shared: int, asm: Mapping[str, Any], architecture: str) -> Compiled:
    ptxas = get_ptxas(int(architecture.removeprefix("sm_"))).path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(asm["ptx"])
        command = [ptxas, "-v", f"--gpu-name={architecture}a", str(path), "-o", str(Path(folder) / "out")]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = max(map(int, re.findall(r"Used (\d+) registers", report)))
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", report)))
    return Compiled(name, shared, registers, spilled, asm["ptx"])


@contextmanager
def recorded() -> Generator[list[Launch]]:
    """Record launches instead of making them."""
    launches: list[Launch] = []

    def run(self: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
        names = self.arg_names
        arguments = dict(zip(names, args, strict=False))
        arguments |= {name: kwargs.pop(name) for name in list(kwargs) if name in names}
        launches.append(Launch(self, grid, arguments, kwargs))

    with patch("triton.runtime.jit.JITFunction.run", run):
        yield launches
