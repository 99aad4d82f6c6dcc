"""What stands before the routes: Host, CORS and API key checks, body limits, the request's id and log line."""

import asyncio
import hmac
import ipaddress
import json
import logging
import re
import socket
import uuid
from collections.abc import Mapping
from contextlib import aclosing
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanoserve.config import ServerConfig
from nanoserve.errors import ConfigError, RequestError
from nanoserve.logs import log_request
from nanoserve.metrics import Metrics, RequestRecord
from nanoserve.protocol import anthropic_error, error_object

log = logging.getLogger("nanoserve.http")

LINGER_BYTES = 32 * 1024 * 1024
LINGER_SECONDS = 2.0
"""A refused body is read this far, so that the client gets the answer before the connection breaks."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_HEADER_NAMES = re.compile(r"[A-Za-z0-9-]+(?: ?, ?[A-Za-z0-9-]+){0,63}")
_OPEN_PATHS = ("/health", "/")
"""What needs no key: the page holds no secret, and asks for the key itself."""

_RECORD = "nanoserve.record"
_ID = "nanoserve.id"


class JsonResponse(Response):
    """JSON in ASCII: no line separator of Unicode can break a client's line splitting."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The body's bytes."""
        return to_json(content)


def to_json(content: Any) -> bytes:
    """Compact JSON in ASCII.

    Raises:
        ValueError: a number that JSON does not have.
    """
    return json.dumps(content, separators=(",", ":"), allow_nan=False).encode("ascii")


class LingeringResponse(JsonResponse):
    """An answer to a body that was not read: closes the connection, but not in the client's face."""

    def __init__(self, content: Any, status_code: int, request: Request) -> None:
        super().__init__(content, status_code)
        self._request = request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer, read on for a while, then end."""
        self.headers["connection"] = "close"
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": bytes(self.body), "more_body": True})
        try:
            async with asyncio.timeout(LINGER_SECONDS), aclosing(self._request.stream()) as parts:
                left = LINGER_BYTES
                async for part in parts:
                    left -= len(part)
                    if left < 0:
                        break
        except (TimeoutError, ClientDisconnect, RuntimeError):
            pass  # it was a courtesy; RuntimeError: the body had been read to its end
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def record_of(scope: Scope) -> RequestRecord:
    """The request's record."""
    return scope[_RECORD]


def request_id_of(scope: Scope) -> str:
    """The request's id: the client's if it is harmless, else our own."""
    return scope[_ID]


def is_anthropic(path: str) -> bool:
    """Whether clients of Anthropic's interface ask here, who read errors of its shape."""
    return path == "/v1/messages" or path.startswith("/v1/messages/")


def error_body(scope: Scope, status: int, error: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's error object in the shape that the path's clients read."""
    return anthropic_error(error, status, request_id_of(scope)) if is_anthropic(scope["path"]) else error


async def read_body(request: Request, config: ServerConfig) -> bytes:
    """The body of a POST.

    Raises:
        RequestError: not JSON by its Content-Type (415), too large (413), or too slow (408).
        ClientDisconnect: the client left.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError("Content-Type must be application/json", code="unsupported_media_type", status=415)
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise RequestError(
            "Content-Encoding is not supported: send plain JSON", code="unsupported_media_type", status=415
        )
    length = request.headers.get("content-length", "")
    if length.isdecimal() and (len(length) > 18 or int(length) > config.max_body_bytes):
        raise _too_large(config)
    body = bytearray()
    try:
        async with asyncio.timeout(config.body_timeout), aclosing(request.stream()) as parts:
            async for part in parts:
                body += part
                if len(body) > config.max_body_bytes:
                    raise _too_large(config)
    except TimeoutError as error:
        raise RequestError(
            f"the body did not arrive within {config.body_timeout:g} s", code="request_timeout", status=408
        ) from error
    return bytes(body)


def _too_large(config: ServerConfig) -> RequestError:
    return RequestError(
        f"the body may have at most {config.max_body_bytes} bytes", code="body_too_large", status=413
    )


class Guard:
    """ASGI middleware around everything.

    Args:
        app: the routes.
        config: hosts, origins and key.
        metrics: the server's totals.
        address: what the socket is bound to; names other than local ones are refused on loopback.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig, metrics: Metrics, address: str) -> None:
        self._app = app
        self._metrics = metrics
        self._key = config.api_key.strip().encode() if config.api_key else None
        self._origins = frozenset(config.cors_origins)
        self._hosts = _allowed_hosts(config) if is_loopback(address) else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one HTTP request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        record = scope[_RECORD] = RequestRecord(self._metrics)
        request_id = scope[_ID] = _request_id(headers.get("x-request-id", ""))
        extra = {"x-request-id": request_id, **self._cors_headers(headers)}
        if is_anthropic(scope["path"]):
            extra["request-id"] = request_id

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(raw=message.setdefault("headers", [])).update(extra)
            await send(message)

        app = self._refusal(scope, headers) or self._app
        try:
            await app(scope, receive, send_marked)
        except (ClientDisconnect, asyncio.CancelledError):
            record.status = 499
        except Exception:
            log.exception("request %s failed", request_id)
            if record.status is None:
                failure = _error(scope, 500, "the server failed: see its log", "server_error", "internal_error")
                await failure(scope, receive, send_marked)
        finally:
            record.close()
            log_request(scope, record, request_id)

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        """The answer to a request that may not pass."""
        if self._hosts is not None and not _is_allowed(headers.get("host"), self._hosts):
            message = "this Host is not served: use localhost, or start the server with --allowed-host"
            return _error(scope, 403, message, "invalid_request_error", "host_not_allowed")
        if scope["method"] == "OPTIONS" and headers.get("origin") in self._origins:
            return Response(status_code=204)
        if scope["path"] not in _OPEN_PATHS and self._key is not None and not self._has_key(headers):
            message = "a valid API key is needed: send Authorization: Bearer KEY, or x-api-key: KEY"
            refusal = _error(scope, 401, message, "authentication_error", "invalid_api_key")
            refusal.headers["www-authenticate"] = "Bearer"
            return refusal
        return None

    def _has_key(self, headers: Headers) -> bool:
        assert self._key is not None
        scheme, _, token = headers.get("authorization", "").partition(" ")
        offered = [token.strip()] if scheme.lower() == "bearer" else []
        offered += headers.getlist("x-api-key")
        return any(hmac.compare_digest(key.encode("latin-1"), self._key) for key in offered)

    def _cors_headers(self, headers: Headers) -> Mapping[str, str]:
        if not self._origins:
            return {}
        origin = headers.get("origin")
        if origin not in self._origins:
            return {"vary": "Origin"}
        return {
            "vary": "Origin",
            "access-control-allow-origin": origin,
            "access-control-allow-methods": "GET, POST",
            "access-control-allow-headers": _allowed_headers(headers.get("access-control-request-headers", "")),
            "access-control-expose-headers": "x-request-id, request-id, retry-after",
            "access-control-max-age": "600",
        }


def _allowed_headers(requested: str) -> str:
    """What a page of an allowed origin may send: what it asks for, since SDKs have headers of their own."""
    standard = "authorization, content-type, x-api-key, x-request-id"
    return requested if _HEADER_NAMES.fullmatch(requested) else standard


def _error(scope: Scope, status: int, message: str, kind: str, code: str) -> JsonResponse:
    body = error_body(scope, status, error_object(message, kind=kind, code=code))
    return JsonResponse(body, status_code=status)


def _request_id(offered: str) -> str:
    return offered if _REQUEST_ID.fullmatch(offered) else uuid.uuid4().hex


def check_origins(config: ServerConfig) -> None:
    """Refuse a wildcard, which would let every web page use the model.

    Raises:
        ConfigError: the CORS origins hold a wildcard.
    """
    if "*" in config.cors_origins:
        raise ConfigError("cors_origins is '*' and must name the origins that may call, one by one")


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own."""
    host = host.lower()
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _allowed_hosts(config: ServerConfig) -> frozenset[str]:
    return frozenset(name.lower() for name in (socket.gethostname(), *config.allowed_hosts) if name)


def _is_allowed(header: str | None, hosts: frozenset[str]) -> bool:
    """Whether a Host header names this machine; no header means no browser, so no DNS rebinding."""
    if header is None:
        return True
    match = re.fullmatch(r"\[([0-9a-fA-F:.]+)\](?::\d+)?|([^:\[\]]+)(?::\d+)?", header)
    if match is None:
        return False
    name = (match[1] or match[2]).lower().rstrip(".")
    return name in hosts or is_loopback(name)
