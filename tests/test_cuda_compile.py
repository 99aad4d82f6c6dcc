"""The kernels of CUDA C++ compile for every chip as released models launch them, fit it, and have no stack."""

import os
from functools import partial
from pathlib import Path

import gpu_cuda
import pytest

from nanoserve.config import ShapeName
from nanoserve.cuda_launches import Launch, launches
from nanoserve.kernels import nvrtc
from nanoserve.kernels.chips import capability, shared_limit
from nanoserve.kernels.cubin import RESERVED, Resources, resources

pytestmark = pytest.mark.skipif(
    nvrtc.missing() is not None and os.environ.get("CI") != "true",
    reason="NVRTC or cuda-bindings is not installed: CUDA C++ is not compiled here",
)

CHIPS = ("sm_90", "sm_120", "sm_121")
REGISTERS = 65536
"""Of a multiprocessor."""


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Compiled anew."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def faults(launch: Launch, kernel: Resources, architecture: str) -> list[str]:
    """What the chip does not take, or keeps on a stack."""
    shared = kernel.shared - RESERVED + launch.shared
    found = [f"{kernel.stack} bytes of stack"] if kernel.stack else []
    if shared > shared_limit(architecture):
        found.append(f"{shared} bytes of shared memory")
    if -(-kernel.registers // 8) * 8 * launch.threads > REGISTERS:
        found.append(f"{kernel.registers} registers for {launch.threads} threads")
    return [f"{fault}: {launch}" for fault in found]


@pytest.mark.parametrize("architecture", CHIPS)
@pytest.mark.parametrize("shape", ["nano", "lightning", "super"])
def test_launches_fit_the_chip(shape: ShapeName, architecture: str) -> None:
    """In every layer's own formats."""
    chip, found, ops = capability(architecture), list[str](), set[str]()
    for op, launch in launches(shape, chip):
        ops.add(op)
        (kernel,) = resources(nvrtc.compiled(launch.name, chip, dict(launch.defines)))
        found += faults(launch, kernel, architecture)
    assert ops == {"norm_linears", "mamba_decode", "attention_decode", "linear_add", "moe_add", "head"}
    assert not found, "\n".join(found)


def test_the_trace_knows_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its marks stand where it looks for them, and what it makes compiles: it is run by hand, on a card."""
    monkeypatch.setattr(nvrtc, "source", partial(gpu_cuda.marked, nvrtc.source))
    launched: set[str] = set()
    for op, launch in launches("lightning", (9, 0)):
        if op in ("mamba_decode", "moe_add"):
            nvrtc.compiled(launch.name, (9, 0), dict(launch.defines))
            launched.add(launch.name)
    assert launched == set(gpu_cuda.MARKS)


def test_formats_are_those_of_the_releases() -> None:
    """As nanoserve/shapes lists them: of Super's shared experts one is in NVFP4, and some are in BF16."""
    seen = {
        (dict(launch.defines)["BITS_OF"], dict(launch.defines)["CHOOSE"])
        for op, launch in launches("super", (9, 0))
        if op == "moe_add"
    }
    assert {bits for bits, choose in seen if choose == "2"} == {"4,4", "8,4", "16,4"}
    assert {bits for bits, _ in seen} >= {"16,8,8", "16,8,16", "16,16,16"}
