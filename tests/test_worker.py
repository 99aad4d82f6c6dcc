"""The worker: order, capacity, cancellation, failures; every request ends exactly once."""

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_engine import FakeEngine, until

from nanoserve.errors import CheckpointError, EngineError, QueueFull, RequestError
from nanoserve.request import Event, Finish, Request, SamplingParams, Token
from nanoserve.worker import MAX_RETRY_AFTER, EngineLike, Worker

MakeWorker = Callable[..., Worker]


@pytest.fixture
def make() -> Iterator[MakeWorker]:
    workers: list[Worker] = []

    def build(engine: EngineLike, max_queue: int = 8) -> Worker:
        worker = Worker(lambda: engine, max_queue=max_queue)
        workers.append(worker)
        worker.wait_ready(10)
        return worker

    yield build
    for worker in workers:
        assert worker.close(10)


def ask(tokens: int = 3, prompt: tuple[int, ...] = (30, 31)) -> Request:
    return Request(prompt, SamplingParams(max_tokens=tokens, ignore_eos=True))


def finishes(events: list[Event]) -> list[Finish]:
    return [event for event in events if isinstance(event, Finish)]


def test_events_arrive_in_order_and_end_once(make: MakeWorker) -> None:
    events = list(make(FakeEngine()).stream(ask(3)))
    assert [type(event) for event in events] == [Token, Token, Token, Finish]
    assert events[-1] == Finish("length")


def test_requests_run_first_come_first_served(make: MakeWorker) -> None:
    engine = FakeEngine(delay=0.01)
    worker = make(engine)
    done: list[int] = []
    for i in range(5):

        def deliver(event: Event, i: int = i) -> None:
            if isinstance(event, Finish):
                done.append(i)

        worker.submit(ask(2, (20 + i,)), deliver)
    until(lambda: len(done) == 5)
    assert done == [0, 1, 2, 3, 4]
    assert engine.started == [(20 + i,) for i in range(5)]


@pytest.mark.parametrize("max_queue", [0, 3])
def test_the_queue_holds_max_queue_behind_the_running_request(make: MakeWorker, max_queue: int) -> None:
    worker = make(FakeEngine(delay=5.0), max_queue)
    worker.submit(ask(), lambda event: None)
    until(lambda: worker.running == 1)
    for _ in range(max_queue):
        worker.submit(ask(), lambda event: None)
    with pytest.raises(QueueFull) as refused:
        worker.submit(ask(), lambda event: None)
    assert 1 <= refused.value.retry_after <= MAX_RETRY_AFTER
    assert refused.value.status == 503
    assert worker.waiting == max_queue


def test_a_group_is_taken_whole_or_not_at_all(make: MakeWorker) -> None:
    worker = make(FakeEngine(delay=5.0), 1)
    assert len(worker.submit_all([ask()] * 6, lambda i, event: None)) == 6
    with pytest.raises(QueueFull):
        worker.submit_all([ask()] * 2, lambda i, event: None)
    with pytest.raises(RequestError, match="empty"):
        make(FakeEngine()).submit_all([ask(), ask(prompt=())], lambda i, event: None)


def test_a_group_is_told_apart_by_index(make: MakeWorker) -> None:
    got: list[tuple[int, Event]] = []
    make(FakeEngine()).submit_all([ask(2), ask(1)], lambda i, event: got.append((i, event)))
    until(lambda: len(got) == 5)
    assert [i for i, _ in got] == [0, 0, 0, 1, 1]


def test_cancelling_a_running_request_ends_it_soon_and_the_next_runs(make: MakeWorker) -> None:
    worker = make(FakeEngine(delay=0.05))
    events: list[Event] = []
    ticket = worker.submit(ask(100), events.append)
    until(lambda: len(events) > 0)
    before = time.monotonic()
    ticket.cancel()
    ticket.cancel()
    assert list(worker.stream(ask(1)))[-1] == Finish("length")
    assert time.monotonic() - before < 2
    ticket.cancel()
    assert finishes(events) == [Finish("cancelled")]


def test_a_waiting_request_that_is_cancelled_never_starts(make: MakeWorker) -> None:
    """R23."""
    engine = FakeEngine(delay=0.2)
    worker = make(engine)
    events: list[Event] = []
    worker.submit(ask(2, (20,)), lambda event: None)
    until(lambda: worker.running == 1)
    ticket = worker.submit(ask(2, (21,)), events.append)
    ticket.cancel()
    assert events == [Finish("cancelled")], "told at once, not when its turn comes"
    assert worker.waiting == 0
    list(worker.stream(ask(1, (22,))))
    assert engine.started == [(20,), (22,)]
    assert events == [Finish("cancelled")]


def test_closing_the_iterator_cancels(make: MakeWorker) -> None:
    worker = make(FakeEngine(delay=0.02))
    stream = worker.stream(ask(400))
    next(stream)
    stream.close()
    until(lambda: worker.running == 0, 2)


@pytest.mark.parametrize("error", [RuntimeError("CUDA secret"), EngineError("lost"), SystemExit(3), MemoryError()])
def test_an_engine_failure_is_told_to_all_and_stays(
    make: MakeWorker, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    engine = FakeEngine(delay=0.05)
    engine.fail, engine.fail_at = error, 2
    worker = make(engine)
    events: list[list[Event]] = [[], [], []]
    with caplog.at_level(logging.ERROR):
        for i in range(3):
            worker.submit(ask(5, (20 + i,)), events[i].append)
        until(lambda: all(finishes(got) for got in events))
    assert [len(finishes(got)) for got in events] == [1, 1, 1]
    assert all(finishes(got)[0].reason == "error" for got in events)
    assert "secret" not in str(events)
    assert worker.state == "broken"
    assert worker.failure
    assert engine.started == [(20,)], "a broken engine must not be used again"
    assert sum("Traceback" in (record.exc_text or "") for record in caplog.records) == 1
    with pytest.raises(EngineError, match="the engine failed"):
        worker.submit(ask(), lambda event: None)
    with pytest.raises(EngineError):
        worker.wait_ready(1)


def test_a_refused_request_harms_no_other(make: MakeWorker) -> None:
    engine = FakeEngine()
    engine.fail = RequestError("too odd")
    worker = make(engine)
    assert list(worker.stream(ask())) == [Finish("error", "too odd")]
    engine.fail = None
    assert list(worker.stream(ask(1)))[-1] == Finish("length")
    assert worker.state == "ready"


class Rogue(FakeEngine):
    """Ends without an end, or goes on after it."""

    def __init__(self, events: list[Event]) -> None:
        super().__init__()
        self.events = events

    def generate(self, request: Request, cancelled: Callable[[], bool]) -> Iterator[Event]:
        yield from self.events


@pytest.mark.parametrize("events", [[Token(5)], [Finish("stop"), Token(5)], [Finish("stop"), Finish("stop")]])
def test_an_engine_that_ends_wrongly_is_broken(
    make: MakeWorker, events: list[Event], caplog: pytest.LogCaptureFixture
) -> None:
    worker = make(Rogue(events))
    got = list(worker.stream(ask()))
    assert len(finishes(got)) == 1
    assert finishes(got)[0].reason == "error"
    assert worker.state == "broken"


def test_a_consumer_that_raises_loses_its_request_only(make: MakeWorker, caplog: pytest.LogCaptureFixture) -> None:
    worker = make(FakeEngine(delay=0.01))
    calls: list[Event] = []

    def deliver(event: Event) -> None:
        calls.append(event)
        raise RuntimeError("event loop is closed")

    worker.submit(ask(400), deliver)
    assert list(worker.stream(ask(1)))[-1] == Finish("length")
    assert len(calls) <= 3
    assert worker.state == "ready"


def test_load_errors_reach_waiters_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    def load() -> EngineLike:
        raise CheckpointError("a.safetensors", "truncated")

    worker = Worker(load, max_queue=1)
    with pytest.raises(CheckpointError, match="truncated"):
        worker.wait_ready(5)
    assert worker.state == "broken"
    with pytest.raises(EngineError, match="loading failed"):
        worker.submit(ask(), lambda event: None)
    assert worker.close(5)

    def crash() -> EngineLike:
        raise ZeroDivisionError

    worker = Worker(crash, max_queue=1)
    with pytest.raises(EngineError, match="ZeroDivisionError"):
        worker.wait_ready(5)
    assert worker.close(5)


def test_while_loading_requests_are_refused() -> None:
    go = threading.Event()

    def load() -> EngineLike:
        go.wait(10)
        return FakeEngine()

    worker = Worker(load, max_queue=1)
    assert worker.state == "loading"
    with pytest.raises(EngineError, match="loading"):
        worker.submit(ask(), lambda event: None)
    with pytest.raises(EngineError, match="loading"):
        worker.wait_ready(0.05)
    assert not worker.close(0.05), "loading cannot be interrupted"
    go.set()
    assert worker.close(5)
    assert worker.state == "closed"


def test_drain_lets_running_and_waiting_requests_finish(make: MakeWorker) -> None:
    worker = make(FakeEngine(delay=0.02))
    events: list[list[Event]] = [[], []]
    for got in events:
        worker.submit(ask(5), got.append)
    assert worker.drain(10)
    assert [finishes(got) for got in events] == [[Finish("length")], [Finish("length")]]
    assert worker.state == "draining"
    with pytest.raises(EngineError, match="shutting down"):
        worker.submit(ask(), lambda event: None)


def test_drain_cancels_what_takes_too_long(make: MakeWorker) -> None:
    worker = make(FakeEngine(delay=0.05))
    events: list[list[Event]] = [[], []]
    for got in events:
        worker.submit(ask(400), got.append)
    before = time.monotonic()
    assert worker.drain(0.2)
    assert time.monotonic() - before < 2
    assert [finishes(got) for got in events] == [[Finish("cancelled")], [Finish("cancelled")]]


def test_close_ends_everything_and_frees_the_engine() -> None:
    engine = FakeEngine(delay=0.05)
    worker = Worker(lambda: engine, max_queue=4)
    worker.wait_ready(5)
    events: list[list[Event]] = [[], []]
    for got in events:
        worker.submit(ask(400), got.append)
    before = time.monotonic()
    assert worker.close(5)
    assert time.monotonic() - before < 1
    assert [finishes(got) for got in events] == [[Finish("cancelled")], [Finish("cancelled")]]
    assert worker.close(1), "closing twice is fine"
    with pytest.raises(EngineError, match="closed"):
        worker.wait_ready(1)


def test_retry_after_follows_the_recent_requests(make: MakeWorker) -> None:
    worker = make(FakeEngine(delay=5.0), 100)
    for _ in range(40):
        worker.submit(ask(), lambda event: None)
    assert worker.retry_after() == 40, "the first guess is a second a request"
    for _ in range(50):
        worker.submit(ask(), lambda event: None)
    assert worker.retry_after() == MAX_RETRY_AFTER


def test_many_threads_submit_and_cancel(make: MakeWorker) -> None:
    worker = make(FakeEngine(delay=0.0005), 1000)
    ends: list[list[Event]] = [[] for _ in range(200)]

    def client(start: int) -> None:
        for i in range(start, 200, 8):
            ticket = worker.submit(ask(3), ends[i].append)
            if i % 3 == 0:
                ticket.cancel()

    threads = [threading.Thread(target=client, args=(start,)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    until(lambda: all(finishes(got) for got in ends), 10)
    assert {len(finishes(got)) for got in ends} == {1}
    until(lambda: (worker.running, worker.waiting) == (0, 0))


def test_a_program_that_forgets_close_still_ends() -> None:
    code = (
        "from fake_engine import FakeEngine\nfrom nanoserve.worker import Worker\n"
        "Worker(FakeEngine, max_queue=1).wait_ready()\n"
    )
    here = Path(__file__).parent
    path = {"PYTHONPATH": f"{here}:{here.parent}"}
    subprocess.run([sys.executable, "-c", code], env=path, check=True, timeout=20)


def test_a_program_that_ends_amid_an_answer_ends() -> None:
    script = (
        "import time\n"
        "from nanoserve.request import Request, Token\n"
        "from nanoserve.worker import Worker\n"
        "class Endless:\n"
        "    def check(self, request): pass\n"
        "    def generate(self, request, cancelled):\n"
        "        from nanoserve.request import Finish\n"
        "        while not cancelled():\n"
        "            time.sleep(0.01)\n"
        "            yield Token(5)\n"
        "        yield Finish('cancelled')\n"
        "worker = Worker(Endless, max_queue=1)\n"
        "worker.wait_ready()\n"
        "stream = worker.stream(Request((5,)))\n"
        "next(stream)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
