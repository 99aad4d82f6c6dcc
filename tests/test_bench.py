"""The benchmark: its numbers on a tiny checkpoint, the released shapes' bytes, and the picture."""

import json
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from conftest import DATA

from nanoserve import bench, traffic
from nanoserve.bench_report import picture
from nanoserve.cache import CacheShape
from nanoserve.checkpoint import open_checkpoint
from nanoserve.cli import main
from nanoserve.config import EngineConfig, ShapeName
from nanoserve.dense import dense
from nanoserve.energy import metered
from nanoserve.inspection import inspect_checkpoint
from nanoserve.kernels.linear import expert
from nanoserve.models.config import NemotronHConfig
from nanoserve.plan import token_bytes, weights_by_format
from nanoserve.quantization import Format
from nanoserve.request import Request, SamplingParams, Token
from nanoserve.shapes import prepare_shape, random_fields, shape_checkpoint
from nanoserve.startup import Prepared, assemble, load_engine, prepare
from nanoserve.traffic import token_traffic

CPU = torch.device("cpu")


def quiet(done: int, total: int) -> None:
    """No progress."""


@pytest.fixture(autouse=True)
def small_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bus of the test machine is not the point."""
    monkeypatch.setattr(traffic, "_CPU_BYTES", 8 << 20)


def plenty(device: torch.device) -> int:
    """Memory for any model."""
    return 10**12


def run(*arguments: str) -> None:
    assert main(["bench", "--device", "cpu", *arguments]) == 0


def test_a_result_has_every_number(
    random_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result.json"
    run(str(random_checkpoint), "--isl", "24", "--osl", "9", "--requests", "3", "--breakdown", "--out", str(out))
    result = json.loads(out.read_text())
    assert result["shape"] is None
    assert result["device"] == "cpu"
    assert len(result["requests"]) == 2
    assert result["options"] == {
        "isl": 24, "osl": 9, "requests": 3, "temperature": 1.0, "seed": 0, "breakdown": True,
    }  # fmt: skip
    tpot = sorted(request["tpot_ms"] for request in result["requests"])
    assert result["tpot_ms"]["p50"] == pytest.approx(sum(tpot) / 2)
    assert tpot[0] <= result["tpot_ms"]["p99"] <= tpot[1]
    assert result["itl_ms"]["p50"] <= result["itl_ms"]["p99"]
    wall = sum(request["ttft_ms"] + 8 * request["tpot_ms"] for request in result["requests"]) / 1e3
    assert 9 / wall < result["output_tok_s"] <= 18.01 / wall
    assert result["total_tok_s"] == pytest.approx(result["output_tok_s"] * 33 / 9)
    moved = result["bytes_per_token"]
    assert moved["total"] == sum(count for name, count in moved.items() if name != "total")
    assert result["floor_ms"] == pytest.approx(moved["total"] / result["bandwidth_tb_s"] / 1e9)
    assert result["tpot_over_floor"] == pytest.approx(result["tpot_ms"]["p50"] / result["floor_ms"])
    assert (result["tokens_per_joule"], result["energy"]["joules"]) == (None, None)
    assert "CPU" in result["energy"]["source"]
    assert result["memory"]["extra"] > 0
    assert 4 <= result["routing"]["distinct_experts"] <= 16
    check_breakdown(result["breakdown"])
    assert "TPOT / floor" in capsys.readouterr().out


def check_breakdown(rows: list[dict[str, Any]]) -> None:
    """SMALL is MEM*E-ME*E: three Mamba layers, two of attention, four of experts, one MLP."""
    calls = {row["family"]: row["calls"] for row in rows if "calls" in row}
    kinds = ("mamba mamba_decode", "attention attention_decode", "moe moe_add")
    assert tuple(calls[kind] for kind in kinds) == (3, 2, 4)
    assert (calls["head"], calls["sample"]) == (1, 1)
    families = [row for row in rows if row["family"] not in ("step", "rest")]
    assert all(row["us"] > 0 and row["bytes"] > 0 for row in families)
    step, rest = rows[-2:]
    assert step["us"] == pytest.approx(rest["us"] + sum(row["us"] for row in families))


def test_bytes_are_those_of_the_tensors_that_are_loaded(random_checkpoint: Path) -> None:
    prepared = prepare(open_checkpoint(random_checkpoint), EngineConfig(device="cpu", max_context=64))
    engine = load_engine(prepared, quiet)
    planned = token_bytes(prepared.config, prepared.manifest, prepared.shape, 50)
    counted = token_traffic(engine, 50)
    assert counted.keys() == planned.keys()
    assert counted["attention"] == planned["attention"] - 2 * 2 * 4, "scales of the KV cache become numbers"
    for family in ("embedding", "head", "router", "experts", "shared", "latent", "mlp", "state", "kv"):
        assert counted[family] == planned[family], family
    # What is kept as float32 was BF16 in the file: norms and convolution.
    for family in ("norms", "mamba"):
        assert planned[family] < counted[family] < 2.01 * planned[family], family


@pytest.mark.parametrize(
    ("name", "gigabytes", "weights"), [("nano", 2.99, 19.34), ("lightning", 2.52, 18.87), ("super", 12.99, 74.43)]
)
def test_the_released_shapes_move_the_bytes_counted_by_hand(
    name: ShapeName, gigabytes: float, weights: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a context of 2,048 and FP8 KV, from configs alone; weights are the releases' without the MTP blocks."""
    monkeypatch.setattr("nanoserve.startup.free_memory", plenty)
    prepared = prepare_shape(name, EngineConfig(device="cpu", max_context=64))
    shape = CacheShape(0, 16, torch.float8_e4m3fn, torch.bfloat16)
    moved = token_bytes(prepared.config, prepared.manifest, shape, 2048)
    assert sum(moved.values()) / 1e9 == pytest.approx(gigabytes, rel=0.01)
    assert sum(weights_by_format(prepared.manifest).values()) / 1e9 == pytest.approx(weights, rel=0.01)


RELEASED = {
    "nano": "3-Nano-30B-A3B-NVFP4",
    "lightning": "3.5-Lightning-30B-A3B-NVFP4",
    "super": "3-Super-120B-A12B-NVFP4",
}


@pytest.mark.parametrize("name", get_args(ShapeName))
def test_the_shapes_are_the_releases_geometries(name: ShapeName) -> None:
    released = json.loads((DATA / "released" / f"{RELEASED[name]}_config.json").read_text())
    want = NemotronHConfig.from_json(released)
    got = NemotronHConfig.from_json(shape_checkpoint(name).config)
    assert got == replace(want, mtp_layers=0)


def test_nano_has_the_releases_precision_in_every_module(tmp_path: Path) -> None:
    for kind in ("config", "hf_quant_config"):
        text = (DATA / "released" / f"{RELEASED['nano']}_{kind}.json").read_text()
        (tmp_path / f"{kind}.json").write_text(text)
    released = inspect_checkpoint(open_checkpoint(tmp_path, weights=False), EngineConfig(device="cpu"))
    shape = inspect_checkpoint(shape_checkpoint("nano"), EngineConfig(device="cpu"))
    assert shape.modules() == released.modules()


def test_supers_exceptions_are_in_their_layers() -> None:
    modules = inspect_checkpoint(shape_checkpoint("super"), EngineConfig(device="cpu")).modules()
    one = {
        "1.mixer.shared_experts.down_proj": "nvfp4", "41.mixer.shared_experts.up_proj": "bf16",
        "8.mixer.shared_experts.down_proj": "bf16", "69.mixer.o_proj": "fp8", "7.mixer.o_proj": "bf16",
        "5.mixer.fc1_latent_proj": "fp8", "5.mixer.fc2_latent_proj": "bf16", "22.mixer.in_proj": "bf16",
        "40.mixer.in_proj": "fp8", "38.mixer.in_proj": "bf16", "38.mixer.out_proj": "fp8",
    }  # fmt: skip
    assert {name: modules[f"backbone.layers.{name}"] for name in one} == one
    quantised = [name.rpartition(".")[2] for name, form in modules.items() if form == "fp8"]
    counts = [quantised.count(part) for part in ("in_proj", "out_proj")]
    assert (counts, modules["lm_head"]) == ([28, 29], "bf16")


def cut(name: ShapeName, monkeypatch: pytest.MonkeyPatch) -> Prepared:
    """A released shape, narrowed until a CPU can run it."""
    from nanoserve import shapes

    read = shapes._read  # pyright: ignore[reportPrivateUsage]
    smaller = {
        "hidden_size": 96, "vocab_size": 512, "num_attention_heads": 4, "head_dim": 16, "mamba_num_heads": 8,
        "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2, "n_routed_experts": 16,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 64,
    }  # fmt: skip
    if name == "super":
        smaller["moe_latent_size"] = 32

    def narrowed(name: ShapeName) -> dict[str, Any]:
        data = read(name)
        return {**data, "config": {**data["config"], **smaller}}

    monkeypatch.setattr(shapes, "_read", narrowed)
    return prepare_shape(name, EngineConfig(device="cpu", max_context=64))


@pytest.mark.parametrize("name", get_args(ShapeName))
def test_random_weights_are_in_the_shapes_formats_and_answer_with_numbers(
    name: ShapeName, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = cut(name, monkeypatch)
    seen: list[tuple[int, int]] = []
    fields = random_fields(prepared.manifest, CPU, lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == sum(item.nbytes for item in prepared.manifest.items)
    for item in prepared.manifest.items:
        if item.entry.is_linear:
            value = fields[item.layer, item.entry.field]
            rows = value.data.dim() == 3 and value.data.shape[0] == 16
            assert rows == (item.entry.family == "experts")
            matrix = value.rows(0, 8) if not rows else expert(value, 0).rows(0, 8)
            width = matrix.shape[1]
            assert 0.5 < matrix.std() * width**0.5 < 3, "a product is about as large as what goes in"
        elif item.entry.field == "gate":
            wanted = torch.float32 if name == "nano" else torch.bfloat16
            assert fields[item.layer, "gate"].dtype == wanted
    assert any(item.format is Format.NVFP4 for item in prepared.manifest.items)
    engine = assemble(prepared, fields)
    request = Request((5, 6, 7), SamplingParams(max_tokens=6, seed=1, ignore_eos=True))
    ids = [event.id for event in engine.generate(request) if isinstance(event, Token)]
    assert len(set(ids)) > 3


def test_random_routing_is_spread_over_the_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = cut("nano", monkeypatch)
    engine = assemble(prepared, random_fields(prepared.manifest, CPU, quiet))
    spread = bench.routing_spread(engine)
    assert spread is not None
    assert spread["by_chance"] == pytest.approx(16 * (1 - (1 - 2 / 16) ** 63))
    assert spread["distinct_experts"] > 0.8 * spread["by_chance"]


def test_percentiles_lie_between_neighbours() -> None:
    assert bench.percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5
    assert bench.percentile([1.0, 2.0], 99) == pytest.approx(1.99)
    assert bench.percentile([7.0], 99) == 7.0


def test_the_energy_of_a_cpu_is_not_measured_and_says_so() -> None:
    with metered(CPU) as energy:
        pass
    assert energy.joules is None
    assert energy.source == "nothing measures the energy of a CPU"


def test_the_dense_product_is_timed_on_every_backend_that_runs() -> None:
    told: list[str] = []
    rows = dense(CPU, 1e10, told.append, shapes=((64, 32), (48, 64)), tokens=(1, 3), cold=1 << 12)
    assert [(row["backend"], row["n"], row["k"], row["m"]) for row in rows] == [
        ("torch", 64, 32, 1), ("torch", 64, 32, 3), ("torch", 48, 64, 1), ("torch", 48, 64, 3),
    ]  # fmt: skip
    first = rows[0]
    assert first["tb_s"] == pytest.approx((64 * 32 / 2 + 64 * 2) / first["us"] / 1e6)
    assert first["of_bus"] == pytest.approx(first["tb_s"] / 0.01)
    assert len(told) >= 4


def result(shape: str | None, device: str, tpot: float, file: str) -> dict[str, Any]:
    return {
        "shape": shape, "model": "m<1>", "device": device, "bandwidth_tb_s": 4.45, "floor_ms": 0.67,
        "tpot_ms": {"p50": tpot}, "file": file,
    }  # fmt: skip


def test_the_picture_is_to_scale_and_has_the_peers_of_the_same_card() -> None:
    results = [
        result("nano", "NVIDIA H200", 1.34, "graph"),
        result("nano", "NVIDIA H200", 5.46, "eager"),
        result(None, "cpu", 3.0, "here"),
    ]
    root = ET.fromstring(picture(results))
    space = "{http://www.w3.org/2000/svg}"
    texts = [element.text or "" for element in root.iter(f"{space}text")]
    assert sum("vLLM" in text for text in texts) == 1
    assert {"nano on NVIDIA H200", "m<1> on cpu", "nanoserve (graph)", "1.34 ms"} <= set(texts)
    assert any("measured 22 November 2026" in text for text in texts)
    widths = {
        text: float(bar.attrib["width"])
        for text, bar in zip(
            [text for text in texts if text.endswith(" ms")],
            [rect for rect in root.iter(f"{space}rect") if rect.get("fill") != "white"],
            strict=True,
        )
    }
    assert widths["1.34 ms"] == pytest.approx(widths["5.46 ms"] * 1.34 / 5.46, abs=0.2)
    assert widths["0.67 ms"] == pytest.approx(widths["1.34 ms"] / 2, abs=0.2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--shape", "nano", "model"), ("shape", "MODEL")),
        (("--osl", "1"), ("osl is 1", "at least 2")),
        (("--requests", "1"), ("requests is 1", "at least 2")),
        (("--isl", "60", "--osl", "9", "--max-context", "64"), ("isl and osl are 60 and 9", "64")),
        (("--plot", "x.svg"), ("plot", "results")),
        (("--plot", "x.svg", "missing.json"), ("missing.json",)),
        (("--temperature", "-1"), ("temperature",)),
    ],
)
def test_what_cannot_be_run_is_told(
    arguments: tuple[str, ...], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--device", "cpu", *arguments]) == 1
    told = capsys.readouterr().err
    assert all(word in told for word in words)


def test_a_file_that_holds_no_result_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_text("[1]")
    assert main(["bench", "--plot", str(tmp_path / "x.svg"), str(tmp_path / "a.json")]) == 1
    assert "holds no benchmark" in capsys.readouterr().err
