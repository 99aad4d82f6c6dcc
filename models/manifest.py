"""The WEIGHTS table: every tensor of a Nemotron-H checkpoint, its shape, and the field it fills.

Source: the released checkpoints' own names (``backbone.layers.N.mixer.…``).
"""

import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from nanoserve.models.config import NemotronHConfig

Shape = Callable[[NemotronHConfig], tuple[int, ...]]


class Kind(enum.Enum):
    """How a tensor is stored and kept.

    LINEAR may be quantised; EXPERTS is LINEAR once an expert ({} in its name) and becomes one stack.
    STORED keeps the checkpoint's float dtype; FLOAT becomes float32. SCALE is an optional scalar, 1.0 if absent.
    """

    LINEAR = enum.auto()
    EXPERTS = enum.auto()
    STORED = enum.auto()
    FLOAT = enum.auto()
    SCALE = enum.auto()


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of the table.

    Attributes:
        field: where the model keeps it.
        name: tensor name below the layer; for LINEAR and EXPERTS the module's name, without ``.weight``.
        shape: from the configuration; for EXPERTS of one expert.
        kind: how it is stored and kept.
        family: what the per-token byte count files it under.
    """

    field: str
    name: str
    shape: Shape
    kind: Kind
    family: str

    @property
    def is_linear(self) -> bool:
        """A linear layer's weight, which may be quantised."""
        return self.kind in (Kind.LINEAR, Kind.EXPERTS)


def _linear(field: str, name: str, shape: Shape, family: str) -> Entry:
    return Entry(field, name, shape, Kind.LINEAR, family)


def _float(field: str, name: str, shape: Shape, family: str) -> Entry:
    return Entry(field, name, shape, Kind.FLOAT, family)


_MAMBA = (
    _linear(
        "in_proj", "mixer.in_proj", lambda c: (c.d_inner + c.conv_dim + c.mamba_heads, c.hidden_size), "mamba"
    ),
    _linear("out_proj", "mixer.out_proj", lambda c: (c.hidden_size, c.d_inner), "mamba"),
    _float("conv_weight", "mixer.conv1d.weight", lambda c: (c.conv_dim, 1, c.conv_kernel), "mamba"),
    _float("conv_bias", "mixer.conv1d.bias", lambda c: (c.conv_dim,), "mamba"),
    _float("a_log", "mixer.A_log", lambda c: (c.mamba_heads,), "mamba"),
    _float("d", "mixer.D", lambda c: (c.mamba_heads,), "mamba"),
    _float("dt_bias", "mixer.dt_bias", lambda c: (c.mamba_heads,), "mamba"),
    _float("norm", "mixer.norm.weight", lambda c: (c.d_inner,), "mamba"),
)
_ATTENTION = (
    _linear("q_proj", "mixer.q_proj", lambda c: (c.attention_heads * c.head_dim, c.hidden_size), "attention"),
    _linear("k_proj", "mixer.k_proj", lambda c: (c.kv_heads * c.head_dim, c.hidden_size), "attention"),
    _linear("v_proj", "mixer.v_proj", lambda c: (c.kv_heads * c.head_dim, c.hidden_size), "attention"),
    _linear("o_proj", "mixer.o_proj", lambda c: (c.hidden_size, c.attention_heads * c.head_dim), "attention"),
    Entry("k_scale", "mixer.k_proj.k_scale", lambda c: (), Kind.SCALE, "attention"),
    Entry("v_scale", "mixer.v_proj.v_scale", lambda c: (), Kind.SCALE, "attention"),
)
_MLP = (
    _linear("up_proj", "mixer.up_proj", lambda c: (c.mlp_size, c.hidden_size), "mlp"),
    _linear("down_proj", "mixer.down_proj", lambda c: (c.hidden_size, c.mlp_size), "mlp"),
)
_SHARED = "mixer.shared_experts"
_MOE = (
    Entry("gate", "mixer.gate.weight", lambda c: (c.experts, c.hidden_size), Kind.STORED, "router"),
    _float("bias", "mixer.gate.e_score_correction_bias", lambda c: (c.experts,), "router"),
    Entry("up", "mixer.experts.{}.up_proj", lambda c: (c.expert_size, c.expert_width), Kind.EXPERTS, "experts"),
    Entry(
        "down",
        "mixer.experts.{}.down_proj",
        lambda c: (c.expert_width, c.expert_size),
        Kind.EXPERTS,
        "experts",
    ),
    _linear("shared_up", f"{_SHARED}.up_proj", lambda c: (c.shared_size, c.hidden_size), "shared"),
    _linear("shared_down", f"{_SHARED}.down_proj", lambda c: (c.hidden_size, c.shared_size), "shared"),
)
_LATENT = (
    _linear("fc1", "mixer.fc1_latent_proj", lambda c: (c.latent_size or 0, c.hidden_size), "latent"),
    _linear("fc2", "mixer.fc2_latent_proj", lambda c: (c.hidden_size, c.latent_size or 0), "latent"),
)
_LAYER_NORM = (_float("layer_norm", "norm.weight", lambda c: (c.hidden_size,), "norms"),)
_MODEL = (
    Entry(
        "embeddings",
        "backbone.embeddings.weight",
        lambda c: (c.vocab_size, c.hidden_size),
        Kind.STORED,
        "embedding",
    ),
    _float("norm_f", "backbone.norm_f.weight", lambda c: (c.hidden_size,), "norms"),
    _linear("lm_head", "lm_head", lambda c: (c.vocab_size, c.hidden_size), "head"),
)

WEIGHTS = {"M": _MAMBA, "*": _ATTENTION, "-": _MLP, "E": _MOE}
"""Layer letter → its mixer's tensors; `_LATENT`, the layers' norms and the whole model's stand beside it."""


def entries(config: NemotronHConfig) -> Iterator[tuple[int | None, str, Entry]]:
    """Every row that this model needs: (layer or None, prefix of the tensor's name, row)."""
    for entry in _MODEL:
        yield None, "", entry
    for index, letter in enumerate(config.pattern):
        latent = _LATENT if letter == "E" and config.latent_size else ()
        for entry in (*_LAYER_NORM, *WEIGHTS[letter], *latent):
            yield index, f"backbone.layers.{index}.", entry
