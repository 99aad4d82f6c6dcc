"""An answer's parts as blocks: a run of reasoning, a run of text, or a call. Pure.

Interfaces that answer with a list of blocks (Anthropic's messages, OpenAI's responses) number and close them; a
part says only what it is.
"""

import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from nanoserve.parsing import CallArguments, CallBegun, Content, Part, Reasoning

Kind = Literal["reasoning", "text", "call"]


@dataclass(slots=True)
class Block:
    """One block; ``name`` is a call's, and its text is the JSON of its arguments."""

    index: int
    kind: Kind
    name: str = ""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    pieces: list[str] = field(default_factory=list[str])

    @property
    def text(self) -> str:
        """All of it so far."""
        return "".join(self.pieces)


@dataclass(frozen=True, slots=True)
class Step:
    """What happened to a block; ``text`` is what it got."""

    what: Literal["begun", "more", "ended"]
    block: Block
    text: str = ""


@dataclass(slots=True)
class Blocks:
    """Puts parts together, and says step by step how.

    Attributes:
        all: the blocks so far; only the last can be open.
    """

    all: list[Block] = field(default_factory=list[Block])
    _open: bool = False

    def push(self, parts: Iterable[Part]) -> Iterator[Step]:
        """The steps that the parts make."""
        for part in parts:
            match part:
                case Reasoning(text):
                    yield from self._more("reasoning", text)
                case Content(text):
                    yield from self._more("text", text)
                case CallBegun(_, name):
                    yield from self.finish()
                    yield self._begin("call", name)
                case CallArguments(_, json):
                    yield self._add(json)

    def finish(self) -> Iterator[Step]:
        """The step that ends the open block, if there is one."""
        if self._open:
            self._open = False
            yield Step("ended", self.all[-1])

    def _more(self, kind: Kind, text: str) -> Iterator[Step]:
        if not (self._open and self.all[-1].kind == kind):
            yield from self.finish()
            yield self._begin(kind)
        yield self._add(text)

    def _begin(self, kind: Kind, name: str = "") -> Step:
        self.all.append(Block(len(self.all), kind, name))
        self._open = True
        return Step("begun", self.all[-1])

    def _add(self, text: str) -> Step:
        self.all[-1].pieces.append(text)
        return Step("more", self.all[-1], text)
