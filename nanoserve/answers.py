"""From the worker's thread to the wire: events become pieces of text, and pieces an HTTP answer.

`Answers` is the bridge to the event loop: it submits, hands out pieces in order, and cancels. `Generation` is
the HTTP response around it, whole or streamed.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import anyio.to_thread
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nanoserve.choice import ChatChoice, Choice, Piece
from nanoserve.errors import EngineError
from nanoserve.http_guard import JsonResponse, record_of
from nanoserve.metrics import RequestRecord
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
        loop: the event loop, which may not be the caller's: long prompts take a while to check.

    Raises:
        QueueFull, EngineError, RequestError: see `Worker.submit`.
    """

    def __init__(
        self,
        worker: Worker,
        requests: Sequence[Request],
        choices: Sequence[Choice | ChatChoice],
        record: RequestRecord,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.record = record
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._choices = choices

        def deliver(index: int, event: Event) -> None:
            try:
                loop.call_soon_threadsafe(self._events.put_nowait, (index, event))
            except RuntimeError:
                if not loop.is_closed():  # as it is when a second signal ends the server amid a long step
                    raise

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


class Wire(Protocol):
    """Pieces to an endpoint's wire format; it may keep what it has written so far."""

    @property
    def ping(self) -> bytes:
        """What fills silence in a stream."""
        ...

    def begin(self, record: RequestRecord) -> bytes:
        """What a stream says before the first token; perhaps nothing."""
        ...

    def piece(self, piece: Piece, record: RequestRecord, last: bool) -> bytes:
        """What a stream says of a piece, perhaps nothing; ``last``: all choices have ended."""
        ...

    def end(self, record: RequestRecord) -> bytes:
        """What ends a stream."""
        ...

    def failed(self, error: EngineError, record: RequestRecord) -> bytes:
        """What ends a stream when the engine has failed."""
        ...

    def whole(self, pieces: Sequence[Piece], record: RequestRecord) -> dict[str, Any]:
        """The answer in one object."""
        ...


@dataclass(frozen=True, slots=True)
class Job:
    """A checked and tokenised request: what to generate, and how to write the answer."""

    requests: Sequence[Request]
    choices: Sequence[Choice | ChatChoice]
    wire: Wire
    prompt_tokens: int
    stream: bool


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
        record, loop = record_of(scope), asyncio.get_running_loop()
        submit = partial(Answers, self._worker, self._job.requests, self._job.choices, record, loop)
        answers = await anyio.to_thread.run_sync(submit)
        record.prompt(self._job.prompt_tokens)
        try:
            work = self._stream(answers, send) if self._job.stream else self._whole(answers, scope, send)
            await _until_gone(receive, work)
        finally:
            answers.cancel()

    async def _whole(self, answers: Answers, scope: Scope, send: Send) -> None:
        pieces = [piece async for piece in answers.pieces() if piece is not None]
        # In a thread: the logprobs of long answers are megabytes of JSON.
        response = await anyio.to_thread.run_sync(
            lambda: JsonResponse(self._job.wire.whole(pieces, answers.record))
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
        """The stream's bytes. The wire's ping fills silence, also that of tokens which say nothing yet."""
        wire, record = self._job.wire, answers.record
        if head := wire.begin(record):
            yield head
        spoke = time.monotonic()
        try:
            async for piece in answers.pieces(self._ping_interval):
                data = await self._written(piece, answers) if piece else b""
                if piece is not None and not data and time.monotonic() - spoke < self._ping_interval:
                    continue
                yield data or wire.ping
                spoke = time.monotonic()
        except EngineError as error:
            yield wire.failed(error, record)
            return
        yield wire.end(record)

    async def _written(self, piece: Piece, answers: Answers) -> bytes:
        write = partial(self._job.wire.piece, piece, answers.record, answers.ended)
        # The scores of a long prompt are megabytes of JSON: made in a thread, and everything else at once.
        return write() if piece.scores is None else await anyio.to_thread.run_sync(write)


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
