"""What an answer may say next: a grammar that begins behind the reasoning, and an end of the reasoning in time.

An answer whose prompt leaves ``<think>`` open is reasoning first. Then

- with a grammar, nothing ends the reasoning but the token ``</think>``: neither another spelling of it or a call's
  tag, which the parser (`parsing.py`) goes by, nor the end of the answer. So the content is always the grammar's;
- up to two line feeds may stand between ``</think>`` and the content. Models of the family were trained to write
  one or two there, and made to leave them out would begin as they never have; the parser takes them off. The same
  holds for tool calls without reasoning, since every template has a line feed before a call. As the parser sees
  text alone, content that itself begins with a line feed comes behind both of these;
- with a budget, ``</think>`` comes after that many tokens at the latest, on a line of its own.
"""

import bisect
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from nanoserve.errors import RequestError
from nanoserve.grammar import Compiler, Grammar, Matcher, ToolCalls
from nanoserve.grammar_trial import Vocabulary
from nanoserve.parsing import MAX_LEAD
from nanoserve.request import Constraint, brief, is_integer
from nanoserve.tokenizer import Tokenizer

_OPEN, _CLOSE = "<think>", "</think>"
_TAGS = (b"</think>", b"<tool_call>", b"<function=")
"""Texts that end the reasoning."""
_LONGEST = max(map(len, _TAGS))


@dataclass(frozen=True, slots=True)
class ReasoningTokens:
    """What of a vocabulary matters to reasoning; masks are integers with bit i for id i.

    Attributes:
        open: the id of ``<think>``, if there is one.
        close: the id of ``</think>``, if there is one.
        line: the id of a line feed.
        prose: the mask of what reasoning is made of, and of what closes it.
        endings: the mask of the ids that begin with a tag's end, by that end.
        feeds: the ids of line feeds alone, with how many they are; at most `MAX_LEAD`.
        led: the mask of the ids that begin with a line feed.
        tokens: bytes of every id.
    """

    open: int | None
    close: int | None
    line: int
    prose: int
    endings: Mapping[bytes, int]
    feeds: Mapping[int, int]
    led: int
    tokens: Sequence[bytes]

    @classmethod
    def of(cls, tokens: Sequence[bytes], controls: Mapping[str, int]) -> "ReasoningTokens":
        """Look them up.

        Args:
            tokens: bytes of every id of the model's vocabulary, b"" for control tokens.
            controls: their ids by text.
        """
        ordered = sorted((token, id) for id, token in enumerate(tokens) if token)
        whole = _mask(id for token, id in ordered if any(tag in token for tag in _TAGS))
        close = controls.get(_CLOSE)
        return cls(
            open=controls.get(_OPEN),
            close=close,
            line=tokens.index(b"\n"),
            prose=_mask(id for _, id in ordered) & ~whole | (0 if close is None else 1 << close),
            endings={tag[n:]: _starting(tag[n:], ordered) for tag in _TAGS for n in range(1, len(tag))},
            feeds={id: len(token) for token, id in ordered if len(token) <= MAX_LEAD and not token.strip(b"\n")},
            led=_starting(b"\n", ordered),
            tokens=tokens,
        )

    def opened_by(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt leaves the reasoning open."""
        if self.open is None or self.close is None:
            return False
        return next((id == self.open for id in reversed(prompt) if id in (self.open, self.close)), False)


@dataclass(slots=True)
class Answer:
    """One answer's constraint; see `Constraint`.

    Attributes:
        tokens: of the vocabulary.
        content: what follows the reasoning; None is anything.
        budget: tokens of reasoning after which it is ended; None lets it go on.
        reasoning: it is open.
        lead: line feeds that may still come before the content.
        tail: the end of the text so far.
        spent: tokens of reasoning.
    """

    tokens: ReasoningTokens
    content: Matcher | None
    budget: int | None
    reasoning: bool
    lead: int
    tail: bytes
    spent: int = 0

    @property
    def ended(self) -> bool:
        """The content is complete; see `Constraint.ended`."""
        return not self.reasoning and self.content is not None and self.content.ended

    def allowed(self) -> bytes | None:
        """The ids that may come next; see `Constraint.allowed`."""
        mask = self._of_reasoning() if self.reasoning else self._of_content()
        return None if mask is None else mask.to_bytes(-(-len(self.tokens.tokens) // 32) * 4, "little")

    def _of_reasoning(self) -> int | None:
        known = self.tokens
        if self.budget is not None and self.spent >= self.budget:
            return 1 << (known.close or 0) if self.tail.endswith(b"\n") else 1 << known.line
        if self.content is None:
            return None
        mask = known.prose
        for tag in _TAGS if b"<" in self.tail else ():
            for n in range(1, len(tag)):
                if self.tail.endswith(tag[:n]):
                    mask &= ~known.endings[tag[n:]]
        return mask

    def _of_content(self) -> int | None:
        if self.content is None:
            return None
        mask = self.content.allowed()
        if not self.lead:
            return mask
        return mask & ~self.tokens.led | _mask(id for id, n in self.tokens.feeds.items() if n <= self.lead)

    def push(self, token: int) -> None:
        """Take note of the token that was drawn; see `Constraint.push`."""
        known = self.tokens
        if self.reasoning:
            self.spent += 1
            text = self.tail + known.tokens[token]
            self.tail = text[-_LONGEST:]
            # Without a grammar the model may also spell the tag, and the parser goes by the text.
            if token == known.close or _TAGS[0] in text:
                self.reasoning, self.lead = False, MAX_LEAD
        elif self.content is None:
            self.reasoning = token == known.open
        elif 0 < known.feeds.get(token, 0) <= self.lead:
            self.lead -= known.feeds[token]
        else:
            self.lead = 0
            self.content.push(token)


class Constraints:
    """Makes the constraints of one checkpoint's answers. Safe to share between threads.

    Args:
        tokenizer: the checkpoint's.
        vocab_size: of the model, whose vocabulary may be padded.
        end_ids: the model's own end tokens.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Collection[int]) -> None:
        controls = tokenizer.controls
        hidden = frozenset(controls.values())
        tokens = [b"" if id in hidden else tokenizer.token_bytes(id) for id in range(vocab_size)]
        self._reasoning = ReasoningTokens.of(tokens, controls)
        opening, closing = (
            f"<[{controls[tag]}]>" if tag in controls else f'"{tag}"' for tag in ("<tool_call>", "</tool_call>")
        )
        self._compiler = (
            Compiler(Vocabulary(tokens, sorted(end_ids), tokenizer.encode_text), (opening, closing))
            if end_ids
            else None
        )

    def of(
        self,
        prompt: Sequence[int],
        grammar: Grammar | None = None,
        thinking_budget: int | None = None,
        *,
        param: str = "grammar",
        budget_param: str = "thinking_budget",
    ) -> Callable[[], Constraint] | None:
        """What a `Request` takes as its constraint. May take seconds: not for a thread that others wait for.

        Args:
            prompt: the request's ids.
            grammar: what the answer, or what follows its reasoning, is to be.
            thinking_budget: tokens of reasoning at most, from 0.
            param: the request's field that the grammar comes from, for errors.
            budget_param: the one of the budget.

        Raises:
            RequestError: the grammar or the budget cannot be used; ``param`` names the field.
            QueueFull: too many grammars are being tried.
        """
        known = self._reasoning
        make: Callable[[], Matcher | None] = lambda: None  # noqa: E731
        if thinking_budget is not None:
            self._check_budget(thinking_budget, budget_param)
        if grammar is not None:
            if self._compiler is None:
                raise RequestError(f"{param} needs a model with an end token, and this one has none", param=param)
            make = self._compiler.compile(grammar, param)
        elif thinking_budget is None:
            return None
        reasoning = known.opened_by(prompt)
        lead = MAX_LEAD if isinstance(grammar, ToolCalls) else 0
        # The engine refuses ids beyond the vocabulary, later.
        tail = known.tokens[prompt[-1]] if prompt and 0 <= prompt[-1] < len(known.tokens) else b""
        return lambda: Answer(known, make(), thinking_budget, reasoning, lead, tail)

    def _check_budget(self, budget: int, name: str) -> None:
        if not is_integer(budget) or budget < 0:
            raise RequestError(f"{name} is {brief(budget)} and must be a whole number from 0", param=name)
        if self._reasoning.close is None:
            raise RequestError(f"{name} needs a model with {_CLOSE} in its vocabulary: leave it out", param=name)


def _mask(ids: Iterable[int]) -> int:
    """Bit i for id i."""
    found = list(ids)
    bits = bytearray(max(found, default=0) // 8 + 1)
    for id in found:
        bits[id // 8] |= 1 << id % 8
    return int.from_bytes(bits, "little")


def _starting(start: bytes, ordered: Sequence[tuple[bytes, int]]) -> int:
    """The mask of the tokens that begin with some bytes; ``ordered`` is sorted."""
    first = bisect.bisect_left(ordered, (start,))
    run = itertools.takewhile(lambda pair: pair[0].startswith(start), itertools.islice(ordered, first, None))
    return _mask(id for _, id in run)
