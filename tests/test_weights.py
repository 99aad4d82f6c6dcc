"""Strict both ways, before weights are read where the headers tell; scales are checked as they are read."""

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanoserve.checkpoint import open_checkpoint
from nanoserve.config import EngineConfig
from nanoserve.errors import CheckpointError, MemoryPlanError
from nanoserve.models.config import NemotronHConfig
from nanoserve.request import Finish, Request, SamplingParams
from nanoserve.startup import load_engine, prepare
from nanoserve.weights import resolve

Make = Callable[..., Path]
Edit = Callable[[dict[str, Tensor]], None]
LAYER = "backbone.layers"


def edited(directory: Path, edit: Edit) -> Path:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)
    return directory


def drop(name: str) -> Edit:
    def edit(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    return edit


def put(name: str, change: Callable[[Tensor], Tensor]) -> Edit:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[name] = change(tensors.get(name, torch.zeros(()))).contiguous()

    return edit


def nan_block(scales: Tensor) -> Tensor:
    codes = scales.view(torch.uint8).clone()
    codes.view(-1)[5] = 0x7F
    return codes.view(torch.float8_e4m3fn)


def negative_block(scales: Tensor) -> Tensor:
    codes = scales.view(torch.uint8).clone()
    codes.view(-1)[5] |= 0x80
    return codes.view(torch.float8_e4m3fn)


def unquantised_expert(tensors: dict[str, Tensor]) -> None:
    tensors[f"{E1}.weight"] = torch.zeros(64, 64).bfloat16()
    del tensors[f"{E1}.weight_scale"], tensors[f"{E1}.weight_scale_2"]


E1 = f"{LAYER}.1.mixer.experts.3.up_proj"
IN0 = f"{LAYER}.0.mixer.in_proj"
BY_HEADER: dict[str, tuple[Edit, str, str]] = {
    "missing norm": (drop(f"{LAYER}.2.norm.weight"), f"{LAYER}.2.norm.weight", "missing"),
    "missing expert": (drop(f"{E1}.weight"), f"{E1}.weight", "missing"),
    "missing block scale": (drop(f"{E1}.weight_scale"), E1, "weight_scale"),
    "missing global scale": (drop(f"{E1}.weight_scale_2"), E1, "weight_scale_2"),
    "missing fp8 scale": (drop(f"{IN0}.weight_scale"), IN0, "weight_scale"),
    "extra tensor": (put("backbone.extra.weight", lambda _: torch.zeros(3)), "backbone.extra.weight", "no such"),
    "extra bias": (put(f"{IN0}.bias", lambda _: torch.zeros(3)), f"{IN0}.bias", "no such"),
    "wrong shape": (put(f"{LAYER}.0.mixer.A_log", lambda t: t[:-1]), f"{LAYER}.0.mixer.A_log", "shape [7]"),
    "transposed": (put(f"{LAYER}.0.mixer.out_proj.weight", lambda t: t.T), "out_proj.weight", "shape"),
    "input scale of another shape": (
        put(f"{IN0}.input_scale", lambda t: torch.ones(7)),
        f"{IN0}.input_scale",
        "[7]",
    ),
    "wrong scale shape": (put(f"{E1}.weight_scale", lambda t: t[:, :-1]), E1, "[64, 3]"),
    "integer norm": (put("backbone.norm_f.weight", lambda t: t.int()), "backbone.norm_f.weight", "I32"),
    "float block scales": (put(f"{E1}.weight_scale", lambda t: t.float()), E1, "weight_scale"),
    "mixed experts": (unquantised_expert, f"{E1}.weight", ""),
}
BY_VALUE: dict[str, tuple[Edit, str]] = {
    "nan block scale": (put(f"{E1}.weight_scale", nan_block), f"{E1}.weight_scale"),
    "negative block scale": (put(f"{E1}.weight_scale", negative_block), f"{E1}.weight_scale"),
    "nan global scale": (put(f"{E1}.weight_scale_2", lambda t: t * torch.nan), f"{E1}.weight_scale_2"),
    "negative global scale": (put(f"{E1}.weight_scale_2", lambda t: -t), f"{E1}.weight_scale_2"),
    "infinite fp8 scale": (put(f"{IN0}.weight_scale", lambda t: t * torch.inf), f"{IN0}.weight_scale"),
    "zero kv scale": (put(f"{LAYER}.3.mixer.v_proj.v_scale", lambda t: t * 0), "v_scale"),
    "nan input scale": (put(f"{IN0}.input_scale", lambda t: t * torch.nan), f"{IN0}.input_scale"),
    "negative kv scale": (put(f"{LAYER}.3.mixer.k_proj.k_scale", lambda t: -t), "k_scale"),
}


@pytest.mark.parametrize("case", BY_HEADER)
def test_headers_tell(case: str, make_checkpoint: Make) -> None:
    """R16."""
    edit, tensor, words = BY_HEADER[case]
    directory = edited(make_checkpoint(tokenizer=False), edit)
    checkpoint = open_checkpoint(directory)
    with pytest.raises(CheckpointError) as caught:
        resolve(checkpoint, NemotronHConfig.from_json(checkpoint.config))
    message = str(caught.value)
    assert "model.safetensors" in message
    assert tensor in message
    assert words in message
    assert "\n" not in message


@pytest.mark.parametrize("case", BY_VALUE)
def test_values_tell(case: str, make_checkpoint: Make) -> None:
    """R16."""
    edit, tensor = BY_VALUE[case]
    directory = edited(make_checkpoint(tokenizer=False), edit)
    prepared = prepare(open_checkpoint(directory), EngineConfig(device="cpu"))
    with pytest.raises(CheckpointError) as caught:
        load_engine(prepared, lambda done, total: None)
    assert tensor in str(caught.value)
    assert "model.safetensors" in str(caught.value)


def test_hostile_names_stay_on_one_line(make_checkpoint: Make) -> None:
    directory = edited(make_checkpoint(tokenizer=False), put("evil\nall fine\x1b[31m", lambda _: torch.zeros(3)))
    checkpoint = open_checkpoint(directory)
    with pytest.raises(CheckpointError) as caught:
        resolve(checkpoint, NemotronHConfig.from_json(checkpoint.config))
    assert str(caught.value).isprintable()


def test_end_ids_beyond_the_vocabulary_end_nothing(make_checkpoint: Make) -> None:
    directory = make_checkpoint(tokenizer=False, overrides={"vocab_size": 8})
    engine = load_engine(prepare(open_checkpoint(directory), EngineConfig(device="cpu")), lambda done, total: None)
    assert engine.end_ids == {2}  # 11 is the other
    request = Request((3,), SamplingParams(max_tokens=4, min_tokens=2))
    assert isinstance(list(engine.generate(request))[-1], Finish)


def test_the_json_must_agree_with_the_tensors(make_checkpoint: Make) -> None:
    directory = make_checkpoint(recipe="nano", tokenizer=False)
    file = directory / "hf_quant_config.json"
    data: dict[str, Any] = json.loads(file.read_text())
    data["quantization"]["exclude_modules"].append(IN0)
    file.write_text(json.dumps(data))
    checkpoint = open_checkpoint(directory)
    with pytest.raises(CheckpointError) as caught:
        resolve(checkpoint, NemotronHConfig.from_json(checkpoint.config))
    assert f"{IN0}.weight" in str(caught.value)
    assert "nvfp4" in str(caught.value)


@pytest.mark.parametrize("recipe", ["bf16", "nano", "lightning", "super"])
def test_every_recipe_loads_and_mtp_is_skipped_knowingly(recipe: str, make_checkpoint: Make) -> None:
    directory = make_checkpoint(recipe=recipe, mtp=True, shards=2, tokenizer=False)
    prepared = prepare(open_checkpoint(directory), EngineConfig(device="cpu"))
    assert prepared.manifest.skipped_mtp == 8
    seen: list[tuple[int, int]] = []
    load_engine(prepared, lambda done, total: seen.append((done, total)))
    assert seen[0][0] == 0
    stored = sum(item.nbytes for item in prepared.manifest.items) + 4 * len(prepared.manifest.unused)
    assert seen[-1][0] == seen[-1][1] == stored


def test_transformers_prefix_is_accepted(make_checkpoint: Make) -> None:
    def rename(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("backbone.")]:
            tensors["model." + name.removeprefix("backbone.")] = tensors.pop(name)

    directory = edited(make_checkpoint(recipe="bf16", tokenizer=False), rename)
    load_engine(prepare(open_checkpoint(directory), EngineConfig(device="cpu")), lambda done, total: None)


def test_a_context_that_does_not_fit_is_refused_with_the_one_that_does(make_checkpoint: Make) -> None:
    directory = make_checkpoint(tokenizer=False, overrides={"max_position_embeddings": 1 << 30})
    with pytest.raises(MemoryPlanError) as caught:
        prepare(open_checkpoint(directory), EngineConfig(device="cpu", max_context=1 << 30))
    assert "--max-context" in str(caught.value)
    with pytest.raises(MemoryPlanError, match="made for 8192"):
        prepare(open_checkpoint(make_checkpoint("b")), EngineConfig(device="cpu", max_context=8193))


def test_loading_takes_the_weights_and_little_more(make_checkpoint: Make) -> None:
    """Peak memory while loading: the weights and one tensor, not a second copy and not the mapped file."""
    sizes = {"hidden_size": 1024, "vocab_size": 65536, "moe_intermediate_size": 512, "n_routed_experts": 32}
    directory = make_checkpoint(recipe="bf16", tokenizer=False, overrides=sizes)
    script = (
        "import resource, sys\n"
        "from nanoserve.checkpoint import open_checkpoint\n"
        "from nanoserve.config import EngineConfig\n"
        "from nanoserve.startup import load_engine, prepare\n"
        "p = prepare(open_checkpoint(sys.argv[1]), EngineConfig(device='cpu', max_context=64))\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "engine = load_engine(p, lambda done, total: None)\n"
        "grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n"
        "print(grown * 1024, sum(p.memory.weights.values()))"
    )
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes on Linux, which is all we run on
    done = subprocess.run(
        [sys.executable, "-c", script, str(directory)], capture_output=True, text=True, check=True
    )
    grown, weights = map(int, done.stdout.split())
    largest = 65536 * 1024 * 2
    assert weights > 250e6
    assert grown < weights + largest


def test_experts_in_one_tensor_are_the_experts_one_by_one(make_checkpoint: Make) -> None:
    """What saving transformers' state dictionary as it is gives."""
    first = make_checkpoint("apart", recipe="bf16", tokenizer=False)

    def stack(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if ".experts.0." in name]:
            parts = [tensors.pop(name.replace(".0.", f".{index}.")) for index in range(16)]
            tensors[name.replace(".experts.0.", ".experts.").removesuffix(".weight")] = torch.stack(parts)

    second = edited(make_checkpoint("stacked", recipe="bf16", tokenizer=False), stack)
    prompt, answers = (5, 9, 300), list[list[object]]()
    for directory in (first, second):
        prepared = prepare(open_checkpoint(directory), EngineConfig(device="cpu"))
        engine = load_engine(prepared, lambda done, total: None)
        answers.append(list(engine.generate(Request(prompt, SamplingParams(max_tokens=8, temperature=0.0)))))
    assert answers[0] == answers[1]


def test_a_mixture_without_its_map_is_read_off_the_tensors(make_checkpoint: Make) -> None:
    directory = make_checkpoint(recipe="super", tokenizer=False)
    for file, key in (("hf_quant_config.json", "quantization"), ("config.json", "quantization_config")):
        data = json.loads((directory / file).read_text())
        del data[key]["quantized_layers"]
        (directory / file).write_text(json.dumps(data))
    load_engine(prepare(open_checkpoint(directory), EngineConfig(device="cpu")), lambda done, total: None)
    (directory / "model.safetensors").unlink()
    checkpoint = open_checkpoint(directory, weights=False)
    with pytest.raises(CheckpointError, match="not which module"):
        resolve(checkpoint, NemotronHConfig.from_json(checkpoint.config))
