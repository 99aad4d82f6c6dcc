"""Safetensors files by hand, good and bad, for tests. Nothing here imports the engine or torch."""

import json
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

ITEM_BYTES = {"U8": 1, "BOOL": 1, "F8_E4M3": 1, "BF16": 2, "F16": 2, "F32": 4, "I64": 8}

Spec = tuple[str, tuple[int, ...]]
"""dtype and shape."""


def fill(dtype: str, shape: tuple[int, ...], start: int = 0) -> bytes:
    """Bytes that count up from ``start``, so that misplaced data shows."""
    return bytes((start + i) % 251 for i in range(prod(shape) * ITEM_BYTES[dtype]))


def lay_out(tensors: Mapping[str, Spec]) -> tuple[dict[str, Any], bytes]:
    """Header entries and data of tensors one after the other; tensor i's bytes count up from i."""
    header: dict[str, Any] = {}
    data = b""
    for index, (name, (dtype, shape)) in enumerate(tensors.items()):
        piece = fill(dtype, shape, index)
        offsets = [len(data), len(data) + len(piece)]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        data += piece
    return header, data


def pack(header: Mapping[str, Any] | bytes, data: bytes, *, length: int | None = None) -> bytes:
    """A file's bytes. ``header`` may be raw bytes, and ``length`` a lie about its size."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def write_safetensors(path: Path, tensors: Mapping[str, Spec], metadata: Mapping[str, str] | None = None) -> None:
    """Write a sound file."""
    header, data = lay_out(tensors)
    extra = {} if metadata is None else {"__metadata__": dict(metadata)}
    path.write_bytes(pack({**extra, **header}, data))


def write_arrays(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]]) -> None:
    """Write a sound file of given bytes: name → dtype, shape, data."""
    header, _ = lay_out({name: (dtype, shape) for name, (dtype, shape, _) in tensors.items()})
    data = b"".join(data for _, _, data in tensors.values())
    path.write_bytes(pack(header, data))


def write_sharded(directory: Path, shards: Mapping[str, Mapping[str, Spec]]) -> None:
    """Write files and the index that names them."""
    for name, tensors in shards.items():
        write_safetensors(directory / name, tensors)
    placed = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    index = {"metadata": {}, "weight_map": placed}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def nvfp4(module: str, rows: int, columns: int) -> dict[str, Spec]:
    """The tensors of an NVFP4 linear layer."""
    return {
        f"{module}.weight": ("U8", (rows, columns // 2)),
        f"{module}.weight_scale": ("F8_E4M3", (rows, columns // 16)),
        f"{module}.weight_scale_2": ("F32", ()),
    }


def fp8(module: str, rows: int, columns: int) -> dict[str, Spec]:
    """The tensors of an FP8 linear layer."""
    return {f"{module}.weight": ("F8_E4M3", (rows, columns)), f"{module}.weight_scale": ("F32", ())}
