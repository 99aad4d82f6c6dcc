from pathlib import Path

import pytest

from nanoserve.config import EngineConfig, ServerConfig, build, parse_ops, read_toml
from nanoserve.errors import ConfigError


def test_sources_override_one_another_in_order(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('[engine]\nmax_context = 100\nprefill_chunk = 7\ndtype = "bfloat16"\n')
    toml = read_toml(file)["engine"]
    env = {"NANOSERVE_PREFILL_CHUNK": "8", "NANOSERVE_DTYPE": "float32", "UNRELATED": "x", "NANOSERVE_PORT": "1"}
    config = build(EngineConfig, {"dtype": "auto", "device": None}, toml=toml, env=env)
    assert (config.max_context, config.prefill_chunk, config.dtype) == (100, 8, "auto")


def test_shipped_profiles_are_valid() -> None:
    files = sorted((Path(__file__).parent.parent / "config").glob("*.toml"))
    assert len(files) >= 3
    for file in files:
        build(EngineConfig, {}, toml=read_toml(file)["engine"], env={})


def test_lists_and_tables_are_parsed() -> None:
    env = {"NANOSERVE_ALLOWED_HOSTS": "a.example, b.example", "NANOSERVE_OPS": "router=torch"}
    assert build(ServerConfig, {}, env=env).allowed_hosts == ("a.example", "b.example")
    assert dict(build(EngineConfig, {}, env=env).ops) == {"router": "torch"}
    assert build(EngineConfig, {"memory_fraction": 1}, env={}).memory_fraction == 1.0


@pytest.mark.parametrize(
    ("options", "env", "words"),
    [
        ({"max_contxt": 5}, {}, "unknown option 'max_contxt'"),
        ({"max_context": 0}, {}, "max_context is 0"),
        ({"max_context": True}, {}, "max_context is True"),
        ({"max_context": "many"}, {}, "max_context is 'many'"),
        ({"device": "tpu"}, {}, "device is 'tpu'"),
        ({"page_size": 24}, {}, "page_size is 24"),
        ({"memory_fraction": 1.5}, {}, "memory_fraction is 1.5"),
        ({}, {"NANOSERVE_MAX_CONTEXT": "4k"}, "NANOSERVE_MAX_CONTEXT is '4k'"),
        ({}, {"NANOSERVE_OPS": "router"}, "NAME=BACKEND"),
        ({}, {"NANOSERVE_MAX_CONTEXXT": "5"}, "NANOSERVE_MAX_CONTEXXT"),
    ],
)
def test_bad_engine_options_are_named(options: dict[str, object], env: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=r"must be|unknown|NAME=BACKEND") as caught:
        build(EngineConfig, options, env=env)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [("[engin]\n", "'engin'"), ("engine = 3\n", "must be a table"), ("[engine\n", "c.toml"), (None, "c.toml")],
)
def test_bad_files_are_named(tmp_path: Path, text: str | None, words: str) -> None:
    file = tmp_path / "c.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_toml(file)
    assert words in str(caught.value)


def test_the_key_is_not_printed() -> None:
    assert "sesame" not in repr(build(ServerConfig, {"api_key": "sesame"}, env={}))
    with pytest.raises(ConfigError):
        build(ServerConfig, {"api_key": " "}, env={})


def test_parse_ops_wants_pairs() -> None:
    with pytest.raises(ConfigError):
        parse_ops(["=x"])
