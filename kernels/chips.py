"""The chips that kernels are compiled for: names, compute capabilities, and what a block may take on each."""

from nanoserve.errors import ConfigError

ARCHITECTURES = ("sm_90", "sm_120", "sm_120a", "sm_121", "sm_121a")
"""Names that can be asked for. The letter opens instructions of that chip alone, E2M1 conversion among them."""

MULTIPROCESSORS = {(9, 0): 132, (12, 0): 188, (12, 1): 48}
"""Of H200, RTX PRO 6000 and DGX Spark: launches that fill a chip depend on it."""

_SHARED = {9: 232_448, 12: 101_376}
"""Compute capability's major number → bytes of shared memory that a block may have."""


def capability(architecture: str) -> tuple[int, int]:
    """Compute capability of a chip, sm_120a → (12, 0).

    Raises:
        ConfigError: no such chip here.
    """
    if architecture not in ARCHITECTURES:
        raise ConfigError(f"chip {architecture!r} is not known here; known are {', '.join(ARCHITECTURES)}")
    digits = architecture.removeprefix("sm_").rstrip("a")
    return int(digits[:-1]), int(digits[-1])


def shared_limit(architecture: str) -> int:
    """Bytes of shared memory that a block may have."""
    return shared_room(capability(architecture)[0])


def shared_room(major: int) -> int:
    """As `shared_limit`, by the major number of the chip's capability."""
    return _SHARED[major]


def may_spill(architecture: str) -> bool:
    """Whether spills are let pass: on Hopper the fastest tiles keep a little on the stack; on SM12x none may."""
    return capability(architecture)[0] == 9
