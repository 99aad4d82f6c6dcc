"""OpenAI's answers around a writer's chunks: ``data:`` lines, usage, timings, [DONE]. Pure functions."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from nanoserve.choice import Piece
from nanoserve.errors import EngineError
from nanoserve.metrics import RequestRecord
from nanoserve.parameters import Delivery, usage
from nanoserve.protocol import error_answer
from nanoserve.sse import event


class Writer(Protocol):
    """Pieces to the chunks of one of OpenAI's endpoints."""

    def chunks(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """A piece's chunks."""
        ...

    def usage_chunk(self, usage: Mapping[str, Any]) -> dict[str, Any]:
        """The last chunk."""
        ...

    def answer(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """The answer in one object, without its usage."""
        ...


@dataclass(frozen=True, slots=True)
class OpenAiWire:
    """An `answers.Wire`.

    Args:
        writer: of the endpoint.
        delivery: whether a stream ends with a chunk of usage, and whether each chunk has the usage so far.
        prompt_n: tokens that the engine reads, the prompt as often as it is answered.
    """

    writer: Writer
    delivery: Delivery
    prompt_n: int
    ping = b": ping\n\n"

    def begin(self, record: RequestRecord) -> bytes:
        """Nothing comes before the first token."""
        return b""

    def piece(self, piece: Piece, record: RequestRecord, last: bool) -> bytes:
        """A piece's chunks; without a chunk of usage, the last has the timings."""
        chunks = list(self.writer.chunks(piece))
        if self.delivery.usage_so_far:
            chunks = [chunk | {"usage": _usage(record)} for chunk in chunks]
        if piece.finish and last and not self.delivery.include_usage:
            chunks[-1]["timings"] = record.timings(self.prompt_n)
        return b"".join(map(event, chunks))

    def end(self, record: RequestRecord) -> bytes:
        """Usage if it was asked for, and [DONE]."""
        done = b"data: [DONE]\n\n"
        if not self.delivery.include_usage:
            return done
        chunk = {**self.writer.usage_chunk(_usage(record)), "timings": record.timings(self.prompt_n)}
        return event(chunk) + done

    def failed(self, error: EngineError, record: RequestRecord) -> bytes:
        """The error; there is no [DONE] behind it."""
        return event(error_answer(error)[1])

    def whole(self, pieces: Sequence[Piece], record: RequestRecord) -> dict[str, Any]:
        """The answer in one object."""
        last = {"usage": _usage(record), "timings": record.timings(self.prompt_n)}
        return {**self.writer.answer(pieces), **last}


def _usage(record: RequestRecord) -> dict[str, Any]:
    return usage(record.prompt_tokens, record.completion_tokens, record.reasoning_tokens)
