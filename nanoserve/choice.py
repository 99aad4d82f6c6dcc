"""One answer's events as pieces: of text, as the Python API and completions give it, or of a chat's message."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from nanoserve.errors import EngineError
from nanoserve.parsing import Content, Parser, Part
from nanoserve.request import Event, Finish, PromptScores, Token
from nanoserve.text import StopSearch, TextStream
from nanoserve.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Piece:
    """What one event added to a choice: a token with the text it completes, or prompt scores, or the end.

    ``text`` is empty while a character or a possible stop string is incomplete; held-back text may come
    without a token before the end. A chat's pieces have ``parts`` in its place.

    Attributes:
        index: the choice.
        parts: what the text is of the message.
        reasoning: the token is one of the reasoning's, its end tag among them.
        stopped_by: the stop string that ended a chat's answer, beside its ``finish``.
    """

    index: int
    text: str = ""
    token: Token | None = None
    scores: PromptScores | None = None
    finish: Literal["stop", "length", "tool_calls"] | None = None
    parts: tuple[Part, ...] = ()
    reasoning: bool = False
    stopped_by: str | None = None


class AnswerFailed(EngineError):
    """The engine failed while it answered."""


class Choice:
    """One choice's events to pieces.

    Attributes:
        ended: nothing more comes; true at a stop string already, before the engine knows.
    """

    def __init__(self, index: int, stop: Sequence[str], tokenizer: Tokenizer | None) -> None:
        self.ended = False
        self._index, self._stop, self._tokenizer = index, stop, tokenizer

    @cached_property
    def _text(self) -> TextStream:
        # Made at the first token: a request may have thousands of choices, which wait without one.
        return TextStream(self._tokenizer, self._stop)

    def push(self, event: Event) -> list[Piece]:
        """Pieces that an event adds; none after the end.

        Raises:
            AnswerFailed: the engine failed.
            EngineError: the engine is closing and gave up the request.
        """
        if self.ended:
            return []
        if isinstance(event, PromptScores):
            return [Piece(self._index, scores=event)]
        if isinstance(event, Token):
            piece = Piece(self._index, self._text.push(event.id), event)
            self.ended = self._text.stopped
            return [piece, Piece(self._index, finish="stop")] if self.ended else [piece]
        return self._end(event)

    def _end(self, event: Finish) -> list[Piece]:
        self.ended = True
        if event.reason == "cancelled":
            raise EngineError("the engine is closing: the request was cancelled")
        if event.reason not in ("stop", "length"):
            raise AnswerFailed(event.message or "the engine failed")
        held = self._text.finish()
        reason = "stop" if self._text.stopped else event.reason
        pieces = [Piece(self._index, held)] if held else []
        return [*pieces, Piece(self._index, finish=reason)]


@dataclass(frozen=True, slots=True)
class Reading:
    """How a chat's answer is read; the fields are those of `parsing.Parser`.

    Stop strings are searched in the content alone: they end neither the reasoning nor a call's arguments.
    """

    tools: Mapping[str, Mapping[str, Any]]
    thinking: bool
    nonempty: bool = False
    single: bool = False
    hide_calls: bool = False
    verbatim: bool = False
    stop: Sequence[str] = ()


class ChatChoice:
    """One choice of a chat: its events to pieces that say what is reasoning, content or a call.

    Attributes:
        ended: nothing more comes; true at a stop string, or behind the only call that was asked for, already.
    """

    def __init__(self, index: int, reading: Reading, tokenizer: Tokenizer) -> None:
        self.ended = False
        self._index, self._reading = index, reading
        self._raw = Choice(index, (), tokenizer)

    @cached_property
    def _parser(self) -> Parser:
        how = self._reading
        return Parser(how.tools, how.thinking, how.nonempty, how.single, how.hide_calls, how.verbatim)

    @cached_property
    def _stops(self) -> StopSearch:
        return StopSearch(self._reading.stop)

    def push(self, event: Event) -> list[Piece]:
        """Pieces that an event adds; none after the end.

        Raises:
            AnswerFailed: the engine failed.
            EngineError: the engine is closing and gave up the request.
        """
        if self.ended:
            return []
        return [piece for raw in self._raw.push(event) for piece in self._read(raw)]

    def _read(self, raw: Piece) -> list[Piece]:
        reasoning = raw.token is not None and self._parser.reasoning
        parts = self._parser.push(raw.text)
        over = raw.finish is not None or self._parser.over
        parts = self._until_stop([*parts, *(self._parser.finish() if over else [])], over)
        self.ended = over or self._stops.stopped
        pieces = [Piece(self._index, token=raw.token, parts=tuple(parts), reasoning=reasoning)]
        if not (raw.token or parts):
            pieces.clear()
        if self.ended:
            reason = raw.finish if raw.finish and not self._stops.stopped else "stop"
            called = reason == "stop" and self._parser.calls > 0
            finish = "tool_calls" if called else reason
            pieces.append(Piece(self._index, finish=finish, stopped_by=self._stops.found))
        return pieces

    def _until_stop(self, parts: Sequence[Part], over: bool) -> list[Part]:
        """The parts, with the content up to a stop string."""
        shown: list[Part] = []
        for part in parts:
            if not isinstance(part, Content):
                shown.append(part)
            elif text := self._stops.push(part.text):
                shown.append(Content(text))
            if self._stops.stopped:
                return shown
        if over and (rest := self._stops.finish()):
            shown.append(Content(rest))
        return shown
