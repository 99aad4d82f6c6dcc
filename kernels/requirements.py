"""What each backend asks of a place, and what keeps an able one from being chosen automatically."""

from collections.abc import Callable, Mapping

import torch

from nanoserve.kernels.place import SM12X, Code, Experts, Package, Place, Reason

Requirement = Callable[[Place], Reason | None]
"""Why a backend cannot run at a place, or None where it can."""

FLASHINFER = (0, 7, 4)
"""From here on its b12x kernels read weights of any width as they are; before, they kept padded copies of them."""
TOOLKIT = (13, 0)
"""What FlashInfer's CuTe-DSL experts ask for (`SM12xNvfp4Bf16Runner`, `B12xMoEWrapper`)."""
NVCC = (12, 9)
"""The first that knows sm_120f; a plain sm_120 has no FP4 instructions and would convert in software."""
FUSED_MOE = "fused_moe_120"
"""FlashInfer's CUDA module behind `cutlass_fused_moe`."""


def triton(place: Place) -> Reason | None:
    """Our Triton kernels."""
    if place.device != "cuda" or place.chip is None:
        return Reason(Code.DEVICE, "needs an NVIDIA GPU")
    if lacks := _lacks(place.package("triton"), "triton", "which torch for CUDA brings"):
        return lacks
    major, minor = place.chip
    if place.chip != (9, 0) and major != 12:
        return Reason(Code.CHIP, f"needs compute capability 9.0 or 12.x, and this GPU has {major}.{minor}")
    return _bfloat16(place)


def cuda(place: Place) -> Reason | None:
    """Our kernels in CUDA C++, which leave what they do not take to the Triton ones."""
    return triton(place) or _lacks(place.package("cuda-bindings"), "cuda-bindings", "which torch for CUDA brings")


def cutlass(place: Place) -> Reason | None:
    """FlashInfer's `cutlass_fused_moe`: activations quantised to NVFP4, CUTLASS grouped products."""
    if (reason := _sm12x_experts(place, "cutlass")) or (reason := _input_scales(place)):
        return reason
    if FUSED_MOE not in place.built and (lacks := _nvcc(place)):
        return lacks
    return _multiple(place, width=64, size=64) or _scale_rows(place)


def w4a16(place: Place) -> Reason | None:
    """FlashInfer's `run_moe_w4a16`."""
    if (reason := _sm12x_experts(place, "w4a16")) or (reason := _toolkit(place)):
        return reason
    return _multiple(place, width=32, size=32)


def native(place: Place) -> Reason | None:
    """FlashInfer's `mm_bf16_fp4` with its native backend."""
    return _sm12x(place) or _flashinfer(place.package("flashinfer.native")) or _toolkit(place)


def mm_fp8(place: Place) -> Reason | None:
    """FlashInfer's `mm_fp8` with cuBLASLt, which it calls from a CUDA module."""
    return _sm12x(place) or _flashinfer(place.package("flashinfer.mm_fp8")) or _nvcc(place)


def mm_fp4(place: Place) -> Reason | None:
    """FlashInfer's `mm_fp4` with its b12x backend, and `nvfp4_quantize`, which is a CUDA module."""
    reason = _sm12x(place) or _flashinfer(place.package("flashinfer.mm_fp4"))
    return reason or _toolkit(place) or _nvcc(place)


def ssu(place: Place) -> Reason | None:
    """FlashInfer's `selective_state_update`, a CUDA module, between our Triton kernels."""
    reason = _sm12x(place) or _lacks(place.package("triton"), "triton", "which torch for CUDA brings")
    return reason or _flashinfer(place.package("flashinfer.ssu")) or _nvcc(place)


def xqa(place: Place) -> Reason | None:
    """FlashInfer's `xqa`, a CUDA module."""
    return _sm12x(place) or _flashinfer(place.package("flashinfer.xqa")) or _nvcc(place)


def b12x(place: Place) -> Reason | None:
    """FlashInfer's `B12xMoEWrapper` with activations quantised to NVFP4."""
    if (reason := _sm12x_experts(place, "b12x")) or (reason := _input_scales(place)):
        return reason
    # With another size it keeps a padded copy of the block scales; with another width it refuses.
    return _toolkit(place) or _multiple(place, width=128, size=128)


REQUIREMENTS: Mapping[str, Requirement] = {
    "torch": lambda place: None,
    "cuda": cuda,
    "triton": triton,
    "cutlass": cutlass,
    "w4a16": w4a16,
    "b12x": b12x,
    "native": native,
    "mm_fp8": mm_fp8,
    "mm_fp4": mm_fp4,
    "ssu": ssu,
    "xqa": xqa,
}


def _unbuilt(place: Place) -> Reason | None:
    if FUSED_MOE in place.built:
        return None
    return Reason(
        Code.NOT_BUILT, f"{FUSED_MOE} is not built here, which takes CPU hours: by name, which builds it"
    )


def _float16(place: Place) -> Reason | None:
    text = "reads hidden values as float16, of which those above 65,504 are infinite: by name, or by calibration"
    return Reason(Code.BY_NAME, text)


def _untimed(place: Place) -> Reason | None:
    return Reason(Code.BY_NAME, "has not been timed against triton: by name, or by calibration")


def _unchecked(what: str) -> Requirement:
    reason = Reason(Code.BY_NAME, f"{what}, and no card has checked it yet: by name")
    return lambda place: reason


def _four_bits(place: Place) -> Reason | None:
    many = place.experts is not None and place.experts.count >= 512
    faults = "; faults are reported with 512 experts (flashinfer issue 5446)" if many else ""
    text = f"quantises activations to 4 bits and adds experts in BF16{faults}: by name, or by calibration"
    return Reason(Code.BY_NAME, text)


ELECTIVE: Mapping[str, Requirement] = {
    "cutlass": _unbuilt,
    "w4a16": _float16,
    "b12x": _four_bits,
    "native": _untimed,
    "mm_fp8": _unchecked("quantises activations to FP8"),
    "mm_fp4": _unchecked("quantises activations to 4 bits"),
    "ssu": _unchecked("takes several launches where triton takes one or two"),
    "xqa": _unchecked("rounds the weights of the softmax to BF16"),
}
"""Why an able backend is not chosen automatically, or None where it is; others always are."""


NUMERICS: Mapping[str, str] = {
    "cutlass": "activations quantised to NVFP4",
    "w4a16": "products in float16, sums in float32",
    "b12x": "activations quantised to NVFP4, experts added in BF16",
    "mm_fp8": "activations quantised to FP8 by the checkpoint's input scales",
    "mm_fp4": "activations quantised to NVFP4 by the checkpoint's input scales",
    "ssu": "state and sums in float32",
    "xqa": "weights of the softmax in BF16, sums in float32",
}
"""What a backend computes otherwise than the reference, which quantises nothing and sums in float32."""

TOLERANCES: Mapping[str, float] = {"mm_fp8": 0.04, "mm_fp4": 0.12, "xqa": 0.006}
"""Backend → the most that its result may differ from its op's reference on normally distributed values, where the
op's own tolerance is less: root of the mean square of the difference, as a share of that of the result. Experts'
stand in `flashinfer_experts`. FP8's rounding is 2.6 %, NVFP4's 10 % (tests/test_flashinfer_linear.py)."""


def _sm12x_experts(place: Place, part: str) -> Reason | None:
    """What all of FlashInfer's experts ask for."""
    return _sm12x(place) or _relu2_nvfp4(place.experts) or _flashinfer(place.package(f"flashinfer.{part}"))


def _sm12x(place: Place) -> Reason | None:
    if place.device != "cuda" or place.chip is None:
        return Reason(Code.DEVICE, "needs an NVIDIA GPU")
    if place.chip not in SM12X:
        has = ".".join(map(str, place.chip))
        return Reason(Code.CHIP, f"needs compute capability 12.0 or 12.1, and this GPU has {has}")
    return _bfloat16(place)


def _flashinfer(package: Package) -> Reason | None:
    if reason := _lacks(package, "flashinfer-python", "with nvidia-cutlass-dsl and its cu13 libraries"):
        return reason
    if package.version < FLASHINFER:
        has = _dots(package.version)
        return Reason(Code.VERSION, f"needs flashinfer-python {_dots(FLASHINFER)} or later, and this is {has}")
    return None


def _relu2_nvfp4(experts: Experts | None) -> Reason | None:
    if experts is None:
        return Reason(Code.QUANTISATION, "needs a model with NVFP4 experts")
    if experts.format != "nvfp4":
        return Reason(Code.QUANTISATION, f"needs NVFP4 experts, and these are {experts.format}")
    if experts.activation != "relu2":
        return Reason(Code.ACTIVATION, f"is called here for relu2 alone, and the experts use {experts.activation}")
    return None


def _input_scales(place: Place) -> Reason | None:
    if place.experts and place.experts.input_scales:
        return None
    return Reason(
        Code.QUANTISATION, "quantises activations, for which this checkpoint has no input_scale: it is weight-only"
    )


def _lacks(package: Package, name: str, hint: str) -> Reason | None:
    if not package.version:
        return Reason(Code.MISSING, f"needs the {name} package, {hint}")
    if package.error:
        return Reason(Code.BROKEN, f"{name} {_dots(package.version)} is installed and broken: {package.error}")
    return None


def _bfloat16(place: Place) -> Reason | None:
    if place.dtype == torch.bfloat16:
        return None
    has = str(place.dtype).removeprefix("torch.")
    return Reason(Code.DTYPE, f"needs bfloat16 activations, and these are {has}")


def _toolkit(place: Place) -> Reason | None:
    if place.toolkit >= TOOLKIT:
        return None
    has = f"this is {_dots(place.toolkit)}" if place.toolkit else "there is none"
    return Reason(Code.TOOLKIT, f"needs CUDA {_dots(TOOLKIT)} or later (nvcc, or else torch's), and {has}")


def _nvcc(place: Place) -> Reason | None:
    """What FlashInfer asks for to build a CUDA module for these chips."""
    if not place.compiler:
        return Reason(Code.TOOLKIT, "needs nvcc to build FlashInfer's module, and there is none")
    if place.toolkit < NVCC:
        return Reason(Code.TOOLKIT, f"needs CUDA {_dots(NVCC)} to build, and nvcc is {_dots(place.toolkit)}")
    return None


def _scale_rows(place: Place) -> Reason | None:
    """Rows of scales that are not padded to 128 are shown as one release wants them (`OnCutlass`)."""
    version = place.package("flashinfer.cutlass").version
    if place.experts is None or not place.experts.size % 128 or version == FLASHINFER:
        return None
    text = f"takes experts of size {place.experts.size} as flashinfer-python {_dots(FLASHINFER)} checks them"
    return Reason(Code.VERSION, f"{text}, and this is {_dots(version)} (flashinfer issue 4653)")


def _multiple(place: Place, *, width: int, size: int) -> Reason | None:
    experts = place.experts
    if experts is None or not (experts.width % width or experts.size % size):
        return None
    need = f"a width of a multiple of {width} and a size of one of {size}"
    return Reason(Code.SHAPE, f"needs experts with {need}, and these are {experts.width} × {experts.size}")


def _dots(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
