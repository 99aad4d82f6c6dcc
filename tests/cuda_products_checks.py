"""What cuda/products.cu makes of random weights on a CPU, against sums in float64."""

from collections.abc import Iterator
from itertools import count

import torch
from cuda_on_cpu import Machine
from torch import Tensor

from nanoserve.kernels import cuda_products
from nanoserve.kernels.cuda_products import Cut, Inputs, Plan
from nanoserve.kernels.linear import Fp8, Nvfp4, Plain, Weight, expert
from nanoserve.kernels.norm import rms
from nanoserve.kernels.nvfp4 import unpack

NEXT = count()
EPS = 1e-5
UP = 2.0**64


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
