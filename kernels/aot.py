"""Compiles Triton kernels for chips that are not here: launches are recorded over tensors without memory.

with recorded() as launches:
    op(*tensors_on_the_meta_device)
for launch in launches:
    launch.compiled("sm_120a")

Triton's interpreter and its compiler do not go together in one process.
"""

import hashlib
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

from nanoserve.kernels.chips import capability

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


@dataclass(frozen=True, slots=True)
class Compiled:
    """What the compiler says of one kernel.

    Attributes:
        name: the kernel's function.
        shared: bytes of shared memory a block.
        registers: a thread.
        spilled: bytes of registers kept on the stack, stores and loads together.
        ptx: the assembly.
    """

    name: str
    shared: int
    registers: int
    spilled: int
    ptx: str


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch of a kernel, as its wrapper made it.

    Attributes:
        kernel: the jitted function.
        grid: of programs.
        arguments: by the kernel's names.
        options: of the launch, num_warps and the like.
    """

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

    def key(self, architecture: str) -> str:
        """A digest of all that the compiler's result depends on: kernel, arguments, options, chip, versions."""
        parts = (self.kernel.cache_key, self.signature(), sorted(self.options.items()), architecture)
        return hashlib.sha256(repr((*parts, triton.__version__)).encode()).hexdigest()

    def compiled(self, architecture: str) -> Compiled:
        """Compile it for a chip, such as sm_120a; a plain sm_120 is the same to Triton, which targets sm_120a."""
        source = ASTSource(self.kernel, *self.signature())  # pyright: ignore[reportArgumentType]
        target = GPUTarget("cuda", _number(architecture), 32)
        built: Any = triton.compile(source, target=target, options=dict(self.options))
        return _resources(self.kernel.__name__, built.metadata.shared, built.asm, architecture)


def _number(architecture: str) -> int:
    major, minor = capability(architecture)
    return 10 * major + minor


def _resources(name: str, shared: int, asm: Mapping[str, Any], architecture: str) -> Compiled:
    number = _number(architecture)
    ptxas = get_ptxas(number).path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(asm["ptx"])
        command = [ptxas, "-v", f"--gpu-name=sm_{number}a", str(path), "-o", str(Path(folder) / "out")]
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
