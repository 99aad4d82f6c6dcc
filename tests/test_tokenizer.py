"""The vocabulary against transformers and tokenizers, the incremental decoder, loading, and refusals."""

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from nanoserve.chat import Conversation
from nanoserve.errors import CheckpointError, RequestError, UnsupportedModel
from nanoserve.random_tokenizer import write_tokenizer
from nanoserve.reasoning import Thinking
from nanoserve.tokenizer import Tokenizer
from nanoserve.tools import Tools

Spec = dict[str, Any]
TEXTS = [
    "",
    "the river runs past the old mill",
    " leading and trailing ",
    "\n\n a\tb\r\n",
    "日本語 and 🎉👩‍👩‍👧 e\u0301",
    "don't 123 4567 !?<> <|not_a_token|>",
    "x" * 300,
]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": "the", "b": [1, {"c": None}]}}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "s"}}}}}]
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "You are the river."},
    {"role": "user", "content": "  Hi\n\n"},
    {"role": "assistant", "content": "", "reasoning_content": "what?", "tool_calls": [CALL]},
    {"role": "tool", "content": "日本\n", "tool_call_id": "1"},
    {"role": "assistant", "content": "<think>\nx\n</think>\ny"},
    {"role": "user", "content": "and 1 < 2 > 0?"},
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path, 1024)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return load(directory)


@pytest.fixture(scope="module")
def spec(directory: Path) -> Spec:
    return json.loads((directory / "tokenizer.json").read_text())


def load(directory: Path) -> Tokenizer:
    loaded = Tokenizer.load(directory)
    assert loaded is not None
    return loaded


def changed(spec: Spec, **parts: Any) -> Spec:
    return {**json.loads(json.dumps(spec)), **parts}


def reference(spec: Spec, template: str | None = None) -> PreTrainedTokenizerFast:
    inner = tokenizers.Tokenizer.from_str(json.dumps(spec))
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=template)


# Ids


def prefix_space(spec: Spec) -> Spec:
    return changed(spec, pre_tokenizer={**spec["pre_tokenizer"], "add_prefix_space": True})


def split_then_bytes(spec: Spec) -> Spec:
    split = {
        "type": "Split",
        "pattern": {"Regex": r"\p{L}+|\p{N}|\s+(?!\S)|\s+|[^\s\p{L}\p{N}]+"},
        "behavior": "Isolated",
        "invert": False,
    }
    parts = [split, {**spec["pre_tokenizer"], "use_regex": False}]
    return changed(spec, pre_tokenizer={"type": "Sequence", "pretokenizers": parts})


def normalized(spec: Spec) -> Spec:
    return changed(spec, normalizer={"type": "NFC"})


def swallowing_space(spec: Spec) -> Spec:
    tokens = [{**token, "lstrip": True, "rstrip": True} for token in spec["added_tokens"]]
    return changed(spec, added_tokens=tokens)


VARIANTS = [changed, prefix_space, split_then_bytes, normalized, swallowing_space]


@pytest.mark.parametrize("variant", VARIANTS)
def test_ids_equal_transformers(directory: Path, spec: Spec, variant: Callable[[Spec], Spec]) -> None:
    template = (directory / "chat_template.jinja").read_text()
    ours = Tokenizer(variant(spec), template)
    theirs = reference(variant(spec), template)
    for text in [*TEXTS, "a <think> b</think>  c<|im_end|>"]:
        assert ours.encode(text) == theirs.encode(text)
    texts = [*TEXTS[1:], "".join(TEXTS)]
    chats = [CHAT[:2], CHAT, *([*CHAT, {"role": "assistant", "content": text}] for text in texts)]
    for chat in chats:
        for tools in (None, TOOLS):
            expected = theirs.apply_chat_template(
                chat,
                tools=cast("Any", tools),
                tokenize=True,
                add_generation_prompt=True,
                return_dict=False,
            )
            assert ours.encode_chat(chat, tools=tools) == expected


def beginning_with_s(spec: Spec) -> Spec:
    pieces = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    known = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    template = {"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": known}
    return changed(spec, post_processor=template)


def test_special_tokens_of_the_post_processor(spec: Spec) -> None:
    tokenizer = Tokenizer(beginning_with_s(spec), "{{ messages[0].content }}")
    assert tokenizer.encode("the")[0] == 1
    assert 1 not in tokenizer.encode("the", add_special_tokens=False)
    assert 1 not in tokenizer.encode_chat([{"role": "user", "content": "the"}])


def test_a_chat_asks_for_special_tokens_only_where_there_are_none_to_add(spec: Spec) -> None:
    messages = [{"role": "user", "content": "the"}]
    chat = Conversation(messages, Tools(), Thinking({}), True, add_special_tokens=True)
    plain, adding = (Tokenizer(kind, "{{ messages[0].content }}") for kind in (spec, beginning_with_s(spec)))
    assert chat.encode(plain) == tuple(plain.encode("the"))
    with pytest.raises(RequestError, match="must be false") as caught:
        chat.encode(adding)
    assert caught.value.param == "add_special_tokens"


def test_truncation_and_padding_of_the_file_are_off(spec: Spec) -> None:
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    tokenizer = Tokenizer(changed(spec, truncation=truncation))
    assert len(tokenizer.encode("x y z w")) > 2


# Text


def test_bytes_and_text_of_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes(12) == b"<think>"
    assert sorted(tokenizer.token_bytes(id) for id in range(20, 276)) == [bytes([b]) for b in range(256)]
    high = next(id for id in range(20, 276) if tokenizer.token_bytes(id) == b"\xf0")
    assert tokenizer.token_text(high) == "\ufffd"
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b""  # a padded row of the embedding
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode("ünï 🎉"))) == "ünï 🎉".encode()


def test_only_the_answers_own_tags_are_shown(tokenizer: Tokenizer) -> None:
    ids = list(range(20))
    tags = "<think></think><tool_call></tool_call><tool_response></tool_response>"
    assert tokenizer.decode(ids) == tags
    everything = tokenizer.decode(ids, skip_special=False)
    assert everything.startswith("<unk><s></s><SPECIAL_3>")
    assert "<|im_end|>" in everything


def test_decode_equals_the_library(tokenizer: Tokenizer, spec: Spec) -> None:
    library = tokenizers.Tokenizer.from_str(json.dumps(spec))
    rng = random.Random(3)
    for _ in range(500):
        ids = rng.choices(range(20, 1024), k=rng.randint(0, 12))
        assert tokenizer.decode(ids) == library.decode(ids)


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = tokenizer.detokenizer()
    return [*(stream.push(id) for id in ids), stream.flush()]


def test_pieces_add_up_to_the_whole(tokenizer: Tokenizer) -> None:
    rng = random.Random(5)
    texts = ["🎉👩‍👩‍👧", "日本語", "e\u0301 ü", " the  and ", "<|im_end|>", "a\ufffdb", "\u200f\u0000"]
    bytes_ = range(20, 276)
    for _ in range(3000):
        kinds = [
            lambda: rng.choices(bytes_, k=4),  # mostly invalid UTF-8
            lambda: tokenizer.encode(rng.choice(texts)),
            lambda: tokenizer.encode(rng.choice(texts))[: rng.randint(0, 3)],  # a character cut short
            lambda: rng.choices(range(1100), k=3),  # anything, controls and unknown ids too
        ]
        ids = [id for _ in range(rng.randint(1, 4)) for id in rng.choice(kinds)()]
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_character_comes_whole_and_at_once(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🎉é")
    assert streamed(tokenizer, ids) == ["", "", "", "🎉", "", "é", ""]
    assert streamed(tokenizer, ids[:2]) == ["", "", "\ufffd"]


# Loading


def test_without_tokenizer_there_is_none(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert Tokenizer.load(tmp_path) is None


def test_vocab_size_counts_from_the_largest_id(spec: Spec) -> None:
    sparse = changed(spec)
    sparse["model"]["vocab"]["zz_unused"] = 5000
    assert Tokenizer(sparse).vocab_size == 5001


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_pipes_and_dangling_links_are_faults(tmp_path: Path, directory: Path, name: str) -> None:
    for path in directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match="not a regular file"):
        Tokenizer.load(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("nowhere")
    with pytest.raises(CheckpointError, match="is missing"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        ({"tokenizer.json": "{"}, "tokenizer.json: is not JSON"),
        ({"tokenizer.json": ""}, "tokenizer.json: is not JSON"),
        ({"tokenizer.json": "[" * 100_000}, "tokenizer.json: is not JSON"),
        ({"tokenizer.json": b"\xff\xfe\x00"}, "tokenizer.json: is not JSON"),
        ({"tokenizer.json": "[]"}, "tokenizer.json: holds a list"),
        ({"tokenizer.json": "{}"}, "tokenizer.json: model must be BPE"),
        ({"tokenizer_config.json": "nope"}, "tokenizer_config.json: is not JSON"),
        ({"tokenizer_config.json": '{"eos_token": 3}'}, "tokenizer_config.json: eos_token"),
        ({"special_tokens_map.json": "[1]"}, "special_tokens_map.json: holds a list"),
        ({"chat_template.jinja": "a\n{% if %}"}, "chat_template.jinja: chat template, line 2: "),
        ({"chat_template.jinja": b"\xff"}, "chat_template.jinja: is not UTF-8 text"),
    ],
)
def test_broken_files_are_named(
    tmp_path: Path, directory: Path, files: dict[str, str | bytes], fault: str
) -> None:
    for path in directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for name, content in files.items():
        data = content.encode() if isinstance(content, str) else content
        (tmp_path / name).write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.load(tmp_path)
    assert str(caught.value).startswith(fault)


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        (("model", "type"), "WordPiece", "BPE"),
        (("model", "byte_fallback"), True, "byte_fallback"),
        (("model", "end_of_word_suffix"), "</w>", "end_of_word_suffix"),
        (("decoder",), {"type": "Metaspace", "replacement": "_"}, "decoder"),
        (("decoder",), None, "decoder"),
        (("pre_tokenizer",), None, "pre_tokenizer"),
        (("pre_tokenizer",), {"type": "Whitespace"}, "pre_tokenizer"),
        (("model", "vocab"), {"a": 0}, "255 of the 256 bytes"),
        (("added_tokens", 19, "content"), "x", "two characters"),
        (("added_tokens", 19, "content"), "  ", "two characters"),
        (("added_tokens", 19, "content"), "word", "punctuation"),
        (("added_tokens", 19, "single_word"), True, "single_word"),
    ],
)
def test_other_kinds_are_refused(spec: Spec, path: tuple[str | int, ...], value: object, fault: str) -> None:
    other = changed(spec)
    place: Any = other
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(UnsupportedModel, match=fault):
        Tokenizer(other)


def test_merges_that_do_not_fit_the_vocabulary(spec: Spec) -> None:
    other = changed(spec)
    other["model"]["merges"].append(["zq", "qqq"])
    with pytest.raises(CheckpointError, match="not a valid tokenizer"):
        Tokenizer(other)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"chat_template": "one"}, "one"),
        (
            {"chat_template": [{"name": "tool", "template": "x"}, {"name": "default", "template": "two"}]},
            "two",
        ),
        ({"chat_template": "{{ eos_token }}", "eos_token": {"content": "<|im_end|>"}}, "<|im_end|>"),
        ({"chat_template": "{{ bos_token }}"}, "<s>"),  # from special_tokens_map.json
        ({}, None),
    ],
)
def test_places_of_the_template(
    tmp_path: Path, directory: Path, config: Mapping[str, Any], expected: str | None
) -> None:
    (tmp_path / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "<s>"}')
    tokenizer = load(tmp_path)
    assert tokenizer.has_chat_template == (expected is not None)
    if expected:
        assert tokenizer.render_chat([{"role": "user", "content": ""}]) == expected


@pytest.mark.parametrize("chat_template", [[], [{"name": "rag", "template": ""}], 3, {"default": ""}])
def test_template_in_no_known_place(tmp_path: Path, directory: Path, chat_template: object) -> None:
    (tmp_path / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": chat_template}))
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: chat_template"):
        Tokenizer.load(tmp_path)


def test_code_beside_the_tokenizer_never_runs(tmp_path: Path) -> None:
    """S1."""
    write_tokenizer(tmp_path, 512)
    canary = tmp_path / "canary"
    (tmp_path / "tokenizer.py").write_text(f"open({str(canary)!r}, 'w')")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["tokenizer.Evil", None]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    load(tmp_path).encode("x")
    assert not canary.exists()


def test_torch_is_never_imported(directory: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from nanoserve.tokenizer import Tokenizer; import nanoserve.text;"
        f"t = Tokenizer.load(Path({str(directory)!r}));"
        "t.encode_chat([{'role': 'user', 'content': 'x'}]); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_lone_surrogate_in_a_prompt(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="character 1") as caught:
        tokenizer.encode("a\ud800")
    assert caught.value.param == "prompt"


def test_encoding_a_long_text_lets_other_threads_run(directory: Path) -> None:
    """The event loop and the decode loop share the process with it."""
    tokenizer = Tokenizer.load(directory)
    assert tokenizer is not None
    done, gaps = threading.Event(), [0.0]

    def tick() -> None:
        last = time.monotonic()
        while not done.is_set():
            time.sleep(0.001)
            now = time.monotonic()
            gaps.append(now - last)
            last = now

    thread = threading.Thread(target=tick)
    thread.start()
    started = time.monotonic()
    tokenizer.encode("word " * 400_000)
    took = time.monotonic() - started
    done.set()
    thread.join()
    assert max(gaps) < max(0.4 * took, 0.1)
