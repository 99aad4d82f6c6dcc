"""NVFP4 products of few tokens on FlashInfer's W4A16 kernel for SM120 and SM121, over the one copy of a weight."""

import torch
from torch import Tensor

from nanoserve.errors import BackendError
from nanoserve.kernels.linear import Nvfp4, Weight
from nanoserve.kernels.tiles import power_of_two
from nanoserve.kernels.triton_linear import FEW, checked
from nanoserve.kernels.triton_linear import linear as on_triton

NATIVE = "cute-dsl-native"
"""The one of `mm_bf16_fp4`'s backends that reads a checkpoint's packed values."""


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
