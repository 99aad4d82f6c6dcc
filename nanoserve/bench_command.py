"""``nanoserve bench``: options → what to load → `nanoserve.bench.bench` → table, JSON or picture."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from nanoserve.bench import BenchOptions, bench
from nanoserve.bench_report import lines, picture, read_results
from nanoserve.checkpoint import open_checkpoint
from nanoserve.config import EngineConfig
from nanoserve.dense import dense
from nanoserve.engine import Engine
from nanoserve.errors import ConfigError
from nanoserve.files import DEMO_MODEL
from nanoserve.progress import LoadBar
from nanoserve.shapes import prepare_shape, random_fields
from nanoserve.startup import Prepared, assemble, load_engine, pick_device, prepare
from nanoserve.traffic import read_bandwidth


def run_bench(
    options: argparse.Namespace, engine_options: EngineConfig, announce: Callable[[Prepared, bool], None]
) -> int:
    """Run the command.

    Raises:
        NanoserveError: an option, the checkpoint, or the engine.
    """
    if options.plot:
        target, *results = options.plot
        if not results:
            raise ConfigError(f"plot is {target} alone: give the picture's file and then the results to draw")
        target.write_text(picture(read_results(results)), encoding="utf-8")
        return 0
    if options.shape and options.model:
        raise ConfigError(f"shape is {options.shape} and MODEL is {options.model}: give one of them")
    if options.dense:
        return _dense(options, engine_options)
    given = {field.name: getattr(options, field.name) for field in fields(BenchOptions)}
    wanted = BenchOptions(**{name: value for name, value in given.items() if value is not None})
    if engine_options.max_context is None:
        engine_options = replace(engine_options, max_context=wanted.isl + wanted.osl)
    prepared, load = _source(options, engine_options)
    announce(prepared, True)
    _check_context(prepared, wanted)
    result = bench(prepared, load, wanted, _say)
    _finish({"shape": options.shape, **result}, lines(result), options)
    return 0


def _source(options: argparse.Namespace, engine_options: EngineConfig) -> tuple[Prepared, Callable[[], Engine]]:
    """What is to be loaded, and how."""
    bar = LoadBar("weights")
    if options.shape:
        made = prepare_shape(options.shape, engine_options, _say)
        return made, lambda: assemble(made, random_fields(made.manifest, made.device, bar), _say)
    read = prepare(open_checkpoint(options.model or DEMO_MODEL), engine_options, _say)
    return read, lambda: load_engine(read, bar, _say)


def _check_context(prepared: Prepared, wanted: BenchOptions) -> None:
    room = prepared.memory.max_context
    if wanted.isl + wanted.osl > room:
        raise ConfigError(
            f"isl and osl are {wanted.isl} and {wanted.osl}, and the context holds {room}: "
            "ask for fewer tokens, or for a larger --max-context"
        )


def _dense(options: argparse.Namespace, engine_options: EngineConfig) -> int:
    device = pick_device(engine_options)
    bandwidth = read_bandwidth(device)
    _say(f"the bus reads {bandwidth / 1e12:.3g} TB/s")
    table: list[str] = []

    def told(line: str) -> None:
        table.append(line)
        _say(line)

    rows = dense(device, bandwidth, told)
    _finish({"bandwidth_tb_s": bandwidth / 1e12, "dense": rows}, table, options)
    return 0


def _finish(result: dict[str, Any], table: list[str], options: argparse.Namespace) -> None:
    if options.out:
        Path(options.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result) if options.json else "\n".join(table))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
