"""How far a training run is: conversations that the model would write without one wrong token.

Those of the examined tasks are held out; small talk and earlier turns are fresh draws of what is trained on.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from nanoserve.models.demo import arithmetic, conversation, recall, structured, tools
from nanoserve.models.demo.corpus import Document, document, pack
from nanoserve.models.demo.examples import Example
from nanoserve.models.demo.network import Network
from nanoserve.tokenizer import Tokenizer

_MAKERS: Mapping[str, Callable[[Random], Example]] = {
    "arithmetic": arithmetic.example,
    "tools": tools.example,
    "json": structured.example,
    "earlier": recall.earlier_turn,
    "recall_1k": lambda rng: recall.long_text(rng, 1000),
    "recall_4k": lambda rng: recall.long_text(rng, 4096),
    "recall_8k": lambda rng: recall.long_text(rng, 8192),
    "talk": conversation.example,
}


@dataclass(frozen=True, slots=True)
class ProgressSet:
    """Batches of conversations, each with a row of document numbers, and every number's task."""

    batches: list[dict[str, Tensor]]
    names: list[str]

    @classmethod
    def make(cls, tokenizer_directory: Path, batch: int, count: int) -> "ProgressSet":
        """``count`` conversations a task (fewer of the long ones), packed into batches of ``batch`` rows."""
        long = {"recall_1k": count // 3, "recall_4k": count // 5, "recall_8k": count // 8}
        found = documents(tokenizer_directory, dict.fromkeys(_MAKERS, count) | long)
        return cls(pack([one for _, one in found], batch), [name for name, _ in found])


def documents(tokenizer_directory: Path, counts: Mapping[str, int]) -> list[tuple[str, Document]]:
    """(task, conversation) pairs, so many of each task; always the same ones."""
    tokenizer = Tokenizer.load(tokenizer_directory)
    assert tokenizer is not None
    rng = Random("progress")
    found: list[tuple[str, Document]] = []
    for name, wanted in counts.items():
        have = 0
        while have < wanted:
            example = _MAKERS[name](rng)
            if example.held_out or name in ("talk", "earlier"):
                found.append((name, document(tokenizer, example)))
                have += 1
    return found


@torch.no_grad()
def measure(network: Network, held_out: ProgressSet, device: torch.device) -> dict[str, float]:
    """Per task the share of conversations whose every written token is the model's first choice.

    Also ``draft_agreement``: how often the draft's first choice is the trunk's, two tokens on, on written text.
    """
    network.hold()
    right: dict[str, list[bool]] = {}
    agreed = drafts = 0
    for batch in held_out.batches:
        moved = {key: value.to(device) for key, value in batch.items()}
        with torch.enable_grad():  # the same compiled graph as in training
            logits, drafted = network(moved["ids"], moved["place"])
        chosen, draft = logits.argmax(dim=-1), drafted.argmax(dim=-1)
        del logits, drafted
        written = moved["weights"][:, 1:] == 1
        wrong = (chosen[:, :-1] != moved["ids"][:, 1:]) & written
        failed = set(moved["document"][:, 1:][wrong].tolist())
        for number in set(moved["document"].flatten().tolist()) - {-1}:
            right.setdefault(held_out.names[number], []).append(number not in failed)
        later = (moved["weights"][:, 2:] == 1) & (moved["place"][:, 2:] >= 2)
        agreed += int(((draft[:, :-2] == chosen[:, 1:-1]) & later).sum())
        drafts += int(later.sum())
    shares = {name: round(sum(marks) / len(marks), 4) for name, marks in right.items()}
    return {**shares, "draft_agreement": round(agreed / max(drafts, 1), 4)}
