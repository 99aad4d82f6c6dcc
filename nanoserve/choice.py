"""One answer's events as pieces of text: what the HTTP server and the Python API both make of an engine's work."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from nanoserve.errors import EngineError
from nanoserve.request import Event, Finish, PromptScores, Token
from nanoserve.text import TextStream
from nanoserve.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Piece:
    """What one event added to a choice: a token with the text it completes, or prompt scores, or the end.

    ``text`` is empty while a character or a possible stop string is incomplete; held-back text may come
    without a token before the end.
    """

    index: int
    text: str = ""
    token: Token | None = None
    scores: PromptScores | None = None
    finish: Literal["stop", "length"] | None = None


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
