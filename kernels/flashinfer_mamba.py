"""A Mamba-2 layer's decode step with FlashInfer's recurrence, between our convolution and gated norm.

Numerics: the state is float32 and all sums are, as in the reference; exp is the chip's fast one.
Sources, flashinfer-python 0.7.4: `selective_state_update` (mamba/selective_state_update.py), the checks of strides
and types in `run_selective_state_update_stp` (csrc/selective_state_update.cu), and
`selective_state_update_kernel_simple`.
"""

import torch
from torch import Tensor

from nanoserve.kernels import flashinfer_ops
from nanoserve.kernels.mamba import MambaState, MambaWeights
from nanoserve.kernels.ssm import SsmWeights
from nanoserve.kernels.triton_prefill import conv_prefill, gated_norm


def mamba_decode(projected: Tensor, weights: MambaWeights, state: MambaState) -> Tensor:
    """As `nanoserve.kernels.mamba.mamba_decode`, for BF16."""
    heads, size, states = state.ssm.shape
    inner, channels = heads * size, len(weights.conv)
    groups = (channels - inner) // (2 * states)
    z, xbc, dt = projected.split([inner, channels, heads], dim=-1)
    xbc = conv_prefill(xbc, weights.conv, weights.conv_bias, state.conv)
    x, b, c = xbc.split([inner, groups * states, groups * states], dim=-1)
    b, c = (m.unflatten(-1, (groups, states)) for m in (b, c))
    y = ssm_step(x.unflatten(-1, (heads, size)), dt, b, c, weights.ssm, state.ssm)
    return gated_norm(y.flatten(1), z, weights.norm, groups, weights.eps)


def ssm_step(x: Tensor, dt: Tensor, b: Tensor, c: Tensor, weights: SsmWeights, state: Tensor) -> Tensor:
    """As `nanoserve.kernels.ssm.ssm_step`: a launch a token; x, b and c BF16 with heads side by side."""
    update, (heads, size, states) = flashinfer_ops.ssu(), state.shape
    # What is one value a head it wants as a view of every place, and dt, D and the bias in one type.
    decay = (-torch.exp(weights.a_log))[:, None, None].expand(-1, size, states)
    d, bias = (each[:, None].expand(-1, size) for each in (weights.d, weights.dt_bias))
    steps = dt.float().unsqueeze(-1).expand(-1, -1, size)
    y = torch.empty((len(x), heads, size), dtype=x.dtype, device=x.device)
    for t in range(len(x)):
        now = slice(t, t + 1)
        update(
            state.unsqueeze(0), x[now], steps[now], decay, b[now], c[now], d,
            dt_bias=bias, dt_softplus=True, out=y[now], backend="flashinfer",
        )  # fmt: skip
    return y
