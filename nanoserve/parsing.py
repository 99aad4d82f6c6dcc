r"""An answer's text, as it comes, to reasoning, content and tool calls: a pure state machine.

The forms are those of the released chat templates: reasoning ends at ``</think>``, and a call is

    <tool_call>\n<function=NAME>\n<parameter=KEY>\nVALUE\n</parameter>\n</function>\n</tool_call>

However the text is cut into pieces, the parts put together are the same. No tag of these forms stands in content
or reasoning, and no text makes it raise: what is not well-formed stays what it stands in, without its tags. So a
call ends the reasoning, and thoughts about ``<tool_call>`` do not. Content that is held to a grammar is another
matter: a string in it may hold any tag and any white space, and is given as it is. So are the strings in an array
or an object that is a call's parameter.
"""

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from nanoserve.arguments import ValueEnd, argument

_ALWAYS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
_OF_CALLS = ("<function=", "</function>", "<parameter=", "</parameter>")
_LONGEST = max(map(len, (*_ALWAYS, *_OF_CALLS)))
_MAX_NAME = 256
"""Characters of a function's or parameter's name; with more before its ``>`` it is none."""

MAX_LEAD = 2
"""Line feeds that may stand between the reasoning and what is held to a grammar, and are not of it."""


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of what stands before ``</think>``."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """A piece of the answer itself."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    """A call of a declared tool begins; ``index`` counts the calls of the answer."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of a call's arguments; the pieces of one call put together are one JSON object."""

    index: int
    json: str


Part = Reasoning | Content | CallBegun | CallArguments


class _State(enum.Enum):
    START = enum.auto()
    REASONING = enum.auto()
    CONTENT = enum.auto()
    LEAD = enum.auto()  # before what is held to a grammar
    VERBATIM = enum.auto()  # in it
    CALL = enum.auto()  # behind <tool_call>, or between two functions
    FUNCTION = enum.auto()  # behind <function=NAME>
    VALUE = enum.auto()  # behind <parameter=KEY>
    OVER = enum.auto()  # behind the only call that was asked for


@dataclass(slots=True)
class _Channel:
    """Lets text through without tags, also without those that leaving something out puts together.

    It goes by characters, so that it does not matter how they arrive: what ends with a tag loses it, or its last
    character if the beginning is out already.

    Attributes:
        said: something was let through.
    """

    tags: tuple[str, ...]
    said: bool = False
    _out: str = ""  # the end of what is out
    _held: str = ""

    def push(self, text: str) -> str:
        """What is certain of the text so far: no beginning of a tag, no white space at its start or end."""
        if "<" not in self._out + self._held + text:
            return self._let(self._held + text)
        return "".join([self._add(char) for char in text])

    def _add(self, char: str) -> str:
        self._held += char
        if tag := next((tag for tag in self.tags if (self._out + self._held).endswith(tag)), None):
            self._held = self._held[: -len(tag)] if len(self._held) >= len(tag) else self._held[:-1]
        return self._let(self._held, keep=_open_tag(self._held, self.tags))

    def _let(self, text: str, keep: int = 0) -> str:
        """Let all but the last ``keep`` characters out, and no white space at either end."""
        if not self.said:
            text = text.lstrip()
        shown = text[: len(text) - keep].rstrip()
        self._held = text[len(shown) :]
        return self._note(shown)

    def _note(self, shown: str) -> str:
        self.said = self.said or bool(shown)
        self._out = (self._out + shown)[-_LONGEST:]
        return shown

    def finish(self, strip: bool) -> str:
        """What was held back; with ``strip`` without the white space at its end."""
        rest, self._held = self._held.rstrip() if strip else self._held, ""
        return self._note(rest)

    def drop_space(self) -> None:
        """Forget white space at the end: what comes next is set apart by itself."""
        self._held = self._held.rstrip()


@dataclass(slots=True)
class Parser:
    """One answer's parser.

    Args:
        tools: the declared tools' JSON schemas by name; empty leaves calls unread.
        thinking: the prompt has opened ``<think>``.
        nonempty: an answer that is all reasoning is given as content too.
        single: nothing counts after the first call.
        hide_calls: the tags inside of calls go even without tools, as ``<tool_call>`` itself always does.
        verbatim: what follows the reasoning is held to a grammar: it is content as it stands, or with tools
            it may be calls instead. Where no reasoning is open it begins at once, as `constraint.py` has it.

    Attributes:
        calls: how many have begun.
    """

    tools: Mapping[str, Mapping[str, Any]]
    thinking: bool
    nonempty: bool = False
    single: bool = False
    hide_calls: bool = False
    verbatim: bool = False
    calls: int = field(init=False, default=0)
    _text: str = ""
    _name: str = ""
    _key: str = ""
    _given: dict[str, str] = field(default_factory=dict[str, str])
    _state: _State = field(init=False)
    _around: _State = field(init=False, default=_State.CONTENT)  # what a tag of a call was found in
    _end: ValueEnd = field(init=False)  # of the value
    _lead: int = field(init=False)  # line feeds that may still be dropped
    _reasoning: _Channel = field(init=False)
    _content: _Channel = field(init=False)
    _thoughts: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        before = _State.LEAD if self.verbatim else _State.START
        self._state = _State.REASONING if self.thinking else before
        self._lead = MAX_LEAD if self.thinking or self.tools else 0
        tags = (*_ALWAYS, *_OF_CALLS) if self.tools or self.hide_calls else _ALWAYS
        self._reasoning, self._content = _Channel(tags), _Channel(tags)

    @property
    def reasoning(self) -> bool:
        """Whether the text pushed next begins inside the reasoning."""
        return self._state is _State.REASONING

    @property
    def over(self) -> bool:
        """Whether the only call that counts is complete."""
        return self._state is _State.OVER

    def push(self, text: str) -> list[Part]:
        """The parts that more text completes."""
        self._text += text
        return list(self._run(final=False))

    def finish(self) -> list[Part]:
        """The parts that were held back; a call that was cut off is closed after its last whole parameter."""
        return list(self._run(final=True))

    def _run(self, final: bool) -> Iterator[Part]:
        step = {
            _State.START: self._at_start,
            _State.REASONING: self._in_reasoning,
            _State.CONTENT: self._in_content,
            _State.LEAD: self._at_lead,
            _State.VERBATIM: self._in_verbatim,
            _State.CALL: self._in_call,
            _State.FUNCTION: self._in_function,
            _State.VALUE: self._in_value,
            _State.OVER: self._after_all,
        }
        going = True
        while going:
            before = (self._state, len(self._text))
            yield from step[self._state](final)
            going = (self._state, len(self._text)) != before
        if final:
            yield from self._close()

    def _at_start(self, final: bool) -> Iterator[Part]:
        """The prompt asked for no reasoning; the model may open it all the same."""
        text = self._text.lstrip()
        if text.startswith("<think>"):
            self._text, self._state = text.removeprefix("<think>"), _State.REASONING
        elif final or not "<think>".startswith(text):
            self._state = _State.CONTENT
        yield from ()

    def _in_reasoning(self, final: bool) -> Iterator[Part]:
        before, tag = self._take(("</think>", *self._call_tags()), final)
        yield from self._think(before)
        if tag == "</think>":
            yield from self._think(self._reasoning.finish(strip=True), filtered=True)
            self._state = _State.LEAD if self.verbatim else _State.CONTENT
        elif tag:
            self._enter_call(tag)

    def _at_lead(self, final: bool) -> Iterator[Part]:
        """A grammar of calls or something else is taken at its word: what begins as a call is one."""
        while self._lead and self._text.startswith("\n"):
            self._text, self._lead = self._text[1:], self._lead - 1
        tag = "<tool_call>"
        if self.tools and self._text.startswith(tag):
            self._text = self._text.removeprefix(tag)
            self._around, self._state = _State.CONTENT, _State.CALL
        elif self._text and (final or not (self.tools and tag.startswith(self._text))):
            self._state = _State.VERBATIM
        yield from ()

    def _in_verbatim(self, final: bool) -> Iterator[Part]:
        text, self._text = self._text, ""
        if text:
            self._content.said = True
            yield Content(text)

    def _in_content(self, final: bool) -> Iterator[Part]:
        before, tag = self._take(self._call_tags(), final)
        yield from self._say(before)
        if tag:
            self._enter_call(tag)

    def _enter_call(self, tag: str) -> None:
        """A tag in free text that may begin a call."""
        self._around, self._state = self._state, _State.CALL
        if tag == "<function=":
            self._text = tag + self._text

    def _call_tags(self) -> tuple[str, ...]:
        return ("<tool_call>", "<function=") if self.tools else ()

    def _in_call(self, final: bool) -> Iterator[Part]:
        """Between calls: white space, a function, or the end of the block."""
        self._text = self._text.lstrip()
        name = _named(self._text, "<function=", final)
        if name is None:
            return
        if name in self.tools:
            self._text = self._text[len("<function=") + len(name) + 1 :]
            yield from self._begin(name)
            return
        # Anything else ends the block. A function that nobody declared is plain text, without its tag.
        for tag in ("</tool_call>", "<function="):
            if self._text.startswith(tag):
                self._text = self._text[len(tag) :]
                break
            if tag.startswith(self._text) and not final:
                return
        self._state = self._around

    def _begin(self, name: str) -> Iterator[Part]:
        """A call, and with it the end of what stood around it."""
        yield from self._think(self._reasoning.finish(strip=True), filtered=True)
        self._content.drop_space()
        self._name, self._given = name, {}
        self._around, self._state = _State.CONTENT, _State.FUNCTION
        yield CallBegun(self.calls, name)
        yield CallArguments(self.calls, "{")
        self.calls += 1

    def _in_function(self, final: bool) -> Iterator[Part]:
        """Between parameters."""
        self._text = self._text.lstrip()
        key = _named(self._text, "<parameter=", final)
        if key is None:
            return
        if key:
            self._text = self._text[len("<parameter=") + len(key) + 1 :]
            self._key, self._state, self._end = key, _State.VALUE, ValueEnd(self.tools[self._name], key)
            return
        if self._text.startswith("</parameter>"):  # one too many
            self._text = self._text[len("</parameter>") :]
            return
        ends = ("</function>", "</parameter>")
        if not final and self._text not in ends and any(tag.startswith(self._text) for tag in ends):
            return
        self._text = self._text.removeprefix("</function>")
        yield CallArguments(self.calls - 1, "}")
        self._state = _State.OVER if self.single else _State.CALL

    def _in_value(self, final: bool) -> Iterator[Part]:
        """A parameter's value; a missing end is tolerated before the next tag of a call."""
        end = self._end.find(self._text)
        if end is None:
            return  # a value that is cut off is no value
        value = self._text[: end.start()]
        self._text = self._text[end.end() if end[0] == "</parameter>" else end.start() :]
        self._state = _State.FUNCTION
        if self._key not in self._given:
            self._given[self._key] = value
            comma = ", " if len(self._given) > 1 else ""
            yield CallArguments(self.calls - 1, comma + argument(self.tools[self._name], self._key, value))

    def _after_all(self, final: bool) -> Iterator[Part]:
        self._text = ""
        yield from ()

    def _close(self) -> Iterator[Part]:
        if self._state in (_State.FUNCTION, _State.VALUE):
            yield CallArguments(self.calls - 1, "}")
        yield from self._think(self._reasoning.finish(strip=True), filtered=True)
        if rest := self._content.finish(strip=bool(self.calls)):
            yield Content(rest)
        if self.nonempty and not self._content.said and not self.calls and self._thoughts:
            yield Content("".join(self._thoughts))

    def _think(self, text: str, filtered: bool = False) -> Iterator[Part]:
        if shown := text if filtered else self._reasoning.push(text):
            if self.nonempty:
                self._thoughts.append(shown)
            yield Reasoning(shown)

    def _say(self, text: str) -> Iterator[Part]:
        if shown := self._content.push(text):
            yield Content(shown)

    def _take(self, tags: tuple[str, ...], final: bool) -> tuple[str, str]:
        """The text before the first of the tags and that tag, both removed; what may become a tag stays."""
        at, tag = _first(self._text, tags)
        if not tag:
            at = len(self._text) - (0 if final else _open_tag(self._text, tags))
        before, self._text = self._text[:at], self._text[at + len(tag) :]
        return before, tag


def _first(text: str, tags: tuple[str, ...]) -> tuple[int, str]:
    """(position, tag) of the first tag; (-1, "") when there is none."""
    found = [(at, tag) for tag in tags if (at := text.find(tag)) >= 0]
    return min(found, default=(-1, ""))


def _open_tag(text: str, tags: tuple[str, ...]) -> int:
    """Length of the longest end of the text that begins one of the tags."""
    longest = min(len(text), max(map(len, tags), default=1) - 1)
    return next((n for n in range(longest, 0, -1) if any(tag.startswith(text[-n:]) for tag in tags)), 0)


def _named(text: str, tag: str, final: bool) -> str | None:
    """NAME of ``<tag=NAME>`` at the start of the text; "" when it is something else, None when that is open."""
    if not text.startswith(tag):
        return None if tag.startswith(text) and not final else ""
    name, end, _ = text[len(tag) :].partition(">")
    if end:
        return name if 0 < len(name) <= _MAX_NAME and "\n" not in name and "<" not in name else ""
    return None if not final and len(name) <= _MAX_NAME and "\n" not in name and "<" not in name else ""
