"""Backends are resolved once, with reasons, and never to nothing."""

import pytest
import torch

from nanoserve.errors import BackendError
from nanoserve.kernels import table
from nanoserve.kernels.linear import Plain
from nanoserve.kernels.table import BACKENDS, describe, select

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


@pytest.fixture
def fast_router(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second backend for one op, which needs a GPU."""
    fast_first = {"fast": "nanoserve.kernels.linear:relu2", "torch": BACKENDS["router"]["torch"]}
    backends = {**BACKENDS, "router": fast_first}
    monkeypatch.setattr(table, "BACKENDS", backends)

    def needs_gpu(device: torch.device, dtype: torch.dtype) -> str | None:
        return None if device.type == "cuda" else "needs a GPU"

    monkeypatch.setattr(table, "REQUIREMENTS", {**table.REQUIREMENTS, "fast": needs_gpu})


@pytest.mark.usefixtures("fast_router")
def test_the_best_that_can_run_is_taken_and_the_others_reason_told() -> None:
    ops = select(CPU, torch.bfloat16, {})
    row = next(row for row in ops.report if row.op == "router")
    assert (row.backend, row.rejected) == ("torch", (("fast", "needs a GPU"),))
    assert any("router" in line and "not fast: needs a GPU" in line for line in describe(ops.report))
    gpu = select(torch.device("cuda"), torch.bfloat16, {})
    assert next(row.backend for row in gpu.report if row.op == "router") == "fast"


@pytest.mark.usefixtures("fast_router")
def test_a_choice_that_cannot_run_is_refused_and_never_replaced() -> None:
    with pytest.raises(BackendError) as caught:
        select(CPU, torch.bfloat16, {"router": "fast"})
    assert all(word in str(caught.value) for word in ("router", "fast", "needs a GPU", "torch"))
    gpu = select(torch.device("cuda"), torch.bfloat16, {"router": "torch"})
    row = next(row for row in gpu.report if row.op == "router")
    assert (row.backend, row.reason) == ("torch", "chosen by name")


def test_linear_takes_the_op_of_the_weights_format() -> None:
    ops = select(CPU, torch.bfloat16, {})
    weight = Plain(torch.randn(3, 4))
    x = torch.randn(2, 4)
    torch.testing.assert_close(ops.linear(x, weight), x @ weight.data.T)


@pytest.mark.parametrize(
    ("capability", "installed", "reason"),
    [
        ((9, 0), True, None),
        ((12, 1), True, None),
        ((8, 9), True, "8.9"),
        ((10, 0), True, "9.0 or 12.x"),
        ((12, 0), False, "triton package"),
    ],
)
def test_triton_needs_a_chip_that_its_kernels_were_made_for(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], installed: bool, reason: str | None
) -> None:
    assert table.REQUIREMENTS["triton"](CPU, torch.bfloat16) == "needs an NVIDIA GPU"

    def has(device: torch.device) -> tuple[int, int]:
        return capability

    def found(name: str) -> object | None:
        return name if installed else None

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", has)
    monkeypatch.setattr(table, "find_spec", found)
    told = table.REQUIREMENTS["triton"](torch.device("cuda"), torch.bfloat16)
    assert told is None if reason is None else reason in str(told)


def test_triton_computes_on_bfloat16_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def hopper(device: torch.device) -> tuple[int, int]:
        return 9, 0

    def found(name: str) -> object:
        return name

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", hopper)
    monkeypatch.setattr(table, "find_spec", found)
    own = [row for row in select(torch.device("cuda"), torch.bfloat16, {}).report if "triton" in BACKENDS[row.op]]
    assert own
    assert {row.backend for row in own} == {"triton"}
    rows = select(torch.device("cuda"), torch.float32, {}).report
    assert {row.backend for row in rows} == {"torch"}
    assert any("needs bfloat16 activations, and these are float32" in line for line in describe(rows))
