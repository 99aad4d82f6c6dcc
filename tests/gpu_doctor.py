"""By hand, on a machine with a GPU: `nanoserve doctor` itself. Not collected by pytest; three to six minutes.

    PYTHONPATH=.:tests python tests/gpu_doctor.py OUT [SHAPE]

1. `doctor --shape nano` is sound: every op's every backend that can run here agrees with the reference.
2. The same with a wrong kernel planted in the table finds it, and exits with 1; one that faults likewise.
3. Calibration: of two able backends of the experts, ours and ours made slow by a second run, it keeps the faster
   whichever stands first in the table, and takes the file when asked again; a third that disagrees is excluded.
4. A start (`startup.prepare`) with calibration comes to the same choice, and the decode step runs in a graph.

Numbers go to OUT/doctor.json and OUT/gpu_doctor.json; a fault in one part leaves the others to run.
"""

import io
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from nanoserve.calibrating import calibrated
from nanoserve.cli import main as nanoserve
from nanoserve.config import EngineConfig
from nanoserve.kernels import table, triton_experts
from nanoserve.kernels.fused import MoeWeights, Norm
from nanoserve.kernels.place import Place, Reason
from nanoserve.shapes import examine_shape, prepare_shape
from nanoserve.startup import subject_of

OP = "moe_add"


def slow(stream: Tensor, norm: Norm, w: MoeWeights) -> Tensor:
    """Right, and takes twice as long."""
    triton_experts.moe_add(stream, norm, w)
    return triton_experts.moe_add(stream, norm, w)


def wrong(stream: Tensor, norm: Norm, w: MoeWeights) -> Tensor:
    """One element of the residual stream is off by a little."""
    out = triton_experts.moe_add(stream, norm, w)
    out[0, 0] += 0.02 * out.float().norm()
    return out


def faulty(stream: Tensor, norm: Norm, w: MoeWeights) -> Tensor:
    """As a kernel that cannot be launched."""
    raise RuntimeError("CUDA error: invalid configuration argument")


@contextmanager
def planted(functions: Mapping[str, str], *, first: bool) -> Generator[None]:
    """Backends of the experts in the table, named after their functions here."""

    def anywhere(place: Place) -> Reason | None:
        return None

    own = {name: f"gpu_doctor:{function}" for name, function in functions.items()}
    row = {**own, **table.BACKENDS[OP]} if first else {**table.BACKENDS[OP], **own}
    needs = {**table.REQUIREMENTS, **dict.fromkeys(own, anywhere)}
    with patch.object(table, "BACKENDS", {**table.BACKENDS, OP: row}), patch.object(table, "REQUIREMENTS", needs):
        yield


def doctor(*arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON."""
    text = io.StringIO()
    with redirect_stdout(text):
        code = nanoserve(["doctor", "--json", *arguments])
    return code, json.loads(text.getvalue())


def check_sound(out: Path, shape: str) -> dict[str, Any]:
    code, data = doctor("--shape", shape, "--out", str(out / "doctor.json"))
    for row in data["ops"]:
        if row["verdict"] not in ("right", "reference"):
            print(f"  {row}", flush=True)
    backends = sorted({row["backend"] for row in data["ops"]})
    failed = [finding for finding in data["environment"] if finding["verdict"] == "FAIL"]
    return {"right": code == 0, "cases": len(data["ops"]), "backends": backends, "failed": failed}


def check_planted(out: Path, shape: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, verdict in (("wrong", "WRONG"), ("faulty", "FAULT")):
        with planted({name: name}, first=True):
            code, data = doctor("--shape", shape)
        (row,) = [row for row in data["ops"] if row["backend"] == name]
        found[name] = {"code": code, "verdict": row["verdict"], "error": row["error"], "reason": row["reason"]}
        found[name]["right"] = code == 1 and row["verdict"] == verdict
    return {"right": all(row["right"] for row in found.values()), **found}


def check_calibration(out: Path, shape: str) -> dict[str, Any]:
    examined = examine_shape(shape, EngineConfig(device="cuda"))  # pyright: ignore[reportArgumentType]
    subject, rows = subject_of(examined), list[dict[str, Any]]()
    for first in (True, False):
        for attempt in ("measured", "kept"):
            with planted({"slow": "slow", "wrong": "wrong"}, first=first):
                ops = examine_shape(shape, examined.options).ops  # pyright: ignore[reportArgumentType]
                began = time.monotonic()
                _, result = calibrated(subject, ops, {}, say)
                seconds = time.monotonic() - began
            assert result is not None
            rows.append({"first": first, "attempt": attempt, "seconds": seconds, "kept": result.kept})
            rows[-1] |= {"backend": result.backend, "reason": result.reason}
            rows[-1]["right"] = (
                result.backend == "triton"
                and result.kept is (attempt == "kept")
                and "wrong excluded" in result.reason
                and seconds < 60
            )
    return {"right": all(row["right"] for row in rows), "rows": rows}


def check_start(out: Path, shape: str) -> dict[str, Any]:
    with planted({"slow": "slow"}, first=True):
        options = EngineConfig(device="cuda", max_context=4096)
        prepared = prepare_shape(shape, options, say)  # pyright: ignore[reportArgumentType]
        shipped = prepare_shape(shape, EngineConfig(device="cuda", max_context=4096, calibrate=False), say)  # pyright: ignore[reportArgumentType]
    row = next(row for row in prepared.ops.report if row.op == OP)
    default = shipped.ops.backend(OP)
    right = row.backend == "triton" and default == "slow" and prepared.graph
    return {"right": right, "backend": row.backend, "reason": row.reason, "uncalibrated": default}


def say(line: str) -> None:
    print(f"  {line}", flush=True)


def main() -> None:
    out, shape = Path(sys.argv[1]), (sys.argv[2:] or ["nano"])[0]
    # A cache of its own, so that nothing is known from before.
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()
    head = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "shape": shape}
    results: dict[str, Any] = {"head": head}
    checks: tuple[Callable[[Path, str], dict[str, Any]], ...] = (
        check_sound, check_planted, check_calibration, check_start,
    )  # fmt: skip
    for check in checks:
        began = time.monotonic()
        try:
            results[check.__name__] = check(out, shape)
        except Exception:  # noqa: BLE001  # the others are to run all the same
            results[check.__name__] = {"right": False, "fault": traceback.format_exc()}
            traceback.print_exc()
        right = results[check.__name__]["right"]
        print(f"{'right' if right else 'WRONG'} {check.__name__}: {time.monotonic() - began:.0f} s", flush=True)
        (out / "gpu_doctor.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
