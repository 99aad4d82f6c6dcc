"""Host side of cuda/attention.cu: one token's key and value into the cache, and its attention, in one launch."""

import ctypes
import math

import torch
from torch import Tensor

from nanoserve.kernels import nvrtc, triton_attention
from nanoserve.kernels.attention import TICKETS, LayerKV

SIZE, MOST, THREADS, CLUSTER = 128, 16, 256, TICKETS
"""Of a head, query heads of a KV head at most, and a block and a cluster of blocks: the kernel's."""
BLOCKS = 128
"""Of the launch, over all KV heads: about as many as the largest chip has multiprocessors."""
ALONE = 2 * 128 * SIZE
"""Bytes of keys of a block, up to which a KV head has one cluster: two chunks, which come before the wait.

H200, an attention layer of Lightning: FP8, one cluster 21.8 us and eight 22.3 at 2,048 positions, 24.5 and 22.5 at
2,560; BF16, 21.4 and 22.1 at 1,024, 23.5 and 22.1 at 1,300.
"""
POINTERS = ("q", "k", "v", "k_pages", "v_pages", "page_table", "position", "sums", "stats", "tickets", "out")


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
    clusters = max(1, BLOCKS // CLUSTER // kv_heads)
    defines = {
        "KV_HEADS": str(kv_heads),
        "GROUP": str(group),
        "PAGE": str(page),
        "FP8": str(int(fp8)),
        "CLUSTER": str(CLUSTER),
        "CLUSTERS": str(clusters),
        "ALONE": str(ALONE // (SIZE * cache.k.element_size())),
    }
    kernel = nvrtc.load("attention.cu", defines, THREADS, shared_bytes(fp8), q.device)
    stats = torch.empty((kv_heads, clusters, MOST, 2), device=q.device)
    sums = torch.empty((kv_heads, clusters, MOST, size), device=q.device)
    out = torch.empty((1, heads, size), dtype=q.dtype, device=q.device)
    tickets = cache.tickets
    if tickets is None:
        tickets = torch.zeros((kv_heads, TICKETS), dtype=torch.int32, device=q.device)
    tensors = (
        q.contiguous(), k.contiguous(), v.contiguous(), cache.k, cache.v, page_table, positions,
        sums, stats, tickets, out,
    )  # fmt: skip
    pointers = {name: tensor.data_ptr() for name, tensor in zip(POINTERS, tensors, strict=True)}
    scale = cache.k_scale * math.log2(math.e) / math.sqrt(size)
    arguments = _Arguments(**pointers, scale=scale, k_scale=cache.k_scale, v_scale=cache.v_scale)
    kernel.launch(kv_heads * clusters * CLUSTER, arguments, q.device)
    return out


def shared_bytes(fp8: bool) -> int:
    """Of a block, as the kernel divides it."""
    value = 1 if fp8 else 2
    pitch, stages, chunk = SIZE * value, 2, 128 // value
    rows = MOST * (SIZE * 2 + 16 + chunk * 4 + 16 + 4)  # queries, scores, and what a chunk shrinks
    return (stages * chunk + 1) * 2 * pitch + rows + MOST * (SIZE + 2) * 4 + 16
