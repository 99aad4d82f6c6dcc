"""A sequence's state: pages of KV for attention layers, one slot of conv and SSM state for Mamba layers.

Every tensor is allocated once and never moves, so that a CUDA graph may hold its address. Recurrent state
cannot be rewound: a sequence only ever goes forward.
"""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nanoserve.kernels.attention import TICKETS, LayerKV
from nanoserve.kernels.mamba import MambaState
from nanoserve.models.config import NemotronHConfig


@dataclass(frozen=True, slots=True)
class CacheShape:
    """Sizes of a cache, known before anything is allocated.

    Attributes:
        max_context: tokens that one sequence may hold.
        page_size: tokens a page.
        kv_dtype, conv_dtype: storage types; the SSM state is always float32.
        slots: sequences whose Mamba state can be held at once.
    """

    max_context: int
    page_size: int
    kv_dtype: torch.dtype
    conv_dtype: torch.dtype
    slots: int = 1

    @property
    def pages(self) -> int:
        """Pages that a full sequence takes."""
        return -(-self.max_context // self.page_size)

    def kv_bytes_per_token(self, config: NemotronHConfig) -> int:
        """Bytes that one token adds to the KV cache, over all attention layers."""
        per_layer = 2 * config.kv_heads * config.head_dim * self.kv_dtype.itemsize
        return len(config.layers("*")) * per_layer

    def state_bytes(self, config: NemotronHConfig) -> int:
        """Bytes of one slot: conv and SSM state of every Mamba layer."""
        conv = config.conv_dim * (config.conv_kernel - 1) * self.conv_dtype.itemsize
        ssm = config.d_inner * config.state_size * 4
        return len(config.layers("M")) * (conv + ssm)


@dataclass(slots=True)
class Sequence:
    """One sequence's place in the cache.

    Attributes:
        slot: its Mamba slot.
        page_table: its KV pages in order, on the device, int32 [pages of a full sequence]; unused entries are 0.
        length: tokens whose state the cache holds.
    """

    slot: int
    page_table: Tensor
    length: int = 0


@dataclass(frozen=True, slots=True)
class Cache:
    """The pools. ``kv`` has an entry an attention layer; ``conv`` and ``ssm`` are [Mamba layers, slots, …].

    ``tickets`` is int32 [Mamba layers, groups], see `MambaState`: one launch at a time needs a layer's.
    """

    shape: CacheShape
    kv: tuple[LayerKV, ...]
    conv: Tensor
    ssm: Tensor
    tickets: Tensor
    page_tables: Tensor
    free_pages: list[int] = field(default_factory=list[int])
    free_slots: list[int] = field(default_factory=list[int])

    @classmethod
    def allocate(
        cls,
        config: NemotronHConfig,
        shape: CacheShape,
        device: torch.device,
        kv_scales: tuple[tuple[float, float], ...],
    ) -> "Cache":
        """Allocate every pool.

        Args:
            config: the model's geometry.
            shape: sizes and types.
            device: where the tensors live.
            kv_scales: (k_scale, v_scale) of each attention layer; used by an FP8 cache only.
        """
        mamba = len(config.layers("M"))
        pool = (shape.pages * shape.slots, shape.page_size, config.kv_heads, config.head_dim)
        fp8 = shape.kv_dtype == torch.float8_e4m3fn
        # One for all layers: a launch needs them alone.
        tickets = torch.zeros((config.kv_heads, TICKETS), dtype=torch.int32, device=device)
        return cls(
            shape=shape,
            kv=tuple(
                LayerKV(
                    torch.zeros(pool, dtype=shape.kv_dtype, device=device),
                    torch.zeros(pool, dtype=shape.kv_dtype, device=device),
                    *(scales if fp8 else (1.0, 1.0)),
                    tickets,
                )
                for scales in kv_scales
            ),
            conv=torch.zeros(
                (mamba, shape.slots, config.conv_dim, max(config.conv_kernel - 1, 0)),
                dtype=shape.conv_dtype,
                device=device,
            ),
            ssm=torch.zeros(
                (mamba, shape.slots, config.mamba_heads, config.mamba_head_dim, config.state_size),
                dtype=torch.float32,
                device=device,
            ),
            tickets=torch.zeros((mamba, config.groups), dtype=torch.int32, device=device),
            page_tables=torch.zeros((shape.slots, shape.pages), dtype=torch.int32, device=device),
            free_pages=list(range(shape.pages * shape.slots)),
            free_slots=list(range(shape.slots)),
        )

    def mamba(self, layer: int, slot: int) -> MambaState:
        """The state of a sequence's Mamba layer; ``layer`` counts the Mamba layers."""
        return MambaState(self.conv[layer, slot], self.ssm[layer, slot], self.tickets[layer])

    @contextmanager
    def sequence(self, tokens: int) -> Generator[Sequence]:
        """Room for a new sequence of at most ``tokens`` tokens, with clean state; freed at the end.

        All its pages are taken at once, so that no decode step can run out of them.
        """
        count = -(-tokens // self.shape.page_size)
        if not self.free_slots or count > len(self.free_pages):
            raise RuntimeError(f"no slot or no {count} pages are free: the caller admitted too much")
        slot = self.free_slots.pop()
        pages = [self.free_pages.pop() for _ in range(count)]
        table = self.page_tables[slot]
        table.zero_()
        table[:count] = torch.tensor(pages, dtype=torch.int32, device=table.device)
        self.conv[:, slot].zero_()
        self.ssm[:, slot].zero_()
        try:
            yield Sequence(slot, table)
        finally:
            self.free_pages.extend(reversed(pages))
            self.free_slots.append(slot)
