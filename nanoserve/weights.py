"""From a checkpoint's tensors to the model's weights: strict both ways, one tensor at a time.

`resolve` needs headers only and finds every fault that headers can show; `load` reads, straight into the
place where a weight stays (peak memory is the weights and one tensor), and checks the scales' values.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanoserve.checkpoint import Checkpoint, TensorInfo, stored_format
from nanoserve.errors import CheckpointError
from nanoserve.files import shown
from nanoserve.kernels.linear import Fp8, Nvfp4, Plain
from nanoserve.kernels.nvfp4 import GROUP
from nanoserve.models.config import NemotronHConfig
from nanoserve.models.manifest import Entry, Kind, entries
from nanoserve.quantization import Format
from nanoserve.staging import Staging, pieces

DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
}
_FLOATS = ("BF16", "F32", "F16")
_KV_SCALES = (".k_scale", ".v_scale")

Progress = Callable[[int, int], None]
"""Called with (bytes read, bytes in all)."""


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor a weight is made of: ``role`` is data, scales, scale or input; ``names`` has one an expert."""

    role: str
    names: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Stored values of all its tensors (packed ones count once a byte)."""
        return len(self.names) * math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return self.count * DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True)
class Item:
    """A weight of the model and how the checkpoint stores it. ``parts`` is empty for an absent KV scale."""

    layer: int | None
    entry: Entry
    format: Format
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the checkpoint."""
        return sum(part.nbytes for part in self.parts)


@dataclass(frozen=True, slots=True)
class Manifest:
    """Every weight of a checkpoint, resolved.

    Attributes:
        items: in the WEIGHTS table's order.
        unused: scales of quantised activations, which weight-only arithmetic does not need; they are checked.
            Those of NVFP4 experts are items, for backends that quantise what experts read.
        skipped_mtp: tensors of the multi-token-prediction block, left unread until the engine speculates.
        skipped_mtp_bytes: their size.
    """

    items: tuple[Item, ...]
    unused: tuple[TensorInfo, ...]
    skipped_mtp: int
    skipped_mtp_bytes: int


def resolve(checkpoint: Checkpoint, config: NemotronHConfig) -> Manifest:
    """Match the WEIGHTS table against the checkpoint's headers, or against its JSON alone if it has no tensors.

    Raises:
        CheckpointError: a tensor is missing, unexpected, or of the wrong shape or dtype; or the tensors and
            the quantisation JSON disagree.
    """
    if not checkpoint.tensors:
        if checkpoint.quantization.declared and not checkpoint.quantization.names_modules:
            problem = "says that formats are mixed and not which module has which; the weights would tell"
            raise CheckpointError(checkpoint.quantization.source, problem)
        items = tuple(_declared(checkpoint, config, *row) for row in entries(config))
        return Manifest(items, (), 0, 0)
    seen: set[str] = set()
    items = tuple(_found(checkpoint, config, seen, *row) for row in entries(config))
    mtp = [info for name, info in checkpoint.tensors.items() if name.startswith("mtp.")]
    for name, info in checkpoint.tensors.items():
        if name not in seen and not name.startswith("mtp."):
            raise CheckpointError(info.file, "the model has no such tensor", shown(info.name))
    kept = {name for item in items for part in item.parts for name in part.names}
    unused = tuple(
        info for name, info in checkpoint.tensors.items() if name in seen - kept and _is_input_scale(name)
    )
    return Manifest(items, unused, len(mtp), sum(info.nbytes for info in mtp))


def _is_input_scale(name: str) -> bool:
    return name.endswith(".input_scale")


def _declared(
    checkpoint: Checkpoint, config: NemotronHConfig, layer: int | None, prefix: str, entry: Entry
) -> Item:
    """An item as the JSON files describe it, for `inspect` on a directory without weights."""
    shape = entry.shape(config)
    if entry.kind is Kind.SCALE:
        return Item(layer, entry, Format.BF16, ())
    if not entry.is_linear:
        return Item(layer, entry, Format.BF16, (Part("data", (prefix + entry.name,), "BF16", shape),))
    modules = _modules(entry, prefix, config)
    declared = checkpoint.quantization.format_of(modules[0]) or Format.BF16
    inputs = () if checkpoint.quantization.weight_only else _inputs(entry, declared, modules)
    return Item(layer, entry, declared, (*_parts(declared, modules, "BF16", shape), *inputs))


def _inputs(entry: Entry, format_: Format, modules: tuple[str, ...]) -> tuple[Part, ...]:
    """By what each of a layer's NVFP4 experts divides its activations to quantise them."""
    if entry.kind is not Kind.EXPERTS or format_ is not Format.NVFP4:
        return ()
    return (Part("input", tuple(f"{module}.input_scale" for module in modules), "F32", ()),)


def _modules(entry: Entry, prefix: str, config: NemotronHConfig) -> tuple[str, ...]:
    if entry.kind is Kind.EXPERTS:
        return tuple(prefix + entry.name.format(index) for index in range(config.experts))
    return (prefix + entry.name,)


def _parts(format_: Format, modules: tuple[str, ...], dtype: str, shape: tuple[int, ...]) -> tuple[Part, ...]:
    """The tensors that a linear weight of this format consists of; ``dtype`` is that of an unquantised one."""

    def names(suffix: str) -> tuple[str, ...]:
        return tuple(f"{module}.{suffix}" for module in modules)

    rows, width = shape
    match format_:
        case Format.BF16:
            return (Part("data", names("weight"), dtype, shape),)
        case Format.FP8:
            return (
                Part("data", names("weight"), "F8_E4M3", shape),
                Part("scale", names("weight_scale"), "F32", ()),
            )
        case Format.NVFP4:
            return (
                Part("data", names("weight"), "U8", (rows, width // 2)),
                Part("scales", names("weight_scale"), "F8_E4M3", (rows, width // GROUP)),
                Part("scale", names("weight_scale_2"), "F32", ()),
            )


def _found(
    checkpoint: Checkpoint,
    config: NemotronHConfig,
    seen: set[str],
    layer: int | None,
    prefix: str,
    entry: Entry,
) -> Item:
    """An item as the headers have it; adds the tensors it accounts for to ``seen``."""
    tensors, shape = checkpoint.tensors, entry.shape(config)
    if entry.kind is Kind.SCALE and prefix + entry.name not in tensors:
        return Item(layer, entry, Format.BF16, ())
    if entry.kind is Kind.EXPERTS and (stack := _stack(tensors, prefix, entry)):
        format_ = Format.BF16
        parts = (Part("data", (stack,), _float_dtype(tensors[stack]), (config.experts, *shape)),)
    elif entry.is_linear:
        modules = _modules(entry, prefix, config)
        formats = {module: _format(checkpoint, module) for module in modules}
        format_ = formats[modules[0]]
        odd = next((module for module in modules if formats[module] is not format_), None)
        if odd:
            raise CheckpointError(
                tensors[f"{odd}.weight"].file,
                f"is {formats[odd].value} while {modules[0]} is {format_.value}; "
                "the experts of one layer must share a format",
                f"{odd}.weight",
            )
        if format_ is Format.NVFP4 and shape[1] % GROUP:
            raise CheckpointError(
                tensors[f"{modules[0]}.weight"].file,
                f"is NVFP4 with {shape[1]} columns, which is not a multiple of {GROUP}",
                f"{modules[0]}.weight",
            )
        parts = _parts(format_, modules, tensors[f"{modules[0]}.weight"].dtype, shape)
        if format_ is not Format.BF16:
            scale = Part("input_scale", (), "F32", ())
            for name in (f"{module}.input_scale" for module in modules if f"{module}.input_scale" in tensors):
                _check_tensor(tensors[name], scale)
                seen.add(name)
        inputs = _inputs(entry, format_, modules)
        if all(name in tensors for part in inputs for name in part.names):
            parts += inputs
    else:
        format_, name = Format.BF16, prefix + entry.name
        parts = (Part("data", (name,), _float_dtype(_need(tensors, name)), shape),)
    for part in parts:
        for name in part.names:
            _check_tensor(_need(tensors, name), part)
            seen.add(name)
    return Item(layer, entry, format_, parts)


def _stack(tensors: Mapping[str, TensorInfo], prefix: str, entry: Entry) -> str | None:
    """The name of all experts in one tensor [E, N, K], as transformers 5 holds them in memory; None if apart."""
    together = prefix + entry.name.replace(".{}", "")
    return next((name for name in (together, f"{together}.weight") if name in tensors), None)


def _float_dtype(info: TensorInfo) -> str:
    if info.dtype not in _FLOATS:
        raise CheckpointError(info.file, f"is {info.dtype} and must be one of {', '.join(_FLOATS)}", info.name)
    return info.dtype


def _format(checkpoint: Checkpoint, module: str) -> Format:
    """The module's format by its tensors, which must be what the JSON says if it says anything."""
    info = _need(checkpoint.tensors, f"{module}.weight")
    stored = stored_format(checkpoint.tensors, module)
    declared = checkpoint.quantization.format_of(module)
    if declared not in (None, stored):
        raise CheckpointError(
            info.file,
            f"is stored as {stored.value} but {checkpoint.quantization.source} says {declared.value}",
            info.name,
        )
    return stored


def _need(tensors: Mapping[str, TensorInfo], name: str) -> TensorInfo:
    if name not in tensors:
        file = next(iter(tensors.values())).file
        raise CheckpointError(file, "is missing from the checkpoint", name)
    return tensors[name]


def _check_tensor(info: TensorInfo, part: Part) -> None:
    scalar_as_vector = part.shape == () and math.prod(info.shape) == 1
    if info.shape != part.shape and not scalar_as_vector:
        raise CheckpointError(
            info.file,
            f"has shape {list(info.shape)} where config.json makes it {list(part.shape)}",
            info.name,
        )
    if info.dtype != part.dtype:
        raise CheckpointError(info.file, f"is {info.dtype} and must be {part.dtype}", info.name)


def load(
    checkpoint: Checkpoint, manifest: Manifest, device: torch.device, progress: Progress
) -> dict[tuple[int | None, str], Any]:
    """Read every weight to the device.

    Returns:
        (layer, field) → `Weight`, tensor (FLOAT as float32), or float (SCALE).

    Raises:
        CheckpointError: a file ends early, or a scale is NaN or negative.
    """
    places: list[tuple[TensorInfo, Tensor]] = []
    raw: list[tuple[Item, dict[str, Tensor]]] = []
    for item in manifest.items:
        tensors = {part.role: _allocate(checkpoint, item, part, device, places) for part in item.parts}
        raw.append((item, tensors))
    places += [(info, torch.empty(info.shape)) for info in manifest.unused]
    places.sort(key=lambda place: (place[0].file, place[0].offset))
    total = sum(info.nbytes for info, _ in places)
    done = 0
    progress(done, total)
    with Staging.on(device) as staging:
        for count in staging.bring(pieces(places), checkpoint.read_into, _check):
            done += count
            progress(done, total)
    return {(item.layer, item.entry.field): finish(item, tensors) for item, tensors in raw}


def _allocate(
    checkpoint: Checkpoint,
    item: Item,
    part: Part,
    device: torch.device,
    places: list[tuple[TensorInfo, Tensor]],
) -> Tensor:
    """Memory for a part, stacked if it is of experts; notes where each tensor of the checkpoint goes."""
    stacked = _is_stacked(item, part)
    tensor = torch.empty(kept_shape(item, part), dtype=DTYPES[part.dtype], device=device)
    for index, name in enumerate(part.names):
        places.append((checkpoint.tensors[name], tensor[index] if stacked else tensor))
    return tensor


def _is_stacked(item: Item, part: Part) -> bool:
    return item.entry.kind is Kind.EXPERTS and len(part.shape) < 3  # else it is one stack already


def kept_shape(item: Item, part: Part) -> tuple[int, ...]:
    """A part's shape in memory, where a layer's experts are one stack."""
    return (len(part.names), *part.shape) if _is_stacked(item, part) else part.shape


def _check(info: TensorInfo, stored: NDArray[np.uint8]) -> None:
    """Check the values of scales; ``stored`` is bytes."""
    if not info.name.endswith(("_scale", "_scale_2")):
        return
    values = torch.from_numpy(stored).view(DTYPES[info.dtype])
    if info.dtype == "F8_E4M3":
        bad = bool(((stored > 0x80) | (stored == 0x7F)).any())  # 0x80 is -0; above it negative or NaN
    else:
        bad = not bool(((values >= 0) & values.isfinite()).all())
    if bad:
        raise CheckpointError(info.file, "holds a scale that is NaN, infinite or negative", info.name)
    if info.name.endswith(_KV_SCALES) and not bool((values.float() > 0).all()):
        raise CheckpointError(info.file, "is 0, and the KV cache is divided by it", info.name)


def finish(item: Item, tensors: Mapping[str, Tensor]) -> Any:
    """What the model keeps of a weight: its parts by role become a `Weight`, a tensor or a float."""
    match item.entry.kind, item.format:
        case Kind.SCALE, _:
            return float(tensors["data"]) if tensors else 1.0
        case Kind.FLOAT, _:
            return tensors["data"].float()
        case Kind.STORED, _:
            return tensors["data"]
        case _, Format.BF16:
            return Plain(tensors["data"])
        case _, Format.FP8:
            return Fp8(tensors["data"], tensors["scale"])
        case _, Format.NVFP4:
            return Nvfp4(tensors["data"], tensors["scales"], tensors["scale"], tensors.get("input"))
