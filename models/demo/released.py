"""The trained network in the released format: BF16, experts one by one, ``backbone.`` and ``mtp.`` names."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from nanoserve.models.config import NemotronHConfig
from nanoserve.models.demo.network import Attention, Held, Layer, Mamba, Mlp, MoE, Network
from nanoserve.models.demo.vocabulary import VOCAB_SIZE, write_demo_tokenizer

CONFIG: Mapping[str, Any] = {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "dtype": "bfloat16",
    "hybrid_override_pattern": "MEM*EMEM*EM-M*E",
    "num_hidden_layers": 15,
    "hidden_size": 256,
    "vocab_size": VOCAB_SIZE,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "mamba_num_heads": 8,
    "mamba_head_dim": 64,
    "ssm_state_size": 128,
    "n_groups": 2,
    "conv_kernel": 4,
    "chunk_size": 128,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 256,
    "moe_shared_expert_intermediate_size": 512,
    "moe_latent_size": 128,
    "intermediate_size": 512,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "layer_norm_epsilon": 1e-5,
    "mlp_hidden_act": "relu2",
    "mamba_hidden_act": "silu",
    "use_conv_bias": True,
    "use_bias": False,
    "tie_word_embeddings": False,
    "residual_in_fp32": False,
    "time_step_limit": [0.0, math.inf],
    "num_nextn_predict_layers": 1,
    "mtp_hybrid_override_pattern": "*E",
    "max_position_embeddings": 16384,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
"""The demo's geometry: every kind of layer, 12.4 million parameters and 1.8 million of the MTP block."""

_MATRICES = ("in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")


def named(network: Network) -> dict[str, Tensor]:
    """Every tensor under its released name; writing into one writes into the network."""
    found = {
        "backbone.embeddings.weight": network.embeddings,
        "backbone.norm_f.weight": network.norm_f,
        "lm_head.weight": network.head.weight,
    }
    for index, layer in enumerate(network.layers):
        found |= dict(_layer(f"backbone.layers.{index}.", layer))
    draft = network.draft
    for name in ("enorm", "hnorm", "eh_proj"):
        found[f"mtp.layers.0.{name}.weight"] = getattr(draft, name)
    found["mtp.layers.1.final_layernorm.weight"] = draft.final_layernorm
    found |= dict(_layer("mtp.layers.0.", draft.attention)) | dict(_layer("mtp.layers.1.", draft.moe))
    return {name: tensor.detach() for name, tensor in found.items()}


def tensors(network: Network) -> dict[str, Tensor]:
    """What is written: BF16, but the router's correction bias, which is float32."""
    return {
        name: tensor.cpu().to(torch.float32 if "e_score" in name else torch.bfloat16).contiguous()
        for name, tensor in named(network).items()
    }


def _layer(prefix: str, layer: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    assert isinstance(layer, Layer)
    yield f"{prefix}norm.weight", layer.norm
    yield from _mixer(f"{prefix}mixer.", layer.mixer)


def _mixer(prefix: str, mixer: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    if isinstance(mixer, MoE):
        yield f"{prefix}gate.weight", mixer.gate
        yield f"{prefix}gate.e_score_correction_bias", mixer.bias
        for expert in range(len(mixer.up_proj.weight)):
            yield f"{prefix}experts.{expert}.up_proj.weight", mixer.up_proj.weight[expert]
            yield f"{prefix}experts.{expert}.down_proj.weight", mixer.down_proj.weight[expert]
        yield f"{prefix}fc1_latent_proj.weight", mixer.fc1
        yield f"{prefix}fc2_latent_proj.weight", mixer.fc2
        yield from _mixer(f"{prefix}shared_experts.", mixer.shared)
        return
    assert isinstance(mixer, Mamba | Attention | Mlp)
    for name in _MATRICES:
        if hasattr(mixer, name):
            matrix = getattr(mixer, name)
            yield f"{prefix}{name}.weight", matrix.weight if isinstance(matrix, Held) else matrix
    if isinstance(mixer, Mamba):
        yield f"{prefix}conv1d.weight", mixer.conv_weight.unsqueeze(1)
        yield f"{prefix}conv1d.bias", mixer.conv_bias
        yield f"{prefix}norm.weight", mixer.norm
        for name, tensor in (("A_log", mixer.a_log), ("D", mixer.d), ("dt_bias", mixer.dt_bias)):
            yield prefix + name, tensor


def write(network: Network, directory: Path) -> str:
    """Write the BF16 checkpoint; the SHA-256 of its model.safetensors."""
    directory.mkdir(parents=True, exist_ok=True)
    write_demo_tokenizer(directory)
    write_json(directory / "config.json", CONFIG)
    write_json(
        directory / "generation_config.json", {"eos_token_id": [2, 11], "bos_token_id": 1, "pad_token_id": 0}
    )
    file = directory / "model.safetensors"
    save_file(tensors(network), file, metadata={"format": "pt"})
    return hashlib.sha256(file.read_bytes()).hexdigest()


def config() -> NemotronHConfig:
    """The geometry, checked."""
    return NemotronHConfig.from_json(CONFIG)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """A file as the released ones are written: one value a line."""
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
