"""Options, frozen and complete at birth: command line > environment > TOML > default.

A TOML file has the tables ``[engine]`` and ``[server]`` with the field names below; an environment variable
is ``NANOSERVE_`` and the field name in capitals. An unknown key, an ill-typed value or a value out of range
is a `ConfigError`: nothing is ignored.
"""

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar, cast, get_args, get_type_hints

from nanoserve.errors import ConfigError

DeviceChoice = Literal["auto", "cpu", "cuda"]
DtypeChoice = Literal["auto", "float32", "bfloat16"]
KvDtypeChoice = Literal["auto", "float32", "bfloat16", "fp8"]
DecodeChoice = Literal["auto", "eager", "graph"]
ShapeName = Literal["nano", "lightning", "super"]
"""Released geometries: Nano-3 30B-A3B, 3.5-Lightning 30B-A3B and Super 120B-A12B, each as its NVFP4 release."""

ENV_PREFIX = "NANOSERVE_"

_TRUTHS = {"1": True, "true": True, "0": False, "false": False}


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How the model runs.

    Attributes:
        device: "auto" takes the GPU when there is one.
        dtype: activations; "auto" is float32 on the CPU and bfloat16 on a GPU.
        kv_dtype: the KV cache; "auto" is `dtype` on the CPU, and what the checkpoint declares on a GPU.
        max_context: tokens of prompt and answer together; None takes the model's limit or what fits.
        decode: how decode steps are launched: as a CUDA graph or op by op ("eager"); "auto" is a graph where every
            op's backend can be in one.
        page_size: tokens in a KV page.
        prefill_chunk: tokens a prefill step takes at most; None takes 2,048 on a GPU and 512 on a CPU.
        memory_fraction: share of the device's free memory that the memory plan may use.
        calibrate: at the first start on a card, time the backends of the experts and keep the fastest; else the
            shipped default runs.
        ops: op name → backend name, for ops that should not be chosen automatically.
    """

    device: DeviceChoice = "auto"
    dtype: DtypeChoice = "auto"
    kv_dtype: KvDtypeChoice = "auto"
    max_context: int | None = None
    decode: DecodeChoice = "auto"
    page_size: int = 16
    prefill_chunk: int | None = None
    memory_fraction: float = 0.9
    calibrate: bool = True
    ops: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        _need("max_context", self.max_context, self.max_context is None or self.max_context >= 1, "at least 1")
        power = self.page_size >= 16 and self.page_size & (self.page_size - 1) == 0
        _need("page_size", self.page_size, power, "a power of two from 16")
        chunk = self.prefill_chunk
        _need("prefill_chunk", chunk, chunk is None or chunk >= 1, "at least 1")
        _need("memory_fraction", self.memory_fraction, 0 < self.memory_fraction <= 1, "in (0, 1]")


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """How the HTTP server behaves. Times are in seconds.

    Attributes:
        host: address to bind; loopback by default, and then only local Host headers are answered.
        port: TCP port; 0 takes a free one.
        served_model_name: the model's name on the wire; None takes the directory's name.
        api_key: when set, every route but /health and the page at / needs it. Never on the command line, where
            `ps` shows it.
        allowed_hosts: Host names answered besides the local ones, when bound to loopback.
        cors_origins: origins that a browser page may call from.
        max_queue: requests that may wait for the engine; one more gets a 503.
        max_body_bytes: larger bodies get a 413.
        header_timeout: time a client has to send a request's headers.
        body_timeout: time a client has to send a request's body.
        drain_timeout: time that running requests have after SIGTERM.
        ping_interval: an SSE comment is sent after this much silence.
        hang_timeout: /health turns red when a running request makes no step for so long; None takes 20 s on a
            GPU and 600 s on a CPU, where one step of a prefill may take minutes.
        log_json: write the log as one JSON object a line.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: str | None = None
    api_key: str | None = field(default=None, repr=False)
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_queue: int = 64
    max_body_bytes: int = 8 * 1024 * 1024
    header_timeout: float = 20.0
    body_timeout: float = 30.0
    drain_timeout: float = 30.0
    ping_interval: float = 15.0
    hang_timeout: float | None = None
    log_json: bool = False

    def __post_init__(self) -> None:
        _need("port", self.port, 0 <= self.port <= 65535, "in [0, 65535]")
        _need("max_queue", self.max_queue, self.max_queue >= 0, "at least 0")
        _need("max_body_bytes", self.max_body_bytes, self.max_body_bytes >= 1024, "at least 1024")
        for name in ("header_timeout", "body_timeout", "drain_timeout", "ping_interval", "hang_timeout"):
            value: float | None = getattr(self, name)
            _need(name, value, value is None or value > 0, "more than 0 seconds")
        _need("api_key", "…", self.api_key is None or bool(self.api_key.strip()), "a non-empty string")


def _need(name: str, value: object, fine: bool, must_be: str) -> None:
    if not fine:
        raise ConfigError(f"{name} is {value!r} and must be {must_be}")


Section = TypeVar("Section", EngineConfig, ServerConfig)


def build(
    section: type[Section],
    options: Mapping[str, object],
    *,
    toml: Mapping[str, object] | None = None,
    env: Mapping[str, str] | None = None,
) -> Section:
    """Merge the four sources into one frozen section.

    Args:
        section: `EngineConfig` or `ServerConfig`.
        options: what the caller set (a None value counts as not set); an unknown name is an error.
        toml: the section's table out of `read_toml`.
        env: the environment; defaults to ``os.environ``.

    Raises:
        ConfigError: an unknown name, an ill-typed value, or a value out of range.
    """
    hints = get_type_hints(section)
    names = {f.name for f in fields(section)}
    env = os.environ if env is None else env
    _check_environment(env)
    values: dict[str, Any] = {}
    for name, value in (toml or {}).items():
        _known(name, names, "the TOML file")
        values[name] = _typed(name, value, hints[name])
    for name in names:
        if (text := env.get(ENV_PREFIX + name.upper())) is not None:
            values[name] = _parsed(name, text, hints[name])
    for name, value in options.items():
        _known(name, names, "the options")
        if value is not None:
            values[name] = _typed(name, value, hints[name])
    return section(**values)


def _check_environment(env: Mapping[str, str]) -> None:
    known = {ENV_PREFIX + f.name.upper() for section in (EngineConfig, ServerConfig) for f in fields(section)}
    for name in env:
        if name.startswith(ENV_PREFIX):
            _known(name, known, "the environment")


def read_toml(path: Path) -> dict[str, dict[str, object]]:
    """Read a config file's tables ``engine`` and ``server``.

    Raises:
        ConfigError: the file cannot be read or parsed, or holds another table.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"config file {path}: {error}") from error
    for name, table in data.items():
        _known(name, {"engine", "server"}, f"config file {path}")
        if not isinstance(table, dict):
            raise ConfigError(f"config file {path}: {name} must be a table, [{name}]")
    return cast("dict[str, dict[str, object]]", data)


def _known(name: str, names: set[str], where: str) -> None:
    if name not in names:
        raise ConfigError(f"{where}: unknown option {name!r}; known are {', '.join(sorted(names))}")


def _typed(name: str, value: object, hint: Any) -> object:
    """The value as the field's type; TOML arrays become tuples, whole numbers serve where floats go."""
    options: tuple[Any, ...] = get_args(hint)
    if (hint is float or float in options) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint == tuple[str, ...] and isinstance(value, list | tuple):
        items = cast("list[object] | tuple[object, ...]", value)
        if all(isinstance(item, str) for item in items):
            return tuple(items)
    elif hint == Mapping[str, str] and isinstance(value, Mapping):
        table = cast("Mapping[object, object]", value)
        if all(isinstance(item, str) for item in table.values()):
            return MappingProxyType(dict(table))
    elif options and value in options and not isinstance(value, bool):
        return value  # one of a Literal's words
    elif type(value) in (hint, *options):
        return value  # int, str, int | None, …
    raise ConfigError(f"{name} is {value!r} and must be {_describe(hint)}")


def _parsed(name: str, text: str, hint: Any) -> object:
    """An environment variable's text as the field's type; commas separate lists, ops are NAME=BACKEND."""
    options: tuple[Any, ...] = get_args(hint)
    try:
        if hint is int or int in options:
            return int(text)
        if hint is float or float in options:
            return float(text)
    except ValueError as error:
        variable = ENV_PREFIX + name.upper()
        raise ConfigError(f"{variable} is {text!r} and must be {_describe(hint)}") from error
    if hint is bool:
        if text.lower() not in _TRUTHS:
            raise ConfigError(f"{ENV_PREFIX}{name.upper()} is {text!r} and must be one of {', '.join(_TRUTHS)}")
        return _TRUTHS[text.lower()]
    if hint == tuple[str, ...]:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if hint == Mapping[str, str]:
        return parse_ops(part for part in text.split(",") if part.strip())
    return _typed(name, text, hint)


def parse_ops(pairs: Any) -> Mapping[str, str]:
    """``NAME=BACKEND`` words as a mapping.

    Raises:
        ConfigError: a word has no ``=``.
    """
    ops: dict[str, str] = {}
    for pair in pairs:
        name, equals, backend = str(pair).partition("=")
        if not (name.strip() and equals and backend.strip()):
            raise ConfigError(f"op choice {pair!r} must look like NAME=BACKEND, for example linear_nvfp4=torch")
        ops[name.strip()] = backend.strip()
    return MappingProxyType(ops)


def _describe(hint: Any) -> str:
    if hint == tuple[str, ...]:
        return "a list of strings"
    if hint == Mapping[str, str]:
        return "a table of strings"
    words = [repr(option) if isinstance(option, str) else option.__name__ for option in get_args(hint)]
    kinds = words or [hint.__name__]
    return "one of " + ", ".join(kinds) if len(kinds) > 1 else kinds[0]
