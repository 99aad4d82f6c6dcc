"""One answer's tokens as text that is safe to show: whole characters, and nothing of a stop string."""

from collections.abc import Sequence

from nanoserve.errors import RequestError
from nanoserve.tokenizer import Tokenizer


class TextStream:
    """Turns tokens into text and ends it before the first stop string; see `StopSearch`.

    Args:
        tokenizer: None makes every text empty.
        stop: strings that end the text and are not part of it.

    Raises:
        RequestError: a stop string is empty.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str] = ()) -> None:
        self._detokenizer = tokenizer.detokenizer() if tokenizer else None
        self._search = StopSearch(stop)

    @property
    def stopped(self) -> bool:
        """A stop string matched; the consumer cancels the request. It may turn true in `finish` too."""
        return self._search.stopped

    def push(self, token: int) -> str:
        """Add a token; returns the new text that can be shown, perhaps none."""
        if self.stopped or self._detokenizer is None:
            return ""
        return self._search.push(self._detokenizer.push(token))

    def finish(self) -> str:
        """End the text; returns what was held back, up to a stop string if one matched."""
        if self.stopped or self._detokenizer is None:
            return ""
        text = self._search.push(self._detokenizer.flush())
        return text + self._search.finish()


class StopSearch:
    """Lets text through up to the first stop string.

    The match that begins earliest in the text wins, wherever the pieces begin and end. While an earlier match
    may still complete, the text from there on is held back: with the stops ``abc`` and ``b``, ``ab`` waits for
    what follows.

    Args:
        stop: strings that end the text and are not part of it.

    Attributes:
        stopped: a stop string matched. The text before it has been returned and nothing more will be. It may
            turn true in `finish` too.

    Raises:
        RequestError: a stop string is empty.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        if "" in stop:
            raise RequestError("stop holds an empty string: leave it out", param="stop")
        self.stopped = False
        self._searches = [_Search(text) for text in stop]
        self._held = ""  # text from position _shown on
        self._shown = 0
        self._end = 0  # characters searched
        self._cut: int | None = None  # where the earliest complete match so far begins
        self._cut_by: str | None = None  # the string that matched there

    @property
    def found(self) -> str | None:
        """The stop string that matched; None until one has."""
        return self._cut_by if self.stopped else None

    def push(self, text: str) -> str:
        """Add text; returns the new text that can be shown, perhaps none."""
        if self.stopped:
            return ""
        if not self._searches:
            return text
        self._held += text
        for character in text:
            self._end += 1
            for search in self._searches:
                if search.push(character):
                    begin = self._end - len(search.text)
                    if self._cut is None or begin < self._cut:
                        self._cut, self._cut_by = begin, search.text
            if self._cut is not None and self._earliest_pending() >= self._cut:
                self.stopped = True
                return self._show(self._cut)
        pending = self._earliest_pending()
        return self._show(pending if self._cut is None else min(pending, self._cut))

    def finish(self) -> str:
        """End the text; returns what was held back, up to a stop string if one matched."""
        if self.stopped or not self._searches:
            return ""
        self.stopped = self._cut is not None
        return self._show(self._end if self._cut is None else self._cut)

    def _earliest_pending(self) -> int:
        """Where the earliest match begins that more text could complete; the text's end if there is none."""
        return self._end - max(search.matched for search in self._searches)

    def _show(self, until: int) -> str:
        count = until - self._shown
        text, self._held = self._held[:count], self._held[count:]
        self._shown = until
        return text


class _Search:
    """Knuth, Morris and Pratt's search for one string, a character at a time."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0  # length of the longest beginning of `text`, short of all, that the input ends with
        self._fallback = _borders(text)

    def push(self, character: str) -> bool:
        """Add a character; true when the input now ends with the string."""
        while self.matched and self.text[self.matched] != character:
            self.matched = self._fallback[self.matched - 1]
        if self.text[self.matched] == character:
            self.matched += 1
        if self.matched < len(self.text):
            return False
        self.matched = 0  # a later match could not be the earliest any more
        return True


def _borders(text: str) -> list[int]:
    """For every beginning of the text, the length of its longest proper beginning that also ends it."""
    lengths = [0] * len(text)
    length = 0
    for i in range(1, len(text)):
        while length and text[i] != text[length]:
            length = lengths[length - 1]
        length += text[i] == text[length]
        lengths[i] = length
    return lengths
