"""Server processes under load: 200 requests at once, and what 1,000 of them leave behind."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from fake_engine import PLAIN, make_tokenizer, until

HERE = Path(__file__).parent
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MB = 2**20


@dataclass(frozen=True)
class Process:
    """A server process and its address."""

    pid: int
    url: str

    def metric(self, name: str) -> float:
        """A gauge without labels."""
        found = re.search(rf"^nanoserve_{name} (\S+)$", httpx.get(self.url + "/metrics").text, re.MULTILINE)
        assert found
        return float(found[1])

    def idle(self) -> bool:
        return self.metric("num_requests_running") == self.metric("num_requests_waiting") == 0

    def resources(self) -> tuple[int, int, int]:
        """Resident bytes, open files and threads."""
        proc = Path(f"/proc/{self.pid}")
        status = dict(re.findall(r"^(\w+):\s+(\d+)", (proc / "status").read_text(), re.MULTILINE))
        return int(status["VmRSS"]) * 1024, len(os.listdir(proc / "fd")), int(status["Threads"])


@contextmanager
def started(log: Path, *arguments: object) -> Generator[Process]:
    """Run Python with these arguments until it says where it listens; the log goes to a file."""
    env = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    with (
        log.open("w") as errors,
        subprocess.Popen([sys.executable, *map(str, arguments)], env=env, stdout=errors, stderr=errors) as process,
    ):
        try:
            until(lambda: process.poll() is not None or "listening on" in log.read_text(), 60)
            found = re.search(r"listening on (http://[^/]+)/v1", log.read_text())
            assert found, log.read_text()
            until(lambda: httpx.get(found[1] + "/health").status_code == 200, 30)
            yield Process(process.pid, found[1])
        finally:
            process.kill()
    assert "Traceback" not in log.read_text()


def body_of(i: int) -> dict[str, Any]:
    """Chats that are told apart by their answers."""
    chat = [{"role": "user", "content": f"request {i}"}]
    return {"messages": chat, "max_tokens": 4, "seed": i, "ignore_eos": True}


def said(answer: httpx.Response) -> object:
    body = answer.json()
    return body["choices"], body["usage"]


def test_two_hundred_at_once_answer_as_alone_or_refuse(tmp_path: Path, random_checkpoint: Path) -> None:
    """R3, R18. A real engine, so that what is left of one request would show in the next one's answer."""
    options = ["--port", 0, "--device", "cpu", "--max-context", 256, "--max-queue", 24]
    with (
        started(tmp_path / "log", "-m", "nanoserve", "run", random_checkpoint, *options) as server,
        httpx.Client(limits=httpx.Limits(max_connections=200), timeout=60) as http,
        ThreadPoolExecutor(200) as pool,
    ):

        def ask(body: dict[str, Any]) -> httpx.Response:
            return http.post(server.url + CHAT, json=body)

        asked = [body_of(i) for i in range(10)]
        alone = [said(ask(body)) for body in asked]
        assert len(set(map(str, alone))) == len(asked)
        answers = list(pool.map(ask, asked * 20))
        assert {answer.status_code for answer in answers} == {200, 503}
        for i, answer in enumerate(answers):
            if answer.status_code == 200:
                assert said(answer) == alone[i % 10]
            else:
                assert int(answer.headers["retry-after"]) >= 1
                assert answer.json()["error"]["code"] == "queue_full"
        until(server.idle)


def mixed(http: httpx.Client, url: str, i: int) -> None:
    """One request of eight kinds: streamed or not, wrong, and left in the middle."""
    chat = body_of(i) | {"max_tokens": 8}
    kinds: tuple[tuple[str, dict[str, Any], int], ...] = (
        (CHAT, chat, 200),
        (CHAT, {**chat, "stream": True}, 200),
        (CHAT, {**chat, **PLAIN, "n": 3, "logprobs": True, "top_logprobs": 5}, 200),
        (TEXT, {"prompt": f"text {i}", "echo": True, "logprobs": 3}, 200),
        (TEXT, {"prompt": [30 + i % 100] * 200, "stream": True, "stop": ["a"]}, 200),
        (CHAT, {**chat, "temperature": -1}, 400),
        ("/tokenize", {"prompt": "a" * 500}, 200),
    )
    if i % 8 == 7:
        leave = {**chat, "stream": True, "max_tokens": 400, "n": 4}
        with http.stream("POST", url + CHAT, json=leave) as answer:
            next(answer.iter_lines())
        return
    path, body, status = kinds[i % 8]
    answer = http.post(url + path, json=body)
    while answer.status_code == 503:  # those that were left are still being taken away
        time.sleep(0.02)
        answer = http.post(url + path, json=body)
    assert answer.status_code == status, answer.text


def test_a_thousand_requests_leave_nothing_behind(tmp_path: Path) -> None:
    """R5."""
    directory = tmp_path / "tokenizer"
    make_tokenizer(directory)
    with (
        # A short rest at every token: without it the engine's thread would starve the server's.
        started(tmp_path / "log", HERE / "fake_engine.py", directory, 0, 0.0003, 0.0) as server,
        httpx.Client(timeout=20) as http,
    ):
        for i in range(160):  # what is made once, and caches that fill
            mixed(http, server.url, i)
        until(server.idle)
        memory, files, threads = server.resources()
        for i in range(1000):
            mixed(http, server.url, i)
        until(server.idle)
        after = server.resources()
        assert after[0] - memory < 20 * MB
        assert after[1] - files < 10
        assert after[2] - threads < 5
