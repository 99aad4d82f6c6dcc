"""One thread owns the GPU: a bounded queue of requests in, events out, each request ended exactly once.

The thread loads the engine, runs one request at a time in order of arrival, and lets the engine go. An
unexpected failure of the engine is told to the running and to every waiting request, and the worker stays
``broken``: it never guesses that a damaged device state is still good.
"""

import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from nanoserve.errors import EngineError, NanoserveError, QueueFull, RequestError
from nanoserve.request import Event, Finish, Request

log = logging.getLogger("nanoserve.worker")

WorkerState = Literal["loading", "ready", "draining", "broken", "closed"]

MAX_RETRY_AFTER = 60
"""Seconds; the longest wait that a refused client is told."""

CANCEL_GRACE = 5.0
"""Seconds that a cancelled request has to notice it, before a drain gives up on it."""

_IDLE_POLL = 0.5  # seconds; how soon an idle thread sees that the program's main thread has ended


class EngineLike(Protocol):
    """What the worker needs of an engine."""

    def check(self, request: Request) -> None:
        """Refuse a request that could never be served. Thread-safe and cheap.

        Raises:
            RequestError: the prompt is too long, or an id is out of the vocabulary.
        """
        ...

    def generate(self, request: Request, cancelled: Callable[[], bool]) -> Iterator[Event]:
        """Run a request on the calling thread; the last event is its only `Finish`.

        ``cancelled`` is polled once a token and once a prefill chunk.
        """
        ...


@dataclass(slots=True, eq=False)
class _Job:
    request: Request
    deliver: Callable[[Event], None]
    cancelled: bool = False


class Ticket:
    """A submitted request's handle."""

    def __init__(self, cancel: Callable[[], None]) -> None:
        self._cancel = cancel

    def cancel(self) -> None:
        """End the request soon, with Finish("cancelled"); does nothing to one that has ended."""
        self._cancel()


class Worker:
    """The thread that owns the engine.

    Args:
        load: builds the engine; called first, on the worker's thread.
        max_queue: requests that may wait behind the running one.
        hang_timeout: seconds without a step of the running request after which the thread is said to hang.

    Attributes:
        state: ``loading`` → ``ready`` → ``draining`` → ``closed``; ``broken`` after a failure.
        failure: what broke it, in words fit for a client.
    """

    def __init__(self, load: Callable[[], EngineLike], *, max_queue: int, hang_timeout: float = math.inf) -> None:
        self.state: WorkerState = "loading"
        self.failure: str | None = None
        self._max_queue = max_queue
        self._hang_timeout = hang_timeout
        self._last_step = time.monotonic()
        self._engine: EngineLike | None = None
        self._load_error: NanoserveError | None = None
        self._waiting: deque[_Job] = deque()
        self._running: _Job | None = None
        self._closing = False
        self._durations: deque[float] = deque([1.0], maxlen=16)
        self._changed = threading.Condition()  # guards every field above
        self._thread = threading.Thread(target=self._main, args=(load,), name="nanoserve-worker")
        self._thread.start()

    @property
    def running(self) -> int:
        """Requests being generated now: 0 or 1."""
        return int(self._running is not None)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def ended(self) -> bool:
        """Whether the thread has ended; a program that exits while it has not would wait for it."""
        return not self._thread.is_alive()

    def hanging(self) -> str | None:
        """Why the thread is taken to hang; None while steps are made, or nothing runs."""
        if self._running is None:  # asked first: a request that begins sets the time, and only then itself
            return None
        silence = time.monotonic() - self._last_step
        if silence <= self._hang_timeout:
            return None
        return f"no step for {silence:.0f} s while a request runs: the engine's thread does not answer"

    def retry_after(self) -> int:
        """Whole seconds, from 1, after which a new request may find room: an estimate."""
        with self._changed:
            return self._retry_after()

    def wait_ready(self, timeout: float | None = None) -> EngineLike:
        """Wait until the engine is loaded.

        Raises:
            NanoserveError: what `load` raised.
            EngineError: it is not loaded within ``timeout`` seconds, or the worker is broken or closed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.state != "loading", timeout)
            if self._load_error is not None:
                raise self._load_error
            if self._engine is None or self.state not in ("ready", "draining"):
                raise EngineError(self._why_not())
            return self._engine

    def admit(self) -> EngineLike:
        """The engine, if a request submitted now would be taken: asked before work is spent on it.

        Raises:
            QueueFull: too many requests wait.
            EngineError: the engine is loading, draining, broken or closed.
        """
        with self._changed:
            if self.state != "ready" or self._engine is None:
                raise EngineError(self._why_not())
            if self.running + self.waiting > self._max_queue:
                raise QueueFull(self.waiting, self._retry_after())
            return self._engine

    def submit(self, request: Request, deliver: Callable[[Event], None]) -> Ticket:
        """Queue one request.

        Args:
            request: what to generate.
            deliver: gets every event, on the worker's thread (a request cancelled while it waits gets its
                `Finish` inside `cancel`). It must not block: the device would wait for it.

        Raises:
            QueueFull: too many requests wait.
            EngineError: the engine is loading, draining, broken or closed.
            RequestError: the engine refuses the request.
        """
        return self.submit_all([request], lambda _, event: deliver(event))[0]

    def submit_all(self, requests: Sequence[Request], deliver: Callable[[int, Event], None]) -> list[Ticket]:
        """Queue requests that belong together, all or none, to be run one after another.

        When there is room for one, the group is taken whole, so that no group fails half-way.

        Args:
            requests: what to generate.
            deliver: gets the request's index and the event, as in `submit`.

        Raises:
            QueueFull, EngineError, RequestError: as `submit`.
        """
        engine = self.admit()
        for request in requests:
            engine.check(request)
        jobs = [_Job(request, _numbered(i, deliver)) for i, request in enumerate(requests)]
        with self._changed:
            self.admit()
            self._waiting.extend(jobs)
            self._changed.notify_all()
        return [Ticket(lambda job=job: self._cancel(job)) for job in jobs]

    def stream(self, request: Request) -> Generator[Event]:
        """Submit at the first `next`, then yield the events; closing the iterator cancels.

        Raises:
            QueueFull, EngineError, RequestError: as `submit`.
        """
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        ticket = self.submit(request, events.put)
        try:
            while True:
                event = events.get()
                yield event
                if isinstance(event, Finish):
                    return
        finally:
            ticket.cancel()

    def start_drain(self) -> None:
        """Refuse new requests from now on; the running and the waiting ones go on."""
        with self._changed:
            if self.state in ("loading", "ready"):
                self.state = "draining"
            self._changed.notify_all()

    def cancel_all(self) -> None:
        """Cancel the running request and every waiting one."""
        with self._changed:
            jobs = [*self._waiting, *([self._running] if self._running else [])]
        for job in jobs:
            self._cancel(job)

    def drain(self, timeout: float) -> bool:
        """Refuse new requests, give the others ``timeout`` seconds, then cancel what is left.

        Returns:
            Whether the worker became idle; False means that the engine does not answer.
        """
        self.start_drain()
        if not self._wait_idle(timeout):
            self.cancel_all()
        return self._wait_idle(CANCEL_GRACE)

    def close(self, timeout: float | None = None) -> bool:
        """Cancel everything, let go of the engine (and with it of its memory) and end the thread.

        Returns:
            Whether the thread ended within ``timeout`` seconds; loading cannot be interrupted.
        """
        with self._changed:
            if self.state != "broken":
                self.state = "closed"
            self._closing = True
            self._changed.notify_all()
        self.cancel_all()
        self._thread.join(timeout)
        return self.ended

    def _main(self, load: Callable[[], EngineLike]) -> None:
        """The worker's thread."""
        self._load(load)
        while (job := self._next_job()) is not None:
            started = time.monotonic()
            self._run(job)
            with self._changed:
                self._running = None
                self._durations.append(time.monotonic() - started)
                self._changed.notify_all()
        self._engine = None  # with it go the weights and the cache

    def _load(self, load: Callable[[], EngineLike]) -> None:
        error: NanoserveError | None = None
        engine: EngineLike | None = None
        try:
            engine = load()
        except NanoserveError as problem:
            error = problem
        except BaseException as problem:  # whatever it is, waiters must not hang
            log.exception("loading failed")
            error = EngineError(f"loading failed: {type(problem).__name__}: {problem}")
        with self._changed:
            self._engine, self._load_error = engine, error
            if error is not None:
                self.state, self.failure = "broken", f"loading failed: {error}"
            elif self.state == "loading":
                self.state = "ready"
            self._changed.notify_all()

    def _next_job(self) -> _Job | None:
        """The next job, marked as running; None when the thread must end."""
        with self._changed:
            while not self._waiting:
                # An idle thread that is not a daemon would keep a program alive that forgot close().
                if self._closing or _program_ended():
                    return None
                self._changed.wait(_IDLE_POLL)
            self._last_step = time.monotonic()
            self._running = self._waiting.popleft()
            return self._running

    def _run(self, job: _Job) -> None:
        """Generate; the client hears of the end only when the engine has cleaned up after it."""
        assert self._engine is not None
        finish: Finish | None = None
        try:
            for event in self._engine.generate(job.request, lambda: self._poll(job)):
                if finish is not None:
                    raise EngineError(f"the engine sent {type(event).__name__} after the end")
                if isinstance(event, Finish):
                    finish = event
                else:
                    self._deliver(job, event)
            if finish is None:
                raise EngineError("the engine ended a request without telling why")
        except RequestError as error:
            finish = Finish("error", str(error))
        except BaseException as error:  # SystemExit too: the thread must live to tell the others
            log.exception("the engine failed on request %r", job.request.id)
            finish = self._break(error)
        self._deliver(job, finish)

    def _poll(self, job: _Job) -> bool:
        """Whether to stop; that the engine asks, once a step, is the sign that it works."""
        self._last_step = time.monotonic()
        return job.cancelled or _program_ended()

    def _break(self, error: BaseException) -> Finish:
        """Become broken and tell the waiting requests; the running one is told by the caller."""
        cause = str(error) if isinstance(error, NanoserveError) else type(error).__name__
        finish = Finish("error", f"the engine failed: {cause}")
        with self._changed:
            self.state, self.failure = "broken", finish.message
            jobs = list(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
        for job in jobs:
            self._deliver(job, finish)
        return finish

    def _cancel(self, job: _Job) -> None:
        with self._changed:
            job.cancelled = True
            if job not in self._waiting:
                return  # it runs and polls the flag, or it has ended
            self._waiting.remove(job)
            self._changed.notify_all()
        self._deliver(job, Finish("cancelled"))

    def _deliver(self, job: _Job, event: Event) -> None:
        """A consumer that raises (its event loop is gone, say) loses its request, not the engine."""
        try:
            job.deliver(event)
        except Exception:
            job.cancelled = True
            log.exception("delivering to request %r failed: it is cancelled", job.request.id)

    def _wait_idle(self, timeout: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not (self._running or self._waiting), timeout)

    def _why_not(self) -> str:
        words: dict[WorkerState, str] = {
            "loading": "the model is still loading: retry later",
            "draining": "the server is shutting down",
            "broken": self.failure or "the engine is broken",
            "closed": "the engine is closed",
        }
        return words.get(self.state, "the engine is not ready")

    def _retry_after(self) -> int:
        mean = sum(self._durations) / len(self._durations)
        return min(MAX_RETRY_AFTER, max(1, math.ceil(mean * (self.running + self.waiting))))


def _program_ended() -> bool:
    return not threading.main_thread().is_alive()


def _numbered(index: int, deliver: Callable[[int, Event], None]) -> Callable[[Event], None]:
    return lambda event: deliver(index, event)
