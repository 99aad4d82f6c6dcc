"""What the tests of grammars share: answers drawn from random logits, which know no grammar at all."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nanoserve.constraint import Constraints
from nanoserve.grammar import Grammar
from nanoserve.kernels.sample import SamplerState, sample
from nanoserve.random_tokenizer import write_tokenizer
from nanoserve.request import Constraint, SamplingParams
from nanoserve.sampler import begin_sampling, restrict
from nanoserve.tokenizer import Tokenizer

VOCAB = 521
"""Of the "model": the tokenizer's 512 and some padding, and no multiple of 32."""
_ENDING = b"\n</parameter>\n"
END, OPEN, CLOSE = 11, 12, 13
PROMPT = (10, 300)
THINKING = (10, 300, OPEN)


class Answerer:
    """A vocabulary, and a "model" that draws from random logits.

    What ends a string, an array or a parameter comes more often: else hardly one would end.

    Args:
        directory: where the tokenizer's files are to be.
    """

    def __init__(self, directory: Path) -> None:
        write_tokenizer(directory, 512)
        tokenizer = Tokenizer.load(directory)
        assert tokenizer is not None
        self.tokenizer = tokenizer
        self.constraints = Constraints(tokenizer, VOCAB, {2, END})
        self._ids = {tokenizer.token_bytes(id): id for id in range(20, 512)}
        self._favour = torch.zeros(VOCAB)
        for text in '"}]':
            self._favour[self.id(text)] = 4.0
        self._state = SamplerState.allocate(VOCAB, torch.device("cpu"))

    def id(self, text: str) -> int:
        (id,) = self.tokenizer.encode_text(text)
        return id

    def constraint(
        self, grammar: Grammar | None, prompt: Sequence[int] = PROMPT, budget: int | None = None
    ) -> Constraint:
        make = self.constraints.of(prompt, grammar, budget)
        assert make is not None
        return make()

    def draw(
        self, constraint: Constraint, seed: int, limit: int = 1500, **sampling: Any
    ) -> tuple[list[int], bool]:
        """(ids, whether the answer ended by itself), at temperature 1 unless told otherwise."""
        begin_sampling(self._state, SamplingParams(seed=seed, **sampling), torch.tensor(PROMPT), ())
        generator = torch.Generator().manual_seed(seed)
        ids, drawn = list[int](), torch.empty(1, dtype=torch.int64)
        for _ in range(limit):
            restrict(self._state, constraint.allowed())
            if constraint.ended:
                return ids, True
            logits = torch.randn(VOCAB, generator=generator) + self._favour
            tail = b"".join(map(self.tokenizer.token_bytes, ids[-20:]))
            begun = max(n for n in range(len(_ENDING)) if tail.endswith(_ENDING[:n]))
            logits[self.id(_ENDING[begun : begun + 1].decode())] += 12.0 if begun > 1 else 4.0
            sample(logits, self._state, drawn)
            ids.append(int(drawn))
            constraint.push(ids[-1])
            if constraint.ended or ids[-1] in (2, END):
                return ids, True
        return ids, False

    def text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids)

    def accepts(self, constraint: Constraint, text: str) -> bool:
        """Whether a text may come, in whatever tokens; the constraint then stands behind it, or where it fails."""
        rest = text.encode()
        while rest:
            now = allowed(constraint)
            fit = [t for n in range(1, len(rest) + 1) if (t := self._ids.get(rest[:n], -1)) in now]
            if not fit:
                # What is left may be the beginning of a token that the grammar forces.
                return any(id in now for token, id in self._ids.items() if token.startswith(rest))
            constraint.push(fit[-1])
            rest = rest[len(self.tokenizer.token_bytes(fit[-1])) :]
        return True

    def take(self, constraint: Constraint, id: int) -> bool:
        """Push a token, if it may come."""
        if not may(constraint, id):
            return False
        constraint.push(id)
        return True


def may(constraint: Constraint, id: int) -> bool:
    """Whether a token may come next."""
    return id in allowed(constraint)


def allowed(constraint: Constraint) -> set[int]:
    """The tokens that may come next."""
    mask = constraint.allowed()
    return {id for id in range(VOCAB) if mask is None or mask[id // 8] >> id % 8 & 1}
