"""An engine without a model: deterministic, as slow as wanted, and failing when told to."""

import hashlib
import math
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanoserve.config import ServerConfig, build
from nanoserve.errors import CheckpointError, ContextLengthError, RequestError
from nanoserve.random_tokenizer import write_tokenizer
from nanoserve.request import Event, Finish, PromptScores, Request, Token, TokenScore
from nanoserve.routes import Service
from nanoserve.server import Server, bind, leave, serve
from nanoserve.tokenizer import Tokenizer
from nanoserve.worker import Worker

VOCAB = 512
END = 11
MODEL = "org/fake"
PLAIN: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": False}}
"""In a chat's body: the prompt opens no reasoning, and all that the engine says is content."""


class FakeEngine:
    """Each token is a hash of prompt, seed and position, or comes from `script`.

    Attributes:
        delay: seconds before each token.
        script: token ids to answer with, then the end token; None draws them.
        fail: raised before token number `fail_at`.
        started: prompts that were begun.
    """

    def __init__(self, *, max_context: int = 512, delay: float = 0.0) -> None:
        self.max_context = max_context
        self.delay = delay
        self.script: list[int] | None = None
        self.fail: BaseException | None = None
        self.fail_at = 0
        self.started: list[tuple[int, ...]] = []

    def check(self, request: Request) -> None:
        if not request.prompt:
            raise RequestError("prompt is empty", param="prompt")
        if len(request.prompt) + (request.sampling.max_tokens != 0) > self.max_context:
            raise ContextLengthError(len(request.prompt), self.max_context)

    def generate(self, request: Request, cancelled: Callable[[], bool]) -> Iterator[Event]:
        self.started.append(request.prompt)
        params = request.sampling
        room = self.max_context - len(request.prompt)
        budget = room if params.max_tokens is None else min(params.max_tokens, room)
        if params.prompt_logprobs is not None:
            later = [score(id, params.prompt_logprobs) for id in request.prompt[1:]]
            yield PromptScores((None, *later))
        for position in range(budget):
            if self._wait(cancelled):
                yield Finish("cancelled")
                return
            if self.fail is not None and position == self.fail_at:
                raise self.fail
            token = self._token(request, position)
            yield Token(token, None if params.logprobs is None else score(token, params.logprobs))
            if token in params.stop_token_ids or (token == END and not params.ignore_eos):
                yield Finish("stop")
                return
        yield Finish("length")

    def _wait(self, cancelled: Callable[[], bool]) -> bool:
        end = time.monotonic() + self.delay
        while not cancelled():
            if (left := end - time.monotonic()) <= 0:
                return False
            time.sleep(min(left, 0.02))
        return True

    def _token(self, request: Request, position: int) -> int:
        if self.script is not None:
            return self.script[position] if position < len(self.script) else END
        key = repr((request.prompt, request.sampling.seed, position)).encode()
        return 20 + int.from_bytes(hashlib.sha256(key).digest()[:4], "big") % (VOCAB - 20)


def score(token: int, alternatives: int) -> TokenScore:
    """The token is the second likeliest; the last alternative is impossible."""
    likely = [((token + 1) % VOCAB, -0.25), (token, -1.5), *((i, -4.0 - i) for i in range(20, 60))]
    top = likely[:alternatives]
    if alternatives > 2:
        top[-1] = (top[-1][0], -math.inf)
    return TokenScore(-1.5, tuple(top))


def make_tokenizer(directory: Path) -> Tokenizer:
    directory.mkdir(parents=True, exist_ok=True)
    write_tokenizer(directory, VOCAB)
    tokenizer = Tokenizer.load(directory)
    assert tokenizer is not None
    return tokenizer


def make_service(worker: Worker, tokenizer: Tokenizer | None, engine: FakeEngine) -> Service:
    return Service(worker, tokenizer, MODEL, engine.max_context, VOCAB, frozenset({2}), {})


def plain_config(**options: object) -> ServerConfig:
    return build(ServerConfig, {"port": 0, **options}, env={})


@dataclass
class Running:
    """A server on loopback, in a thread of this process."""

    url: str
    port: int
    engine: FakeEngine
    worker: Worker
    server: Server

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)


@contextmanager
def running(
    tokenizer: Tokenizer | None, engine: FakeEngine, *, max_queue: int = 64, **options: object
) -> Generator[Running]:
    config = plain_config(**options)
    worker = Worker(lambda: engine, max_queue=max_queue)
    try:
        worker.wait_ready(10)
        sock = bind(config)
        port = sock.getsockname()[1]
        server = Server(config, make_service(worker, tokenizer, engine), sock)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield Running(f"http://127.0.0.1:{port}", port, engine, worker, server)
        finally:
            server.stop()
            worker.cancel_all()
            thread.join(20)
            assert not thread.is_alive()
    finally:
        assert worker.close(10)


def script(server: Running, tokenizer: Tokenizer, text: str) -> None:
    """Let the engine answer with this text."""
    server.engine.script = tokenizer.encode(text)


def prompt_of(server: Running, tokenizer: Tokenizer) -> str:
    """What the engine was asked last."""
    return tokenizer.decode(server.engine.started[-1], skip_special=False)


def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Wait for the condition."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.01)


def main() -> int:
    """A server process: DIRECTORY PORT DELAY LOAD_SECONDS [load error]."""
    directory, port, delay, load_seconds = sys.argv[1:5]
    engine = FakeEngine(delay=float(delay))

    def load() -> FakeEngine:
        time.sleep(float(load_seconds))
        if len(sys.argv) > 5:
            raise CheckpointError("model.safetensors", sys.argv[5])
        return engine

    config = plain_config(port=int(port), drain_timeout=10.0)
    sock = bind(config)
    worker = Worker(load, max_queue=4)
    service = make_service(worker, Tokenizer.load(Path(directory)), engine)
    return leave(serve(config, service, sock), worker)


if __name__ == "__main__":
    sys.exit(main())
