"""Grouped-query attention over a paged KV cache, without RoPE (this family has none)."""

from dataclasses import dataclass

import torch
from torch import Tensor

_FP8_MAX = 448.0


TICKETS = 8
"""Of a KV head."""


@dataclass(frozen=True, slots=True)
class LayerKV:
    """One attention layer's pages: k and v [pages, page_size, kv_heads, head_dim].

    The scales are 1.0 unless the cache is FP8 and the checkpoint was calibrated: value = stored * scale.
    ``tickets`` is int32 [kv_heads, `TICKETS`], zero between launches: a kernel's clusters count themselves here,
    so that the last one adds up what all have. One launch at a time needs them; without any, a call makes its own.
    """

    k: Tensor
    v: Tensor
    k_scale: float = 1.0
    v_scale: float = 1.0
    tickets: Tensor | None = None


def kv_append(k: Tensor, v: Tensor, cache: LayerKV, page_table: Tensor, positions: Tensor) -> None:
    """Write the keys and values of T tokens [T, kv_heads, head_dim] to their places.

    Args:
        k: keys.
        v: values.
        cache: **written**.
        page_table: page of each ``page_size`` positions, int32 [pages of the sequence].
        positions: int64 [T], consecutive.
    """
    size = cache.k.shape[1]
    pages, slots = page_table[positions // size].long(), positions % size
    for pool, x, scale in ((cache.k, k, cache.k_scale), (cache.v, v, cache.v_scale)):
        _bits(pool)[pages, slots] = _bits(_stored(x, pool.dtype, scale))


def _stored(x: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    if dtype == torch.float8_e4m3fn:
        x = (x.float() / scale).clamp(-_FP8_MAX, _FP8_MAX)  # e4m3fn has no infinity: out of range would be NaN
    return x.to(dtype)


def _bits(x: Tensor) -> Tensor:
    """FP8 as bytes: torch has no indexing of float8 tensors on every device."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def attention_decode(
    q: Tensor, k: Tensor, v: Tensor, cache: LayerKV, page_table: Tensor, positions: Tensor
) -> Tensor:
    """`kv_append` of a few tokens, and their `attention`."""
    kv_append(k, v, cache, page_table, positions)
    return attention(q, cache, page_table, positions)


def attention(q: Tensor, cache: LayerKV, page_table: Tensor, positions: Tensor) -> Tensor:
    """Softmax(q k / sqrt(head_dim)) v over every position up to each query's own.

    Args:
        q: [T, heads, head_dim].
        cache: holds positions 0 … positions[-1] already.
        page_table: int32 [pages of the sequence].
        positions: int64 [T], consecutive.

    Returns:
        [T, heads, head_dim] in q's dtype, computed in float32.
    """
    length = int(positions[-1]) + 1
    pages = page_table[: -(-length // cache.k.shape[1])].long()
    keys, values = (
        _bits(pool)[pages].view(pool.dtype).flatten(0, 1)[:length].float().transpose(0, 1) * scale
        for pool, scale in ((cache.k, cache.k_scale), (cache.v, cache.v_scale))
    )
    allowed = torch.arange(length, device=q.device) <= positions.unsqueeze(-1)
    # Heads as [kv_heads, heads of each]; torch's enable_gqa would leave the fused path and hold every score.
    groups = q.float().transpose(0, 1).unflatten(0, (keys.shape[0], -1))
    keys, values = (m.unsqueeze(1).expand(-1, groups.shape[1], -1, -1) for m in (keys, values))
    mixed = torch.nn.functional.scaled_dot_product_attention(groups, keys, values, attn_mask=allowed)
    return mixed.flatten(0, 1).transpose(0, 1).to(q.dtype)
