"""What an operator relies on: the log as JSON, request ids, a red /health when the engine hangs, the drain."""

import asyncio
import io
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine, Running, make_service, plain_config, running, until
from starlette.testclient import TestClient

from nanoserve.answers import Answers
from nanoserve.choice import Choice
from nanoserve.config import ServerConfig, build
from nanoserve.errors import ConfigError
from nanoserve.logs import JsonFormatter, log_to_stderr
from nanoserve.metrics import Metrics, RequestRecord
from nanoserve.request import Event, Request, SamplingParams
from nanoserve.routes import create_app
from nanoserve.server import Server, bind, hang_timeout
from nanoserve.worker import Worker

TEXT = "/v1/completions"
IDS = {"prompt": [30, 31], "max_tokens": 3, "ignore_eos": True}


class Hanging(FakeEngine):
    """Makes two steps, then hangs until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = threading.Event()

    def generate(self, request: Request, cancelled: Callable[[], bool]) -> Iterator[Event]:
        for count, event in enumerate(super().generate(request, cancelled)):
            if count == 2:
                assert self.go_on.wait(20)
            yield event


class TestLog:
    @pytest.fixture
    def lines(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[dict[str, object]]]]:
        """What the server's own set-up writes to stderr, parsed line by line."""
        text = io.StringIO()
        monkeypatch.setattr("sys.stderr", text)
        logger = logging.getLogger("nanoserve")
        handlers, level = list(logger.handlers), logger.level
        log_to_stderr(as_json=True)
        yield lambda: [json.loads(line) for line in text.getvalue().splitlines()]
        logger.handlers[:], logger.level = handlers, level

    def test_a_request_is_one_object(self, lines: Callable[[], list[dict[str, object]]]) -> None:
        with running(None, FakeEngine(delay=0.01)) as server:
            answer = httpx.post(server.url + TEXT, json=IDS, headers={"x-request-id": "mine:1"})
            httpx.get(server.url + "/nope")
            httpx.get(server.url + "/health")
            until(lambda: len(lines()) >= 2)
        first, second = lines()
        assert answer.headers["x-request-id"] == "mine:1"
        numbers = {name: first.pop(name) for name in ("ms", "ttft_ms", "tok_s")}
        assert all(isinstance(number, float) and 5 < number < 5000 for number in numbers.values())
        assert str(first.pop("time")).endswith("+00:00")
        assert first == {
            "level": "INFO",
            "logger": "nanoserve.access",
            "id": "mine:1",
            "method": "POST",
            "path": TEXT,
            "status": 200,
            "prompt_tokens": 2,
            "completion_tokens": 3,
            "finish": "length",
        }
        assert (second["path"], second["status"]) == ("/nope", 404)
        assert "finish" not in second
        assert len(str(second["id"])) == 32

    def test_other_lines_are_objects_too(self) -> None:
        try:
            raise ValueError("a\nb")
        except ValueError as error:
            info = (ValueError, error, error.__traceback__)
        record = logging.LogRecord("nanoserve.x", logging.ERROR, "x.py", 1, "%s broke\n", ("it",), info)
        text = JsonFormatter().format(record)
        assert "\n" not in text
        line = json.loads(text)
        assert (line["level"], line["message"]) == ("ERROR", "it broke\n")
        assert "ValueError: a\nb" in line["exception"]

    def test_the_switch(self) -> None:
        assert not build(ServerConfig, {}, env={}).log_json
        for text, value in (("1", True), ("true", True), ("0", False), ("False", False)):
            assert build(ServerConfig, {}, env={"NANOSERVE_LOG_JSON": text}).log_json is value
        assert build(ServerConfig, {"log_json": True}, env={"NANOSERVE_LOG_JSON": "0"}).log_json
        for wrong in ("yes", "", "2"):
            with pytest.raises(ConfigError, match="NANOSERVE_LOG_JSON"):
                build(ServerConfig, {}, env={"NANOSERVE_LOG_JSON": wrong})
        with pytest.raises(ConfigError, match="log_json"):
            build(ServerConfig, {"log_json": 1}, env={})


class TestWatchdog:
    def test_a_hanging_engine_turns_health_red(self, caplog: pytest.LogCaptureFixture) -> None:
        """R13."""
        engine = Hanging()
        config = plain_config()
        worker = Worker(lambda: engine, max_queue=4, hang_timeout=0.3)
        worker.wait_ready(5)
        sock = bind(config)
        server = Server(config, make_service(worker, None, engine), sock)
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        threads = [threading.Thread(target=server.run, kwargs={"sockets": [sock]})]
        threads.append(
            threading.Thread(target=lambda: answers.append(httpx.post(url + TEXT, json=IDS, timeout=20)))
        )
        answers: list[httpx.Response] = []
        try:
            threads[0].start()
            until(lambda: server.started)
            assert httpx.get(url + "/health").json() == {"status": "ok"}
            before = time.monotonic()
            threads[1].start()
            until(lambda: httpx.get(url + "/health").status_code == 503)
            assert 0.3 < time.monotonic() - before < 2
            health = httpx.get(url + "/health").json()
            assert health["status"] == "hanging"
            assert "no step for" in health["reason"]
            until(lambda: "/health is red" in caplog.text)
            engine.go_on.set()
            until(lambda: httpx.get(url + "/health").status_code == 200)
            until(lambda: "the engine goes on" in caplog.text)
            assert caplog.text.count("/health is red") == 1
        finally:
            engine.go_on.set()
            server.stop()
            for thread in threads:
                thread.join(20)
            assert worker.close(10)
        assert answers[0].status_code == 200

    def test_steps_keep_it_green(self) -> None:
        """An answer may take much longer than the time-out, and so may an idle server's rest."""
        engine = FakeEngine(delay=0.1)
        worker = Worker(lambda: engine, max_queue=4, hang_timeout=0.5)
        client = TestClient(
            create_app(plain_config(), make_service(worker, None, engine)), base_url="http://localhost"
        )
        try:
            worker.wait_ready(5)
            time.sleep(0.6)
            thread = threading.Thread(target=lambda: client.post(TEXT, json={**IDS, "max_tokens": 10}))
            thread.start()
            until(lambda: worker.running == 1)
            while worker.running:
                assert client.get("/health").status_code == 200
                time.sleep(0.02)
            thread.join(10)
        finally:
            assert worker.close(5)

    def test_the_time_depends_on_the_device(self) -> None:
        """R13."""
        plain = plain_config()
        assert hang_timeout(plain, "cuda") == 20
        assert hang_timeout(plain, "cpu") >= 300
        for options in ({"hang_timeout": 7}, {"hang_timeout": 7.0}):
            assert hang_timeout(plain_config(**options), "cuda") == 7
        assert build(ServerConfig, {}, env={"NANOSERVE_HANG_TIMEOUT": "2.5"}).hang_timeout == 2.5
        with pytest.raises(ConfigError, match="hang_timeout"):
            plain_config(hang_timeout=0.0)


class TestReach:
    @pytest.mark.parametrize(
        ("options", "warned"),
        [({"host": "0.0.0.0"}, True), ({"host": "0.0.0.0", "api_key": "k"}, False), ({}, False)],
    )
    def test_an_open_door_is_told(
        self, options: dict[str, Any], warned: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        """S3."""
        with running(None, FakeEngine(), **options) as server:
            until(lambda: httpx.get(server.url + "/health", headers={"x-api-key": "k"}).status_code == 200)
            until(lambda: not warned or "reachable from other machines" in caplog.text)
        lines = [line for line in caplog.text.splitlines() if "reachable" in line]
        assert len(lines) == warned
        assert all("--api-key-file" in line and "--host 127.0.0.1" in line for line in lines)


class TestDrain:
    def test_events_after_the_loops_end_are_dropped(self, caplog: pytest.LogCaptureFixture) -> None:
        """R10. A second signal ends the event loop while a step may take long."""
        worker = Worker(lambda: FakeEngine(delay=0.05), max_queue=4)
        worker.wait_ready(5)

        async def ask() -> None:
            request = Request((30, 31), SamplingParams(max_tokens=50, ignore_eos=True))
            loop = asyncio.get_running_loop()
            Answers(worker, [request], [Choice(0, (), None)], RequestRecord(Metrics()), loop)

        asyncio.run(ask())
        until(lambda: worker.running == 1)
        time.sleep(0.1)
        assert worker.close(5)
        assert not caplog.records

    @pytest.fixture
    def server(self) -> Iterator[Running]:
        with running(None, FakeEngine(delay=0.05), drain_timeout=0.5) as server:
            yield server

    def test_what_runs_too_long_is_cancelled(self, server: Running) -> None:
        """The first 0.5 s belong to it; meanwhile others hear when to come back."""
        chunks: list[str] = []
        body = {**IDS, "prompt": [30], "max_tokens": 400, "stream": True, "logprobs": 0}
        with httpx.stream("POST", server.url + TEXT, json=body, timeout=20) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.server.stop()
            until(lambda: server.worker.state == "draining")
            before = time.monotonic()
            refused = httpx.post(server.url + TEXT, json=IDS)
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) >= 1
            assert httpx.get(server.url + "/health").json() == {"status": "draining"}
            with suppress(httpx.TransportError):
                chunks.extend(line for line in lines if line)
        assert 0.3 < time.monotonic() - before < 3
        assert len(chunks) >= 4, "it went on for a while"
        assert "[DONE]" not in chunks[-1]
