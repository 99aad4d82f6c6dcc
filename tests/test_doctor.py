"""`nanoserve doctor`: what the environment's findings say, and that a wrong kernel is found."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanoserve import doctor_command
from nanoserve.cli import main
from nanoserve.doctor_environment import Finding, examine_machine
from nanoserve.kernels import fused, table
from nanoserve.kernels.fused import MoeWeights, Norm
from nanoserve.kernels.place import Place, Reason
from nanoserve.probes import PACKAGES, Conversion, Gpu, Machine, Toolkit, look

CARD = Machine(
    gpu=Gpu("NVIDIA RTX PRO 6000 Blackwell", (12, 0), 188, 96 << 30, False),
    driver="580.95.05",
    driver_cuda=(13, 0),
    toolkit=Toolkit("/usr/local/cuda/bin/nvcc", (13, 0)),
    torch_cuda="13.0",
    versions=dict.fromkeys(PACKAGES, "4.8.1"),
    flashinfer_fault=None,
    variables={},
    conversion=Conversion("sm_120a", True, True, ""),
)
NO_GPU = replace(CARD, gpu=None, driver=None, driver_cuda=None, toolkit=None, torch_cuda=None)


def finding(m: Machine, name: str) -> Finding:
    return next(found for found in examine_machine(m) if found.name == name)


def test_a_good_card_has_nothing_to_remedy() -> None:
    assert {found.verdict for found in examine_machine(CARD)} == {"ok"}
    assert not any(found.remedy for found in examine_machine(CARD))


def without(name: str) -> dict[str, str | None]:
    return {**CARD.versions, name: None}


HOPPER = replace(CARD, gpu=Gpu("NVIDIA H200", (9, 0), 132, 141 << 30, False))


@pytest.mark.parametrize(
    ("m", "name", "verdict", "words"),
    [
        (NO_GPU, "GPU", "absent", "only the CPU"),
        (NO_GPU, "driver", "absent", ""),
        (NO_GPU, "CUDA toolkit", "absent", "no nvcc"),
        (replace(CARD, gpu=Gpu("RTX 4090", (8, 9), 128, 24 << 30, False)), "GPU", "warn", "torch's will run"),
        (replace(CARD, driver_cuda=(12, 8)), "driver", "warn", "13.0"),
        (replace(CARD, toolkit=Toolkit("nvcc", (12, 8))), "CUDA toolkit", "FAIL", "plain sm_120"),
        (replace(HOPPER, toolkit=Toolkit("nvcc", (12, 8))), "CUDA toolkit", "warn", "CUDA 13"),
        (replace(CARD, toolkit=Toolkit("nvcc", (12, 9))), "CUDA toolkit", "warn", "b12x refuses"),
        (replace(CARD, variables={"CUTE_DSL_ARCH": "sm_120"}), "CUTE_DSL_ARCH", "FAIL", "say sm_120a"),
        (replace(CARD, variables={"CUTE_DSL_ARCH": "sm_120a"}), "CUTE_DSL_ARCH", "ok", ""),
        (
            replace(CARD, toolkit=None, variables={"FLASHINFER_CUDA_ARCH_LIST": "9.0 12.0"}),
            *("FLASHINFER_CUDA_ARCH_LIST", "FAIL", "say 12.0f"),
        ),
        (replace(CARD, variables={"FLASHINFER_CUDA_ARCH_LIST": "12.0"}), "FLASHINFER_CUDA_ARCH_LIST", "ok", ""),
        (replace(CARD, variables={"TORCH_CUDA_ARCH_LIST": "12.1"}), "TORCH_CUDA_ARCH_LIST", "FAIL", "say 12.1a"),
        (
            replace(CARD, conversion=Conversion("sm_120a", True, False, "")),
            *("E2M1 conversion", "FAIL", "not in hardware by the CUDA toolkit"),
        ),
        (
            replace(CARD, conversion=Conversion("sm_120a", None, None, "triton is not installed")),
            *("E2M1 conversion", "absent", "not tried"),
        ),
        (replace(HOPPER, conversion=Conversion("sm_90a", False, None, "")), "E2M1 conversion", "ok", "integer"),
        (replace(CARD, torch_cuda=None), "torch", "FAIL", "torch for CUDA"),
        (replace(CARD, versions=without("triton")), "triton", "FAIL", "our kernels need it"),
        (
            replace(CARD, versions={**CARD.versions, "nvidia-cutlass-dsl-libs-cu13": "4.7.1"}),
            *("cutlass-dsl", "FAIL", "nvidia-cutlass-dsl-libs-cu13==4.8.1"),
        ),
        (replace(CARD, versions=without("nvidia-cutlass-dsl-libs-cu13")), "cutlass-dsl", "warn", "pip install"),
        (replace(CARD, versions=without("flashinfer-python")), "flashinfer", "absent", "not installed"),
        (replace(CARD, flashinfer_fault="ImportError: no tvm_ffi"), "flashinfer", "FAIL", "broken: ImportError"),
    ],
)
def test_a_finding_names_verdict_and_remedy(m: Machine, name: str, verdict: str, words: str) -> None:
    found = finding(m, name)
    assert found.verdict == verdict
    assert words in f"{found.value} {found.remedy}"


def test_the_probes_see_a_conversion_in_hardware() -> None:
    pytest.importorskip("triton")
    seen = look()
    assert seen.gpu is None
    assert seen.conversion.assembler is True
    assert seen.conversion.nvcc in (True, None)


def test_a_plain_chip_is_seen_to_have_none() -> None:
    pytest.importorskip("triton")
    from nanoserve.probes import find_toolkit, probe_conversion

    plain = probe_conversion("sm_120", toolkit := find_toolkit())
    assert plain.assembler is False
    assert plain.nvcc is (None if toolkit is None else False)
    assert "e2m1x2" in plain.why


def moe_with_a_wrong_sign(stream: Tensor, norm: Norm, w: MoeWeights) -> Tensor:
    return fused.moe_add(-stream, norm, w)


def moe_that_faults(stream: Tensor, norm: Norm, w: MoeWeights) -> Tensor:
    raise RuntimeError("an illegal memory access")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_command, "look", lambda: NO_GPU)


def plant(monkeypatch: pytest.MonkeyPatch, function: str, *, first: bool) -> None:
    """A backend of the experts that any place can run, from this file."""

    def anywhere(place: Place) -> Reason | None:
        return None

    own, others = {"planted": f"test_doctor:{function}"}, table.BACKENDS["moe_add"]
    row = {**own, **others} if first else {**others, **own}
    monkeypatch.setattr(table, "BACKENDS", {**table.BACKENDS, "moe_add": row})
    monkeypatch.setattr(table, "REQUIREMENTS", {**table.REQUIREMENTS, "planted": anywhere})


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = main(["doctor", "--device", "cpu", "--json", *arguments])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.usefixtures("quick")
def test_without_a_gpu_the_cpus_ops_run_and_it_says_what_did_not(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, data = run(capsys, "--out", str(tmp_path / "report.json"))
    assert (code, data["sound"]) == (0, True)
    assert {row["op"] for row in data["ops"]} == set(table.BACKENDS)
    assert {row["verdict"] for row in data["ops"]} == {"reference"}
    assert "no GPU" in data["left_out"][0]
    assert {"op": "router", "backend": "triton"}.items() <= next(
        row for row in data["rejected"] if row["op"] == "router"
    ).items()
    assert json.loads((tmp_path / "report.json").read_text()) == data


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("function", "verdict"), [("moe_with_a_wrong_sign", "WRONG"), ("moe_that_faults", "FAULT")]
)
def test_a_planted_kernel_is_found(
    function: str, verdict: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(monkeypatch, function, first=True)
    code, data = run(capsys)
    (row,) = [row for row in data["ops"] if row["backend"] == "planted"]
    assert (code, data["sound"], row["verdict"], row["chosen"]) == (1, False, verdict, True)
    assert main(["doctor", "--device", "cpu"]) == 1
    assert "NOT SOUND: moe_add on planted" in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_a_wrong_backend_that_nobody_would_choose_is_told_and_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(monkeypatch, "moe_with_a_wrong_sign", first=False)
    code, data = run(capsys)
    (row,) = [row for row in data["ops"] if row["backend"] == "planted"]
    assert (code, row["verdict"], row["chosen"]) == (0, "WRONG", False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--calibrate"], "calibrate times backends on a GPU"),
        (["--shape", "nano", "somewhere"], "give one of them"),
        (["/no/such/model"], "/no/such/model"),
    ],
)
def test_what_cannot_be_done_is_told(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "cpu", *arguments]) == 1
    assert words in capsys.readouterr().err


def test_errors_are_of_the_worst_output_and_never_pass_as_nan() -> None:
    from nanoserve.op_checks import largest_error

    one, nan, inf = (
        torch.ones(3).double(),
        torch.full((3,), torch.nan).double(),
        torch.full((3,), torch.inf).double(),
    )
    assert largest_error([one, inf], [one, inf]) == 0
    assert largest_error([one * 1.5, one], [one, one]) == pytest.approx(0.5)
    assert not largest_error([one, nan], [one, one]) <= 1
    assert largest_error([one[:2]], [one]) == float("inf")
