"""Bytes from files to a GPU at the speed of the disk: threads fill pinned buffers while others are copied from."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from nanoserve.safetensors_header import TensorInfo

PIECE = 32 << 20
"""Bytes read at a time, a multiple of every element's size."""
BUFFERS = 8
"""Pieces under way: 256 MiB of pinned memory while weights are loaded; a disk wants several requests at once."""

Read = Callable[[TensorInfo, memoryview, int], None]
"""Fill a buffer with bytes of a tensor, from one of them on."""


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


def pieces(places: Iterable[tuple[TensorInfo, Tensor]], size: int = PIECE) -> Generator[Piece]:
    """Tensors and their places (contiguous, of the stored type) in pieces of at most ``size`` bytes."""
    for info, place in places:
        flat = place.reshape(-1).view(torch.uint8)
        for start in range(0, info.nbytes, size):
            yield Piece(info, start, flat[start : start + size])


@dataclass(frozen=True, slots=True)
class Staging:
    """Buffers on the host, one a piece under way.

    Attributes:
        buffers: uint8 [PIECE], pinned for a GPU.
        copied: for each buffer, what says that the last copy from it is done; None on a CPU, where copies are.
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

    def bring(
        self, wanted: Iterable[Piece], read: Read, check: Callable[[TensorInfo, Tensor], None]
    ) -> Generator[int]:
        """Copy pieces to their places, in order; yields the bytes of each once its copy has begun.

        Args:
            wanted: what to copy.
            read: called by several threads at once.
            check: called with each piece's bytes, uint8 on the host.

        Raises:
            NanoserveError: what ``read`` or ``check`` raise.
        """
        under_way: deque[tuple[int, Piece, Future[None]]] = deque()
        for number, piece in enumerate(wanted):
            slot = number % len(self.buffers)
            if len(under_way) == len(self.buffers):
                yield self._copied(*under_way.popleft(), check)
            if (event := self.copied[slot]) is not None:
                event.synchronize()
            view = self.buffers[slot][: len(piece.place)].numpy().data
            under_way.append((slot, piece, self.readers.submit(read, piece.info, view, piece.start)))
        while under_way:
            yield self._copied(*under_way.popleft(), check)
        if self.copied[0] is not None:
            torch.cuda.current_stream().synchronize()

    def _copied(
        self, slot: int, piece: Piece, reading: Future[None], check: Callable[[TensorInfo, Tensor], None]
    ) -> int:
        reading.result()
        values = self.buffers[slot][: len(piece.place)]
        check(piece.info, values)
        piece.place.copy_(values, non_blocking=True)
        if (event := self.copied[slot]) is not None:
            event.record()
        return len(values)
