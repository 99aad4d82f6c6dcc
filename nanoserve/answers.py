"""From the worker's thread to the wire: events become pieces of text, and pieces an HTTP answer.

`Answers` is the bridge to the event loop: it submits, hands out pieces in order, and cancels. `Generation` is
the HTTP response around it, whole or streamed.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import anyio.to_thread
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nanoserve.choice import ChatChoice, Choice, Piece
from nanoserve.errors import EngineError
from nanoserve.http_guard import JsonResponse, record_of, to_json
from nanoserve.metrics import RequestRecord
from nanoserve.parameters import Delivery, usage
from nanoserve.protocol import error_answer
from nanoserve.request import Event, Request
from nanoserve.worker import Worker

_STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class Answers:
    """The choices of one HTTP request, submitted together and generated one after another.

    Args:
        worker: takes the requests at once, or raises.
        requests: one a choice.
        choices: what makes pieces of each one's events.
        record: gets the times and counts; an attribute too.

    Raises:
        QueueFull, EngineError, RequestError: see `Worker.submit`.
    """

    def __init__(
        self,
        worker: Worker,
        requests: Sequence[Request],
        choices: Sequence[Choice | ChatChoice],
        record: RequestRecord,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.record = record
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._choices = choices

        def deliver(index: int, event: Event) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        self._tickets = worker.submit_all(requests, deliver)

    @property
    def ended(self) -> bool:
        """All choices have ended."""
        return all(choice.ended for choice in self._choices)

    async def pieces(self, patience: float | None = None) -> AsyncIterator[Piece | None]:
        """Every piece until all choices have ended; None after each ``patience`` seconds of silence.

        Raises:
            EngineError: the engine failed, or the server gave up the request.
        """
        while not self.ended:
            try:
                async with asyncio.timeout(patience):
                    index, event = await self._events.get()
            except TimeoutError:
                yield None
                continue
            for piece in self._push(index, event):
                yield piece

    def _push(self, index: int, event: Event) -> list[Piece]:
        try:
            pieces = self._choices[index].push(event)
        except EngineError:
            self.record.end("error")
            raise
        for piece in pieces:
            if piece.token is not None:
                self.record.token(index, piece.reasoning)
        if pieces and pieces[-1].finish is not None:
            self.record.end(pieces[-1].finish)
            self._tickets[index].cancel()  # at a stop string the engine is still generating
        return pieces

    def cancel(self) -> None:
        """Cancel what has not ended: the client left, or an error ended the answer."""
        for ticket, choice in zip(self._tickets, self._choices, strict=True):
            if not choice.ended:
                choice.ended = True
                self.record.end("cancelled")
                ticket.cancel()


class Writer(Protocol):
    """Pieces to an endpoint's wire format."""

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
class Job:
    """A checked and tokenised request: what to generate, and how to write the answer."""

    requests: Sequence[Request]
    choices: Sequence[Choice | ChatChoice]
    writer: Writer
    prompt_tokens: int
    delivery: Delivery


class Generation(Response):
    """Submits a job and sends its answer, whole or as server-sent events; a client that leaves cancels it."""

    def __init__(self, job: Job, worker: Worker, ping_interval: float) -> None:
        super().__init__()
        self._job, self._worker = job, worker
        self._ping_interval = ping_interval

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Submit, then send.

        Raises:
            NanoserveError: nothing was sent yet, and the request was refused or failed.
            ClientDisconnect: the client left.
        """
        record = record_of(scope)
        answers = Answers(self._worker, self._job.requests, self._job.choices, record)
        record.prompt(self._job.prompt_tokens)
        try:
            work = self._stream(answers, send) if self._job.delivery.stream else self._whole(answers, scope, send)
            await _until_gone(receive, work)
        finally:
            answers.cancel()

    async def _whole(self, answers: Answers, scope: Scope, send: Send) -> None:
        pieces = [piece async for piece in answers.pieces() if piece is not None]
        last = {"usage": _usage(answers.record), "timings": self._timings(answers.record)}
        # In a thread: the logprobs of long answers are megabytes of JSON.
        response = await anyio.to_thread.run_sync(
            lambda: JsonResponse({**self._job.writer.answer(pieces), **last})
        )
        await response(scope, _no_receive, send)

    async def _stream(self, answers: Answers, send: Send) -> None:
        headers = Response(headers=_STREAM_HEADERS, media_type="text/event-stream").raw_headers
        headers = [(name, value) for name, value in headers if name != b"content-length"]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for data in self._events(answers):
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self, answers: Answers) -> AsyncIterator[bytes]:
        """The stream's bytes: a chunk an event; after an error there is no [DONE].

        The last chunk has the timings. A comment fills silence, also that of tokens which say nothing yet.
        """
        spoke = time.monotonic()
        try:
            async for piece in answers.pieces(self._ping_interval):
                chunks = self._chunks(piece, answers) if piece else []
                if piece is not None and not chunks and time.monotonic() - spoke < self._ping_interval:
                    continue
                yield b"".join(map(_event, chunks)) or b": ping\n\n"
                spoke = time.monotonic()
        except EngineError as error:
            yield _event(error_answer(error)[1])
            return
        if self._job.delivery.include_usage:
            chunk = self._job.writer.usage_chunk(_usage(answers.record))
            yield _event({**chunk, "timings": self._timings(answers.record)})
        yield b"data: [DONE]\n\n"

    def _chunks(self, piece: Piece, answers: Answers) -> list[dict[str, Any]]:
        chunks = list(self._job.writer.chunks(piece))
        delivery = self._job.delivery
        if delivery.usage_so_far:
            chunks = [chunk | {"usage": _usage(answers.record)} for chunk in chunks]
        if piece.finish and answers.ended and not delivery.include_usage:
            chunks[-1]["timings"] = self._timings(answers.record)
        return chunks

    def _timings(self, record: RequestRecord) -> dict[str, Any]:
        return record.timings(sum(len(request.prompt) for request in self._job.requests))


def _usage(record: RequestRecord) -> dict[str, Any]:
    return usage(record.prompt_tokens, record.completion_tokens, record.reasoning_tokens)


def _event(data: Mapping[str, Any]) -> bytes:
    return b"data: " + to_json(data) + b"\n\n"


async def _no_receive() -> Any:
    raise RuntimeError("a plain answer reads nothing")


async def _until_gone(receive: Receive, work: Awaitable[None]) -> None:
    """Do the work, unless the client leaves before it is done.

    Raises:
        ClientDisconnect: it left, and the work was cancelled.
    """
    job, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({job, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not job.done():
            raise ClientDisconnect
        job.result()
    finally:
        for task in (job, gone):
            task.cancel()
        await asyncio.gather(job, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
