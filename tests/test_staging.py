"""Pieces of tensors through a few small buffers: all of them arrive, and what goes wrong in a thread is told."""

import threading
from contextlib import AbstractContextManager
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanoserve import staging, weights
from nanoserve.checkpoint import open_checkpoint
from nanoserve.config import EngineConfig
from nanoserve.errors import CheckpointError
from nanoserve.random_checkpoint import write_random_checkpoint
from nanoserve.safetensors_header import TensorInfo
from nanoserve.staging import Staging, batches, pieces
from nanoserve.startup import examine

CPU = torch.device("cpu")


def info(name: str, size: int) -> TensorInfo:
    return TensorInfo(name, "U8", (size,), "file", 0, size)


def small(device: torch.device) -> AbstractContextManager[Staging]:
    """Three buffers of 64 bytes."""
    return Staging.on(device, 64, 3)


def nothing(info: TensorInfo, values: NDArray[np.uint8]) -> None:
    """No check."""


def test_pieces_cover_every_byte_once_and_in_order() -> None:
    places = [(info("a", 10), torch.empty(10, dtype=torch.uint8)), (info("none", 0), torch.empty(0)), (
        info("b", 8), torch.empty(2, dtype=torch.float32)
    )]  # fmt: skip
    cut = [(piece.info.name, piece.start, len(piece.place)) for piece in pieces(places, 4)]
    assert cut == [("a", 0, 4), ("a", 4, 4), ("a", 8, 2), ("b", 0, 4), ("b", 4, 4)]


def test_small_pieces_share_a_buffer_and_begin_aligned() -> None:
    places = [
        (info(name, size), torch.empty(size, dtype=torch.uint8)) for name, size in (("a", 3), ("b", 16), ("c", 40))
    ]
    filled = [[(at, piece.info.name) for at, piece in batch] for batch in batches(pieces(places, 64), 64)]
    assert filled == [[(0, "a"), (16, "b")], [(0, "c")]]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_bytes_arrive_whatever_thread_is_late(count: int) -> None:
    """The first reader of each round waits for the last one, where there is another."""
    sources = {name: torch.randint(0, 256, (size,), dtype=torch.uint8) for name, size in (("a", 23), ("b", 64))}
    places = [(info(name, len(values)), torch.zeros_like(values)) for name, values in sources.items()]
    late = threading.Semaphore(0)
    calls = [0]

    def read(info: TensorInfo, buffer: memoryview, start: int) -> None:
        calls[0] += 1
        if count > 1 and calls[0] == 1:
            assert late.acquire(timeout=5)
        buffer[:] = sources[info.name].numpy().data[start : start + len(buffer)]
        late.release()

    with Staging.on(CPU, 8, count) as stage:
        counts = list(stage.bring(pieces(places, 8), read, nothing))
    assert counts == [8, 8, 7, *[8] * 8]
    assert all(torch.equal(place, sources[info.name]) for info, place in places)


def test_what_a_reader_raises_ends_it() -> None:
    def read(info: TensorInfo, buffer: memoryview, start: int) -> None:
        raise CheckpointError(info.file, "cannot be read", info.name)

    place = torch.zeros(100, dtype=torch.uint8)
    with Staging.on(CPU, 8, 3) as stage, pytest.raises(CheckpointError, match="cannot be read"):
        list(stage.bring(pieces([(info("a", 100), place)], 8), read, nothing))


def test_a_checkpoint_is_the_same_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_random_checkpoint(tmp_path / "model", recipe="super")
    checkpoint = open_checkpoint(tmp_path / "model")
    manifest = examine(checkpoint, EngineConfig(device="cpu")).manifest
    whole = weights.load(checkpoint, manifest, CPU, lambda done, total: None)
    monkeypatch.setattr(staging.pieces, "__defaults__", (64,))
    monkeypatch.setattr(weights, "Staging", SimpleNamespace(on=small))
    told: list[tuple[int, int]] = []
    cut = weights.load(checkpoint, manifest, CPU, lambda done, total: told.append((done, total)))
    assert len(told) > 1000
    assert told[-1][0] == told[-1][1]
    assert_same(whole, cut)


def assert_same(whole: Any, cut: Any) -> None:
    """Bit for bit, in whatever holds the tensors."""
    match whole:
        case Tensor():
            assert isinstance(cut, Tensor)
            assert torch.equal(whole.reshape(-1).view(torch.uint8), cut.reshape(-1).view(torch.uint8))
        case dict():
            assert isinstance(cut, dict)
            assert whole.keys() == cut.keys()
            for key in whole:
                assert_same(whole[key], cut[key])
        case _ if is_dataclass(whole):
            for field in fields(whole):
                assert_same(getattr(whole, field.name), getattr(cut, field.name))
        case _:
            assert whole == cut
