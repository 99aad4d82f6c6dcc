"""What a model will take and read, computed from headers or JSON alone, before a weight is read."""

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import NoReturn

from nanoserve.cache import CacheShape
from nanoserve.errors import MemoryPlanError
from nanoserve.experts import NO_COSTS, ExpertCosts
from nanoserve.kernels.linear import TILE_BYTES
from nanoserve.models.config import NemotronHConfig
from nanoserve.models.manifest import Kind
from nanoserve.quantization import Format
from nanoserve.sampler import SCORE_ROWS
from nanoserve.weights import Item, Manifest

_TILES = 3
"""Expanded tiles of a weight that the torch column holds at once: codes, scaled, transposed."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes by purpose.

    Attributes:
        weights: storage format → bytes kept in memory.
        second_scales: bytes of block scales that are kept in a second order, for FlashInfer's kernels.
        kv_per_token: KV cache bytes a token.
        kv: bytes of all KV pages.
        state: conv and SSM state of one sequence.
        workspace: estimate of what a prefill chunk and a decode step need besides.
        available: what the device has free.
        budget: the share of it that the plan may use.
        max_context: tokens the cache is made for.
        largest_context: tokens that would fit the budget.
    """

    weights: dict[str, int]
    second_scales: int
    kv_per_token: int
    kv: int
    state: int
    workspace: int
    available: int
    budget: int
    max_context: int
    largest_context: int

    @property
    def left(self) -> int:
        """Budget that stays free; negative when the plan does not fit."""
        taken = sum(self.weights.values()) + self.second_scales
        return self.budget - taken - self.kv - self.state - self.workspace

    def rows(self) -> list[tuple[str, str]]:
        """(purpose, amount) lines for a terminal."""
        formats = ", ".join(f"{name} {size(n)}" for name, n in self.weights.items())
        return [
            ("weights", f"{size(sum(self.weights.values()))} ({formats})"),
            *([("scales again", f"{size(self.second_scales)} swizzled")] if self.second_scales else []),
            ("KV pages", f"{size(self.kv)} for {self.max_context:,} tokens at {self.kv_per_token:,} B"),
            ("Mamba state", size(self.state)),
            ("workspace", f"{size(self.workspace)} (estimate)"),
            ("left", f"{size(self.left)} of a budget of {size(self.budget)} ({size(self.available)} free)"),
            ("largest context", f"{self.largest_context:,} tokens"),
        ]


def plan_memory(
    config: NemotronHConfig,
    manifest: Manifest,
    shape: CacheShape,
    *,
    wanted_context: int | None,
    prefill_chunk: int,
    keys_at_once: bool,
    available: int,
    fraction: float,
    experts: ExpertCosts = NO_COSTS,
    dense_scales: int = 0,
) -> MemoryPlan:
    """Fit weights, cache and workspace into what the device has free.

    Args:
        config: geometry.
        manifest: weights, from headers.
        shape: cache types and page size; its ``max_context`` is not used.
        wanted_context: tokens asked for; None takes the model's limit or what fits, whichever is less.
        prefill_chunk: tokens a prefill step takes at most.
        keys_at_once: attention over a prompt holds a layer's keys, values and mask whole, as torch's does.
        available: bytes free on the device.
        fraction: share of them to use.
        experts: what the experts' backends take beside the weights.
        dense_scales: block scales that other matrices' backends keep once more.

    Raises:
        MemoryPlanError: not even one page fits, or less than ``wanted_context``; names the amounts.
    """
    weights = weights_by_format(manifest)
    per_token, state = shape.kv_bytes_per_token(config), shape.state_bytes(config)
    fixed_work, work_per_token = _workspace(config, prefill_chunk, keys_at_once)
    fixed_work += experts.workspace
    budget = int(available * fraction)
    again = experts.scales + dense_scales
    kept = sum(weights.values()) + again
    room = budget - kept - state - fixed_work
    cost = per_token + work_per_token
    most_pages = -(-config.max_position_embeddings // shape.page_size)
    pages = min(max(room, 0) // (cost * shape.page_size), most_pages) if cost else most_pages
    largest = min(pages * shape.page_size, config.max_position_embeddings)
    context = wanted_context or largest
    if room < 0 or context > largest or not context:
        _refuse(config, kept, experts.scales, budget, wanted_context, largest, state + fixed_work)
    work = fixed_work + work_per_token * context
    kv = replace(shape, max_context=context).pages * shape.page_size * per_token
    return MemoryPlan(weights, again, per_token, kv, state, work, available, budget, context, largest)


def _refuse(
    config: NemotronHConfig,
    weights: int,
    again: int,
    budget: int,
    wanted: int | None,
    largest: int,
    fixed: int,
) -> NoReturn:
    if wanted and wanted > config.max_position_embeddings:
        raise MemoryPlanError(
            f"max_context is {wanted} and the model was made for {config.max_position_embeddings}: ask for less"
        )
    need = f"weights need {size(weights)}, state and workspace {size(fixed)}"
    remedy = f"ask for --max-context {largest} or less" if largest else "use a device with more memory"
    if again:
        remedy += f", or run the experts on triton (experts_prefill=triton), which needs {size(again)} less"
    raise MemoryPlanError(
        f"{wanted or 'any'} tokens of context do not fit a budget of {size(budget)}: {need}; {remedy}"
    )


def _workspace(config: NemotronHConfig, chunk: int, keys_at_once: bool) -> tuple[int, int]:
    """Estimated bytes of activations: (fixed, a token of context), float32 throughout as the torch column."""
    widest = max(
        config.d_inner + config.conv_dim + config.mamba_heads,
        config.attention_heads * config.head_dim,
        config.top_k * max(config.expert_size, config.expert_width),
        config.shared_size,
        config.mlp_size,
        config.hidden_size,
    )
    scan = 12 * config.mamba_heads * min(chunk, config.chunk_size) ** 2 * 4  # seen at Super: 107 MB for 101
    logits = 2 * SCORE_ROWS * config.vocab_size * 4
    # Keys and values as float32, once as stored and once scaled, and the mask as booleans and as floats.
    attention = 4 * config.kv_heads * config.head_dim * 4 + chunk * (1 + 4)
    attention = attention if keys_at_once and config.layers("*") else 0
    return 4 * chunk * widest * 4 + scan + logits + _TILES * TILE_BYTES, attention


def weights_by_format(manifest: Manifest) -> dict[str, int]:
    """Format in memory → bytes, largest first."""
    total: Counter[str] = Counter()
    for item in manifest.items:
        for part in item.parts:
            if item.entry.kind is Kind.FLOAT:
                total["f32"] += part.count * 4
            elif item.format is Format.BF16:
                total[{"F32": "f32", "F16": "f16"}.get(part.dtype, "bf16")] += part.nbytes
            else:
                total[item.format.value] += part.nbytes
    return dict(total.most_common())


def token_bytes(config: NemotronHConfig, manifest: Manifest, shape: CacheShape, context: int) -> dict[str, int]:
    """Bytes that one decoded token must read or write at batch 1, by family.

    Every weight once, top_k of the routed experts, one row of the embedding, conv and SSM state read and
    written, and the KV cache read at ``context`` tokens.
    """
    total: Counter[str] = Counter()
    for item in manifest.items:
        total[item.entry.family] += _read_bytes(config, item)
    total["state"] = 2 * shape.state_bytes(config)
    total["kv"] = shape.kv_bytes_per_token(config) * context
    return dict(total)


def _read_bytes(config: NemotronHConfig, item: Item) -> int:
    if item.entry.kind is Kind.EXPERTS:
        return item.nbytes * config.top_k // config.experts
    if item.entry.family == "embedding":
        return item.nbytes // config.vocab_size
    return item.nbytes


def size(count: float) -> str:
    """Bytes for people: 1.23 GB (decimal units, as memory bandwidth is quoted)."""
    sign = "-" if count < 0 else ""
    count = abs(count)
    if count < 1000:
        return f"{sign}{count:.0f} B"
    power = min(int(math.log10(count) // 3), 4)
    return f"{sign}{count / 1000**power:.3g} {' kMGT'[power]}B"
