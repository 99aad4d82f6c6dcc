"""transformers' NemotronH as the reference, over checkpoints expanded by an independent dequantiser."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


def e4m3_values() -> NDArray[np.float32]:
    """All 256 values of float8_e4m3fn, from the format's definition."""
    values = np.zeros(256, np.float32)
    for byte in range(256):
        sign, exponent, mantissa = byte >> 7, (byte >> 3) & 15, byte & 7
        if exponent == 15 and mantissa == 7:
            value = np.nan
        elif exponent == 0:
            value = mantissa / 8 * 2.0**-6
        else:
            value = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        values[byte] = -value if sign else value
    return values


def e2m1_values() -> NDArray[np.float32]:
    """All 16 values of FP4 E2M1, from the format's definition."""
    values = np.zeros(16, np.float32)
    for code in range(16):
        sign, exponent, mantissa = code >> 3, (code >> 1) & 3, code & 1
        value = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
        values[code] = -value if sign else value
    return values


def expand(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor as plain float32 under its hub name; scales are consumed."""
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.rpartition(".")[2] in ("weight_scale", "weight_scale_2", "input_scale", "k_scale", "v_scale"):
            continue
        if name.startswith("mtp."):
            continue
        if tensor.dtype == torch.uint8:
            codes, table = tensor.numpy(), e2m1_values()
            values = np.empty((codes.shape[0], codes.shape[1] * 2), np.float32)
            values[:, 0::2], values[:, 1::2] = table[codes & 15], table[codes >> 4]
            scale_bytes = tensors[f"{name}_scale"].view(torch.uint8).numpy()
            scales = np.repeat(e4m3_values()[scale_bytes], 16, axis=1)
            out[name] = torch.from_numpy(values * scales * tensors[f"{name}_scale_2"].numpy())
        elif tensor.dtype == torch.float8_e4m3fn:
            values = e4m3_values()[tensor.view(torch.uint8).numpy()]
            out[name] = torch.from_numpy(values * tensors[f"{name}_scale"].numpy())
        else:
            out[name] = tensor.float()
    return out


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of every shard."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    return tensors


def write_twin(directory: Path, target: Path) -> Path:
    """The checkpoint in plain float32, which transformers loads."""
    target.mkdir(parents=True)
    config = json.loads((directory / "config.json").read_text())
    for name in ("quantization_config", "auto_map"):
        config.pop(name, None)
    config |= {"dtype": "float32", "num_nextn_predict_layers": 0}
    (target / "config.json").write_text(json.dumps(config))
    save_file(expand(read_tensors(directory)), target / "model.safetensors", metadata={"format": "pt"})
    return target


def reference_model(twin: Path) -> Any:
    """transformers' model in float32, eager, without the clamp on dt that only its prefill has."""
    from transformers import NemotronHForCausalLM

    model = NemotronHForCausalLM.from_pretrained(
        twin, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    for layer in model.model.layers:
        mixer: Any = layer.mixer
        if hasattr(mixer, "time_step_limit"):
            mixer.time_step_limit = (0.0, float("inf"))
    return model.eval()


@torch.no_grad()
def reference_logits(model: Any, ids: Sequence[int]) -> Tensor:
    """float32 [T, V] for a whole prompt at once, without a cache."""
    return model(torch.tensor([list(ids)]), use_cache=False).logits[0]


@torch.no_grad()
def reference_greedy(model: Any, ids: Sequence[int], count: int) -> list[int]:
    """Greedy continuation, recomputed from scratch at each token: slow, and independent of any cache."""
    tokens = list(ids)
    for _ in range(count):
        tokens.append(int(reference_logits(model, tokens)[-1].argmax()))
    return tokens[len(ids) :]
