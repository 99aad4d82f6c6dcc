"""The decode kernels compile for every chip at released shapes, and fit it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: its kernels are not compiled here")

import aot

KERNELS = {
    "append_kernel", "begin_kernel", "combine_kernel", "mamba_kernel", "narrow_kernel", "note_kernel",
    "pick_kernel", "score_kernel", "split_kernel", "weigh_kernel",
}  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "tokens"), [("sm_90", "1"), ("sm_120", "1"), ("sm_120", "8"), ("sm_121", "1")]
)
def test_kernels_fit_the_chip(architecture: str, tokens: str) -> None:
    command = [sys.executable, Path(__file__).parent / "compile_decode.py", architecture, tokens]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert not done.returncode, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["name"] for row in rows} == KERNELS
    assert not [row for row in rows if row["spilled"] or row["shared"] > aot.SHARED_LIMIT[architecture]]
