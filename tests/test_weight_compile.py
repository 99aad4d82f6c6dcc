"""The weight-reading kernels compile for every chip at released shapes, fit it, and fetch before they wait.

A part of what `nanoserve doctor --compile` compiles: it has every shape, chip and number of tokens.
"""

import pytest
from compiling import compiled

FETCHING = {"linears_kernel", "linear_add_kernel", "front_kernel", "gate_kernel"}
OTHERS = {"up_kernel", "down_kernel", "choose_kernel", "norm_kernel", "gemm_kernel"}


@pytest.mark.parametrize(
    ("architecture", "shape", "tokens"),
    [("sm_90", "nano", 1), ("sm_120a", "super", 8), ("sm_121a", "lightning", 1)],
)
def test_kernels_fit_the_chip(architecture: str, shape: str, tokens: int) -> None:
    rows = compiled(architecture, "weights", shape, tokens)
    assert {row.kernel for row in rows} == FETCHING | OTHERS
    # On sm_90 the assembler may leave a few bytes of addresses on the stack, outside of the loops.
    assert all(row.spilled <= 32 for row in rows)
    assert all(row.checks["fetches_before_it_waits"] for row in rows if row.kernel in FETCHING)
