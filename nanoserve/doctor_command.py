"""``nanoserve doctor``: options → what to look at → table or JSON, and an exit code."""

import argparse
import json
import sys
import time
from typing import Any

from nanoserve import __version__
from nanoserve.calibrate import Calibration
from nanoserve.calibrating import calibrated
from nanoserve.checkpoint import open_checkpoint
from nanoserve.config import EngineConfig
from nanoserve.doctor_compile import compile_kernels, parse_architectures
from nanoserve.doctor_environment import examine_machine
from nanoserve.doctor_report import DoctorReport
from nanoserve.errors import ConfigError
from nanoserve.files import DEMO_MODEL
from nanoserve.op_cases import OpCase, Subject
from nanoserve.op_checks import check_ops
from nanoserve.probes import look
from nanoserve.progress import KernelBar, OpBar
from nanoserve.shapes import examine_shape
from nanoserve.startup import Examined, examine, subject_of
from nanoserve.traffic import read_bandwidth
from nanoserve.trial import tried_elsewhere

_WITHOUT_COMPILE = ("model", "shape", "calibrate", "device", "dtype", "kv_dtype", "op", "config")
"""Options that say nothing of what is compiled."""


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
    if options.shape:
        examined, model = examine_shape(options.shape, engine_options), f"{options.shape} (random weights)"
    else:
        checkpoint = open_checkpoint(options.model or DEMO_MODEL, weights=False)
        examined, model = examine(checkpoint, engine_options), checkpoint.name
    if options.calibrate and examined.device.type != "cuda":
        raise ConfigError("calibrate times backends on a GPU, and there is none here: leave it out")
    report = _looked(examined, model, options)
    _finish(report.data(), report.text(), options)
    return 0 if report.sound else 1


def _looked(examined: Examined, model: str, options: argparse.Namespace) -> DoctorReport:
    _say("looking at driver, toolkit, packages and compilers")
    findings = examine_machine(look())
    subject, ops, calibration = subject_of(examined), examined.ops, None
    if options.calibrate:
        ops, calibration = _calibrated(examined, subject)
    bandwidth = read_bandwidth(subject.device)
    seed = time.time_ns() % (1 << 31)

    known: dict[tuple[str, str], str | None] = {}

    def isolate(case: OpCase, backend: str) -> str | None:
        """Once an op, for a process takes seconds to begin."""
        if (case.op, backend) not in known:
            known[case.op, backend] = tried_elsewhere(subject, case, backend, seed)
        return known[case.op, backend]

    found = check_ops(subject, ops.report, bandwidth, seed, OpBar("checking"), isolate)
    left_out: tuple[str, ...] = ()
    if subject.device.type == "cpu":
        left_out = (
            "no GPU here (or --device cpu): the fast backends, their times and shares of the bus; "
            "nanoserve doctor --compile sm_120a,sm_121a compiles them for chips that are not here",
        )
    return DoctorReport(
        version=__version__,
        model=model,
        device=_device(subject),
        bandwidth=bandwidth,
        seed=seed,
        findings=findings,
        ops=found,
        calibration=calibration,
        left_out=left_out,
    )


def _calibrated(examined: Examined, subject: Subject) -> tuple[Any, Calibration | None]:
    ops, calibration = calibrated(subject, examined.ops, examined.options.ops, _say, anew=True)
    if calibration is None:
        _say("nothing to calibrate: the model has no experts, or their backend was chosen by name")
    return ops, calibration


def _device(subject: Subject) -> str:
    if subject.device.type == "cpu":
        return "cpu"
    import torch

    return torch.cuda.get_device_name(subject.device)


def _compile(options: argparse.Namespace) -> int:
    if given := [name for name in _WITHOUT_COMPILE if getattr(options, name)]:
        name = given[0].replace("_", "-")
        raise ConfigError(f"compile is {options.compile!r} and takes every released shape: leave out {name}")
    report = compile_kernels(parse_architectures(options.compile), KernelBar("compiling"))
    _finish(report.data(), report.text(), options)
    return 0 if report.sound else 1


def _finish(data: dict[str, Any], text: str, options: argparse.Namespace) -> None:
    if options.out:
        options.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(data) if options.json else text)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
