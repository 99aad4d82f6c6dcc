"""`nanoserve chat` as a process: through a pipe, and in a pseudo-terminal as a person uses it."""

import json
import os
import pty
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from scripted_server import DONE, ENDLESS, USAGE, Refusal, Script, delta, scripted, text_reply

from nanoserve.client import RemoteServer
from nanoserve.errors import ConfigError

COMMAND = [sys.executable, "-m", "nanoserve", "chat"]
ROOT = str(Path(__file__).parent.parent)


@pytest.fixture
def script() -> Iterator[Script]:
    with scripted() as script:
        yield script


def piped(
    url: str, text: str | bytes, *options: str, key: str | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run it with this input."""
    env = {**os.environ, "PYTHONPATH": ROOT} | ({} if key is None else {"NANOSERVE_API_KEY": key})
    data = text if isinstance(text, bytes) else text.encode()
    done = subprocess.run([*COMMAND, url, *options], input=data, capture_output=True, env=env, timeout=60)
    words = (part.decode("utf-8") for part in (done.stdout, done.stderr))
    return subprocess.CompletedProcess(done.args, done.returncode, *words)


class TestPipe:
    def test_a_line_is_a_turn(self, script: Script) -> None:
        thoughts = delta(reasoning_content="hmm")
        script.replies = [[thoughts, *text_reply("Hel", "lo\nyou")], text_reply("two"), text_reply("three")]
        done = piped(script.url + "/v1/", "first\n\n  /second\n/think off\n/new\nthird")
        assert (done.returncode, done.stdout) == (0, "Hello\nyou\ntwo\nthree\n")
        assert done.stderr == "thinking is off\na new conversation\n"
        first, second, third = script.bodies
        assert first == {
            "model": "org/scripted",
            "messages": [{"role": "user", "content": "first"}],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        assert second["messages"][1:] == [
            {"role": "assistant", "content": "Hello\nyou"},
            {"role": "user", "content": "  /second"},
        ]
        assert third["messages"] == [{"role": "user", "content": "third"}]
        assert third["chat_template_kwargs"] == {"enable_thinking": False}

    def test_quit_and_unknown_commands(self, script: Script) -> None:
        done = piped(script.url + "/v1", "/help\n/think maybe\n/quit\nnever sent\n")
        assert (done.returncode, done.stdout, script.bodies) == (0, "", [])
        assert [line.partition(" is no command")[0] for line in done.stderr.splitlines()] == [
            "/help",
            "/think maybe",
        ]

    @pytest.mark.parametrize(
        ("reply", "words"),
        [
            (
                Refusal(503, '{"error": {"message": "full\\u001b[31m"}}', {"retry-after": "7"}),
                "503: full\ufffd[31m (Retry-After: 7 s)",
            ),
            (Refusal(400, "x" * 1000), "answered 400: xxx"),
            ([delta(content="be"), {"error": {"message": "it broke"}}], "it broke"),
            ([delta(content="be")], "the stream ended before the answer did"),
            ([delta(content="be"), 5], "completions: 5"),
        ],
    )
    def test_an_error_ends_it(self, script: Script, reply: list[object] | Refusal, words: str) -> None:
        script.replies = [reply]
        done = piped(script.url + "/v1", "hi\nnever sent\n")
        assert done.returncode == 1
        assert done.stdout == ("" if isinstance(reply, Refusal) else "be\n")
        assert words in done.stderr
        assert "Traceback" not in done.stderr
        assert len(done.stderr) < 500
        assert len(script.bodies) == 1

    def test_no_server(self) -> None:
        done = piped("http://127.0.0.1:9/v1", "hi\n")
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert "http://127.0.0.1:9/v1/models: Connection refused" in done.stderr
        assert "nanoserve run" in done.stderr

    def test_a_closed_stdin_is_an_end(self, script: Script) -> None:
        command = f"{shlex.join([*COMMAND, script.url + '/v1'])} <&-"
        done = subprocess.run(command, shell=True, capture_output=True, env={**os.environ, "PYTHONPATH": ROOT})
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")

    def test_the_key(self, script: Script, tmp_path: Path) -> None:
        script.key = "sëcret"
        script.replies = [text_reply("in"), text_reply("in")]
        (tmp_path / "key").write_text("sëcret\n", encoding="utf-8")
        assert piped(script.url + "/v1", "hi\n", "--api-key-file", str(tmp_path / "key")).stdout == "in\n"
        assert piped(script.url + "/v1", "hi\n", key="sëcret").stdout == "in\n"
        refused = piped(script.url + "/v1", "hi\n", key="wrong")
        assert refused.returncode == 1
        assert "answered 401: a valid API key is needed" in refused.stderr
        with pytest.raises(ConfigError, match="api_key") as caught:
            RemoteServer(script.url, "two\nlines")
        assert "lines" not in str(caught.value).partition("api_key")[2].partition("must")[0]

    def test_what_is_no_text_or_no_answer(self, script: Script) -> None:
        script.replies = [[delta("stop"), USAGE, DONE], text_reply("b")]
        done = piped(script.url + "/v1", b"\xff\xfe\nb\n")
        assert (done.returncode, done.stdout) == (0, "b\n")
        assert json.dumps(script.bodies[0]["messages"][0]["content"]) == r'"\ufffd\ufffd"'
        assert len(script.bodies[1]["messages"]) == 1, "what got no answer is not in the history"


class Terminal:
    """The program in a pseudo-terminal; ``seen`` is all that it has shown."""

    def __init__(self, url: str) -> None:
        self.seen = ""
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.execve(sys.executable, [*COMMAND, url], {**os.environ, "PYTHONPATH": ROOT, "TERM": "xterm"})

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def until(self, words: str, seconds: float = 20.0) -> str:
        """Read until it has shown the words; what came up to them is forgotten and returned."""
        end = time.monotonic() + seconds
        while words not in self.seen:
            assert time.monotonic() < end, self.seen
            if select.select([self._fd], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self._fd, 65536).decode()
                except OSError:  # how a terminal's end looks on Linux
                    raise AssertionError(f"it ended: {self.seen}") from None
        before, _, self.seen = self.seen.partition(words)
        return before

    def code(self) -> int:
        """Its exit code, waited for."""
        end = time.monotonic() + 20
        while time.monotonic() < end:
            if select.select([self._fd], [], [], 0)[0]:
                try:
                    self.seen += os.read(self._fd, 65536).decode()
                except OSError:
                    time.sleep(0.01)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                os.close(self._fd)
                self.pid = 0
                return os.waitstatus_to_exitcode(status)
        raise AssertionError(self.seen)

    def kill(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            os.close(self._fd)


@pytest.fixture
def terminal(script: Script) -> Iterator[Terminal]:
    terminal = Terminal(script.url + "/v1")
    yield terminal
    terminal.kill()


class TestTerminal:
    def test_a_conversation(self, script: Script, terminal: Terminal) -> None:
        thoughts = [delta(reasoning_content="let me"), delta(reasoning_content=" see")]
        hostile = "safe \x1b]0;title\x07\x1b[2J\r\x9b31m end"
        script.replies = [
            [*thoughts, *text_reply("It is", " so.")],
            text_reply(hostile),
            Refusal(500, "{}"),
            text_reply("yes"),
        ]
        assert "org/scripted at http://127.0.0.1" in terminal.until("> ")
        terminal.type("is it?\n")
        shown = terminal.until("> ")
        assert "\x1b[2mlet me see\x1b[0m\r\nIt is so.\r\n" in shown
        assert "21 tokens · " in shown
        assert " · context 41 of 512" in shown
        terminal.type("attack\n")
        shown = terminal.until(" end\r\n")
        assert "safe \ufffd]0;title\ufffd\ufffd[2J\ufffd\ufffd31m" in shown
        terminal.until("> ")
        terminal.type("fail\n")
        terminal.until("answered 500")
        terminal.until("> ")
        for reply, note in ((thoughts, "without an answer"), ([*thoughts, delta("length")], "cut off")):
            script.replies.insert(0, [*reply, USAGE, DONE])
            terminal.type("and?\n")
            terminal.until(note)
            terminal.until("> ")
        terminal.type("/new\n")
        terminal.until("a new conversation")
        terminal.until("> ")
        terminal.type("is it?\n")
        terminal.until("yes\r\n")
        terminal.until("> ")
        terminal.type("\x04")
        assert terminal.code() == 0
        history = script.bodies[3]["messages"]
        assert [m["role"] for m in history] == ["user", "assistant"] * 2 + ["user"], "not what failed"
        assert history[1]["content"] == "It is so."
        assert len(script.bodies[-1]["messages"]) == 1

    def test_ctrl_c_stops_the_answer_and_not_the_program(self, script: Script, terminal: Terminal) -> None:
        script.replies = [[delta(reasoning_content="hm"), ENDLESS], text_reply("fine")]
        terminal.until("> ")
        time.sleep(0.3)  # between its prompt and its wait for a key, readline would not see the signal
        terminal.type("\x03")
        terminal.until("> ")
        terminal.type("count\n")
        terminal.until("tick tick")
        terminal.type("\x03")
        terminal.until("stopped")
        assert script.left.wait(10), "the server is told"
        terminal.until("> ")
        terminal.type("again\n")
        terminal.until("fine")
        assert script.bodies[1]["messages"][1]["content"].startswith("tick tick")
        terminal.until("> ")
        terminal.type("/quit\n")
        assert terminal.code() == 0
        assert "Traceback" not in terminal.seen
