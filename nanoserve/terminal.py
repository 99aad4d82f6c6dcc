"""``nanoserve chat``: a conversation with a running server, in the terminal or through a pipe."""

import importlib
import io
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from nanoserve.client import RemoteServer, at
from nanoserve.errors import EngineError, NanoserveError, ServerUnreachable

HELP = "/new begins anew, /think on or off, /quit or Ctrl-D leaves; Ctrl-C stops an answer"
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
# What a terminal would obey (escapes, carriage returns, bells) must not come out of a model.
_CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


@dataclass(slots=True)
class Conversation:
    """What the next question takes with it.

    Attributes:
        model: the server's name for what it serves.
        max_context: tokens of prompt and answer together, where the server tells.
        messages: the history.
        thinking: None leaves it to the server.
    """

    model: str
    max_context: int | None
    messages: list[dict[str, str]] = field(default_factory=list[dict[str, str]])
    thinking: bool | None = None

    def body(self, question: dict[str, str]) -> dict[str, Any]:
        """The request's fields."""
        body: dict[str, Any] = {"model": self.model, "messages": [*self.messages, question]}
        if self.thinking is not None:
            body["chat_template_kwargs"] = {"enable_thinking": self.thinking}
        return body | {"stream_options": {"include_usage": True}}


@dataclass(slots=True)
class Answer:
    """What has come of an answer; times are `time.perf_counter`'s."""

    asked: float
    content: str = ""
    thinks: bool = False
    first: float | None = None
    last: float = 0.0
    usage: dict[str, int] | None = None
    finish: str | None = None


def chat(server: RemoteServer) -> int:
    """Read a question a line from stdin and write the answers to stdout, until the end of the input.

    On a terminal there is a prompt, reasoning is shown dimmed, errors do not end the program, and Ctrl-C stops
    the answer. Through a pipe only the answers are written, and an error or Ctrl-C ends the program.

    Returns:
        Exit code 0.

    Raises:
        ServerUnreachable: nobody listens there; the message says how to start a server.
        NanoserveError: another failure, at the start or through a pipe.
    """
    talk = _begin(server)
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # what is no text must not become a lone surrogate
    if interactive:
        importlib.import_module("readline")  # gives input() a history and line editing

        _note(f"{talk.model} at {server.url}\n{HELP}")
    for line in _lines(interactive):
        if line.startswith("/"):
            if not _command(line.split(), talk):
                break
        elif line.strip():
            _turn(server, talk, line, interactive)
    return 0


def _begin(server: RemoteServer) -> Conversation:
    try:
        models = server.call("GET", "/models")
    except ServerUnreachable as error:
        remedy = "start one with `nanoserve run MODEL`, or give the URL of another, such as http://HOST:PORT/v1"
        raise EngineError(f"{error} If not, {remedy}") from error
    context = at(models, dict, "data", 0).get("max_model_len")
    return Conversation(at(models, str, "data", 0, "id"), context if isinstance(context, int) else None)


def _lines(interactive: bool) -> Iterator[str]:
    """The questions; Ctrl-C at the prompt drops the line."""
    while True:
        try:
            yield input("> " if interactive else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            print()


def _command(words: list[str], talk: Conversation) -> bool:
    """Do what a line that begins with a slash says; false to leave."""
    match words:
        case ["/quit"]:
            return False
        case ["/new"]:
            talk.messages.clear()
            _note("a new conversation")
        case ["/think", "on" | "off" as switch]:
            talk.thinking = switch == "on"
            _note(f"thinking is {switch}")
        case _:
            _note(f"{' '.join(words)} is no command: {HELP}. A space before the slash makes it a message.")
    return True


def _turn(server: RemoteServer, talk: Conversation, line: str, interactive: bool) -> None:
    """Ask one question; a question that got no answer at all does not stay in the history."""
    question, answer = {"role": "user", "content": line}, Answer(time.perf_counter())
    try:
        _stream(server, talk.body(question), answer)
    except KeyboardInterrupt:
        if not interactive:
            raise
        _note("stopped")
    except NanoserveError as error:
        if not interactive:
            raise
        _note(f"error: {error}")
    else:
        if interactive:
            _note(_summary(answer, talk.max_context))
    if answer.first is not None:
        talk.messages += [question, {"role": "assistant", "content": answer.content}]


def _stream(server: RemoteServer, body: dict[str, Any], answer: Answer) -> None:
    """Print an answer as it comes."""
    try:
        with closing(server.stream("/chat/completions", body)) as events:
            for event in events:
                answer.usage = event.get("usage") or answer.usage
                for choice in event.get("choices", ()):
                    _show(choice.get("delta", {}), answer)
                    answer.finish = choice.get("finish_reason") or answer.finish
                    answer.last = time.perf_counter()
    finally:
        if answer.thinks and sys.stdout.isatty():
            sys.stdout.write(_PLAIN)
        if answer.first is not None:
            sys.stdout.write("\n")
        sys.stdout.flush()


def _show(delta: dict[str, Any], answer: Answer) -> None:
    """Print a piece; reasoning only on a terminal, and dimmed."""
    content, reasoning = delta.get("content") or "", delta.get("reasoning_content") or ""
    if (content or reasoning) and answer.first is None:
        answer.first = time.perf_counter()
    if reasoning and sys.stdout.isatty():
        sys.stdout.write(("" if answer.thinks else _DIM) + reasoning.translate(_CONTROLS))
        answer.thinks = True
    if content and answer.thinks:
        sys.stdout.write(f"{_PLAIN}\n")
        answer.thinks = False
    answer.content += content
    sys.stdout.write(content.translate(_CONTROLS))
    sys.stdout.flush()


def _summary(answer: Answer, max_context: int | None) -> str:
    """Counts and speeds of an answer, as far as they are known."""
    if answer.usage is None or answer.first is None:
        return "no answer came" if answer.first is None else "the server does not tell the usage"
    count, seconds = at(answer.usage, int, "completion_tokens"), answer.last - answer.first
    words = [f"{count} tokens"]
    if count > 1 and seconds > 0:
        words.append(f"{(count - 1) / seconds:.1f} tok/s")
    words.append(f"TTFT {answer.first - answer.asked:.2f} s")
    limit = f" of {max_context:,}" if max_context else ""
    words.append(f"context {at(answer.usage, int, 'total_tokens'):,}{limit}")
    if answer.finish == "length":
        words.append("cut off at the limit of tokens")
    elif not answer.content.strip():
        words.append("the model ended without an answer")
    return " · ".join(words)


def _note(text: str) -> None:
    """Say something that is no part of an answer."""
    dim = sys.stderr.isatty()
    print(f"{_DIM}{text}{_PLAIN}" if dim else text, file=sys.stderr, flush=True)
