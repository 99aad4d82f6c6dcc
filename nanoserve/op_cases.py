"""Every op at a model's shapes, as data: op → (fresh random arguments, what to compare, tolerance).

A case's arguments come from torch's random state, so that a seed gives each backend the same ones.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nanoserve.dense_scales import DENSE, prepare_dense
from nanoserve.experts import EXPERT_OPS, expert_facts, with_prepared
from nanoserve.kernels.fused import MoeWeights, tickets
from nanoserve.kernels.linear import Nvfp4, Weight
from nanoserve.kernels.place import Experts
from nanoserve.kernels.random_inputs import (
    attention_inputs,
    mamba_inputs,
    random_norm,
    random_routing,
    random_tokens,
    random_weight,
)
from nanoserve.kernels.sample import SamplerState
from nanoserve.models.config import NemotronHConfig
from nanoserve.quantization import Format
from nanoserve.weights import DTYPES, Manifest

PREFILL, CONTEXT = 512, 2048
"""Tokens of a prefill case, and of the context that a decode step attends to."""

FEW = 16
"""Tokens of a step of a prompt's end, which is less than `nanoserve.kernels.moe.PREFILL_FROM`."""

_BITS = {Format.NVFP4: 4, Format.FP8: 8, Format.BF16: 16}
_INPUT_SCALE = 1 / 256
"""amax / (6 * 448), where values are a few times 1."""
_DENSE_INPUT_SCALE = {4: _INPUT_SCALE, 8: 1 / 64}
"""Bits of a weight → what what it reads is divided by: for 8 it is amax / 448."""

Arguments = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class OpCase:
    """One op at one shape.

    Attributes:
        op: its name in the table.
        what: the shape, for people.
        tokens: how many it takes.
        make: backend → fresh arguments.
        tolerance: the most that an output may differ from the reference's: ‖a - b‖ / ‖b‖.
        state: indices of arguments that the op writes, of which every tensor is compared too.
    """

    op: str
    what: str
    tokens: int
    make: Callable[[str], Arguments]
    tolerance: float
    state: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Subject:
    """What the cases are made for; data alone, so that another process can make the same.

    Attributes:
        config: the model's geometry.
        formats: (field, bits, shape of one matrix) of its linear weights, each distinct one once; of a field's the
            most common first, which is timed where only one is.
        gate: the router's type.
        experts: the routed experts, as backends see them.
        device, dtype, kv_dtype: where, and the types of activations and cache.
    """

    config: NemotronHConfig
    formats: tuple[tuple[str, int, tuple[int, ...]], ...]
    gate: torch.dtype
    experts: Experts | None
    device: torch.device
    dtype: torch.dtype
    kv_dtype: torch.dtype

    @classmethod
    def of(
        cls,
        config: NemotronHConfig,
        manifest: Manifest,
        device: torch.device,
        dtype: torch.dtype,
        kv_dtype: torch.dtype,
    ) -> "Subject":
        """A model on a device."""
        linear = (item for item in manifest.items if item.entry.is_linear)
        each = [(item.entry.field, _BITS[item.format], item.entry.shape(config)) for item in linear]
        fields, counts = list(dict.fromkeys(field for field, _, _ in each)), Counter(own[:2] for own in each)
        formats = sorted(dict.fromkeys(each), key=lambda own: (fields.index(own[0]), -counts[own[:2]]))
        gates = [item.parts[0].dtype for item in manifest.items if item.entry.field == "gate"]
        gate = DTYPES[gates[0]] if gates else torch.float32
        return cls(config, tuple(formats), gate, expert_facts(config, manifest), device, dtype, kv_dtype)

    def bits(self, field: str) -> list[int]:
        """Of a field's weights, over the layers, the most common first."""
        return list(dict.fromkeys(bits for name, bits, _ in self.formats if name == field))

    def tokens(self, count: int, width: int) -> Tensor:
        """Activations."""
        return random_tokens(count, width, self.device, self.dtype)

    def weight(self, bits: int, *shape: int) -> Weight:
        """A weight."""
        return random_weight(bits, *shape, device=self.device)

    def normal(self, *shape: int) -> Tensor:
        """float32."""
        return torch.randn(shape, device=self.device)


def cases(s: Subject) -> Iterator[OpCase]:
    """Every op that the model uses, in the table's order as far as there is one."""
    yield from _norms(s)
    yield from _linears(s)
    if s.config.experts:
        yield from _experts(s)
    if "M" in s.config.pattern:
        yield from _mamba(s)
    if "*" in s.config.pattern:
        yield from _attention(s)
    yield _sample(s)


def _norms(s: Subject) -> Iterator[OpCase]:
    h = s.config.hidden_size

    def make(_: str) -> Arguments:
        return s.tokens(1, h), 1 + s.normal(h) / 10, s.config.eps

    yield OpCase("norm", f"{h}", 1, make, 4e-3)


def _linears(s: Subject) -> Iterator[OpCase]:
    """Products by format, each distinct size once; and those that begin or end a layer."""
    c, seen = s.config, set[tuple[int, tuple[int, ...]]]()
    for field, bits, shape in s.formats:
        if field in ("lm_head", "up", "down") or (bits, shape) in seen:
            continue
        seen.add((bits, shape))
        op = {4: "linear_nvfp4", 8: "linear_fp8", 16: "linear_plain"}[bits]
        for tokens in (1, PREFILL):
            yield _linear(s, op, bits, shape, tokens)
    for bits in s.bits("lm_head"):
        yield _head(s, bits)
    if "M" in c.pattern:
        rows = next(shape[0] for field, _, shape in s.formats if field == "in_proj")
        yield from (_beginning(s, "in_proj", [(bits, rows)]) for bits in s.bits("in_proj"))
    if "*" in c.pattern:
        heads = (("q_proj", c.attention_heads), ("k_proj", c.kv_heads), ("v_proj", c.kv_heads))
        yield _beginning(s, "q, k, v", [(s.bits(field)[0], n * c.head_dim) for field, n in heads])
    for field, columns in (("out_proj", c.d_inner), ("o_proj", c.attention_heads * c.head_dim)):
        yield from (_ending(s, field, bits, columns) for bits in s.bits(field))
    if "-" in c.pattern:
        yield _mlp(s)


def _linear(
    s: Subject, op: str, bits: int, shape: tuple[int, ...], tokens: int, tolerance: float = 4e-3
) -> OpCase:
    def make(backend: str) -> Arguments:
        weight = s.weight(bits, *shape)
        if backend in DENSE:
            divisor = torch.full((1,), _DENSE_INPUT_SCALE.get(bits, 1.0), device=s.device)
            weight = prepare_dense(backend, weight, DENSE[backend].load(), divisor)
        return s.tokens(tokens, shape[1]), weight

    return OpCase(op, f"{shape[0]} × {shape[1]}, {bits} bits", tokens, make, tolerance)


def _head(s: Subject, bits: int) -> OpCase:
    h, vocab = s.config.hidden_size, s.config.vocab_size

    def make(_: str) -> Arguments:
        return s.tokens(1, h), random_norm(h, s.device), s.weight(bits, vocab, h)

    return OpCase("head", f"{vocab} × {h}, {bits} bits", 1, make, 4e-3)


def _beginning(s: Subject, what: str, weights: list[tuple[int, int]]) -> OpCase:
    """Products, of (bits, rows) each, over the norm of the stream."""
    h = s.config.hidden_size

    def make(_: str) -> Arguments:
        return s.tokens(1, h), random_norm(h, s.device), tuple(s.weight(bits, rows, h) for bits, rows in weights)

    told = "+".join(str(rows) for _, rows in weights)
    bits = "+".join(str(bits) for bits, _ in weights)
    return OpCase("norm_linears", f"{what} {told} × {h}, {bits} bits", 1, make, 4e-3)


def _ending(s: Subject, field: str, bits: int, columns: int) -> OpCase:
    h = s.config.hidden_size

    def make(_: str) -> Arguments:
        return s.tokens(1, columns), s.weight(bits, h, columns), s.tokens(1, h)

    return OpCase("linear_add", f"{field} {h} × {columns}, {bits} bits", 1, make, 4e-3)


def _mlp(s: Subject) -> OpCase:
    h, wide = s.config.hidden_size, s.config.mlp_size
    up, down = s.bits("up_proj")[0], s.bits("down_proj")[0]

    def make(_: str) -> Arguments:
        weights = s.weight(up, wide, h), s.weight(down, h, wide)
        return s.tokens(1, h), random_norm(h, s.device), *weights

    return OpCase("mlp_add", f"{wide} × {h}, {up} bits", 1, make, 5e-3)


def _experts(s: Subject) -> Iterator[OpCase]:
    c, h = s.config, s.config.hidden_size
    what = f"{c.top_k} of {c.experts}, {c.expert_size} × {c.expert_width}"
    yield moe_case(s)

    def route(_: str) -> Arguments:
        gate, bias = _gate(s)
        return s.tokens(1, h), gate, bias, c.top_k, c.routed_scale, c.norm_topk

    yield OpCase("router", f"{c.top_k} of {c.experts} × {h}", 1, route, 1e-3)
    for op, tokens in (("experts_few", FEW), ("experts_prefill", PREFILL)):

        def make(backend: str, tokens: int = tokens) -> Arguments:
            stacks = _stacks(s, backend)
            return (
                s.tokens(tokens, c.expert_width),
                *random_routing(tokens, c.experts, c.top_k, s.device),
                *stacks,
            )

        yield OpCase(op, what, tokens, make, 5e-3)


def moe_case(s: Subject) -> OpCase:
    """A decode step's whole mixture of experts: what calibration times."""
    c, h = s.config, s.config.hidden_size
    shared_up, shared_down = s.bits("shared_up")[0], s.bits("shared_down")[0]

    def latent(field: str, *shape: int) -> Weight | None:
        return s.weight(s.bits(field)[0], *shape) if c.latent_size else None

    def make(backend: str) -> Arguments:
        gate, bias = _gate(s)
        up, down = _stacks(s, backend)
        weights = MoeWeights(
            gate=gate,
            bias=bias,
            top_k=c.top_k,
            scale=c.routed_scale,
            normalize=c.norm_topk,
            up=up,
            down=down,
            shared_up=s.weight(shared_up, c.shared_size, h),
            shared_down=s.weight(shared_down, h, c.shared_size),
            latent_in=latent("fc1", c.expert_width, h),
            latent_out=latent("fc2", h, c.expert_width),
            tickets=torch.zeros(tickets(h), dtype=torch.int32, device=s.device),
        )
        return s.tokens(1, h), random_norm(h, s.device), weights

    what = f"{c.top_k} of {c.experts}, {c.expert_size} × {c.expert_width}, shared {c.shared_size}"
    return OpCase("moe_add", what, 1, make, 5e-3)


def _gate(s: Subject) -> tuple[Tensor, Tensor]:
    """A router whose scores spread, so that tokens choose different experts."""
    c = s.config
    gate = s.normal(c.experts, c.hidden_size) * c.hidden_size**-0.5
    return gate.to(s.gate), s.normal(c.experts) / 10


def _stacks(s: Subject, backend: str) -> tuple[Weight, Weight]:
    """The experts, with what the backend wants beside them."""
    c, facts = s.config, s.experts
    bits = s.bits("up")[0], s.bits("down")[0]
    up = s.weight(bits[0], c.experts, c.expert_size, c.expert_width)
    down = s.weight(bits[1], c.experts, c.expert_width, c.expert_size)
    if facts and facts.input_scales:
        up, down = (_with_input_scale(stack) for stack in (up, down))
    ops: dict[str, str] = dict.fromkeys(EXPERT_OPS, backend)
    fields = with_prepared({(0, "up"): up, (0, "down"): down}, facts, ops, PREFILL, s.dtype, s.device)
    return fields[0, "up"], fields[0, "down"]


def _with_input_scale(stack: Weight) -> Weight:
    if not isinstance(stack, Nvfp4):
        return stack
    return replace(stack, input_scale=torch.full_like(stack.global_scale, _INPUT_SCALE))


def _mamba(s: Subject) -> Iterator[OpCase]:
    c = s.config
    sizes = (c.mamba_heads, c.mamba_head_dim, c.groups, c.state_size, c.conv_kernel)
    what = f"{c.mamba_heads} heads of {c.mamba_head_dim}, {c.state_size} states"

    def inputs(count: int) -> tuple[Tensor, Any, Any]:
        return mamba_inputs(count, sizes, s.device, s.dtype)

    def convolve(_: str) -> Arguments:
        projected, weights, state = inputs(PREFILL)
        return projected[:, c.d_inner : c.d_inner + c.conv_dim], weights.conv, weights.conv_bias, state.conv

    def scan(_: str) -> Arguments:
        projected, weights, state = inputs(PREFILL)
        x, b, c_ = s.tokens(PREFILL, c.conv_dim).split(
            [c.d_inner, c.groups * c.state_size, c.groups * c.state_size], dim=-1
        )
        heads, b, c_ = (m.unflatten(-1, (n, -1)) for m, n in ((x, c.mamba_heads), (b, c.groups), (c_, c.groups)))
        return heads, projected[:, -c.mamba_heads :], b, c_, weights.ssm, state.ssm, c.chunk_size

    def gate(_: str) -> Arguments:
        return (
            s.tokens(PREFILL, c.d_inner),
            s.tokens(PREFILL, c.d_inner),
            1 + s.normal(c.d_inner) / 10,
            c.groups,
            c.eps,
        )

    yield OpCase("mamba_decode", what, 1, lambda _: inputs(1), 5e-3, state=(2,))
    yield OpCase("conv_prefill", f"{c.conv_dim} channels", PREFILL, convolve, 4e-3, state=(3,))
    yield OpCase("ssm_prefill", what, PREFILL, scan, 4e-3, state=(5,))
    yield OpCase("gated_norm", f"{c.d_inner} in {c.groups} groups", PREFILL, gate, 4e-3)


def _attention(s: Subject) -> Iterator[OpCase]:
    c = s.config
    sizes = c.attention_heads, c.kv_heads, c.head_dim
    kv = str(s.kv_dtype).removeprefix("torch.")
    what = f"{c.attention_heads}/{c.kv_heads} heads of {c.head_dim}, KV {kv}"

    def attend(tokens: int, length: int) -> Callable[[str], Arguments]:
        return lambda _: attention_inputs(tokens, length, sizes, s.kv_dtype, s.device, s.dtype)

    def step(_: str) -> Arguments:
        q, cache, pages, positions = attend(1, CONTEXT)("")
        k, v = (random_tokens(1, c.kv_heads * c.head_dim, s.device, s.dtype) for _ in range(2))
        return q, k.view(1, c.kv_heads, -1), v.view(1, c.kv_heads, -1), cache, pages, positions

    def append(_: str) -> Arguments:
        return step("")[1:]

    yield OpCase("kv_append", what, 1, append, 0.0, state=(2,))
    yield OpCase("attention_decode", f"{what}, context {CONTEXT}", 1, step, 4e-3, state=(3,))
    yield OpCase("attention_prefill", what, PREFILL, attend(PREFILL, CONTEXT), 5e-3)


def _sample(s: Subject) -> OpCase:
    vocab = s.config.vocab_size

    def make(_: str) -> Arguments:
        state = SamplerState.allocate(vocab, s.device)
        state.temperature = 0.0  # where rounding decides nothing
        state.publish()
        return s.normal(vocab) * 3, state, torch.zeros(1, dtype=torch.int64, device=s.device)

    return OpCase("sample", f"greedy, {vocab}", 1, make, 0.0, state=(1, 2))
