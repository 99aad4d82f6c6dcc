"""Conversations to rows of token ids: which share each task gets, which tokens are learnt, how they are packed."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from nanoserve.models.demo import arithmetic, conversation, recall, structured, tools
from nanoserve.models.demo.examples import Example, aloud, without_thinking
from nanoserve.tokenizer import Tokenizer

ROW = 8704
"""Tokens of a row: 68 chunks of 128; a recall text of 8,192 tokens fits with its questions."""

PROMPT_WEIGHT = 0.02
"""Of tokens that the model only reads; 1 for those that it must write."""

_TURN, _END, _THINK = 10, 11, 12  # <|im_start|>, <|im_end|>, <think>
_QUIET = 0.2
"""Share of conversations without thinking."""


def _long_text(rng: Random) -> Example:
    length = round(2 ** rng.uniform(6.5, 13))
    return recall.long_text(rng, length, rng.randint(1, 3 + length // 1000))


@dataclass(frozen=True, slots=True)
class _Kind:
    make: Callable[[Random], Example]
    share: float
    quiet: Callable[[Example], Example]


KINDS: Mapping[str, _Kind] = {
    "arithmetic": _Kind(arithmetic.example, 0.30, aloud),
    "sums": _Kind(arithmetic.plain_sum, 0.03, aloud),
    "tools": _Kind(tools.example, 0.24, without_thinking),
    "json": _Kind(structured.example, 0.14, without_thinking),
    "recall": _Kind(_long_text, 0.18, without_thinking),
    "earlier": _Kind(recall.earlier_turn, 0.04, without_thinking),
    "talk": _Kind(conversation.example, 0.07, without_thinking),
}
"""Shares are of tokens."""


class Document(NamedTuple):
    """A conversation as int32 ids, and a weight for each as the target of the one before it."""

    ids: np.ndarray
    weights: np.ndarray


def document(tokenizer: Tokenizer, example: Example) -> Document:
    """Encode a whole conversation with the template that serving uses.

    What the assistant writes starts behind its prompt, ``<think>`` and a line feed, or ``<think></think>``.
    """
    switches = {} if example.thinking else {"enable_thinking": False}
    ids = tokenizer.encode_chat(
        example.messages, tools=example.tools, add_generation_prompt=False, template_kwargs=switches
    )
    weights = np.full(len(ids), PROMPT_WEIGHT, dtype=np.float32)
    writing = False
    for i, token in enumerate(ids):
        if token == _TURN:
            writing = False
        elif token == _THINK and not writing:
            writing, start = True, i + 2  # the line feed, or </think>
        if writing and i >= start:  # pyright: ignore[reportPossiblyUnboundVariable]  # set with writing
            weights[i] = 1.0
        if token == _END:
            writing = False
    return Document(np.array(ids, dtype=np.int32), weights)


def documents(tokenizer: Tokenizer, rng: Random) -> Iterator[Document]:
    """Training conversations without end, each kind by its share of the tokens."""
    spent = dict.fromkeys(KINDS, 0.0)
    while True:
        name = min(KINDS, key=lambda kind: spent[kind] / KINDS[kind].share)
        kind = KINDS[name]
        example = kind.make(rng)
        if name not in ("sums", "talk", "earlier") and example.held_out:
            continue
        if rng.random() < _QUIET:
            example = kind.quiet(example)
        one = document(tokenizer, example)
        if len(one.ids) > ROW:
            continue
        spent[name] += len(one.ids)
        yield one


def rows(tokenizer: Tokenizer, rng: Random) -> Iterator[dict[str, Tensor]]:
    """Rows of `ROW` tokens: ``ids``, ``place`` (position in its document) and ``document`` (its number in the row)
    int64, ``weights`` float32.

    A document that does not fit waits for the next row, so that none is cut.
    """
    source, waiting = documents(tokenizer, rng), list[Document]()
    while True:
        row: list[Document] = []
        room, tries = ROW, 0
        before, waiting = waiting, []
        for one in before:
            if len(one.ids) <= room:
                row.append(one)
                room -= len(one.ids)
            else:
                waiting.append(one)
        while room > 100 and tries < 12:
            one = next(source)
            if len(one.ids) <= room:
                row.append(one)
                room -= len(one.ids)
            else:
                waiting.append(one)
                tries += 1
        yield _row(row)


def _row(parts: list[Document], numbers: list[int] | None = None) -> dict[str, Tensor]:
    ids, weights, place = np.zeros(ROW, np.int64), np.zeros(ROW, np.float32), np.zeros(ROW, np.int64)
    document = np.full(ROW, -1, np.int64)
    at = 0
    for number, one in zip(numbers or range(len(parts)), parts, strict=True):
        end = at + len(one.ids)
        ids[at:end], weights[at:end], place[at:end] = one.ids, one.weights, np.arange(len(one.ids))
        document[at:end] = number
        weights[at] = 0  # nothing in the document comes before its first token
        at = end
    place[at:] = np.arange(ROW - at)
    arrays = {"ids": ids, "weights": weights, "place": place, "document": document}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def pack(parts: list[Document], batch: int) -> list[dict[str, Tensor]]:
    """All documents in batches of ``batch`` rows, the last one filled up with empty rows."""
    rows: list[list[int]] = [[]]
    used = 0
    for number, one in enumerate(parts):
        if used + len(one.ids) > ROW:
            rows.append([])
            used = 0
        rows[-1].append(number)
        used += len(one.ids)
    rows += [[]] * (-len(rows) % batch)
    made = [_row([parts[number] for number in row], row) for row in rows]
    groups = [made[i : i + batch] for i in range(0, len(made), batch)]
    return [{key: torch.stack([row[key] for row in group]) for key in group[0]} for group in groups]


class Rows(IterableDataset[dict[str, Tensor]]):
    """`rows` for a data loader, in int32 and without document numbers.

    Every worker has a stream of its own, fixed by the seed and its number.
    """

    def __init__(self, tokenizer_directory: Path, seed: int) -> None:
        self._directory, self._seed = tokenizer_directory, seed

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        info = get_worker_info()
        tokenizer = Tokenizer.load(self._directory)
        assert tokenizer is not None
        for row in rows(tokenizer, Random(f"training {self._seed} {info.id if info else 0}")):
            # Small, since containers often give little shared memory; the numbers are for examinations only.
            yield {"ids": row["ids"].int(), "place": row["place"].int(), "weights": row["weights"]}


def write_calibration(tokenizer_directory: Path, file: Path, count: int = 200) -> None:
    """Conversations as lines of token ids, for the export's FP8 scales; the same every time."""
    tokenizer = Tokenizer.load(tokenizer_directory)
    assert tokenizer is not None
    chosen = islice(documents(tokenizer, Random("calibration")), count)
    file.write_text("".join(f"{json.dumps(one.ids.tolist())}\n" for one in chosen), encoding="utf-8")
