"""Products on FlashInfer's kernels for SM120 and SM121, over the one copy of a weight.

Numerics. ``native`` multiplies what the checkpoint has with BF16 activations (W4A16). ``mm_fp8`` quantises
activations by the checkpoint's ``input_scale``, one a matrix: E4M3(x / input_scale), products of two FP8 values
summed by tensor cores with cuBLASLt's fast accumulation, times input_scale * weight_scale (W8A8). ``mm_fp4``
quantises them to NVFP4: of 16 values, the scale is E4M3(amax / 6 / input_scale) and the codes are
E2M1(x / (scale * input_scale)); block-scaled products, summed in float32, times input_scale * global_scale (W4A4).
Sources, flashinfer-python 0.7.4: `mm_bf16_fp4` (gemm/gemm_bf16_fp4.py), `mm_fp8` and `mm_fp4` (gemm/gemm_base.py),
`bmm_fp8_internal_cublaslt` (gemm/bmm_fp8.cuh), `nvfp4_quantize` (quantization/fp4_quantization.py).
"""

import torch
from torch import Tensor

from nanoserve.errors import BackendError
from nanoserve.kernels.fp8 import narrow
from nanoserve.kernels.linear import Fp8, Nvfp4, Weight
from nanoserve.kernels.tiles import power_of_two
from nanoserve.kernels.triton_linear import FEW, checked
from nanoserve.kernels.triton_linear import linear as on_triton

NATIVE = "cute-dsl-native"
"""The one of `mm_bf16_fp4`'s backends that reads a checkpoint's packed values."""
CUBLAS = "cublas"
"""The one of `mm_fp8`'s backends that never copies a weight: ``cutlass`` pads those whose rows or columns are no
multiple of 128 at every call, and the default is for SM100 alone."""


def linear(x: Tensor, weight: Weight) -> Tensor:
    """`nanoserve.kernels.linear.linear` for NVFP4: up to `FEW` tokens by `mm_bf16_fp4`, more by our Triton.

    The kernel is compiled for a number of tokens, a second or more each: others are padded to a power of two.

    Raises:
        BackendError: x is not BF16, or the weight was not prepared for it.
    """
    if len(x) > FEW:
        return on_triton(x, weight)
    if not isinstance(weight, Nvfp4) or weight.prepared is None:
        raise BackendError("this weight was not prepared for native: choose it before the weights are loaded")
    x, tokens, own = checked(x), len(x), weight.prepared
    if missing := power_of_two(tokens) - tokens:
        x = torch.cat((x, x.new_zeros((missing, x.shape[1]))))
    product = own.runners["native"]
    out = product(x, weight.data, own.scales, weight.global_scale.view(1), backend=NATIVE, enable_pdl=False)
    return out[:tokens]


def linear_fp8(x: Tensor, weight: Weight) -> Tensor:
    """`nanoserve.kernels.linear.linear` for FP8, of activations quantised to FP8: `mm_fp8`.

    Raises:
        BackendError: x is not BF16, or the weight was not prepared for it.
    """
    if not isinstance(weight, Fp8) or weight.prepared is None:
        raise BackendError("this weight was not prepared for mm_fp8: choose it before the weights are loaded")
    own = weight.prepared
    codes = narrow(checked(x), own.activations.divisor)
    return own.product(codes, weight.data, own.activations.alpha, out_dtype=torch.bfloat16, backend=CUBLAS)


def linear_fp4(x: Tensor, weight: Weight) -> Tensor:
    """`nanoserve.kernels.linear.linear` for NVFP4, of activations quantised to NVFP4: `mm_fp4`.

    Raises:
        BackendError: x is not BF16, or the weight was not prepared for it.
    """
    own = weight.prepared if isinstance(weight, Nvfp4) else None
    if not isinstance(weight, Nvfp4) or own is None or own.activations is None:
        raise BackendError("this weight was not prepared for mm_fp4: choose it before the weights are loaded")
    return own.runners["mm_fp4"](checked(x), weight.data, own.scales, own.activations)
