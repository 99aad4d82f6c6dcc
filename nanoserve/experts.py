"""A model's routed experts between the memory plan and the kernels: what they are, what backends of them take."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nanoserve.kernels import flashinfer_ops
from nanoserve.kernels.flashinfer_experts import BUCKETS, prepare, share, warm
from nanoserve.kernels.moe import PREFILL_FROM
from nanoserve.kernels.nvfp4 import GROUP
from nanoserve.kernels.place import Experts
from nanoserve.kernels.swizzle import swizzled_shape
from nanoserve.models.config import NemotronHConfig
from nanoserve.models.manifest import Kind
from nanoserve.models.nemotron_h import Fields
from nanoserve.weights import Manifest

EXPERT_OPS = ("moe_add", "experts_prefill", "experts_few")
LIBRARIES: Mapping[str, Callable[[], Any]] = {
    "cutlass": flashinfer_ops.cutlass,
    "w4a16": flashinfer_ops.w4a16,
    "b12x": flashinfer_ops.b12x,
}
"""Backend → what loads FlashInfer's entry points for it."""
_OWN_SPACE = 64 << 20
"""Of CUTLASS beside what grows with tokens: pointers and schedules of every expert, its products' own."""


@dataclass(frozen=True, slots=True)
class ExpertCosts:
    """Bytes that the experts' backends take beside the weights as the checkpoint has them.

    Attributes:
        scales: block scales once more, in the order of FlashInfer's kernels.
        workspace: what all layers share.
    """

    scales: int
    workspace: int


NO_COSTS = ExpertCosts(0, 0)
"""Of backends that read the weights as they are."""


def expert_facts(config: NemotronHConfig, manifest: Manifest) -> Experts | None:
    """What backends ask of a model's routed experts; None where it has none."""
    items = [item for item in manifest.items if item.entry.kind is Kind.EXPERTS]
    if not items:
        return None
    formats = {item.format.value for item in items}
    return Experts(
        format=formats.pop() if len(formats) == 1 else "mixed",
        input_scales=all(any(part.role == "input" for part in item.parts) for item in items),
        activation="relu2",  # which is all that `NemotronHConfig` accepts
        count=config.experts,
        top_k=config.top_k,
        width=config.expert_width,
        size=config.expert_size,
        layers=config.pattern.count("E"),
    )


def expert_costs(experts: Experts | None, backends: Mapping[str, str], chunk: int) -> ExpertCosts:
    """What the chosen backends cost.

    Args:
        experts: the model's.
        backends: op → backend.
        chunk: the most tokens of a prefill step.
    """
    chosen = {backends[op] for op in EXPERT_OPS} & LIBRARIES.keys()
    if experts is None or not chosen:
        return NO_COSTS
    matrices = ((experts.size, experts.width), (experts.width, experts.size))
    each = (swizzled_shape(rows, columns // GROUP) for rows, columns in matrices)
    scales = experts.layers * experts.count * sum(rows * columns for rows, columns in each)
    return ExpertCosts(scales, sum(_WORKSPACES[name](experts, chunk) for name in chosen))


def _cutlass_space(e: Experts, chunk: int) -> int:
    """As `getWorkspaceDeviceBufferSizes` (cutlass_fused_moe_kernels.cuh) counts for NVFP4 without a gate.

    Hidden values and results in BF16 with what they are quantised to, twice over for what overlaps, and the scales
    of both, padded to 128 rows an expert.
    """
    tokens = max(chunk, PREFILL_FROM)
    pairs, widest = tokens * e.top_k, max(e.width, e.size)
    inputs = max(pairs * e.width * 2, pairs * e.size // 2)
    scales = (pairs + 128 * e.count) * (-(-widest // 64) * 64) // GROUP
    maps = pairs * 12 + tokens * e.count * 4
    return inputs + pairs * widest * 2 + scales + maps + _OWN_SPACE


def _w4a16_space(e: Experts, chunk: int) -> int:
    """As `_persistent_plan` and `_tiled_plan` (moe_nvfp4_w4a16.py) count, over all buckets."""
    total = 0
    for tokens in BUCKETS:
        pairs = tokens * e.top_k
        total += (pairs * e.size + tokens * e.width + pairs) * 4 + pairs * 16 + 64 + pairs * e.size * 2
    return total


def _b12x_space(e: Experts, chunk: int) -> int:
    """As `allocate_sm120_static_workspace` (moe_dispatch.py) counts, and the shared output."""
    tokens = PREFILL_FROM - 1
    pairs = tokens * e.top_k
    chunks = -(-pairs // 32)
    slots = e.count + chunks
    inputs = slots * (32 * e.width // 2 + 128 * (-(-e.width // 64) * 4) + 32 * 8 + 16)
    routes = pairs * (-(-e.size // 256)) * e.width * 2
    return inputs + routes + e.count * (5 + chunks) * 4 + pairs * 4 + tokens * e.width * 2 + (2 << 20)


_WORKSPACES = {"cutlass": _cutlass_space, "w4a16": _w4a16_space, "b12x": _b12x_space}


def with_prepared(
    fields: Fields,
    experts: Experts | None,
    backends: Mapping[str, str],
    chunk: int,
    dtype: torch.dtype,
    device: torch.device,
    libraries: Mapping[str, Callable[[], Any]] = LIBRARIES,
) -> Fields:
    """The model's weights, with what the chosen backends want beside its experts.

    Args:
        fields: as `nanoserve.weights.load` gives them.
        experts: the model's.
        backends: op → backend.
        chunk: the most tokens of a prefill step.
        dtype: the activations'.
        device: where the weights are.
        libraries: stand-ins for `LIBRARIES`.
    """
    chosen = sorted({backends[op] for op in EXPERT_OPS} & LIBRARIES.keys())
    if experts is None or not chosen:
        return fields
    shared = share({name: libraries[name]() for name in chosen}, experts, chunk, dtype, device)
    grown = dict(fields)
    layers = [layer for layer, field in fields if field == "up"]
    for layer in layers:
        grown[layer, "up"], grown[layer, "down"] = prepare(fields[layer, "up"], fields[layer, "down"], shared)
    if backends["experts_few"] in chosen:  # a decode step's are warmed up where it is captured
        warm(backends["experts_few"], grown[layers[0], "up"], grown[layers[0], "down"], experts.top_k)
    return grown
