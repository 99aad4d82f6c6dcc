"""A tokenizer for checkpoints with random weights: real files with a made-up vocabulary."""

import itertools
import json
import string
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nanoserve.errors import ConfigError
from nanoserve.tokenizer import byte_symbols

MIN_VOCAB = 512
MAX_VOCAB = 400_000

_NAMED = {
    0: "<unk>",
    1: "<s>",
    2: "</s>",
    10: "<|im_start|>",
    11: "<|im_end|>",
    12: "<think>",
    13: "</think>",
    14: "<tool_call>",
    15: "</tool_call>",
    16: "<tool_response>",
    17: "</tool_response>",
}
"""Ids as in the released checkpoints where they are known; the tools' are ours."""

CONTROLS = [_NAMED.get(id, f"<SPECIAL_{id}>") for id in range(20)]
"""The control tokens of every vocabulary that we make, ids 0 to 19."""
_SPACE = "Ġ"  # the byte symbol of the space
_SAMPLE = """
the river runs past the old mill and under the stone bridge where children wait for the morning boat it was
never a large town but there is a market every week and people come from all over the valley with bread and
apples and wool they tell each other what they have seen and what they think will happen next when evening
comes the lamps are lit along the water and someone is always singing in the street of the bakers nobody can
say how long this has been so because the books that would know were lost in a fire more than one hundred
years ago still the song goes on and with it the work of the day
"""


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja; the same files every time.

    The vocabulary is 20 control tokens, the 256 bytes, merges that suit English, then merges of two, three
    and four letters until it is full.

    Args:
        directory: exists.
        vocab_size: ids from 0 to vocab_size - 1 all have a token.

    Raises:
        ConfigError: vocab_size is out of range.
    """
    if not MIN_VOCAB <= vocab_size <= MAX_VOCAB:
        raise ConfigError(f"vocab_size is {vocab_size} and must be in [{MIN_VOCAB}, {MAX_VOCAB}]")
    vocab, merges = _made_up_vocabulary(vocab_size)
    split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    write_tokenizer_files(directory, vocab, merges, split)


def write_tokenizer_files(
    directory: Path, vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], split: Mapping[str, Any]
) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja of a byte-level BPE vocabulary.

    Args:
        directory: exists.
        vocab: token → id; `CONTROLS` first.
        merges: best first.
        split: the pre-tokeniser, as tokenizer.json has it.
    """
    template = Path(__file__).parent / "data" / "chat_template.jinja"
    _write_json(directory / "tokenizer.json", _spec(vocab, merges, split))
    _write_json(directory / "tokenizer_config.json", _config())
    (directory / "chat_template.jinja").write_text(template.read_text(encoding="utf-8"), encoding="utf-8")


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "<|im_end|>",
        "pad_token": "<unk>",
        "unk_token": "<unk>",
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_048_576,
    }


def _made_up_vocabulary(vocab_size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    vocab = {text: id for id, text in enumerate([*CONTROLS, *byte_symbols()])}
    merges: list[tuple[str, str]] = []
    for left, right in itertools.chain(_trained_merges(), _letter_merges()):
        if len(vocab) == vocab_size:
            break
        if left + right not in vocab:
            vocab[left + right] = len(vocab)
            merges.append((left, right))
    return vocab, merges


def _spec(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], split: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(id, text) for id, text in enumerate(CONTROLS)],
        "normalizer": None,
        "pre_tokenizer": split,
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }


def _added(id: int, text: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": id, "content": text, **flags, "special": True}


def _trained_merges() -> list[tuple[str, str]]:
    """Byte-pair merges of the sample, most frequent first, down to pairs seen twice."""
    counts = Counter(_SPACE + word for word in _SAMPLE.split())
    words = {word: list(word) for word in counts}
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in words.items():
            for pair in itertools.pairwise(parts):
                pairs[pair] += counts[word]
        best = max(pairs, key=lambda pair: (pairs[pair], pair), default=None)
        if best is None or pairs[best] < 2:
            return merges
        merges.append(best)
        words = {word: _merged(parts, best) for word, parts in words.items()}


def _merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def _letter_merges() -> Iterator[tuple[str, str]]:
    """Every two letters, then every three, then four; each is its beginning and one letter more."""
    letters = string.ascii_lowercase
    for length in (1, 2, 3):
        for left in itertools.product(letters, repeat=length):
            for right in letters:
                yield "".join(left), right
