"""Headers of safetensors files: every lie is refused, by file and tensor, and nothing else is raised."""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from refusals import TWO, read, refused, refused_file
from safetensors_writer import (
    lay_out,
    nvfp4,
    pack,
)

from nanoserve.checkpoint import TensorInfo, open_checkpoint
from nanoserve.errors import CheckpointError

# Headers that are refused


@pytest.mark.parametrize("size", range(8))
def test_file_shorter_than_a_length(home: Path, size: int) -> None:
    refused_file(home, bytes(size))


@pytest.mark.parametrize("length", [3, 2**31, 2**63, 2**64 - 1, 100_000_001])
def test_header_longer_than_the_file(home: Path, length: int) -> None:
    """R16."""
    assert f"claims {length} of header" in refused_file(home, pack(b"{}", b"", length=length)).problem


def test_header_over_the_limit_is_not_read(home: Path) -> None:
    with open(home / "model.safetensors", "wb") as file:
        file.write(pack(b"{}", b"", length=100_000_001))
        file.truncate(200_000_000)  # sparse
    assert "claims 100000001 of header" in refused(home).problem


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"a": ' * 50_000,
        b"[" * 200_000,
        b'{"__metadata__": 3}',
        b'{"__metadata__": {"a": 1}}',
    ],
)
def test_header_is_no_json_object(home: Path, header: bytes) -> None:
    """R16."""
    refused_file(home, pack(header, b""))


def test_name_twice_in_a_header(home: Path) -> None:
    entry = '{"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}'
    error = refused_file(home, pack(f'{{"a": {entry}, "a": {entry}}}'.encode(), b"\0"))
    assert error.tensor == "a"
    assert "twice" in error.problem


ENTRY: dict[str, Any] = {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"dtype": "BF17"}, "dtype"),
        ({"dtype": 3}, "dtype"),
        ({"dtype": ["BF16"]}, "dtype"),
        ({"dtype": "F32"}, "span 24 bytes"),
        ({"shape": [2, 4]}, "span 16 bytes"),
        ({"shape": [-2, -3]}, "shape"),
        ({"shape": [True, 6]}, "shape"),
        ({"shape": [2.0, 3]}, "shape"),
        ({"shape": 6}, "shape"),
        ({"shape": [2**63, 6]}, "shape"),
        ({"shape": [2**62] * 64}, "span"),
        ({"shape": [1] * 65 + [6]}, "shape"),
        ({"shape": None}, "shape"),
        ({"data_offsets": [0, 13]}, "truncated"),
        ({"data_offsets": [12, 0]}, "truncated"),
        ({"data_offsets": [-12, 0]}, "data_offsets"),
        ({"data_offsets": [0]}, "data_offsets"),
        ({"data_offsets": [0, 6, 12]}, "data_offsets"),
        ({"data_offsets": [False, 12]}, "data_offsets"),
        ({"data_offsets": ["0", "12"]}, "data_offsets"),
        ({"data_offsets": [10**30, 10**30 + 12]}, "data_offsets"),
        ({"data_offsets": None}, "data_offsets"),
        ({"strides": [3, 1]}, "entry"),
    ],
)
def test_bad_entry(home: Path, change: dict[str, Any], word: str) -> None:
    """R16."""
    error = refused_file(home, pack({"a": {**ENTRY, **change}}, bytes(12)))
    assert error.tensor == "a"
    assert word in error.problem


@pytest.mark.parametrize("entry", [None, [], "x", {}, {"dtype": "U8"}])
def test_entry_is_incomplete(home: Path, entry: object) -> None:
    assert refused_file(home, pack({"a": entry}, b"")).tensor == "a"


def test_truncated_data(home: Path) -> None:
    content = pack(*lay_out(TWO))
    error = refused_file(home, content[:-1])
    assert error.tensor == "b.weight"
    assert "truncated" in error.problem


def spans(*offsets: tuple[int, int]) -> dict[str, Any]:
    return {
        name: {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
        for name, (begin, end) in zip("abc", offsets, strict=False)
    }


@pytest.mark.parametrize(
    ("header", "tensor", "word"),
    [
        (spans((0, 5), (4, 8)), "b", "overlaps"),
        (spans((0, 8), (2, 4)), "b", "overlaps"),
        (spans((0, 8), (0, 8)), "b", "overlaps"),
        (spans((0, 3), (4, 8)), "b", "no tensor owns"),
        (spans((1, 8)), "a", "no tensor owns"),
        (spans((0, 7)), None, "after the last"),
        ({}, None, "after the last"),
    ],
)
def test_spans_fill_the_data(home: Path, header: dict[str, Any], tensor: str | None, word: str) -> None:
    """R16."""
    error = refused_file(home, pack(header, bytes(8)))
    assert error.tensor == tensor
    assert word in error.problem


def test_hostile_names_stay_on_one_line(home: Path) -> None:
    name = "a\n\x1b[31m\ud800" + "x" * 5000
    refused_file(home, pack({name: None}, b""))


def open_or_refuse(home: Path, content: bytes) -> bool:
    """Whether the file opens; then everything the header names can be read."""
    (home / "model.safetensors").write_bytes(content)
    try:
        checkpoint = open_checkpoint(home)
    except CheckpointError:
        return False
    for name in checkpoint.tensors:
        read(checkpoint, name)
    return True


def test_fuzzed_headers_open_or_are_refused(home: Path) -> None:
    """R16."""
    sound = pack(*lay_out({**nvfp4("m", 2, 16), **TWO}))
    header_end = len(sound) - sum(info.nbytes for info in _infos(home, sound).values())
    rng = random.Random(20261123)
    outcomes = [open_or_refuse(home, _damaged(sound, header_end, rng)) for _ in range(2000)]
    assert 10 < sum(outcomes) < 1000  # letters of names may change; hardly anything else


def _infos(home: Path, content: bytes) -> Mapping[str, TensorInfo]:
    (home / "model.safetensors").write_bytes(content)
    return open_checkpoint(home).tensors


def _damaged(content: bytes, header_end: int, rng: random.Random) -> bytes:
    work = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 3))):
        at = rng.randrange(min(header_end, len(work)) or 1)
        match rng.randrange(4):
            case 0:
                work[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                work[at : at + 1] = bytes([rng.choice(b'0123456789[]{}",:-.eE\\ ')])
            case 2:
                work[at:at] = rng.randbytes(rng.randrange(1, 5))
            case _:
                del work[at : rng.choice((at + 1, at + 3, len(work)))]
    return bytes(work)
