"""Writes small random checkpoints in the released formats: for a first try without a download, tests, benchmarks.

The weights are noise, so the text is noise; everything else (names, formats, JSON, tokeniser) is as released.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor

from nanoserve.errors import ConfigError
from nanoserve.kernels import nvfp4
from nanoserve.models.config import NemotronHConfig
from nanoserve.models.manifest import Entry, Kind, entries
from nanoserve.quantization import Format
from nanoserve.random_tokenizer import write_tokenizer

Recipe = Literal["bf16", "nano", "lightning", "super"]
"""Which release's mix of precisions to imitate: none, Nano-3, 3.5-Lightning or Super."""

SMALL: Mapping[str, Any] = {
    "hybrid_override_pattern": "MEM*E-ME*E",
    "hidden_size": 128,
    "vocab_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "mamba_num_heads": 8,
    "mamba_head_dim": 32,
    "ssm_state_size": 32,
    "n_groups": 2,
    "conv_kernel": 4,
    "chunk_size": 16,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 128,
    "moe_latent_size": 64,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "intermediate_size": 256,
    "max_position_embeddings": 8192,
}
"""The default geometry: every kind of layer, a latent, about a million parameters."""

_ALWAYS: Mapping[str, Any] = {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "auto_map": {"AutoConfig": "configuration_nemotron_h.NemotronHConfig"},  # as released; never loaded
    "layer_norm_epsilon": 1e-5,
    "mlp_hidden_act": "relu2",
    "mamba_hidden_act": "silu",
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "use_conv_bias": True,
    "tie_word_embeddings": False,
    "time_step_limit": [0.0, math.inf],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "dtype": "bfloat16",
}
_W4A4, _W4A16 = "NVFP4", "W4A16_NVFP4"


@dataclass(frozen=True, slots=True)
class _Writer:
    config: NemotronHConfig
    recipe: Recipe
    random: torch.Generator

    def format_of(self, layer: int | None, entry: Entry) -> Format:
        """The release's choice for a module."""
        if self.recipe == "bf16" or not entry.is_linear:
            return Format.BF16
        before_attention = layer is not None and self.config.pattern[layer + 1 : layer + 2] == "*"
        match self.recipe, entry.family:
            case _, "experts":
                return Format.NVFP4
            case "nano", "mamba":
                return Format.BF16 if before_attention else Format.NVFP4
            case "nano", "shared" | "mlp" | "latent":
                return Format.NVFP4
            case "lightning", "shared" | "mlp" | "head":
                return Format.NVFP4
            case "lightning", "mamba":
                return Format.FP8
            case "super", "shared" | "mlp":
                return Format.FP8
            case "super", "mamba":
                return Format.BF16 if before_attention else Format.FP8
            case _:
                return Format.BF16

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the checkpoint."""
        out: dict[str, Tensor] = {}
        for layer, prefix, entry in entries(self.config):
            format_, shape = self.format_of(layer, entry), entry.shape(self.config)
            if entry.kind is Kind.SCALE:
                if self.recipe in ("lightning", "super"):
                    out[prefix + entry.name] = random_values(entry, shape, self.random)
                continue
            if not entry.is_linear:
                values = random_values(entry, shape, self.random)
                wide = entry.field == "bias" or (entry.field == "gate" and self.recipe == "nano")
                out[prefix + entry.name] = values if wide else values.bfloat16()
                continue
            copies = self.config.experts if entry.kind is Kind.EXPERTS else 1
            for copy in range(copies):
                name = prefix + entry.name.format(copy)
                out.update(self._linear(name, random_values(entry, shape, self.random), format_))
        return out

    def _linear(self, name: str, weight: Tensor, format_: Format) -> dict[str, Tensor]:
        match format_:
            case Format.BF16:
                return {f"{name}.weight": weight.bfloat16()}
            case Format.FP8:
                scale = weight.abs().max() / 448
                data = (weight / scale).to(torch.float8_e4m3fn)
                input_scale = torch.tensor(0.02)
                return {f"{name}.weight": data, f"{name}.weight_scale": scale, f"{name}.input_scale": input_scale}
            case Format.NVFP4:
                data, scales, global_scale = nvfp4.pack(weight)
                out = {
                    f"{name}.weight": data,
                    f"{name}.weight_scale": scales,
                    f"{name}.weight_scale_2": global_scale,
                }
                if self.recipe != "lightning":
                    out[f"{name}.input_scale"] = torch.tensor(0.002)
                return out

    def mtp_tensors(self) -> dict[str, Tensor]:
        """A multi-token-prediction block in BF16, pattern "*E", without its experts but the first."""
        c = self.config
        shapes = {
            "0.eh_proj.weight": (c.hidden_size, 2 * c.hidden_size),
            "0.enorm.weight": (c.hidden_size,),
            "0.hnorm.weight": (c.hidden_size,),
            "0.norm.weight": (c.hidden_size,),
            "0.mixer.q_proj.weight": (c.attention_heads * c.head_dim, c.hidden_size),
            "1.norm.weight": (c.hidden_size,),
            "1.mixer.experts.0.up_proj.weight": (c.expert_size, c.expert_width),
            "1.final_layernorm.weight": (c.hidden_size,),
        }
        return {
            f"mtp.layers.{name}": torch.randn(shape, generator=self.random).bfloat16()
            for name, shape in shapes.items()
        }

    def quantization(self) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """(config.json's quantization_config, hf_quant_config.json's quantization), as the release has them."""
        if self.recipe == "bf16":
            return None, None
        four = _W4A16 if self.recipe == "lightning" else _W4A4
        layers: dict[str, dict[str, Any]] = {}
        plain: list[str] = []
        for layer, prefix, entry in entries(self.config):
            if not entry.is_linear:
                continue
            format_ = self.format_of(layer, entry)
            algo = {"quant_algo": four, "group_size": 16} if format_ is Format.NVFP4 else {"quant_algo": "FP8"}
            if format_ is Format.BF16:
                plain.append(prefix + entry.name)
            elif entry.kind is Kind.EXPERTS and self.recipe == "super":
                layers[prefix + "mixer.experts"] = algo
            else:
                copies = self.config.experts if entry.kind is Kind.EXPERTS else 1
                layers.update({prefix + entry.name.format(copy): algo for copy in range(copies)})
        if self.recipe == "nano":
            return None, {
                "quant_algo": _W4A4,
                "kv_cache_quant_algo": "FP8",
                "group_size": 16,
                "exclude_modules": plain,
            }
        mixed = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
        kv = {"kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}, "quant_method": "modelopt"}
        return {**mixed, **kv, "ignore": [*plain, "mtp*"]}, {**mixed, "kv_cache_quant_algo": "FP8"}


def random_values(entry: Entry, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """Random values of a sensible size, float32 on the generator's device; none is constant, so a mix-up shows."""

    def normal(scale: float) -> Tensor:
        return torch.randn(shape, generator=random, device=random.device) * scale

    def uniform() -> Tensor:
        return torch.rand(shape, generator=random, device=random.device)

    match entry.field:
        case "a_log":
            return torch.log(1 + 15 * uniform())
        case "dt_bias":
            return normal(1.0) - 3
        case "bias":
            return normal(0.1)
        case "layer_norm" | "norm_f" | "norm" | "d":
            return 1 + normal(0.1)
        case "conv_weight" | "embeddings":
            return normal(0.5)
        case "k_scale" | "v_scale":
            return 0.01 + 0.01 * uniform()
        case _:
            return normal(1.5 / math.sqrt(shape[-1]))


def write_random_checkpoint(
    directory: Path,
    *,
    recipe: Recipe = "lightning",
    overrides: Mapping[str, Any] | None = None,
    seed: int = 0,
    shards: int = 1,
    mtp: bool = False,
    tokenizer: bool = True,
) -> Path:
    """Write a checkpoint directory.

    Args:
        directory: made if it is not there.
        recipe: the mix of precisions.
        overrides: entries of config.json that differ from `SMALL`; a None value removes the entry.
        seed: of the weights.
        shards: 1 writes model.safetensors, more write numbered files and an index.
        mtp: add tensors of a multi-token-prediction block.
        tokenizer: add a tokeniser and a chat template (vocab_size of 512 or more).

    Returns:
        The directory.

    Raises:
        ConfigError: an unknown recipe.
        UnsupportedModel: overrides that this engine does not implement.
    """
    if recipe not in get_args(Recipe):
        raise ConfigError(f"recipe is {recipe!r} and must be one of {', '.join(get_args(Recipe))}")
    data = {**_ALWAYS, **SMALL, **(overrides or {})}
    if mtp:
        data |= {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}
    data = {name: value for name, value in data.items() if value is not None}
    config = NemotronHConfig.from_json(data)
    writer = _Writer(config, recipe, torch.Generator().manual_seed(seed))
    directory.mkdir(parents=True, exist_ok=True)
    in_config, in_file = writer.quantization()
    if in_config:
        data["quantization_config"] = in_config
    if in_file:
        producer = {"name": "nanoserve", "version": "random"}
        _write_json(directory / "hf_quant_config.json", {"producer": producer, "quantization": in_file})
    _write_json(directory / "config.json", data)
    _write_json(
        directory / "generation_config.json", {"eos_token_id": [2, 11], "bos_token_id": 1, "pad_token_id": 0}
    )
    _save(directory, writer.tensors() | (writer.mtp_tensors() if mtp else {}), shards)
    if tokenizer:
        write_tokenizer(directory, config.vocab_size)
    return directory


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1), encoding="utf-8")


def _save(directory: Path, tensors: dict[str, Tensor], shards: int) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        own = {name: tensors[name] for name in names[shard::shards]}
        save_file(own, directory / file)
        weight_map |= dict.fromkeys(own, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    _write_json(
        directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )
