"""The server as a process: signals, exit codes, the port."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engine import make_tokenizer, plain_config, until

from nanoserve.errors import ConfigError
from nanoserve.server import bind

HERE = Path(__file__).parent
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]
LONG = {"messages": HI, "ignore_eos": True, "max_tokens": 450}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(directory)
    return directory


StartServer = Callable[..., tuple["subprocess.Popen[str]", str]]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


class TestProcess:
    @pytest.fixture
    def start(self, directory: Path) -> Iterator[StartServer]:
        processes: list[subprocess.Popen[str]] = []

        def start(delay: float = 0.0, load: float = 0.0, *error: str) -> tuple["subprocess.Popen[str]", str]:
            port = free_port()
            command = [
                sys.executable,
                str(HERE / "fake_engine.py"),
                str(directory),
                str(port),
                str(delay),
                str(load),
            ]
            env = {**os.environ, "PYTHONPATH": str(HERE.parent)}
            process = subprocess.Popen([*command, *error], env=env, stderr=subprocess.PIPE, text=True)
            processes.append(process)
            return process, f"http://127.0.0.1:{port}"

        yield start
        for process in processes:
            process.kill()
            process.wait()
            assert process.stderr is not None
            process.stderr.close()

    def wait(self, url: str, status: int = 200) -> None:
        def there() -> bool:
            with suppress(httpx.TransportError):
                return httpx.get(url + "/health").status_code == status
            return False

        until(there, 15)

    @pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
    def test_idle_ends_quickly_and_quietly(self, start: StartServer, sig: signal.Signals) -> None:
        """R7."""
        process, url = start()
        self.wait(url)
        before = time.monotonic()
        process.send_signal(sig)
        _, errors = process.communicate(timeout=10)
        assert time.monotonic() - before < 3
        assert process.returncode == 0
        assert "Traceback" not in errors
        assert f"listening on {url}/v1" in errors

    def test_a_running_stream_ends_well(self, start: StartServer) -> None:
        """R6."""
        process, url = start(0.05)
        self.wait(url)
        body = {**LONG, "max_tokens": 40, "stream": True}
        with httpx.stream("POST", url + CHAT, json=body, timeout=20) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            self.wait(url, 503)
            assert httpx.get(url + "/health").json() == {"status": "draining"}
            refused = httpx.post(url + CHAT, json=LONG)
            assert refused.status_code == 503
            assert "retry-after" in refused.headers
            assert "data: [DONE]" in list(lines)
        assert process.wait(5) == 0
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()

    @pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
    def test_a_second_signal_ends_at_once(self, start: StartServer, sig: signal.Signals) -> None:
        """R10: the process too, and without a word of the events that came too late."""
        process, url = start(0.1)
        self.wait(url)
        with httpx.stream("POST", url + CHAT, json={**LONG, "stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(sig)
            self.wait(url, 503)
            before = time.monotonic()
            process.send_signal(sig)
            with suppress(httpx.TransportError):
                assert "data: [DONE]" not in list(lines)
            _, errors = process.communicate(timeout=20)
            assert time.monotonic() - before < 1
        assert "Traceback" not in errors

    def test_a_second_signal_does_not_wait_for_a_stalled_reader(self, start: StartServer) -> None:
        """R10."""
        process, url = start()
        self.wait(url)
        body = {"prompt": [30], "max_tokens": 450, "n": 16, "logprobs": 20, "ignore_eos": True, "stream": True}
        data = json.dumps(body).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", int(url.rpartition(":")[2])))
            sock.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
            time.sleep(0.5)
            until(lambda: "nanoserve_num_requests_running 0" in httpx.get(url + "/metrics").text)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.7)
            assert process.poll() is None, "the last bytes get some time"
            before = time.monotonic()
            process.send_signal(signal.SIGTERM)
            assert process.wait(5) == 0
            assert time.monotonic() - before < 1, "not two seconds, which the last bytes have after one signal"

    def test_health_answers_while_large_bodies_are_prepared(self, start: StartServer) -> None:
        """R4. The clients' own work is not in the server's process."""
        _, url = start()
        self.wait(url)
        bodies: list[tuple[str, dict[str, Any]]] = [
            (TEXT, {"prompt": [30] * 500_000}),
            (CHAT, {"messages": HI * 20_000}),
        ]
        data = [(path, json.dumps(body).encode()) for path, body in bodies]
        headers = {"content-type": "application/json"}
        slowest, count = 0.0, 0
        # One client for all polls: httpx.get() loads the certificates each time, 70 ms that are not the server's.
        with ThreadPoolExecutor(8) as pool, httpx.Client(timeout=10) as client:
            jobs = [
                pool.submit(httpx.post, url + path, content=content, headers=headers, timeout=60)
                for path, content in data * 3
            ]
            while not all(job.done() for job in jobs):
                start_time = time.monotonic()
                assert client.get(url + "/health").status_code == 200
                slowest, count = max(slowest, time.monotonic() - start_time), count + 1
        assert {job.result().status_code for job in jobs} == {400}
        assert count >= 5
        assert slowest < 0.5

    def test_a_failed_load(self, start: StartServer) -> None:
        process, url = start(0.0, 1.5, "shape is wrong")
        self.wait(url, 503)  # loading: Python's own start, which takes long on a busy machine, is over
        before = time.monotonic()
        _, errors = process.communicate(timeout=20)
        assert time.monotonic() - before < 1.5 + 1
        assert process.returncode == 1
        assert errors.splitlines() == ["nanoserve: error: model.safetensors: shape is wrong"]

    def test_a_signal_while_loading(self, start: StartServer) -> None:
        process, url = start(0.0, 60.0)
        self.wait(url, 503)
        process.send_signal(signal.SIGTERM)
        assert process.wait(6) == 0


class TestBind:
    def test_a_port_in_use(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1 is in use"):
                bind(plain_config(port=port))

    def test_a_bound_port_is_ours(self) -> None:
        with bind(plain_config()) as first, pytest.raises(ConfigError, match="in use"):
            bind(plain_config(port=first.getsockname()[1]))

    @pytest.mark.parametrize("host", ["no such host", "203.0.113.1"])
    def test_a_host_that_is_not_ours(self, host: str) -> None:
        with pytest.raises(ConfigError, match=r"host|bound"):
            bind(plain_config(host=host))

    def test_loopback_is_the_default(self) -> None:
        """S3."""
        with bind(plain_config()) as sock:
            assert sock.getsockname()[0] == "127.0.0.1"
