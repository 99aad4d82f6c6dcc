"""What FlashInfer's kernels take of a stack of NVFP4 experts beside its packed values, which stay the one copy."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Runner = Callable[..., Tensor]
"""As `nanoserve.kernels.moe.experts`, (x, ids, weights, up, down) → [T, L]; of a single matrix, a product."""


@dataclass(frozen=True, slots=True)
class Activations:
    """How the values that a stack, or one matrix, reads are quantised to its format.

    Attributes:
        divisor: ModelOpt's ``input_scale``, the largest of the experts', float32 [1].
        multiplier: its inverse, float32 [].
        alpha: input_scale * global_scale of each expert, float32 [E], or of one matrix [1]: what a product of
            codes is multiplied by.
    """

    divisor: Tensor
    multiplier: Tensor
    alpha: Tensor


@dataclass(frozen=True, slots=True)
class Prepared:
    """A stack of experts, or one matrix, as the kernels want it.

    Attributes:
        scales: the block scales as `nanoserve.kernels.swizzle` orders them, as normalised as the checkpoint has
            them: float8_e4m3fn [E, N to 128, K/16 to 4].
        activations: None where the checkpoint does not say how to quantise them.
        runners: backend → the routed experts of this layer on it, at the first of a layer's two weights; or what
            multiplies by the matrix.
    """

    scales: Tensor
    activations: Activations | None
    runners: Mapping[str, Runner]


@dataclass(frozen=True, slots=True)
class PreparedFp8:
    """One FP8 matrix as a product of two FP8 operands wants it.

    Attributes:
        activations: how the values that it reads are quantised; ``alpha`` float32 [1].
        product: multiplies.
    """

    activations: Activations
    product: Runner


@dataclass(frozen=True, slots=True)
class MmFp4:
    """Entry points of FlashInfer's product of two NVFP4 operands.

    Attributes:
        quantize: `flashinfer.quantization.fp4_quantization.nvfp4_quantize`.
        product: `flashinfer.gemm.mm_fp4`.
        layout: `flashinfer.SfLayout.layout_128x4`.
    """

    quantize: Callable[..., tuple[Tensor, Tensor]]
    product: Runner
    layout: Any


@dataclass(frozen=True, slots=True)
class Cutlass:
    """Entry points of FlashInfer's CUTLASS experts.

    Attributes:
        moe: `flashinfer.fused_moe.cutlass_fused_moe`.
        workspace_size: `flashinfer.fused_moe.cutlass_fused_moe_workspace_size`.
        relu2: `flashinfer.ActivationType.Relu2`.
    """

    moe: Callable[..., Any]
    workspace_size: Callable[..., int]
    relu2: Any


@dataclass(frozen=True, slots=True)
class W4a16:
    """Entry points of FlashInfer's W4A16 experts for SM12x, in ``moe_nvfp4_w4a16``.

    Attributes:
        run: `run_moe_w4a16`.
        workspace: `allocate_workspace`.
    """

    run: Callable[..., Any]
    workspace: Callable[..., Any]


@dataclass(frozen=True, slots=True)
class B12x:
    """Entry points of FlashInfer's b12x experts.

    Attributes:
        wrapper: `B12xMoEWrapper`.
        layout: `flashinfer.cute_dsl.utils.convert_sf_to_mma_layout`.
        workspace: `allocate_sm120_moe_workspace`.
        backend: `select_sm120_moe_backend`.
    """

    wrapper: Callable[..., Any]
    layout: Callable[..., Tensor]
    workspace: Callable[..., Any]
    backend: Callable[..., str]
