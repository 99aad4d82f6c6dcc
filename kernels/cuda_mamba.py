"""Host side of cuda/mamba.cu: a Mamba-2 layer's step for one token, one launch."""

import ctypes

import torch
from torch import Tensor

from nanoserve.kernels import nvrtc, triton_mamba
from nanoserve.kernels.mamba import MambaState, MambaWeights

STATES, WIDTH = 128, 4
"""Of a row of the state, and of the convolution: the released models', and the kernel's."""
WARPS = 8
POINTERS = ("projected", "conv_weight", "conv_bias", "conv_state", "a_log", "d", "dt_bias", "state", "norm", "out")


class _Arguments(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_void_p) for name in POINTERS), ("eps", ctypes.c_float)]


def cluster_of(group_rows: int) -> int:
    """Blocks that share a group of so many rows, the most that can; 0 where none can."""
    return next((blocks for blocks in (8, 4, 2, 1) if group_rows % (blocks * 4 * WARPS) == 0), 0)


def mamba_decode(projected: Tensor, weights: MambaWeights, state: MambaState) -> Tensor:
    """`nanoserve.kernels.mamba.mamba_decode`; several tokens, and other shapes than the released, take Triton's."""
    heads, size, states = state.ssm.shape
    inner = heads * size
    groups = (len(weights.conv) - inner) // (2 * states)
    cluster = cluster_of(inner // groups)
    ours = states == STATES and weights.conv.shape[1] == WIDTH and size % 4 == 0 and cluster > 0
    if len(projected) > 1 or not ours or state.conv.dtype != torch.bfloat16:
        return triton_mamba.mamba_decode(projected, weights, state)
    defines = {
        "HEADS": str(heads),
        "SIZE": str(size),
        "STATES": str(states),
        "HEAD_GROUPS": str(groups),
        "CLUSTER": str(cluster),
    }
    kernel = nvrtc.load("mamba.cu", defines, WARPS * 32, 0, projected.device)
    out = torch.empty((1, inner), dtype=projected.dtype, device=projected.device)
    tensors = (
        projected, weights.conv, weights.conv_bias, state.conv, weights.ssm.a_log, weights.ssm.d,
        weights.ssm.dt_bias, state.ssm, weights.norm, out,
    )  # fmt: skip
    pointers = {name: tensor.data_ptr() for name, tensor in zip(POINTERS, tensors, strict=True)}
    kernel.launch(groups * cluster, _Arguments(**pointers, eps=weights.eps), projected.device)
    return out
