"""The demo's export without ModelOpt: tensors merged, JSON repaired, calibration read, the result checked."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanoserve.checkpoint import open_checkpoint
from nanoserve.errors import CheckpointError, ConfigError
from nanoserve.kernels import nvfp4
from nanoserve.models.config import NemotronHConfig
from nanoserve.models.demo.export import clean, excluding_mtp, merge, read_sequences
from nanoserve.models.demo.export_check import MIX, report
from nanoserve.models.manifest import Kind, entries
from nanoserve.quantization import Format
from nanoserve.random_checkpoint import write_random_checkpoint

RESIDUE = ".\0backbone.pt_name_sentinel"
BIAS = "backbone.layers.1.mixer.gate.e_score_correction_bias"
EXPERT = "backbone.layers.1.mixer.experts.3.up_proj.weight"


def quantised(name: str, weight: Tensor, stored: Format) -> dict[str, Tensor]:
    if stored is Format.NVFP4:
        data, scales, scale = nvfp4.pack(weight.float())
        return {f"{name}.weight": data, f"{name}.weight_scale": scales, f"{name}.weight_scale_2": scale}
    scale = weight.float().abs().max() / 448
    data = (weight.float() / scale).to(torch.float8_e4m3fn)
    return {f"{name}.weight": data, f"{name}.weight_scale": scale, f"{name}.input_scale": torch.tensor(0.1)}


def as_exported(source: dict[str, Tensor], config: NemotronHConfig) -> dict[str, Tensor]:
    """What ModelOpt would write: the mix, no MTP block, every other float but the router's bias in BF16."""
    out = {
        name: tensor if name.endswith("_correction_bias") else tensor.bfloat16()
        for name, tensor in source.items()
        if not name.startswith("mtp.")
    }
    for _, prefix, entry in entries(config):
        if entry.kind is Kind.SCALE:
            out[prefix + entry.name] = torch.tensor(0.02)
        elif entry.is_linear and entry.family in MIX:
            for copy in range(config.experts if entry.kind is Kind.EXPERTS else 1):
                name = prefix + entry.name.format(copy)
                out |= quantised(name, source[f"{name}.weight"], MIX[entry.family])
    return out


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_random_checkpoint(tmp_path_factory.mktemp("bf16"), recipe="bf16", mtp=True)
    tensors = load_file(directory / "model.safetensors")
    name = "backbone.layers.0.mixer.A_log"
    tensors[name] = tensors[name].float() + 1e-6  # a value that BF16 does not hold
    save_file(tensors, directory / "model.safetensors")
    return directory


@pytest.fixture
def merged(source: Path) -> dict[str, Tensor]:
    tensors = load_file(source / "model.safetensors")
    config = NemotronHConfig.from_json(open_checkpoint(source).config)
    return merge(as_exported(tensors, config), tensors)


def written(source: Path, out: Path, tensors: dict[str, Tensor]) -> Path:
    (out / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file(tensors, out / "model.safetensors")
    return out


def test_merging_keeps_the_source_s_bits(source: Path, merged: dict[str, Tensor]) -> None:
    original = load_file(source / "model.safetensors")
    assert list(merged) == sorted(merged)
    for name in ("backbone.layers.0.mixer.A_log", BIAS, "mtp.layers.0.eh_proj.weight"):
        assert merged[name].dtype is original[name].dtype
        assert torch.equal(merged[name], original[name])
    assert merged[EXPERT].dtype is torch.uint8


@pytest.mark.parametrize(
    ("exported", "message"),
    [
        ({"a": torch.ones(2)}, "was not exported"),
        ({"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(1)}, "no such tensor"),
        ({"a": torch.ones(2), "b": torch.zeros(2)}, "changed it"),
        ({"a": torch.ones(2), "b": torch.ones(1, 2)}, "changed it"),
    ],
)
def test_merging_refuses(exported: dict[str, Tensor], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        merge(exported, {"a": torch.ones(2), "b": torch.ones(2), "mtp.x": torch.ones(1)})


def test_names_lose_the_exporter_s_residue() -> None:
    dirty: dict[str, Any] = {
        "ignore": [f"lm_head{RESIDUE}"],
        "layers": {f"a.b{RESIDUE}": {"group_size": 16, "dynamic": False, "quant_algo": "FP8"}},
    }
    repaired = {
        "ignore": ["lm_head"],
        "layers": {"a.b": {"group_size": 16, "dynamic": False, "quant_algo": "FP8"}},
    }
    assert clean(dirty) == clean(repaired) == repaired


@pytest.mark.parametrize("listed", [{}, {"ignore": None}, {"ignore": []}, {"ignore": ["mtp*"]}])
def test_mtp_is_excluded_once(listed: dict[str, Any]) -> None:
    assert excluding_mtp({"quant_algo": "FP8", **listed}, "ignore") == {"quant_algo": "FP8", "ignore": ["mtp*"]}


def test_sequences_are_read(tmp_path: Path) -> None:
    file = tmp_path / "tokens.jsonl"
    file.write_text("[1, 2]\n\n[0]\n")
    assert read_sequences(file, 3) == [[1, 2], [0]]


@pytest.mark.parametrize("text", ["", "[]", "[3]", "[-1]", "[true]", "[1.0]", "{}", "1", "[1"])
def test_other_sequences_are_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "tokens.jsonl"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"tokens\.jsonl"):
        read_sequences(file, 3)


def test_a_faithful_export_passes(source: Path, merged: dict[str, Tensor], tmp_path: Path) -> None:
    table = report(source, written(source, tmp_path, merged))
    assert f"{(tmp_path / 'model.safetensors').stat().st_size:,}" in table
    assert json.loads((tmp_path / "config.json").read_text())["num_nextn_predict_layers"] == 1


def test_faults_are_found(source: Path, merged: dict[str, Tensor], tmp_path: Path) -> None:
    packed = merged[EXPERT]
    faults = {
        "relative error": {EXPERT: (packed << 4) | (packed >> 4)},
        "differs": {BIAS: merged[BIAS].bfloat16().float()},
    }
    for message, fault in faults.items():
        with pytest.raises(CheckpointError, match=message):
            report(source, written(source, tmp_path, merged | fault))
    del merged["mtp.layers.0.norm.weight"]
    with pytest.raises(CheckpointError, match="differs"):
        report(source, written(source, tmp_path, merged))
