"""One backend of one op tried in a process of its own, where a fault takes nothing else with it."""

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection

from nanoserve.kernels.flashinfer_ops import PARTS
from nanoserve.kernels.place import Experts
from nanoserve.op_cases import OpCase, Subject, cases

SECONDS = 300.0
"""A trial may compile kernels, and no more than that."""

_MANY = 512


def known_risk(backend: str, experts: Experts | None) -> str | None:
    """What is known against a backend, or None."""
    if backend == "b12x" and experts is not None and experts.count >= _MANY:
        return f"illegal memory accesses are reported with {_MANY} experts (flashinfer issue 5446)"
    return None


Work = Callable[[Subject, str, str, int], None]


def run_once(s: Subject, op: str, backend: str, seed: int) -> None:
    """Run a case once, and wait for its end."""
    from nanoserve.kernels.table import backends
    from nanoserve.op_checks import outputs

    case = next(case for case in cases(s) if case.op == op)
    function = backends(op, s.device, s.dtype, s.experts)[0][backend]
    outputs(case, function, backend, seed, s.device)


def tried_elsewhere(s: Subject, case: OpCase, backend: str, seed: int, *, work: Work = run_once) -> str | None:
    """Why a backend of others faults, or None; ours are not tried, for every test run has seen them.

    A fault in this process would take the device with it, and no engine could start.

    Args:
        s: the model, and where.
        case: of the op.
        backend: to try.
        seed: of the arguments.
        work: what to run there.
    """
    if backend not in PARTS:
        return None
    fault, risk = in_a_child(s, case.op, backend, seed, work=work), known_risk(backend, s.experts)
    return f"{fault}; {risk}" if fault and risk else fault


def in_a_child(
    s: Subject, op: str, backend: str, seed: int, *, work: Work = run_once, seconds: float = SECONDS
) -> str | None:
    """Run the work in a fresh process: how it failed, or None."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(there, work, s, op, backend, seed), daemon=True)
    process.start()
    there.close()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
        return f"no end within {seconds:.0f} s in a process of its own"
    try:
        told: str = here.recv() if here.poll() else ""
    except EOFError:
        told = ""
    return told or (f"its process ended with code {process.exitcode}" if process.exitcode else None)


def _child(pipe: Connection, work: Work, s: Subject, op: str, backend: str, seed: int) -> None:
    try:
        work(s, op, backend, seed)
        pipe.send("")
    except Exception as fault:  # noqa: BLE001  # it is what was to be found out
        lines = str(fault).strip().splitlines()
        pipe.send(f"{type(fault).__name__}: {lines[0] if lines else ''}")
