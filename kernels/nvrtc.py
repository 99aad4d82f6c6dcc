"""Kernels in CUDA C++: compiled for a chip and a shape by NVRTC, which torch for CUDA brings, and kept on disk.

Their sources stand under cuda/. What a kernel is for (rows, columns, formats) is compiled into it, so that
nothing is computed when it runs that could be known before.
"""

# cuda.bindings has no types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingTypeStubs=false, reportAttributeAccessIssue=false, reportMissingImports=false

import ctypes
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import get_ident
from typing import Any

import torch

from nanoserve.cached import cache_folder
from nanoserve.errors import BackendError

FOLDER = Path(__file__).parent / "cuda"


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel, loaded on a device.

    Attributes:
        function: of the driver.
        threads: of a block.
        shared: bytes of shared memory that a block takes.
    """

    function: Any
    threads: int
    shared: int

    def launch(self, blocks: int, arguments: ctypes.Structure, device: torch.device) -> None:
        """Launch it on the device's current stream; it may begin before the launch in front of it has ended."""
        from cuda.bindings import driver

        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = self.threads, 1, 1
        config.sharedMemBytes, config.hStream = self.shared, torch.cuda.current_stream(device).cuda_stream
        early = driver.CUlaunchAttribute()
        early.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        early.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [early], 1
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        checked(driver.cuLaunchKernelEx(config, self.function, ctypes.addressof(pointers), 0))


def checked(result: Any) -> Any:
    """What a call of cuda.bindings gives beside its error code.

    Raises:
        BackendError: there is an error.
    """
    error, *values = result
    if int(error) != 0:
        raise BackendError(f"a CUDA C++ kernel: {error!r}: choose triton for the op")
    return values[0] if len(values) == 1 else values


def missing() -> str | None:
    """What is not installed for a kernel to be compiled, and how it is; None where all is."""
    try:
        from cuda.bindings import nvrtc
    except ImportError:
        return "cuda-bindings is not installed: pip install cuda-bindings"
    try:
        checked(nvrtc.nvrtcVersion())
    except RuntimeError:  # as cuda.pathfinder says that it finds no library
        return "the NVRTC library is not installed: pip install nvidia-cuda-nvrtc"
    return None


def source(name: str) -> str:
    """A kernel's source as one text: every file that it includes, once, where it is first included."""
    seen: set[str] = set()

    def text(file: str) -> str:
        lines: list[str] = []
        for line in (FOLDER / file).read_text(encoding="utf-8").splitlines():
            if line.startswith("#include"):
                other = line.split('"')[1]
                if other not in seen:
                    seen.add(other)
                    lines.append(text(other))
            elif not line.startswith("#pragma once"):
                lines.append(line)
        return "\n".join(lines) + "\n"

    return text(name)


def compiled(name: str, chip: tuple[int, int], defines: Mapping[str, str]) -> bytes:
    """Machine code for a chip, from the cache if it is there.

    Raises:
        BackendError: it does not compile; with the compiler's first lines.
    """
    from cuda.bindings import nvrtc

    text, arch = source(name), "sm_{}{}".format(*chip)
    options = [
        "--std=c++17",
        f"--gpu-architecture={arch}",
        *(f"-D{key}={value}" for key, value in defines.items()),
    ]
    key = hashlib.sha256(repr((text, options, checked(nvrtc.nvrtcVersion()))).encode()).hexdigest()[:32]
    path = cache_folder() / f"{Path(name).stem}_{arch}_{key}.cubin"
    if path.exists():
        return path.read_bytes()
    program = checked(nvrtc.nvrtcCreateProgram(text.encode(), name.encode(), 0, [], []))
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if int(error) != 0:
        log = b" " * checked(nvrtc.nvrtcGetProgramLogSize(program))
        checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise BackendError(f"{name} does not compile for {arch}: {log.decode()[:2000]}")
    code = b" " * checked(nvrtc.nvrtcGetCUBINSize(program))
    checked(nvrtc.nvrtcGetCUBIN(program, code))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.{get_ident()}")
    part.write_bytes(code)
    part.replace(path)
    return code


def even(function: int) -> None:
    """Let a loaded kernel want all of a multiprocessor's memory as shared memory.

    A multiprocessor must be idle before it divides its memory in another way. Launches that want it divided
    differently therefore do not overlap.
    """
    from cuda.bindings import driver

    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
    checked(driver.cuFuncSetAttribute(driver.CUfunction(function), attribute, 100))


def load(
    name: str,
    defines: Mapping[str, str],
    threads: int,
    shared: int,
    device: torch.device,
) -> Kernel:
    """A kernel on a device, of its file's name; each is loaded once in a process.

    Raises:
        BackendError: it does not compile or load.
    """
    return _load(name, tuple(defines.items()), threads, shared, device)


@cache
def _load(
    name: str,
    defines: tuple[tuple[str, str], ...],
    threads: int,
    shared: int,
    device: torch.device,
) -> Kernel:
    from cuda.bindings import driver

    torch.cuda.current_stream(device).synchronize()  # the device's context is the current one from here on
    code = compiled(name, torch.cuda.get_device_capability(device), dict(defines))
    module = checked(driver.cuModuleLoadData(code))
    handle = checked(driver.cuModuleGetFunction(module, Path(name).stem.encode()))
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    checked(driver.cuFuncSetAttribute(handle, attribute, shared))
    even(int(handle))
    return Kernel(handle, threads, shared)
