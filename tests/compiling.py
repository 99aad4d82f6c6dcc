"""Runs a job of `nanoserve doctor --compile`, in a process of its own as the command does."""

from dataclasses import asdict

import pytest

pytest.importorskip("triton", reason="triton is not installed: its kernels are not compiled here")

from nanoserve.compile_job import Family, Job, Row
from nanoserve.doctor_compile import fits, run_job


def compiled(architecture: str, family: Family, shape: str, *tokens: int) -> list[Row]:
    """The rows of a job that must not fail, all of which must fit the chip."""
    rows, fault = run_job(Job(architecture, family, shape, tokens))
    assert fault is None, fault
    assert rows
    assert not [asdict(row) for row in rows if not fits(row)]
    return rows
