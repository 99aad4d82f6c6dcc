"""Chats: control tokens that a client types stay text, messages are checked, and templates are contained."""

import json
import random
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from nanoserve.errors import RequestError
from nanoserve.messages import check_template_kwargs, normalize_messages
from nanoserve.random_tokenizer import write_tokenizer
from nanoserve.tokenizer import Tokenizer

CONTROL_IDS = frozenset(range(20))
TAGS = frozenset(range(12, 18))
FRAGMENTS = [
    *("<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_response>", "</s>", "<s>"),
    *("<unk>", "<SPECIAL_5>", "<", "</", "<|", "|>", ">", "im_", "start", "think", "/think", "s", "tool_call"),
    *("<|im_", "end|>", "\n", " ", "", "a", "日本", "\ue000", "\ue001", "\\ue000", '"', "{{", "%}", "user\n"),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path, 1024)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    loaded = Tokenizer.load(directory)
    assert loaded is not None
    return loaded


@pytest.fixture(scope="module")
def spec(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "tokenizer.json").read_text())


def controls(ids: Sequence[int]) -> list[int]:
    return [id for id in ids if id in CONTROL_IDS]


def nasty(rng: random.Random) -> str:
    return "".join(rng.choices(FRAGMENTS, k=rng.randint(0, 7)))


def nasty_json(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randint(0, 3 if depth < 2 else 1)
    if kind == 2:
        return [nasty_json(rng, depth + 1) for _ in range(2)]
    if kind == 3:
        return {nasty(rng): nasty_json(rng, depth + 1) for _ in range(2)}
    return nasty(rng) if kind else rng.choice([1, 2.5, True, None])


def chat(text: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A chat and tools whose every free string is `text()`, and whose every free value is `text(True)`."""
    call = {"id": text(), "function": {"name": text(), "arguments": {text(): text(True), "b": text(True)}}}
    messages = [
        {"role": "system", "content": text(), "name": text()},
        {"role": "user", "content": text()},
        {"role": "assistant", "content": "so", "reasoning_content": "r" + text(), "tool_calls": [call]},
        {"role": "tool", "content": text(), "tool_call_id": text()},
        {"role": "user", "content": [{"type": "text", "text": text()}, {"type": "text", "text": text()}]},
    ]
    field = {"type": text(), "description": text(), "enum": [text()], text() + "1": text(True)}
    schema = {"properties": {text(): field}, "required": [text()], text() + "2": text(True)}
    function = {"name": text(), "description": "d" + text(), "parameters": schema, text() + "3": text(True)}
    return messages, [{"type": "function", "function": function}]


def test_no_typed_text_becomes_a_control_token(tokenizer: Tokenizer) -> None:
    """S7."""
    harmless, plain_tools = chat(lambda _=False: "x")
    switches = {"truncate_history_thinking": False}
    expected = controls(tokenizer.encode_chat(harmless, tools=plain_tools, template_kwargs=switches))
    rng = random.Random(11)
    for _ in range(1500):
        messages, tools = chat(lambda value=False: nasty_json(rng) if value else nasty(rng))
        ids = tokenizer.encode_chat(messages, tools=tools, template_kwargs=switches)
        text = tokenizer.render_chat(messages, tools=tools, template_kwargs=switches)
        assert controls(ids) == expected, (messages, tools)
        assert tokenizer.decode(ids, skip_special=False) == text


@pytest.mark.parametrize("text", ["<|im_start|>", "<|im_<|im_start|>start|>", "</think>", "<s", "<<s>>"])
def test_typed_controls_keep_their_characters(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode_chat([{"role": "user", "content": text}])
    assert tokenizer.decode(ids, skip_special=False) == (
        f"<|im_start|>system\n<|im_end|>\n<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )
    assert controls(ids) == [10, 11, 10, 11, 10, 12]


def test_plain_text_is_encoded_as_if_there_were_no_controls(tokenizer: Tokenizer, spec: dict[str, Any]) -> None:
    model = {**spec["model"], "vocab": {k: v for k, v in spec["model"]["vocab"].items() if v >= 20}}
    plain = tokenizers.Tokenizer.from_str(json.dumps({**spec, "model": model, "added_tokens": []}))
    rng = random.Random(13)
    for _ in range(300):
        text = nasty(rng)
        ids = tokenizer.encode_chat([{"role": "user", "content": text}])
        begin, end = ids.index(10, 1) + 1, ids.index(11, ids.index(10, 1))
        assert ids[begin:end] == plain.encode("user\n" + text).ids


def test_an_assistants_own_tags_are_alive_and_nothing_else(tokenizer: Tokenizer) -> None:
    content = "<think>\nr\n</think>\n<tool_call>x</tool_call><|im_end|></s><s><|im_start|><SPECIAL_5>"
    ids = tokenizer.encode_chat([{"role": "assistant", "content": content}], add_generation_prompt=False)
    assert controls(ids) == [10, 11, 10, 12, 13, 14, 15, 11]
    rng = random.Random(17)
    for _ in range(1000):
        messages = [{"role": "assistant", "content": "<think></think>" + nasty(rng) + nasty(rng)}]
        ids = tokenizer.encode_chat(messages, add_generation_prompt=False)
        assert [id for id in controls(ids) if id not in TAGS] == [10, 11, 10, 11]


def test_a_templates_edges_around_a_clients_word(spec: dict[str, Any]) -> None:
    template = "{% for k, v in tools[0].items() %}{{ '<' ~ k ~ '>' ~ v ~ '</' ~ k | trim ~ '>' }}{% endfor %}"
    tokenizer = Tokenizer(spec, template)
    tool = {"think": 1, "s": 2, "|im_end|": 3, "/tool_call": 4, " think ": 5, "name": "f"}
    ids = tokenizer.encode_chat([{"role": "user", "content": ""}], tools=[tool])
    assert controls(ids) == []
    assert tokenizer.decode(ids).startswith("<think>1</think><s>2</s>")


def test_words_that_templates_compare_are_left_whole(spec: dict[str, Any]) -> None:
    added = json.loads(json.dumps(spec["added_tokens"]))
    for token, text in zip(added[18:], ("<user>", "<name>"), strict=True):
        token["content"] = text
    vocab = {id: text for text, id in spec["model"]["vocab"].items()} | {18: "<user>", 19: "<name>"}
    model = {**spec["model"], "vocab": {text: id for id, text in vocab.items()}}
    template = "{% if messages[0].role == 'user' %}{{ tools[0].name }}{% endif %}"
    tokenizer = Tokenizer({**spec, "added_tokens": added, "model": model}, template)
    assert tokenizer.render_chat(user(), tools=[{"name": "f"}]) == "f"


def test_two_strings_side_by_side(spec: dict[str, Any]) -> None:
    tokenizer = Tokenizer(spec, "{% for m in messages %}{{ m.content | trim }}{% endfor %}")
    for parts in (["<|im_", "end|>"], ["<", "think>"], ["<think", ">"], [" </", "s", "> "], ["<thi", "nk", ">"]):
        ids = tokenizer.encode_chat([{"role": "user", "content": part} for part in parts])
        assert controls(ids) == []
        assert tokenizer.decode(ids) == "".join(part.strip() for part in parts)


def test_switches_cannot_carry_controls(spec: dict[str, Any]) -> None:
    tokenizer = Tokenizer(spec, "{{ mood }}{{ '<think>' if mood == 'think' }}")
    user = [{"role": "user", "content": ""}]
    assert controls(tokenizer.encode_chat(user, template_kwargs={"mood": "<|im_end|>"})) == []
    assert controls(tokenizer.encode_chat(user, template_kwargs={"mood": "think"})) == [12]


def test_marker_escaped_by_a_templates_json(spec: dict[str, Any]) -> None:
    tokenizer = Tokenizer(spec, "{{ tools | tojson(ensure_ascii=True) }}")
    for text in ("<think>", "\ue000<think>", "\\ue000 <think>"):
        ids = tokenizer.encode_chat([{"role": "user", "content": ""}], tools=[{"x": text}])
        assert controls(ids) == []
        assert tokenizer.decode(ids) == json.dumps([{"x": text}])


def test_every_private_use_character_taken(tokenizer: Tokenizer) -> None:
    text = "".join(map(chr, range(0xE000, 0xF900)))
    tokenizer.encode_chat([{"role": "user", "content": text[:-1]}])
    with pytest.raises(RequestError, match="private-use"):
        tokenizer.encode_chat([{"role": "user", "content": text}])


def test_vocabulary_with_control_texts_as_whole_words(spec: dict[str, Any]) -> None:
    """Tokenizers with ignore_merges take a whole pre-token out of the vocabulary, without any merge."""
    other = {**spec, "model": {**spec["model"], "ignore_merges": True}}
    split = {"type": "Split", "pattern": {"Regex": r"\S+"}, "behavior": "Isolated", "invert": False}
    other["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [split, {**spec["pre_tokenizer"], "use_regex": False}],
    }
    tokenizer = Tokenizer(other, "{{ messages[0].content }}")
    assert controls(tokenizer.encode_chat([{"role": "user", "content": "a <think> b"}])) == []


def test_merges_that_build_a_control_text(spec: dict[str, Any]) -> None:
    model = json.loads(json.dumps(spec["model"]))
    model["vocab"] |= {"<s": 2000}
    model["merges"] += [["<", "s"], ["<s", ">"]]
    split = {**spec["pre_tokenizer"], "use_regex": False}
    tokenizer = Tokenizer({**spec, "model": model, "pre_tokenizer": split}, "{{ messages[0].content }}")
    assert controls(tokenizer.encode_chat([{"role": "user", "content": "<s>"}])) == []


def test_the_inputs_are_not_changed(tokenizer: Tokenizer) -> None:
    messages, tools = chat(lambda _=False: "<think>")
    before = json.dumps([messages, tools])
    tokenizer.encode_chat(messages, tools=tools)
    assert json.dumps([messages, tools]) == before


def test_long_chats_take_linear_time(tokenizer: Tokenizer) -> None:
    begin = time.perf_counter()
    tokenizer.encode_chat([{"role": "user", "content": "<|im_<think>" * 50_000}])
    assert time.perf_counter() - begin < 20


# Messages


def user(**fields: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "x", **fields}]


def assistant(**fields: Any) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": "c", **fields}]


def tool(**fields: Any) -> list[dict[str, Any]]:
    return [{"role": "tool", "content": "r", "tool_call_id": "1", **fields}]


def call(**function: Any) -> list[dict[str, Any]]:
    return [{"role": "assistant", "tool_calls": [{"function": {"name": "f", **function}}]}]


CALLS = call()[0]["tool_calls"]
# What openai's ChatCompletionMessage.model_dump() has beside its content.
DUMPED = {
    "role": "assistant",
    **dict.fromkeys(("refusal", "annotations", "audio", "function_call", "tool_calls")),
}


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        (["hi"], "messages[0]"),
        ([*user(), {"content": "x"}], "messages[1].role"),
        (user(role="robot"), "messages[0].role"),
        (user(role=["user"]), "messages[0].role"),
        (user(content=None), "messages[0].content"),
        (user(content=3), "messages[0].content"),
        ([{"role": "user"}], "messages[0].content"),
        (user(content=["x"]), "messages[0].content[0]"),
        (
            user(content=[{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]),
            "messages[0].content[1].type",
        ),
        (user(content=[{"type": "text", "text": None}]), "messages[0].content[0].text"),
        (user(content="a\ud800"), "messages[0]"),
        (user(name="\udfff"), "messages[0]"),
        (user(content=[]), "messages[0].content"),
        ([{"role": "system", "content": []}, *user()], "messages[0].content"),
        (user(name=["x"]), "messages[0].name"),
        (tool(tool_call_id=5), "messages[0].tool_call_id"),
        (assistant(reasoning_content=["r"]), "messages[0].reasoning_content"),
        (assistant(reasoning=["r"]), "messages[0].reasoning"),
        (assistant(reasoning="r", reasoning_content="s"), "messages[0].reasoning"),
        (assistant(annotations={}), "messages[0].annotations"),
        (assistant(provider_specific_fields=[]), "messages[0].provider_specific_fields"),
        ([{"role": "assistant", "tool_calls": {}}], "messages[0].tool_calls"),
        ([{"role": "assistant", "tool_calls": [1]}], "messages[0].tool_calls[0]"),
        ([{"role": "assistant", "tool_calls": [{}]}], "messages[0].tool_calls[0].function"),
        (call(name=None), "messages[0].tool_calls[0].function.name"),
        (call(arguments="{"), "messages[0].tool_calls[0].function.arguments"),
        (call(arguments="[1]"), "messages[0].tool_calls[0].function.arguments"),
        (call(arguments='{"a": NaN}'), "messages[0].tool_calls[0].function.arguments"),
        (call(arguments="[" * 100_000), "messages[0].tool_calls[0].function.arguments"),
        (call(arguments='{"a": "\\ud800"}'), "messages[0]"),
    ],
)
def test_malformed_messages(tokenizer: Tokenizer, messages: list[Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        tokenizer.encode_chat(messages)
    assert caught.value.param == param
    assert len(str(caught.value)) < 300
    str(caught.value).encode("utf-8")


def test_nesting_too_deep(tokenizer: Tokenizer) -> None:
    deep: Any = "x"
    for _ in range(100_000):
        deep = [deep]
    for tools in ([{"function": {"name": "f", "parameters": {"x": deep}}}], None):
        with pytest.raises(RequestError, match="nested too deeply"):
            tokenizer.encode_chat(call(arguments={"x": deep}) if tools is None else user(), tools=tools)
    for wrong in (user(content=deep), user(content=[deep]), user(name=deep), assistant(tool_calls=[deep])):
        with pytest.raises(RequestError, match="is an array and must be"):
            tokenizer.encode_chat(wrong)
    with pytest.raises(RequestError, match=r"kwargs\.mood is an array and must be"):
        check_template_kwargs({"mood": deep}, frozenset({"mood"}))
    while isinstance(deep, list):  # or freeing it would recurse as deeply
        deep = deep.pop()


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (user(content=[{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), user(content="ab")),
        (tool(content=[]), tool(content="")),
        (user(name="Ann"), user()),  # our template does not read it
        ([{"role": "developer", "content": "d"}, *user()], [{"role": "system", "content": "d"}, *user()]),
        (call(arguments='{"a": 1}'), call(arguments={"a": 1})),
        (call(arguments=""), call(arguments={})),
        (
            [{"role": "assistant", "content": "c", "reasoning": "r"}],
            [{"role": "assistant", "content": "c", "reasoning_content": "r"}],
        ),
        (assistant(reasoning="r", reasoning_content="r"), assistant(reasoning_content="r")),
        (assistant(reasoning="r", reasoning_content=""), assistant(reasoning_content="r")),
        (assistant(reasoning=""), assistant()),
        ([{**DUMPED, "content": None}], assistant(content="")),
        ([{"role": "assistant"}], assistant(content="")),
        (assistant(content=[]), assistant(content="")),
        ([{**DUMPED, "content": "c"}], assistant()),
        ([{**DUMPED, "content": "c", "annotations": []}], assistant()),
        (assistant(annotations=[{"type": "url_citation"}]), assistant()),
        (assistant(reasoning_content="r", provider_specific_fields={"reasoning": "r"}), assistant(reasoning="r")),
        ([{**DUMPED, "content": None, "tool_calls": CALLS}], call()),
        ([{"role": "assistant", "content": [], "tool_calls": CALLS}], call()),
        (user(tool_calls=None, tool_call_id=None, reasoning=None, prefix=None), user()),
    ],
)
def test_messages_that_mean_the_same(
    tokenizer: Tokenizer, given: list[dict[str, Any]], meant: list[dict[str, Any]]
) -> None:
    assert tokenizer.encode_chat(given) == tokenizer.encode_chat(meant)


@pytest.mark.parametrize(
    ("message", "key"),
    [
        *(
            (assistant(**{key: value}), key)
            for key, value in (
                ("function_call", {"name": "f", "arguments": "{}"}),
                ("audio", {"id": "a"}),
                ("refusal", "no"),
                ("prefix", True),
                ("tool_call_id", "1"),
                ("reasoning_details", []),
            )
        ),
        *(
            (user(**{key: value}), key)
            for key, value in (
                ("tool_calls", CALLS),
                ("tool_calls", []),
                ("reasoning", "r"),
                ("reasoning_content", "r"),
                ("annotations", []),
                ("contents", "x"),
            )
        ),
        (tool(tool_calls=CALLS), "tool_calls"),
        ([{"role": "developer", "content": "d", "weight": 0}], "weight"),
    ],
)
def test_no_field_is_dropped_in_silence(tokenizer: Tokenizer, message: list[dict[str, Any]], key: str) -> None:
    with pytest.raises(RequestError, match="leave it out") as caught:
        tokenizer.encode_chat([*user(), *message])
    assert (caught.value.param, caught.value.code) == (f"messages[1].{key}", "unsupported_parameter")


def test_templates_see_names_and_ids_but_no_annotations() -> None:
    given = [*user(name="Ann"), *tool(name="f"), *assistant(annotations=[{}])]
    assert normalize_messages(given) == [*user(name="Ann"), *tool(name="f"), *assistant()]


def test_reasoning_has_one_name() -> None:
    """Directly, for some versions of transformers rename it too."""
    message = {"role": "assistant", "content": "c", "reasoning": "r"}
    assert normalize_messages([message]) == [{"role": "assistant", "content": "c", "reasoning_content": "r"}]


def test_tools_must_be_objects(tokenizer: Tokenizer) -> None:
    bad: Any = [{"function": {"name": "f"}}, "g"]
    with pytest.raises(RequestError) as caught:
        tokenizer.encode_chat(user(), tools=bad)
    assert caught.value.param == "tools[1]"


# Templates


@pytest.mark.parametrize(
    ("kwargs", "param"),
    [
        ({"messages": "x"}, "chat_template_kwargs.messages"),
        ({"tools": None}, "chat_template_kwargs.tools"),
        ({"add_generation_prompt": False}, "chat_template_kwargs.add_generation_prompt"),
        ({"documents": "x"}, "chat_template_kwargs.documents"),
        ({"chat_template": "x"}, "chat_template_kwargs.chat_template"),
        ({"continue_final_message": True}, "chat_template_kwargs.continue_final_message"),
        ({"raise_exception": 1}, "chat_template_kwargs.raise_exception"),
        ({"bos_token": "x"}, "chat_template_kwargs.bos_token"),
        ({"mood": ["x"]}, "chat_template_kwargs.mood"),
        ({"mood": {}}, "chat_template_kwargs.mood"),
        ({"enable_thinking": "\ud800"}, "chat_template_kwargs"),
        ({"\ud800": 1}, "chat_template_kwargs.\\ud800"),
        ({"enable_thinking": ["x"]}, "chat_template_kwargs.enable_thinking"),
        ({"low_effort": True}, "chat_template_kwargs.low_effort"),
    ],
)
def test_switches_that_are_refused(tokenizer: Tokenizer, kwargs: Mapping[str, Any], param: str) -> None:
    """S2."""
    with pytest.raises(RequestError) as caught:
        tokenizer.encode_chat(user(), template_kwargs=kwargs)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles <' ~ messages[0].content) }}", "template: roles <<x"),
        ("{{ raise_exception('long ' * 1000) }}", "template: long "),
        ("{{ nothing.at.all }}", "UndefinedError"),
        ("{{ 1 + 'x' }}", "TypeError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{% for i in range(10**9) %}{% endfor %}", "OverflowError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ cycler.__init__.__globals__.os.system('touch canary') }}", "SecurityError"),
        ("{{ lipsum.__globals__['os'].system('touch canary') }}", "UndefinedError|SecurityError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
        ("{% include 'x' %}", "TypeError"),
        ("{{ '%d' % 'x' }}", "TypeError"),
        ("{{ 'x'.index('y') }}", "ValueError"),
    ],
)
def test_templates_that_fail(
    spec: dict[str, Any], template: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S2."""
    monkeypatch.chdir(tmp_path)
    tokenizer = Tokenizer(spec, template)
    begin = time.perf_counter()
    with pytest.raises(RequestError, match=reason) as caught:
        tokenizer.encode_chat(user(content="<x"))
    assert time.perf_counter() - begin < 5
    assert caught.value.param == "messages"
    assert not re.search(r"[\ue000-\uf8ff]|Traceback", str(caught.value))
    assert len(str(caught.value)) < 400
    assert not list(tmp_path.iterdir())


def test_no_template(spec: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="use /v1/completions") as caught:
        Tokenizer(spec).encode_chat(user())
    assert caught.value.status == 400
