"""Nemotron-H: embedding, layers of one mixer each, final norm, head."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanoserve.kernels.fused import MoeWeights, Norm, tickets
from nanoserve.kernels.linear import Weight
from nanoserve.kernels.table import Ops
from nanoserve.models.config import NemotronHConfig
from nanoserve.models.layers import Attention, Mamba, Mixer, Mlp, MoE, Span

Fields = Mapping[tuple[int | None, str], Any]
"""(layer, field) of the WEIGHTS table → what the loader made of it: a `Weight`, a tensor, or a float."""


@dataclass(frozen=True, slots=True)
class NemotronH:
    """The model over an op table; it holds no state of a sequence.

    Attributes:
        config: its geometry.
        ops: what it computes with.
        dtype: the activations'.
        embeddings: [V, H].
        layers: in their order.
        norms: in front of each layer, and of the head.
        lm_head: [V, H].
    """

    config: NemotronHConfig
    ops: Ops
    dtype: torch.dtype
    embeddings: Tensor
    layers: tuple[Mixer, ...]
    norms: tuple[Norm, ...]
    lm_head: Weight

    @classmethod
    def build(cls, config: NemotronHConfig, ops: Ops, dtype: torch.dtype, fields: Fields) -> "NemotronH":
        """Put loaded weights in their places."""
        layers: list[Mixer] = []
        norms: list[Tensor] = []
        counts = {"M": 0, "*": 0}
        for index, letter in enumerate(config.pattern):
            own = {field: value for (layer, field), value in fields.items() if layer == index}
            layers.append(_mixer(letter, config, ops, counts.get(letter, 0), own))
            norms.append(own["layer_norm"])
            if letter in counts:
                counts[letter] += 1
        whole = {field: value for (layer, field), value in fields.items() if layer is None}
        owned = tuple(Norm(weight, config.eps) for weight in (*norms, whole["norm_f"]))
        return cls(config, ops, dtype, whole["embeddings"], tuple(layers), owned, whole["lm_head"])

    def forward(self, span: Span) -> Tensor:
        """Advance the sequence's state over a span.

        Args:
            span: T tokens.

        Returns:
            The residual stream after the last layer, [T, H]: what `logits` reads.
        """
        stream = self.embeddings[span.ids].to(self.dtype)
        for layer, norm in zip(self.layers, self.norms[:-1], strict=True):
            stream = layer(stream, norm, span)
        return stream

    def logits(self, stream: Tensor, out: Tensor | None = None) -> Tensor:
        """The stream [T, H] → float32 [T, V], in ``out`` if that is given."""
        return self.ops.head(stream, self.norms[-1], self.lm_head, out)


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
            return MoE(ops, _experts(config, own))


def _experts(c: NemotronHConfig, own: dict[str, Any]) -> MoeWeights:
    return MoeWeights(
        gate=own["gate"],
        bias=own["bias"],
        top_k=c.top_k,
        scale=c.routed_scale,
        normalize=c.norm_topk,
        up=own["up"],
        down=own["down"],
        shared_up=own["shared_up"],
        shared_down=own["shared_down"],
        latent_in=own["fc1"] if c.latent_size else None,
        latent_out=own["fc2"] if c.latent_size else None,
        tickets=torch.zeros(tickets(c.hidden_size), dtype=torch.int32, device=own["gate"].device),
    )
