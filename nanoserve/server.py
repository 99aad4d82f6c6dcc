"""The server process: a socket, uvicorn, signals, and the worker's life around them."""

import asyncio
import errno
import logging
import os
import resource
import socket
import sys
import time
from types import FrameType
from typing import NoReturn

import uvicorn

from nanoserve.config import ServerConfig
from nanoserve.errors import ConfigError, NanoserveError
from nanoserve.http_guard import is_loopback
from nanoserve.http_timeouts import MAX_HEADER_BYTES, timed_protocol
from nanoserve.logs import log_to_stderr
from nanoserve.routes import Service, create_app
from nanoserve.worker import CANCEL_GRACE, Worker, WorkerState

__all__ = ["Service", "bind", "create_app", "hang_timeout", "leave", "serve"]

log = logging.getLogger("nanoserve.server")

MAX_FILES = 4096
"""File descriptors are plenty at this number: one request runs at a time."""

BACKLOG = 100
"""Connections that asyncio accepts in one go; a large number here could use up the file descriptors."""

KEEP_ALIVE = 75
"""Seconds that an idle connection is kept."""

FLUSH_TIME = 3
"""Seconds in which the last bytes of answers must leave, after the engine has stopped."""

CLOSE_TIME = 3.0
"""Seconds that the worker's thread has to end; one that is loading or hangs cannot be interrupted."""

LAST_WORDS = 1.0
"""Seconds between a failure of the engine and the end: running answers tell it, and /health says so, meanwhile."""

HANG_TIMEOUTS = {"cuda": 20.0, "cpu": 600.0}
"""Seconds without a step; one of a large model's prefill takes a GPU less than one, and may take a CPU minutes."""


def hang_timeout(config: ServerConfig, device: str) -> float:
    """Seconds without a step after which the engine is said to hang, on a device of this type."""
    return HANG_TIMEOUTS[device] if config.hang_timeout is None else config.hang_timeout


def bind(config: ServerConfig) -> socket.socket:
    """Take the port, before anything is loaded.

    Raises:
        ConfigError: it is in use, or not ours to take.
    """
    try:
        family = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0][0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"host {config.host!r} cannot be resolved: {error}") from error
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((config.host, config.port))
        # Listening makes the port ours: two sockets with SO_REUSEADDR may both be bound to it.
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        what = "is in use" if error.errno == errno.EADDRINUSE else "cannot be bound"
        raise ConfigError(f"port {config.port} on {config.host} {what}: {error.strerror}") from error
    return sock


def serve(config: ServerConfig, service: Service, sock: socket.socket) -> int:
    """Serve until SIGTERM or SIGINT: then /health turns red and running requests get the drain timeout.

    Serving ends too when the engine breaks, once the running answers have told it. A second signal ends at once,
    and the process with it. The worker is closed at the end; one that hangs may be left not ``ended``.

    Returns:
        Exit code: 0, or 1 when the model could not be loaded or the engine broke.
    """
    log_to_stderr(as_json=config.log_json)
    patience = CLOSE_TIME
    try:
        server = Server(config, service, sock)
        server.run(sockets=[sock])
        patience = 0.5 if server.force_exit else CLOSE_TIME
    finally:
        service.worker.close(patience)
    if server.force_exit:
        _end(server.exit_code)  # Python's own way out takes a second or two, with torch to be taken down
    return server.exit_code


def leave(code: int, worker: Worker) -> int:
    """Return ``code``; or end the process with it at once, where its exit would wait for a worker that hangs.

    To be called when nothing is left to clean up.
    """
    if not worker.ended:
        log.warning("the engine does not end: leaving without it")
        _end(code)
    return code


def _end(code: int) -> NoReturn:
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(code)


def _connection_limit() -> int:
    """A third of the files that this process may open, after asking for as many as the system allows.

    `BACKLOG` more may be accepted before the first of them is dropped.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = hard if hard != resource.RLIM_INFINITY else MAX_FILES
    if soft < min(wanted, MAX_FILES):
        soft = min(wanted, MAX_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return soft // 3


class Server(uvicorn.Server):
    """uvicorn with a drain before its own shutdown, and exit codes.

    Attributes:
        exit_code: of the process, when `run` has returned.
    """

    def __init__(self, config: ServerConfig, service: Service, sock: socket.socket) -> None:
        # The protocol's deadline comes a little later than `read_body`'s, which answers with words.
        protocol = timed_protocol(config.header_timeout, config.body_timeout + 1.0, _connection_limit())
        super().__init__(
            uvicorn.Config(
                create_app(config, service, sock.getsockname()[0]),
                http=protocol,
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=BACKLOG,
                timeout_keep_alive=KEEP_ALIVE,
                timeout_graceful_shutdown=FLUSH_TIME,
                h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            )
        )
        self._options, self._service = config, service
        self._address = sock.getsockname()
        self._seen: WorkerState = "loading"
        self._hung = False
        self._signals = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._broke_at: float | None = None
        self._give_up_at: float | None = None
        self._cancelled = False
        self.exit_code = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came; acted upon by the event loop within 0.1 s."""
        self._signals += 1
        if self._signals > 1:
            self.force_exit = True
            if self._loop is not None:
                # No more ticks come while uvicorn's own shutdown waits, from Python 3.12 on for every connection.
                self._loop.call_soon_threadsafe(self._abort)

    def stop(self) -> None:
        """As the first signal does."""
        self._signals = max(self._signals, 1)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: follow the worker and the signals; true ends the server."""
        self._loop = asyncio.get_running_loop()
        self._follow_worker()
        self._watch_steps()
        if self._signals > 1:
            self._abort()
        elif self._signals == 1:
            self._drain()
        elif self._broke_at is not None and time.monotonic() > self._broke_at + LAST_WORDS:
            self.should_exit = True
        return await super().on_tick(counter)

    def _follow_worker(self) -> None:
        worker = self._service.worker
        if worker.state == self._seen:
            return
        before, self._seen = self._seen, worker.state
        if self._seen == "ready":
            self._announce()
        elif self._seen == "broken":
            self.exit_code = 1
            if before == "loading":
                self._tell_load_error()
                self.should_exit = True
            else:  # nothing can be served any more: who watches over this process is to start another
                self._broke_at = time.monotonic()
                log.error("%s: the server ends", self._service.worker.failure)

    def _watch_steps(self) -> None:
        """Log when the engine begins to hang, and when it goes on; /health says so by itself."""
        reason = self._service.worker.hanging()
        if reason is not None and not self._hung:
            log.error("%s; /health is red", reason)
        elif reason is None and self._hung:
            log.warning("the engine goes on: it hung for a while")
        self._hung = reason is not None

    def _tell_load_error(self) -> None:
        try:
            self._service.worker.wait_ready(0)
        except NanoserveError as error:
            print(f"nanoserve: error: {error}", file=sys.stderr, flush=True)

    def _announce(self) -> None:
        host, port = self._address[:2]
        if not is_loopback(host) and self._options.api_key is None:
            log.warning(
                "%s is reachable from other machines and no API key is set: anyone there can use the model; "
                "set NANOSERVE_API_KEY or --api-key-file, or use --host 127.0.0.1",
                host,
            )
        shown = f"[{host}]" if ":" in host else host
        base = f"http://{shown}:{port}"
        print(f"listening on {base}/v1\nchat page at {base}/", file=sys.stderr, flush=True)

    def _drain(self) -> None:
        worker, now = self._service.worker, time.monotonic()
        if self._give_up_at is None:
            worker.start_drain()
            self._give_up_at = now + self._options.drain_timeout
            if worker.running:
                log.info("draining: running requests have %g s", self._options.drain_timeout)
        if not (worker.running or worker.waiting) or now > self._give_up_at + CANCEL_GRACE:
            self.should_exit = True
        elif now > self._give_up_at and not self._cancelled:
            self._cancelled = True
            worker.cancel_all()

    def _abort(self) -> None:
        self.should_exit = self.force_exit = True
        for connection in list(self.server_state.connections):
            connection.transport.abort()
