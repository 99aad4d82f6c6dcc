"""Host side of cuda/attention_*.cu: one token's key and value into the cache, and its attention: two launches."""

import ctypes
import math

import torch
from torch import Tensor

from nanoserve.kernels import nvrtc, triton_attention
from nanoserve.kernels.attention import LayerKV

SIZE, MOST, WARPS = 128, 16, 4
"""Of a head, query heads of a KV head at most, and warps of a block: the kernel's."""
BLOCKS = 128
"""Of the first launch, over all KV heads: about as many as the largest chip has multiprocessors."""
POINTERS = ("q", "k", "v", "k_pages", "v_pages", "page_table", "position", "sums", "tops", "weights", "out")


class _Arguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_float) for name in ("scale", "k_scale", "v_scale")),
    ]


def attention_decode(
    q: Tensor, k: Tensor, v: Tensor, cache: LayerKV, page_table: Tensor, positions: Tensor
) -> Tensor:
    """As `nanoserve.kernels.attention.attention_decode`; several tokens, and other heads, take Triton's."""
    tokens, heads, size = q.shape
    page, kv_heads = cache.k.shape[1:3]
    group, fp8 = heads // kv_heads, cache.k.dtype == torch.float8_e4m3fn
    ours = size == SIZE and group <= MOST and (fp8 or cache.k.dtype == torch.bfloat16)
    if tokens > 1 or not ours or q.dtype != torch.bfloat16:
        return triton_attention.attention_decode(q, k, v, cache, page_table, positions)
    splits = max(1, BLOCKS // kv_heads)
    defines = {
        "KV_HEADS": str(kv_heads),
        "GROUP": str(group),
        "PAGE": str(page),
        "SPLITS": str(splits),
        "FP8": str(int(fp8)),
    }
    shared = WARPS * 16 * (SIZE + 2) * 4
    split = nvrtc.load("attention_split.cu", defines, WARPS * 32, shared, q.device)
    combine = nvrtc.load("attention_combine.cu", defines, 4 * SIZE, 0, q.device)
    tops, weights = (torch.empty((kv_heads, splits, group), device=q.device) for _ in range(2))
    sums = torch.empty((kv_heads, splits, group, size), device=q.device)
    out = torch.empty((1, heads, size), dtype=q.dtype, device=q.device)
    tensors = (
        q.contiguous(), k.contiguous(), v.contiguous(), cache.k, cache.v, page_table, positions,
        sums, tops, weights, out,
    )  # fmt: skip
    pointers = {name: tensor.data_ptr() for name, tensor in zip(POINTERS, tensors, strict=True)}
    scale = cache.k_scale * math.log2(math.e) / math.sqrt(size)
    arguments = _Arguments(**pointers, scale=scale, k_scale=cache.k_scale, v_scale=cache.v_scale)
    split.launch(kv_heads * splits, arguments, q.device)
    combine.launch(heads, arguments, q.device)
    return out
