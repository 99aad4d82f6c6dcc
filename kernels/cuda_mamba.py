"""Host side of cuda/mamba.cu: a Mamba-2 layer's step for one token, one launch."""

import ctypes

import torch
from torch import Tensor

from nanoserve.kernels import nvrtc, triton_mamba
from nanoserve.kernels.mamba import MambaState, MambaWeights

STATES, WIDTH = 128, 4
"""Of a row of the state, and of the convolution: the released models', and the kernel's."""
POINTERS = ("projected", "conv_weight", "conv_bias", "conv_state", "a_log", "d", "dt_bias", "state", "norm", "out")


class _Arguments(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_void_p) for name in POINTERS), ("eps", ctypes.c_float)]


def cut(group_rows: int) -> tuple[int, int] | None:
    """Blocks that share a group of so many rows, and warps of a block; None where no cut fits."""
    for blocks, warps in ((8, 16), (8, 8), (4, 8), (2, 8), (1, 8), (1, 4), (1, 2), (1, 1)):
        if group_rows % (blocks * 4 * warps) == 0 and (warps < 16 or group_rows <= blocks * 8 * warps):
            return blocks, warps
    return None


def mamba_decode(projected: Tensor, weights: MambaWeights, state: MambaState) -> Tensor:
    """`nanoserve.kernels.mamba.mamba_decode`; several tokens, and shapes that do not fit, take Triton's."""
    heads, size, states = state.ssm.shape
    inner = heads * size
    groups = (len(weights.conv) - inner) // (2 * states)
    blocks = cut(inner // groups)
    ours = states == STATES and weights.conv.shape[1] == WIDTH and size % 4 == 0
    if len(projected) > 1 or not ours or blocks is None or state.conv.dtype != torch.bfloat16:
        return triton_mamba.mamba_decode(projected, weights, state)
    defines = {
        "HEADS": str(heads),
        "SIZE": str(size),
        "STATES": str(states),
        "HEAD_GROUPS": str(groups),
        "CLUSTER": str(blocks[0]),
        "WARPS": str(blocks[1]),
    }
    kernel = nvrtc.load("mamba.cu", defines, blocks[1] * 32, 0, projected.device)
    out = torch.empty((1, inner), dtype=projected.dtype, device=projected.device)
    tensors = (
        projected, weights.conv, weights.conv_bias, state.conv, weights.ssm.a_log, weights.ssm.d,
        weights.ssm.dt_bias, state.ssm, weights.norm, out,
    )  # fmt: skip
    pointers = {name: tensor.data_ptr() for name, tensor in zip(POINTERS, tensors, strict=True)}
    kernel.launch(groups * blocks[0], _Arguments(**pointers, eps=weights.eps), projected.device)
    return out
