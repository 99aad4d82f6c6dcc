"""Which launches of cuda/products.cu an op takes for one token, from its weights' shapes and formats alone."""

from dataclasses import dataclass, replace
from functools import cache

from nanoserve.kernels.chips import shared_room
from nanoserve.kernels.cubin import RESERVED
from nanoserve.kernels.cuda_products import BITS, Cut, Part, Plan, Router, To, Vector
from nanoserve.kernels.linear import Fp8, Nvfp4, Plain, Weight

LONGEST_ROW, MOST = 4096, 32
"""Bytes of a row of codes that are copied at once, and chosen experts."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight's bits, rows and columns; of a stack of experts, those of each."""

    bits: int
    rows: int
    columns: int

    @property
    def able(self) -> bool:
        """Whether the kernel reads it: rows of whole sixteens of bytes, or of whole steps where it must be."""
        row = self.columns * self.bits // 8
        if self.bits == 4:
            whole = self.columns % 64 == 0 and self.rows * self.columns % 256 == 0  # of the scales, too
            return whole and row <= LONGEST_ROW
        return row % 128 == 0 if self.bits > 8 else row % 16 == 0 and (row % 128 == 0 or row <= LONGEST_ROW // 2)


def matrix(weight: Weight) -> Matrix | None:
    """A weight's facts; None where its type is none that the kernel reads."""
    match weight:
        case Nvfp4(data):
            return Matrix(4, data.shape[-2], 2 * data.shape[-1])
        case Fp8(data):
            return Matrix(8, data.shape[-2], data.shape[-1])
        case Plain(data):
            bits = BITS.get(data.dtype)
            return Matrix(bits, data.shape[-2], data.shape[-1]) if bits else None


def eights(m: Matrix) -> int:
    """Eights of rows of a job: several, where rows are short."""
    return 4 if m.bits == 4 and m.columns <= 1280 else 2 if m.columns * m.bits <= 1024 * 16 and m.bits > 4 else 1


def part(
    m: Matrix, vector: int = 0, to: To = "BF16", copies: int = 0, *, summed: bool = False, ready: int = 0
) -> Part:
    """A matrix as a part of a launch."""
    return Part(m.bits, m.rows, m.columns, vector, to, copies, summed, eights(m), ready)


@cache
def normed(
    matrices: tuple[Matrix, ...], to: tuple[To, ...], ready: tuple[int, ...], router: Router | None = None
) -> Plan:
    """Up to three matrices over the norm of the stream; ``ready`` as of `Part`. A router's is the first."""
    bits = list(dict.fromkeys(m.bits for m in matrices))
    each = zip(matrices, to, ready, strict=True)
    parts = tuple(part(m, bits.index(m.bits), kind, ready=order) for m, kind, order in each)
    return Plan(parts, tuple(Vector(b, matrices[0].columns, normed=True) for b in bits), router)


@cache
def plain(m: Matrix, to: To, *, ready: bool) -> Plan:
    """A matrix over a vector, as it is or in the weights' order."""
    return Plan((part(m, to=to),), (Vector(m.bits, m.columns, ready=ready),))


@cache
def up(shared_down: Matrix, m: Matrix, router: Router, *, latent: bool) -> Plan:
    """The shared expert's second product, and the chosen experts' first, over the norm or a latent."""
    own = Vector(m.bits, m.columns, normed=not latent, ready=latent)
    shared = Vector(shared_down.bits, shared_down.columns, source=1, ready=True)
    experts = part(m, to="SQUARED", copies=router.top_k, ready=m.bits)
    return Plan((part(shared_down, 1), experts), (own, shared), router)


@cache
def down(m: Matrix, router: Router, to: To, after: int) -> Plan:
    """The chosen experts' second product and weighted sum; ``after``: bits of what will meet it, or 0."""
    experts = part(m, to=to, copies=router.top_k, summed=True, ready=after)
    return Plan((experts,), (Vector(m.bits, m.columns, none=True),), router)


def role(plan: Plan) -> str:
    """What a launch does: a mixture's three, the head, an addition to the stream, or another product."""
    first = plan.parts[0]
    if plan.router:
        return "down" if first.summed else "front" if plan.router.chosen == "here" else "up"
    return {"STREAM": "add", "FLOAT": "head"}.get(first.to, "read")


def key(plan: Plan) -> tuple[str, int, int]:
    """What `MEASURED` knows a launch by: its role, and the first part's bits and columns."""
    first = plan.parts[0]
    return role(plan), first.bits, first.columns


MEASURED: dict[int, dict[tuple[str, int, int], tuple[Cut, *tuple[int, ...]]]] = {
    9: {
        ("read", 4, 2688): (Cut(2, 6, in_flight=2), 2),
        ("read", 8, 2688): (Cut(2, 6, 8, in_flight=3, paced=True), 1),
        ("read", 16, 2688): (Cut(2, 4, 8), 2),
        ("read", 8, 4096): (Cut(1, 4, 8, in_flight=2), 1),
        ("read", 16, 4096): (Cut(2, 6, 8, in_flight=2), 1),
        ("add", 4, 4096): (Cut(4, 4, in_flight=1), 2),
        ("add", 8, 4096): (Cut(2, 4, 8), 1),
        ("add", 16, 4096): (Cut(2, 4, 8, in_flight=2), 1),
        ("add", 8, 8192): (Cut(1, 4, 8), 1),
        ("add", 8, 1024): (Cut(2, 6, 8), 2),
        ("add", 16, 1024): (Cut(2, 6, 8), 2),
        ("front", 32, 2688): (Cut(1, 4, 8), 1, 2),
        ("front", 16, 2688): (Cut(2, 8), 1, 2),
        ("front", 16, 4096): (Cut(1, 4, 8), 1),
        ("up", 4, 3712): (Cut(2, 6, 8, in_flight=2), 1),
        ("up", 4, 5376): (Cut(1, 3, 8), 2),
        ("up", 8, 5376): (Cut(2, 6), 1),
        ("up", 16, 5376): (Cut(1, 3, 8), 1),
        ("down", 4, 1856): (Cut(4, 8), 1),
        ("down", 4, 2688): (Cut(4, 8), 1),
        ("head", 4, 2688): (Cut(2, 6, in_flight=2), 2),
        ("head", 16, 2688): (Cut(2, 8, in_flight=4, paced=True), 1),
        ("head", 16, 4096): (Cut(2, 6, 8), 1),
    }
}
"""Of a chip's major number, by `key`: the fastest cut, and the eights of rows of the jobs of its first parts.

H200, 2026-11-30, chains of layers: one launch's cut after another, once, as tests/gpu_cuda_tune.py does it. Nano
and Lightning share ("up", 4, 3712) and attention's, for which they found the same but for groups and in_flight:
Lightning's stand. Those of few layers of Super were not tuned but taken from their neighbours: "up" of 4 and of 16
bits, "add" of 8 bits and 1,024 columns.
"""


@cache
def fitted(plan: Plan, major: int) -> tuple[Plan, Cut]:
    """A launch as a chip takes it best: as measured, or else by a rule.

    Where two launches have room beside each other, the next one's weights are on their way before it is its turn.
    """
    room = shared_room(major)
    found = MEASURED.get(major, {}).get(key(plan))
    if found:
        measured, *tall = found
        parts = (replace(part, eights=eights) for part, eights in zip(plan.parts, tall, strict=False))
        other = replace(plan, parts=(*parts, *plan.parts[len(tall) :]))
        if other.shared(measured) <= room:
            return other, measured
    # On Hopper a launch may take most of a multiprocessor (measured); on SM12x, which no card has shown, half, and
    # leave the next one room.
    most = room - 23 * RESERVED if major == 9 else (room + RESERVED) // 2 - RESERVED
    for limit, groups, stages in (
        (most, 2, 6),
        (most, 2, 4),
        (most, 2, 2),
        (most, 1, 2),
        (room, 2, 2),
        (room, 1, 1),
    ):
        if plan.shared(Cut(groups, stages)) <= limit:
            return plan, Cut(groups, stages)
    raise ValueError(f"no cut of {plan} fits {room} bytes of shared memory")
