"""The header of one safetensors file: read, and held against the file before anything it says is believed.

An own reader, because each fault must name file and tensor, and because data is read straight into its place
(`nanoserve.checkpoint.Checkpoint.read_into`) and not mapped: peak memory is a promise.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from reprlib import repr as brief
from typing import cast

from nanoserve.errors import CheckpointError
from nanoserve.files import AGAIN, JSON_LIMIT, open_regular, shown, unreadable

_MOST_DIMENSIONS = 64  # torch's limit
_LARGEST_SIZE = 2**63 - 1
_BYTES: Mapping[str, int] = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: ``nbytes`` from ``offset``, counted from the beginning of ``file`` in the directory.

    ``name`` and ``dtype`` ("BF16", "F32", "U8", "F8_E4M3", …) are as the header spells them; a scalar's
    ``shape`` is ().
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int


def _unique(file: str, pairs: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise CheckpointError(file, f"its header has this key twice: {AGAIN}", shown(twice))
    return made


def read_header(directory: Path, name: str) -> list[TensorInfo]:
    """The tensors of one file, in the order they lie in it; they fill its data without gap or overlap."""
    try:
        with open_regular(directory, name) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if length > min(size - 8, JSON_LIMIT):
                raise CheckpointError(name, f"has {size} bytes and claims {length} of header: {AGAIN}")
            data = file.read(length)
    except OSError as error:
        raise unreadable(name, error) from error
    start = 8 + length
    infos = [_tensor(name, *entry, start, size) for entry in _parse_header(name, data).items()]
    infos.sort(key=lambda info: (info.offset, info.nbytes))
    _check_spans(name, infos, start, size)
    return infos


def _parse_header(name: str, data: bytes) -> dict[str, object]:
    try:
        header: object = json.loads(data.decode("utf-8"), object_pairs_hook=partial(_unique, name))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(name, f"its header is not JSON ({shown(str(error))}): {AGAIN}") from error
    if not isinstance(header, dict):
        raise CheckpointError(name, f"its header is not a JSON object: {AGAIN}")
    entries = cast("dict[str, object]", header)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(name, f"must be an object of strings: {AGAIN}", "__metadata__")
    return entries


def _tensor(file: str, name: str, entry: object, start: int, size: int) -> TensorInfo:
    """A header's entry, checked against a file of ``size`` bytes whose data begins at ``start``."""

    def refuse(problem: str) -> CheckpointError:
        return CheckpointError(file, f"{problem}: {AGAIN}", shown(name))

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise refuse("its entry must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BYTES:
        raise refuse(f"dtype {brief(dtype)} is unknown")
    if not isinstance(shape, list) or not all(map(is_count, shape)) or len(shape) > _MOST_DIMENSIONS:
        raise refuse(f"shape {brief(shape)} must be a list of sizes from 0")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_count, offsets)):
        raise refuse(f"data_offsets {brief(offsets)} must be two offsets from 0")
    begin, end = cast("list[int]", offsets)
    if not begin <= end <= size - start:
        raise refuse(f"data_offsets [{begin}, {end}] leave the file's {size - start} bytes of data (truncated?)")
    sizes = cast("tuple[int, ...]", tuple(shape))
    needed = math.prod(sizes) * _BYTES[dtype]
    if end - begin != needed:
        needs = shown(f"{needed} bytes for {dtype} {list(sizes)}")
        raise refuse(f"data_offsets [{begin}, {end}] must span {needs}")
    return TensorInfo(name, dtype, sizes, file, start + begin, needed)


def is_count(value: object) -> bool:
    """A whole number from 0 that fits a file; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST_SIZE


def _check_spans(name: str, infos: list[TensorInfo], start: int, size: int) -> None:
    end = start
    for info in infos:
        if info.offset != end:
            what = "overlaps another tensor" if info.offset < end else "follows bytes that no tensor owns"
            raise CheckpointError(name, f"{what}: {AGAIN}", shown(info.name))
        end += info.nbytes
    if end != size:
        raise CheckpointError(name, f"has {size - end} bytes after the last tensor: {AGAIN}")
