"""Host, key, CORS and body checks in process; time-outs and malformed HTTP over real sockets."""

import json
import logging
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any, cast

import httpx
import pytest
from fake_engine import FakeEngine, Running, make_service, plain_config, running
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.testclient import TestClient

from nanoserve.errors import ConfigError
from nanoserve.http_guard import is_loopback
from nanoserve.routes import create_app
from nanoserve.worker import Worker

KEY = "sëcret-key"
ROOT = "http://localhost"  # before a path that begins with //, which would else name a host
IDS = {"prompt": [30, 31], "max_tokens": 2}
MakeClient = Callable[..., TestClient]


@pytest.fixture
def client() -> Iterator[MakeClient]:
    workers: list[Worker] = []

    def make(base_url: str = "http://localhost", **options: object) -> TestClient:
        engine = FakeEngine()
        workers.append(worker := Worker(lambda: engine, max_queue=4))
        worker.wait_ready(5)
        app = create_app(plain_config(**options), make_service(worker, None, engine))
        return TestClient(app, base_url=base_url)

    yield make
    for worker in workers:
        assert worker.close(5)


def error_of(response: Any) -> dict[str, object]:
    body = response.json()
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


class TestHost:
    @pytest.mark.parametrize(
        "host",
        [
            *("localhost", "LOCALHOST:8000", "127.0.0.1:80", "127.9.9.9", "[::1]:8000", "x.localhost"),
            *("localhost.", socket.gethostname(), "my.box:9"),
        ],
    )
    def test_own_names_pass(self, client: MakeClient, host: str) -> None:
        """S4."""
        response = client(allowed_hosts=["My.Box"]).get("/v1/models", headers={"host": host})
        assert response.status_code == 200

    @pytest.mark.parametrize(
        "host",
        [
            "evil.example",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "evil.example:localhost",
            "my.box.evil",
            *("192.168.0.1", "", "[::1", "::1", "localhost@evil", "evil\\localhost", "0.0.0.0"),
        ],
    )
    @pytest.mark.parametrize("path", ["/v1/models", "/health", "/nope"])
    def test_other_names_do_not(self, client: MakeClient, host: str, path: str) -> None:
        """S4."""
        response = client(allowed_hosts=["my.box"]).get(path, headers={"host": host})
        assert response.status_code == 403
        assert error_of(response)["code"] == "host_not_allowed"

    def test_a_server_for_others_answers_to_any_name(self, client: MakeClient) -> None:
        assert client(host="0.0.0.0").get("/health", headers={"host": "box.example"}).status_code == 200

    @pytest.mark.parametrize(
        ("host", "ours"),
        [("::1", True), ("localhost", True), ("10.0.0.1", False), ("0.0.0.0", False), ("x", False)],
    )
    def test_what_loopback_is(self, host: str, ours: bool) -> None:
        assert is_loopback(host) == ours


class TestKey:
    @pytest.mark.parametrize(
        ("method", "path"),
        [(m, "/v1/models") for m in ("GET", "HEAD", "OPTIONS", "POST", "DELETE", "TRACE")]
        + [("GET", p) for p in ("//v1/models", "/v1/models/", "/v1/../v1/models", "/metrics", "/version", "/nope")]
        + [
            ("GET", p)
            for p in ("/health/", f"{ROOT}//health", "/health/../v1/models", "/HEALTH", "/%2Fhealth", f"{ROOT}//")
        ]
        + [("POST", p) for p in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize")],
    )
    def test_every_route_needs_it(self, client: MakeClient, method: str, path: str) -> None:
        """S6."""
        response = client(api_key=KEY).request(method, path)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        if method != "HEAD":
            assert error_of(response)["code"] == "invalid_api_key"
            assert "cret" not in response.text

    def test_the_table_of_routes_has_no_other(self, client: MakeClient) -> None:
        """S6."""
        guarded = client(api_key=KEY)
        app = cast("Starlette", guarded.app)
        routes = [(route.path, sorted(route.methods or ())[0]) for route in app.routes if isinstance(route, Route)]
        assert len(routes) > 10
        for path, method in routes:
            status = guarded.request(method, path).status_code
            assert status == (200 if path in ("/", "/health") else 401), path

    @pytest.mark.parametrize(
        "headers",
        [
            {"authorization": "Bearer wrong"},
            {"authorization": b"Bearer " + KEY.encode()[:-1]},
            {"authorization": b"Bearer " + KEY.encode() + b"x"},
            {"authorization": KEY.encode()},
            {"authorization": b"Basic " + KEY.encode()},
            {"authorization": "Bearer"},
            {"authorization": "Bearer "},
            {"authorization": b"Bearer \xff\xfe"},
            {"authorization": "Bearer " + "x" * 200_000},
            {"x-api-key": ""},
            {"x-api-key": "wrong"},
        ],
    )
    def test_wrong_keys(self, client: MakeClient, headers: dict[str, str]) -> None:
        """S6."""
        assert client(api_key=KEY).get("/v1/models", headers=headers).status_code == 401

    @pytest.mark.parametrize(
        "headers", [{"authorization": b"Bearer " + KEY.encode()}, {"authorization": b"bearer  " + KEY.encode()}]
    )
    def test_the_right_key(self, client: MakeClient, headers: dict[str, str]) -> None:
        assert client(api_key=KEY).get("/v1/models", headers=headers).status_code == 200

    def test_the_right_key_the_other_way(self, client: MakeClient) -> None:
        headers: dict[str, bytes] = {"x-api-key": KEY.encode()}
        response = client(api_key=KEY).get("/v1/models", headers=headers)  # type: ignore[arg-type]  # raw bytes
        assert response.status_code == 200

    def test_health_is_open(self, client: MakeClient) -> None:
        assert client(api_key=KEY).get("/health").json() == {"status": "ok"}


@pytest.mark.parametrize("host", ["127.1", "LOCALHOST", "box.example"])
@pytest.mark.parametrize(("address", "status"), [("127.0.0.1", 403), ("::1", 403), ("10.0.0.5", 200)])
def test_the_bound_address_decides_and_not_its_spelling(host: str, address: str, status: int) -> None:
    """S4."""
    engine = FakeEngine()
    worker = Worker(lambda: engine, max_queue=1)
    try:
        worker.wait_ready(5)
        app = create_app(plain_config(host=host), make_service(worker, None, engine), address)
        assert TestClient(app, base_url="http://evil.example").get("/v1/models").status_code == status
    finally:
        worker.close(5)


class TestCors:
    def test_an_sdks_own_headers_may_be_sent(self, client: MakeClient) -> None:
        wanted = "authorization,content-type,x-stainless-lang, x-stainless-os"
        for asked, granted in ((wanted, wanted), ("a\tb", "authorization, content-type, x-api-key, x-request-id")):
            headers = {"origin": "https://good.example", "access-control-request-headers": asked}
            answer = client(cors_origins=["https://good.example"]).options("/v1/models", headers=headers)
            assert answer.headers["access-control-allow-headers"] == granted

    def test_strangers_get_no_permission(self, client: MakeClient) -> None:
        """S5."""
        for config in ({}, {"cors_origins": ["https://good.example"]}):
            for origin in ("https://evil.example", "null", "https://good.example.evil", "*"):
                for method in ("GET", "OPTIONS"):
                    headers = {"origin": origin, "access-control-request-method": "POST"}
                    response = client(**config).request(method, "/v1/models", headers=headers)
                    assert not any(name.startswith("access-control") for name in response.headers)

    def test_friends_do(self, client: MakeClient) -> None:
        page = client(cors_origins=["https://good.example"], api_key=KEY)
        headers = {"origin": "https://good.example", "access-control-request-method": "POST"}
        preflight = page.options("/v1/chat/completions", headers=headers)
        assert preflight.status_code == 204
        assert preflight.headers["access-control-allow-origin"] == "https://good.example"
        assert preflight.headers["vary"] == "Origin"
        assert not preflight.content
        refused = page.get("/v1/models", headers=headers)
        assert refused.status_code == 401, "a preflight needs no key, the request does"
        assert refused.headers["access-control-allow-origin"] == "https://good.example"
        assert "access-control-allow-credentials" not in refused.headers

    def test_a_wildcard_is_refused(self, client: MakeClient) -> None:
        """S5."""
        with pytest.raises(ConfigError, match="cors_origins"):
            client(cors_origins=["*"])


class TestBody:
    @pytest.mark.parametrize(
        "kind", ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonx", "multipart/form-data"]
    )
    def test_only_json(self, client: MakeClient, kind: str) -> None:
        """S5."""
        response = client().post("/v1/completions", content=json.dumps(IDS), headers={"content-type": kind})
        assert response.status_code == 415
        error_of(response)

    @pytest.mark.parametrize("kind", ["application/json", "Application/JSON; charset=utf-8"])
    def test_json_passes(self, client: MakeClient, kind: str) -> None:
        response = client().post("/v1/completions", content=json.dumps(IDS), headers={"content-type": kind})
        assert response.status_code == 200

    def test_compressed_bodies_are_refused(self, client: MakeClient) -> None:
        headers = {"content-type": "application/json", "content-encoding": "gzip"}
        assert client().post("/v1/completions", content=b"x", headers=headers).status_code == 415

    def test_the_limit_is_exact(self, client: MakeClient) -> None:
        """S10."""
        headers = {"content-type": "application/json"}
        small = client(max_body_bytes=2048)
        for size, status in ((2048, 200), (2049, 413)):
            body = json.dumps(IDS).ljust(size).encode()
            assert small.post("/v1/completions", content=body, headers=headers).status_code == status
            chunks = iter([body[:1000], body[1000:]])  # no Content-Length: counted
            response = small.post("/v1/completions", content=chunks, headers=headers)
            assert response.status_code == status

    def test_request_ids(self, client: MakeClient) -> None:
        """R24."""
        plain = client()
        assert plain.get("/health", headers={"x-request-id": "abc-1.2"}).headers["x-request-id"] == "abc-1.2"
        for bad in ("a b", "x" * 200, "\x1b[31m", "<script>", ""):
            given = plain.get("/health", headers={"x-request-id": bad}).headers["x-request-id"]
            assert given != bad
            assert len(given) == 32

    def test_log_lines_cannot_be_forged(self, client: MakeClient, caplog: pytest.LogCaptureFixture) -> None:
        """R24."""
        with caplog.at_level(logging.INFO, "nanoserve"):
            client().get("/v1/models/x%0a2026 INFO forged%1b[31m%e2%80%a8%c2%85")
            client().post("/v1/completions", json={**IDS, "model": "a\nINFO forged\x1b[31m"})
        lines = [record.getMessage() for record in caplog.records]
        assert len(lines) == 2
        assert all(line.isascii() and line.isprintable() for line in lines)

    def test_prompts_are_not_logged(self, client: MakeClient, caplog: pytest.LogCaptureFixture) -> None:
        """S12."""
        with caplog.at_level(logging.DEBUG, "nanoserve"):
            client().post("/v1/completions", json={**IDS, "user": "canary"})
            client().post("/v1/completions", json={**IDS, "prompt": "canary"})
        assert "canary" not in caplog.text
        assert "prompt_tokens=2 completion_tokens=2" in caplog.text
        assert "finish=length" in caplog.text


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    engine = FakeEngine(delay=0.05, max_context=2048)
    with running(None, engine, header_timeout=0.6, body_timeout=0.6, max_body_bytes=100_000) as server:
        yield server


def read_all(sock: socket.socket) -> bytes:
    data = b""
    while part := sock.recv(65536):
        data += part
    return data


def closed_after(sock: socket.socket) -> float:
    """Seconds until the server closes; a reset counts."""
    start = time.monotonic()
    with suppress(ConnectionResetError):
        read_all(sock)
    return time.monotonic() - start


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def dribble(sock: socket.socket, seconds: float = 5.0) -> float:
    """Send a byte now and then until the server closes; returns when it did."""
    start = time.monotonic()
    while time.monotonic() - start < seconds:
        try:
            sock.sendall(b"x")
            sock.settimeout(0.1)
            if not sock.recv(4096):
                break
        except TimeoutError:
            continue
        except OSError:
            break
    return time.monotonic() - start


class TestLimits:
    @pytest.mark.parametrize(("size", "status"), [(20_000, b" 404 "), (40_000, b" 431 "), (200_000, b" 431 ")])
    def test_a_header_that_comes_at_once_has_the_same_limit(
        self, server: Running, size: int, status: bytes
    ) -> None:
        with server.connect() as sock:
            path = b"/" + b"a" * size
            sock.sendall(b"GET " + path + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert status in read_all(sock).splitlines()[0]

    def test_one_connection_too_many_is_dropped(self, server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(server.server.config.http, "connection_limit", 3)
        with ExitStack() as stack:
            first = [stack.enter_context(server.connect()) for _ in range(3)]
            extra = stack.enter_context(server.connect())
            assert closed_after(extra) < 0.4
            first[0].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert b" 200 " in read_all(first[0]).splitlines()[0]


class TestTimeouts:
    def test_a_silent_client_is_dropped(self, server: Running) -> None:
        with server.connect() as sock:
            assert 0.4 < closed_after(sock) < 2

    def test_a_slow_header_is_dropped(self, server: Running) -> None:
        with server.connect() as sock:
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")
            assert 0.3 < dribble(sock) < 2

    def test_a_slow_body_gets_an_answer_or_is_dropped(self, server: Running) -> None:
        with server.connect() as sock:
            sock.sendall(HEAD + b"Content-Length: 1000\r\n\r\n{")
            answer = b""
            start = time.monotonic()
            while part := sock.recv(65536):
                answer += part
            assert time.monotonic() - start < 4
            assert b" 408 " in answer.splitlines()[0]
            assert b"connection: close" in answer.lower()

    def test_a_dribbling_body_is_dropped(self, server: Running) -> None:
        """R20."""
        with server.connect() as sock:
            sock.sendall(HEAD + b"Content-Length: 1000\r\n\r\n{")
            assert dribble(sock, 8.0) < 4

    def test_a_body_that_nobody_reads_is_dropped(self, server: Running) -> None:
        """The answer was 404 at once; the client dribbles on."""
        with server.connect() as sock:
            sock.sendall(b"POST /nope HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{")
            assert dribble(sock, 8.0) < 4

    def test_a_slow_second_request_is_dropped(self, server: Running) -> None:
        with server.connect() as sock:
            for _ in range(2):
                sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                answer = b""
                while b'"ok"' not in answer:
                    answer += sock.recv(4096)
                time.sleep(0.9)  # between requests there is no deadline
            sock.sendall(b"GET /hea")
            assert 0.4 < closed_after(sock) < 2

    def test_a_long_answer_is_not_cut(self, server: Running) -> None:
        body = {"prompt": [30], "max_tokens": 30, "ignore_eos": True, "logprobs": 0, "stream": True}
        answer = httpx.post(server.url + "/v1/completions", json=body, timeout=20)
        assert answer.elapsed.total_seconds() > 1.2
        assert answer.text.endswith("data: [DONE]\n\n")

    def test_many_slow_clients_do_not_stop_others(self, server: Running) -> None:
        """R20."""
        slow = [server.connect() for _ in range(220)]
        try:
            for i, sock in enumerate(slow):
                sock.sendall(HEAD + b"Content-Length: 99\r\n\r\n{" if i < 20 else b"GET / HTTP/1.1\r\nX: ")
            before = time.monotonic()
            assert httpx.get(server.url + "/health").status_code == 200
            assert time.monotonic() - before < 1
            for sock in slow:
                sock.settimeout(10)
                closed_after(sock)
            assert time.monotonic() - before < 8
        finally:
            for sock in slow:
                sock.close()
        plain = plain_config()
        assert max(plain.header_timeout, plain.body_timeout + 1) <= 40


class TestHttp:
    @pytest.mark.parametrize(
        ("data", "status"),
        [
            (b"nonsense\r\n\r\n", 400),
            (b"GET / HTTP/1.1\r\n\r\n", 400),  # no Host
            (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
            (b"GET / HTTP/1.1\r\nHost: a\r\nBad Header: x\r\n\r\n", 400),
            (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n", 400),
            (HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n", 400),
            (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 200_000 + b"\r\n\r\n", 431),
            (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
            (b"\x16\x03\x01\x02\x00\x01\x00\x01\r\n\r\n", 400),  # as a TLS hello begins
        ],
    )
    def test_malformed_http_gets_an_error_object(self, server: Running, data: bytes, status: int) -> None:
        with server.connect() as sock:
            sock.sendall(data)
            answer = read_all(sock)
        head, _, body = answer.partition(b"\r\n\r\n")
        assert int(head.split()[1]) == status
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}

    def test_a_huge_content_length_is_refused_at_once(self, server: Running) -> None:
        """R21."""
        start = time.monotonic()
        with server.connect() as sock:
            sock.sendall(HEAD + b"Content-Length: 100000000000\r\n\r\n")
            assert b" 413 " in sock.recv(4096)
            assert time.monotonic() - start < 0.5

    def test_a_large_chunked_body_is_refused_and_the_answer_arrives(self, server: Running) -> None:
        """R21."""

        def chunks() -> Iterator[bytes]:
            for _ in range(64):
                yield b"x" * 1_000_000

        headers = {"content-type": "application/json"}
        start = time.monotonic()
        answer = httpx.post(server.url + "/v1/completions", content=chunks(), headers=headers)
        assert time.monotonic() - start < 2
        assert answer.status_code == 413
        assert answer.headers["connection"] == "close"
        error_of(answer)

    def test_nonsense_behind_an_early_answer(self, server: Running, caplog: pytest.LogCaptureFixture) -> None:
        with server.connect() as sock:
            sock.sendall(b"POST /nope HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
            assert b" 404 " in sock.recv(4096)
            sock.sendall(b"zz\r\n")
            closed_after(sock)
        assert not [record for record in caplog.records if record.levelname == "ERROR"]

    def test_upgrades_are_ignored(self, server: Running) -> None:
        headers = {"connection": "upgrade", "upgrade": "websocket"}
        assert httpx.get(server.url + "/health", headers=headers).status_code == 200

    def test_pipelined_requests_are_answered_in_order(self, server: Running) -> None:
        with server.connect() as sock:
            one = b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n"
            two = b"GET /nope HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            sock.sendall(one + two)
            answer = read_all(sock)
        assert answer.index(b" 200 ") < answer.index(b" 404 ")
