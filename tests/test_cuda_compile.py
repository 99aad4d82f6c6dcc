"""The kernels of CUDA C++ compile for every chip at released shapes, fit it, and keep nothing on the stack."""

import ctypes
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed: CUDA C++ is not compiled here")

from cuda.pathfinder import DynamicLibNotFoundError, load_nvidia_dynamic_lib

try:
    load_nvidia_dynamic_lib("nvrtc")
except DynamicLibNotFoundError:
    pytest.skip("nvidia-cuda-nvrtc is not installed: CUDA C++ is not compiled here", allow_module_level=True)

from nanoserve.kernels import cuda_mamba, nvrtc
from nanoserve.kernels.chips import capability, shared_limit
from nanoserve.kernels.cubin import resources
from nanoserve.kernels.cuda_products import Cut, Part, Plan, Router, Vector
from nanoserve.kernels.mamba import MambaWeights, state_of
from nanoserve.kernels.ssm import SsmWeights
from nanoserve.kernels.weight_launches import SHAPES, Shape

CHIPS = ("sm_90", "sm_120", "sm_121")
STATIC = 1024
"""Bytes of shared memory that the machine itself takes of each block; a block's limit is without them."""

NO_ROOM = {(22, "down", 12)}
"""Chosen experts, launch and major number: 22 vectors of 2688 alone are 121 KiB, which no block of SM12x has."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A launch of products.cu, as it is compiled."""

    name: str
    plan: Plan
    cut: Cut


def plans(shape: Shape) -> dict[str, Plan]:
    """The launches of a released model's layers for one token."""
    s, latent = shape, shape.latent or shape.hidden
    gate = 8 * s.gate.itemsize
    router = Router(s.experts, s.top_k, True, True)
    before = Router(s.experts, s.top_k, True, False)
    norm = Vector(s.shared_bits, s.hidden, normed=True)
    front = [Part(gate, s.experts, s.hidden, 1, "FLOAT"), Part(s.shared_bits, s.shared, s.hidden, 0, "SQUARED")]
    vectors = [norm, Vector(gate, s.hidden, normed=True)]
    if s.latent:
        front.append(Part(16, s.latent, s.hidden, 1 if gate == 16 else 2))
        vectors += [] if gate == 16 else [Vector(16, s.hidden, normed=True)]
    shared_down = Part(s.shared_bits, s.hidden, s.shared, 1)
    up = Part(4, s.size, latent, 0, "SQUARED", s.top_k)
    down = Part(4, latent, s.size, 0, "BF16" if s.latent else "STREAM", s.top_k, True)
    made = {
        "in": Plan((Part(s.mamba_bits, s.projected, s.hidden),), (Vector(s.mamba_bits, s.hidden, normed=True),)),
        "out": Plan((Part(s.mamba_bits, s.hidden, s.inner, to="STREAM"),), (Vector(s.mamba_bits, s.inner),)),
        "qkv": Plan(
            (Part(16, s.heads, s.hidden), Part(16, s.kv, s.hidden), Part(16, s.kv, s.hidden)),
            (Vector(16, s.hidden, normed=True),),
        ),
        "o": Plan((Part(16, s.hidden, s.heads, to="STREAM"),), (Vector(16, s.heads),)),
        "front": Plan(tuple(front), tuple(vectors)),
        "up": Plan(
            (shared_down, up), (Vector(4, latent, normed=not s.latent), Vector(s.shared_bits, s.shared, 1)), router
        ),
        "down": Plan((down,), (Vector(4, s.size, copies=s.top_k),), before),
        "head": Plan(
            (Part(s.head_bits, s.vocab, s.hidden, to="FLOAT"),), (Vector(s.head_bits, s.hidden, normed=True),)
        ),
    }
    if s.latent:
        made["latent_out"] = Plan((Part(16, s.hidden, s.latent, to="STREAM"),), (Vector(16, s.latent),))
    return made


def variants(shape: Shape, architecture: str) -> Iterator[Variant]:
    """Each launch as it is cut for a chip: so that two share a multiprocessor, if they can."""
    whole = shared_limit(architecture)
    for name, plan in plans(shape).items():
        fitting = [
            Cut(groups, stages)
            for cuts in (((2, 6), (2, 4), (2, 2)), ((1, 2), (1, 1)))
            for most in ((whole + STATIC) // 2 - STATIC, whole)
            for groups, stages in cuts
            if plan.shared(Cut(groups, stages)) <= most
        ]
        if fitting:
            yield Variant(name, plan, fitting[0])
        else:
            assert (shape.top_k, name, capability(architecture)[0]) in NO_ROOM, name


class Unloaded:
    """A kernel that is not run."""

    def launch(self, blocks: int, arguments: ctypes.Structure, device: torch.device) -> None:
        """Nothing."""


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Compiled anew."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.parametrize("architecture", CHIPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_fit_the_chip(shape: str, architecture: str) -> None:
    for variant in variants(SHAPES[shape], architecture):
        shared = variant.plan.shared(variant.cut)
        code = nvrtc.compiled("products.cu", capability(architecture), variant.plan.defines(variant.cut))
        (kernel,) = resources(code)
        assert kernel.stack == 0, (variant.name, kernel)
        assert kernel.shared <= STATIC, (variant.name, kernel)  # the rest is dynamic
        assert shared <= shared_limit(architecture), (variant.name, shared)
        assert kernel.registers * variant.cut.threads <= 65536, (variant.name, kernel)


@pytest.mark.parametrize("architecture", CHIPS)
@pytest.mark.parametrize(("heads", "groups"), [(64, 8), (128, 8)])
def test_mamba_fits_the_chip(monkeypatch: pytest.MonkeyPatch, heads: int, groups: int, architecture: str) -> None:
    """The released models' heads, of 64 rows each, as the host side asks for them."""
    asked: list[tuple[str, Mapping[str, str], int, int]] = []

    def load(name: str, defines: Mapping[str, str], threads: int, shared: int, device: torch.device) -> Unloaded:
        asked.append((name, defines, threads, shared))
        return Unloaded()

    monkeypatch.setattr(nvrtc, "load", load)
    inner, states = heads * 64, cuda_mamba.STATES
    channels, of_heads = inner + 2 * groups * states, torch.zeros(heads)
    ssm = SsmWeights(of_heads, of_heads, of_heads)
    weights = MambaWeights(torch.zeros(channels, 4), torch.zeros(channels), ssm, torch.zeros(inner), 1e-5)
    state = state_of(torch.zeros(channels, 3).bfloat16(), torch.zeros(heads, 64, states), groups)
    cuda_mamba.mamba_decode(torch.zeros(1, inner + channels + heads).bfloat16(), weights, state)
    ((name, defines, threads, shared),) = asked
    (kernel,) = resources(nvrtc.compiled(name, capability(architecture), defines))
    assert kernel.stack == 0, kernel
    assert kernel.shared - STATIC + shared <= shared_limit(architecture)
    assert kernel.registers * threads <= 65536, kernel
