"""`nanoserve doctor --compile`: what is refused, what a verdict says, FlashInfer's kernels at our arguments."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from compiling import compiled

from nanoserve import doctor_compile
from nanoserve.cli import main
from nanoserve.compile_job import Job, Row
from nanoserve.doctor_compile import Missing, compile_kernels, verdict
from nanoserve.kernels import nvrtc
from nanoserve.kernels.cubin import resources
from nanoserve.kernels.flashinfer_compile import refusal

needs_dsl = pytest.mark.skipif(
    not (find_spec("flashinfer") and find_spec("cutlass")), reason="FlashInfer or the CuTe DSL is not installed"
)

needs_nvrtc = pytest.mark.skipif(
    nvrtc.missing() is not None and os.environ.get("CI") != "true",
    reason="NVRTC or cuda-bindings is not installed",
)

ROW = Row("sm_120a", "nanoserve", "moe", "up_kernel", "nano", 1, 80, 0, 101_376, {})


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (ROW, "fits"),
        (replace(ROW, shared=101_377), "DOES NOT FIT: 101377 bytes"),
        (replace(ROW, spilled=8), "SPILLS 8"),
        (replace(ROW, spilled=8, architecture="sm_90"), "fits, with a few spills"),
        (replace(ROW, spilled=80, origin="flashinfer"), "fits, with some of its stack"),
        (replace(ROW, checks={"e2m1_in_hardware": False}), "SOFTWARE"),
    ],
)
def test_a_verdict_names_the_limit(row: Row, words: str) -> None:
    assert verdict(row).startswith(words)


@pytest.mark.parametrize(
    ("architecture", "words"),
    [("sm_90", "SM120"), ("sm_120", "ask for sm_120a"), ("sm_121", "ask for sm_121a"), ("sm_120a", None)],
)
def test_fp4_kernels_are_refused_for_a_plain_chip(architecture: str, words: str | None) -> None:
    reason = refusal(architecture)
    assert reason is None if words is None else words in str(reason)


@pytest.mark.parametrize("text", ["sm_89", "sm_120a,hopper", ","])
def test_an_unknown_chip_is_told(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--compile", text]) == 1
    assert "such as sm_120a" in (err := capsys.readouterr().err) or "known are sm_90" in err


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--shape=nano", "leave out shape"),
        ("--kv-dtype=fp8", "leave out kv-dtype"),
        ("somewhere", "leave out model"),
    ],
)
def test_what_has_no_meaning_beside_compile_is_refused(
    option: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--compile", "sm_120a", option]) == 1
    assert words in capsys.readouterr().err


def test_jobs_that_fail_are_told_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Job] = []

    def run(job: Job) -> tuple[list[Row], Missing | None]:
        ran.append(job)
        fault = (
            Missing(job.architecture, "prefill", "ptxas fatal", fault=True) if job.family == "prefill" else None
        )
        return ([] if fault else [replace(ROW, architecture=job.architecture, kernel=job.family)]), fault

    monkeypatch.setattr(doctor_compile, "run_job", run)
    monkeypatch.setattr(nvrtc, "missing", lambda: None)
    seen: list[tuple[int, int, int]] = []

    def progress(done: int, total: int, kernels: int) -> None:
        seen.append((done, total, kernels))

    report = compile_kernels(("sm_90", "sm_120"), progress, shapes=("nano",), workers=1)
    assert [(job.architecture, job.family) for job in ran] == [
        (chip, family) for chip in ("sm_90", "sm_120") for family in ("decode", "weights", "prefill", "cuda")
    ]
    assert seen[-1] == (8, 8, 6)
    assert not report.sound
    assert [m.fault for m in report.missing] == [False, False, True, True]
    text = report.text()
    assert "FAILED: prefill for sm_90: ptxas fatal" in text
    assert "not compiled: FlashInfer's expert kernels for sm_120" in text
    assert json.loads(json.dumps(report.data()))["kernels"][0]["verdict"] == "fits"


def _nothing(done: int, total: int, kernels: int) -> None:
    """Of a run's progress."""


def test_without_nvrtc_its_kernels_are_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(job: Job) -> tuple[list[Row], Missing | None]:
        return [replace(ROW, architecture=job.architecture)], None

    monkeypatch.setattr(doctor_compile, "run_job", run)
    monkeypatch.setattr(nvrtc, "missing", lambda: "no library: pip install it")
    report = compile_kernels(("sm_90",), _nothing, families=("decode", "cuda"), shapes=("nano",), workers=1)
    assert not report.sound
    assert "FAILED: our CUDA C++ kernels for sm_90: no library: pip install it" in report.text()
    assert compile_kernels(("sm_90",), _nothing, families=("decode",), shapes=("nano",), workers=1).sound


def test_what_nvrtc_lacks_is_told_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library() -> None:
        raise RuntimeError("Failure finding libnvrtc.so.13")

    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert "pip install cuda-bindings" in str(nvrtc.missing())
    bindings = ModuleType("cuda.bindings")
    monkeypatch.setattr(bindings, "nvrtc", SimpleNamespace(nvrtcVersion=no_library), raising=False)
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    assert "pip install nvidia-cuda-nvrtc" in str(nvrtc.missing())


@needs_nvrtc
@pytest.mark.parametrize(("architecture", "shape"), [("sm_90", "lightning"), ("sm_121a", "nano")])
def test_kernels_of_cuda_are_listed(architecture: str, shape: str) -> None:
    rows = compiled(architecture, "cuda", shape)
    ops = {"norm_linears", "linear_add", "moe_add", "head"}
    others = {("mamba_decode", "mamba")}
    others |= {("attention_decode", "attention")}
    assert {(row.op, row.kernel) for row in rows} == {(op, "products") for op in ops} | others
    assert all(row.origin == "nanoserve" and row.spilled == 0 and row.shared > 1024 for row in rows)


def test_a_crash_of_the_compiler_is_a_row_that_says_so() -> None:
    rows, fault = doctor_compile.run_job(Job("sm_120a", "decode", "no such shape", (1,)))
    assert not rows
    assert fault is not None
    assert "no such shape" in fault.reason


@needs_dsl
@pytest.mark.parametrize(("architecture", "shape", "tokens"), [("sm_120a", "super", 1), ("sm_121a", "nano", 2)])
def test_flashinfers_expert_kernels_compile_at_our_arguments(architecture: str, shape: str, tokens: int) -> None:
    rows = compiled(architecture, "experts", shape, tokens)
    own = [row for row in rows if row.checks]
    assert {row.op for row in own} == {"b12x", "b12x dynamic", "w4a16"}
    assert all(row.checks["e2m1_in_hardware"] for row in own)
    assert any(row.kernel.startswith("micro_m") for row in own)
    assert all(row.shared > 1024 for row in own), "dynamic shared memory was not found"


def test_a_cubin_tells_what_the_assembler_told() -> None:
    code = """
import torch
from unittest.mock import patch
from nanoserve.kernels import aot, cubin
from nanoserve.kernels.triton_linear import norm
from nanoserve.kernels.weight_launches import empty
with aot.recorded() as launches:
    norm(empty(1, 2688), empty(2688, dtype=torch.float32), 1e-5)
made = []
own = aot.triton.compile
with patch.object(aot.triton, "compile", lambda *a, **k: made.append(own(*a, **k)) or made[-1]):
    told = launches[0].compiled("sm_120a")
(read,) = cubin.resources(made[0].asm["cubin"])
print((read.name, read.registers) == (told.name, told.registers), read.stack)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=root)
    assert done.stdout.split() == ["True", "0"], done.stderr


def test_what_is_no_cubin_is_refused() -> None:
    with pytest.raises(ValueError, match="ELF"):
        resources(b"no cubin")
