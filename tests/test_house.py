"""The house's own rules: layout, imports, pins."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("nanoserve", "models", "models/demo", "kernels")
SOURCES = sorted(p for folder in FOLDERS for p in (ROOT / folder).glob("*.py"))

FLOORS = (
    # From the ground up: a module imports only from floors below its own, or from its own.
    {"errors", "config", "request", "models.config", "quantization", "eval_stats", "svg", "signals", "cached"},
    {"kernels"},
    {"cache", "files", "checkpoint", "safetensors_header", "staging"},
    {"models"},
    {"weights", "sampler", "step", "graph", "experts", "dense_scales", "plan", "progress"},
    {"machine"},
    {"engine"},
    {"traffic", "breakdown", "timing", "op_cases", "op_checks", "trial", "calibrate", "calibrating", "warm_up"},
    {"startup", "inspection"},
    {"arguments", "parsing"},
    {
        "tokenizer",
        "template",
        "messages",
        "text",
        "choice",
        "blocks",
        "worker",
        "random_tokenizer",
        "random_checkpoint",
    },
    {"models.demo"},
    {"grammar_schema", "grammar_tools", "grammar_trial", "grammar", "constraint"},
    {"protocol", "parameters", "logprobs", "metrics", "local", "gsm8k", "eval_questions"},
    {"reasoning", "tools", "logs", "client", "page"},
    {"structured"},
    {
        *("http_guard", "http_timeouts", "answers", "sse", "openai_wire", "chat", "chat_answer", "completions"),
        *("doors", "anthropic", "anthropic_answer", "responses", "responses_answer", "terminal"),
    },
    {"eval_local", "eval_server", "eval_report", "evaluation"},
    {
        "shapes",
        "energy",
        "dense",
        "bench",
        "bench_report",
        "bench_options",
        "bench_command",
    },
    {
        *("probes", "cuda_launches", "compile_job", "doctor_compile", "doctor_environment"),
        *("doctor_options", "doctor_report", "doctor_command"),
    },
    {"routes"},
    {"server"},
    {"cli", "__init__", "__main__"},
)
PURE = {"errors", "config", "request", "models.config"}
"""These import nothing of ours but each other."""


def module_name(path: Path) -> str:
    folders = path.parent.relative_to(ROOT).parts
    return ".".join([*(folder for folder in folders if folder != "nanoserve"), path.stem])


def floor_of(module: str) -> int:
    """The floor that names the module, or else the nearest package around it."""
    while module:
        for index, names in enumerate(FLOORS):
            if module in names:
                return index
        module = module.rpartition(".")[0]
    raise AssertionError("no floor names it")


def imports_of(path: Path) -> Iterator[str]:
    """Modules of ours that a file imports at run time (imports for type checkers do not count)."""
    tree = ast.parse(path.read_text())
    only_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in only_types:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "nanoserve":
            assert node.module
            inside = node.module.removeprefix("nanoserve").removeprefix(".")
            for alias in node.names:
                if alias.name == "__version__":
                    continue
                if not inside or inside in ("kernels", "models.demo"):
                    candidate = f"{inside}.{alias.name}".strip(".")
                    yield (
                        candidate
                        if (ROOT / "nanoserve" / (candidate.replace(".", "/") + ".py")).exists()
                        else inside
                    )
                else:
                    yield inside
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("nanoserve."):
                    yield alias.name.removeprefix("nanoserve.")


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_go_down_the_floors(path: Path) -> None:
    own = module_name(path)
    for other in imports_of(path):
        assert other, f"{own} imports from the package itself"
        assert floor_of(other) <= floor_of(own), f"{own} imports {other}, which stands above it"
        if own in PURE:
            assert other in PURE, f"{own} imports {other}"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_nobody_imports_the_folders_as_packages(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not any(name.partition(".")[0] in ("models", "kernels") for name in names)
        if "flashinfer" in {name.partition(".")[0] for name in names}:
            assert path.name.startswith("flashinfer_")


def test_every_file_stays_readable() -> None:
    long = {path.name: n for path in SOURCES if (n := len(path.read_text().splitlines())) > 400}
    assert not long


def rows_of_the_serving_tests() -> list[tuple[str, str]]:
    """Row and the rest of its line."""
    text = (ROOT / "docs" / "serving-tests.md").read_text()
    return re.findall(r"^\| ([RS]\d+) \|(.*)$", text, re.MULTILINE)


def test_every_serving_row_has_a_line() -> None:
    wanted = [*(f"R{i}" for i in range(1, 25)), *(f"S{i}" for i in range(1, 14))]
    rows = rows_of_the_serving_tests()
    assert [row for row, _ in rows] == wanted
    assert [row for row, line in rows if "`test_" not in line] == ["R17"], "out of scope, and it says so"


@pytest.mark.parametrize(
    ("row", "line"), [pytest.param(*pair, id=pair[0]) for pair in rows_of_the_serving_tests()]
)
def test_a_serving_rows_tests_exist_and_name_it(row: str, line: str) -> None:
    for file, *path in (found.split("::") for found in re.findall(r"`(test_\w+\.py(?:::\w+)+)`", line)):
        node: ast.AST = ast.parse((ROOT / "tests" / file).read_text())
        for name in path:
            inside = [child for child in ast.iter_child_nodes(node) if getattr(child, "name", None) == name]
            assert len(inside) == 1, f"{file} has no {'::'.join(path)}"
            node = inside[0]
        assert isinstance(node, ast.FunctionDef)
        assert re.search(rf"\b{row}\b", ast.get_docstring(node) or ""), f"{path[-1]} does not name {row}"


def test_pyright_sees_every_folder() -> None:
    """It does not follow symbolic links, so nanoserve/models alone would go unchecked."""
    include = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pyright"]["include"]
    assert set(include) == {"nanoserve", "models", "kernels", "tests"}


@pytest.mark.parametrize("folder", ["models", "kernels"])
def test_the_folders_are_linked_and_have_no_init(folder: str) -> None:
    assert (ROOT / "nanoserve" / folder).resolve() == ROOT / folder
    assert not (ROOT / folder / "__init__.py").exists(), "it would shadow the distribution called kernels"


def loaded_by(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has after running the code."""
    script = f"import sys\n{code}\nprint(*sorted({{m.partition('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


def test_importing_nanoserve_imports_no_torch() -> None:
    loaded = loaded_by("import nanoserve, nanoserve.cli, nanoserve.config; nanoserve.SamplingParams()")
    assert not loaded & {"torch", "triton", "flashinfer", "transformers", "starlette"}


def test_a_machine_without_a_gpu_never_imports_flashinfer() -> None:
    code = (
        "import tempfile, pathlib, nanoserve\n"
        "from nanoserve.random_checkpoint import write_random_checkpoint as write\n"
        "d = write(pathlib.Path(tempfile.mkdtemp()))\n"
        "nanoserve.generate(d, [5, 6], options={'device': 'cpu', 'max_context': 64}, max_tokens=2)"
    )
    loaded = loaded_by(code)
    assert "torch" in loaded
    assert not loaded & {"flashinfer", "cutlass", "triton"} - (
        {"triton"} if "triton" in loaded_by("import torch") else set()
    )


def requirements() -> dict[str, str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    split = (re.match(r"([A-Za-z0-9_-]+)(.*)", line) for line in project["dependencies"])
    return {match[1]: match[2] for match in split if match}


def test_the_two_cutlass_packages_are_pinned_to_one_version() -> None:
    """SM120 kernels have died in ptxas when the cu13 libraries were missing or of another version."""
    pins = requirements()
    assert pins["nvidia-cutlass-dsl"].startswith("==")
    assert pins["nvidia-cutlass-dsl"] == pins["nvidia-cutlass-dsl-libs-cu13"]


def test_every_dependency_has_a_tried_range() -> None:
    assert all("<" in spec or "==" in spec for spec in requirements().values())


def test_ci_runs_the_readmes_test_command() -> None:
    readme, script = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    commands = re.findall(r"^python3 -m venv .*$", readme, re.MULTILINE)
    assert len(commands) == 2, "the README promises two commands"
    assert "README.md" in script
    assert "pytest" in commands[1]
