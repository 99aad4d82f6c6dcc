"""Where a model runs, as data, and why a backend cannot run there: predicates ask nothing else."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

SM12X = ((12, 0), (12, 1))
"""Compute capabilities of RTX 50 and RTX PRO cards, and of DGX Spark."""


class Code(enum.Enum):
    """Why a backend is not taken; the values are stable, for machines."""

    DEVICE = "device"
    CHIP = "chip"
    DTYPE = "dtype"
    QUANTISATION = "quantisation"
    ACTIVATION = "activation"
    SHAPE = "shape"
    MISSING = "missing_package"
    BROKEN = "broken_package"
    VERSION = "package_version"
    TOOLKIT = "toolkit"
    NOT_BUILT = "not_built"
    """Able, once its CUDA module is built: by name, which builds it."""
    BY_NAME = "by_name"
    """Able, but never taken automatically: by name, or by calibration."""


@dataclass(frozen=True, slots=True)
class Reason:
    """A code and a sentence for people."""

    code: Code
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Package:
    """A package, or a part of one: installed where it has a version, usable where it also has no error.

    Attributes:
        version: numbers of the release; empty where it is not installed.
        error: what importing it says; empty where it can be imported.
    """

    version: tuple[int, ...] = ()
    error: str = ""


@dataclass(frozen=True, slots=True)
class Experts:
    """A model's routed experts, as far as backends depend on them.

    Attributes:
        format: of their weights: "bf16", "fp8" or "nvfp4"; "mixed" where layers differ.
        input_scales: the checkpoint says how to quantise what they read (NVFP4 with 4-bit activations).
        activation: between their two weights, by its name in ``config.json``.
        count, top_k: experts in all, and of a token.
        width: columns of their first weight and rows of the second.
        size: rows of the first and columns of the second.
        layers: that have such experts.
    """

    format: str
    input_scales: bool
    activation: str
    count: int
    top_k: int
    width: int
    size: int
    layers: int


@dataclass(frozen=True, slots=True)
class Place:
    """What a backend's ability depends on.

    Attributes:
        device: type of the device, "cpu" or "cuda".
        chip: compute capability of a GPU.
        dtype: of the activations.
        packages: part → what is installed of it; "triton", and "flashinfer.…" by the backends' names, which only a
            chip that could use them is asked for.
        toolkit: version of CUDA as FlashInfer sees it: nvcc's, or else torch's; empty where there is neither.
        compiler: nvcc is there, to build CUDA modules with.
        built: names of FlashInfer's CUDA modules that need no building.
        experts: None where the model has none, or nothing is known of it.
    """

    device: str
    chip: tuple[int, int] | None
    dtype: torch.dtype
    packages: Mapping[str, Package] = field(default_factory=dict[str, Package])
    toolkit: tuple[int, ...] = ()
    compiler: bool = False
    built: frozenset[str] = frozenset()
    experts: Experts | None = None

    def package(self, part: str) -> Package:
        """What is installed of a part."""
        return self.packages.get(part, Package())
