"""Offsets and bytes of reported tokens, held against the text they are of."""

import random

import pytest

from nanoserve.logprobs import CompletionLogprobs, chat_logprob
from nanoserve.random_tokenizer import write_tokenizer
from nanoserve.request import PromptScores, Token, TokenScore
from nanoserve.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory, 512)
    tokenizer = Tokenizer.load(directory)
    assert tokenizer is not None
    return tokenizer


def test_every_token_stands_at_its_offset(tokenizer: Tokenizer) -> None:
    """Random ids are full of broken characters; whole ones of several tokens come from real text."""
    draw = random.Random(5)
    texts = [
        tokenizer.encode("naïve 😀 日本語 é"),
        *([draw.randrange(20, 512) for _ in range(12)] for _ in range(300)),
    ]
    for ids in texts:
        cut = draw.randrange(len(ids))
        prompt, answer = tuple(ids[:cut]), ids[cut:]
        echo = tokenizer.decode(prompt, skip_special=False)
        lists = CompletionLogprobs(tokenizer, 0)
        lists.add_prompt(echo, prompt, PromptScores(tuple(TokenScore(-1.0) for _ in prompt)))
        stream = tokenizer.detokenizer()
        text = echo
        for id in answer:
            lists.add(Token(id, TokenScore(-1.0)))
            text += stream.push(id)
        text += stream.flush()
        table = lists.take()
        assert table is not None
        for token, offset in zip(table["tokens"], table["text_offset"], strict=True):
            whole = "\ufffd" not in token
            assert not whole or text.startswith(token, offset), (ids, token, offset)
        assert table["text_offset"] == sorted(table["text_offset"])


def test_a_broken_character_does_not_shift_what_follows(tokenizer: Tokenizer) -> None:
    lists = CompletionLogprobs(tokenizer, 0)
    first = next(id for id in range(512) if tokenizer.token_bytes(id) == b"\xe2")
    a, b = (tokenizer.encode(letter)[0] for letter in "ab")
    for id in (first, a, b):
        lists.add(Token(id, TokenScore(-1.0)))
    table = lists.take()
    assert table is not None
    assert table["text_offset"] == [0, 1, 2]


def test_bytes_spell_the_content(tokenizer: Tokenizer) -> None:
    ids = [1, *tokenizer.encode("é <think>"), 11]
    entries = [chat_logprob(tokenizer, Token(id, TokenScore(-1.0))) for id in ids]
    assert entries[0]["bytes"] is entries[-1]["bytes"] is None
    assert (entries[0]["token"], entries[-1]["token"]) == ("<s>", "<|im_end|>")
    spelled = b"".join(bytes(entry["bytes"]) for entry in entries if entry["bytes"])
    assert spelled.decode() == tokenizer.decode(ids)
