"""NVFP4 matrices that are no experts, where FlashInfer multiplies by them: their scales in its kernels' order."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from nanoserve.kernels import flashinfer_ops
from nanoserve.kernels.linear import Nvfp4
from nanoserve.kernels.nvfp4 import GROUP
from nanoserve.kernels.prepared import Prepared, Runner
from nanoserve.kernels.swizzle import swizzle, swizzled_shape
from nanoserve.models.manifest import Kind
from nanoserve.models.nemotron_h import Fields
from nanoserve.quantization import Format
from nanoserve.weights import Item, Manifest


def _matrices(manifest: Manifest, backends: Mapping[str, str]) -> list[Item]:
    """What the op `linear_nvfp4` may be given; the head, whose sums stay float32, is another op's."""
    if backends["linear_nvfp4"] != "native":
        return []
    linear = (item for item in manifest.items if item.entry.kind is Kind.LINEAR and item.entry.family != "head")
    return [item for item in linear if item.format is Format.NVFP4]


def dense_scales(manifest: Manifest, backends: Mapping[str, str]) -> int:
    """Bytes of block scales that are kept once more.

    Args:
        manifest: the model's weights.
        backends: op → backend.
    """
    shapes = (item.parts[0].shape for item in _matrices(manifest, backends))  # packed, two values a byte
    each = (swizzled_shape(rows, half * 2 // GROUP) for rows, half in shapes)
    return sum(rows * columns for rows, columns in each)


def prepare_linear(weight: Nvfp4, product: Runner) -> Nvfp4:
    """A weight [N, K] with its scales in the kernel's order; the packed values are not copied.

    Args:
        weight: one matrix.
        product: `flashinfer.gemm.mm_bf16_fp4`.
    """
    return replace(weight, prepared=Prepared(swizzle(weight.scales), None, {"native": product}))


def with_dense(
    fields: Fields,
    manifest: Manifest,
    backends: Mapping[str, str],
    library: Callable[[], Runner] = flashinfer_ops.native,
) -> Fields:
    """The model's weights, with what the chosen backend wants beside those matrices.

    Args:
        fields: as `nanoserve.weights.load` gives them.
        manifest: what they are.
        backends: op → backend.
        library: a stand-in for FlashInfer's product.
    """
    items = _matrices(manifest, backends)
    if not items:
        return fields
    product, grown = library(), dict(fields)
    for item in items:
        place = item.layer, item.entry.field
        grown[place] = prepare_linear(fields[place], product)
    return grown
