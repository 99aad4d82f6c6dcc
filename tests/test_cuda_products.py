"""cuda/products.cu on a CPU, against sums in float64."""

from collections.abc import Iterator
from itertools import count

import pytest
import torch
from cuda_on_cpu import HAS_COMPILER, Machine
from torch import Tensor

from nanoserve.kernels import cuda_products, nvrtc
from nanoserve.kernels.cuda_products import Cut, Inputs, Part, Plan, Router, To, Vector
from nanoserve.kernels.linear import Fp8, Nvfp4, Plain, Weight, expert
from nanoserve.kernels.norm import rms
from nanoserve.kernels.nvfp4 import unpack

pytestmark = pytest.mark.skipif(not HAS_COMPILER, reason="g++ is not installed: CUDA C++ is not run on the CPU")

CUTS = (
    Cut(2, 4), Cut(1, 3), Cut(4, 4), Cut(1, 2, 8), Cut(2, 6, longest=1024),
    Cut(4, 12), Cut(2, 2, 8), Cut(4, 8), Cut(1, 7),
)  # fmt: skip
TARGETS: tuple[To, ...] = ("FLOAT", "BF16", "SQUARED", "STREAM")
NEXT = count()
EPS = 1e-5
EIGHTS = (2, 4)
"""Of rows that are one job, beside one."""
UP = 2.0**64


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A CPU in the place of a card."""
    machine = Machine()
    monkeypatch.setattr(nvrtc, "load", machine.load)
    monkeypatch.setattr(cuda_products, "_multiprocessors", lambda _: machine.multiprocessors)  # pyright: ignore[reportUnknownLambdaType]
    return machine


def weight(bits: int, *shape: int) -> Weight:
    """Random, with small scales and codes among the others."""
    leading, rows, columns = shape[:-2], shape[-2], shape[-1]
    if bits == 4:
        scales = (torch.rand(*leading, rows, columns // 16) * 3).to(torch.float8_e4m3fn)
        scales.view(torch.uint8)[..., ::5, 0] %= 8
        codes = torch.randint(0, 256, (*leading, rows, columns // 2), dtype=torch.uint8)
        return Nvfp4(codes, scales, torch.rand(leading) * 0.01 + 0.005)
    if bits == 8:
        data = torch.randn(shape) * torch.tensor([1.0, 0.01, 100.0, 1.0])[torch.arange(columns) % 4]
        return Fp8(data.clamp(-448, 448).to(torch.float8_e4m3fn), torch.rand(leading) + 0.5)
    return Plain((torch.randn(shape) * 0.2).to(torch.bfloat16 if bits == 16 else torch.float32))


def wide(matrix: Weight) -> Tensor:
    """A matrix in float64."""
    match matrix:
        case Nvfp4():
            return unpack(matrix.data, matrix.scales, torch.ones(())).double() * matrix.global_scale.double()
        case Fp8():
            return matrix.data.double() * matrix.scale.double()
        case Plain(data):
            return data.double()


def tensors_of(matrix: Weight) -> list[Tensor]:
    """All that a launch reads of it."""
    match matrix:
        case Nvfp4():
            return [matrix.data, matrix.scales, matrix.global_scale]
        case Fp8():
            return [matrix.data, matrix.scale]
        case Plain(data):
            return [data]


def product(matrix: Weight, vector: Tensor) -> tuple[Tensor, Tensor]:
    """(sums, the size of what is added), float64."""
    w, v = wide(matrix), vector.double()
    return w @ v, (w.square() @ v.square()).sqrt()


def bf16(values: Tensor) -> Tensor:
    return values.float().bfloat16().double()


def places(count: int, bits: int) -> Tensor:
    """Where each value of a vector lies that is ready for weights of so many bits; see step.cuh."""
    at = torch.arange(count)
    if bits == 4:
        return at // 8 * 8 + at % 4 * 2 + at // 4 % 2
    return at // 4 * 4 + at % 2 * 2 + at // 2 % 2 if bits == 8 else at


def made_ready(vectors: Tensor, bits: int) -> Tensor:
    """Rows as the weights want them."""
    made = torch.empty_like(vectors)
    made[..., places(vectors.shape[-1], bits)] = vectors * (UP if bits < 16 else 1)
    return made


def as_is(results: Tensor, bits: int) -> Tensor:
    """The inverse; bits are 0 where nothing was done."""
    return results[..., places(results.shape[-1], bits)] / (UP if 0 < bits < 16 else 1)


def expected(
    plan: Plan, weights: tuple[Weight, ...], inputs: Inputs, choice: tuple[list[int], Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each part (results, how far off they may be), float64."""
    ids, chosen = choice
    for part, matrix in zip(plan.parts, weights, strict=True):
        source = plan.vectors[part.vector]
        if source.normed:
            assert inputs.norm is not None
            vectors = [(rms(inputs.vectors[0], EPS) * inputs.norm).bfloat16().view(-1)]
        else:
            vectors = list(inputs.vectors[source.source].view(-1, part.columns))
        pairs = [
            product(expert(matrix, ids[i]) if part.copies else matrix, vectors[i % len(vectors)])
            for i in range(max(part.copies, 1))
        ]
        if part.summed:
            sums = torch.stack([y for y, _ in pairs]).T @ chosen.double()
            size = (torch.stack([s for _, s in pairs]).T.square() @ chosen.double().square()).sqrt()
        else:
            sums, size = (torch.cat(values) for values in zip(*pairs, strict=True))
        off = size * (2e-3 if source.normed else 1e-5)
        if part.to == "FLOAT":
            yield sums, off
            continue
        y = bf16(sums)
        off = off + sums.abs() / 128
        if part.to == "SQUARED":
            most = torch.relu(y) + off
            yield bf16(torch.relu(y) ** 2), most**2 - torch.relu(y) ** 2 + most**2 / 256
        elif part.to == "STREAM":
            assert inputs.stream is not None
            if inputs.addend is not None:
                y = bf16(y + inputs.addend.view(-1))
                off = off + y.abs() / 128
            y = bf16(y + inputs.stream.view(-1))
            yield y, off + y.abs() / 128
        else:
            yield y, off


def outs_of(plan: Plan) -> tuple[Tensor, ...]:
    """Nobody's results yet."""
    return tuple(
        torch.full(
            (1 if part.summed else max(part.copies, 1), part.rows),
            torch.nan,
            dtype=torch.float32 if part.to == "FLOAT" else torch.bfloat16,
        )
        for part in plan.parts
    )


def check(machine: Machine, plan: Plan, cut: Cut, addend: bool = False, gate: Weight | None = None) -> list[int]:
    """Run a plan over random inputs, by several numbers of blocks and in several orders; the chosen experts.

    A gate is one whose logits are often equal: of such experts the lower number is chosen.
    """
    weights = tuple(
        weight(part.bits, *([plan.router.experts] if plan.router and part.copies else []), part.rows, part.columns)
        for part in plan.parts
    )
    weights = weights if gate is None else (gate, *weights[1:])
    sizes, ready = dict[int, int](), dict[int, int]()
    for vector in plan.vectors:
        source = 0 if vector.normed else vector.source
        sizes[source] = vector.columns
        if vector.none or vector.ready:
            ready[source] = vector.bits
    lengths = {0: plan.parts[0].copies if plan.vectors[0].none else 1}
    vectors = tuple(torch.randn(lengths.get(i, 1), sizes[i]).bfloat16() for i in sorted(sizes))
    given = tuple(made_ready(vector, ready[i]) if i in ready else vector for i, vector in enumerate(vectors))
    norm = torch.rand(sizes[0]) + 0.5 if plan.vectors[0].normed else None
    rows = plan.parts[0].rows
    stream = torch.randn(rows).bfloat16() if plan.parts[0].to == "STREAM" else None
    added = torch.randn(rows).bfloat16() if addend else None
    here = plan.router is not None and plan.router.chosen == "here"
    top = plan.router.top_k if plan.router else 1
    want_ids, want_weights = list(range(top)), torch.ones(top)
    bias = (torch.zeros if gate else torch.randn)(plan.router.experts) * 0.1 if plan.router and here else None
    ticket = torch.zeros(1, dtype=torch.int32)
    if plan.router and not here:
        want_ids = torch.randperm(plan.router.experts)[:top].tolist()
        want_weights = torch.rand(top) + 0.1
    wants = list(expected(plan, weights, Inputs(vectors, norm, EPS, stream, added), (want_ids, want_weights)))

    first: list[Tensor] = []
    for blocks, seed in ((3, 0), (1, 3), (plan.jobs + 2, 1), (2, 2), (3, 4 + next(NEXT))):
        outs = outs_of(plan)
        ids = torch.full((top,), -1, dtype=torch.int32) if here else torch.tensor(want_ids, dtype=torch.int32)
        chosen = torch.full((top,), torch.nan) if here else want_weights.clone()
        optional = [t for t in (norm, bias, stream, added) if t is not None]
        machine.multiprocessors, machine.blocks, machine.seed = blocks, blocks, seed
        machine.tensors = [
            *outs,
            *given,
            *optional,
            ids,
            chosen,
            ticket,
            *(t for w in weights for t in tensors_of(w)),
        ]
        choice = [ids, chosen] if plan.router and plan.router.chosen == "in front" else []
        decided = [*given, *(t for t in (stream, added) if t is not None)]
        machine.late = [*decided, *choice]
        inputs = Inputs(
            given, norm, EPS, stream, added, outs[0] if here else None, bias, ids if plan.router else None,
            chosen if plan.router else None, ticket, 2.5,
        )  # fmt: skip
        cuda_products.run(plan, weights, outs, inputs, cut)
        if plan.router and here and bias is not None:
            scores = torch.sigmoid(outs[0].view(-1))
            want_ids = torch.sort(scores + bias, descending=True, stable=True).indices[:top].tolist()
            want_weights = scores[want_ids] / (scores[want_ids].sum() if plan.router.normalize else 1) * 2.5
            assert ids.tolist() == want_ids
            assert not ticket
            torch.testing.assert_close(chosen, want_weights, rtol=2e-6, atol=0)
        results = [*outs, chosen]
        for part, out, (want, off) in zip(plan.parts, outs, wants, strict=True):
            got = as_is(out.double(), part.ready).view(-1)
            wrong = ~((got - want).abs() <= off)  # NaN is wrong, too
            assert not wrong.any(), (blocks, seed, wrong.nonzero().view(-1)[:20].tolist(), got[wrong][:8])
        if first:
            assert all(torch.equal(a, b) for a, b in zip(results, first, strict=True)), (blocks, seed)
        first = results
    return want_ids


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
    (128, 6, True, Cut(2, 4)),
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
        (16, 1536, 3, Cut(2, 6)),
        (32, 1024, 2, Cut(4, 4)),
        (4, 1856, 6, Cut(1, 3)),
        (4, 448, 6, Cut(2, 6, 8)),
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
    check(machine, Plan((down,), (Vector(bits, columns, none=True),), Router(9, 3, False, "in front")), Cut(2, 2))


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
        check(machine, up, Cut(2, 2))
        check(machine, down, Cut(2, 4), addend=not latent)
