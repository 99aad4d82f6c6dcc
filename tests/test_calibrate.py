"""Calibration with every time, error and fault injected."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanoserve import calibrate as module
from nanoserve import calibrating, trial
from nanoserve.calibrate import Calibration, Key, Outcome, calibrate, pick
from nanoserve.config import EngineConfig
from nanoserve.files import DEMO_MODEL
from nanoserve.kernels import fused, table
from nanoserve.kernels.fused import MoeWeights, Norm
from nanoserve.kernels.place import Place, Reason
from nanoserve.op_cases import Subject, moe_case
from nanoserve.trial import in_a_child, known_risk, tried_elsewhere

KEY = Key("RTX PRO 6000, 12.0", "580.95", {"torch": "2.13"}, {"hidden": 2688}, ("triton", "w4a16", "b12x"))
GOOD = {"triton": (1e-3, 50.0), "w4a16": (1e-3, 45.0), "b12x": (0.02, 40.0)}


class Bench:
    """What the candidates would show, and a note of what was asked."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.measured, self.said = folder, list[str](), list[str]()
        self.shows: dict[str, tuple[float, float]] = dict(GOOD)
        self.faults, self.isolated = dict[str, Exception](), dict[str, str]()
        self.now = 0.0

    def measure(self, name: str) -> Outcome:
        self.measured.append(name)
        self.now += 5
        if name in self.faults:
            raise self.faults[name]
        error, us = self.shows[name]
        return Outcome(name, error, 0.17 if name == "b12x" else 5e-3, us)

    def run(self, key: Key = KEY, **options: Any) -> Calibration:
        names = key.candidates
        return calibrate(
            names, key, self.measure, self.isolated.get, self.said.append, folder=self.folder,
            clock=lambda: self.now, **options,
        )  # fmt: skip


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "calibration")


def test_the_fastest_is_kept_and_taken_again(bench: Bench) -> None:
    first = bench.run()
    assert (first.backend, first.kept) == ("b12x", False)
    assert bench.measured == ["triton", "w4a16", "b12x"]
    assert "activations in 4 bits" in first.reason
    assert any("2 of 3: w4a16" in line for line in bench.said)
    again = bench.run()
    assert (again.backend, again.kept, len(bench.measured)) == ("b12x", True, 3)
    assert again.outcomes == first.outcomes
    assert bench.run(anew=True).kept is False
    assert len(bench.measured) == 6


@pytest.mark.parametrize(
    ("b12x", "w4a16", "best"),
    [
        (43.6, 45.0, "b12x"),
        (43.7, 45.0, "w4a16"),
        (46.0, 45.0, "w4a16"),
        (40.0, 60.0, "b12x"),
        (49.0, 60.0, "triton"),
    ],
)
def test_four_bit_activations_must_win_by_three_percent(
    bench: Bench, b12x: float, w4a16: float, best: str
) -> None:
    bench.shows |= {"b12x": (0.02, b12x), "w4a16": (1e-3, w4a16)}
    assert bench.run().backend == best


def test_one_candidate_is_not_measured_and_nothing_is_written(bench: Bench) -> None:
    result = bench.run(replace(KEY, candidates=("triton",)))
    assert result.backend == "triton"
    assert not bench.measured
    assert not bench.folder.exists()


def test_what_faults_is_excluded_with_its_reason(bench: Bench) -> None:
    bench.faults["b12x"] = RuntimeError("CUDA error: an illegal memory access\nmore of it")
    result = bench.run()
    assert result.backend == "w4a16"
    assert "b12x excluded: RuntimeError: CUDA error: an illegal memory access" in result.reason
    assert "more of it" not in result.reason
    assert bench.run().kept


@pytest.mark.parametrize("error", [0.2, float("nan"), float("inf")])
def test_what_disagrees_is_excluded(bench: Bench, error: float) -> None:
    bench.shows["b12x"] = (error, 1.0)
    result = bench.run()
    assert result.backend == "w4a16"
    assert "b12x excluded: differs from the reference" in result.reason


def test_what_fails_in_a_process_of_its_own_is_not_run_here(bench: Bench) -> None:
    bench.isolated["b12x"] = "its process ended with code -11"
    result = bench.run()
    assert bench.measured == ["triton", "w4a16"]
    assert "b12x excluded: its process ended with code -11" in result.reason


def test_the_engine_starts_on_the_default_though_all_fail(bench: Bench) -> None:
    bench.faults |= {name: RuntimeError("no memory") for name in GOOD}
    result = bench.run()
    assert (result.backend, result.reason) == ("triton", "the shipped default: no candidate passed its check")


def test_only_narrow_ones_that_pass_may_be_chosen(bench: Bench) -> None:
    bench.faults |= {name: RuntimeError("no") for name in ("triton", "w4a16")}
    assert bench.run().backend == "b12x"
    assert pick([]) is None


@pytest.mark.parametrize(
    "change",
    [
        {"chip": "RTX 5090, 12.0"},
        {"driver": "581.1"},
        {"versions": {"torch": "2.14"}},
        {"geometry": {"hidden": 4096}},
        {"candidates": ("triton", "w4a16")},
    ],
)
def test_another_key_is_another_result(bench: Bench, change: dict[str, Any]) -> None:
    bench.run()
    assert not bench.run(replace(KEY, **change)).kept


Data = dict[str, Any]


def short(data: Data) -> Data:
    return {**data, "outcomes": data["outcomes"][:1]}


def strange(data: Data) -> Data:
    return {**data, "outcomes": [{"backend": "triton", "speed": 1}]}


def no_numbers(data: Data) -> Data:
    return {**data, "outcomes": [{**row, "us": "fast"} for row in data["outcomes"]]}


def of_another(data: Data) -> Data:
    return {**data, "key": {**data["key"], "driver": "another"}}


def a_list(data: Data) -> list[int]:
    return []


def nothing(data: Data) -> None:
    return None


@pytest.mark.parametrize("damage", [None, short, strange, no_numbers, of_another, a_list, nothing])
def test_a_damaged_file_is_told_and_measured_anew(bench: Bench, damage: Callable[[Data], object] | None) -> None:
    bench.run()
    (path,) = bench.folder.iterdir()
    path.write_text("{" if damage is None else json.dumps(damage(json.loads(path.read_text()))))
    assert not bench.run().kept
    assert any("measuring anew" in line for line in bench.said)
    assert bench.run().kept, "the file was not mended"


def test_a_folder_that_cannot_be_written_is_told(bench: Bench) -> None:
    bench.folder.parent.mkdir(exist_ok=True)
    bench.folder.write_text("a file where the folder should be")
    assert bench.run().backend == "b12x"
    assert any("could not be kept" in line for line in bench.said)


def test_when_time_is_up_what_is_known_decides_and_is_not_kept(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BUDGET", 8.0)
    result = bench.run()
    assert bench.measured == ["triton", "w4a16"]
    assert result.backend == "w4a16"
    assert "no time left" in result.reason
    assert not bench.folder.exists()


def crash(s: Subject, op: str, backend: str, seed: int) -> None:
    os._exit(7)


def fault(s: Subject, op: str, backend: str, seed: int) -> None:
    raise ValueError(f"{op} on {backend}: no good\nat all")


@pytest.fixture(scope="module")
def subject() -> Subject:
    from nanoserve.checkpoint import open_checkpoint
    from nanoserve.startup import examine, subject_of

    return subject_of(examine(open_checkpoint(DEMO_MODEL, weights=False), EngineConfig(device="cpu")))


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (crash, "its process ended with code 7"),
        (fault, "ValueError: moe_add on torch: no good"),
        (trial.run_once, None),
    ],
)
def test_a_child_that_fails_takes_nothing_with_it(subject: Subject, work: trial.Work, words: str | None) -> None:
    assert in_a_child(subject, "moe_add", "torch", 1, work=work) == words


def test_only_others_kernels_are_tried_elsewhere(subject: Subject) -> None:
    case = moe_case(subject)
    assert tried_elsewhere(subject, case, "triton", 1, work=crash) is None
    assert subject.experts is not None
    many = replace(subject, experts=replace(subject.experts, count=512))
    assert known_risk("b12x", subject.experts) is None
    told = tried_elsewhere(many, case, "b12x", 1, work=fault)
    assert told is not None
    assert "no good" in told
    assert "issue 5446" in told


def once(stream: Tensor, norm: Norm, w: MoeWeights) -> Tensor:
    return fused.moe_add(stream, norm, w)


def thrice(stream: Tensor, norm: Norm, w: MoeWeights) -> Tensor:
    once(stream, norm, w)
    once(stream, norm, w)
    return once(stream, norm, w)


def wrong(stream: Tensor, norm: Norm, w: MoeWeights) -> Tensor:
    return fused.moe_add(-stream, norm, w)


@pytest.mark.parametrize("names", [("thrice", "wrong", "once"), ("once", "wrong", "thrice")])
def test_of_backends_in_the_table_the_faster_is_kept(
    names: tuple[str, ...], subject: Subject, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The whole way, on a CPU: checked, timed, written, taken again, and in the report with its reason."""

    def anywhere(place: Place) -> Reason | None:
        return None

    planted = {name: f"test_calibrate:{name}" for name in names}
    row = {**planted, **table.BACKENDS["moe_add"]}
    monkeypatch.setattr(table, "BACKENDS", {**table.BACKENDS, "moe_add": row})
    monkeypatch.setattr(table, "REQUIREMENTS", {**table.REQUIREMENTS, **dict.fromkeys(names, anywhere)})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ops = table.select(subject.device, subject.dtype, {}, subject.experts)
    assert ops.backend("moe_add") == names[0]
    said: list[str] = []

    def key(s: Subject, candidates: tuple[str, ...]) -> Key:
        return replace(KEY, candidates=candidates)

    for kept in (False, True):
        chosen, result = calibrating.choose(subject, ops, {}, said.append, key, anew=False)
        assert result is not None
        assert (result.backend, result.kept) == ("once", kept)
        report = next(row for row in chosen.report if row.op == "moe_add")
        assert report.backend == "once"
        assert "thrice" in report.reason
        assert "wrong excluded: differs" in report.reason
    assert len([line for line in said if line.startswith("calibrating")]) == 3


def test_on_a_cpu_nothing_is_calibrated(subject: Subject) -> None:
    ops = table.select(torch.device("cpu"), torch.float32, {}, subject.experts)
    said: list[str] = []
    assert calibrating.calibrated(subject, ops, {}, said.append) == (ops, None)
    assert not said


def test_the_experts_are_timed_in_the_formats_that_most_layers_have() -> None:
    """Super's first layer of experts is the only one of its kind."""
    from nanoserve.shapes import examine_shape
    from nanoserve.startup import subject_of

    s = subject_of(examine_shape("super", EngineConfig(device="cpu")))
    assert s.bits("shared_down")[0] == 8
    assert set(s.bits("shared_down")) == {4, 8, 16}
    assert s.bits("fc1") == [16, 8]
