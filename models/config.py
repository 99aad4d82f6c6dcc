"""The geometry of a Nemotron-H checkpoint: ``config.json`` in every released spelling, or a refusal by name."""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from nanoserve.errors import UnsupportedModel

_LETTERS = {
    "mamba": "M",
    "linear_attention": "M",
    "attention": "*",
    "full_attention": "*",
    "moe": "E",
    "mlp": "-",
}
_FILE = "config.json"
_UNBOUNDED = 1e30
"""``time_step_limit`` is infinite in every release; some writers put a huge finite number."""

_MUST_BE: Mapping[str, object] = {
    "tie_word_embeddings": False,
    "residual_in_fp32": False,
    "use_bias": False,
    "mlp_bias": False,
    "attention_bias": False,
    "mamba_proj_bias": False,
    "use_conv_bias": True,
    "sliding_window": None,
    "mlp_hidden_act": "relu2",
    "mamba_hidden_act": "silu",
}
_MUST_BE_WITH_EXPERTS: Mapping[str, object] = {"n_group": 1, "topk_group": 1, "n_shared_experts": 1}


@dataclass(frozen=True, slots=True)
class NemotronHConfig:
    """What the model's mathematics needs, complete and checked.

    Attributes:
        pattern: one letter a layer: M Mamba-2, * attention, E mixture of experts, - dense MLP.
        hidden_size, vocab_size, eps, max_position_embeddings: of the whole model.
        attention_heads, kv_heads, head_dim: of attention layers (no RoPE, whatever the file says).
        mamba_heads, mamba_head_dim, state_size, groups, conv_kernel, chunk_size: of Mamba layers.
        experts, top_k, expert_size, shared_size, latent_size, norm_topk, routed_scale: of expert layers;
            latent_size is None when the experts work at full width.
        mlp_size: of dense layers.
        mtp_layers: 1 when the checkpoint carries a multi-token-prediction block.
    """

    pattern: str
    hidden_size: int
    vocab_size: int
    eps: float
    max_position_embeddings: int
    attention_heads: int
    kv_heads: int
    head_dim: int
    mamba_heads: int
    mamba_head_dim: int
    state_size: int
    groups: int
    conv_kernel: int
    chunk_size: int
    experts: int
    top_k: int
    expert_size: int
    shared_size: int
    latent_size: int | None
    norm_topk: bool
    routed_scale: float
    mlp_size: int
    mtp_layers: int

    @property
    def d_inner(self) -> int:
        """Width of a Mamba layer; ``expand`` in the file is dead."""
        return self.mamba_heads * self.mamba_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels that go through the convolution: x, B and C."""
        return self.d_inner + 2 * self.groups * self.state_size

    @property
    def expert_width(self) -> int:
        """Width at which the routed experts read and write."""
        return self.latent_size or self.hidden_size

    def layers(self, letter: str) -> tuple[int, ...]:
        """Indices of the layers of one kind."""
        return tuple(i for i, kind in enumerate(self.pattern) if kind == letter)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "NemotronHConfig":
        """Read a parsed ``config.json``.

        Raises:
            UnsupportedModel: another architecture, a missing or ill-typed field, or a value that this
                engine does not implement; the message names field and value.
        """
        _refuse_other_architectures(data)
        pattern = _pattern(data)
        fields = _Fields(data)
        _refuse_values(data, _MUST_BE)
        _refuse_time_step_limit(data.get("time_step_limit"))
        mamba, attention, experts, dense = (letter in pattern for letter in "M*E-")
        if experts:
            _refuse_values(data, _MUST_BE_WITH_EXPERTS)
        latent = data.get("moe_latent_size")
        config = cls(
            pattern=pattern,
            hidden_size=fields.size("hidden_size"),
            vocab_size=fields.size("vocab_size"),
            eps=fields.number("layer_norm_epsilon", "norm_eps", "rms_norm_eps", default=1e-5),
            max_position_embeddings=fields.size("max_position_embeddings"),
            attention_heads=fields.size("num_attention_heads", used=attention),
            kv_heads=fields.size("num_key_value_heads", used=attention),
            head_dim=fields.size("head_dim", "attention_head_dim", used=attention),
            mamba_heads=fields.size("mamba_num_heads", used=mamba),
            mamba_head_dim=fields.size("mamba_head_dim", used=mamba),
            state_size=fields.size("ssm_state_size", used=mamba),
            groups=fields.size("n_groups", used=mamba),
            conv_kernel=fields.size("conv_kernel", used=mamba),
            chunk_size=fields.size("chunk_size", default=128),
            experts=fields.size("n_routed_experts", used=experts),
            top_k=fields.size("num_experts_per_tok", used=experts),
            expert_size=fields.size("moe_intermediate_size", used=experts),
            shared_size=fields.size("moe_shared_expert_intermediate_size", used=experts),
            latent_size=fields.size("moe_latent_size") if experts and latent is not None else None,
            norm_topk=fields.flag("norm_topk_prob", default=True),
            routed_scale=fields.number("routed_scaling_factor", default=1.0),
            mlp_size=fields.size("intermediate_size", used=dense),
            mtp_layers=_mtp_layers(data),
        )
        _check_divisions(config)
        return config


class _Fields:
    """Typed access to the file's fields, first spelling that is there."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self._data = data

    def _first(self, names: tuple[str, ...]) -> tuple[str, Any]:
        for name in names:
            if self._data.get(name) is not None:
                return name, self._data[name]
        return names[0], None

    def size(self, *names: str, used: bool = True, default: int | None = None) -> int:
        """A positive integer; 0 when the pattern has no layer that uses it."""
        if not used:
            return 0
        name, value = self._first(names)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 31:
            raise UnsupportedModel(_FILE, f"{name} is {value!r} and must be a positive integer")
        return value

    def number(self, *names: str, default: float) -> float:
        """A positive finite number."""
        name, value = self._first(names)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
            raise UnsupportedModel(_FILE, f"{name} is {value!r} and must be a positive number")
        return float(value)

    def flag(self, name: str, *, default: bool) -> bool:
        """True or false."""
        value = self._data.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise UnsupportedModel(_FILE, f"{name} is {value!r} and must be true or false")
        return value


def _refuse_other_architectures(data: Mapping[str, Any]) -> None:
    names = data.get("architectures")
    model_type = data.get("model_type")
    if model_type not in (None, "nemotron_h") or (model_type is None and not names):
        raise UnsupportedModel(_FILE, f"model_type is {model_type!r}; this engine runs 'nemotron_h' only")
    if names and "NemotronHForCausalLM" not in (names if isinstance(names, list) else [names]):
        raise UnsupportedModel(_FILE, f"architectures is {names!r}; this engine runs 'NemotronHForCausalLM' only")


def _refuse_values(data: Mapping[str, Any], must_be: Mapping[str, object]) -> None:
    for name, value in must_be.items():
        found = data.get(name)
        if found is not None and found != value:
            raise UnsupportedModel(_FILE, f"{name} is {found!r}; this engine implements {value!r} only")


def _refuse_time_step_limit(limit: Any) -> None:
    """Accept absent, and [0, infinity] as Infinity, a huge number or ``{"__float__": "Infinity"}``."""
    if limit is None:
        return
    bounds = [_as_float(bound) for bound in cast("list[Any]", limit)] if isinstance(limit, list) else []
    if len(bounds) != 2 or bounds[0] != 0 or not bounds[1] >= _UNBOUNDED:
        raise UnsupportedModel(
            _FILE,
            f"time_step_limit is {limit!r}; this engine implements [0, Infinity] only (dt is not clamped)",
        )


def _as_float(value: Any) -> float:
    if isinstance(value, Mapping):
        value = cast("Mapping[str, Any]", value).get("__float__")
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _pattern(data: Mapping[str, Any]) -> str:
    """The layers as letters, from either spelling; both must agree when both are there."""
    spelled = data.get("hybrid_override_pattern")
    listed = data.get("layers_block_type")
    found = {
        name: letters
        for name, letters in (
            ("hybrid_override_pattern", _letters("hybrid_override_pattern", spelled)),
            ("layers_block_type", _letters("layers_block_type", listed)),
        )
        if letters is not None
    }
    if not found:
        raise UnsupportedModel(_FILE, "neither hybrid_override_pattern nor layers_block_type is there")
    if len(set(found.values())) > 1:
        raise UnsupportedModel(_FILE, "hybrid_override_pattern and layers_block_type name different layers")
    pattern = next(iter(found.values()))
    count = data.get("num_hidden_layers")
    if count is not None and count != len(pattern):
        raise UnsupportedModel(
            _FILE, f"num_hidden_layers is {count!r} but {next(iter(found))} names {len(pattern)} layers"
        )
    return pattern


def _letters(name: str, value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, str):
        letters = value
    elif isinstance(value, list):
        words = cast("list[Any]", value)
        unknown = [word for word in words if not isinstance(word, str) or word not in _LETTERS]
        if unknown:
            raise UnsupportedModel(_FILE, f"{name} has {unknown[0]!r}; known are {', '.join(_LETTERS)}")
        letters = "".join(_LETTERS[word] for word in words)
    else:
        raise UnsupportedModel(_FILE, f"{name} is {value!r} and must be a string of letters or a list of words")
    strange = set(letters) - set("M*E-")
    if strange or not letters:
        raise UnsupportedModel(_FILE, f"{name} is {value!r}; each layer must be one of M, *, E and -")
    return letters


def _mtp_layers(data: Mapping[str, Any]) -> int:
    count = data.get("num_nextn_predict_layers") or 0
    if isinstance(count, bool) or not isinstance(count, int) or count not in (0, 1):
        raise UnsupportedModel(_FILE, f"num_nextn_predict_layers is {count!r}; this engine knows 0 and 1")
    if count:
        for name in ("mtp_hybrid_override_pattern", "mtp_layers_block_type"):
            if _letters(name, data.get(name)) not in (None, "*E"):
                raise UnsupportedModel(_FILE, f"{name} is {data[name]!r}; this engine knows '*E' only")
    return count


def _check_divisions(config: NemotronHConfig) -> None:
    rules = (
        ("num_attention_heads", config.attention_heads, "num_key_value_heads", config.kv_heads),
        ("mamba_num_heads", config.mamba_heads, "n_groups", config.groups),
    )
    for name, value, divisor_name, divisor in rules:
        if divisor and value % divisor:
            raise UnsupportedModel(_FILE, f"{name} is {value}, which {divisor_name} ({divisor}) does not divide")
    if config.top_k > config.experts:
        raise UnsupportedModel(
            _FILE, f"num_experts_per_tok is {config.top_k} with only {config.experts} n_routed_experts"
        )
