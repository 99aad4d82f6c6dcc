"""Compiles FlashInfer's CuTe-DSL expert kernels for SM12x chips that are not here, at the arguments of our layers.

Their own host code chooses and configures the kernels; it runs here over tensors on the CPU that nobody reads, is
told that it sees the chip, and is stopped where it would launch. One process is for one chip: `for_chip` must come
before anything imports FlashInfer. Source: ../shared/facts/flashinfer.md, section 8.
"""

import hashlib
import os
import re
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from nanoserve.errors import BackendError
from nanoserve.kernels import flashinfer_experts, flashinfer_ops
from nanoserve.kernels.chips import MULTIPROCESSORS, capability, shared_limit
from nanoserve.kernels.cubin import Resources, resources
from nanoserve.kernels.flashinfer_experts import prepare, run, share
from nanoserve.kernels.linear import Nvfp4
from nanoserve.kernels.moe import PREFILL_FROM
from nanoserve.kernels.place import Experts
from nanoserve.kernels.weight_launches import Shape

KINDS = ("b12x", "b12x dynamic", "w4a16")
"""Decode backends of FlashInfer's: B12xMoEWrapper (W4A4), which chooses among its kernels by the number of tokens;
the one that it takes for many (which ours do not reach), forced; and run_moe_w4a16."""

_PACKAGE = "flashinfer.fused_moe.cute_dsl"
_CONFIG = "array<3 x i32>, array<3 x i32>, i64, ptr, ptr, i32"
"""A launch's configuration in LLVM's types: grid, block, bytes of dynamic shared memory, stream, attributes."""


@dataclass(frozen=True, slots=True)
class Program:
    """What one call of a backend would launch.

    Attributes:
        name: FlashInfer's for the program.
        kernels: registers, stack and all shared memory of each.
        e2m1: whether its assembly converts to or from E2M1 by the chip's own instructions.
        triton: launches of Triton kernels in front of it, as `nanoserve.kernels.aot` records them.
    """

    name: str
    kernels: tuple[Resources, ...]
    e2m1: bool
    triton: tuple[Any, ...]


class _Compiled(Exception):
    """Ends the host code once its kernel is compiled."""

    def __init__(self, name: str, program: Any) -> None:
        self.name, self.program = name, program
        super().__init__(name)


def refusal(architecture: str) -> str | None:
    """Why these kernels are not compiled for a chip, or None."""
    if capability(architecture)[0] != 12:
        return "FlashInfer's b12x and W4A16 expert kernels are for SM120 and SM121 alone"
    if not architecture.endswith("a"):
        return f"a plain {architecture} has no E2M1 conversion and no FP4 tensor cores: ask for {architecture}a"
    return None


def for_chip(architecture: str, dumps: Path) -> None:
    """Tell the DSL which chip to compile for, in this process.

    Args:
        architecture: the chip, sm_120a or sm_121a.
        dumps: folder for the files that the DSL writes when it is to keep a cubin.

    Raises:
        BackendError: the kernels are not for this chip.
    """
    if reason := refusal(architecture):
        raise BackendError(f"{architecture}: {reason}")
    os.environ["CUTE_DSL_ARCH"] = architecture
    os.environ["CUTE_DSL_KEEP"] = "ptx,cubin"
    os.environ["CUTE_DSL_DUMP_DIR"] = str(dumps)
    os.environ["FLASHINFER_CUTE_DSL_DISABLE_CACHE"] = "1"  # what it loads from there has no cubin to look at


def key(kind: str, s: Shape, tokens: int, architecture: str) -> str:
    """A digest of all that `compiled` depends on: the call, this file, and the packages' versions."""
    packages = ("flashinfer-python", "nvidia-cutlass-dsl", "nvidia-cutlass-dsl-libs-cu13", "triton", "torch")
    versions = [(name, _version(name)) for name in packages]
    experts = (s.experts, s.top_k, s.latent or s.hidden, s.size)
    files = (Path(__file__), Path(flashinfer_experts.__file__))
    own = [file.read_text(encoding="utf-8") for file in files]
    return hashlib.sha256(repr((kind, experts, tokens, architecture, versions, own)).encode()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def compiled(kind: str, s: Shape, tokens: int, architecture: str) -> Program:
    """Compile what a decode step of so many tokens would launch.

    Args:
        kind: one of `KINDS`.
        s: a released shape.
        tokens: of the step.
        architecture: as given to `for_chip`.
    """
    from nanoserve.kernels.aot import recorded

    name, _, forced = kind.partition(" ")
    with recorded() as launches, _stopped(architecture, forced or None):
        try:
            _layer(name, s, tokens)
        except _Compiled as done:
            return _program(done, tuple(launches))
    raise BackendError(f"{kind}: FlashInfer compiled nothing for {tokens} tokens; its host code has changed")


def _program(done: _Compiled, launches: tuple[Any, ...]) -> Program:
    dynamic = _dynamic_shared(str(done.program.ir_module))
    kernels = tuple(
        Resources(own.name, own.registers, own.stack, own.shared + dynamic.get(own.name, 0))
        for own in resources(bytes(done.program.__cubin__))
    )
    ptx = done.program.__ptx__
    text = ptx if isinstance(ptx, str) else bytes(ptx).decode(errors="replace")
    return Program(done.name, kernels, bool(re.search(r"\bcvt\.[\w.]*e2m1x2", text)), launches)


def _dynamic_shared(ir: str) -> dict[str, int]:
    """Kernel → bytes of dynamic shared memory that its launch asks for, by the host's code in LLVM's dialect.

    A launch's configuration is filled before the kernel's address is taken.
    """
    constants, found, place, asked = dict[str, int](), dict[str, int](), "", 0
    for line in ir.splitlines():
        if match := re.search(r"(%\w+) = llvm.mlir.constant\((\d+) : i64\)", line):
            constants[match[1]] = int(match[2])
        elif line.lstrip().startswith("llvm.func @"):
            constants.clear()
        elif _CONFIG in line and (match := re.search(r"(%\w+) = llvm.getelementptr %\w+\[0, 2\]", line)):
            place = match[1]
        elif place and (match := re.search(rf"llvm.store (%\w+), {place} : i64", line)):
            asked, place = constants.get(match[1], 0), ""
        elif match := re.search(r"llvm.mlir.addressof @kernels_(\w+)", line):
            found[match[1]] = max(asked, found.get(match[1], 0))
    return found


def _layer(name: str, s: Shape, tokens: int) -> None:
    """A layer's experts as `nanoserve.kernels.flashinfer_experts` runs them, over memory that is never touched."""
    library = {"b12x": flashinfer_ops.b12x, "w4a16": flashinfer_ops.w4a16}[name]()
    width, cpu = s.latent or s.hidden, torch.device("cpu")
    experts = Experts("nvfp4", True, "relu2", s.experts, s.top_k, width, s.size, layers=1)
    shared = share({name: library}, experts, PREFILL_FROM, torch.bfloat16, cpu)
    up, down = prepare(_stack(s.experts, s.size, width), _stack(s.experts, width, s.size), shared)
    x = torch.empty(tokens, width, dtype=torch.bfloat16)
    ids, weights = torch.zeros(tokens, s.top_k, dtype=torch.int32), torch.empty(tokens, s.top_k)
    run(name, x, ids, weights, up, down)


def _stack(experts: int, rows: int, columns: int) -> Nvfp4:
    data = torch.empty(experts, rows, columns // 2, dtype=torch.uint8)
    scales = torch.empty(experts, rows, columns // 16, dtype=torch.float8_e4m3fn)
    return Nvfp4(data, scales, torch.ones(experts), input_scale=torch.ones(experts))


@contextmanager
def _stopped(architecture: str, forced: str | None) -> Generator[None]:
    """The host code sees the chip, and ends with `_Compiled` where it has compiled a kernel.

    Args:
        architecture: what it is to see.
        forced: name of b12x's kernel, or None for its own choice.
    """
    cute, driver = import_module("cutlass.cute"), import_module("cutlass.base_dsl.runtime.cuda")
    with ExitStack() as stack:
        for target, replacements in (
            (torch.cuda, _chip(architecture)),
            (driver, {"get_device_attribute": _always(shared_limit(architecture) + 1024)}),
        ):
            for name, value in replacements.items():
                stack.enter_context(patch.object(target, name, value))
        # Imported under the patches, for some of it asks about the device at once.
        dispatch = import_module(f"{_PACKAGE}.blackwell_sm12x.moe_dispatch")
        w4a16 = import_module(f"{_PACKAGE}.blackwell_sm12x.moe_nvfp4_w4a16")
        multiprocessors = MULTIPROCESSORS[capability(architecture)]

        def build(module: str, name: str, make: Callable[[], Any], **_: Any) -> Any:
            raise _Compiled(re.sub(r"_[0-9a-f]{16}$", "", name), make())

        own = cute.compile

        def compile_once(program: Any, *arguments: Any, **options: Any) -> Any:
            result = own(program, *arguments, **options)
            if getattr(program, "__module__", "").endswith("moe_nvfp4_w4a16"):  # not built by `build`
                raise _Compiled(
                    {"moe_jitA": "w4a16 persistent", "moe_jit": "w4a16 tiled"}[program.__name__], result
                )
            return result

        stack.enter_context(patch.object(dispatch, "_FORCED_BACKEND", forced))
        stack.enter_context(patch.object(dispatch, "get_max_active_clusters", _always(multiprocessors)))
        stack.enter_context(patch.object(dispatch, "build_and_load_cute_dsl_kernel", build))
        stack.enter_context(patch.object(w4a16, "from_dlpack", _without_memory))
        stack.enter_context(patch.object(cute, "compile", compile_once))
        yield


def _always(value: Any) -> Callable[..., Any]:
    def answer(*arguments: Any) -> Any:
        return value

    return answer


def _chip(architecture: str) -> Mapping[str, Any]:
    """Answers of torch.cuda about the chip."""
    major, minor = capability(architecture)
    properties = SimpleNamespace(
        name=architecture,
        major=major,
        minor=minor,
        multi_processor_count=MULTIPROCESSORS[major, minor],
        shared_memory_per_block_optin=shared_limit(architecture),
    )
    return {
        "get_device_properties": _always(properties),
        "get_device_capability": _always((major, minor)),
        "current_device": _always(0),
        "is_available": _always(True),
        "is_current_stream_capturing": _always(False),
    }


def _without_memory(tensor: Tensor, assumed_align: int = 16, **_: Any) -> Any:
    """The DSL's stand-in for a tensor on the chip."""
    cutlass, cute = import_module("cutlass"), import_module("cutlass.cute")
    types = {
        torch.bfloat16: cutlass.BFloat16,
        torch.float32: cutlass.Float32,
        torch.int32: cutlass.Int32,
        torch.uint8: cutlass.Uint8,
    }
    order = tuple(reversed(range(tensor.dim())))
    return cute.runtime.make_fake_compact_tensor(
        types[tensor.dtype], tuple(tensor.shape), stride_order=order, assumed_align=assumed_align
    )
