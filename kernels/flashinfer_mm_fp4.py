"""The product of two NVFP4 operands on FlashInfer's kernels for SM120 and SM121, over one copy of packed values.

Sources, flashinfer-python 0.7.4: `nvfp4_quantize` (quantization/fp4_quantization.py) and `mm_fp4`
(gemm/gemm_base.py).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nanoserve.kernels.prepared import Activations, MmFp4

B12X = "b12x"
"""The one of `mm_fp4`'s backends that is made for SM120 and SM121 and needs no nvcc."""


@dataclass(frozen=True, slots=True)
class OnMmFp4:
    """A product by `mm_fp4`."""

    library: MmFp4

    def __call__(self, x: Tensor, data: Tensor, scales: Tensor, activations: Activations) -> Tensor:
        """Quantise and multiply.

        Args:
            x: BF16 [T, K], contiguous.
            data: uint8 [N, K/2].
            scales: float8_e4m3fn [N to 128, K/16 to 4], as `nanoserve.kernels.swizzle` orders them.
            activations: by what x is divided.

        Returns:
            BF16 [T, N].
        """
        codes, own = self.library.quantize(
            x,
            activations.multiplier.view(1),
            sfLayout=self.library.layout,
            enable_pdl=False,
            backend="cuda",
            nvfp4_4over6=None,  # and not by environment variables
        )
        return self.library.product(
            codes, data.T, own, scales.T, activations.alpha,
            out_dtype=torch.bfloat16, backend=B12X, enable_pdl=False,
        )  # fmt: skip
