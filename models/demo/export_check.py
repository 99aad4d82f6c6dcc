"""Holds an exported checkpoint against the BF16 one that it was made from, and tells what it weighs."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from nanoserve.checkpoint import SINGLE, Checkpoint, open_checkpoint
from nanoserve.errors import CheckpointError
from nanoserve.kernels.linear import Weight, expert
from nanoserve.models.config import NemotronHConfig
from nanoserve.models.manifest import Kind
from nanoserve.quantization import Format
from nanoserve.weights import Item, load, resolve

MIX: Mapping[str, Format] = {
    "experts": Format.NVFP4,
    "shared": Format.NVFP4,
    "mlp": Format.NVFP4,
    "head": Format.NVFP4,
    "mamba": Format.FP8,
}
"""Family of linear layers → its format; the others stay BF16."""

WORST: Mapping[Format, float] = {Format.NVFP4: 0.15, Format.FP8: 0.05}
"""Relative error at most: Gaussian weights have 0.095 and 0.026, a mistake in the packing has 1 or more."""

_PLAIN, _SCALES = "unquantised", "scales of FP8 values"


@dataclass(slots=True)
class _Row:
    """One line of the table; ``errors`` has an entry a quantised matrix."""

    tensors: int = 0
    nbytes: int = 0
    errors: list[float] = field(default_factory=list[float])

    def add(self, tensors: int, nbytes: int) -> None:
        self.tensors += tensors
        self.nbytes += nbytes

    def line(self, name: str) -> str:
        text = f"{name:<24} {self.tensors:>7} {self.nbytes:>13,}"
        if not self.errors:
            return text
        mean = sum(self.errors) / len(self.errors)
        return f"{text}   {len(self.errors):>8} {mean:.4f} {max(self.errors):.4f}"


def report(source: Path, out: Path) -> str:
    """Open the output as the engine does, compare every weight with the source, and describe it.

    Args:
        source: the BF16 checkpoint's directory.
        out: the exported checkpoint's.

    Returns:
        A table for a terminal: bytes and relative error of each format.

    Raises:
        CheckpointError: a format is not the mix's, a weight is too far from the source's, or a tensor that is
            not quantised differs from the source's in any bit.
    """
    checkpoint = open_checkpoint(out)
    config = NemotronHConfig.from_json(checkpoint.config)
    manifest = resolve(checkpoint, config)
    loaded = load(checkpoint, manifest, torch.device("cpu"), _silent)
    original, written = _tensors(open_checkpoint(source)), load_file(out / SINGLE)
    rows: dict[tuple[str, str], _Row] = {}
    for item in manifest.items:
        row = rows.setdefault((_format_name(item), item.entry.family), _Row())
        row.add(sum(len(part.names) for part in item.parts), item.nbytes)
        if item.entry.is_linear and item.format is not MIX.get(item.entry.family, Format.BF16):
            raise CheckpointError(SINGLE, f"is {item.format.value}, which is not the mix", item.parts[0].names[0])
        if item.format is not Format.BF16:
            row.errors += _errors(item, loaded[item.layer, item.entry.field], original)
    rows[_SCALES, "activations"] = _Row(len(manifest.unused), sum(info.nbytes for info in manifest.unused))
    rows[_PLAIN, "MTP block"] = _Row(manifest.skipped_mtp, manifest.skipped_mtp_bytes)
    same = _check_unquantised(original, written)
    size = (out / SINGLE).stat().st_size
    before = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    lines = [*_table(rows), _Row(len(written), size).line("total, with the header")]
    lines.append(f"{before:,} bytes before; {same} unquantised tensors are the input's, bit for bit")
    return "\n".join(lines)


def _table(rows: Mapping[tuple[str, str], _Row]) -> Iterator[str]:
    """Each format, and its families below it, largest first."""
    yield f"{'':<24} {'tensors':>7} {'bytes':>13}   {'matrices':>8} {'error':>6} {'worst':>6}"
    for format_ in (Format.NVFP4.value, Format.FP8.value, _PLAIN, _SCALES):
        families = {family: row for (other, family), row in rows.items() if other == format_}
        whole = _Row()
        for row in families.values():
            whole.add(row.tensors, row.nbytes)
            whole.errors += row.errors
        yield whole.line(format_)
        yield from (
            families[name].line(f"  {name}") for name in sorted(families, key=lambda n: -families[n].nbytes)
        )


def _silent(done: int, total: int) -> None:
    """No progress: the reading is short."""


def _format_name(item: Item) -> str:
    if item.entry.kind is Kind.SCALE:
        return _SCALES
    return _PLAIN if item.format is Format.BF16 else item.format.value


def _tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    files = {info.file for info in checkpoint.tensors.values()}
    return {name: each for file in sorted(files) for name, each in load_file(checkpoint.directory / file).items()}


def _errors(item: Item, weight: Any, original: Mapping[str, Tensor]) -> list[float]:
    """‖stored - original‖ / ‖original‖ of each matrix."""
    names = next(part.names for part in item.parts if part.role == "data")
    stack: Weight = weight
    errors: list[float] = []
    for index, name in enumerate(names):
        matrix = expert(stack, index) if item.entry.kind is Kind.EXPERTS else stack
        wanted = original[name].float()
        error = float((matrix.rows(0, len(wanted)) - wanted).norm() / wanted.norm().clamp_min(1e-30))
        if not error <= WORST[item.format]:
            raise CheckpointError(SINGLE, f"has a relative error of {error:.3f} as {item.format.value}", name)
        errors.append(error)
    return errors


def _check_unquantised(original: Mapping[str, Tensor], written: Mapping[str, Tensor]) -> int:
    """The number of tensors that both have in the same bits; all must, but the quantised."""
    plain = [name for name in original if f"{name}_scale" not in written]
    for name in plain:
        if name not in written or not _same_bits(original[name], written[name]):
            raise CheckpointError(SINGLE, "is not quantised, and differs from the input's", name)
    return len(plain)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    flat, other_flat = one.contiguous().reshape(-1), other.contiguous().reshape(-1)
    return torch.equal(flat.view(torch.uint8), other_flat.view(torch.uint8))
