"""Every reason why a backend is not taken, with chips that are not here; and which is taken where it can run."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import product

import pytest
import torch

from nanoserve.errors import BackendError
from nanoserve.kernels import flashinfer_ops
from nanoserve.kernels.flashinfer_ops import PARTS
from nanoserve.kernels.place import Code, Experts, Package, Place, Reason
from nanoserve.kernels.probe import place_of
from nanoserve.kernels.requirements import ELECTIVE, FUSED_MOE, NUMERICS, REQUIREMENTS
from nanoserve.kernels.table import BACKENDS, Resolution, backends, describe, resolve

SUPER = Experts("nvfp4", True, "relu2", 512, 22, 1024, 2688, 40)
NANO = Experts("nvfp4", True, "relu2", 128, 6, 2688, 1856, 23)
LIGHTNING = replace(NANO, input_scales=False)
OURS = {"triton": Package((3, 6, 0)), "cuda-bindings": Package((13, 0, 3))}
GOOD = {**OURS, **{f"flashinfer.{part}": Package((0, 7, 4)) for part in PARTS}}
CARD = Place("cuda", (12, 0), torch.bfloat16, GOOD, (13, 0), True, frozenset([FUSED_MOE]), SUPER)
BUILT = ("mm_fp8", "mm_fp4", "ssu", "xqa")
"""Backends that nvcc builds a module for, whatever the experts are."""
FLASHINFER = ("cutlass", "w4a16", "b12x")


def with_part(part: str, package: Package) -> Mapping[str, Package]:
    return {**GOOD, f"flashinfer.{part}": package}


def chosen(place: Place, choices: Mapping[str, str] | None = None) -> dict[str, Resolution]:
    return {row.op: row for row in resolve(place, choices or {})}


def built_rows(name: str) -> list[tuple[str, dict[str, object], Code | None]]:
    return [
        (name, {"experts": None}, None),
        (name, {"chip": (12, 1)}, None),
        (name, {"device": "cpu", "chip": None}, Code.DEVICE),
        (name, {"chip": (9, 0)}, Code.CHIP),
        (name, {"dtype": torch.float32}, Code.DTYPE),
        (name, {"packages": {}}, Code.MISSING),
        (name, {"compiler": False}, Code.TOOLKIT),
        (name, {"toolkit": (12, 8)}, Code.TOOLKIT),
    ]


@pytest.mark.parametrize("backend", FLASHINFER)
@pytest.mark.parametrize("chip", [(12, 0), (12, 1)])
def test_it_can_run_on_both_chips(backend: str, chip: tuple[int, int]) -> None:
    assert REQUIREMENTS[backend](replace(CARD, chip=chip)) is None


@pytest.mark.parametrize("backend", FLASHINFER)
@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"device": "cpu", "chip": None}, Code.DEVICE, "NVIDIA GPU"),
        ({"chip": (9, 0)}, Code.CHIP, "12.0 or 12.1, and this GPU has 9.0"),
        ({"chip": (10, 0)}, Code.CHIP, "10.0"),
        ({"dtype": torch.float32}, Code.DTYPE, "float32"),
        ({"dtype": torch.float8_e4m3fn}, Code.DTYPE, "float8"),
        ({"experts": None}, Code.QUANTISATION, "NVFP4 experts"),
        ({"experts": replace(SUPER, format="fp8")}, Code.QUANTISATION, "fp8"),
        ({"experts": replace(SUPER, format="mixed")}, Code.QUANTISATION, "mixed"),
        ({"experts": replace(SUPER, activation="gelu")}, Code.ACTIVATION, "gelu"),
        ({"experts": replace(SUPER, width=1000, size=2690)}, Code.SHAPE, "1000 × 2690"),
        ({"packages": {}}, Code.MISSING, "flashinfer-python"),
    ],
)
def test_what_all_of_them_refuse(backend: str, change: dict[str, object], code: Code, words: str) -> None:
    reason = REQUIREMENTS[backend](replace(CARD, **change))
    assert reason
    assert (reason.code, words in reason.text) == (code, True)


@pytest.mark.parametrize("backend", PARTS)
def test_broken_is_not_absent_and_old_is_neither(backend: str) -> None:
    cases = {
        Code.MISSING: Package(),
        Code.BROKEN: Package((0, 7, 4), "ImportError: No module named 'triton'"),
        Code.VERSION: Package((0, 7, 2)),
    }
    for code, package in cases.items():
        reason = REQUIREMENTS[backend](replace(CARD, packages=with_part(backend, package)))
        assert reason
        assert reason.code is code
    broken = REQUIREMENTS[backend](replace(CARD, packages=with_part(backend, cases[Code.BROKEN])))
    assert "0.7.4 is installed and broken: ImportError: No module named 'triton'" in str(broken)


@pytest.mark.parametrize(
    ("backend", "change", "code"),
    [
        ("native", {"experts": None}, None),
        ("native", {"chip": (12, 1)}, None),
        ("native", {"chip": (9, 0)}, Code.CHIP),
        ("native", {"dtype": torch.float32}, Code.DTYPE),
        ("native", {"toolkit": (12, 8)}, Code.TOOLKIT),
        ("native", {"packages": {}}, Code.MISSING),
        *(row for name in BUILT for row in built_rows(name)),
        ("b12x", {"experts": NANO}, Code.SHAPE),
        ("b12x", {"experts": LIGHTNING}, Code.QUANTISATION),
        ("cutlass", {"experts": LIGHTNING}, Code.QUANTISATION),
        ("cutlass", {"experts": NANO}, None),
        ("cutlass", {"experts": NANO, "packages": with_part("cutlass", Package((0, 7, 5)))}, Code.VERSION),
        ("cutlass", {"packages": with_part("cutlass", Package((0, 7, 5)))}, None),
        ("w4a16", {"experts": NANO}, None),
        ("w4a16", {"experts": LIGHTNING}, None),
        ("b12x", {"toolkit": (12, 9)}, Code.TOOLKIT),
        ("w4a16", {"toolkit": ()}, Code.TOOLKIT),
        ("b12x", {"compiler": False, "built": frozenset[str]()}, None),
        ("cutlass", {"compiler": False, "built": frozenset[str]()}, Code.TOOLKIT),
        ("cutlass", {"toolkit": (12, 8), "built": frozenset[str]()}, Code.TOOLKIT),
        ("cutlass", {"compiler": False}, None),
    ],
)
def test_what_one_refuses_and_another_does_not(backend: str, change: dict[str, object], code: Code | None) -> None:
    reason = REQUIREMENTS[backend](replace(CARD, **change))
    assert (reason.code if reason else None) is code


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({}, None),
        ({"chip": (12, 1)}, None),
        ({"chip": (9, 0)}, None),
        ({"chip": (8, 9)}, Code.CHIP),
        ({"chip": (10, 0)}, Code.CHIP),
        ({"packages": {}}, Code.MISSING),
        ({"dtype": torch.float32}, Code.DTYPE),
        ({"device": "cpu", "chip": None}, Code.DEVICE),
    ],
)
def test_triton_needs_a_chip_that_its_kernels_were_made_for(change: dict[str, object], code: Code | None) -> None:
    reason = REQUIREMENTS["triton"](replace(CARD, **change))
    assert (reason.code if reason else None) is code


def test_what_is_chosen_on_a_card() -> None:
    rows = chosen(CARD)
    assert rows["experts_prefill"].backend == "cutlass"
    assert rows["linear_nvfp4"].backend == "triton"
    assert (rows["moe_add"].backend, rows["experts_few"].backend) == ("cuda", "triton")
    others = dict(rows["moe_add"].rejected)
    assert {name: reason.code for name, reason in others.items()} == dict.fromkeys(("w4a16", "b12x"), Code.BY_NAME)
    assert "5446" in str(others["b12x"])
    assert "5446" not in str(dict(chosen(replace(CARD, experts=replace(SUPER, count=128)))["moe_add"].rejected))
    text = "\n".join(describe(tuple(rows.values())))
    assert "cutlass (the best that runs here; activations quantised to NVFP4): experts_prefill" in text
    assert "not w4a16: reads hidden values as float16" in text


@pytest.mark.parametrize(
    ("op", "backend"),
    [("linear_fp8", "mm_fp8"), ("linear_nvfp4", "mm_fp4"), ("mamba_decode", "ssu"), ("attention_decode", "xqa")],
)
def test_what_no_card_has_checked_is_taken_by_name_alone(op: str, backend: str) -> None:
    automatic = chosen(CARD)[op]
    assert automatic.backend in ("cuda", "triton")
    assert dict(automatic.rejected)[backend].code is Code.BY_NAME
    row = chosen(CARD, {op: backend})[op]
    assert (row.backend, row.reason) == (backend, f"chosen by name; {NUMERICS[backend]}")


def test_what_would_be_built_for_hours_is_not_chosen_but_can_be() -> None:
    bare = replace(CARD, built=frozenset())
    row = chosen(bare)["experts_prefill"]
    assert (row.backend, row.rejected[0][1].code) == ("triton", Code.NOT_BUILT)
    assert chosen(bare, {"experts_prefill": "cutlass"})["experts_prefill"].backend == "cutlass"


@pytest.mark.parametrize("op", ["moe_add", "experts_few"])
@pytest.mark.parametrize("backend", ["w4a16", "b12x", "triton", "torch"])
def test_each_is_taken_by_name(op: str, backend: str) -> None:
    row = chosen(CARD, {op: backend})[op]
    assert (row.backend, row.reason.split(";")[0]) == (backend, "chosen by name")
    assert (";" in row.reason) == (backend in NUMERICS), "the report says which numerics run"


@pytest.mark.parametrize(
    ("op", "backend", "place", "words"),
    [
        ("experts_prefill", "cutlass", replace(CARD, chip=(9, 0)), "this GPU has 9.0; able: triton, torch"),
        ("moe_add", "b12x", replace(CARD, experts=NANO), "2688 × 1856; able: cuda, triton, w4a16, torch"),
        ("moe_add", "cutlass", CARD, "has no backend 'cutlass'; it has cuda, triton, w4a16, b12x, torch"),
        ("experts_few", "w4a16", Place("cpu", None, torch.bfloat16), "needs an NVIDIA GPU; able: torch"),
    ],
)
def test_an_impossible_choice_is_refused_with_the_choices(op: str, backend: str, place: Place, words: str) -> None:
    with pytest.raises(BackendError) as caught:
        resolve(place, {op: backend})
    assert op in str(caught.value)
    assert words in str(caught.value)


def test_automatic_choice_never_ends_in_nothing() -> None:
    chips = (None, (8, 9), (9, 0), (10, 0), (12, 0), (12, 1), (13, 0))
    installed: tuple[Mapping[str, Package], ...] = (
        {},
        GOOD,
        {part: Package((0, 7, 4), "broken") for part in GOOD},
    )
    models = (None, SUPER, NANO, LIGHTNING, replace(NANO, format="bf16"))
    for chip, packages, model, dtype in product(chips, installed, models, (torch.float32, torch.bfloat16)):
        place = Place("cuda" if chip else "cpu", chip, dtype, packages, (13, 0), experts=model)
        for row in resolve(place, {}):
            assert row.backend in BACKENDS[row.op]
            assert REQUIREMENTS[row.backend](place) is None
            assert row.backend not in dict(row.rejected)
            assert all(isinstance(reason, Reason) and str(reason) for _, reason in row.rejected)


def test_every_backend_has_a_predicate_and_every_code_a_name_that_stays() -> None:
    assert {name for row in BACKENDS.values() for name in row} == REQUIREMENTS.keys()
    assert ELECTIVE.keys() <= REQUIREMENTS.keys()
    assert {code.value for code in Code} == {
        *("device", "chip", "dtype", "quantisation", "activation", "shape"),
        *("missing_package", "broken_package", "package_version", "toolkit", "not_built", "by_name"),
    }


def test_a_cpu_is_asked_for_nothing_else() -> None:
    assert place_of(torch.device("cpu"), torch.float32, NANO) == Place("cpu", None, torch.float32, experts=NANO)
    able, rejected = backends("experts_few", torch.device("cpu"), torch.float32, NANO)
    assert list(able) == ["torch"]
    assert {reason.code for _, reason in rejected} == {Code.DEVICE}


def test_an_installation_is_looked_at_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashinfer_ops, "PARTS", {"gone": ("flashinfer.no_such_part",), "there": ("json",)})
    found = flashinfer_ops.packages()
    assert "ModuleNotFoundError" in found["flashinfer.gone"].error
    assert found["flashinfer.gone"].version == found["flashinfer.there"].version >= (0, 7, 4)
    assert not found["flashinfer.there"].error

    def nothing(name: str) -> None:
        return None

    monkeypatch.setattr(flashinfer_ops, "find_spec", nothing)
    assert flashinfer_ops.packages()["flashinfer.gone"] == Package()
    assert flashinfer_ops.toolkit() == ((), False)
    assert flashinfer_ops.built() == frozenset()


@pytest.mark.parametrize(
    ("package", "code", "words"),
    [
        (Package((13, 0, 3)), None, ""),
        (Package(), Code.MISSING, "needs the cuda-bindings package"),
        (Package((13, 0, 3), "no NVRTC library: pip install it"), Code.BROKEN, "pip install"),
    ],
)  # fmt: skip
def test_cuda_needs_what_compiles_its_kernels(package: Package, code: Code | None, words: str) -> None:
    place = replace(CARD, packages={**GOOD, "cuda-bindings": package})
    reason = REQUIREMENTS["cuda"](place)
    assert (reason and reason.code) == code
    assert words in str(reason)
    assert chosen(place)["head"].backend == ("triton" if code else "cuda")
