"""Dense products of many tokens by the vendor's BF16 product: as it is, or over a weight expanded in parts."""

import torch
from torch import Tensor

EXPANDED_BYTES = 32 << 20
"""Of a weight as BF16 at a time: written and read again, it stays in a large chip's second cache."""


def plain_product(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """X [T, K] @ weight [N, K].T on a GPU, both BF16: [T, N] as ``dtype``, BF16 or float32."""
    if dtype == x.dtype:
        return torch.nn.functional.linear(x, weight)
    return torch.mm(x, weight.T, out_dtype=dtype)
