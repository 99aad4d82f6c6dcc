"""Log-probabilities in the two shapes of the wire. Every generated token has an entry, an end token too."""

import codecs
from typing import Any

from nanoserve.parameters import wire_logprob
from nanoserve.request import PromptScores, Token, TokenScore
from nanoserve.tokenizer import Tokenizer


def token_name(tokenizer: Tokenizer | None, id: int) -> str:
    """The token's text; without a tokenizer its id, as ``token_id:7``."""
    return f"token_id:{id}" if tokenizer is None else tokenizer.token_text(id)


def chat_logprob(tokenizer: Tokenizer, token: Token) -> dict[str, Any]:
    """A token's entry in a chat's ``logprobs.content``."""

    def entry(id: int, logprob: float) -> dict[str, Any]:
        exact = tokenizer.token_bytes(id)
        return {
            "token": exact.decode("utf-8", "replace"),
            "logprob": wire_logprob(logprob),
            "bytes": None if tokenizer.is_hidden(id) else list(exact),  # so that bytes spell the content
        }

    score = token.score or TokenScore(0.0)
    return {**entry(token.id, score.logprob), "top_logprobs": [entry(id, lp) for id, lp in score.top]}


def _lead(piece: str, exact: bytes) -> int:
    """Characters of a piece that are the token before's: a U+FFFD for a character that this one did not end."""
    return max(0, len(piece) - len(exact.decode("utf-8", "replace")))


class CompletionLogprobs:
    """Fills the lists of a completion's ``logprobs``; offsets count characters of the choice's text.

    Tokens that a stop string cut off keep their entries, with the offsets that they would have had.

    Args:
        tokenizer: None names tokens by their ids, at offset 0.
        alternatives: tokens in each ``top_logprobs``; with 0 the list's entries are empty.
    """

    def __init__(self, tokenizer: Tokenizer | None, alternatives: int) -> None:
        self._tokenizer = tokenizer
        self._alternatives = alternatives
        self._detokenizer = tokenizer.detokenizer() if tokenizer else None
        self._offset = 0
        self._clear()

    def add_prompt(self, text: str, ids: tuple[int, ...], scores: PromptScores) -> None:
        """Add the echoed prompt, whose text begins the choice's text; its first token has no score."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        at = 0
        for id, score in zip(ids, scores.scores, strict=True):
            exact = self._tokenizer.token_bytes(id) if self._tokenizer else b""
            piece = decoder.decode(exact)
            inside = text.startswith(piece, at)  # a token that the tokenizer added is not in the text
            self._add(id, score, at + _lead(piece, exact) * inside)
            at += len(piece) * inside
        self._offset = len(text)

    def add(self, token: Token) -> None:
        """Add a generated token."""
        piece = self._detokenizer.push(token.id) if self._detokenizer else ""
        exact = self._tokenizer.token_bytes(token.id) if self._tokenizer else b""
        self._add(token.id, token.score, self._offset + _lead(piece, exact))
        self._offset += len(piece)

    def take(self) -> dict[str, Any] | None:
        """What was added since the last call, as the wire has it; None for nothing."""
        lists = self._lists
        self._clear()
        return lists if lists["tokens"] else None

    def _add(self, id: int, score: TokenScore | None, offset: int) -> None:
        lists = self._lists
        lists["tokens"].append(token_name(self._tokenizer, id))
        lists["token_logprobs"].append(None if score is None else wire_logprob(score.logprob))
        lists["top_logprobs"].append(None if score is None else self._top(score))
        lists["text_offset"].append(offset)

    def _top(self, score: TokenScore) -> dict[str, float]:
        """Text to log-probability, best first; of two ids with one text the likelier stays."""
        table: dict[str, float] = {}
        for id, logprob in score.top[: self._alternatives]:
            table.setdefault(token_name(self._tokenizer, id), wire_logprob(logprob))
        return table

    def _clear(self) -> None:
        names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        self._lists: dict[str, list[Any]] = {name: [] for name in names}
