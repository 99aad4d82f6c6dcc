"""The chat page: its headers and hashes without a browser, and what it does in headless Chromium."""

import base64
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

import pytest
from fake_engine import FakeEngine, Running, make_service, make_tokenizer, plain_config, running
from playwright.sync_api import Browser, Error, Page, Request, expect, sync_playwright
from scripted_server import DONE, ENDLESS, USAGE, WAIT, Refusal, Script, delta, scripted, text_reply
from starlette.testclient import TestClient

from nanoserve.page import PAGE_FILE
from nanoserve.routes import create_app
from nanoserve.worker import Worker

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None and "CI" not in os.environ, reason="no Chromium here: apt-get install chromium"
)
HTML = PAGE_FILE.read_text(encoding="utf-8")
HOSTILE = (
    "<img src=x onerror='window.hit=1'> <script>window.hit=1</script> </script><svg onload=window.hit=1> "
    "[a link](javascript:window.hit=1) ![](http://127.0.0.1:9/x.png) <iframe src=//127.0.0.1:9></iframe>"
)


class TestWithoutABrowser:
    @pytest.fixture
    def client(self) -> Iterator[TestClient]:
        engine = FakeEngine()
        worker = Worker(lambda: engine, max_queue=4)
        worker.wait_ready(5)
        yield TestClient(
            create_app(plain_config(api_key="k", allowed_hosts=["my.box"]), make_service(worker, None, engine)),
            base_url="http://localhost",
        )
        assert worker.close(5)

    @pytest.mark.parametrize("method", ["GET", "HEAD"])
    def test_it_is_served_without_the_key(self, client: TestClient, method: str) -> None:
        answer = client.request(method, "/", headers={"host": "my.box"})
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        assert int(answer.headers["content-length"]) == len(HTML.encode())
        if method == "GET":
            assert answer.text == HTML

    def test_nothing_else_is(self, client: TestClient) -> None:
        assert client.post("/").status_code == 405
        for path in ("/page.html", "/v1/models", "/?x", "/index.html"):
            expected = 200 if path == "/?x" else 401
            assert client.get(path).status_code == expected, path
        assert client.get("/", headers={"host": "evil.example"}).status_code == 403

    def test_the_policy_allows_the_inline_parts_and_nothing_else(self, client: TestClient) -> None:
        headers = client.get("/").headers
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        for tag in ("script", "style"):
            start, end = HTML.index(f"<{tag}>") + len(tag) + 2, HTML.index(f"</{tag}>")
            digest = base64.b64encode(hashlib.sha256(HTML[start:end].encode()).digest()).decode()
            assert policy.pop(f"{tag}-src") == f"'sha256-{digest}'"
        for name in ("default-src", "base-uri", "form-action", "frame-ancestors", "trusted-types"):
            assert policy.pop(name) == "'none'"
        assert policy == {
            "connect-src": "'self'",
            "img-src": "data:",
            "require-trusted-types-for": "'script'",
        }
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cache-control"] == "no-cache"

    def test_the_file_needs_nothing_that_the_policy_forbids(self) -> None:
        assert HTML.count("<script") == HTML.count("<style") == 1
        assert not re.search(r"<[^>]+\s(on\w+|style)\s*=", HTML.partition("<script>")[0])
        assert set(re.findall(r"https?://[^'\"\s]+", HTML)) == {
            "http://www.w3.org/2000/svg"
        }  # a name, not fetched
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "localStorage"):
            assert word not in HTML


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    quiet = ["--disable-quic", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--host-resolver-rules=MAP my.box 127.0.0.1", *quiet]
        )
        yield browser
        browser.close()


@dataclass
class Tab:
    """A page, and all that a browser would complain of or fetch."""

    page: Page
    violations: list[str] = field(default_factory=list[str])
    failures: list[str] = field(default_factory=list[str])
    requests: list[str] = field(default_factory=list[str])

    def open(self, url: str) -> None:
        self.page.goto(url)
        expect(self.page.get_by_role("heading")).not_to_have_text("nanoserve")

    def ask(self, text: str) -> None:
        self.page.get_by_label("Message").fill(text)
        self.page.keyboard.press("Enter")

    def whole(self) -> None:
        """Wait for the answer's end."""
        expect(self.page.get_by_role("button", name="Send")).to_be_visible()


@pytest.fixture
def tab(browser: Browser) -> Iterator[Tab]:
    context = browser.new_context()
    context.set_default_timeout(20_000)
    expect.set_options(timeout=15_000)
    page = context.new_page()
    tab = Tab(page)

    def remember(request: Request) -> None:
        tab.requests.append(request.url)

    page.add_init_script(
        "document.addEventListener('securitypolicyviolation', (e) => console.warn(`CSP ${e.violatedDirective}`))"
    )
    page.on("console", lambda m: tab.violations.append(m.text) if m.text.startswith("CSP ") else None)
    page.on("pageerror", lambda error: tab.failures.append(str(error)))
    page.on("request", remember)
    yield tab
    context.close()
    assert not tab.failures


@pytest.fixture
def script(tab: Tab) -> Iterator[Script]:
    with scripted() as script:
        yield script
        for url in tab.requests:
            assert url.startswith((script.url, "data:")), url


def content(text: str) -> object:
    return delta(content=text)


@needs_browser
class TestConversation:
    @pytest.fixture(autouse=True)
    def opened(self, tab: Tab, script: Script) -> Iterator[None]:
        tab.open(script.url)
        yield
        assert not tab.violations

    def test_an_answer_appears_as_it_comes(self, tab: Tab, script: Script) -> None:
        reply = text_reply("Hël", "lö", " there")
        script.replies = [[*reply[:2], WAIT, *reply[2:]]]
        tab.ask("hi")
        log = tab.page.get_by_role("log")
        expect(log.locator("article").nth(1)).to_have_text(re.compile("Hël$"))
        expect(tab.page.get_by_role("button", name="Send")).to_be_hidden()
        script.release.set()
        expect(log.locator("article").nth(1)).to_have_text(re.compile("Hëllö there$"))
        tab.whole()
        meter = r"21 tokens · [\d.]+ tok/s · TTFT \d\.\d\d s · context 41 of 512"
        expect(tab.page.get_by_role("status")).to_have_text(re.compile(f"^{meter}$"))
        expect(tab.page.locator("[aria-busy=true]")).to_have_count(0)

    def test_what_is_asked(self, tab: Tab, script: Script) -> None:
        script.replies = [text_reply("one"), text_reply("two")]
        tab.ask("hi")
        tab.whole()
        assert script.bodies[0] == {
            "messages": [{"role": "user", "content": "hi"}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "chat_template_kwargs": {"enable_thinking": True},
        }
        tab.page.get_by_text("Settings").click()
        tab.page.get_by_label("Thinking").uncheck()
        tab.page.get_by_label("Temperature").fill("0.5")
        tab.page.get_by_label("Most tokens").fill("7")
        tab.page.keyboard.press("Escape")
        expect(tab.page.get_by_label("Temperature")).to_be_hidden()
        tab.page.get_by_label("Message").fill("a")
        tab.page.evaluate(  # an input method's Enter, which chooses a word
            "document.activeElement.dispatchEvent("
            "new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true}))"
        )
        tab.page.keyboard.press("Shift+Enter")
        tab.page.keyboard.type("b")
        tab.page.keyboard.press("Enter")
        tab.whole()
        assert script.bodies[1]["messages"][1:] == [
            {"role": "assistant", "content": "one"},
            {"role": "user", "content": "a\nb"},
        ]
        assert script.bodies[1]["chat_template_kwargs"] == {"enable_thinking": False}
        assert (script.bodies[1]["temperature"], script.bodies[1]["max_tokens"]) == (0.5, 7)

    @pytest.mark.parametrize("how", ["button", "escape", "new"])
    def test_stopping_lets_the_server_go(self, tab: Tab, script: Script, how: str) -> None:
        script.replies = [[ENDLESS], text_reply("fine")]
        tab.ask("count")
        expect(tab.page.get_by_role("log")).to_contain_text("tick tick")
        if how == "escape":
            tab.page.keyboard.press("Escape")
        else:
            tab.page.get_by_role("button", name="Stop" if how == "button" else "New chat").click()
        tab.whole()
        assert script.left.wait(10)
        if how == "new":
            expect(tab.page.locator("article")).to_have_count(0)
        else:
            expect(tab.page.get_by_role("log")).to_contain_text("Stopped.")
        tab.ask("again")
        expect(tab.page.get_by_role("log")).to_contain_text("fine")
        history = script.bodies[1]["messages"]
        assert [m["role"] for m in history] == (["user"] if how == "new" else ["user", "assistant", "user"])
        assert how == "new" or history[1]["content"].startswith("tick tick")

    def test_reasoning_is_folded(self, tab: Tab, script: Script) -> None:
        thoughts = [delta(reasoning_content="First"), delta(reasoning_content=" this.\n\nThen that.")]
        script.replies = [[delta(role="assistant"), *thoughts, WAIT, *text_reply("Done.")], text_reply("x")]
        tab.ask("think")
        summary = tab.page.get_by_text("Thinking", exact=True).and_(tab.page.locator("summary"))
        expect(summary).to_be_visible()
        expect(tab.page.get_by_text("First this.")).to_be_hidden()
        script.release.set()
        tab.whole()
        tab.page.get_by_text("Reasoning", exact=True).click()
        expect(tab.page.get_by_text("First this.")).to_be_visible()
        expect(tab.page.get_by_text("Then that.")).to_be_visible()
        tab.ask("more")
        tab.whole()
        assert script.bodies[1]["messages"][1] == {
            "role": "assistant",
            "content": "Done.",
            "reasoning_content": "First this.\n\nThen that.",
        }

    def test_how_an_answer_ended_is_told(self, tab: Tab, script: Script) -> None:
        thought = delta(reasoning_content="I know.")
        script.replies = [
            [thought, delta("stop"), USAGE, DONE],
            [thought, content("and"), delta("length"), USAGE, DONE],
            text_reply("fine"),
        ]
        for note in ("The model ended without an answer.", "Cut off: the limit of tokens was reached.", ""):
            tab.ask("hi")
            tab.whole()
            expect(tab.page.locator(".note").last).to_have_text(note)

    def test_code_is_set_apart(self, tab: Tab, script: Script) -> None:
        script.replies = [text_reply("Look:\n\n``", "`py", "thon\nx = '<b>'\n\ny\n", "```\n\nand\nthat")]
        tab.ask("code")
        tab.whole()
        expect(tab.page.locator("article pre")).to_have_text("x = '<b>'\n\ny")
        assert tab.page.locator("article p").all_inner_texts() == ["code", "Look:", "and\nthat"]

    def test_the_end_stays_in_view_unless_the_reader_scrolls_up(self, tab: Tab, script: Script) -> None:
        def to_end() -> float:
            return tab.page.locator("main").evaluate("(m) => m.scrollHeight - m.scrollTop - m.clientHeight")

        lines = [f"line {i}\n\n" for i in range(60)]
        script.replies = [[*map(content, lines), WAIT, *map(content, lines), *text_reply("end")]]
        tab.ask("much")
        expect(tab.page.get_by_text("line 59")).to_be_in_viewport()
        assert to_end() < 5
        tab.page.locator("main").evaluate("(m) => { m.scrollTop -= 300; }")
        script.release.set()
        tab.whole()
        assert to_end() > 1000

    def test_tool_calls_are_shown_and_answered(self, tab: Tab, script: Script) -> None:
        def piece(index: int, **fields: object) -> object:
            return delta(tool_calls=[{"index": index, **fields}])

        calls = [
            piece(0, id="a1", type="function", function={"name": "get_weather", "arguments": ""}),
            piece(0, function={"arguments": '{"city": "<b>'}),
            piece(0, function={"arguments": 'Oslo</b>"}'}),
            piece(1, id="a2", type="function", function={"name": "get_time", "arguments": "{}"}),
        ]
        script.replies = [[*calls, delta("tool_calls"), USAGE, DONE], text_reply("Cold.")]
        tools = [{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]
        tab.page.get_by_text("Settings").click()
        tab.page.get_by_label("Tools").fill(json.dumps(tools))
        tab.ask("weather?")
        tab.whole()
        assert script.bodies[0]["tools"] == tools
        expect(tab.page.locator("strong").first).to_have_text("get_weather")
        expect(tab.page.locator("article pre").first).to_have_text('{\n  "city": "<b>Oslo</b>"\n}')
        for name, result in (("get_weather", "-3"), ("get_time", "noon")):
            expect(tab.page.get_by_placeholder(f"Result of {name}")).to_be_visible()
            tab.ask(result)
        expect(tab.page.get_by_role("log")).to_contain_text("Cold.")
        assistant, *results = script.bodies[1]["messages"][1:]
        assert [call["function"]["arguments"] for call in assistant["tool_calls"]] == [
            '{"city": "<b>Oslo</b>"}',
            "{}",
        ]
        assert results == [
            {"role": "tool", "tool_call_id": "a1", "content": "-3"},
            {"role": "tool", "tool_call_id": "a2", "content": "noon"},
        ]

    def test_errors_are_shown_as_they_are(self, tab: Tab, script: Script) -> None:
        error = {"error": {"message": "2 requests are waiting", "type": "x", "param": None, "code": "queue_full"}}
        headers = {"retry-after": "3"}
        script.replies = [
            Refusal(503, json.dumps(error), headers),
            Refusal(502, "<h1>Bad gateway</h1>"),
            [delta(content="begun"), error],
            [delta(content="cut")],
            text_reply("fine"),
        ]
        alert = tab.page.get_by_role("alert")
        tab.ask("hi")
        expect(alert).to_have_text(re.compile("^503 queue_full: 2 requests are waiting\nRetry-After: 3 s$"))
        expect(tab.page.get_by_label("Message")).to_have_value("hi")
        for count, words in (
            (2, "502: "),
            (3, "queue_full: 2 requests"),
            (4, "The stream ended before the answer"),
        ):
            tab.ask("hi")
            expect(alert).to_have_count(count)
            expect(alert.last).to_contain_text(words)
        tab.ask("hi")
        expect(tab.page.get_by_role("log")).to_contain_text("fine")
        roles = [(m["role"], m["content"]) for m in script.bodies[-1]["messages"]]
        begun = [("user", "hi"), ("assistant", "begun"), ("user", "hi"), ("assistant", "cut"), ("user", "hi")]
        assert roles == begun, "what was refused is not in the history"

    def test_a_server_that_is_gone(self, tab: Tab, script: Script) -> None:
        tab.page.route("**/v1/chat/completions", lambda route: route.abort("connectionrefused"))
        tab.ask("hi")
        expect(tab.page.get_by_role("alert")).to_have_text("The server cannot be reached. Is it running?")

    def test_a_phone(self, tab: Tab, script: Script) -> None:
        script.replies = [text_reply("x" * 500, "\n```\n", "y" * 500, "\n```")]
        tab.page.set_viewport_size({"width": 320, "height": 560})
        tab.ask("z" * 200)
        tab.whole()
        tab.page.get_by_text("Settings").click()
        for element in ("document.documentElement", "document.querySelector('main')"):
            assert tab.page.evaluate(f"{element}.scrollWidth") <= 320
        for element in tab.page.locator("button:visible, textarea:visible, input:visible").all():
            box = element.bounding_box()
            assert box is not None
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= 320

    def test_light_and_dark(self, tab: Tab) -> None:
        def luminance() -> list[float]:
            style = "getComputedStyle(document.body)"
            colours = (tab.page.evaluate(f"{style}.{name}") for name in ("backgroundColor", "color"))
            return [sum(map(int, re.findall(r"\d+", colour))) / 765 for colour in colours]

        tab.page.emulate_media(color_scheme="light")
        paper, ink = luminance()
        assert paper > 0.9 > 0.2 > ink
        tab.page.emulate_media(color_scheme="dark")
        paper, ink = luminance()
        assert paper < 0.2 < 0.8 < ink


@needs_browser
class TestHostileText:
    def test_it_stays_text(self, tab: Tab, script: Script) -> None:
        """S13."""
        script.model = HOSTILE
        call = {"index": 0, "id": HOSTILE, "function": {"name": HOSTILE, "arguments": HOSTILE}}
        parts = [
            delta(reasoning_content=HOSTILE),
            delta(content=HOSTILE),
            delta(content=f"\n```\n{HOSTILE}\n```\n"),
        ]
        error = {"error": {"message": HOSTILE, "code": HOSTILE}}
        script.replies = [
            [*parts, delta(tool_calls=[call]), delta("tool_calls"), USAGE, DONE],
            Refusal(400, json.dumps(error)),
        ]
        tab.open(script.url)
        tab.ask(HOSTILE)
        tab.whole()
        tab.page.get_by_text("Reasoning", exact=True).click()
        tab.ask("result")
        expect(tab.page.get_by_role("alert")).to_contain_text(HOSTILE)
        assert tab.page.title() == HOSTILE
        # the question, reasoning, content, code, the call's name and arguments, the error's code and message
        assert tab.page.get_by_role("log").inner_text().count(HOSTILE) == 8
        assert tab.page.locator("main").locator("img, script, svg, a, iframe, [onerror], [onload]").count() == 0
        assert tab.page.evaluate("window.hit") is None
        assert not tab.violations
        assert set(script.paths) == {"/", "/v1/models", "/v1/chat/completions"}

    def test_the_policy_holds_where_the_script_would_not(self, tab: Tab, script: Script) -> None:
        """S13. The net below: markup cannot be made of a string, and nothing remote is fetched."""
        tab.open(script.url)
        with pytest.raises(Error, match="TrustedHTML"):
            tab.page.evaluate("document.body.innerHTML = '<b>x</b>'")
        tab.page.evaluate("(url) => { const i = new Image(); i.src = url; document.body.append(i); }", "/x.png")
        fetched = "fetch('http://127.0.0.1:9/').then(() => 'went out', () => 'blocked')"
        assert tab.page.evaluate(fetched) == "blocked"
        tab.page.evaluate("document.body.append(Object.assign(document.createElement('p'), {id: 'last'}))")
        expect(tab.page.locator("#last")).to_have_count(1)
        assert any("img-src" in words for words in tab.violations)
        assert any("connect-src" in words for words in tab.violations)
        assert "/x.png" not in script.paths


@needs_browser
class TestRealServer:
    @pytest.fixture
    def start(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Running]]:
        tokenizer = make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
        with ExitStack() as stack:

            def start(**options: object) -> Running:
                engine = FakeEngine(delay=0.01)
                engine.script = tokenizer.encode("hello from here")
                return stack.enter_context(running(tokenizer, engine, max_queue=4, **options))

            yield start

    @pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "my.box"])
    def test_it_answers_under_every_name_that_is_served(
        self, tab: Tab, start: Callable[..., Running], host: str
    ) -> None:
        server = start(allowed_hosts=["my.box"])
        tab.open(f"http://{host}:{server.port}/")
        tab.ask("hi")
        expect(tab.page.get_by_role("log")).to_contain_text("hello from here")
        tab.whole()
        expect(tab.page.get_by_role("status")).to_contain_text("of 512")

    def test_the_key_stays_in_the_tab(self, tab: Tab, start: Callable[..., Running]) -> None:
        server = start(api_key="sëcret")
        tab.page.goto(server.url)
        field = tab.page.get_by_label("API key")
        for key, count in (("wrong", 1), ("sëcret", 1)):
            expect(field).to_be_focused()
            field.fill(key)
            tab.page.keyboard.press("Enter")
            expect(tab.page.get_by_role("alert")).to_have_count(count)
        expect(field).to_be_hidden()
        expect(tab.page.get_by_role("alert")).to_contain_text("401 invalid_api_key")
        tab.ask("hi")
        expect(tab.page.get_by_role("log")).to_contain_text("hello from here")
        assert tab.page.evaluate("[sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
        assert not tab.page.context.cookies()
        assert not any("cret" in url for url in tab.requests)
