"""What an answer can be held to, compiled with llguidance and tried out before an answer begins.

Why llguidance 1.9.1 and not xgrammar 0.2.8: it refuses keywords that it has not implemented, where xgrammar leaves
out multipleOf, oneOf, look-ahead in a pattern and more in silence; it has limits on fuel, items and states; it is
3 MB without dependencies, in one wheel for every Python (MIT; x86-64 and aarch64). Tried on 94 hostile schemas and
regular expressions of ours with 2,048 tokens: five held xgrammar for more than 20 s and a mask took up to 640 ms;
four held llguidance for more than a second (5, 7, 27 and more than 30 s, 2.3 GB), a mask took up to 450 ms. Deep
references end the process of either by stack overflow.

So no limit inside the library is enough, and a grammar is first compiled and followed for some tokens in a process
of its own (`grammar_trial.py`), with limits on its time, memory and stack. What passes is compiled here, once an
answer, in 0.5 to 6 ms for common schemas; llguidance lets other threads run.
"""

import hashlib
import json
import math
import os
import re
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark

from nanoserve.errors import QueueFull, RequestError
from nanoserve.grammar_schema import MAX_TEXT, clean_schema, refuse, with_options
from nanoserve.grammar_tools import tool_grammar
from nanoserve.grammar_trial import Vocabulary
from nanoserve.messages import check_unicode
from nanoserve.request import clip

TRIAL_SECONDS = 4.5
"""Of the clock, whatever else the machine does."""
TRIALS = 2
"""That run at once."""
PATIENCE = 1.0
"""Seconds to wait for one of them to end; with `TRIAL_SECONDS` every grammar has its verdict within 6."""
VERDICTS = 64
"""Grammars that are remembered."""

LIMITS: Mapping[str, Any] = {"max_lexer_states": 100_000, "verbose_errors": False}
"""Of llguidance's, where its own are not meant; 1 to 2 kB a state."""

_EBNF = re.compile(r"^\s*[\w-]+\s*::=", re.MULTILINE)
_TRIAL = Path(__file__).with_name("grammar_trial.py")


@dataclass(frozen=True, slots=True)
class JsonSchema:
    """JSON that is valid under a schema (2020-12); ``{"type": "object"}`` is any JSON object."""

    schema: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Regex:
    r"""A text that a regular expression matches whole.

    Rust's dialect without look-around and back-references, in which \d and \w are of ASCII, as in JavaScript.
    """

    pattern: str


@dataclass(frozen=True, slots=True)
class Choice:
    """One of some texts."""

    options: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Lark:
    """A text of a context-free grammar: llguidance's dialect of Lark, or EBNF with ``root ::=``."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCalls:
    """Calls of these tools and nothing else, or one other thing instead of calls.

    Attributes:
        tools: the JSON schemas of the parameters, by the tool's name.
        several: more than one call may come.
        otherwise: what the answer is where it makes no call; None: it makes one.
    """

    tools: Mapping[str, Mapping[str, Any]]
    several: bool = True
    otherwise: JsonSchema | None = None


Grammar = JsonSchema | Regex | Choice | Lark | ToolCalls


class Matcher:
    """Follows what an answer says; its end tokens may come where the grammar may end.

    Args:
        tokenizer: of the model's vocabulary.
        grammar: one that passed its trial.
        ends: the mask of the end tokens.

    Attributes:
        ended: nothing may follow, but for an end token.
    """

    def __init__(self, tokenizer: LLTokenizer, grammar: str, ends: int) -> None:
        self._matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(**LIMITS))
        self._ends = ends
        self.ended = False

    def allowed(self) -> int:
        """The ids that may come next: bit i for id i.

        Raises:
            RequestError: the grammar has become too complex to follow.
        """
        mask = int.from_bytes(self._matcher.compute_bitmask(), "little")
        self._check()
        self.ended = not mask & ~self._ends
        return mask

    def push(self, token: int) -> None:
        """Take note of the token that was drawn.

        Raises:
            RequestError: as `allowed`.
        """
        self._matcher.consume_token(token)
        self._check()
        self.ended = self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RequestError(
                f"the answer cannot be held to its grammar any more: {_said(self._matcher.get_error())}"
            )


class Compiler:
    """Compiles grammars for one vocabulary. Safe to share between threads.

    Args:
        vocabulary: the model's; control tokens are b"" in it, so that no text yields one.
        tags: ``<tool_call>`` and ``</tool_call>``, as a grammar writes them.
    """

    def __init__(self, vocabulary: Vocabulary, tags: tuple[str, str]) -> None:
        self._tokenizer = LLTokenizer(vocabulary, eos_token=list(vocabulary.end_ids))
        self._tags = tags
        self._ends = sum(1 << end for end in vocabulary.end_ids)
        self._end_ids = vocabulary.end_ids
        self._tokens = "\n".join(token.hex() for token in vocabulary.tokens)
        self._verdicts: OrderedDict[bytes, _Verdict] = OrderedDict()
        self._trying: dict[bytes, Future[_Verdict]] = {}
        self._lock = threading.Lock()  # guards both
        self._slots = threading.Semaphore(TRIALS)

    def compile(self, grammar: Grammar, param: str) -> Callable[[], Matcher]:
        """Try a grammar out, unless it is known, and give what makes a matcher of it.

        Takes up to `PATIENCE` + `TRIAL_SECONDS`, in which other threads run; a matcher, up to a second.

        Args:
            grammar: as a client wrote it; nothing in it is trusted.
            param: the request's field, for errors.

        Raises:
            RequestError: it is malformed, not supported, or too large or too complex.
            QueueFull: too many grammars are being tried.
        """
        text = source(grammar, param, self._tags)
        if len(text) > MAX_TEXT:
            refuse(f"is a grammar of {len(text)} characters: at most {MAX_TEXT} are taken", param)
        verdict = self._verdict(text)
        if verdict.wrong is not None:
            refuse(f"cannot be used: {_said(verdict.wrong)}", param)
        return lambda: Matcher(self._tokenizer, verdict.grammar, self._ends)

    def _verdict(self, text: str) -> "_Verdict":
        """What is known of a grammar, or found out now, by one thread however many ask."""
        key = hashlib.sha256(text.encode()).digest()
        with self._lock:
            if key in self._verdicts:
                self._verdicts.move_to_end(key)
                return self._verdicts[key]
            pending, own = self._trying.get(key), Future[_Verdict]()
            if pending is None:
                self._trying[key] = own
        if pending is not None:
            return pending.result()
        try:
            verdict = self._find_out(text)
        except BaseException as error:
            with self._lock:
                del self._trying[key]
            own.set_exception(error)
            raise
        with self._lock:
            del self._trying[key]
            self._verdicts[key] = verdict
            if len(self._verdicts) > VERDICTS:
                self._verdicts.popitem(last=False)
        own.set_result(verdict)
        return verdict

    def _find_out(self, text: str) -> "_Verdict":
        if not self._slots.acquire(timeout=PATIENCE):
            raise QueueFull(TRIALS, retry_after=math.ceil(TRIAL_SECONDS))
        try:
            return self._try(text)
        finally:
            self._slots.release()

    def _try(self, text: str) -> "_Verdict":
        """Compile it in a process of its own."""
        head = {"grammar": text, "ebnf": bool(_EBNF.search(text)), "end_ids": self._end_ids, "limits": LIMITS}
        try:
            done = subprocess.run(
                [sys.executable, "-P", str(_TRIAL)],
                input=f"{json.dumps(head)}\n{self._tokens}",
                capture_output=True,
                encoding="utf-8",
                timeout=TRIAL_SECONDS,
                env={**os.environ, "MALLOC_ARENA_MAX": "1"},  # what an arena reserves would count as memory used
                check=False,
            )
        except subprocess.TimeoutExpired:
            return _Verdict("", "it takes too long to compile: simplify it")
        answer: dict[str, str] = json.loads(done.stdout) if done.returncode == 0 else {}
        if "grammar" in answer:
            return _Verdict(answer["grammar"])
        return _Verdict(
            "", answer.get("error", "it takes too much time, memory or nesting to compile: simplify it")
        )


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What a trial found: the grammar to compile, or what is wrong."""

    grammar: str
    wrong: str | None = None


def source(grammar: Grammar, param: str, tags: tuple[str, str]) -> str:
    """The grammar as llguidance reads it.

    Raises:
        RequestError: it is malformed, or has something that is not supported.
    """
    match grammar:
        case JsonSchema(schema):
            return json.dumps({"grammars": [{"json_schema": with_options(clean_schema(schema, param))}]})
        case ToolCalls(tools, several, otherwise):
            calls = tool_grammar(tools, several, tags)
            if otherwise is None:
                return f"start: calls\n{calls}"
            schema = json.dumps(with_options(clean_schema(otherwise.schema, param)))
            return f"start: calls | answer\nanswer: %json {schema}\n{calls}"
        case Regex(pattern):
            check_unicode(pattern, param)
            return LLMatcher.grammar_from_regex(regex_to_lark(pattern, "dw"))
        case Choice(options):
            if not options:
                refuse("is empty: give at least one text to choose from", param)
            for option in options:
                check_unicode(option, param)
            return f"start: CHOICE\nCHOICE: {' | '.join(map(json.dumps, options))}"
        case Lark(text):
            check_unicode(text, param)
            return text


def _said(error: str) -> str:
    """What llguidance said, in a line and in our words where its own help nobody."""
    if "coerce_one_of" in error:
        return "it has a oneOf whose branches may overlap: use anyOf"
    if "regex parse error" in error:
        return (
            f"it has a regular expression with an error: {clip(error.rpartition('error: ')[2].split(chr(10))[0])}"
        )
    return clip(" ".join(error.replace("<non-verbose/>", "").split()), 200)
