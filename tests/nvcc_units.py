"""Compiles FlashInfer's CUDA units for SM120 (12.0f) with nvcc, where there is no GPU; a script, not a test.

`python tests/nvcc_units.py --build /tmp/nvcc-build --until 20:50` takes the commands that FlashInfer's JIT would
give to ninja, adds `-Xptxas -v`, and runs them one at a time until the clock says so; units that our calls reach
come first. tests/results/nvcc_sm120f.json is whole after every unit; a later run compiles only what it lacks as
built. Objects are not linked: that needs libcuda, which comes with a driver.

The toolkit may come without cuBLAS, cuRAND and NVRTC. Their headers then come from PyPI:
`pip install --no-deps --target BUILD/libs nvidia-cublas nvidia-curand nvidia-cuda-nvrtc`.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

OUT = Path(__file__).parent / "results" / "nvcc_sm120f.json"
ARCHITECTURE = "12.0f"
REACHED, LINKED, WHOLE = "reached by our call", "linked only", "of the module"
HOST, NOT_TILE = "host code", "another type, chip or epilogue than our call's"
NEEDED = (REACHED, WHOLE, HOST)


@dataclass(frozen=True, slots=True)
class Module:
    """One of FlashInfer's JIT modules.

    Attributes:
        spec: FlashInfer's specification.
        why: the arguments that it is for.
    """

    spec: Any
    why: str


@dataclass(frozen=True, slots=True)
class Unit:
    """One translation unit: what ninja would run for it."""

    module: str
    file: str
    command: str
    output: Path
    reached: bool
    role: str


@dataclass(frozen=True, slots=True)
class Built:
    """What became of a unit. Registers and spilled bytes are of the kernels that have most of them."""

    file: str
    role: str
    ok: bool
    seconds: float
    error: str = ""
    object_bytes: int = 0
    kernels: int = 0
    max_registers: int = 0
    max_registers_kernel: str = ""
    spilling_kernels: int = 0
    max_spill_store_bytes: int = 0
    max_spill_load_bytes: int = 0
    max_stack_bytes: int = 0
    max_spill_kernel: str = ""


def modules() -> dict[str, Module]:
    """FlashInfer's modules for our calls, those first that are soon done."""
    torch = import_module("torch")
    jit = {
        name: import_module(f"flashinfer.jit.{name}")
        for name in ("fp4_quantization", "mamba.selective_state_update", "xqa", "fused_moe")
    }
    bf16, fp8, f32, i32 = torch.bfloat16, torch.float8_e4m3fn, torch.float32, torch.int32
    ssu = jit["mamba.selective_state_update"].gen_selective_state_update_sm100_module
    xqa = jit["xqa"].gen_xqa_module

    def state_update(dt: Any) -> Any:
        return ssu(f32, bf16, dt, f32, i32, None, 64, 128, 1, i32, i32)

    def attention(kv: Any, page: int) -> Any:
        return xqa(bf16, kv, page, 128, 16, False, bf16)

    made = (
        Module(jit["fp4_quantization"].gen_fp4_quantization_sm120f_module(), "bfloat16 to NVFP4"),
        Module(state_update(f32), "state float32 [heads, 64, 128], x bfloat16, dt and D float32, 1 token"),
        Module(attention(fp8, 16), "32 heads of 128 on 2 of KV, q bfloat16, KV E4M3, pages of 16, 1 token"),
        Module(attention(bf16, 16), "32 heads of 128 on 2 of KV, q and KV bfloat16, pages of 16, 1 token"),
        Module(
            jit["fused_moe"].gen_cutlass_fused_moe_sm120_module(),
            "x bfloat16, weights NVFP4, relu2, use_fused_finalize=False",
        ),
        Module(state_update(bf16), "as above, with dt and D bfloat16"),
        Module(attention(fp8, 64), "as above, KV E4M3 in pages of 64"),
    )
    return {module.spec.name: module for module in made}


def units(module: Module) -> list[Unit]:
    """Its translation units, those that our calls reach first."""
    spec, found = module.spec, list[Unit]()
    spec.write_ninja()
    listed = subprocess.run(
        ["ninja", "-f", str(spec.ninja_path), "-t", "compdb"], capture_output=True, text=True, check=True
    )
    for entry in json.loads(listed.stdout):
        source = Path(entry["file"])
        if source.suffix in (".cu", ".cpp"):
            role = _role(spec.name, source)
            reached = role in NEEDED
            found.append(Unit(spec.name, _short(source), entry["command"], Path(entry["output"]), reached, role))
    first = (
        "moe_gemm_kernels_fp4_fp4.cu",
        "cutlass_kernel_file_gemm_grouped_sm120_M128_BS_group2.generated.cu",
        "cutlass_fused_moe_instantiation.cu",
    )

    def order(unit: Unit) -> tuple[bool, int, str, str]:
        name = Path(unit.file).name
        return not unit.reached, first.index(name) if name in first else len(first), unit.role, unit.file

    return sorted(found, key=order)


def _short(source: Path) -> str:
    """The path below FlashInfer's sources or generated files."""
    return re.sub(r".*/(?:csrc|generated)/", "", str(source))


def _role(module: str, source: Path) -> str:
    if source.suffix == ".cpp":
        return HOST
    if module != "fused_moe_120":
        return WHOLE
    if source.name.endswith(".generated.cu"):
        text = re.sub(r"\s+", " ", source.read_text(encoding="utf-8"))
        ours = "MOE_GEMM(Sm120, SafeFP4, SafeFP4, __nv_bfloat16, void, EpilogueOpDefault, "
        if f"{ours}NONE" in text:
            return REACHED
        if f"{ours}FINALIZE" in text:
            return f"{LINKED}: NVFP4 tiles of the fused finalize, which we switch off"
        return f"{LINKED}: {NOT_TILE}"
    if source.name.startswith("moe_gemm_kernels_"):
        return REACHED if "fp4_fp4" in source.name else f"{LINKED}: {NOT_TILE}"
    reached = ("tma_warp_specialized_input", "_binding", "cutlass_fused_moe_instantiation")
    return REACHED if any(name in source.name for name in reached) else f"{LINKED}: not on our call's path"


def compiled(unit: Unit, seconds: float) -> Built:
    """Run a unit's command, stopped after so many seconds."""
    start = time.monotonic()
    process = subprocess.Popen(
        ["nice", "-n", "15", "bash", "-c", unit.command],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        log, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return Built(unit.file, unit.role, False, round(time.monotonic() - start, 1), "stopped: no time left")
    took = round(time.monotonic() - start, 1)
    unit.output.with_suffix(".log").write_text(log, encoding="utf-8")
    if process.returncode:
        lines = [line for line in log.splitlines() if re.search(r"error|fatal", line, re.IGNORECASE)]
        first = (lines or log.splitlines()[-1:] or ["no output"])[0]
        return Built(unit.file, unit.role, False, took, re.sub(r"/\S*/", "", first)[:300])
    return Built(unit.file, unit.role, True, took, "", unit.output.stat().st_size, **_resources(log))


def _resources(log: str) -> Mapping[str, Any]:
    """What ptxas says of the kernels of a log."""
    registers, spills, kernel, function = dict[str, int](), dict[str, tuple[int, ...]](), "", ""
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            kernel = match[1]
        elif match := re.search(r"Function properties for (\w+)", line):
            function = match[1]
        elif match := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            spills[function] = tuple(int(group) for group in match.groups())
        elif match := re.search(r"Used (\d+) registers", line):
            registers[kernel] = int(match[1])
    if not registers:
        return {}
    spilling = {name: own for name, own in spills.items() if own[1] or own[2]}
    most = max(registers, key=registers.__getitem__)
    worst = max(spilling, key=lambda name: spilling[name][1], default="")
    return {
        "kernels": len(registers),
        "max_registers": registers[most],
        "max_registers_kernel": _readable(most),
        "spilling_kernels": len(spilling),
        "max_spill_store_bytes": max((own[1] for own in spilling.values()), default=0),
        "max_spill_load_bytes": max((own[2] for own in spilling.values()), default=0),
        "max_stack_bytes": max((own[0] for own in spills.values()), default=0),
        "max_spill_kernel": _readable(worst),
    }


def _readable(kernel: str) -> str:
    """A kernel's name as C++ has it, cut short."""
    if not kernel:
        return ""
    name = subprocess.run(["c++filt", kernel], capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"^void ", "", name)
    return name if len(name) <= 200 else f"{name[:200]}…"


def report(
    found: Mapping[str, Module], all_units: Mapping[str, list[Unit]], done: Mapping[str, list[Built]]
) -> Any:
    """What is written down."""
    nvcc = subprocess.run([f"{os.environ['CUDA_HOME']}/bin/nvcc", "--version"], capture_output=True, text=True)
    release = re.search(r"release .*", nvcc.stdout)
    rows = list[dict[str, Any]]()
    for name, module in found.items():
        built = done.get(name, [])
        names, roles = {own.file for own in built}, {unit.file: unit.role for unit in all_units[name]}
        missing = [unit for unit in all_units[name] if unit.file not in names]
        rows.append(
            {
                "module": name,
                "for": module.why,
                "flags": _flags(module.spec.extra_cuda_cflags),
                "units": len(all_units[name]),
                "reached": sum(unit.reached for unit in all_units[name]),
                "built": sum(own.ok for own in built),
                "reached_built": sum(own.ok and roles[own.file] in NEEDED for own in built),
                "failed": [own.file for own in built if not own.ok],
                "seconds": round(sum(own.seconds for own in built), 1),
                "compiled": [_row(own, roles[own.file]) for own in built],
                "not_built": {
                    role: [Path(unit.file).name for unit in missing if unit.role == role]
                    for role in dict.fromkeys(unit.role for unit in missing)
                },
            }
        )
    everything = [own for built in done.values() for own in built]
    return {
        "nvcc": release[0] if release else "",
        "flashinfer": version("flashinfer-python"),
        "architecture": ARCHITECTURE,
        "summary": (
            f"{sum(own.ok for own in everything)} units built, {sum(not own.ok for own in everything)} failed or "
            f"stopped, of {sum(map(len, all_units.values()))} that the modules have; "
            f"{sum(own.seconds for own in everything):.0f} s of one nvcc at a time at nice 15, on 2 cores that "
            "others used too. Objects only: nothing was linked or run. Modules are at the shapes of the "
            "calls of the backends cutlass, ssu, xqa and mm_fp4. not_built: there was no time; its keys are the "
            "units' roles."
        ),
        "modules": rows,
    }


def _row(built: Built, role: str) -> dict[str, Any]:
    return {key: value for key, value in (asdict(built) | {"role": role}).items() if value or key == "ok"}


def _flags(flags: list[str]) -> str:
    general = ("-std=", "--threads", "-Xfatbin", "--compress", "-DFLASHINFER_ENABLE")
    return " ".join(flag for flag in flags if flag and not flag.startswith(general))


def _kept(path: Path) -> dict[str, list[Built]]:
    """What earlier runs made of the units."""
    if not path.exists():
        return {}
    rows = json.loads(path.read_text(encoding="utf-8"))["modules"]
    return {row["module"]: [Built(**own) for own in row["compiled"]] for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, required=True, help="folder for all that is built")
    parser.add_argument("--until", help="when to stop, HH:MM today or tomorrow; without it nothing is compiled")
    parser.add_argument("--list", action="store_true", help="name the units and compile none")
    options = parser.parse_args()
    end = now = datetime.now()
    if options.until:
        end = datetime.combine(now.date(), datetime.strptime(options.until, "%H:%M").time())
        end += timedelta(days=end < now)
    _environment(options.build.resolve())
    found = modules()
    all_units, done = {name: units(module) for name, module in found.items()}, _kept(OUT)
    # Of all modules what our calls reach, and then the rest.
    for unit in sorted((unit for own in all_units.values() for unit in own), key=lambda unit: not unit.reached):
        left, own = (end - datetime.now()).total_seconds(), done.setdefault(unit.module, [])
        if options.list:
            print(unit.module, unit.file, unit.role, sep="  ")
        elif left > 0 and all(earlier.file != unit.file or not earlier.ok for earlier in own):
            result = compiled(unit, left)
            own[:] = [*(earlier for earlier in own if earlier.file != unit.file), result]
            print(unit.module, unit.file, "ok" if result.ok else result.error, f"{result.seconds} s", flush=True)
            _write(report(found, all_units, done))
    if not options.list:
        _write(report(found, all_units, done))


def _write(told: Any) -> None:
    OUT.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def _environment(build: Path) -> None:
    """What FlashInfer reads when it is imported and when it writes commands."""
    headers = f"-isystem {build}/libs/nvidia/cu13/include"
    os.environ.setdefault("CUDA_HOME", "/usr/local/cuda")
    os.environ["FLASHINFER_CUDA_ARCH_LIST"] = ARCHITECTURE
    os.environ["FLASHINFER_WORKSPACE_BASE"] = str(build)
    os.environ["FLASHINFER_EXTRA_CUDAFLAGS"] = f"-Xptxas -v {headers}"
    os.environ["FLASHINFER_EXTRA_CFLAGS"] = headers


if __name__ == "__main__":
    main()
