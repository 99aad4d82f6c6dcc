"""TextStream against a whole-text oracle, over random cuts of the text into tokens."""

import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from nanoserve.errors import RequestError
from nanoserve.random_tokenizer import write_tokenizer
from nanoserve.text import StopSearch, TextStream
from nanoserve.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory, 1024)
    loaded = Tokenizer.load(directory)
    assert loaded is not None
    return loaded


def byte_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """One token a byte: the finest cut there is."""
    of_byte = {tokenizer.token_bytes(id): id for id in range(20, 276)}
    return [of_byte[bytes([byte])] for byte in text.encode()]


def random_cut(tokenizer: Tokenizer, text: str, rng: random.Random) -> list[int]:
    """The text as tokens, each cut at a random place: ordinary tokens here, single bytes there."""
    ids: list[int] = []
    while text:
        count = rng.randint(1, 6)
        piece, text = text[:count], text[count:]
        plain = tokenizer.encode(piece, add_special_tokens=False)
        ids += byte_ids(tokenizer, piece) if rng.random() < 0.3 else plain
    return ids


def run(tokenizer: Tokenizer, ids: Iterable[int], stop: Sequence[str]) -> tuple[str, bool]:
    stream = TextStream(tokenizer, stop)
    text = ""
    for id in ids:
        text += stream.push(id)
        if stream.stopped:
            break
    return text + stream.finish(), stream.stopped


def oracle(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    found = [at for word in stop if (at := text.find(word)) >= 0]
    return (text[: min(found)], True) if found else (text, False)


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("hello world", ["lo w"], "hel"),
        ("hello", ["hello"], ""),
        ("hello", ["hello world"], "hello"),
        ("abc", ["b", "abc"], ""),  # the match that begins first wins, though it ends last
        ("abd", ["b", "abc"], "a"),
        ("ab", ["b", "abc"], "a"),  # … and may turn out not to come: decided by finish
        ("aaab", ["aab"], "a"),
        ("ababac", ["abac"], "ab"),
        ("x\n\ny", ["\n\n"], "x"),
        ("ab🎉cd", ["🎉"], "ab"),
        ("日本語", ["本"], "日"),
        ("end", [], "end"),
    ],
)
def test_stop_strings(tokenizer: Tokenizer, text: str, stop: list[str], expected: str) -> None:
    for ids in (tokenizer.encode(text), byte_ids(tokenizer, text)):
        assert run(tokenizer, ids, stop) == (expected, expected != text)


def test_any_cut_agrees_with_the_whole_text(tokenizer: Tokenizer) -> None:
    rng = random.Random(7)
    stopped = 0
    for _ in range(1500):
        alphabet = rng.choice(["ab", "abc", "a 🎉é", "the \n"])
        text = "".join(rng.choices(alphabet, k=rng.randint(0, 24)))
        count = rng.randint(0, 4)
        stop = ["".join(rng.choices(alphabet, k=rng.randint(1, 5))) for _ in range(count)]
        got = run(tokenizer, random_cut(tokenizer, text, rng), stop)
        assert got == oracle(text, stop), (text, stop)
        stopped += got[1]
    assert 400 < stopped < 1300  # both outcomes were exercised


def test_nothing_of_a_stop_string_is_shown_early(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ["STOP"])
    shown = [stream.push(id) for id in byte_ids(tokenizer, "aSTOb")]
    assert shown == ["a", "", "", "", "STOb"]


def test_a_longer_stop_string_at_the_same_place_is_not_waited_for(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ["a", "ab"])
    assert stream.push(byte_ids(tokenizer, "a")[0]) == ""
    assert stream.stopped


def test_the_search_says_which_string_it_found() -> None:
    for cut in range(4):
        search = StopSearch(["b", "abc", "zz"])
        assert search.push("xabc"[:cut]) + search.push("xabc"[cut:]) == "x"
        assert (search.stopped, search.found) == (True, "abc")
    search = StopSearch(["b", "abc"])
    assert (search.push("ab"), search.found) == ("", None)
    assert (search.finish(), search.found) == ("a", "b")


def test_after_a_match_nothing_comes(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ["b"])
    assert [stream.push(id) for id in byte_ids(tokenizer, "abc")] == ["a", "", ""]
    assert stream.stopped
    assert stream.finish() == ""


def test_unfinished_character_ends_as_replacement(tokenizer: Tokenizer) -> None:
    ids = byte_ids(tokenizer, "é")[:1]
    assert run(tokenizer, ids, []) == ("\ufffd", False)
    assert run(tokenizer, ids, ["\ufffd"]) == ("", True)


def test_no_tokenizer_means_no_text() -> None:
    stream = TextStream(None, ["a"])
    assert (stream.push(5), stream.finish(), stream.stopped) == ("", "", False)


def test_empty_stop_string_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError) as caught:
        TextStream(tokenizer, ["a", ""])
    assert caught.value.param == "stop"


def test_held_text_is_bounded_by_the_stop_string(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ["a" * 50 + "b"])
    shown = sum(len(stream.push(id)) for id in byte_ids(tokenizer, "a" * 2000))
    assert shown == 1950
