"""Nemotron-H: embedding, layers of one mixer each, final norm, head."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanoserve.kernels.linear import Weight
from nanoserve.kernels.table import Ops
from nanoserve.models.config import NemotronHConfig
from nanoserve.models.layers import Attention, Latent, Layer, Mamba, Mixer, Mlp, MoE, Span

Fields = Mapping[tuple[int | None, str], Any]
"""(layer, field) of the WEIGHTS table → what the loader made of it: a `Weight`, a tensor, or a float."""


@dataclass(frozen=True, slots=True)
class NemotronH:
    """The model over an op table; it holds no state of a sequence. ``dtype`` is the activations'."""

    config: NemotronHConfig
    ops: Ops
    dtype: torch.dtype
    embeddings: Tensor
    layers: tuple[Layer, ...]
    norm_f: Tensor
    lm_head: Weight

    @classmethod
    def build(cls, config: NemotronHConfig, ops: Ops, dtype: torch.dtype, fields: Fields) -> "NemotronH":
        """Put loaded weights in their places."""
        layers: list[Layer] = []
        counts = {"M": 0, "*": 0}
        for index, letter in enumerate(config.pattern):
            own = {field: value for (layer, field), value in fields.items() if layer == index}
            mixer = _mixer(letter, config, ops, counts.get(letter, 0), own)
            layers.append(Layer(own["layer_norm"], mixer))
            if letter in counts:
                counts[letter] += 1
        whole = {field: value for (layer, field), value in fields.items() if layer is None}
        return cls(config, ops, dtype, whole["embeddings"], tuple(layers), whole["norm_f"], whole["lm_head"])

    def forward(self, span: Span) -> Tensor:
        """Advance the sequence's state over a span.

        Args:
            span: T tokens.

        Returns:
            Hidden states after the final norm, [T, H].
        """
        x = self.embeddings[span.ids].to(self.dtype)
        delta: Tensor | None = None
        for layer in self.layers:
            x, normed = self.ops.add_norm(x, delta, layer.norm, self.config.eps)
            delta = layer.mixer(normed, span)
        return self.ops.add_norm(x, delta, self.norm_f, self.config.eps)[1]

    def logits(self, hidden: Tensor) -> Tensor:
        """[T, H] → float32 [T, V]."""
        return self.ops.head(hidden, self.lm_head)


def _mixer(letter: str, config: NemotronHConfig, ops: Ops, index: int, own: dict[str, Any]) -> Mixer:
    match letter:
        case "M":
            names = ("in_proj", "out_proj", "conv_weight", "conv_bias", "a_log", "d", "dt_bias", "norm")
            values = {name: own[name] for name in names}
            values["conv_weight"] = values["conv_weight"].squeeze(1)
            return Mamba(config, ops, index, **values)
        case "*":
            return Attention(config, ops, index, own["q_proj"], own["k_proj"], own["v_proj"], own["o_proj"])
        case "-":
            return Mlp(ops, own["up_proj"], own["down_proj"])
        case _:
            latent = Latent(own["fc1"], own["fc2"]) if config.latent_size else None
            shared = Mlp(ops, own["shared_up"], own["shared_down"])
            return MoE(config, ops, own["gate"], own["bias"], own["up"], own["down"], shared, latent)
