"""A candidate of an evaluation that runs in this process: a checkpoint and how it is run."""

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from nanoserve.checkpoint import open_checkpoint
from nanoserve.config import EngineConfig, build, parse_ops
from nanoserve.errors import CheckpointError, ConfigError, RequestError
from nanoserve.eval_questions import Question
from nanoserve.local import LocalEngine
from nanoserve.progress import LoadBar
from nanoserve.startup import Prepared, examine, prepare
from nanoserve.tokenizer import Tokenizer

Announce = Callable[[Prepared, bool], None]
"""Told what will run, and whether there is a tokeniser, before weights are read."""

_SETTINGS = {"device": "device", "dtype": "dtype", "kv-dtype": "kv_dtype"}
"""A setting of a SPEC → the field of `EngineConfig`."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a candidate said; the ids are empty when a server said it."""

    text: str
    tokens: int
    seconds: float
    prompt_ids: tuple[int, ...] = ()
    ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class LocalCandidate:
    """A checkpoint and the options to run it with."""

    label: str
    path: Path
    config: EngineConfig
    announce: Announce

    def check(self) -> tuple[Tokenizer, int]:
        """See what can be seen without the weights, so that no hour is spent before an error.

        Returns:
            The tokeniser and the size of the model's vocabulary.

        Raises:
            NanoserveError: the checkpoint or the options; see `startup.examine`.
        """
        checkpoint = open_checkpoint(self.path)
        examined = examine(checkpoint, self.config)
        return _tokenizer(checkpoint.directory), examined.config.vocab_size

    @contextmanager
    def open(self) -> Generator["LocalRunner"]:
        """Load it, and free it at the end.

        Raises:
            NanoserveError: as `check`, or it does not fit.
        """
        checkpoint = open_checkpoint(self.path)
        tokenizer = _tokenizer(checkpoint.directory)
        prepared = prepare(checkpoint, self.config)
        self.announce(prepared, True)
        with LocalEngine(prepared, tokenizer, LoadBar("weights")) as engine:
            yield LocalRunner(engine, tokenizer)


def _tokenizer(directory: Path) -> Tokenizer:
    tokenizer = Tokenizer.load(directory)
    if tokenizer is None:
        raise CheckpointError(
            "tokenizer.json", "is missing, and the questions are text: add the tokeniser's files"
        )
    return tokenizer


def encode(tokenizer: Tokenizer, question: Question) -> list[int]:
    """The prompt's token ids.

    Raises:
        RequestError: the chat template is missing or refuses the messages.
    """
    if isinstance(question.prompt, str):
        return tokenizer.encode(question.prompt)
    return tokenizer.encode_chat(question.prompt, tools=question.tools or None)


@dataclass(frozen=True, slots=True)
class LocalRunner:
    """A loaded candidate."""

    engine: LocalEngine
    tokenizer: Tokenizer

    def facts(self) -> dict[str, Any]:
        """What ran, for the report."""
        prepared = self.engine.prepared
        types = {"dtype": prepared.shape.conv_dtype, "kv_dtype": prepared.shape.kv_dtype}
        cuda = prepared.device.type == "cuda"
        return {
            "model": prepared.checkpoint.name,
            "device": torch.cuda.get_device_name(prepared.device) if cuda else prepared.device.type,
            **{name: str(value).removeprefix("torch.") for name, value in types.items()},
            "ops": {row.op: row.backend for row in prepared.ops.report},
        }

    def answer(self, question: Question) -> Answer:
        """Answer greedily.

        Raises:
            RequestError: prompt and longest answer do not fit the context; a cut answer would count as wrong.
            EngineError: the engine failed.
        """
        ids, most = encode(self.tokenizer, question), self.engine.max_context
        if len(ids) + question.max_tokens > most:
            raise RequestError(
                f"a question has {len(ids)} tokens and may be answered with {question.max_tokens}, and the "
                f"context holds {most}: run with a larger --max-context or ask for less",
                code="context_length_exceeded",
            )
        started = time.perf_counter()
        done = self.engine.generate(
            ids,
            max_tokens=question.max_tokens,
            temperature=0.0,
            repetition_penalty=1.0,  # a checkpoint may recommend another, and then greedy would not be greedy
            stop=question.stop,
        )
        seconds = time.perf_counter() - started
        opened = self.tokenizer.decode(ids[-8:], skip_special=False).rstrip().endswith("<think>")
        return Answer(
            "<think>" * opened + done.text, len(done.token_ids), seconds, tuple(ids), tuple(done.token_ids)
        )


def parse_spec(spec: str, path: Path | None, base: EngineConfig, announce: Announce) -> LocalCandidate:
    """Another candidate, by what differs from the first.

    Args:
        spec: comma-separated settings: model=DIR, device=…, dtype=…, kv-dtype=…, op:NAME=BACKEND.
        path: the first candidate's checkpoint; None when that is a server.
        base: the first candidate's options.
        announce: see `Announce`.

    Raises:
        ConfigError: a setting is unknown, given twice or ill-typed, or there is no checkpoint.
    """
    changes: dict[str, object] = {}
    ops: list[str] = []
    seen: set[str] = set()
    for part in spec.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not (equals and name and value):
            raise ConfigError(f"against {spec!r}: {part!r} must look like NAME=VALUE, for example dtype=bfloat16")
        if name in seen:
            raise ConfigError(f"against {spec!r}: {name} is given twice: give it once")
        seen.add(name)
        if name == "model":
            path = Path(value)
        elif name.startswith("op:"):
            ops.append(f"{name.removeprefix('op:')}={value}")
        elif name in _SETTINGS:
            changes[_SETTINGS[name]] = value
        else:
            known = ", ".join(("model", *_SETTINGS, "op:NAME"))
            raise ConfigError(f"against {spec!r}: unknown setting {name!r}; known are {known}")
    if path is None:
        raise ConfigError(f"against {spec!r}: the first candidate is a server: name a checkpoint with model=DIR")
    same = {field.name: getattr(base, field.name) for field in fields(base)}
    config = build(EngineConfig, {**same, **changes, "ops": {**base.ops, **parse_ops(ops)}}, env={})
    return LocalCandidate(spec, path, config, announce)
