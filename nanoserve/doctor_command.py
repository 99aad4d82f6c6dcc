"""``nanoserve doctor``: options → what to look at → table or JSON, and an exit code."""

import argparse
import json
import sys
from typing import Any

from nanoserve.config import EngineConfig
from nanoserve.doctor_compile import compile_kernels, parse_architectures
from nanoserve.errors import ConfigError
from nanoserve.progress import KernelBar


def run_doctor(options: argparse.Namespace, engine_options: EngineConfig) -> int:
    """Run the command.

    Returns:
        0, or 1 where a backend that would be chosen fails, or a kernel does not fit its chip.

    Raises:
        NanoserveError: an option or the checkpoint.
    """
    if options.shape and options.model:
        raise ConfigError(f"shape is {options.shape} and MODEL is {options.model}: give one of them")
    if options.compile is not None:
        return _compile(options)
    raise NotImplementedError


def _compile(options: argparse.Namespace) -> int:
    if options.shape or options.model or options.calibrate:
        given = options.shape or options.model or "--calibrate"
        raise ConfigError(f"compile is {options.compile!r} and takes every released shape: leave out {given}")
    report = compile_kernels(parse_architectures(options.compile), KernelBar("compiling"))
    _finish(report.data(), report.text(), options)
    return 0 if report.sound else 1


def _finish(data: dict[str, Any], text: str, options: argparse.Namespace) -> None:
    if options.out:
        options.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(data) if options.json else text)
    sys.stdout.flush()
