"""The decode and prefill kernels compile for every chip at released shapes, and fit it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed: its kernels are not compiled here")

import aot

KERNELS = {
    "append_kernel", "begin_kernel", "combine_kernel", "mamba_kernel", "narrow_kernel", "note_kernel",
    "pick_kernel", "score_kernel", "split_kernel", "weigh_kernel",
}  # fmt: skip

PREFILL_KERNELS = {
    "choices_kernel", "chunk_kernel", "conv_kernel", "flash_kernel", "gated_norm_kernel", "grouped_kernel",
    "output_kernel", "pass_kernel",
}  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "tokens"), [("sm_90", "1"), ("sm_120", "1"), ("sm_120", "8"), ("sm_121", "1")]
)
def test_kernels_fit_the_chip(architecture: str, tokens: str) -> None:
    rows = compiled("compile_decode.py", architecture, tokens)
    assert {row["name"] for row in rows} == KERNELS
    assert not [row for row in rows if row["spilled"] or row["shared"] > aot.SHARED_LIMIT[architecture]]


@pytest.mark.parametrize("architecture", ["sm_90", "sm_120"])
def test_prefill_kernels_fit_the_chip(architecture: str) -> None:
    rows = compiled("compile_prefill.py", architecture)
    assert {row["name"] for row in rows} == PREFILL_KERNELS
    assert not [row for row in rows if row["shared"] > aot.SHARED_LIMIT[architecture]]
    # Hopper's tiles are those that were the fastest there, some of which keep a little on the stack.
    assert architecture == "sm_90" or not [row for row in rows if row["spilled"]]


def compiled(program: str, *arguments: str) -> list[dict[str, Any]]:
    command = [sys.executable, Path(__file__).parent / program, *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert not done.returncode, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]
