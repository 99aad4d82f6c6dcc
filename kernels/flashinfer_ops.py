"""The one file that imports FlashInfer: its entry points, and what of it is installed."""

import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from nanoserve.kernels.place import Package
from nanoserve.kernels.prepared import B12x, Cutlass, MmFp4, Runner, W4a16
from nanoserve.kernels.requirements import FUSED_MOE

_SM12X = "flashinfer.fused_moe.cute_dsl.blackwell_sm12x"
PARTS = {
    # Where each backend's entry points stand. `flashinfer` itself swallows what stops an import.
    "cutlass": ("flashinfer.fused_moe.core",),
    "w4a16": (f"{_SM12X}.moe_nvfp4_w4a16",),
    "b12x": ("flashinfer.fused_moe.cute_dsl.b12x_moe", f"{_SM12X}.moe_dispatch", "flashinfer.cute_dsl.utils"),
    "native": ("flashinfer.gemm.gemm_bf16_fp4", "flashinfer.gemm.kernels.native_bf16_fp4.runner"),
    "mm_fp8": ("flashinfer.gemm.gemm_base",),
    "ssu": ("flashinfer.mamba.selective_state_update",),
    "xqa": ("flashinfer.xqa",),
    "mm_fp4": (
        "flashinfer.gemm.gemm_base",
        "flashinfer.quantization.fp4_quantization",
        "flashinfer.gemm.kernels.dense_blockscaled_gemm_sm120_b12x",
    ),
}


def _load(name: str) -> Any:
    """A module, without the warnings of its own imports."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return import_module(name)


def cutlass() -> Cutlass:
    """Load the entry points of the CUTLASS experts."""
    core, enums = _load(PARTS["cutlass"][0]), _load("flashinfer.tllm_enums")
    return Cutlass(core.cutlass_fused_moe, core.cutlass_fused_moe_workspace_size, enums.ActivationType.Relu2)


def w4a16() -> W4a16:
    """Load the entry points of the W4A16 experts."""
    module = _load(PARTS["w4a16"][0])
    return W4a16(module.run_moe_w4a16, module.allocate_workspace)


def b12x() -> B12x:
    """Load the entry points of the b12x experts."""
    experts, dispatch, utils = (_load(name) for name in PARTS["b12x"])
    return B12x(
        experts.B12xMoEWrapper,
        utils.convert_sf_to_mma_layout,
        dispatch.allocate_sm120_moe_workspace,
        dispatch.select_sm120_moe_backend,
    )


def native() -> Runner:
    """Load `mm_bf16_fp4`."""
    return _load(PARTS["native"][0]).mm_bf16_fp4


def mm_fp8() -> Runner:
    """Load `mm_fp8`."""
    return _load(PARTS["mm_fp8"][0]).mm_fp8


def mm_fp4() -> MmFp4:
    """Load the entry points of the product of two NVFP4 operands."""
    gemm, quantization = (_load(name) for name in PARTS["mm_fp4"][:2])
    layout = _load("flashinfer.tllm_enums").SfLayout.layout_128x4
    return MmFp4(quantization.nvfp4_quantize, gemm.mm_fp4, layout)


@cache
def ssu() -> Callable[..., Tensor]:
    """Load `selective_state_update`."""
    return _load(PARTS["ssu"][0]).selective_state_update


@cache
def xqa() -> Callable[..., None]:
    """Load `xqa`."""
    return _load(PARTS["xqa"][0]).xqa


def packages() -> dict[str, Package]:
    """Part → what is installed of it, by importing it: seconds, and only where a chip can use it."""
    return {f"flashinfer.{part}": _package(names) for part, names in PARTS.items()}


def _package(names: tuple[str, ...]) -> Package:
    if not find_spec("flashinfer"):
        return Package()
    version = package_version("flashinfer-python")
    for name in names:
        try:
            _load(name)
        except Exception as error:  # noqa: BLE001  what a broken installation raises is not to be foreseen
            return Package(version, f"{type(error).__name__}: {error}")
    return Package(version)


def package_version(name: str) -> tuple[int, ...]:
    """Numbers of an installed distribution's release; (0,) where it is not told."""
    try:
        text = installed_version(name)
    except PackageNotFoundError:
        return (0,)
    numbers = [part for part in text.split("+")[0].split(".") if part.isdigit()]
    return tuple(int(part) for part in numbers) or (0,)


def toolkit() -> tuple[tuple[int, ...], bool]:
    """(the CUDA version that FlashInfer reckons with, whether nvcc is there); () where there is none."""
    if not find_spec("flashinfer"):
        return (), False
    extension = _load("flashinfer.jit.cpp_ext")
    try:
        version = extension.get_cuda_version().release[:2]
    except RuntimeError:
        return (), False
    try:
        return version, Path(extension.get_cuda_path(), "bin", "nvcc").exists()
    except RuntimeError:
        return version, False


def built() -> frozenset[str]:
    """FlashInfer's CUDA modules that lie ready: packed with it, or built here before."""
    if not find_spec("flashinfer"):
        return frozenset()
    env = _load("flashinfer.jit.env")
    here = Path(env.FLASHINFER_JIT_DIR, FUSED_MOE, f"{FUSED_MOE}.so").exists()
    return frozenset([FUSED_MOE] if here or env.get_aot_artifacts(FUSED_MOE) else [])
