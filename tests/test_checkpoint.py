import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from refusals import TWO, read, refused
from safetensors_writer import (
    Spec,
    fill,
    fp8,
    nvfp4,
    write_arrays,
    write_safetensors,
    write_sharded,
)

from nanoserve.checkpoint import TensorInfo, open_checkpoint, stored_format
from nanoserve.errors import CheckpointError
from nanoserve.quantization import Format

INDEX = "model.safetensors.index.json"
A_SHARD, B_SHARD = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
SHARDS: dict[str, dict[str, Spec]] = {
    A_SHARD: {"a.weight": ("BF16", (2, 3))},
    B_SHARD: {"b.weight": ("F32", (4,))},
}


# Sound checkpoints


def test_single_file(home: Path) -> None:
    write_safetensors(home / "model.safetensors", TWO, {})
    checkpoint = open_checkpoint(str(home))
    assert list(checkpoint.tensors) == ["a.weight", "b.weight"]
    info = checkpoint.tensors["b.weight"]
    assert (info.dtype, info.shape, info.file, info.nbytes) == ("F32", (4,), "model.safetensors", 16)
    assert info.offset == (home / "model.safetensors").stat().st_size - 16
    assert read(checkpoint, "a.weight") == fill("BF16", (2, 3), 0)
    assert read(checkpoint, "b.weight") == fill("F32", (4,), 1)
    assert checkpoint.config["eos_token_id"] == 2
    assert checkpoint.generation_config == {}
    assert checkpoint.directory == home


def test_any_single_name_will_do(home: Path) -> None:
    write_safetensors(home / "weights.safetensors", TWO)
    (home / "._weights.safetensors").write_bytes(b"left by a file manager")
    assert open_checkpoint(home).tensors["a.weight"].file == "weights.safetensors"


def test_scalars_empty_tensors_and_small_dtypes(home: Path) -> None:
    tensors: dict[str, Spec] = {
        "scalar": ("F32", ()),
        "nothing": ("BF16", (0, 4)),
        "e4m3": ("F8_E4M3", (3,)),
        "u8": ("U8", (5, 1)),
    }
    write_safetensors(home / "model.safetensors", tensors)
    checkpoint = open_checkpoint(home)
    assert {name: (info.dtype, info.shape) for name, info in checkpoint.tensors.items()} == tensors
    assert [read(checkpoint, name) for name in tensors] == [
        fill(*spec, index) for index, spec in enumerate(tensors.values())
    ]


def test_given_bytes_come_back(home: Path) -> None:
    write_arrays(home / "model.safetensors", {"x": ("U8", (2,), b"\x07\x09"), "y": ("F32", (), b"abcd")})
    checkpoint = open_checkpoint(home)
    assert (read(checkpoint, "x"), read(checkpoint, "y")) == (b"\x07\x09", b"abcd")


def test_shards(home: Path) -> None:
    write_sharded(home, SHARDS)
    checkpoint = open_checkpoint(home)
    assert {name: info.file for name, info in checkpoint.tensors.items()} == {
        "a.weight": A_SHARD,
        "b.weight": B_SHARD,
    }
    assert read(checkpoint, "b.weight") == fill("F32", (4,), 0)


def test_shards_of_a_hub_cache_are_links_and_the_name_is_the_models(tmp_path: Path) -> None:
    blobs = tmp_path / "models--nvidia--Tiny-3" / "blobs"
    snapshot = tmp_path / "models--nvidia--Tiny-3" / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "config.json").write_text("{}")
    write_sharded(blobs, SHARDS)
    for number, blob in enumerate(list(blobs.iterdir())):
        blob.rename(blobs / f"{number:040x}")
        (snapshot / blob.name).symlink_to(Path("../../blobs") / f"{number:040x}")
    checkpoint = open_checkpoint(snapshot)
    assert checkpoint.name == "Tiny-3"
    assert read(checkpoint, "a.weight") == fill("BF16", (2, 3), 0)


def test_name_is_the_directorys(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    assert open_checkpoint(".", weights=False).name == home.name


def test_tilde_is_expanded(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(home.parent))
    assert open_checkpoint(f"~/{home.name}", weights=False).directory == home


def test_prefix_of_transformers_5_is_canonical(home: Path) -> None:
    write_safetensors(home / "model.safetensors", {"model.norm_f.weight": ("BF16", (2,))})
    info = open_checkpoint(home).tensors["backbone.norm_f.weight"]
    assert info.name == "model.norm_f.weight"


def test_json_alone_is_enough_to_inspect(home: Path) -> None:
    assert open_checkpoint(home, weights=False).tensors == {}
    (home / INDEX).write_text(json.dumps({"weight_map": {"a": A_SHARD}}))
    assert open_checkpoint(home, weights=False).tensors == {}
    write_safetensors(home / A_SHARD, {"a": ("U8", (1,))})
    assert list(open_checkpoint(home, weights=False).tensors) == ["a"]


def test_quantization_is_read_from_both_files(home: Path) -> None:
    algorithm = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}
    (home / "hf_quant_config.json").write_text(json.dumps({"quantization": algorithm}))
    quantization = open_checkpoint(home, weights=False).quantization
    assert quantization.format_of("lm_head") is Format.FP8
    assert quantization.kv_cache_fp8


@pytest.mark.parametrize(
    ("config", "generation", "ids"),
    [
        (2, [2, 11], (2, 11)),
        ([11], 2, (2, 11)),
        (None, 7, (7,)),
        (7, None, (7,)),
        (None, None, ()),
    ],
)
def test_end_tokens_are_the_union(tmp_path: Path, config: Any, generation: Any, ids: tuple[int, ...]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": config}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert open_checkpoint(tmp_path, weights=False).eos_token_ids == ids


def test_bare_infinity_and_duplicate_keys_pass_in_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"time_step_limit": [0.0, Infinity], "x": 1, "x": 2}')
    config = open_checkpoint(tmp_path, weights=False).config
    assert config["time_step_limit"] == [0.0, float("inf")]
    assert config["x"] == 2


# Directories and JSON files that are refused


def test_not_a_directory(home: Path) -> None:
    assert "download" in refused("nvidia/NVIDIA-Nemotron-3-Nano").problem
    assert "is a file" in refused(home / "config.json").problem
    refused("nul\0byte")
    refused("~nobody-has-this-name/x")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "hf_quant_config.json", INDEX])
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"3", b"\xff{}", b'{"a": ' + b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"],
    ids=["empty", "cut", "list", "number", "not-utf8", "deep", "huge-number"],
)
def test_bad_json_file_is_named(home: Path, name: str, content: bytes) -> None:
    """R16."""
    write_safetensors(home / "model.safetensors", TWO)
    (home / name).write_bytes(content)
    assert refused(home).file == name


def test_config_is_needed(tmp_path: Path) -> None:
    error = refused(tmp_path)
    assert error.file == "config.json"
    assert "missing" in error.problem


def test_dangling_link_is_not_an_absent_file(home: Path) -> None:
    (home / "generation_config.json").symlink_to("../../blobs/gone")
    assert refused(home, weights=False).file == "generation_config.json"


@pytest.mark.timeout(20)
def test_pipes_and_directories_are_not_files(home: Path) -> None:
    os.mkfifo(home / "model.safetensors")
    assert "regular" in refused(home).problem
    (home / "generation_config.json").mkdir()
    assert refused(home).file == "generation_config.json"


@pytest.mark.parametrize("value", ["2", True, -1, 2.0, [2, None], [[2]], {"a": 1}])
def test_bad_end_token(tmp_path: Path, value: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": value}))
    error = refused(tmp_path, weights=False)
    assert error.file == "config.json"
    assert "eos_token_id" in error.problem


def test_no_weights(home: Path) -> None:
    assert refused(home).file == "model.safetensors"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickles_are_refused_unopened(home: Path, name: str) -> None:
    """R16, S1."""
    os.mkfifo(home / name)  # opening it would hang
    error = refused(home)
    assert error.file == name
    assert "safetensors" in error.problem


def test_code_and_pickles_beside_the_weights_are_left_alone(home: Path) -> None:
    (home / "config.json").write_text('{"auto_map": {"AutoConfig": "evil.Config"}}')
    write_safetensors(home / "model.safetensors", TWO)
    for name in ("evil.py", "pytorch_model.bin"):
        os.mkfifo(home / name)
    assert len(open_checkpoint(home).tensors) == 2


# Indices that are refused


def test_several_files_need_an_index(home: Path) -> None:
    write_sharded(home, SHARDS)
    (home / INDEX).unlink()
    assert refused(home).file == INDEX


@pytest.mark.parametrize("weight_map", [None, [], {}, "x"])
def test_bad_weight_map(home: Path, weight_map: object) -> None:
    write_sharded(home, SHARDS)
    (home / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert "weight_map" in refused(home).problem


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/x.safetensors",
        "d/x.safetensors",
        "d\\x.safetensors",
        "..",
        "",
        ".safetensors",
        "x.bin",
        "x\n.safetensors",
        "\ud800.safetensors",
        3,
        None,
    ],
)
def test_index_names_plain_files_only(home: Path, name: object) -> None:
    """R16."""
    (home / "d").mkdir()
    for place in (home.parent / "x.safetensors", home / "d" / "x.safetensors", home / A_SHARD):
        write_safetensors(place, {"a": ("U8", (1,))})
    (home / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    error = refused(home)
    assert (error.file, error.tensor) == (INDEX, "a")


def test_missing_shard(home: Path) -> None:
    """R16."""
    write_sharded(home, SHARDS)
    (home / B_SHARD).unlink()
    error = refused(home)
    assert error.file == B_SHARD
    assert "missing" in error.problem


def rewrite_index(home: Path, placed: Mapping[str, str]) -> None:
    (home / INDEX).write_text(json.dumps({"weight_map": placed}))


def test_tensor_in_shard_but_not_in_index(home: Path) -> None:
    write_sharded(home, {**SHARDS, B_SHARD: {**SHARDS[B_SHARD], "stray": ("U8", (1,))}})
    rewrite_index(home, {"a.weight": A_SHARD, "b.weight": B_SHARD})
    error = refused(home)
    assert (error.file, error.tensor) == (B_SHARD, "stray")
    assert INDEX in error.problem


def test_tensor_in_index_but_not_in_shard(home: Path) -> None:
    write_sharded(home, SHARDS)
    rewrite_index(home, {"a.weight": A_SHARD, "b.weight": B_SHARD, "c": A_SHARD})
    error = refused(home)
    assert (error.file, error.tensor) == (A_SHARD, "c")


def test_tensor_in_another_shard_than_the_index_says(home: Path) -> None:
    write_sharded(home, SHARDS)
    rewrite_index(home, {"a.weight": B_SHARD, "b.weight": A_SHARD})
    error = refused(home)
    assert (error.file, error.tensor) == (A_SHARD, "a.weight")
    assert B_SHARD in error.problem


def test_tensor_in_two_shards(home: Path) -> None:
    write_sharded(home, {A_SHARD: TWO, B_SHARD: {**SHARDS[B_SHARD], "c": ("U8", (1,))}})
    error = refused(home)
    assert (error.file, error.tensor) == (B_SHARD, "b.weight")
    assert A_SHARD in error.problem


def test_both_spellings_of_a_name(home: Path) -> None:
    both: dict[str, Spec] = {"model.x": ("U8", (1,)), "backbone.x": ("U8", (1,))}
    write_safetensors(home / "model.safetensors", both)
    assert "same tensor" in refused(home).problem


# Reading


def test_file_that_shrinks_after_opening(home: Path) -> None:
    write_safetensors(home / "model.safetensors", TWO)
    checkpoint = open_checkpoint(home)
    os.truncate(home / "model.safetensors", (home / "model.safetensors").stat().st_size - 3)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: b\.weight: ends 3 bytes too early"):
        read(checkpoint, "b.weight")


def test_file_that_disappears_after_opening(home: Path) -> None:
    write_safetensors(home / "model.safetensors", TWO)
    checkpoint = open_checkpoint(home)
    (home / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: b\.weight"):
        read(checkpoint, "b.weight")


@pytest.mark.parametrize(("size", "start"), [(13, 0), (12, 1), (1, 12)])
def test_buffer_for_more_than_the_tensor_has(home: Path, size: int, start: int) -> None:
    write_safetensors(home / "model.safetensors", TWO)
    checkpoint = open_checkpoint(home)
    with pytest.raises(ValueError, match="12 bytes"):
        checkpoint.read_into(checkpoint.tensors["a.weight"], memoryview(bytearray(size)), start)


def test_reads_a_part_of_a_tensor(home: Path) -> None:
    write_safetensors(home / "model.safetensors", TWO)
    checkpoint = open_checkpoint(home)
    some = bytearray(7)
    checkpoint.read_into(checkpoint.tensors["b.weight"], memoryview(some), 5)
    assert some == fill("F32", (4,), 1)[5:12]


def test_reads_into_a_part_of_a_larger_buffer_of_any_item_type(home: Path) -> None:
    write_safetensors(home / "model.safetensors", TWO)
    checkpoint = open_checkpoint(home)
    whole = bytearray(32)
    checkpoint.read_into(checkpoint.tensors["b.weight"], memoryview(whole)[8:24].cast("i"))
    assert whole == bytes(8) + fill("F32", (4,), 1) + bytes(8)


def test_reads_that_end_early_go_on(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_safetensors(home / "model.safetensors", TWO)
    checkpoint = open_checkpoint(home)
    preadv = os.preadv

    def five_bytes(file: int, views: list[memoryview], at: int) -> int:
        return preadv(file, [views[0].cast("B")[:5]], at)

    monkeypatch.setattr(os, "preadv", five_bytes)
    whole = bytearray(16)
    checkpoint.read_into(checkpoint.tensors["b.weight"], memoryview(whole).cast("i"))
    assert whole == fill("F32", (4,), 1)


def test_empty_matrix(home: Path) -> None:
    write_safetensors(home / "model.safetensors", {"nothing": ("F32", (0, 4))})
    checkpoint = open_checkpoint(home)
    checkpoint.read_into(checkpoint.tensors["nothing"], np.empty((0, 4), np.float32).data)


# Formats by tensors


def tensors_of(specs: Mapping[str, Spec]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(name, dtype, shape, "f", 0, 0) for name, (dtype, shape) in specs.items()}


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_plain_format(dtype: str) -> None:
    assert stored_format(tensors_of({"m.weight": (dtype, (2, 2))}), "m") is Format.BF16


def test_quantised_formats() -> None:
    assert stored_format(tensors_of(fp8("m", 4, 32)), "m") is Format.FP8
    assert stored_format(tensors_of({**fp8("m", 4, 32), "m.weight_scale": ("F32", (1,))}), "m") is Format.FP8
    with_input = {**nvfp4("m", 4, 32), "m.input_scale": ("F32", ())}
    assert stored_format(tensors_of(with_input), "m") is Format.NVFP4


@pytest.mark.parametrize(
    "specs",
    [
        {"m.weight": ("I64", (2, 2))},
        {"m.weight": ("U8", (2, 8))},
        {"m.weight": ("F8_E4M3", (2, 16))},
        {"m.weight": ("BF16", (2, 16)), "m.weight_scale": ("F32", ())},
        {"m.weight": ("BF16", (2, 16)), "m.weight_scale_2": ("F32", ())},
        {**fp8("m", 2, 16), "m.weight_scale": ("F32", (2,))},
        {**fp8("m", 2, 16), "m.weight_scale": ("BF16", ())},
        {**fp8("m", 2, 16), "m.weight_scale_2": ("F32", ())},
        {**nvfp4("m", 2, 32), "m.weight_scale": ("F8_E4M3", (2, 1))},
        {**nvfp4("m", 2, 32), "m.weight_scale": ("F8_E4M3", (128, 4))},
        {**nvfp4("m", 2, 32), "m.weight_scale": ("U8", (2, 2))},
        {**nvfp4("m", 2, 32), "m.weight_scale_2": ("F32", (2,))},
        {**nvfp4("m", 2, 32), "m.weight": ("U8", (2, 17)), "m.weight_scale": ("F8_E4M3", (2, 2))},
        {**nvfp4("m", 2, 32), "m.weight": ("U8", (32,)), "m.weight_scale": ("F8_E4M3", (4,))},
        {name: spec for name, spec in nvfp4("m", 2, 32).items() if name != "m.weight_scale_2"},
        {name: spec for name, spec in nvfp4("m", 2, 32).items() if name != "m.weight_scale"},
    ],
)
def test_tensors_that_make_no_format(specs: dict[str, Spec]) -> None:
    with pytest.raises(CheckpointError, match=re.escape("f: m.weight: ")):
        stored_format(tensors_of(specs), "m")


def test_missing_weight_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"m\.weight: the tensor is missing"):
        stored_format({}, "m")


def test_a_file_without_tensors_is_refused(home: Path) -> None:
    write_safetensors(home / "model.safetensors", {})
    error = refused(home)
    assert (error.file, "no tensors" in str(error)) == ("model.safetensors", True)
    assert refused(home, weights=False).file == "model.safetensors"
