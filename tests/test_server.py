"""The endpoints over a fake engine: in process for what they say, over loopback for what they survive."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from fake_engine import END, PLAIN, FakeEngine, Running, make_service, plain_config, running, until
from in_process import client_of, events_of
from openai.types.chat import ChatCompletionMessage
from starlette.testclient import TestClient

from nanoserve.http_guard import to_json
from nanoserve.request import Request
from nanoserve.routes import create_app
from nanoserve.tokenizer import Tokenizer
from nanoserve.worker import EngineLike, Worker

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def client(engine: FakeEngine, tokenizer: Tokenizer) -> Iterator[TestClient]:
    with client_of(engine, tokenizer) as client:
        yield client


@pytest.fixture
def server(tokenizer: Tokenizer) -> Iterator[Running]:
    with running(tokenizer, FakeEngine(delay=0.02)) as server:
        yield server


class TestAnswers:
    @pytest.mark.parametrize("path", [CHAT, TEXT])
    def test_a_stream_says_what_a_whole_answer_says(self, client: TestClient, path: str) -> None:
        body = {"messages": HI, **PLAIN} if path == CHAT else {"prompt": "hi"}
        body |= {"max_tokens": 40, "seed": 7, "ignore_eos": True, "n": 2}
        whole = client.post(path, json=body).json()
        options = {"stream": True, "stream_options": {"include_usage": True}}
        chunks = events_of(client.post(path, json={**body, **options}).text)
        assert chunks[-1] == "[DONE]"
        assert chunks[-2]["usage"] == whole["usage"]
        assert whole["usage"]["completion_tokens"] == 80
        texts = ["", ""]
        for chunk in chunks[:-2]:
            (choice,) = chunk["choices"]
            texts[choice["index"]] += choice.get("text") or choice.get("delta", {}).get("content", "")
        assert texts == [c["message"]["content"] if path == CHAT else c["text"] for c in whole["choices"]]
        assert texts[0] != texts[1]
        assert len({chunk["id"] for chunk in chunks[:-1]}) == 1

    @pytest.mark.parametrize("path", [CHAT, TEXT])
    def test_usage_so_far_in_every_chunk(self, client: TestClient, path: str) -> None:
        body = {"messages": HI} if path == CHAT else {"prompt": "hi"}
        options = {"include_usage": True, "continuous_usage_stats": True}
        body |= {"max_tokens": 3, "ignore_eos": True, "n": 2, "stream": True, "stream_options": options}
        *chunks, done = events_of(client.post(path, json=body).text)
        assert done == "[DONE]"
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == sorted(counts)
        assert set(counts) == {1, 2, 3, 4, 5, 6}
        for chunk in chunks:
            usage = chunk["usage"]
            assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]

    @pytest.mark.parametrize("path", [CHAT, TEXT])
    def test_timings_come_last(self, client: TestClient, path: str) -> None:
        body = {"messages": HI} if path == CHAT else {"prompt": "hi"}
        body |= {"max_tokens": 3, "ignore_eos": True, "n": 2}
        answer = client.post(path, json=body).json()
        usage, timings = answer["usage"], answer["timings"]
        assert timings["prompt_n"] == 2 * usage["prompt_tokens"]
        assert timings["predicted_n"] == usage["completion_tokens"] == 6
        assert timings["prompt_ms"] > 0
        assert timings["predicted_per_second"] > 0
        for options in ({}, {"stream_options": {"include_usage": True}}):
            *chunks, done = events_of(client.post(path, json={**body, "stream": True, **options}).text)
            assert done == "[DONE]"
            assert [i for i, chunk in enumerate(chunks) if "timings" in chunk] == [len(chunks) - 1]
            assert chunks[-1]["timings"]["predicted_n"] == 6

    def test_one_token_a_chunk(self, client: TestClient, engine: FakeEngine, tokenizer: Tokenizer) -> None:
        engine.script = tokenizer.encode("one two three")
        chunks = events_of(client.post(CHAT, json={"messages": HI, "stream": True, **PLAIN}).text)
        texts = [c["choices"][0]["delta"].get("content") for c in chunks[:-1]]
        assert texts == ["", *(tokenizer.token_text(id) for id in engine.script), None]
        assert chunks[-2]["choices"][0]["finish_reason"] == "stop"

    def test_the_end_token_is_hidden_and_counted(
        self, client: TestClient, engine: FakeEngine, tokenizer: Tokenizer
    ) -> None:
        engine.script = tokenizer.encode("ab")
        answer = client.post(CHAT, json={"messages": HI, **PLAIN}).json()
        assert answer["choices"][0]["message"]["content"] == "ab"
        assert answer["usage"]["completion_tokens"] == len(engine.script) + 1
        answer = client.post(CHAT, json={"messages": HI, "ignore_eos": True, "max_tokens": 6, **PLAIN}).json()
        assert answer["choices"][0]["message"]["content"] == "ab"
        assert answer["choices"][0]["finish_reason"] == "length"
        assert END not in engine.script

    @pytest.mark.parametrize("stream", [False, True])
    def test_stop_strings_never_leak(
        self, engine: FakeEngine, tokenizer: Tokenizer, client: TestClient, stream: bool
    ) -> None:
        engine.script = tokenizer.encode("hello wor")
        body = {"messages": HI, "stop": ["lo w", "zzz"], "stream": stream, **PLAIN}
        response = client.post(CHAT, json=body)
        if stream:
            deltas = [c["choices"][0] for c in events_of(response.text)[:-1]]
            text = "".join(d["delta"].get("content", "") for d in deltas)
            reason = deltas[-1]["finish_reason"]
        else:
            choice = response.json()["choices"][0]
            text, reason = choice["message"]["content"], choice["finish_reason"]
        assert (text, reason) == ("hel", "stop")

    def test_a_stop_string_of_one_choice_leaves_the_others(
        self, engine: FakeEngine, tokenizer: Tokenizer, client: TestClient
    ) -> None:
        engine.script = tokenizer.encode("abc stop def")
        answer = client.post(TEXT, json={"prompt": ["x", "y", "z"], "stop": " stop", "max_tokens": 50}).json()
        assert [c["text"] for c in answer["choices"]] == ["abc"] * 3
        assert [c["index"] for c in answer["choices"]] == [0, 1, 2]

    def test_lm_evaluation_scores_a_prompt(self, client: TestClient) -> None:
        body = {"prompt": [[30, 31, 32]], "max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0}
        choice = client.post(TEXT, json=body).json()["choices"][0]
        assert choice["logprobs"]["token_logprobs"] == [None, -1.5, -1.5]
        assert len(choice["logprobs"]["top_logprobs"]) == 3
        assert choice["finish_reason"] == "length"

    def test_max_tokens_of_a_chat_is_the_context(self, client: TestClient) -> None:
        usage = client.post(CHAT, json={"messages": HI, "ignore_eos": True}).json()["usage"]
        assert usage["total_tokens"] == 512

    def test_the_contexts_edge(self, client: TestClient, engine: FakeEngine) -> None:
        """R14: the engine sees no prompt that leaves no room."""
        for length, status in ((511, 200), (512, 400), (513, 400)):
            response = client.post(TEXT, json={"prompt": [5] * length, "max_tokens": 1})
            assert response.status_code == status
            if status == 400:
                assert response.json()["error"]["code"] == "context_length_exceeded"
        assert [len(prompt) for prompt in engine.started] == [511]

    def test_context_errors_name_the_code(self, client: TestClient) -> None:
        for path, body in (
            (CHAT, {"messages": [{"role": "user", "content": "x" * 3000}]}),
            (TEXT, {"prompt": [5] * 512}),
        ):
            error = client.post(path, json=body).json()["error"]
            assert error["code"] == "context_length_exceeded"
        assert (
            client.post(TEXT, json={"prompt": [5] * 511, "max_tokens": 9}).json()["usage"]["completion_tokens"]
            == 1
        )

    def test_template_switches_reach_the_template(self, client: TestClient) -> None:
        def prompt(**kwargs: Any) -> str:
            ids = client.post("/tokenize", json={"messages": HI, **kwargs}).json()["tokens"]
            return client.post("/detokenize", json={"tokens": ids}).json()["prompt"]

        assert prompt().endswith("<think>\n")
        assert prompt(chat_template_kwargs={"enable_thinking": False}).endswith("<think></think>")
        assert prompt(add_generation_prompt=False).endswith("<|im_end|>\n")


class TestBodies:
    @pytest.mark.parametrize("path", [CHAT, "/tokenize"])
    def test_nested_values_are_refused_at_any_depth(self, client: TestClient, path: str) -> None:
        """JSON of nearly the depth that Python's stack allows is read, and must not end in a 500 further on."""
        for depth in [5, 400, *range(970, 1000), 5000]:
            nested = '{"a":' * depth + "1" + "}" * depth
            body = (
                f'{{"messages": [{{"role": "user", "content": "x"}}], "chat_template_kwargs": {{"a": {nested}}}}}'
            )
            response = client.post(path, content=body, headers={"content-type": "application/json"})
            assert response.status_code == 400, depth
            assert response.json()["error"]["param"] in ("chat_template_kwargs.a", None)

    def test_no_recursion_is_a_500(self, client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
        def recurse(*args: object, **options: object) -> list[int]:
            return recurse()

        monkeypatch.setattr(Tokenizer, "encode", recurse)
        response = client.post("/tokenize", json={"prompt": "a"})
        assert response.status_code == 400
        assert response.json()["error"]["message"] == "the body is nested too deeply"

    @pytest.mark.parametrize("path", [CHAT, "/tokenize"])
    def test_a_body_full_of_messages_is_refused_at_once(self, client: TestClient, path: str) -> None:
        body = json.dumps({"messages": HI * 150_001})
        start = time.monotonic()
        response = client.post(path, content=body, headers={"content-type": "application/json"})
        assert time.monotonic() - start < 1
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "messages"

    @pytest.mark.parametrize("path", [CHAT, "/tokenize"])
    def test_a_dropped_field_of_a_message_is_named(self, client: TestClient, path: str) -> None:
        answer = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
        error = client.post(path, json={"messages": [*HI, answer]}).json()["error"]
        assert error["param"] == "messages[1].function_call"

    def test_a_round_of_tool_calls_as_clients_send_it(self, client: TestClient) -> None:
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
        messages = [
            *HI,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "7"},
            ChatCompletionMessage(role="assistant", content="so").model_dump(),
            *HI,
        ]
        response = client.post(CHAT, json={"messages": messages, "max_tokens": 2})
        assert response.status_code == 200, response.text


class TestOtherRoutes:
    def test_tokenize_and_back(self, client: TestClient) -> None:
        answer = client.post("/tokenize", json={"prompt": "<|im_end|>é"}).json()
        assert answer["count"] == len(answer["tokens"])
        assert answer["max_model_len"] == 512
        assert answer["tokens"][0] == END
        assert client.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": "<|im_end|>é"}

    @pytest.mark.parametrize("special", [True, False])
    def test_a_chats_tokens_with_the_switches_of_other_servers(self, client: TestClient, special: bool) -> None:
        plain = client.post("/tokenize", json={"messages": HI}).json()
        switches = {"add_special_tokens": special, "add_generation_prompt": True}
        assert client.post("/tokenize", json={"messages": HI, **switches}).json() == plain

    def test_models(self, client: TestClient) -> None:
        (model,) = client.get("/v1/models").json()["data"]
        assert model["id"] == "org/fake"
        assert client.get("/v1/models/org/fake").json() == model
        assert client.get("/v1/models/org%2Ffake").json() == model
        missing = client.get("/v1/models/other")
        assert missing.status_code == 404
        assert missing.json()["error"]["code"] == "model_not_found"

    @pytest.mark.parametrize(
        "path", ["/v1", "/collective_rpc", "/sleep", "/docs", "/openapi.json", "/v1/models/", CHAT + "/"]
    )
    def test_unknown_paths(self, client: TestClient, path: str) -> None:
        """S11."""
        response = client.get(path, follow_redirects=False)
        assert response.status_code == 404
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    @pytest.mark.parametrize(
        ("method", "path", "allow"),
        [("GET", CHAT, "POST"), ("DELETE", "/v1/models", "GET"), ("PUT", TEXT, "POST")],
    )
    def test_wrong_methods(self, client: TestClient, method: str, path: str, allow: str) -> None:
        response = client.request(method, path)
        assert response.status_code == 405
        assert allow in response.headers["allow"]
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    def test_metrics_count(self, client: TestClient) -> None:
        client.post(CHAT, json={"messages": HI, "max_tokens": 5, "ignore_eos": True})
        response = client.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
        lines = response.text.splitlines()
        assert "nanoserve_generation_tokens_total 5" in lines
        assert 'nanoserve_request_success_total{finished_reason="length"} 1' in lines
        names = [line.split()[2] for line in lines if line.startswith("# TYPE")]
        assert len(names) == len(set(names)) == 8

    def test_an_unexpected_error_is_500_without_details(
        self, client: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """S12."""

        def crash(*args: object, **options: object) -> list[int]:
            raise ZeroDivisionError("secret")

        monkeypatch.setattr(Tokenizer, "encode", crash)
        response = client.post("/tokenize", json={"prompt": "a"})
        assert response.status_code == 500
        assert response.json()["error"]["type"] == "server_error"
        assert "secret" not in response.text
        assert "ZeroDivisionError" in caplog.text


class TestWithoutTokenizer:
    def test_ids_are_served_and_text_is_refused(self, engine: FakeEngine) -> None:
        with client_of(engine, None) as client:
            body = {"prompt": [30, 31], "max_tokens": 3, "return_token_ids": True, "logprobs": 0}
            choice = client.post(TEXT, json=body).json()["choices"][0]
            assert choice["text"] == ""
            assert [f"token_id:{id}" for id in choice["token_ids"]] == choice["logprobs"]["tokens"]
            assert len(choice["token_ids"]) == 3
            for path, refused in (
                (CHAT, {"messages": HI}),
                (TEXT, {"prompt": "a"}),
                ("/tokenize", {"prompt": "a"}),
            ):
                response = client.post(path, json=refused)
                assert response.status_code == 400
                assert "no tokenizer" in response.json()["error"]["message"]


class TestFailures:
    @pytest.mark.parametrize("stream", [False, True])
    def test_an_engine_failure(
        self, engine: FakeEngine, client: TestClient, stream: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        """R12."""
        engine.fail, engine.fail_at = RuntimeError("CUDA secret"), 3
        response = client.post(CHAT, json={"messages": HI, "stream": stream, "ignore_eos": True})
        if stream:
            assert response.status_code == 200
            last = events_of(response.text)[-1]
            assert "[DONE]" not in response.text
        else:
            assert response.status_code == 500
            last = response.json()
        assert last["error"]["type"] == "server_error"
        assert "secret" not in response.text
        health = client.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "broken"})
        refused = client.post(CHAT, json={"messages": HI})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "engine_unavailable"

    def test_while_loading(self, tokenizer: Tokenizer) -> None:
        go = threading.Event()

        def load() -> EngineLike:
            go.wait(10)
            return FakeEngine()

        worker = Worker(load, max_queue=1)
        client = TestClient(
            create_app(plain_config(), make_service(worker, tokenizer, FakeEngine())), base_url="http://localhost"
        )
        assert client.get("/health").json() == {"status": "loading"}
        refused = client.post(CHAT, json={"messages": "no work is spent on finding out that this is wrong"})
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert client.get("/v1/models").status_code == 200
        go.set()
        worker.wait_ready(5)
        assert client.post(CHAT, json={"messages": HI, "max_tokens": 1}).status_code == 200
        assert worker.close(5)


def stream_to(server: Running, body: dict[str, Any], path: str = CHAT) -> socket.socket:
    """A raw connection that has sent a request."""
    data = json.dumps(body).encode()
    sock = server.connect()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    )
    sock.sendall(head.encode() + b"\r\n\r\n" + data)
    return sock


LONG = {"messages": HI, "ignore_eos": True, "max_tokens": 450}


class TestClientsThatLeave:
    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("wait", [0.0, 0.01, 0.05, 0.2])
    def test_a_reset_frees_the_engine(self, server: Running, stream: bool, wait: float) -> None:
        """R1: 20 streams are reset in all; R2 for answers that are not streamed."""
        for _ in range(5):
            sock = stream_to(server, {**LONG, "stream": stream})
            time.sleep(wait)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
            sock.close()
        start = time.monotonic()
        answer = httpx.post(server.url + CHAT, json={"messages": HI, "max_tokens": 1}, timeout=10)
        assert answer.status_code == 200
        assert time.monotonic() - start < 3
        until(lambda: "nanoserve_num_requests_running 0" in httpx.get(server.url + "/metrics").text)
        assert (server.worker.running, server.worker.waiting) == (0, 0)

    def test_a_queued_request_whose_client_left_is_never_started(self, server: Running) -> None:
        """R23."""
        blocker = stream_to(server, LONG)
        until(lambda: server.worker.running == 1)
        queued = stream_to(server, {"prompt": [77, 78], "max_tokens": 5}, TEXT)
        until(lambda: server.worker.waiting == 1)
        queued.close()
        until(lambda: server.worker.waiting == 0, 2)
        blocker.close()
        until(lambda: server.worker.running == 0)
        assert (77, 78) not in server.engine.started

    def test_a_stop_string_frees_the_engine(self, server: Running, tokenizer: Tokenizer) -> None:
        server.engine.script = tokenizer.encode("one two three " * 40)
        body = {"messages": HI, "stop": " two", **PLAIN}
        answer = httpx.post(server.url + CHAT, json=body, timeout=10).json()
        assert answer["choices"][0]["message"]["content"] == "one"
        until(lambda: server.worker.running == 0, 1)

    def test_a_client_that_leaves_amid_its_body(self, server: Running, caplog: pytest.LogCaptureFixture) -> None:
        with server.connect() as sock:
            sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
            sock.sendall(b"Content-Length: 1000\r\n\r\n{")
            time.sleep(0.1)
        time.sleep(0.2)
        assert httpx.get(server.url + "/health").status_code == 200
        assert "Traceback" not in caplog.text
        assert not [record for record in caplog.records if record.levelname == "ERROR"]

    def test_a_stalled_reader_blocks_nobody(self, tokenizer: Tokenizer) -> None:
        """R22: the engine does not wait for it."""
        with running(tokenizer, FakeEngine(max_context=20_000)) as server:
            body = {"prompt": [30], "max_tokens": 19_000, "ignore_eos": True, "logprobs": 20, "stream": True}
            stalled = stream_to(server, body, TEXT)
            stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            until(lambda: server.worker.running == 1)
            until(lambda: server.worker.running == 0, 20)
            answer = httpx.post(server.url + TEXT, json={"prompt": [31], "max_tokens": 1}, timeout=10)
            assert answer.status_code == 200
            stalled.close()

    def test_a_stalled_reader_is_dropped(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """R22: what waits for it is bounded in time, and let go."""
        monkeypatch.setattr("nanoserve.http_timeouts.STALLED_READER", 0.5)
        with running(None, FakeEngine(max_context=20_000, delay=0.0003)) as server:
            body = {"prompt": [30], "max_tokens": 19_000, "ignore_eos": True, "logprobs": 20, "stream": True}
            stalled = stream_to(server, body, TEXT)
            stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            until(lambda: len(server.server.server_state.tasks) == 1)
            until(lambda: not server.server.server_state.tasks, 10)
            until(lambda: server.worker.running == 0, 2)
            assert stalled.recv(1)
            stalled.close()

    def test_health_answers_while_a_long_stream_is_written(self, tokenizer: Tokenizer) -> None:
        """R4: megabytes of JSON are not made on the event loop."""
        body = {"prompt": [[30] * 19_000] * 4, "max_tokens": 0, "echo": True, "logprobs": 20, "stream": True}
        slowest = 0.0
        with running(tokenizer, FakeEngine(max_context=20_000)) as server, ThreadPoolExecutor(1) as pool:
            job = pool.submit(httpx.post, server.url + TEXT, json=body, timeout=60)
            with httpx.Client(timeout=10) as client:
                while not job.done():
                    begun = time.monotonic()
                    assert client.get(server.url + "/health").status_code == 200
                    slowest = max(slowest, time.monotonic() - begun)
                    time.sleep(0.005)
        assert len(job.result().content) > 20_000_000
        assert slowest < 0.5

    def test_health_answers_while_a_long_prompt_is_checked(self) -> None:
        """R4: 16 choices of 262,144 ids take half a second."""

        class Careful(FakeEngine):
            def check(self, request: Request) -> None:
                time.sleep(0.6)

        with running(None, Careful()) as server, ThreadPoolExecutor(1) as pool, httpx.Client() as client:
            client.get(server.url + "/health")
            job = pool.submit(httpx.post, server.url + TEXT, json={"prompt": [30], "max_tokens": 1}, timeout=20)
            time.sleep(0.2)
            begun = time.monotonic()
            assert client.get(server.url + "/health").status_code == 200
            assert time.monotonic() - begun < 0.2
            assert not job.done()
            assert job.result().status_code == 200

    @pytest.mark.parametrize(("path", "body"), [("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [30]})])
    def test_long_answers_are_not_written_on_the_event_loop(
        self, client: TestClient, path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """R4: they may hold millions of ids."""
        on_loop: list[bool] = []

        def spy(content: object) -> bytes:
            try:
                asyncio.get_running_loop()
                on_loop.append(True)
            except RuntimeError:
                on_loop.append(False)
            return to_json(content)

        monkeypatch.setattr("nanoserve.http_guard.to_json", spy)
        assert client.post(path, json=body).status_code == 200
        assert on_loop == [False]


class TestLoad:
    def test_small_writes_do_not_wait_for_acknowledgements(self, server: Running) -> None:
        """Head and body are two writes: without TCP_NODELAY the second waits 40 ms."""
        with httpx.Client() as http:
            start = time.monotonic()
            for _ in range(20):
                http.get(server.url + "/health")
            assert (time.monotonic() - start) / 20 < 0.02

    def test_silence_is_filled_with_pings(self, tokenizer: Tokenizer) -> None:
        with running(tokenizer, FakeEngine(delay=0.5), ping_interval=0.1) as server:
            body = {"messages": HI, "max_tokens": 2, "stream": True, "ignore_eos": True}
            text = httpx.post(server.url + CHAT, json=body).text
            assert text.count(": ping\n\n") >= 4
            assert events_of(text)[-1] == "[DONE]"

    def test_stream_headers(self, server: Running) -> None:
        response = httpx.post(server.url + CHAT, json={"messages": HI, "max_tokens": 1, "stream": True})
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-cache"
        assert response.headers["x-accel-buffering"] == "no"
