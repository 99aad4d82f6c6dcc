"""Commands as a user types them, and what goes wrong ends in one line."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from conftest import DATA
from safetensors.torch import load_file, save_file

from nanoserve.cli import main

Make = Callable[..., Path]


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_generate_streams_text(capsys: pytest.CaptureFixture[str], random_checkpoint: Path) -> None:
    arguments = ("generate", random_checkpoint, "--prompt", "Hi", "--max-tokens", "5", "--temperature", "0")
    code, out, err = run(capsys, *arguments)
    assert code == 0
    assert "weights 100%" in err
    again = json.loads(run(capsys, *arguments, "--json")[1])
    assert out == again["text"] + "\n"
    assert again["usage"]["completion_tokens"] == len(again["token_ids"]) <= 5


def test_generate_without_a_model_says_what_answers(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(
        capsys, "generate", "--prompt", "Hi", "--chat", "--max-tokens", "3", "--seed", "1", "--json"
    )
    assert code == 0
    assert "demonstration model" in err
    assert len(json.loads(out)["token_ids"]) <= 3


def test_inspect_prints_tables_and_json(capsys: pytest.CaptureFixture[str], random_checkpoint: Path) -> None:
    code, text, _ = run(capsys, "inspect", random_checkpoint)
    assert code == 0
    for words in ("pattern", "memory plan", "largest context", "bytes a decoded token", "fc1_latent_proj"):
        assert words in text
    data = json.loads(run(capsys, "inspect", random_checkpoint, "--json")[1])
    assert data["modules"]["lm_head"] == "nvfp4"
    assert data["modules"]["backbone.layers.0.mixer.in_proj"] == "fp8"
    assert data["modules"]["backbone.layers.1.mixer.experts.*.up_proj"] == "nvfp4"
    files = sum(file.stat().st_size for file in random_checkpoint.glob("*.safetensors"))
    assert sum(data["weights_bytes"].values()) == pytest.approx(files, rel=0.05)


def spoil(directory: Path, how: str) -> None:
    weights, config = directory / "model.safetensors", directory / "config.json"
    data: dict[str, Any] = json.loads(config.read_text())
    match how:
        case "no config":
            config.unlink()
        case "config not JSON":
            config.write_text("{")
        case "other architecture":
            config.write_text(json.dumps({**data, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
        case "unsupported value":
            config.write_text(json.dumps({**data, "n_group": 4}))
        case "pickle only":
            weights.rename(directory / "pytorch_model.bin")
        case "no weights":
            weights.unlink()
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-1])
        case "empty":
            weights.write_bytes(b"")
        case "index outside":
            index = {"weight_map": {"backbone.norm_f.weight": "../model.safetensors"}}
            (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        case "tokenizer not JSON":
            (directory / "tokenizer.json").write_text("[")
        case "missing tensor":
            tensors = load_file(weights)
            del tensors["backbone.layers.2.norm.weight"]
            save_file(tensors, weights)
        case "long header":
            weights.write_bytes((2**40).to_bytes(8, "little") + weights.read_bytes()[8:])
        case "shard missing":
            index = {"weight_map": {"backbone.norm_f.weight": "model-00001-of-00001.safetensors"}}
            (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        case "no tensors":
            weights.write_bytes((2).to_bytes(8, "little") + b"{}")
        case "template too deep":
            (directory / "chat_template.jinja").write_text("{{" + "(" * 5000 + "1" + ")" * 5000 + "}}")
        case "template syntax":
            (directory / "chat_template.jinja").write_text("{% for %}")
        case _:
            raise AssertionError(how)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("no config", "config.json"),
        ("config not JSON", "config.json"),
        ("other architecture", "llama"),
        ("unsupported value", "n_group"),
        ("pickle only", "pytorch_model.bin"),
        ("no weights", "model.safetensors"),
        ("truncated", "model.safetensors"),
        ("empty", "model.safetensors"),
        ("index outside", "../model.safetensors"),
        ("tokenizer not JSON", "tokenizer.json"),
        ("template syntax", "chat_template.jinja"),
        ("template too deep", "chat_template.jinja"),
        ("no tensors", "model.safetensors"),
        ("missing tensor", "model.safetensors: backbone.layers.2.norm.weight"),
        ("long header", "model.safetensors"),
        ("shard missing", "model-00001-of-00001.safetensors"),
    ],
)
@pytest.mark.parametrize("command", ["run", "generate"])
def test_a_bad_checkpoint_is_one_line(
    capsys: pytest.CaptureFixture[str], make_checkpoint: Make, command: str, how: str, words: str
) -> None:
    """R16."""
    directory = make_checkpoint()
    spoil(directory, how)
    extra = ("--prompt", "Hi") if command == "generate" else ("--port", "0")
    code, out, err = run(capsys, command, directory, *extra)
    assert (code, out) == (1, "")
    assert err.startswith("nanoserve: error: ")
    assert err.count("\n") == 1
    assert words in err
    assert len(err) < 1000


def test_code_beside_a_checkpoint_is_never_run(capsys: pytest.CaptureFixture[str], make_checkpoint: Make) -> None:
    """S1."""
    directory = make_checkpoint()
    canary = directory / "canary"
    touch = f"open({str(canary)!r}, 'w').close()"
    evil = f"{touch}\nclass NemotronHConfig: pass\n"
    for name in ("configuration_nemotron_h.py", "modeling_nemotron_h.py", "tokenizer.py"):
        (directory / name).write_text(evil)
    pickled = b"cbuiltins\nexec\n(V" + touch.encode() + b"\ntR."  # protocol 0: runs the text when it is loaded
    (directory / "pytorch_model.bin").write_bytes(pickled)
    assert "auto_map" in json.loads((directory / "config.json").read_text())
    code, _, _ = run(capsys, "generate", directory, "--prompt", "Hi", "--max-tokens", "1")
    assert code == 0
    assert not canary.exists()
    pickle.loads(pickled)  # noqa: S301  # it would have run
    assert canary.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--max-context", "0"), "max_context is 0"),
        (("--max-context", "999999"), "8192"),
        (("--op", "router"), "NAME=BACKEND"),
        (("--op", "routr=torch"), "'routr'"),
        (("--op", "router=cuda"), "has triton, torch"),
        (("--device", "cuda"), "GPU"),
        (("--config", "nowhere.toml"), "nowhere.toml"),
    ],
)
def test_bad_options_are_one_line(
    capsys: pytest.CaptureFixture[str], random_checkpoint: Path, arguments: tuple[str, ...], words: str
) -> None:
    code, out, err = run(capsys, "generate", random_checkpoint, "--prompt", "Hi", *arguments)
    assert (code, out) == (1, "")
    assert words in err
    assert err.count("\n") == 1


def test_a_chosen_backend_runs(capsys: pytest.CaptureFixture[str], random_checkpoint: Path) -> None:
    arguments = ("--prompt", "Hi", "--max-tokens", "1", "--op", "router=torch", "--op", "linear_fp8=torch")
    assert run(capsys, "generate", random_checkpoint, *arguments)[0] == 0


def test_options_come_from_toml_and_environment(
    capsys: pytest.CaptureFixture[str], random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "own.toml"
    file.write_text("[engine]\nmax_context = 48\n[server]\nport = 1\n")
    data = json.loads(run(capsys, "inspect", random_checkpoint, "--json", "--config", file)[1])
    assert data["memory_plan"]["max_context"] == 48
    monkeypatch.setenv("NANOSERVE_MAX_CONTEXT", "96")
    data = json.loads(run(capsys, "inspect", random_checkpoint, "--json", "--config", file)[1])
    assert data["memory_plan"]["max_context"] == 96


def test_an_api_key_file_must_hold_one(
    capsys: pytest.CaptureFixture[str], random_checkpoint: Path, tmp_path: Path
) -> None:
    """S6."""
    for content in (None, " \n"):
        file = tmp_path / "key"
        if content is not None:
            file.write_text(content)
        code, _, err = run(capsys, "run", random_checkpoint, "--api-key-file", file)
        assert code == 1
        assert "api-key-file" in err
    assert "api-key-file" in run(capsys, "run", random_checkpoint, "--api-key", "a key that ps would show")[2]


def out_of_memory(*arguments: object) -> NoReturn:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def test_too_little_memory_is_one_line(
    capsys: pytest.CaptureFixture[str], random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R11. Before the weights are read, and when another program takes the memory meanwhile."""
    generate = ("generate", random_checkpoint, "--prompt", "Hi", "--max-context", "64")
    monkeypatch.setattr("nanoserve.startup.load", out_of_memory)
    code, _, late = run(capsys, *generate)
    assert code == 1
    assert re.search(r"error: the memory ran out .* [0-9.]+ MB are needed, .* and [0-9.]+ GB are left", late)
    assert "Traceback" not in late
    monkeypatch.setenv("NANOSERVE_MEMORY_FRACTION", "1e-9")
    for arguments in (generate, ("run", random_checkpoint, "--port", "0")):
        code, _, err = run(capsys, *arguments)
        assert code == 1
        assert re.search(r"do not fit a budget of \S+ B: weights need [0-9.]+ ", err)
        assert err.count("\n") == 1


def test_modelopts_own_checkpoints_inspect(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name in ("nano_nvfp4", "super_mixed", "lightning_w4a16"):
        full = json.loads(run(capsys, "inspect", DATA / name, "--json")[1])
        bare = tmp_path / name
        bare.mkdir()
        for file in (DATA / name).glob("*.json"):
            shutil.copy(file, bare)
        from_json = json.loads(run(capsys, "inspect", bare, "--json")[1])
        assert from_json["source"] == "config files only"
        assert from_json["modules"] == full["modules"], name
        # Calibrated KV scales and the router's bias in F32 are in the tensors alone.
        for context, families in from_json["bytes_per_token"].items():
            assert families["total"] == pytest.approx(full["bytes_per_token"][context]["total"], rel=1e-3)


@pytest.mark.parametrize(
    ("shell", "env", "words"),
    [
        ("| head -c 1", {}, ""),
        ("> /dev/full", {}, "No space left"),
        ("> /dev/null", {"PYTHONIOENCODING": "ascii"}, ""),
    ],
)
def test_output_that_cannot_be_written_is_no_traceback(
    random_checkpoint: Path, shell: str, env: dict[str, str], words: str
) -> None:
    arguments = f"generate {random_checkpoint} --prompt Hi --max-tokens 60 --seed 1 {shell}"
    command, own = f"{sys.executable} -m nanoserve {arguments}", {**os.environ, **env}
    done = subprocess.run(command, shell=True, env=own, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
    assert words in done.stderr


def test_closed_output_is_no_traceback(random_checkpoint: Path) -> None:
    command = f"{sys.executable} -m nanoserve inspect {random_checkpoint} >&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_cannot_be_generated_is_refused_before_weights_are_read(
    capsys: pytest.CaptureFixture[str], make_checkpoint: Make
) -> None:
    bare, whole = make_checkpoint("bare", tokenizer=False), make_checkpoint("whole")
    for arguments in ([bare, "--prompt", "x"], [whole, "--prompt", "x", "--temperature", "-1"]):
        assert main(["generate", *map(str, arguments), "--device", "cpu"]) == 1
        error = capsys.readouterr().err
        assert error.startswith("nanoserve: error: ")
        assert "weights" not in error


def test_a_wildcard_origin_is_refused_before_weights_are_read(
    capsys: pytest.CaptureFixture[str], random_checkpoint: Path
) -> None:
    assert main(["run", str(random_checkpoint), "--device", "cpu", "--port", "0", "--cors-origin", "*"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
