"""cuda/products.cu on a CPU, against sums in float64."""

import pytest
import torch
from cuda_on_cpu import HAS_COMPILER, Machine
from cuda_products_checks import check

from nanoserve.kernels import cuda_products, nvrtc
from nanoserve.kernels.cuda_products import Cut, Part, Plan, Router, To, Vector
from nanoserve.kernels.linear import Plain

pytestmark = pytest.mark.skipif(not HAS_COMPILER, reason="g++ is not installed: CUDA C++ is not run on the CPU")

CUTS = (
    Cut(2, 4), Cut(1, 3, in_flight=1), Cut(4, 4), Cut(1, 2, 8), Cut(2, 6, longest=1024, in_flight=2, paced=True),
    Cut(4, 12), Cut(2, 2, 8), Cut(4, 8), Cut(1, 7),
)  # fmt: skip
TARGETS: tuple[To, ...] = ("FLOAT", "BF16", "SQUARED", "STREAM")
EIGHTS = (2, 4)
"""Of rows that are one job, beside one."""


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A CPU in the place of a card."""
    machine = Machine()
    monkeypatch.setattr(nvrtc, "load", machine.load)
    monkeypatch.setattr(cuda_products, "_multiprocessors", lambda _: machine.multiprocessors)  # pyright: ignore[reportUnknownLambdaType]
    return machine


SINGLE = [
    *((4, columns) for columns in (64, 192, 320, 448, 1024, 1856)),
    *((8, columns) for columns in (64, 192, 320, 448, 1024, 3072)),
    *((16, columns) for columns in (64, 192, 320, 448, 1024, 1536)),
    *((32, columns) for columns in (64, 192, 320, 448, 1024, 2112)),
]


@pytest.mark.parametrize(("bits", "columns"), SINGLE)
def test_a_matrix(machine: Machine, bits: int, columns: int) -> None:
    at = SINGLE.index((bits, columns))
    cut, to = CUTS[at % len(CUTS)], TARGETS[(at + at // 6) % len(TARGETS)]
    normed = at % 5 == 2
    rows = 108 if bits == 4 else 107  # scales of a last tile's rows must be whole sixteens of bytes
    ready = not normed and at % 2 == 1
    plan = Plan((Part(bits, rows, columns, to=to),), (Vector(bits, columns, normed=normed, ready=ready),))
    check(machine, plan, cut, addend=to == "STREAM" and at % 2 == 0)


@pytest.mark.parametrize("eights", EIGHTS)
@pytest.mark.parametrize(("bits", "columns"), [(4, 448), (8, 320), (16, 64), (16, 1536), (32, 192)])
def test_a_matrix_of_tall_jobs(machine: Machine, bits: int, columns: int, eights: int) -> None:
    plan = Plan((Part(bits, 108, columns, to="STREAM", eights=eights),), (Vector(bits, columns),))
    check(machine, plan, Cut(2, 4), addend=True)


@pytest.mark.parametrize("eights", EIGHTS)
@pytest.mark.parametrize("cut", [Cut(2, 6), Cut(1, 3, 8)])
def test_parts_of_tall_jobs(machine: Machine, eights: int, cut: Cut) -> None:
    """Of experts, next to a matrix of jobs that are less tall; and their sum."""
    up = Part(4, 52, 192, to="SQUARED", copies=3, eights=eights)
    vectors = (Vector(4, 192, normed=True), Vector(8, 320, source=1))
    check(machine, Plan((Part(8, 50, 320, vector=1), up), vectors, Router(24, 3, True, "in front")), cut)
    down = Part(4, 84, 448, to="STREAM", copies=5, summed=True, eights=eights)
    check(machine, Plan((down,), (Vector(4, 448, none=True),), Router(24, 5, True, "before")), cut, addend=True)


@pytest.mark.parametrize("addend", [False, True])
def test_added_to_the_stream(machine: Machine, addend: bool) -> None:
    plan = Plan((Part(8, 131, 192, to="STREAM"),), (Vector(8, 192),))
    check(machine, plan, Cut(2, 4), addend)


@pytest.mark.parametrize("gate", [16, 32])
def test_two_parts_of_one_norm(machine: Machine, gate: int) -> None:
    """What a mixture begins with: logits, and the shared expert."""
    check(
        machine,
        Plan(
            (Part(gate, 24, 448, vector=1, to="FLOAT"), Part(4, 100, 448, to="SQUARED")),
            (Vector(4, 448, normed=True), Vector(gate, 448, normed=True)),
        ),
        Cut(4, 4),
    )


@pytest.mark.parametrize("cut", [Cut(1, 3), Cut(4, 8)])
def test_three_parts(machine: Machine, cut: Cut) -> None:
    """One of which is copied in pieces, so that a job is several stages; and vectors with and without a norm."""
    check(
        machine,
        Plan(
            (
                Part(16, 41, 1536, vector=0, to="STREAM"),
                Part(8, 30, 192, vector=1),
                Part(4, 20, 1536, vector=2, to="FLOAT"),
            ),
            (Vector(16, 1536, normed=True), Vector(8, 192, source=1), Vector(4, 1536, normed=True)),
        ),
        cut,
        addend=True,
    )


@pytest.mark.parametrize("cut", [Cut(1, 2), Cut(2, 4), Cut(4, 4)])
def test_single_stages_of_three_parts(machine: Machine, cut: Cut) -> None:
    check(
        machine,
        Plan(
            (Part(32, 9, 64, vector=1, to="FLOAT"), Part(8, 70, 64), Part(8, 8, 64, to="SQUARED")),
            (Vector(8, 64, normed=True), Vector(32, 64, normed=True)),
        ),
        cut,
    )


CHOICES = [
    (128, 6, True, Cut(2, 4, in_flight=2)),
    (512, 22, True, Cut(1, 3)),
    (8, 2, False, Cut(4, 4)),
    (40, 32, True, Cut(1, 2)),
    (128, 6, True, Cut(2, 6, 8)),
]


@pytest.mark.parametrize(("experts", "top_k", "normalize", "cut"), CHOICES)
def test_experts_chosen_here(machine: Machine, experts: int, top_k: int, normalize: bool, cut: Cut) -> None:
    """Next to the shared expert's first matrix, which other blocks take; and by a launch of the router alone."""
    bits = 16 if experts == 512 else 32
    gate, shared = Part(bits, experts, 192, to="FLOAT"), Part(4, 52, 192, vector=1, to="SQUARED")
    vectors = (Vector(bits, 192, normed=True), Vector(4, 192, normed=True))
    plan = Plan((gate, shared), vectors, Router(experts, top_k, normalize, "here"))
    check(machine, plan, cut)
    check(machine, Plan((gate,), vectors[:1], plan.router), cut)
    for same in (torch.zeros(experts), torch.arange(experts) % 3, torch.arange(experts) // 5):
        rows = torch.randn(experts, 192)[same.long()] * 0.2
        ids = check(machine, plan, cut, gate=Plain(rows.bfloat16() if bits == 16 else rows))
        assert len(set(ids)) == top_k


@pytest.mark.parametrize(("bits", "columns"), [(4, 192), (8, 320), (16, 64), (16, 1536), (32, 64)])
def test_experts_chosen_before(machine: Machine, bits: int, columns: int) -> None:
    plan = Plan(
        (Part(bits, 20, columns, copies=5),),
        (Vector(bits, columns, normed=True),),
        Router(16, 5, True, "in front"),
    )
    check(machine, plan, Cut(2, 4))


@pytest.mark.parametrize(
    ("bits", "columns", "top_k", "cut"),
    [
        (4, 192, 6, Cut(2, 4)),
        (4, 448, 22, Cut(4, 8)),
        (8, 320, 2, Cut(4, 4)),
        (8, 3072, 3, Cut(2, 2)),
        (16, 1536, 3, Cut(2, 6, in_flight=1)),
        (32, 1024, 2, Cut(4, 4)),
        (4, 1856, 6, Cut(1, 3)),
        (4, 448, 6, Cut(2, 6, 8, in_flight=4, paced=True)),
    ],
)
def test_summed_experts(machine: Machine, bits: int, columns: int, top_k: int, cut: Cut) -> None:
    plan = Plan(
        (Part(bits, 44, columns, to="STREAM", copies=top_k, summed=True),),
        (Vector(bits, columns, none=True),),
        Router(24, top_k, True, "before" if columns % 128 else "in front"),
    )
    check(machine, plan, cut, addend=columns % 128 == 64)


@pytest.mark.parametrize("cut", [Cut(2, 6), Cut(2, 4)])
def test_lanes_do_not_count_on_one_another(machine: Machine, cut: Cut) -> None:
    machine.apart = True
    check(machine, Plan((Part(32, 107, 1024, to="FLOAT"),), (Vector(32, 1024),)), cut)
    experts = Part(4, 44, 192, to="STREAM", copies=6, summed=True)
    check(machine, Plan((experts,), (Vector(4, 192, none=True),), Router(24, 6, True, "before")), cut)


@pytest.mark.parametrize(
    ("bits", "columns", "eights"), [(4, 64, 4), (4, 320, 1), (8, 320, 2), (16, 64, 1), (32, 320, 1)]
)
def test_results_and_vectors_that_are_ready(machine: Machine, bits: int, columns: int, eights: int) -> None:
    """For each format: of a matrix, of another that takes a ready vector, and of experts."""
    parts = (
        Part(4, 72, columns, vector=1, ready=bits, eights=eights),
        Part(bits, 40, columns, to="SQUARED", ready=12 - bits if bits < 16 else 4, eights=eights),
    )
    check(machine, Plan(parts, (Vector(bits, columns, ready=True), Vector(4, columns, source=1))), Cut(2, 4))
    experts = Part(bits, 64, columns, to="SQUARED", copies=3, ready=bits, eights=eights)
    check(machine, Plan((experts,), (Vector(bits, columns, ready=True),), Router(9, 3, True, "before")), Cut(4, 4))
    down = Part(bits, 64, columns, copies=3, summed=True, ready=bits, eights=eights)
    check(
        machine,
        Plan((down,), (Vector(bits, columns, none=True),), Router(9, 3, False, "in front")),
        Cut(2, 2, in_flight=1, paced=True),
    )


def mixture(experts: int, top_k: int, eights: int, latent: bool) -> tuple[Plan, Plan, Plan]:
    """Its launches: what reads the stream, the choice and what it decides, and the weighted sum."""
    gate = Part(32, experts, 448, to="FLOAT", eights=eights)
    routers = [Router(experts, top_k, True, at) for at in ("here", "in front", "before")]
    front = (gate, Part(8, 100, 448, vector=1, to="SQUARED", ready=8), Part(8, 64, 448, vector=1, ready=4))
    normed = (Vector(32, 448, normed=True), Vector(8, 448, normed=True))
    width = 64 if latent else 448
    up = (Part(8, 50, 320, vector=1), Part(4, 192, width, to="SQUARED", copies=top_k, ready=4, eights=eights))
    vectors = (Vector(4, width, normed=not latent, ready=latent), Vector(8, 320, source=1, ready=True))
    down = Part(4, 84 if not latent else 64, 192, to="BF16" if latent else "STREAM", copies=top_k, summed=True)
    return (
        Plan(front[: 2 + latent], normed, routers[0]),
        Plan(up, vectors, routers[1]),
        Plan((down,), (Vector(4, 192, none=True),), routers[2]),
    )


@pytest.mark.parametrize(("experts", "top_k", "eights", "latent"), [(128, 6, 1, False), (64, 22, 4, True)])
def test_launches_of_a_mixture(machine: Machine, experts: int, top_k: int, eights: int, latent: bool) -> None:
    front, up, down = mixture(experts, top_k, eights, latent)
    for apart in (False, True):
        machine.apart = apart
        check(machine, front, Cut(2, 6))
        check(machine, up, Cut(2, 2, in_flight=1, paced=True))
        check(machine, down, Cut(2, 4), addend=not latent)
