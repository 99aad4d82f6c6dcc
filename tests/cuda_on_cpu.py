"""Runs a kernel of kernels/cuda over CPU tensors: its own source, compiled by g++ behind cuda_on_cpu.h."""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanoserve.kernels import nvrtc

HEADER = Path(__file__).parent / "cuda_on_cpu.h"
HAS_COMPILER = shutil.which("g++") is not None or os.environ.get("CI") == "true"
"""In CI nothing is skipped: without g++ the tests fail."""
OPTIONS = (
    "-std=c++17", "-O0", "-shared", "-fPIC", "-w", "-fno-strict-aliasing", "-ffp-contract=off",
    "-U_FORTIFY_SOURCE", "-ftrivial-auto-var-init=pattern", "-fsanitize=alignment,bounds",
    "-fno-sanitize-recover=all",
)  # fmt: skip
ENTRY = """
static void call_kernel() {{ machine_call({name}); }}
extern "C" const char* run_on_cpu(const void* arguments, size_t size, int blocks, int threads, int bytes,
                                  int cluster, unsigned seed, int apart, const machine::Range* known,
                                  int known_count, const machine::Range* late, int late_count) {{
  if (size != machine_size({name})) return "the arguments have another size than the host's";
  machine::kernel_call = call_kernel, machine::kernel_arguments = arguments;
  return machine::launch(blocks, threads, bytes, cluster, seed, apart, known, known_count, late, late_count);
}}
"""


class Fault(Exception):
    """What a GPU would have left undefined, or for ever."""


class _Range(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("bytes", ctypes.c_size_t)]


@cache
def for_cpu(text: str) -> str:
    """A kernel's source for g++: without functions of inline assembly, and with shared memory a block's own."""
    text = "".join(part for part in _definitions(text) if not re.search(r"\basm\b", part))
    text = re.sub(
        r"extern\s+__shared__\s+(?:__align__\(\w+\)\s+)?(\w+)\s+(\w+)\[\];",
        r"\1* const \2 = (\1*)machine::dynamic_array();",
        text,
    )
    return re.sub(r"__shared__\s+(?:__align__\((\w+)\)\s+)?(\w+)\s+([^;]+);", _arrays, text)


def _arrays(found: re.Match[str]) -> str:
    align, kind, names = found.groups()
    made: list[str] = []
    for declared in names.split(","):
        name, sizes = re.fullmatch(r"\s*(\w+)\s*((?:\[[^\]]+\])*)\s*", declared, re.DOTALL).groups()  # pyright: ignore[reportOptionalMemberAccess]
        of = f"{name}_shared"
        made.append(
            f"typedef {kind} {of}{sizes}; {of}& {name} = "
            f'*({of}*)machine::array("{name}", sizeof({of}), {align or f"alignof({kind})"});'
        )
    return " ".join(made)


def _definitions(text: str) -> Iterator[str]:
    """The text in pieces; a function that begins at a line's start with DEVICE or template is one."""
    at = 0
    for begin in re.finditer(r"^(?:template\b[^\n{;]*\n?)?DEVICE\b[^{;]*\{", text, re.MULTILINE):
        if begin.start() < at:
            continue
        yield text[at : begin.start()]
        depth, end = 1, begin.end()
        for token in re.finditer(r'"(?:\\.|[^"\\])*"|//[^\n]*|[{}]', text[end:]):
            depth += {"{": 1, "}": -1}.get(token[0], 0)
            if depth == 0:
                end += token.end()
                break
        yield text[begin.start() : end]
        at = end
    yield text[at:]


@cache
def _folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"nanoserve_cuda_on_cpu_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@cache
def _library(name: str, defines: tuple[tuple[str, str], ...], text: str) -> Any:
    whole = f'#include "{HEADER}"\n#line 1\n{text}{ENTRY.format(name=Path(name).stem)}'
    options = [*OPTIONS, *(f"-D{key}={value}" for key, value in defines)]
    key = hashlib.sha256(repr((whole, HEADER.read_text(encoding="utf-8"), options)).encode()).hexdigest()[:32]
    path = _folder() / f"{key}.so"
    if not path.exists():
        part, code = path.with_suffix(f".{os.getpid()}"), path.with_suffix(f".{os.getpid()}.cpp")
        code.write_text(whole, encoding="utf-8")
        done = subprocess.run(
            ["g++", *options, str(code), "-o", str(part)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[:4000]
        code.unlink()
        part.replace(path)
    library = ctypes.CDLL(str(path))
    library.run_on_cpu.restype = ctypes.c_char_p
    return library


def _ranges(tensors: Sequence[Tensor]) -> "ctypes.Array[_Range]":
    assert all(tensor.is_contiguous() and not tensor.is_cuda for tensor in tensors)
    return (_Range * max(len(tensors), 1))(*(_Range(t.data_ptr(), t.numel() * t.element_size()) for t in tensors))


def run(
    name: str,
    defines: Mapping[str, str],
    arguments: ctypes.Structure,
    blocks: int,
    threads: int,
    shared: int,
    tensors: Sequence[Tensor],
    late: Sequence[Tensor] = (),
    cluster: int = 1,
    seed: int = 0,
    apart: bool = False,
    text: str | None = None,
) -> None:
    """Launch a kernel.

    Args:
        name: of its file in kernels/cuda; the kernel's is the same.
        defines: what NVRTC would be given.
        arguments: as the kernel has them.
        blocks, threads, shared, cluster: of the launch.
        tensors: all memory that ``arguments`` point to; copies and loads past L1 must be of it.
        late: those of them that the launch in front writes: NaN until the kernel has waited for that.
        seed: who runs first, and when copies come; see cuda_on_cpu.h.
        apart: a warp's lanes do not wait for one another where nothing says so.
        text: another source than the file's.

    Raises:
        Fault: the kernel does what a GPU leaves undefined, or never ends.
    """
    library = _library(name, tuple(defines.items()), for_cpu(text or nvrtc.source(name)))
    message: bytes | None = library.run_on_cpu(
        ctypes.byref(arguments), ctypes.c_size_t(ctypes.sizeof(arguments)), blocks, threads, shared, cluster, seed,
        apart, _ranges(tensors), len(tensors), _ranges(late), len(late),
    )  # fmt: skip
    if message is not None:
        raise Fault(message.decode())


@dataclass(frozen=True, slots=True)
class CpuKernel:
    """What `nanoserve.kernels.nvrtc.Kernel` is on a card."""

    machine: "Machine"
    name: str
    defines: Mapping[str, str]
    threads: int
    shared: int

    def launch(self, blocks: int, arguments: ctypes.Structure, device: torch.device) -> None:
        """Run it, as the machine is set."""
        m = self.machine
        run(
            self.name, self.defines, arguments, m.blocks or blocks, self.threads, self.shared, m.tensors, m.late,
            cluster=int(self.defines.get("CLUSTER", "1")), seed=m.seed, apart=m.apart,
        )  # fmt: skip


@dataclass(slots=True)
class Machine:
    """Stands in for a card under the kernels' host side.

    Attributes:
        multiprocessors: that the host is told of.
        blocks: of a launch; None for what the host asks for.
        seed, apart, tensors, late: of `run`.
    """

    multiprocessors: int = 3
    blocks: int | None = None
    seed: int = 0
    apart: bool = False
    tensors: Sequence[Tensor] = ()
    late: Sequence[Tensor] = ()

    def load(
        self, name: str, defines: Mapping[str, str], threads: int, shared: int, device: torch.device
    ) -> CpuKernel:
        """In place of `nanoserve.kernels.nvrtc.load`."""
        return CpuKernel(self, name, defines, threads, shared)
