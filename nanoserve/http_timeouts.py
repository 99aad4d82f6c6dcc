"""uvicorn's HTTP/1.1 protocol with limits on the time in which a client must send what it began.

uvicorn itself waits for ever for the rest of a header or a body. Here the first header, a later header once
its first byte is there, and a body have a deadline; a keep-alive connection between requests (uvicorn has a
limit of its own for it) and a long answer have none.
"""

import asyncio
import socket
import sys
from typing import Literal, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from nanoserve.http_guard import LINGER_SECONDS, to_json
from nanoserve.protocol import error_object

Phase = Literal["header", "body"]

MAX_HEADER_BYTES = 32 * 1024

STALLED_READER = 120.0
"""Seconds after which the kernel drops a client that does not take the bytes sent to it."""


def timed_protocol(header_timeout: float, body_timeout: float, connections: int) -> type[H11Protocol]:
    """The protocol class for ``uvicorn.Config(http=...)``.

    Args:
        header_timeout: seconds for a request's line and headers.
        body_timeout: seconds for its body.
        connections: one more is dropped, so that the process never runs out of file descriptors.
    """

    class Timed(TimedProtocol):
        header_limit = header_timeout
        body_limit = body_timeout
        connection_limit = connections

    return Timed


class TimedProtocol(H11Protocol):
    """See the module; made by `timed_protocol`."""

    header_limit: float
    body_limit: float
    connection_limit: int
    _timer: asyncio.TimerHandle | None = None
    _watched: tuple[Phase, int] | None = None
    _refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:
        """A client connected: its header is due."""
        super().connection_made(transport)
        if len(self.connections) > self.connection_limit:
            self._refused = True
            transport.abort()
            return
        sock: socket.socket | None = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            # asyncio does this only for sockets made with an explicit protocol number; without it, a token
            # waits 40 ms for the client's delayed acknowledgement of the one before.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            option = getattr(socket, "TCP_USER_TIMEOUT", None)  # Linux only
            if option is not None:
                sock.setsockopt(socket.IPPROTO_TCP, option, int(STALLED_READER * 1e3))
        self._watch(("header", 0))

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._watch(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes came."""
        if self._refused:
            return
        if self.conn.their_state is h11.IDLE and self._is_long_header(data):
            self._refuse(431, f"the header has more than {MAX_HEADER_BYTES} bytes", "header_too_large")
            return
        super().data_received(data)
        self._watch(self._due())

    def _is_long_header(self, data: bytes) -> bool:
        """Whether the header that these bytes begin or go on with is over the limit.

        h11 has a limit for incomplete headers only; a whole one that comes at once passes it.
        """
        seen = self.conn.trailing_data[0] + data[: MAX_HEADER_BYTES + 4]
        end = seen.find(b"\r\n\r\n")
        return (len(seen) if end < 0 else end) > MAX_HEADER_BYTES

    def on_response_complete(self) -> None:
        """An answer was sent; the next request may already be here."""
        super().on_response_complete()
        self._watch(self._due())

    def _due(self) -> tuple[Phase, int] | None:
        """What the client has begun and not finished, and of which request."""
        state = self.conn.their_state
        cycle = cast("object | None", self.cycle)  # None before the first request, whatever uvicorn declares
        request = 0 if cycle is None else id(cycle)
        if self.transport.is_closing():
            return None
        if state is h11.SEND_BODY:
            return ("body", request)
        if state is h11.IDLE and (cycle is None or self.conn.trailing_data[0]):
            return ("header", request)
        return None

    def _watch(self, due: tuple[Phase, int] | None) -> None:
        if due == self._watched:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._watched = due
        self._timer = None
        if due is not None:
            limit = self.header_limit if due[0] == "header" else self.body_limit
            self._timer = self.loop.call_later(limit, self._expire)

    def _expire(self) -> None:
        # abort, not close: close would wait for a client that may not be reading either
        self.transport.abort()

    def _should_upgrade(self) -> bool:
        return False  # no WebSockets here; and no advice in the log, a request, to install a library for them

    def send_400_response(self, msg: str) -> None:
        """Malformed HTTP: an error object, 431 when the header is too large."""
        error = sys.exc_info()[1]
        if isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == 431:
            self._refuse(431, f"the header has more than {MAX_HEADER_BYTES} bytes", "header_too_large")
        else:
            self._refuse(400, "malformed HTTP request", "malformed_http")

    def _refuse(self, status: int, message: str, code: str) -> None:
        """Answer without the application, and end the connection."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()  # an answer is under way already
            return
        body = to_json(error_object(message, kind="invalid_request_error", code=code))
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("connection", "close"),
        ]
        response = h11.Response(status_code=status, headers=headers)
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self._linger()

    def _linger(self) -> None:
        """Read on for a while: closing while bytes arrive would reset the connection and lose the answer."""
        self._refused = True
        cycle = cast("RequestResponseCycle | None", self.cycle)
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True  # its handler is waiting for a body that will not come
            cycle.message_event.set()
        self._watch(None)
        self._timer = self.loop.call_later(LINGER_SECONDS, self._expire)
        self.transport.write_eof()
