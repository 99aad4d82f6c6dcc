"""Backends are resolved once, with reasons, and never to nothing."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from nanoserve.errors import BackendError
from nanoserve.kernels import table
from nanoserve.kernels.fused import Norm
from nanoserve.kernels.linear import Plain
from nanoserve.kernels.place import Code, Package, Place, Reason
from nanoserve.kernels.table import BACKENDS, Resolution, describe, resolve, select

CPU = torch.device("cpu")


def test_every_op_resolves_to_a_function_and_a_reason() -> None:
    ops = select(CPU, torch.bfloat16, {})
    assert [row.op for row in ops.report] == list(BACKENDS)
    for row in ops.report:
        assert callable(getattr(ops, row.op))
        assert row.reason


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"routr": "torch"}, ("routr", "router")),
        ({"router": "cuda"}, ("router", "'cuda'", "torch")),
    ],
)
def test_unknown_names_are_told_with_the_known_ones(choices: dict[str, str], words: tuple[str, ...]) -> None:
    with pytest.raises(BackendError) as caught:
        select(CPU, torch.bfloat16, choices)
    assert all(word in str(caught.value) for word in words)


GPU = Place("cuda", (9, 0), torch.bfloat16, {"triton": Package((3, 6, 0))})
BARE = Place("cpu", None, torch.bfloat16)


@pytest.fixture
def fast_router(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second backend for one op, which needs a GPU."""
    fast_first = {"fast": "nanoserve.kernels.linear:relu2", "torch": BACKENDS["router"]["torch"]}
    backends = {**BACKENDS, "router": fast_first}
    monkeypatch.setattr(table, "BACKENDS", backends)

    def needs_gpu(place: Place) -> Reason | None:
        return None if place.device == "cuda" else Reason(Code.DEVICE, "needs a GPU")

    monkeypatch.setattr(table, "REQUIREMENTS", {**table.REQUIREMENTS, "fast": needs_gpu})


def row_of(report: tuple[Resolution, ...], op: str) -> Resolution:
    return next(row for row in report if row.op == op)


@pytest.mark.usefixtures("fast_router")
def test_the_best_that_can_run_is_taken_and_the_others_reason_told() -> None:
    report = resolve(BARE, {})
    row = row_of(report, "router")
    assert (row.backend, row.rejected) == ("torch", (("fast", Reason(Code.DEVICE, "needs a GPU")),))
    (line,) = describe(report)
    assert line.startswith("torch (the best that runs here): every op; ")
    assert "not fast: needs a GPU" in line
    assert row_of(resolve(GPU, {}), "router").backend == "fast"


@pytest.mark.usefixtures("fast_router")
def test_a_choice_that_cannot_run_is_refused_and_never_replaced() -> None:
    with pytest.raises(BackendError) as caught:
        resolve(BARE, {"router": "fast"})
    assert all(word in str(caught.value) for word in ("router", "fast", "needs a GPU", "torch"))
    row = row_of(resolve(GPU, {"router": "torch"}), "router")
    assert (row.backend, row.reason) == ("torch", "chosen by name")


def test_linear_takes_the_op_of_the_weights_format() -> None:
    ops = select(CPU, torch.bfloat16, {})
    weight = Plain(torch.randn(3, 4))
    x = torch.randn(2, 4)
    torch.testing.assert_close(ops.linear(x, weight), x @ weight.data.T)


@pytest.mark.parametrize(("backend", "seen"), [("torch", ["norm_linears"]), ("native", ["norm", "linear_plain"])])
def test_a_projection_is_fused_with_its_norm_unless_its_linear_op_was_named(backend: str, seen: list[str]) -> None:
    ops, called = select(CPU, torch.bfloat16, {}), list[str]()

    def noted(name: str) -> Any:
        def call(*arguments: Any) -> Any:
            called.append(name)
            return getattr(ops, name)(*arguments)

        return call

    report = tuple(replace(row, backend=backend) if row.op == "linear_plain" else row for row in ops.report)
    own = {name: noted(name) for name in ("norm", "linear_plain", "norm_linears")}
    x, norm, weight = torch.randn(2, 4), Norm(torch.randn(4), 1e-5), Plain(torch.randn(3, 4))
    got = replace(ops, **own, report=report).project(x, norm, weight)
    want = torch.nn.functional.rms_norm(x, (4,), norm.weight, norm.eps) @ weight.data.T
    torch.testing.assert_close(got, want)
    assert called == seen


def test_triton_computes_on_bfloat16_alone() -> None:
    own = [row for row in resolve(GPU, {}) if "triton" in BACKENDS[row.op]]
    assert own
    assert {row.backend for row in own} == {"triton"}
    rows = resolve(replace(GPU, dtype=torch.float32), {})
    assert {row.backend for row in rows} == {"torch"}
    assert any("needs bfloat16 activations, and these are float32" in line for line in describe(rows))
