"""What the prefill kernels ask of their arguments."""

import torch
from torch import Tensor

from nanoserve.errors import BackendError


def checked_rows(x: Tensor) -> Tensor:
    """Tokens [T, D] as the prefill kernels read them: BF16, the numbers of a token one after another.

    Rows may lie further apart than they are long, as a part of a wider product's rows does.

    Raises:
        BackendError: they are not BF16.
    """
    if x.dtype != torch.bfloat16:
        raise BackendError(
            f"the triton backends compute on bfloat16 activations, and these are {x.dtype}: "
            "use dtype 'bfloat16', or choose torch for the op"
        )
    return x if x.stride(-1) == 1 else x.contiguous()
