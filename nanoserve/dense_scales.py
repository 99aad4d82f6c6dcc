"""Matrices that are no experts, where FlashInfer multiplies by them: what its products want beside them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nanoserve.checkpoint import Checkpoint
from nanoserve.errors import BackendError
from nanoserve.kernels import flashinfer_ops
from nanoserve.kernels.flashinfer_mm_fp4 import OnMmFp4
from nanoserve.kernels.linear import Fp8, Nvfp4, Weight
from nanoserve.kernels.nvfp4 import GROUP
from nanoserve.kernels.prepared import Activations, Prepared, PreparedFp8
from nanoserve.kernels.swizzle import swizzle, swizzled_shape
from nanoserve.models.manifest import Kind
from nanoserve.models.nemotron_h import Fields
from nanoserve.quantization import Format
from nanoserve.weights import Item, Manifest


@dataclass(frozen=True, slots=True)
class Dense:
    """A backend that wants something beside the matrices.

    Attributes:
        op: of the table.
        format: of the matrices that it multiplies by.
        quantises: what they read, for which the checkpoint must say how.
        rows, columns: of which their sizes must be multiples.
        load: FlashInfer's entry points.
    """

    op: str
    format: Format
    quantises: bool
    rows: int
    columns: int
    load: Callable[[], Any]


DENSE: Mapping[str, Dense] = {
    "native": Dense("linear_nvfp4", Format.NVFP4, False, 1, 1, flashinfer_ops.native),
    # cuBLASLt's rule for FP8: 16 bytes a row of either operand, and 16 results.
    "mm_fp8": Dense("linear_fp8", Format.FP8, True, 16, 16, flashinfer_ops.mm_fp8),
    "mm_fp4": Dense("linear_nvfp4", Format.NVFP4, True, 8, 32, flashinfer_ops.mm_fp4),  # 16 bytes a row, for TMA
}
"""Backend → what it wants."""


def _chosen(backends: Mapping[str, str]) -> dict[str, Dense]:
    return {name: own for name, own in DENSE.items() if backends[own.op] == name}


def _matrices(manifest: Manifest, backends: Mapping[str, str]) -> Iterator[tuple[str, Item]]:
    """(backend, what its op may be given); the head, whose sums stay float32, is another op's.

    Raises:
        BackendError: a matrix is not one that the backend can multiply by.
    """
    scaled = {info.name for info in manifest.unused}
    for backend, own in _chosen(backends).items():
        for item in manifest.items:
            linear = item.entry.kind is Kind.LINEAR and item.entry.family != "head"
            if not linear or item.format is not own.format:
                continue
            data = item.parts[0]
            rows, columns = data.shape[0], data.shape[1] * (2 if own.format is Format.NVFP4 else 1)
            if rows % own.rows or columns % own.columns:
                need = f"rows in multiples of {own.rows} and columns of {own.columns}"
                raise BackendError(
                    f"op {own.op}: {backend} needs {need}, and {data.names[0]} is {rows} × {columns}"
                )
            if own.quantises and (name := _input_scale(item)) not in scaled:
                why = "quantises activations, and the checkpoint does not say by what"
                raise BackendError(f"op {own.op}: {backend} {why}: it has no {name}")
            yield backend, item


def _input_scale(item: Item) -> str:
    return f"{item.parts[0].names[0].removesuffix('.weight')}.input_scale"


def dense_scales(manifest: Manifest, backends: Mapping[str, str]) -> int:
    """Bytes of block scales that are kept once more.

    Args:
        manifest: the model's weights.
        backends: op → backend.

    Raises:
        BackendError: a chosen backend cannot multiply by one of them.
    """
    items = (item for _, item in _matrices(manifest, backends) if item.format is Format.NVFP4)
    shapes = (item.parts[0].shape for item in items)  # packed, two values a byte
    each = (swizzled_shape(rows, half * 2 // GROUP) for rows, half in shapes)
    return sum(rows * columns for rows, columns in each)


def prepare_dense(backend: str, weight: Weight, library: Any, divisor: Tensor | None = None) -> Weight:
    """A weight [N, K] with what a backend wants beside it; its values are not copied.

    Args:
        backend: one of `DENSE`.
        weight: one matrix, of the backend's format.
        library: FlashInfer's entry points.
        divisor: ModelOpt's ``input_scale``, float32 [1], where the backend quantises activations.

    Raises:
        BackendError: activations are to be divided by 0.
    """
    match backend, weight:
        case "native", Nvfp4(_, scales):
            return replace(weight, prepared=Prepared(swizzle(scales), None, {backend: library}))
        case "mm_fp4", Nvfp4(_, scales, scale):
            own = Prepared(swizzle(scales), _activations(divisor, scale), {backend: OnMmFp4(library)})
            return replace(weight, prepared=own)
        case "mm_fp8", Fp8(_, scale):
            return replace(weight, prepared=PreparedFp8(_activations(divisor, scale), library))
        case _:
            raise AssertionError(f"{backend} does not multiply by a {type(weight).__name__}")


def _activations(divisor: Tensor | None, scale: Tensor) -> Activations:
    """How to quantise what a matrix with one scale, float32 [], reads."""
    assert divisor is not None, "the caller has looked for an input_scale"
    if not bool((divisor > 0).all()):
        raise BackendError("an input_scale of the checkpoint is 0, and activations would be divided by it")
    return Activations(divisor, divisor.reciprocal().squeeze(0), divisor * scale)


def with_dense(
    fields: Fields,
    manifest: Manifest,
    backends: Mapping[str, str],
    checkpoint: Checkpoint,
    libraries: Mapping[str, Callable[[], Any]] | None = None,
) -> Fields:
    """The model's weights, with what the chosen backends want beside their matrices.

    Args:
        fields: as `nanoserve.weights.load` gives them.
        manifest: what they are.
        backends: op → backend.
        checkpoint: where they are from, read for their input scales.
        libraries: stand-ins for FlashInfer's entry points.

    Raises:
        BackendError: a chosen backend cannot multiply by one of them.
    """
    pairs = list(_matrices(manifest, backends))
    if not pairs:
        return fields
    loaders = libraries or {name: own.load for name, own in DENSE.items()}
    ready = {backend: loaders[backend]() for backend in _chosen(backends)}
    grown = dict(fields)
    for backend, item in pairs:
        place = item.layer, item.entry.field
        divisor = _read(checkpoint, item, fields[place].data.device) if DENSE[backend].quantises else None
        grown[place] = prepare_dense(backend, fields[place], ready[backend], divisor)
    return grown


def _read(checkpoint: Checkpoint, item: Item, device: torch.device) -> Tensor:
    """A matrix's input scale, float32 [1]; loading has checked it."""
    host = torch.empty(1)
    checkpoint.read_into(checkpoint.tensors[_input_scale(item)], host.view(torch.uint8).numpy().data)
    return host.to(device)
