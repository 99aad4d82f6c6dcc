"""Bytes from files to a GPU at the speed of the disk: threads fill pinned buffers while others are copied from."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanoserve.safetensors_header import TensorInfo

PIECE = 32 << 20
"""Bytes of a buffer, a multiple of every element's size."""
BUFFERS = 8
"""Buffers: 256 MiB of pinned memory while weights are loaded; a disk wants several requests at once."""

Read = Callable[[TensorInfo, memoryview, int], None]
"""Fill a buffer with bytes of a tensor, from one of them on."""


Check = Callable[[TensorInfo, NDArray[np.uint8]], None]
"""Look at bytes of a tensor."""
_ALIGNED = 16


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of a tensor in the file, and where they go.

    Attributes:
        info: the tensor.
        start: the first of the bytes, counted from the tensor's.
        place: uint8 [bytes], on any device.
    """

    info: TensorInfo
    start: int
    place: Tensor


Batch = list[tuple[int, Piece]]


def pieces(places: Iterable[tuple[TensorInfo, Tensor]], size: int = PIECE) -> Generator[Piece]:
    """Tensors and their places (contiguous, of the stored type) in pieces of at most ``size`` bytes."""
    for info, place in places:
        flat = place.reshape(-1).view(torch.uint8)
        for start in range(0, info.nbytes, size):
            yield Piece(info, start, flat[start : start + size])


def batches(wanted: Iterable[Piece], size: int) -> Generator[Batch]:
    """Pieces one after another as they fill buffers of ``size`` bytes, each with its (aligned) place there.

    A checkpoint has tens of thousands of small tensors, which are not worth a thread's turn each.
    """
    batch: Batch = []
    at = 0
    for piece in wanted:
        if batch and at + len(piece.place) > size:
            yield batch
            batch, at = [], 0
        batch.append((at, piece))
        at += -(-len(piece.place) // _ALIGNED) * _ALIGNED
    if batch:
        yield batch


@dataclass(frozen=True, slots=True)
class Staging:
    """Buffers on the host, one a batch under way.

    Attributes:
        buffers: uint8, pinned for a GPU.
        copied: for each buffer, what says that the last copies from it are done; None on a CPU, where copies are.
        readers: threads that fill them.
    """

    buffers: tuple[Tensor, ...]
    copied: tuple[torch.cuda.Event | None, ...]
    readers: ThreadPoolExecutor

    @classmethod
    @contextmanager
    def on(cls, device: torch.device, size: int = PIECE, count: int = BUFFERS) -> Generator["Staging"]:
        """Buffers for a device; their memory is given back at the end."""
        gpu = device.type == "cuda"
        buffers = tuple(torch.empty(size, dtype=torch.uint8, pin_memory=gpu) for _ in range(count))
        readers = ThreadPoolExecutor(count, "reader")
        try:
            yield cls(buffers, tuple(torch.cuda.Event() if gpu else None for _ in buffers), readers)
        finally:
            readers.shutdown(cancel_futures=True)

    def bring(self, wanted: Iterable[Piece], read: Read, check: Check) -> Generator[int]:
        """Copy pieces to their places, in order; yields the bytes of each batch once its copies have begun.

        Args:
            wanted: what to copy, none larger than a buffer.
            read: fills a buffer; called by several threads at once.
            check: called with each piece's bytes on the host, by the thread that read them.

        Raises:
            NanoserveError: what ``read`` or ``check`` raise.
        """
        under_way: deque[tuple[int, Batch, Future[None]]] = deque()
        for number, batch in enumerate(batches(wanted, len(self.buffers[0]))):
            slot = number % len(self.buffers)
            if len(under_way) == len(self.buffers):
                yield self._copied(*under_way.popleft())
            if (event := self.copied[slot]) is not None:
                event.synchronize()
            under_way.append((slot, batch, self.readers.submit(self._fill, slot, batch, read, check)))
        while under_way:
            yield self._copied(*under_way.popleft())
        if self.copied[0] is not None:
            torch.cuda.current_stream().synchronize()

    def _fill(self, slot: int, batch: Batch, read: Read, check: Check) -> None:
        whole = self.buffers[slot].numpy()
        for at, piece in batch:
            values = whole[at : at + len(piece.place)]
            read(piece.info, values.data, piece.start)
            check(piece.info, values)

    def _copied(self, slot: int, batch: Batch, reading: Future[None]) -> int:
        reading.result()
        for at, piece in batch:
            piece.place.copy_(self.buffers[slot][at : at + len(piece.place)], non_blocking=True)
        if (event := self.copied[slot]) is not None:
            event.record()
        return sum(len(piece.place) for _, piece in batch)
