"""Released geometries: they parse, and their bytes are those counted by hand from the published configs."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DATA

from nanoserve.cache import CacheShape
from nanoserve.checkpoint import open_checkpoint
from nanoserve.config import EngineConfig
from nanoserve.errors import MemoryPlanError, UnsupportedModel
from nanoserve.inspection import Inspection, inspect_checkpoint
from nanoserve.models.config import NemotronHConfig
from nanoserve.plan import plan_memory, size

RELEASED = DATA / "released"
NANO, NANO_BF16, LIGHTNING, SUPER, ULTRA = (
    "3-Nano-30B-A3B-NVFP4",
    "3-Nano-30B-A3B-BF16",
    "3.5-Lightning-30B-A3B-NVFP4",
    "3-Super-120B-A12B-NVFP4",
    "3-Ultra-550B-A55B-BF16",
)


def released(name: str) -> dict[str, Any]:
    return json.loads((RELEASED / f"{name}_config.json").read_text())


def lightning_quantization() -> dict[str, Any]:
    """The release's map, entry by entry: 46 Mamba projections FP8, all experts and the head weight-only NVFP4."""
    four, layers = {"quant_algo": "W4A16_NVFP4", "group_size": 16}, dict[str, Any]()
    for index, kind in enumerate(released(LIGHTNING)["layers_block_type"]):
        prefix = f"backbone.layers.{index}.mixer"
        if kind == "mamba":
            layers |= {f"{prefix}.{name}": {"quant_algo": "FP8"} for name in ("in_proj", "out_proj")}
        elif kind == "moe":
            owners = [f"experts.{expert}" for expert in range(128)] + ["shared_experts"]
            layers |= {f"{prefix}.{owner}.{name}": four for owner in owners for name in ("up_proj", "down_proj")}
    layers["lm_head"] = four
    return {
        "quantization": {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": "FP8", "quantized_layers": layers}
    }


def inspected(name: str, folder: Path) -> Inspection:
    (folder / "config.json").write_text((RELEASED / f"{name}_config.json").read_text())
    quant = RELEASED / f"{name}_hf_quant_config.json"
    if name == LIGHTNING:
        (folder / "hf_quant_config.json").write_text(json.dumps(lightning_quantization()))
    elif quant.exists():
        (folder / "hf_quant_config.json").write_text(quant.read_text())
    return inspect_checkpoint(open_checkpoint(folder, weights=False), EngineConfig(device="cpu"))


@pytest.mark.parametrize(
    ("name", "layers", "gigabytes"),
    [
        (NANO, (23, 23, 6), (2.991, 3.085, 3.387)),
        (LIGHTNING, (23, 23, 6), (2.524, 2.618, 2.920)),
        (NANO_BF16, (23, 23, 6), None),
    ],
)
def test_bytes_a_token_within_one_percent(
    name: str, layers: tuple[int, ...], gigabytes: tuple[float, ...] | None, tmp_path: Path
) -> None:
    report = inspected(name, tmp_path)
    assert tuple(report.config.pattern.count(letter) for letter in "ME*") == layers
    totals = [value["total"] / 1e9 for value in report.data()["bytes_per_token"].values()]
    assert totals == pytest.approx(gigabytes or (6.56, 6.76, 7.36), rel=0.01)
    assert report.text()


def test_released_configs_parse() -> None:
    config = NemotronHConfig.from_json(released(SUPER))
    assert (config.pattern.count("M"), config.pattern.count("E"), config.pattern.count("*")) == (40, 40, 8)
    assert (config.latent_size, config.expert_width, config.experts, config.top_k) == (1024, 1024, 512, 22)
    assert (config.d_inner, config.conv_dim, config.mtp_layers, config.routed_scale) == (8192, 10240, 1, 5.0)
    config = NemotronHConfig.from_json(released(ULTRA))
    assert (len(config.pattern), config.d_inner, config.latent_size) == (108, 16384, 2048)
    config = NemotronHConfig.from_json(released(NANO))
    assert (config.d_inner, config.conv_dim, config.latent_size, config.expert_width) == (4096, 6144, None, 2688)


def test_parameters_of_nano_are_the_published_count(tmp_path: Path) -> None:
    report = inspected(NANO_BF16, tmp_path)
    total = sum(math.prod(part.shape) * len(part.names) for item in report.manifest.items for part in item.parts)
    router_biases = 23 * 128  # buffers, which parameter counts leave out
    assert total - router_biases == 31_577_937_344


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        ({"model_type": "nemotron_h_puzzle"}, "nemotron_h_puzzle"),
        ({"n_group": 8}, "n_group is 8"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"residual_in_fp32": True}, "residual_in_fp32"),
        ({"use_bias": True}, "use_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mamba_proj_bias": True}, "mamba_proj_bias"),
        ({"use_conv_bias": False}, "use_conv_bias"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"mlp_hidden_act": "silu"}, "mlp_hidden_act"),
        ({"time_step_limit": [0.0, 0.1]}, "time_step_limit"),
        ({"time_step_limit": [0.001, math.inf]}, "time_step_limit"),
        ({"time_step_limit": "none"}, "time_step_limit"),
        ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers"),
        ({"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "E*"}, "mtp_hybrid_override_pattern"),
        ({"hybrid_override_pattern": "MEX"}, "MEX"),
        ({"hybrid_override_pattern": None}, "layers_block_type"),
        ({"hybrid_override_pattern": None, "layers_block_type": ["mamba", "rnn"]}, "rnn"),
        ({"layers_block_type": ["mamba"]}, "different layers"),
        ({"num_hidden_layers": 51}, "num_hidden_layers is 51"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"n_groups": 7}, "n_groups"),
        ({"num_key_value_heads": 5}, "num_key_value_heads"),
        ({"num_experts_per_tok": 129}, "num_experts_per_tok"),
        ({"n_shared_experts": 2}, "n_shared_experts"),
        ({"layer_norm_epsilon": -1}, "layer_norm_epsilon"),
        ({"norm_topk_prob": 1}, "norm_topk_prob"),
        ({"architectures": 5}, "architectures"),
        ({"hybrid_override_pattern": None, "layers_block_type": [["mamba"]]}, "mamba"),
        ({"num_nextn_predict_layers": 1, "mtp_layers_block_type": [[]]}, "mtp_layers_block_type"),
        ({"routed_scaling_factor": 10**400}, "1000"),
        ({"time_step_limit": [0, 10**400]}, "time_step_limit"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        NemotronHConfig.from_json({**released(NANO_BF16), **change})
    assert words in str(caught.value)
    assert str(caught.value).startswith("config.json: ")


@pytest.mark.parametrize(
    "limit", [None, [0.0, math.inf], [0.0, 1e308], [0, {"__float__": "Infinity"}], [0.0, "Infinity"]]
)
def test_every_spelling_of_no_limit_is_accepted(limit: Any) -> None:
    NemotronHConfig.from_json({**released(NANO_BF16), "time_step_limit": limit})


def test_both_spellings_of_layers_are_one() -> None:
    data = released(NANO_BF16)
    words = {"M": "linear_attention", "E": "moe", "*": "full_attention"}
    listed = {**data, "layers_block_type": [words[letter] for letter in data["hybrid_override_pattern"]]}
    assert NemotronHConfig.from_json(listed) == NemotronHConfig.from_json(data)
    del listed["hybrid_override_pattern"], listed["num_hidden_layers"]
    assert NemotronHConfig.from_json(listed) == NemotronHConfig.from_json(data)


@pytest.mark.parametrize(
    ("name", "gigabytes", "fits"), [(NANO, 24, True), (LIGHTNING, 24, True), (NANO_BF16, 24, False)]
)
def test_memory_plans_on_cards(name: str, gigabytes: int, fits: bool, tmp_path: Path) -> None:
    report = inspected(name, tmp_path)
    shape = CacheShape(0, 16, torch.float8_e4m3fn, torch.bfloat16)

    def plan(context: int | None) -> int:
        return plan_memory(
            report.config,
            report.manifest,
            shape,
            wanted_context=context,
            prefill_chunk=512,
            keys_at_once=True,
            available=gigabytes * 10**9,
            fraction=0.95,
        ).max_context

    if not fits:
        with pytest.raises(MemoryPlanError, match="more memory"):
            plan(None)
        return
    assert plan(8192) == 8192
    assert plan(None) > 32768


def test_sizes_for_people() -> None:
    assert [size(n) for n in (0, 999, 1000, 1.5e9, -2e6, 3e15)] == [
        "0 B", "999 B", "1 kB", "1.5 GB", "-2 MB", "3e+03 TB",
    ]  # fmt: skip
