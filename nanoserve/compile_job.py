"""One job of ``nanoserve doctor --compile``, in a process of its own: kernels of one chip, family and shape.

    python -m nanoserve.compile_job '{"architecture": "sm_90", "family": "decode", "shape": "nano", "tokens": [1]}'

Prints a JSON line a kernel, as `Row`. A process of its own, for Triton's interpreter and its compiler do not go
together in one, the CuTe DSL is for one chip a process, and a compiler that crashes takes nothing else with it.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast
from unittest.mock import patch

from nanoserve.cached import Cached, cache_folder
from nanoserve.config import ShapeName
from nanoserve.errors import NanoserveError
from nanoserve.kernels.chips import capability

Family = Literal["decode", "weights", "prefill", "cuda", "experts"]


@dataclass(frozen=True, slots=True)
class Job:
    """What one process compiles.

    Attributes:
        architecture: the chip, such as sm_120a.
        family: decode and weights are the two halves of a decode step in Triton, and prefill is the rest; cuda is
            a step of one token in CUDA C++; experts are FlashInfer's CuTe-DSL kernels.
        shape: a released shape.
        tokens: of a decode step, each number a case.
    """

    architecture: str
    family: Family
    shape: str
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One compiled kernel, as one launch needs it.

    Attributes:
        architecture, shape, tokens: what it was compiled for; tokens is 0 where their number does not matter.
        origin: nanoserve or flashinfer.
        op: the op that launches it.
        kernel: its name.
        registers: a thread.
        spilled: bytes of spill stores and loads; of CUDA C++ and FlashInfer's CuTe DSL, the stack of a thread.
        shared: bytes of shared memory a block, static and dynamic.
        checks: further findings, by name.
    """

    architecture: str
    origin: str
    op: str
    kernel: str
    shape: str
    tokens: int
    registers: int
    spilled: int
    shared: int
    checks: dict[str, bool]


def main(text: str) -> None:
    """Run a job given as JSON."""
    fields: dict[str, Any] = json.loads(text)
    job = Job(fields["architecture"], fields["family"], fields["shape"], tuple(fields["tokens"]))
    for row in rows(job):
        print(json.dumps(asdict(row)), flush=True)


def rows(job: Job) -> Iterator[Row]:
    """Compile everything of a job; a launch that has come before in it is told again, and not compiled."""
    cached = Cached(cache_folder() / "compiled")
    if job.family == "experts":
        yield from _experts(job, cached)
        return
    if job.family == "cuda":
        yield from _cuda(job)
        return
    for op, tokens, call in _calls(job):
        for found in _compiled(call, job.architecture, cached):
            yield Row(job.architecture, "nanoserve", op, found.pop("name"), job.shape, tokens, **found)


Call = Callable[[], object]


def _calls(job: Job) -> Iterator[tuple[str, int, Call]]:
    """(op, tokens, call it) of all launches of a family of ours."""
    from nanoserve.kernels import decode_launches, prefill_launches, weight_launches
    from nanoserve.kernels.weight_tiles import Tile, tiles_for

    chip = capability(job.architecture)
    if job.family == "prefill":
        yield from ((op, 0, call) for op, call in prefill_launches.launches(job.shape, chip))
        return
    own = tiles_for(chip)

    def cut(*arguments: Any, **options: Any) -> Tile:
        # Early launches, for what they add must fit the chip too.
        return replace(own(*arguments, **options), early=1)

    for tokens in job.tokens:
        if job.family == "decode":
            yield from ((op, tokens, call) for op, call in decode_launches.launches(job.shape, tokens, chip))
            continue
        shape = weight_launches.SHAPES[job.shape]
        yield from ((op, tokens, call) for op, call in weight_launches.launches(shape, tokens, cut))


def _compiled(call: Call, architecture: str, cached: Cached) -> Iterator[dict[str, Any]]:
    """Name, resources and checks of every kernel that a call launches."""
    from nanoserve.kernels import tiles
    from nanoserve.kernels.aot import recorded

    early = {"early": 1}
    with recorded() as launches, patch.object(tiles.dependent, "__kwdefaults__", early):
        call()
    for launch in launches:
        yield cached.get(launch.key(architecture), lambda launch=launch: _facts(launch.compiled(architecture)))


def _facts(compiled: Any) -> dict[str, Any]:
    """As JSON keeps it; the assembly is asked once and dropped."""
    wait, fetch = (compiled.ptx.find(word) for word in ("griddepcontrol.wait", "cp.async.bulk.prefetch"))
    checks = {} if fetch < 0 else {"fetches_before_it_waits": fetch < wait}
    kept = {name: getattr(compiled, name) for name in ("name", "registers", "spilled", "shared")}
    return {**kept, "checks": checks}


def _cuda(job: Job) -> Iterator[Row]:
    """The kernels of CUDA C++, which NVRTC keeps compiled itself, for one token."""
    from nanoserve.cuda_launches import launches
    from nanoserve.kernels import nvrtc
    from nanoserve.kernels.cubin import RESERVED, resources

    chip = capability(job.architecture)
    for op, launch in launches(cast("ShapeName", job.shape), chip):
        for own in resources(nvrtc.compiled(launch.name, chip, dict(launch.defines))):
            shared = own.shared - RESERVED + launch.shared
            yield Row(
                job.architecture, "nanoserve", op, own.name, job.shape, 1, own.registers, own.stack, shared, {}
            )


def _experts(job: Job, cached: Cached) -> Iterator[Row]:
    """FlashInfer's kernels for the routed experts of a shape, and the Triton kernels that they launch first."""
    from nanoserve.kernels import flashinfer_compile
    from nanoserve.kernels.weight_launches import SHAPES

    with tempfile.TemporaryDirectory() as folder:
        flashinfer_compile.for_chip(job.architecture, Path(folder))
        cases = [(kind, tokens) for tokens in job.tokens for kind in flashinfer_compile.KINDS]
        for kind, tokens in cases:
            if kind == "b12x dynamic" and tokens != max(job.tokens):
                continue
            key = flashinfer_compile.key(kind, SHAPES[job.shape], tokens, job.architecture)
            for found in cached.get(key, lambda kind=kind, tokens=tokens: _program(job, kind, tokens)):
                yield Row(job.architecture, "flashinfer", kind, found.pop("name"), job.shape, tokens, **found)


def _program(job: Job, kind: str, tokens: int) -> list[dict[str, Any]]:
    from nanoserve.kernels import flashinfer_compile
    from nanoserve.kernels.weight_launches import SHAPES

    program = flashinfer_compile.compiled(kind, SHAPES[job.shape], tokens, job.architecture)
    out = [_facts(launch.compiled(job.architecture)) for launch in program.triton]
    for index, own in enumerate(program.kernels):
        name = program.name + (f" ({index + 1} of {len(program.kernels)})" if len(program.kernels) > 1 else "")
        needs = {"name": name, "registers": own.registers, "spilled": own.stack, "shared": own.shared}
        out.append({**needs, "checks": {"e2m1_in_hardware": program.e2m1}})
    return out


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except NanoserveError as error:
        sys.exit(str(error))
