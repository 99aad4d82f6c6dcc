"""A safetensors directory: its JSON files and an index of its tensors, all checked before a byte of data is read.

No code and no pickle of a checkpoint is ever opened. Nothing that a header or an index claims is believed
before it has been held against the file: offsets, sizes, names. Data goes from the file straight into the
caller's buffer, one tensor at a time.

A byte of a weight that was changed on its way is not found out: releases come without digests of their files. What
it makes of a scale (NaN, infinity, a negative number) or of the logits (not finite) is told.
"""

import math
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from reprlib import repr as brief
from types import MappingProxyType
from typing import Any, cast

from nanoserve.errors import CheckpointError
from nanoserve.files import AGAIN, read_object, read_optional, shown, unreadable
from nanoserve.quantization import CONFIG, GROUP, HF_QUANT_CONFIG, Format, Quantization, canonical_name, parse
from nanoserve.safetensors_header import TensorInfo, is_count, read_header

GENERATION_CONFIG = "generation_config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_SUFFIX = ".safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_FLOATS = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class Checkpoint:
    """A checked directory, from `open_checkpoint`.

    Attributes:
        directory: where it is.
        config: ``config.json``.
        generation_config: ``generation_config.json``, empty when there is none.
        quantization: what the JSON files say of formats.
        tensors: canonical name (``backbone.…``, ``lm_head.…``, ``mtp.…``) → where it lies.
    """

    directory: Path
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    quantization: Quantization
    tensors: Mapping[str, TensorInfo]

    @property
    def name(self) -> str:
        """The directory's name; of a Hugging Face cache the model's, not the snapshot's hash."""
        path = Path(os.path.abspath(self.directory))
        repository = path.parent.parent.name
        if path.parent.name == "snapshots" and repository.startswith("models--"):
            return repository.rpartition("--")[2]
        return path.name

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """End tokens of ``config.json`` and ``generation_config.json`` together, ascending.

        Both are needed: releases name the text's end in one and the turn's end in the other only.

        Raises:
            CheckpointError: an entry is not a token id.
        """
        return tuple(sorted({*_eos(CONFIG, self.config), *_eos(GENERATION_CONFIG, self.generation_config)}))

    def read_into(self, info: TensorInfo, buffer: memoryview, start: int = 0) -> None:
        """Fill a writable, contiguous buffer with a tensor's bytes from the file, from the ``start``-th on.

        Raises:
            CheckpointError: the file cannot be read, or is shorter than when it was opened.
            ValueError: the tensor has fewer bytes there than the buffer.
        """
        if start + buffer.nbytes > info.nbytes:
            raise ValueError(f"{info.name} has {info.nbytes} bytes and not {buffer.nbytes} from {start} on")
        if not buffer.nbytes:
            return
        view, done = buffer.cast("B"), 0
        try:
            with open(self.directory / info.file, "rb", buffering=0) as file:
                while done < len(view):  # Linux ends a read at 2 GiB
                    count = os.preadv(file.fileno(), [view[done:]], info.offset + start + done)
                    if not count:
                        problem = f"ends {info.nbytes - start - done} bytes too early: {AGAIN}"
                        raise CheckpointError(info.file, problem, shown(info.name))
                    done += count
        except OSError as error:
            raise CheckpointError(info.file, f"cannot be read: {error.strerror}", shown(info.name)) from error


def open_checkpoint(directory: str | Path, *, weights: bool = True) -> Checkpoint:
    """Read a directory's JSON files and tensor headers, and check them.

    Args:
        directory: a local directory; ``~`` is expanded.
        weights: False accepts a directory without tensors, whose ``tensors`` are then empty.

    Raises:
        CheckpointError: anything in the directory is not as it should be.
    """
    path = _directory(directory)
    config = read_object(path, CONFIG)
    generation = read_optional(path, GENERATION_CONFIG)
    hf_quant = read_optional(path, HF_QUANT_CONFIG)
    checkpoint = Checkpoint(
        path,
        MappingProxyType(config),
        MappingProxyType(generation or {}),
        parse(config, hf_quant),
        MappingProxyType(_tensors(path, weights)),
    )
    _ = checkpoint.eos_token_ids  # its faults belong here, not in the first request
    return checkpoint


def stored_format(tensors: Mapping[str, TensorInfo], module: str) -> Format:
    """The format of a linear layer's weight, from its tensors alone.

    Args:
        tensors: `Checkpoint.tensors`.
        module: such as ``backbone.layers.0.mixer.in_proj``.

    Raises:
        CheckpointError: the weight is missing, or its dtype, scales and shapes make no format we know.
    """
    weight = tensors.get(module + ".weight")
    if weight is None:
        raise CheckpointError("weights", "the tensor is missing", shown(module + ".weight"))
    scale, scale_2 = tensors.get(module + ".weight_scale"), tensors.get(module + ".weight_scale_2")
    if weight.dtype in _FLOATS and scale is None and scale_2 is None:
        return Format.BF16
    if weight.dtype == "F8_E4M3" and _is_scalar(scale) and scale_2 is None:
        return Format.FP8
    if weight.dtype == "U8" and _are_block_scales(scale, weight) and _is_scalar(scale_2):
        return Format.NVFP4
    raise CheckpointError(
        weight.file,
        f"{_described(weight)}, weight_scale {_described(scale)}, weight_scale_2 {_described(scale_2)}: must be "
        "a float weight alone, F8_E4M3 with an F32 scalar as weight_scale, or U8 [N, K/2] with F8_E4M3 "
        f"[N, K/{GROUP}] as weight_scale and an F32 scalar as weight_scale_2",
        shown(weight.name),
    )


def _is_scalar(scale: TensorInfo | None) -> bool:
    return scale is not None and scale.dtype == "F32" and math.prod(scale.shape) == 1


def _are_block_scales(scale: TensorInfo | None, weight: TensorInfo) -> bool:
    if scale is None or scale.dtype != "F8_E4M3" or len(weight.shape) != 2:
        return False
    rows, packed = weight.shape  # two weights a byte
    return packed * 2 % GROUP == 0 and scale.shape == (rows, packed * 2 // GROUP)


def _described(info: TensorInfo | None) -> str:
    return "absent" if info is None else shown(f"{info.dtype} {list(info.shape)}")


def _directory(given: str | Path) -> Path:
    where = shown(str(given))
    try:
        path = Path(given).expanduser()
        mode = path.stat().st_mode
    except (
        OSError,
        TypeError,
        ValueError,
        RuntimeError,
    ) as error:  # ValueError: a NUL; RuntimeError: an unknown ~user
        remedy = "a model from a hub must be downloaded first (hf download NAME --local-dir DIRECTORY)"
        raise CheckpointError(where, f"is not a directory that can be opened; {remedy}") from error
    if not stat.S_ISDIR(mode):
        raise CheckpointError(where, "is a file; name the directory that holds config.json and the weights")
    return path


def _eos(file: str, config: Mapping[str, Any]) -> Iterable[int]:
    value: object = config.get("eos_token_id")
    ids = cast("list[object]", value) if isinstance(value, list) else [] if value is None else [value]
    if not all(map(is_count, ids)):
        raise CheckpointError(file, f"eos_token_id is {brief(value)} and must be token ids from 0")
    return cast("list[int]", ids)


def _tensors(directory: Path, weights: bool) -> dict[str, TensorInfo]:
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        raise unreadable(str(directory), error) from error
    present = [name for name in names if _is_plain(name)]
    if not present and not weights:
        return {}
    if INDEX not in names:
        file = _single(directory, names, present)
        tensors = _merged([read_header(directory, file)])
        if not tensors:
            raise CheckpointError(shown(file), f"holds no tensors: {AGAIN}")
        return tensors
    placed = _weight_map(read_object(directory, INDEX))
    tensors = _merged([read_header(directory, name) for name in sorted(set(placed.values()))])
    _check_index(placed, tensors)
    return tensors


def _single(directory: Path, names: list[str], present: list[str]) -> str:
    """The one file with all tensors, where there is no index."""
    if SINGLE in present:
        return SINGLE
    if len(present) > 1:
        raise CheckpointError(INDEX, f"is missing, and there are {len(present)} {_SUFFIX} files: download it")
    pickle = next((name for name in names if name.endswith(_PICKLES)), None)
    if pickle and not present:
        raise CheckpointError(shown(pickle), "is a pickle, which is never opened: get the model as safetensors")
    return present[0] if present else SINGLE


def _weight_map(index: Mapping[str, Any]) -> dict[str, str]:
    placed: object = index.get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise CheckpointError(INDEX, f"weight_map must be an object that names tensors and files: {AGAIN}")
    for tensor, name in cast("dict[str, object]", placed).items():
        if not isinstance(name, str) or not _is_plain(name):
            problem = f"its file is {brief(name)} and must be a plain *{_SUFFIX} name, with no path"
            raise CheckpointError(INDEX, problem, shown(tensor))
    return cast("dict[str, str]", placed)


def _is_plain(name: str) -> bool:
    return name.isprintable() and name.endswith(_SUFFIX) and not set("/\\") & set(name) and name[0] != "."


def _check_index(placed: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> None:
    """Index and headers name the same tensors in the same files."""
    for info in tensors.values():
        where = placed.get(info.name)
        if where != info.file:
            says = f"{INDEX} places it in {where}" if where else f"{INDEX} does not name it"
            raise CheckpointError(info.file, f"is in this file, but {says}: {AGAIN}", shown(info.name))
    stored = {info.name for info in tensors.values()}
    for name, file in placed.items():
        if name not in stored:
            raise CheckpointError(file, f"is not in this file, where {INDEX} places it", shown(name))


def _merged(shards: list[list[TensorInfo]]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for info in chain.from_iterable(shards):
        other = tensors.setdefault(canonical_name(info.name), info)
        if other is not info:
            problem = f"is the same tensor as {shown(other.name)} in {other.file}: keep one of the two"
            raise CheckpointError(info.file, problem, shown(info.name))
    return tensors
