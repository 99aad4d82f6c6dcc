"""Host side of cuda/products.cu: which matrices a launch reads, and over which vectors. One token at a time."""

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from nanoserve.kernels import nvrtc
from nanoserve.kernels.linear import Fp8, Nvfp4, Plain, Weight

BITS = {torch.bfloat16: 16, torch.float32: 32}
POINTERS = ("norm", "stream", "addend", "logits", "bias", "ids", "chosen", "ticket")
"""Of an argument, in products.cu's order."""

To = Literal["BF16", "SQUARED", "STREAM", "FLOAT"]
Chosen = Literal["here", "in front", "before"]


@dataclass(frozen=True, slots=True)
class Part:
    """A matrix of a launch, or a stack of experts.

    Attributes:
        bits: of a weight: 4, 8, 16, 32.
        rows, columns: of a matrix.
        vector: which of the launch's vectors it reads.
        to: what becomes of a result: rounded; relu² of the rounded; added to the stream; float32.
        copies: chosen experts; 0 for a matrix.
        summed: their results are weighted and added up; each has a vector of its own, which lies ready in input 0.
        eights: of rows that are one job: 1, 2 or 4.
        ready: bits of the weights that will meet the result, in whose order it is left; 0 leaves it as it is.
    """

    bits: int
    rows: int
    columns: int
    vector: int = 0
    to: To = "BF16"
    copies: int = 0
    summed: bool = False
    eights: int = 1
    ready: int = 0


@dataclass(frozen=True, slots=True)
class Vector:
    """A vector of a launch, as the weights of ``bits`` want it.

    Attributes:
        bits, columns: as of the parts that read it.
        source: which input it is.
        normed: it is the norm of input 0.
        ready: it lies in the weights' order already.
        none: there is none: a summed part's vectors come with its rows.
    """

    bits: int
    columns: int
    source: int = 0
    normed: bool = False
    ready: bool = False
    none: bool = False


@dataclass(frozen=True, slots=True)
class Router:
    """Where experts are chosen: here, by the first part's results; in the launch in front; or in one before it."""

    experts: int
    top_k: int
    normalize: bool
    chosen: Chosen


@dataclass(frozen=True, slots=True)
class Cut:
    """How a launch is cut: groups of warps that take turns, stages of a block's ring; a block a multiprocessor.

    Attributes:
        groups, stages, warps: groups of so many warps, which share a stage; stages of the ring.
        longest: bytes of a row that are copied at once, but for codes.
        in_flight: stages that are on their way at once while the ring is filled; 0: all.
        paced: later, too.
    """

    groups: int = 2
    stages: int = 4
    warps: int = 4
    longest: int = 4096
    in_flight: int = 0
    paced: bool = False

    @property
    def threads(self) -> int:
        """Of a block: its groups, and the warps that copy and write."""
        return (self.groups * self.warps + 2) * 32


@dataclass(frozen=True, slots=True)
class Plan:
    """A launch's shape: all that is compiled into it."""

    parts: tuple[Part, ...]
    vectors: tuple[Vector, ...]
    router: Router | None = None

    def defines(self, cut: Cut) -> dict[str, str]:
        """What products.cu is given."""

        def of(values: "list[int] | list[str] | list[bool]") -> str:
            return ",".join(str(int(value)) if isinstance(value, bool) else str(value) for value in values)

        p, v, r = self.parts, self.vectors, self.router
        return {
            "GROUPS": str(cut.groups),
            "GROUP": str(cut.warps),
            "STAGES": str(cut.stages),
            "LONGEST": str(cut.longest),
            "IN_FLIGHT": str(cut.in_flight),
            "PACED": str(int(cut.paced)),
            "PARTS": str(len(p)),
            "EIGHTS_OF": of([x.eights for x in p]),
            "BITS_OF": of([x.bits for x in p]),
            "ROWS_OF": of([x.rows for x in p]),
            "COLUMNS_OF": of([x.columns for x in p]),
            "COPIES_OF": of([max(x.copies, 1) for x in p]),
            "SUMMED_OF": of([x.summed for x in p]),
            "CHOSEN_OF": of([x.copies > 0 for x in p]),
            "VECTOR_OF": of([x.vector for x in p]),
            "TO_OF": of([f"TO_{x.to}" for x in p]),
            "FOR_OF": of([x.ready for x in p]),
            "VECTORS": str(len(v)),
            "V_BITS_OF": of([x.bits for x in v]),
            "V_COLUMNS_OF": of([x.columns for x in v]),
            "V_NONE_OF": of([x.none for x in v]),
            "V_SOURCE_OF": of([x.source for x in v]),
            "V_NORMED_OF": of([x.normed for x in v]),
            "V_READY_OF": of([x.ready for x in v]),
            "EXPERTS": str(r.experts if r else 1),
            "TOP": str(r.top_k if r else 1),
            "NORMALIZE": str(int(r.normalize if r else False)),
            "CHOOSE": str(0 if r is None else {"here": 1, "in front": 2, "before": 3}[r.chosen]),
        }

    def shared(self, cut: Cut) -> int:
        """Bytes of shared memory of a block, as products.cu lays it out."""
        vectors = sum(_up_to(x.columns, 1024 // x.bits) * 2 for x in self.vectors if not x.none)
        results = cut.stages * cut.groups * cut.warps * max(x.eights for x in self.parts) * 32
        ring = _up_to(_up_to(768 + results, 128) + 256 + vectors, 128)
        return ring + cut.stages * max(_stage_bytes(part, cut.longest) for part in self.parts)

    @property
    def jobs(self) -> int:
        """Of all parts."""
        return sum(_jobs(part) for part in self.parts)

    def own(self, blocks: int) -> int:
        """Of so many blocks, how many take the router's jobs alone, so that it is soon done; 0: all share."""
        return _own(self, blocks)


@cache
def _own(plan: Plan, blocks: int) -> int:
    if plan.router is None or plan.router.chosen != "here" or blocks < 2 or len(plan.parts) < 2:
        return 0
    gate, others, rest = plan.parts[0], plan.parts[1:], plan.jobs - _jobs(plan.parts[0])
    cost = sum(_jobs(part) * _job_bytes(part) for part in others) / rest

    def loads(own: int) -> tuple[float, float]:
        router = -(-_jobs(gate) // own) * _job_bytes(gate)
        return max(router, -(-rest // (blocks - own)) * cost), router

    return min(range(1, min(_jobs(gate), blocks - 1) + 1), key=loads)


def _jobs(part: Part) -> int:
    return -(-part.rows // (8 * part.eights)) * (1 if part.summed else max(part.copies, 1))


def _job_bytes(part: Part) -> int:
    return part.eights * part.columns * part.bits


def _up_to(value: int, whole: int) -> int:
    return -(-value // whole) * whole


def _stage_bytes(part: Part, longest: int) -> int:
    row = part.columns * part.bits // 8
    pieces = 1 if part.bits == 4 else -(-row // longest)
    if pieces > 1 and row % 128:
        raise ValueError(f"a row of {row} bytes is not whole steps, and no pieces can be made of it")
    while pieces > 1 and row % (pieces * 128):
        pieces += 1
    piece = row // pieces
    pitch = piece if pieces == 1 else _up_to(piece, 128) + 64
    scales = part.columns // 16 if part.bits == 4 else 0
    vector = _up_to(part.columns * 2, 128) if part.summed else 0
    beyond = 128 if part.bits == 4 or piece % 128 else 0  # what a last step may read
    return _up_to(8 * part.eights * (pitch + scales) + beyond, 128) + vector


class _Part(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("weights", "scales", "factors", "out")]


class _Arguments(ctypes.Structure):
    _fields_ = [
        ("parts", _Part * 3),
        ("inputs", ctypes.c_void_p * 2),
        *((name, ctypes.c_void_p) for name in POINTERS),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
    ]


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a launch reads and writes beside its weights and their results.

    Attributes:
        vectors: BF16 inputs, at most two.
        norm, eps: of input 0, where a vector is normed.
        stream: what results are added to.
        addend: added to a result before that.
        logits, bias, scale: of the choice, where it is made here.
        ids, chosen: the chosen experts, int32, and their weights, float32.
        ticket: int32, zero before and after a launch that chooses.
    """

    vectors: tuple[Tensor, ...]
    norm: Tensor | None = None
    eps: float = 0.0
    stream: Tensor | None = None
    addend: Tensor | None = None
    logits: Tensor | None = None
    bias: Tensor | None = None
    ids: Tensor | None = None
    chosen: Tensor | None = None
    ticket: Tensor | None = None
    scale: float = 0.0


def bits_of(weight: Weight) -> int:
    """Of a weight as it is stored."""
    match weight:
        case Nvfp4():
            return 4
        case Fp8():
            return 8
        case Plain(data):
            return BITS[data.dtype]


def _pointers(weight: Weight, out: Tensor) -> tuple[int, int, int, int]:
    match weight:
        case Nvfp4(data, scales, factor):
            return data.data_ptr(), scales.data_ptr(), factor.data_ptr(), out.data_ptr()
        case Fp8(data, scale):
            return data.data_ptr(), 0, scale.data_ptr(), out.data_ptr()
        case Plain(data):
            return data.data_ptr(), 0, 0, out.data_ptr()


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def defines(plan: Plan, cut: Cut, device: torch.device) -> dict[str, str]:
    """What products.cu is given on a device."""
    return {**plan.defines(cut), "OWN": str(plan.own(_blocks(plan, device)))}


def _blocks(plan: Plan, device: torch.device) -> int:
    return min(plan.jobs, _multiprocessors(device))


def run(plan: Plan, weights: tuple[Weight, ...], outs: tuple[Tensor, ...], inputs: Inputs, cut: Cut) -> None:
    """Launch a plan: ``outs`` are set to the parts' results."""
    device = outs[0].device
    kernel = nvrtc.load("products.cu", defines(plan, cut, device), cut.threads, plan.shared(cut), device)
    arguments = _Arguments(eps=inputs.eps, scale=inputs.scale)
    for i, (weight, out) in enumerate(zip(weights, outs, strict=True)):
        arguments.parts[i] = _Part(*_pointers(weight, out))
    for i, vector in enumerate(inputs.vectors):
        arguments.inputs[i] = vector.data_ptr()
    for name in POINTERS:
        tensor: Tensor | None = getattr(inputs, name)
        setattr(arguments, name, tensor.data_ptr() if tensor is not None else None)
    kernel.launch(_blocks(plan, device), arguments, device)
