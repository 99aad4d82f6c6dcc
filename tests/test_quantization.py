import time
from typing import Any

import pytest

from nanoserve.errors import CheckpointError, UnsupportedModel
from nanoserve.quantization import Format, Quantization, parse

BF16, FP8, NVFP4 = Format.BF16, Format.FP8, Format.NVFP4
LAYER = "backbone.layers."
MODULE = f"{LAYER}0.mixer.in_proj"
RESIDUE = ".\0backbone.pt_name_sentinel"


def hf(**quantization: Any) -> Quantization:
    return parse({}, {"producer": {"name": "modelopt"}, "quantization": quantization})


def config(**quantization: Any) -> Quantization:
    return parse({"quantization_config": {"quant_method": "modelopt", **quantization}}, None)


def both(hf_part: dict[str, Any], config_part: dict[str, Any]) -> Quantization:
    return parse({"quantization_config": config_part}, {"quantization": hf_part})


def group(bits: int, targets: list[Any], **weights: Any) -> dict[str, Any]:
    size = {"group_size": 16} if bits == 4 else {}
    return {
        "weights": {"dynamic": False, "num_bits": bits, "type": "float", **size, **weights},
        "targets": targets,
    }


def test_no_json_says_nothing() -> None:
    quantization = parse({"model_type": "nemotron_h", "quantization_config": None}, None)
    assert quantization.format_of("lm_head") is None
    assert not quantization.kv_cache_fp8
    assert quantization.source == "config.json"


@pytest.mark.parametrize(
    ("algorithm", "stored"), [("NVFP4", NVFP4), ("W4A16_NVFP4", NVFP4), ("FP8", FP8), (None, BF16)]
)
def test_one_algorithm_for_all(algorithm: str | None, stored: Format) -> None:
    for quantization in (hf(quant_algo=algorithm), config(quant_algo=algorithm)):
        for module in (
            "0.mixer.in_proj",
            "1.mixer.experts.7.up_proj",
            "1.mixer.fc1_latent_proj",
            "5.mixer.q_proj",
        ):
            assert quantization.format_of(LAYER + module) is stored
        assert quantization.format_of("lm_head") is stored


@pytest.mark.parametrize(
    "module",
    [
        LAYER + "1.mixer.gate",
        LAYER + "0.mixer.conv1d",
        LAYER + "0.mixer.norm",
        LAYER + "0.norm",
        "backbone.embeddings",
        "backbone.norm_f",
    ],
)
@pytest.mark.parametrize(
    "rule",
    [
        {"quant_algo": "NVFP4"},
        {"quantized_layers": {"backbone": {"quant_algo": "FP8"}}},
        {"quantized_layers": {"backbone*": {"quant_algo": "FP8"}}},
    ],
    ids=["all", "container", "glob"],
)
def test_rules_for_many_are_about_projections(module: str, rule: dict[str, Any]) -> None:
    quantization = hf(**rule)
    assert quantization.format_of(module) is BF16
    assert quantization.format_of(LAYER + "0.mixer.in_proj") in (FP8, NVFP4)


@pytest.mark.parametrize("key", ["exclude_modules", "ignore"])
def test_exclusions_are_names_containers_and_globs(key: str) -> None:
    names = ["lm_head", LAYER + "5.mixer", LAYER + "1.*", "mtp*", "*.8.mixer.in_pro?", "*.9.mixer"]
    quantization = hf(quant_algo="NVFP4", **{key: names})
    for module in (
        "lm_head",
        LAYER + "5.mixer.q_proj",
        LAYER + "1.mixer.experts.0.up_proj",
        "mtp.layers.0.mixer.q_proj",
        LAYER + "8.mixer.in_proj",
        LAYER + "9.mixer.up_proj",
    ):
        assert quantization.format_of(module) is BF16, module
    for module in ("50.mixer.q_proj", "10.mixer.in_proj", "8.mixer.out_proj"):
        assert quantization.format_of(LAYER + module) is NVFP4, module


def test_exclusion_with_stars_on_both_sides() -> None:
    quantization = hf(quant_algo="FP8", exclude_modules=["*lm_head*", "*.shared_experts.*"])
    assert quantization.format_of("lm_head") is BF16
    assert quantization.format_of(LAYER + "1.mixer.shared_experts.up_proj") is BF16
    assert quantization.format_of(LAYER + "1.mixer.experts.0.up_proj") is FP8


MIXED: dict[str, Any] = {
    "quant_algo": "MIXED_PRECISION",
    "kv_cache_quant_algo": "FP8",
    "exclude_modules": ["backbone.embeddings", LAYER + "1.mixer.gate", "mtp*"],
    "quantized_layers": {
        LAYER + "0.mixer.in_proj": {"quant_algo": "FP8"},
        LAYER + "1.mixer.experts.0.up_proj": {"quant_algo": "NVFP4", "group_size": 16},
        LAYER + "1.mixer.experts.1.up_proj": {"quant_algo": "W4A16_NVFP4", "group_size": 16},
        LAYER + "3.mixer.experts": {"quant_algo": "NVFP4"},
        "lm_head": {"quant_algo": None},
    },
}


@pytest.mark.parametrize(
    ("module", "stored"),
    [
        (LAYER + "0.mixer.in_proj", FP8),
        (LAYER + "0.mixer.out_proj", None),
        (LAYER + "1.mixer.experts.0.up_proj", NVFP4),
        (LAYER + "1.mixer.experts.1.up_proj", NVFP4),
        (LAYER + "1.mixer.experts.10.up_proj", None),
        (LAYER + "3.mixer.experts.17.down_proj", NVFP4),
        (LAYER + "3.mixer.shared_experts.down_proj", None),
        (LAYER + "1.mixer.gate", BF16),
        (LAYER + "3.mixer.gate", None),
        ("mtp.layers.1.mixer.experts.0.up_proj", BF16),
        ("lm_head", BF16),
    ],
)
def test_map_of_modules(module: str, stored: Format | None) -> None:
    quantization = hf(**MIXED)
    assert quantization.format_of(module) is stored
    assert quantization.kv_cache_fp8
    assert quantization.source == "hf_quant_config.json"


def test_the_nearest_container_wins() -> None:
    layers = {LAYER + "1.mixer": {"quant_algo": "FP8"}, LAYER + "1.mixer.experts": {"quant_algo": "NVFP4"}}
    quantization = hf(quantized_layers=layers, exclude_modules=[LAYER + "1.mixer.experts.3"])
    assert quantization.format_of(LAYER + "1.mixer.shared_experts.up_proj") is FP8
    assert quantization.format_of(LAYER + "1.mixer.experts.2.up_proj") is NVFP4
    assert quantization.format_of(LAYER + "1.mixer.experts.3.up_proj") is BF16


def test_config_groups_with_all_linear_layers() -> None:
    groups = {"group_0": group(4, ["Linear"])}
    quantization = config(config_groups=groups, ignore=["lm_head"], quant_algo="NVFP4")
    assert quantization.format_of(LAYER + "0.mixer.in_proj") is NVFP4
    assert quantization.format_of("lm_head") is BF16
    assert quantization.source == "config.json"


def test_config_groups_with_names_and_globs() -> None:
    groups = {
        "group_0": group(8, [LAYER + "0.mixer.in_proj", "*.shared_experts.*"]),
        "group_1": group(4, [LAYER + "1.mixer.experts", "lm_head"]),
    }
    quantization = config(config_groups=groups, quant_algo="MIXED_PRECISION")
    assert quantization.format_of(LAYER + "0.mixer.in_proj") is FP8
    assert quantization.format_of(LAYER + "1.mixer.shared_experts.up_proj") is FP8
    assert quantization.format_of(LAYER + "1.mixer.experts.5.up_proj") is NVFP4
    assert quantization.format_of("lm_head") is NVFP4
    assert quantization.format_of(LAYER + "0.mixer.out_proj") is None


def test_older_config_json_that_wraps_the_other_files_object() -> None:
    wrapped = {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}
    quantization = parse({"quantization_config": wrapped}, None)
    assert quantization.format_of("lm_head") is FP8
    assert quantization.kv_cache_fp8


def test_residue_of_the_exporter_and_the_prefix_of_transformers_5_are_cleaned() -> None:
    layers = {"model.layers.0.mixer.in_proj" + RESIDUE: {"quant_algo": "FP8"}}
    groups = {"group_0": group(4, [LAYER + "1.mixer.experts" + RESIDUE])}
    quantization = config(quantized_layers=layers, config_groups=groups, ignore=["lm_head" + RESIDUE])
    assert quantization.format_of(LAYER + "0.mixer.in_proj") is FP8
    assert quantization.format_of(LAYER + "1.mixer.experts.0.up_proj") is NVFP4
    assert quantization.format_of("lm_head") is BF16


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        ({}, False),
        ({"kv_cache_quant_algo": None}, False),
        ({"kv_cache_quant_algo": "FP8"}, True),
        ({"kv_cache_scheme": None}, False),
        ({"kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}}, True),
    ],
)
def test_kv_cache(quantization: dict[str, Any], expected: bool) -> None:
    assert config(quant_algo="FP8", **quantization).kv_cache_fp8 is expected


# Two files


def test_a_mixture_may_leave_its_map_to_the_tensors() -> None:
    stub = {"quantization": {"quant_algo": "MIXED_PRECISION", "exclude_modules": ["lm_head"]}}
    alone = parse({}, stub)
    assert (alone.declared, alone.names_modules) == (True, False)
    assert (alone.format_of(MODULE), alone.format_of("lm_head")) == (None, Format.BF16)
    whole = parse({"quantization_config": {"quantized_layers": {MODULE: {"quant_algo": "FP8"}}}}, stub)
    assert (whole.names_modules, whole.format_of(MODULE)) == (True, Format.FP8)


def test_files_that_agree() -> None:
    layers = {"lm_head": {"quant_algo": "NVFP4"}}
    quantization = both(
        {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers, "kv_cache_quant_algo": "FP8"},
        {"quant_algo": "MIXED_PRECISION", "config_groups": {"group_0": group(4, ["lm_head"])}},
    )
    assert quantization.format_of("lm_head") is NVFP4
    assert quantization.kv_cache_fp8
    assert quantization.source == "hf_quant_config.json and config.json"


def test_one_file_may_say_more_than_the_other() -> None:
    quantization = both(
        {"quantized_layers": {"lm_head": {"quant_algo": "NVFP4"}}},
        {"quantized_layers": {LAYER + "0.mixer.in_proj": {"quant_algo": "FP8"}}},
    )
    assert quantization.format_of("lm_head") is NVFP4
    assert quantization.format_of(LAYER + "0.mixer.in_proj") is FP8


@pytest.mark.parametrize(
    "config_part",
    [
        {"quantized_layers": {"lm_head": {"quant_algo": "FP8"}}},
        {"quant_algo": "NVFP4", "ignore": ["lm_head"]},
        {"quant_algo": "NVFP4", "ignore": ["lm*"]},
        {"quant_algo": "FP8"},
    ],
)
def test_named_contradictions_are_found_at_once(config_part: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError) as caught:
        both({"quantized_layers": {"lm_head": {"quant_algo": "NVFP4"}}}, config_part)
    assert (caught.value.file, caught.value.tensor) == ("hf_quant_config.json", "lm_head")
    assert "config.json" in caught.value.problem


def test_contradiction_that_no_file_names_is_found_when_the_module_is() -> None:
    quantization = both({"quant_algo": "NVFP4"}, {"quant_algo": "FP8"})
    with pytest.raises(CheckpointError, match=r"nvfp4 here and fp8 in config\.json"):
        quantization.format_of("lm_head")


def test_contradictory_kv_cache() -> None:
    scheme = {"dynamic": False, "num_bits": 8, "type": "float"}
    with pytest.raises(CheckpointError, match="KV cache"):
        both({"quant_algo": "FP8", "kv_cache_quant_algo": None}, {"quant_algo": "FP8", "kv_cache_scheme": scheme})


# What is refused


@pytest.mark.parametrize(
    ("quantization", "named"),
    [
        ({"quant_algo": "INT4_AWQ"}, "INT4_AWQ"),
        ({"quant_algo": "FP8_PB_WO"}, "FP8_PB_WO"),
        ({"quant_algo": "nvfp4"}, "nvfp4"),
        ({"quant_algo": ["NVFP4"]}, "quant_algo"),
        ({"quant_algo": "NVFP4", "group_size": 32}, "group_size is 32"),
        ({"quantized_layers": {"lm_head": {"quant_algo": "NVFP4", "group_size": 8}}}, "lm_head"),
        ({"quantized_layers": {"lm_head": {"quant_algo": "MXFP8"}}}, "MXFP8"),
        ({"quantized_layers": {"lm_head": {"quant_algo": "MIXED_PRECISION"}}}, "lm_head"),
        ({"config_groups": {"g": group(4, ["Linear"], group_size=32)}}, "group_size 32"),
        ({"config_groups": {"g": group(4, ["Linear"], type="int")}}, "type int"),
        ({"config_groups": {"g": group(8, ["Linear"], strategy="channel")}}, "strategy channel"),
        ({"config_groups": {"g": group(8, ["Linear"], group_size=128)}}, "group_size 128"),
        ({"config_groups": {"g": group(6, ["Linear"])}}, "num_bits 6"),
        ({"quant_algo": "FP8", "kv_cache_quant_algo": "NVFP4"}, "kv_cache_quant_algo is NVFP4"),
        ({"quant_algo": "FP8", "kv_cache_scheme": {"num_bits": 4, "type": "float"}}, "kv_cache_scheme"),
        ({"quant_algo": "FP8", "kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": True}}, "dynamic"),
        ({"quant_algo": "FP8", "quant_method": "compressed-tensors"}, "compressed-tensors"),
    ],
)
def test_unsupported(quantization: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        config(**quantization)
    assert caught.value.file == "config.json"
    assert named in str(caught.value)


@pytest.mark.parametrize(
    "quantization",
    [
        None,
        [],
        {},
        {"quantized_layers": []},
        {"quantized_layers": {"lm_head": "FP8"}},
        {"quantized_layers": {"lm_head": {}}},
        {"config_groups": {"g": {"targets": ["Linear"]}}},
        {"config_groups": {"g": []}},
        {"config_groups": {"g": group(8, ["re:.*proj"])}},
        {"config_groups": {"g": group(8, [3])}},
        {"quant_algo": "FP8", "exclude_modules": "lm_head"},
        {"quant_algo": "FP8", "exclude_modules": [None]},
        {"quant_algo": "FP8", "config_groups": {"g": group(4, ["Linear"])}},
        {"quantized_layers": {"lm_head": {"quant_algo": "FP8"}}, "exclude_modules": ["lm_head"]},
        {"quantized_layers": {"lm_head": {"quant_algo": "FP8"}}, "exclude_modules": ["*head"]},
    ],
)
def test_malformed(quantization: object) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse({}, {"quantization": quantization})
    assert not isinstance(caught.value, UnsupportedModel)
    assert caught.value.file == "hf_quant_config.json"


def test_messages_stay_on_one_line() -> None:
    for name, entry in (("m", {"quant_algo": "a\n\x1b[0m" + "b" * 999}), ("m\n", "\ud800" * 999)):
        with pytest.raises(CheckpointError) as caught:
            hf(quantized_layers={name * 999: entry})
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 500


def test_maps_of_the_largest_release_are_quick() -> None:
    """Super lists 41,100 modules in both files; looking for globs module by module would take minutes."""
    names = [f"{LAYER}{layer}.mixer.experts.{expert}.up_proj" for layer in range(80) for expert in range(512)]
    layers = {name: {"quant_algo": "NVFP4", "group_size": 16} for name in names}
    part: dict[str, Any] = {
        "quantized_layers": layers,
        "exclude_modules": ["mtp*", *map("*.{}.x".format, range(80))],
    }
    began = time.process_time()
    quantization = both(part, part)
    assert all(quantization.format_of(name) is NVFP4 for name in names)
    assert time.process_time() - began < 10
