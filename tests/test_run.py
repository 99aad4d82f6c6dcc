"""`nanoserve run` as a process, with the real engine: what a user's first minutes and a supervisor rely on."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
import torch
from conftest import DATA
from fake_engine import until
from hf_reference import reference_greedy, reference_model, write_twin
from openai.types.chat import ChatCompletionMessageParam
from safetensors.torch import load_file, save_file

Make = Callable[..., Path]
CHAT: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hello"}]


class Server:
    """A running `nanoserve run --port 0`; ``log`` is all of its output."""

    def __init__(self, *arguments: str | Path, env: dict[str, str] | None = None) -> None:
        command = [sys.executable, "-X", "faulthandler", "-m", "nanoserve", "run", *map(str, arguments)]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **(env or {})}
        )
        self.log = ""
        self._ready = threading.Event()
        self._url = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.log += line
            if match := re.search(r"listening on (http://\S+)", line):
                self._url = match[1]
                self._ready.set()
        self._ready.set()

    @property
    def url(self) -> str:
        """The base URL for clients, ending in /v1; waits until it is printed."""
        assert self._ready.wait(60), self.log
        assert self._url, self.log
        return self._url

    @property
    def root(self) -> str:
        return self.url.removesuffix("/v1")

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=60)

    def stop(self, with_signal: signal.Signals = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(with_signal)
        try:
            code = self.process.wait(30)
        except subprocess.TimeoutExpired:
            # What it hangs in is worth more than the bare fact, and a server left running would outlive pytest.
            self.process.send_signal(signal.SIGABRT)
            self.process.wait()
            self._reader.join(10)
            pytest.fail(f"the server does not end:\n{self.log}")
        self._reader.join(10)
        assert self.process.stdout
        self.process.stdout.close()
        return code


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(*arguments: str | Path, env: dict[str, str] | None = None) -> Server:
        servers.append(Server(*arguments, "--port", "0", "--device", "cpu", env=env))
        return servers[-1]

    yield start
    for server in servers:
        server.process.kill()
        server.stop()


@pytest.fixture(scope="module")
def server(random_checkpoint: Path) -> Iterator[Server]:
    server = Server(random_checkpoint, "--port", "0", "--device", "cpu", "--max-context", "512")
    yield server
    assert server.stop() == 0, server.log
    assert "Traceback" not in server.log


def test_the_plan_is_printed_before_the_weights_are_read(server: Server) -> None:
    assert server.url
    order = [server.log.index(words) for words in ("KV pages", "largest context", "weights 100%", "listening on")]
    assert order == sorted(order)


def test_chat_equals_the_references_greedy_tokens(server: Server, random_checkpoint: Path, tmp_path: Path) -> None:
    """The whole way of a token, from the wire to the wire, against transformers."""
    from nanoserve.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(random_checkpoint)
    assert tokenizer is not None
    ids = tokenizer.encode_chat(CHAT)  # type: ignore[arg-type]  # typed dicts are mappings
    reference = reference_model(write_twin(random_checkpoint, tmp_path / "twin"))
    want = reference_greedy(reference, ids, 32)
    answer = server.client().chat.completions.create(
        model="model", messages=CHAT, max_tokens=32, temperature=0, logprobs=True, extra_body={"ignore_eos": True}
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs
    assert [entry.token for entry in logprobs.content or []] == [tokenizer.token_text(id) for id in want]
    assert answer.usage
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 32)


def test_streamed_and_whole_answers_are_the_same(server: Server) -> None:
    client, options = server.client(), {"model": "model", "max_tokens": 40, "seed": 7}
    whole = client.completions.create(prompt="abc", **options)  # type: ignore[arg-type]
    pieces = client.completions.create(prompt="abc", stream=True, **options)  # type: ignore[arg-type]
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text


def test_an_abandoned_stream_frees_the_engine(server: Server) -> None:
    """R2."""
    client = server.client()
    for _ in range(5):
        stream = client.chat.completions.create(
            model="model", messages=CHAT, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        stream.close()
    started = time.monotonic()
    client.completions.create(model="model", prompt=[5], max_tokens=1)
    assert time.monotonic() - started < 3


def test_many_at_once_get_the_single_answer(server: Server) -> None:
    want = server.client().completions.create(model="model", prompt=[5, 6], max_tokens=8, temperature=0)
    got: list[str] = []

    def ask() -> None:
        answer = server.client().completions.create(model="model", prompt=[5, 6], max_tokens=8, temperature=0)
        got.append(answer.choices[0].text)

    threads = [threading.Thread(target=ask) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [want.choices[0].text] * 20


def test_over_long_prompts_are_refused_and_full_ones_answered(server: Server) -> None:
    """R14, R15."""
    client = server.client()
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="model", prompt=[5] * 512, max_tokens=1)
    assert caught.value.code == "context_length_exceeded"
    answer = client.completions.create(model="model", prompt=[5] * 511, max_tokens=50)
    assert answer.choices[0].finish_reason in ("length", "stop")
    assert answer.usage
    assert answer.usage.completion_tokens == 1


def test_sigterm_lets_a_stream_finish(serve: Callable[..., Server], random_checkpoint: Path) -> None:
    """R6. And what an operator has set reaches the server: a log in JSON, a watchdog that barks at every step."""
    watchdog = {"NANOSERVE_HANG_TIMEOUT": "0.0001"}
    server = serve(random_checkpoint, "--max-context", "400", "--log-json", env=watchdog)
    body = {"model": "model", "prompt": [5], "max_tokens": 150, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{server.url}/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        while httpx.get(f"{server.root}/health").json()["status"] != "hanging":
            pass
        server.process.terminate()
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert server.stop() == 0
    assert "Traceback" not in server.log
    logged = [json.loads(line) for line in server.log.splitlines() if line.startswith("{")]
    (request,) = [line for line in logged if line["logger"] == "nanoserve.access"]
    assert (request["path"], request["completion_tokens"]) == ("/v1/completions", 150)
    assert any("/health is red" in line.get("message", "") for line in logged)


@pytest.mark.parametrize("with_signal", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_server_ends_at_once(
    serve: Callable[..., Server], random_checkpoint: Path, with_signal: signal.Signals
) -> None:
    """R7."""
    server = serve(random_checkpoint)
    assert server.url
    started = time.monotonic()
    assert server.stop(with_signal) == 0
    assert time.monotonic() - started < 5
    assert "Traceback" not in server.log


def test_a_killed_server_can_start_again_on_its_port(
    serve: Callable[..., Server], random_checkpoint: Path
) -> None:
    """R8."""
    first = serve(random_checkpoint)
    port = first.root.rpartition(":")[2]
    body = {"prompt": [5], "stream": True, "ignore_eos": True, "max_tokens": 4000}
    with httpx.stream("POST", f"{first.url}/completions", json=body, timeout=60) as answer:
        next(answer.iter_lines())
        first.process.kill()
        first.stop()
    second = Server(random_checkpoint, "--port", port, "--device", "cpu")
    assert second.url.endswith(f":{port}/v1")
    assert second.client().completions.create(model="model", prompt=[5], max_tokens=1).choices
    assert second.stop() == 0


def children(process: int) -> set[int]:
    """Its children that live."""
    tasks = Path(f"/proc/{process}/task").glob("*/children")
    return {int(child) for task in tasks for child in task.read_text().split()}


def lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("with_signal", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_the_server(
    serve: Callable[..., Server], random_checkpoint: Path, with_signal: signal.Signals
) -> None:
    """R6, R8. Not even one that tries a grammar out."""
    server = serve(random_checkpoint)
    hostile = {"allOf": [{"type": "integer", "multipleOf": m} for m in (9973, 9967)]}
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(httpx.post, f"{server.url}/completions", json={"prompt": "a", "guided_json": hostile})
        until(lambda: bool(children(server.process.pid)), 20)
        born = children(server.process.pid)
        assert server.stop(with_signal) == (0 if with_signal == signal.SIGTERM else -signal.SIGKILL)
        asked.exception(10)
    until(lambda: not any(map(lives, born)), 10)
    assert "Traceback" not in server.log


def test_a_broken_engine_ends_the_process(make_checkpoint: Make, serve: Callable[..., Server]) -> None:
    """R12. The client hears of it, /health turns red, and a supervisor can start another."""
    directory = make_checkpoint()
    tensors = load_file(directory / "model.safetensors")
    tensors["backbone.layers.0.mixer.A_log"][:] = torch.nan
    save_file(tensors, directory / "model.safetensors")
    server = serve(directory)
    body = {"prompt": [5], "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{server.url}/completions", json=body, timeout=60) as answer:
        lines = [line for line in answer.iter_lines() if line]
    health = httpx.get(f"{server.root}/health")
    assert (health.status_code, health.json()) == (503, {"status": "broken"})
    assert len(lines) == 1, "no token of a damaged model"
    assert "damaged" in json.loads(lines[0].removeprefix("data: "))["error"]["message"]
    assert server.process.wait(10) == 1
    server.stop()
    assert "the server ends" in server.log


def test_a_prompt_seen_before_is_answered_as_if_it_were_not(server: Server, random_checkpoint: Path) -> None:
    """R19. Whatever is kept of prompts. Nothing is yet, and cached_tokens says so."""
    import nanoserve

    first = list(range(20, 420))
    edited = [*first[:200], 7, *first[201:]]
    prompts = [first, first, edited, first[:300], [*first, 9, 8], first]
    wanted: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        body = {"prompt": prompt, "max_tokens": 12, "temperature": 0, "return_token_ids": True}
        answer = httpx.post(f"{server.url}/completions", json={**body, "ignore_eos": True}, timeout=60).json()
        assert 0 <= answer["usage"]["prompt_tokens_details"]["cached_tokens"] < len(prompt)
        if (same := prompts.index(prompt)) == i:
            with nanoserve.load(random_checkpoint, device="cpu", max_context=512) as cold:
                wanted[i] = cold.generate(prompt, max_tokens=12, temperature=0.0, ignore_eos=True).token_ids
        assert answer["choices"][0]["token_ids"] == wanted[same]


def test_a_taken_port_is_one_line_before_anything_is_loaded(random_checkpoint: Path) -> None:
    """R9."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = Server(random_checkpoint, "--port", str(taken.getsockname()[1]))
        assert server.stop() != 0 if server.process.wait(30) else False
    assert server.log.count("\n") == 1
    assert "in use" in server.log


def test_a_fault_in_the_data_ends_the_server_with_one_line(make_checkpoint: Make) -> None:
    """R16."""
    directory = make_checkpoint()
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors["backbone.layers.1.mixer.experts.3.up_proj.weight_scale_2"] *= torch.nan
    save_file(tensors, file)
    server = Server(directory, "--port", "0", "--device", "cpu")
    assert server.process.wait(30) == 1
    server.stop()
    errors = [line for line in server.log.splitlines() if "error" in line]
    assert len(errors) == 1
    assert "experts.3.up_proj.weight_scale_2" in errors[0]
    assert "Traceback" not in server.log


def test_without_a_model_the_demonstration_model_answers(serve: Callable[..., Server]) -> None:
    server = serve()
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What can you do?"}]
    answer = server.client().chat.completions.create(model="nanoserve-demo", messages=messages, temperature=0)
    assert answer.choices[0].finish_reason == "stop"
    assert "small demonstration model" in (answer.choices[0].message.content or "")
    assert "demonstration model" in server.log


@pytest.mark.parametrize("words", ["demonstration model", "largest context"])
def test_a_server_that_is_ended_while_it_starts_says_nothing_more(words: str) -> None:
    server = Server("--port", "0", "--device", "cpu")
    while words not in server.log and server.process.poll() is None:
        time.sleep(0.005)
    assert server.stop() in (0, 128 + signal.SIGTERM)
    assert "Traceback" not in server.log


DROPPED = """
import os, signal
from nanoserve.signals import hearing, leave

class Dropped:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)  # the handler runs in here, where Python drops exceptions

with hearing(leave, signal.SIGTERM):
    Dropped()
    print("went on")
"""


def test_a_signal_is_heard_where_python_drops_exceptions() -> None:
    done = subprocess.run([sys.executable, "-c", DROPPED], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "")


def test_a_signal_that_was_ignored_stays_ignored() -> None:
    """`nohup nanoserve run` outlives its terminal."""
    code = DROPPED.replace("SIGTERM", "SIGHUP").replace(
        "import os, signal", "import os, signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "went on\n")


def test_a_checkpoint_without_tokenizer_serves_ids(serve: Callable[..., Server]) -> None:
    """R16."""
    server = serve(DATA / "super_mixed")
    answer = httpx.post(
        f"{server.url}/completions", json={"prompt": [5, 6], "max_tokens": 3, "logprobs": 2}
    ).json()
    assert len(answer["choices"][0]["logprobs"]["tokens"]) <= 3
    refused = httpx.post(f"{server.url}/chat/completions", json={"messages": CHAT})
    assert refused.status_code == 400
    assert "tokenizer" in refused.json()["error"]["message"]


def test_the_key_guards_every_route_but_health(
    serve: Callable[..., Server], random_checkpoint: Path, tmp_path: Path
) -> None:
    """S6."""
    key = tmp_path / "key"
    key.write_text("sesame\n")
    for server in (
        serve(random_checkpoint, "--api-key-file", key),
        serve(random_checkpoint, env={"NANOSERVE_API_KEY": "sesame"}),
    ):
        assert server.client("sesame").models.list().data[0].id == "model"
        with pytest.raises(openai.AuthenticationError):
            server.client("wrong").models.list()
        assert httpx.get(f"{server.root}/health").status_code == 200
        assert httpx.get(f"{server.root}/metrics").status_code == 401
        assert httpx.get(f"{server.root}/").headers["content-type"] == "text/html; charset=utf-8"
        assert "sesame" not in server.log


def test_echoed_logprobs_are_the_engines_scores(server: Server, random_checkpoint: Path) -> None:
    """What lm-eval's loglikelihood asks for."""
    import nanoserve

    ids = [5, 100, 200, 300, 301, 7]
    body = {"prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 1}
    answer = httpx.post(f"{server.url}/completions", json=body).json()
    scores = answer["choices"][0]["logprobs"]["token_logprobs"]
    with nanoserve.load(random_checkpoint, device="cpu", max_context=64) as engine:
        assert scores[0] is None
        assert scores[1:] == pytest.approx(engine.score(ids), abs=1e-4)
    assert json.dumps(answer)
