"""The released geometries with random weights, made where they stay: what a benchmark needs and no download gives.

Geometry and per-module precision are the releases' own (``shapes/*.json``); only the values are noise. The
routers' are made so that tokens choose nearly as many experts as chance would (the benchmark counts them).
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanoserve.checkpoint import Checkpoint
from nanoserve.config import EngineConfig, ShapeName
from nanoserve.files import SHAPES_FOLDER
from nanoserve.models.nemotron_h import Fields
from nanoserve.quantization import Format, parse
from nanoserve.random_checkpoint import random_values
from nanoserve.startup import Examined, Prepared, examine, prepare
from nanoserve.weights import DTYPES, Item, Manifest, Part, Progress, finish, kept_shape

_QUIETER = {"gate": 1 / 3, "bias": 0.1}
"""Scores near 1 are all alike, and the bias alone would choose among them: the same experts for every token."""

_CODES_RMS = 2.93
"""Of the E2M1 values when every code is as likely."""


def shape_checkpoint(name: ShapeName) -> Checkpoint:
    """The release as `open_checkpoint` would see its JSON files: no tensors, and nothing on the disk."""
    data = _read(name)
    layers: dict[str, dict[str, str | int]] = {}
    for algorithm, modules in data["layers"].items():
        for module, numbers in modules.items():
            layers |= {f"backbone.layers.{i}.mixer.{module}": {"quant_algo": algorithm} for i in numbers}
    layers |= {module: {"quant_algo": algorithm} for module, algorithm in data["modules"].items()}
    table = {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": data["kv_cache"], "quantized_layers": layers}
    return Checkpoint(Path(data["release"]), data["config"], {}, parse({}, {"quantization": table}), {})


def prepare_shape(name: ShapeName, options: EngineConfig, say: Callable[[str], None] | None = None) -> Prepared:
    """As `nanoserve.startup.prepare`, for a released geometry.

    Raises:
        BackendError, ConfigError, MemoryPlanError: as there.
    """
    prepared = prepare(shape_checkpoint(name), options, *((say,) if say else ()))
    return replace(prepared, manifest=_with_router(prepared.manifest, name))


def examine_shape(name: ShapeName, options: EngineConfig) -> Examined:
    """As `nanoserve.startup.examine`, for a released geometry.

    Raises:
        BackendError, ConfigError: as there.
    """
    examined = examine(shape_checkpoint(name), options)
    return replace(examined, manifest=_with_router(examined.manifest, name))


def _with_router(manifest: Manifest, name: ShapeName) -> Manifest:
    """The router's type, which the JSON files do not tell."""
    router = _read(name)["router"]
    items = tuple(_stored_as(item, router) if item.entry.field == "gate" else item for item in manifest.items)
    return replace(manifest, items=items)


def _read(name: ShapeName) -> Mapping[str, Any]:
    return json.loads((SHAPES_FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def _stored_as(item: Item, dtype: str) -> Item:
    return replace(item, parts=tuple(replace(part, dtype=dtype) for part in item.parts))


def random_fields(manifest: Manifest, device: torch.device, progress: Progress, seed: int = 0) -> Fields:
    """Random weights in the manifest's formats, as `nanoserve.weights.load` would give them.

    Args:
        manifest: every weight and its format.
        device: where they are made and stay.
        progress: called with (bytes made, bytes in all).
        seed: of the values.
    """
    random = torch.Generator(device).manual_seed(seed)
    total, done = sum(item.nbytes for item in manifest.items), 0
    fields: dict[tuple[int | None, str], Any] = {}
    for item in manifest.items:
        parts = {part.role: _part(item, part, random) for part in item.parts}
        fields[item.layer, item.entry.field] = finish(item, parts)
        done += item.nbytes
        progress(done, total)
    return fields


def _part(item: Item, part: Part, random: torch.Generator) -> Tensor:
    """One tensor of a weight, in its format's own bits."""
    shape, entry, device = kept_shape(item, part), item.entry, random.device
    if not entry.is_linear:
        values = random_values(entry, shape, random) * _QUIETER.get(entry.field, 1.0)
        return values.to(DTYPES[part.dtype])
    match item.format, part.role:
        case Format.NVFP4, "data":
            return torch.randint(0, 256, shape, generator=random, dtype=torch.uint8, device=device)
        case Format.NVFP4, "scales":  # bit patterns of E4M3 from 1 up to 2
            codes = torch.randint(0x38, 0x40, shape, generator=random, dtype=torch.uint8, device=device)
            return codes.view(torch.float8_e4m3fn)
        case Format.NVFP4, "input":  # amax / (6 * 448), and values are a few times 1
            return torch.full(shape, 1 / 256, device=device)
        case Format.NVFP4, _:
            return torch.full(shape, _deviation(item) / (1.5 * _CODES_RMS), device=device)
        case Format.FP8, "scale":
            return torch.full(shape, _deviation(item), device=device)
        case Format.FP8, _:
            return _normal(shape, random).to(torch.float8_e4m3fn)
        case Format.BF16, _:
            return _normal(shape, random).mul_(_deviation(item)).to(DTYPES[part.dtype])


def _normal(shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """BF16, for the largest weights would be too large in float32."""
    return torch.randn(shape, generator=random, dtype=torch.bfloat16, device=random.device)


def _deviation(item: Item) -> float:
    """What a weight's values are to be spread like."""
    width = item.parts[0].shape[-1] * (2 if item.format is Format.NVFP4 else 1)
    return 1.5 / math.sqrt(width)
