"""A start on a GPU, played on a CPU: what is compiled is told, and nothing of it is left in the engine."""

from pathlib import Path

import pytest

from nanoserve import startup, warm_up
from nanoserve.cached import cache_folder
from nanoserve.checkpoint import open_checkpoint
from nanoserve.config import EngineConfig
from nanoserve.engine import Engine
from nanoserve.request import Finish, Request, SamplingParams, Token
from nanoserve.startup import load_engine, prepare

pytest.importorskip("triton")

CONTEXT = 40


@pytest.fixture
def engine(random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Engine:
    """With compilers' folders that are empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "ours"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    options = EngineConfig(device="cpu", max_context=CONTEXT, prefill_chunk=16)
    return load_engine(prepare(open_checkpoint(random_checkpoint), options), lambda done, total: None)


def compile_one(name: str) -> None:
    """What a compiler leaves."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.cubin").write_bytes(b"")


def answer(engine: Engine) -> list[int]:
    request = Request((5, 100, 200), SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True))
    return [event.id for event in engine.generate(request) if isinstance(event, Token)]


def test_what_is_compiled_is_told(engine: Engine, tmp_path: Path) -> None:
    lines: list[str] = []
    with warm_up.compiling("nothing", lines.append):
        pass
    assert lines == []
    with warm_up.compiling("decode steps", lines.append):
        compile_one("a")
        other = tmp_path / "triton" / "digest"
        other.mkdir(parents=True)
        (other / "b.cubin").write_bytes(b"")
    with warm_up.compiling("the same", lines.append):
        compile_one("a")
    (line,) = lines
    assert line.startswith("  kernels          decode steps: 2 compiled in ")


def test_a_prompt_of_each_kind_is_answered(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """None is longer than the context, and the next answer is as if there had been none."""
    seen: list[int] = []
    generate = Engine.generate

    def noted(self: Engine, request: Request, cancelled: object = None) -> object:
        seen.append(len(request.prompt))
        if len(request.prompt) == 32:
            compile_one("of 32 tokens")
        return generate(self, request)

    want, lines = answer(engine), list[str]()
    with monkeypatch.context() as patched:
        patched.setattr(Engine, "generate", noted)
        warm_up.warm_up(engine, lines.append)
    assert seen == [16, 32, CONTEXT - 1]
    assert [line.partition(":")[0] for line in lines] == ["  kernels          a prompt of 32 tokens"]
    assert answer(engine) == want
    last = list(engine.generate(Request((1,) * (CONTEXT - 1), SamplingParams(max_tokens=1))))[-1]
    assert isinstance(last, Finish)  # all pages are free again


def test_a_cpu_compiles_nothing(random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(engine: Engine, say: warm_up.Say) -> None:
        raise AssertionError("a CPU is warmed up")

    monkeypatch.setattr(startup, "warm_up", refused)
    prepared = prepare(open_checkpoint(random_checkpoint), EngineConfig(device="cpu", max_context=CONTEXT))
    load_engine(prepared, lambda done, total: None)
