"""The random model's tokenizer files, and the behaviour of its chat template."""

import json
from pathlib import Path
from typing import Any

import pytest

from nanoserve.errors import ConfigError
from nanoserve.random_tokenizer import write_tokenizer
from nanoserve.tokenizer import Tokenizer

OPEN = "<|im_start|>assistant\n<think>\n"
USER = {"role": "user", "content": "Hi"}
CALL: dict[str, Any] = {"type": "function", "id": "c", "function": {"name": "add", "arguments": {"a": 1}}}
CALL_TEXT = "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(tmp_path_factory.mktemp("tokenizer"), 1024)


def load(directory: Path, vocab_size: int) -> Tokenizer:
    write_tokenizer(directory, vocab_size)
    loaded = Tokenizer.load(directory)
    assert loaded is not None
    return loaded


def turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


@pytest.mark.parametrize("vocab_size", [512, 513, 5000, 20_000])
def test_every_id_has_a_token(tmp_path: Path, vocab_size: int) -> None:
    tokenizer = load(tmp_path, vocab_size)
    assert tokenizer.vocab_size == vocab_size
    assert all(tokenizer.token_bytes(id) for id in range(vocab_size))


def test_named_ids(tokenizer: Tokenizer) -> None:
    names = {0: "<unk>", 1: "<s>", 2: "</s>", 10: "<|im_start|>", 11: "<|im_end|>", 12: "<think>"}
    names |= {13: "</think>", 14: "<tool_call>", 15: "</tool_call>", 16: "<tool_response>"}
    names |= {17: "</tool_response>", 19: "<SPECIAL_19>"}
    assert {id: tokenizer.token_text(id) for id in names} == names
    assert [tokenizer.encode(text) for text in names.values()] == [[id] for id in names]


def test_same_files_every_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_tokenizer(tmp_path / name, 2000)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)


def test_english_is_merged_and_all_text_survives(tokenizer: Tokenizer) -> None:
    text = "the river and the valley — ünïcode 日本語 🎉 \x00\t\r\n end"
    assert len(tokenizer.encode(" the and they with what")) == 5
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_config_names_no_code(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, 512)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert "auto_map" not in config
    assert (config["bos_token"], config["eos_token"]) == ("<s>", "<|im_end|>")


@pytest.mark.parametrize("vocab_size", [511, 400_001])
def test_vocab_size_out_of_range(tmp_path: Path, vocab_size: int) -> None:
    with pytest.raises(ConfigError, match=str(vocab_size)):
        write_tokenizer(tmp_path, vocab_size)


def test_system_turn_is_always_there(tokenizer: Tokenizer) -> None:
    assert tokenizer.render_chat([USER]) == turn("system", "") + turn("user", "Hi") + OPEN
    system = {"role": "system", "content": "Be brief."}
    assert tokenizer.render_chat([system, USER]) == turn("system", "Be brief.") + turn("user", "Hi") + OPEN


def test_generation_prompt(tokenizer: Tokenizer) -> None:
    off = tokenizer.render_chat([USER], template_kwargs={"enable_thinking": False})
    assert off.endswith("<|im_start|>assistant\n<think></think>")
    assert tokenizer.render_chat([USER], add_generation_prompt=False).endswith(turn("user", "Hi"))


@pytest.mark.parametrize(
    ("fields", "kept", "truncated"),
    [
        ({"content": "yes"}, "<think></think>yes", "<think></think>yes"),
        (
            {"content": "yes", "reasoning_content": "hm"},
            "<think>\nhm\n</think>\nyes",
            "<think></think>\nyes",
        ),
        ({"content": "<think>\nhm\n</think>\nyes"}, "<think>\nhm\n</think>\nyes", "<think></think>\nyes"),
        (
            {"content": None, "reasoning_content": "hm", "tool_calls": [CALL]},
            f"<think>\nhm\n</think>\n{CALL_TEXT}",
            f"<think></think>\n{CALL_TEXT}",
        ),
        (
            {"content": " so ", "tool_calls": [CALL, CALL]},
            f"<think></think> so\n{CALL_TEXT}{CALL_TEXT}",
            f"<think></think>so\n{CALL_TEXT}{CALL_TEXT}",
        ),
    ],
)
def test_assistant_turns(tokenizer: Tokenizer, fields: dict[str, Any], kept: str, truncated: str) -> None:
    message = {"role": "assistant", **fields}
    head, tail = turn("system", "") + turn("user", "Hi"), turn("user", "Hi")
    last = tokenizer.render_chat([USER, message], add_generation_prompt=False)
    assert last == head + turn("assistant", kept)
    history = tokenizer.render_chat([USER, message, USER], add_generation_prompt=False)
    assert history == head + turn("assistant", truncated) + tail
    whole = tokenizer.render_chat(
        [USER, message, USER],
        add_generation_prompt=False,
        template_kwargs={"truncate_history_thinking": False},
    )
    assert whole == head + turn("assistant", kept) + tail


def test_tool_answers_share_a_user_turn(tokenizer: Tokenizer) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}
    tool = {"role": "tool", "content": "7"}
    text = tokenizer.render_chat([USER, call, tool, tool, USER], add_generation_prompt=False)
    answer = "<tool_response>\n7\n</tool_response>\n"
    assert text.endswith(turn("user", answer + answer) + turn("user", "Hi"))


def test_arguments_that_are_not_strings(tokenizer: Tokenizer) -> None:
    arguments = '{"list": [1, "é"], "flag": true, "text": "two\\nlines"}'
    call = {"function": {"name": "f", "arguments": arguments}}
    text = tokenizer.render_chat([USER, {"role": "assistant", "tool_calls": [call]}])
    assert '<parameter=list>\n[1, "é"]\n</parameter>' in text
    assert "<parameter=flag>\nTrue\n</parameter>" in text
    assert "<parameter=text>\ntwo\nlines\n</parameter>" in text


def test_tools_stand_in_the_system_turn(tokenizer: Tokenizer) -> None:
    properties = {
        "city": {"type": "string", "description": " Where. ", "enum": ["Köln"], "x": {"y": 1}},
        "anything": True,
    }
    schema = {"type": "object", "properties": properties, "required": ["city"], "strict": False}
    function = {"name": "weather", "description": "Tells.", "parameters": schema}
    tools = [{"type": "function", "function": function}, {"type": "function", "function": {"name": "now"}}]
    system = {"role": "system", "content": "Be brief."}
    text = tokenizer.render_chat([system, USER], tools=tools)
    assert text.startswith("<|im_start|>system\nBe brief.\n\n# Tools\n\n")
    assert (
        "<tools>\n<function>\n<name>weather</name>\n<description>Tells.</description>\n<parameters>\n"
        "<parameter>\n<name>city</name>\n<type>string</type>\n<description>Where.</description>\n"
        '<enum>["Köln"]</enum>\n<x>{"y": 1}</x>\n</parameter>\n'
        "<parameter>\n<name>anything</name>\n</parameter>\n"
        '<strict>False</strict>\n<required>["city"]</required>\n</parameters>\n</function>\n'
        "<function>\n<name>now</name>\n<parameters>\n</parameters>\n</function>\n</tools>\n\n"
    ) in text
    assert tokenizer.render_chat([USER], tools=tools).startswith("<|im_start|>system\n# Tools\n")
    empty = {"role": "system", "content": ""}
    assert tokenizer.render_chat([empty, USER], tools=tools) == tokenizer.render_chat([USER], tools=tools)
    assert tokenizer.render_chat([USER], tools=[]) == tokenizer.render_chat([USER])
