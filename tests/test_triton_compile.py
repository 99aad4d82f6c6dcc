"""The decode and prefill kernels compile for every chip at released shapes, and fit it.

A part of what `nanoserve doctor --compile` compiles: it has every shape, chip and number of tokens.
"""

import pytest
from compiling import compiled

KERNELS = {
    "append_kernel", "begin_kernel", "combine_kernel", "mamba_kernel", "narrow_kernel", "note_kernel",
    "pick_kernel", "score_kernel", "split_kernel", "weigh_kernel",
}  # fmt: skip

PREFILL_KERNELS = {
    "choices_kernel", "chunk_kernel", "conv_kernel", "flash_kernel", "gated_norm_kernel", "grouped_kernel",
    "output_kernel", "pass_kernel",
}  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "shape", "tokens"),
    [("sm_90", "super", 1), ("sm_120", "nano", 1), ("sm_120a", "super", 8), ("sm_121a", "nano", 1)],
)
def test_kernels_fit_the_chip(architecture: str, shape: str, tokens: int) -> None:
    rows = compiled(architecture, "decode", shape, tokens)
    assert {row.kernel for row in rows} == KERNELS
    assert not any(row.spilled for row in rows)


@pytest.mark.parametrize(("architecture", "shape"), [("sm_90", "nano"), ("sm_120a", "super"), ("sm_121a", "nano")])
def test_prefill_kernels_fit_the_chip(architecture: str, shape: str) -> None:
    rows = compiled(architecture, "prefill", shape)
    dense = {"gemm_kernel"} if architecture == "sm_90" else set[str]()
    assert {row.kernel for row in rows} == PREFILL_KERNELS | dense
