"""Whether what the probes found will do: a finding each, with a verdict and a remedy."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from nanoserve.probes import Machine

Verdict = Literal["ok", "absent", "warn", "FAIL"]

_CHIPS = {(9, 0): "Hopper", (12, 0): "SM120", (12, 1): "SM121"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was looked at, what is there, whether it will do, and what to do if not."""

    name: str
    value: str
    verdict: Verdict
    remedy: str = ""


def examine_machine(m: Machine) -> tuple[Finding, ...]:
    """All findings, in the order of dependence."""
    parts = (_gpu, _driver, _toolkit, _arch, _conversion, _packages, _cutlass, _flashinfer)
    return tuple(finding for part in parts for finding in part(m))


def _gpu(m: Machine) -> Iterator[Finding]:
    if m.gpu is None:
        yield Finding("GPU", "none that torch sees", "absent", "only the CPU can be looked at here")
        return
    g, chip = m.gpu, m.gpu.capability
    memory = f"{g.memory / 1e9:.0f} GB{', shared with the CPU' if g.unified else ''}"
    value = f"{g.name}, {chip[0]}.{chip[1]}, {g.multiprocessors} multiprocessors, {memory}"
    if chip in _CHIPS:
        yield Finding("GPU", value, "ok")
    else:
        yield Finding("GPU", value, "warn", "the fast kernels are for 9.0, 12.0 and 12.1: torch's will run")


def _driver(m: Machine) -> Iterator[Finding]:
    if m.gpu is None:
        yield Finding("driver", m.driver or "none", "absent")
        return
    cuda: tuple[int, int] = m.driver_cuda or (0, 0)
    value = f"{m.driver or 'unknown'}, takes CUDA up to {cuda[0]}.{cuda[1]}"
    need: tuple[int, int] = (13, 0) if m.gpu.capability[0] == 12 else (12, 4)
    if _at_least(cuda, need):
        yield Finding("driver", value, "ok")
    else:
        yield Finding("driver", value, "warn", f"update to one for CUDA {need[0]}.{need[1]} (580 or newer for 13)")


def _at_least(found: tuple[int, int], need: tuple[int, int]) -> bool:
    return found >= need


def _toolkit(m: Machine) -> Iterator[Finding]:
    if m.toolkit is None:
        remedy = "only FlashInfer's CUDA modules need one; install CUDA 13, or use Triton and CuTe-DSL backends"
        yield Finding("CUDA toolkit", "no nvcc", "absent", remedy)
        return
    major, minor = m.toolkit.version
    value = f"{major}.{minor} ({m.toolkit.nvcc})"
    if (major, minor) < (12, 9):
        remedy = "it compiles plain sm_120, whose FP4 conversion is software: install CUDA 13"
        yield Finding("CUDA toolkit", value, "FAIL" if _is_sm12x(m) else "warn", remedy)
    elif major < 13:
        yield Finding("CUDA toolkit", value, "warn", "FlashInfer's b12x refuses it: install CUDA 13")
    else:
        yield Finding("CUDA toolkit", value, "ok")


def _is_sm12x(m: Machine) -> bool:
    return m.gpu is not None and m.gpu.capability[0] == 12


def _arch(m: Machine) -> Iterator[Finding]:
    """The chip that each compiler is really told."""
    major, minor = m.gpu.capability if m.gpu else (12, 0)
    for_whom = "" if m.gpu else " (of an RTX PRO 6000, there is no GPU here)"
    target = f"sm_{major}{minor}a"
    family = f"compute_{major}{minor}" + ("f" if (major, minor) == (12, 0) else "a")
    yield Finding("compiled for", f"{target} by Triton and the CuTe DSL, {family} by FlashInfer{for_whom}", "ok")
    for name, value in m.variables.items():
        if plain := [word for word in _chips_of(value) if word in ("12.0", "12.1", "sm_120", "sm_121")]:
            # FlashInfer itself makes 120f or 121a of them, with a toolkit that can.
            saved = name == "FLASHINFER_CUDA_ARCH_LIST" and m.toolkit is not None and m.toolkit.version >= (12, 9)
            remedy = f"a plain {plain[0]} has no FP4 conversion: unset it, or say {_full(plain[0])}"
            yield Finding(name, value, "ok" if saved else "FAIL", "" if saved else remedy)
        else:
            yield Finding(name, value, "ok")


def _chips_of(value: str) -> list[str]:
    return value.replace(";", " ").replace(",", " ").split()


def _full(plain: str) -> str:
    return f"{plain}f" if plain == "12.0" else f"{plain}a"


def _conversion(m: Machine) -> Iterator[Finding]:
    """E2M1 in hardware: the silent software path once cost 1.1 against 35 tokens a second."""
    c = m.conversion
    if not c.target.startswith("sm_12"):
        value = f"{c.target} has none; our kernels read NVFP4 with integer instructions there"
        yield Finding("E2M1 conversion", value, "ok")
        return
    ways = {"Triton's ptxas": c.assembler, "the CUDA toolkit's headers": c.nvcc}
    wrong = [way for way, fine in ways.items() if fine is False]
    seen = [way for way, fine in ways.items() if fine]
    if wrong:
        remedy = "update it: FP4 would be converted in software"
        yield Finding("E2M1 conversion", f"not in hardware by {' and '.join(wrong)}: {c.why}", "FAIL", remedy)
    elif seen:
        yield Finding("E2M1 conversion", f"cvt.e2m1x2 on {c.target} by {' and '.join(seen)}", "ok")
    else:
        yield Finding("E2M1 conversion", f"not tried: {c.why}", "absent", "install triton")


def _packages(m: Machine) -> Iterator[Finding]:
    torch, triton = m.versions["torch"], m.versions["triton"]
    if m.gpu is None or m.torch_cuda:
        yield Finding("torch", f"{torch}, CUDA {m.torch_cuda or 'none'}", "ok")
    else:
        yield Finding("torch", f"{torch}, CUDA none", "FAIL", "install torch for CUDA")
    if triton:
        yield Finding("triton", triton, "ok")
    else:
        verdict: Verdict = "absent" if m.gpu is None else "FAIL"
        yield Finding("triton", "not installed", verdict, "torch for CUDA brings it; our kernels need it")


def _cutlass(m: Machine) -> Iterator[Finding]:
    """The DSL and its libraries must be of one version: mixed ones have died in ptxas."""
    found = {name: v for name, v in m.versions.items() if name.startswith("nvidia-cutlass-dsl") and v}
    if not found:
        yield Finding("cutlass-dsl", "not installed", "absent", "b12x and W4A16 need it: see pyproject.toml")
        return
    told = ", ".join(
        f"{name.removeprefix('nvidia-cutlass-dsl').lstrip('-') or 'dsl'} {v}" for name, v in found.items()
    )
    wanted = m.versions["nvidia-cutlass-dsl"] or "4.8.1"
    libraries = "nvidia-cutlass-dsl-libs-cu13"
    if len(set(found.values())) > 1:
        names = " ".join(f"{name}=={wanted}" for name in found)
        yield Finding("cutlass-dsl", told, "FAIL", f"bring them to one version: pip install {names}")
    elif m.versions[libraries] is None:
        yield Finding("cutlass-dsl", told, "warn", f"pip install {libraries}=={wanted}")
    else:
        yield Finding("cutlass-dsl", told, "ok")


def _flashinfer(m: Machine) -> Iterator[Finding]:
    version = m.versions["flashinfer-python"]
    if version is None:
        yield Finding("flashinfer", "not installed", "absent", "pip install 'flashinfer-python>=0.7.4,<0.8'")
    elif m.flashinfer_fault:
        value = f"{version}, broken: {m.flashinfer_fault}"
        yield Finding(
            "flashinfer", value, "FAIL" if _is_sm12x(m) else "warn", "install what it names, or reinstall it"
        )
    else:
        yield Finding("flashinfer", version, "ok")
