"""The four mixers of Nemotron-H. Every layer is one of them: x = x + mixer(norm(x)).

A mixer holds its weights and works on a `Span`: consecutive tokens of one sequence. What it computes with
stands in the op table; the mathematics is in the ops' references.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nanoserve.cache import Cache, Sequence
from nanoserve.kernels.linear import Weight, relu2
from nanoserve.kernels.mamba import MambaWeights
from nanoserve.kernels.ssm import SsmWeights
from nanoserve.kernels.table import Ops
from nanoserve.models.config import NemotronHConfig


@dataclass(frozen=True, slots=True)
class Span:
    """T consecutive tokens of one sequence that go through the model together.

    Attributes:
        ids: int64 [T].
        positions: int64 [T], the first is the sequence's length so far.
        sequence: whose state is read and advanced.
        cache: where that state lives.
        decode: take the decode column of the op table (a few tokens) instead of the prefill one.
    """

    ids: Tensor
    positions: Tensor
    sequence: Sequence
    cache: Cache
    decode: bool


@dataclass(frozen=True, slots=True)
class Mamba:
    """Mamba-2; ``index`` counts the Mamba layers."""

    config: NemotronHConfig
    ops: Ops
    index: int
    in_proj: Weight
    out_proj: Weight
    conv_weight: Tensor
    conv_bias: Tensor
    a_log: Tensor
    d: Tensor
    dt_bias: Tensor
    norm: Tensor

    def __call__(self, x: Tensor, span: Span) -> Tensor:
        """[T, H] → [T, H]; advances the layer's conv and SSM state."""
        c, ops, slot = self.config, self.ops, span.sequence.slot
        weights, state = SsmWeights(self.a_log, self.d, self.dt_bias), span.cache.mamba(self.index, slot)
        projected = ops.linear(x, self.in_proj)
        if span.decode:
            between = MambaWeights(self.conv_weight, self.conv_bias, weights, self.norm, c.eps)
            return ops.linear(ops.mamba_decode(projected, between, state), self.out_proj)
        z, xbc, dt = projected.split([c.d_inner, c.conv_dim, c.mamba_heads], dim=-1)
        xbc = ops.conv_prefill(xbc, self.conv_weight, self.conv_bias, state.conv)
        bc_size = c.groups * c.state_size
        inner, b, c_ = xbc.split([c.d_inner, bc_size, bc_size], dim=-1)
        heads = inner.unflatten(-1, (c.mamba_heads, c.mamba_head_dim))
        b, c_ = (m.unflatten(-1, (c.groups, c.state_size)) for m in (b, c_))
        y = ops.ssm_prefill(heads, dt, b, c_, weights, state.ssm, c.chunk_size)
        y = ops.gated_norm(y.flatten(1), z, self.norm, c.groups, c.eps)
        return ops.linear(y, self.out_proj)


@dataclass(frozen=True, slots=True)
class Attention:
    """Grouped-query attention without RoPE; ``index`` counts the attention layers."""

    config: NemotronHConfig
    ops: Ops
    index: int
    q_proj: Weight
    k_proj: Weight
    v_proj: Weight
    o_proj: Weight

    def __call__(self, x: Tensor, span: Span) -> Tensor:
        """[T, H] → [T, H]; appends to the layer's KV pages."""
        c, ops = self.config, self.ops
        kv, table = span.cache.kv[self.index], span.sequence.page_table
        q = ops.linear(x, self.q_proj).unflatten(-1, (c.attention_heads, c.head_dim))
        k, v = (ops.linear(x, w).unflatten(-1, (c.kv_heads, c.head_dim)) for w in (self.k_proj, self.v_proj))
        ops.kv_append(k, v, kv, table, span.positions)
        attend = ops.attention_decode if span.decode else ops.attention_prefill
        return ops.linear(attend(q, kv, table, span.positions).flatten(1), self.o_proj)


@dataclass(frozen=True, slots=True)
class Mlp:
    """A dense layer, or a shared expert: down(relu(up(x))²)."""

    ops: Ops
    up_proj: Weight
    down_proj: Weight

    def __call__(self, x: Tensor, span: Span) -> Tensor:
        """[T, H] → [T, H]."""
        return self.ops.linear(relu2(self.ops.linear(x, self.up_proj)), self.down_proj)


@dataclass(frozen=True, slots=True)
class Latent:
    """The projections around the routed experts of models whose experts work at a smaller width."""

    fc1: Weight
    fc2: Weight


@dataclass(frozen=True, slots=True)
class MoE:
    """Routed experts (at latent width, if there is one) plus one shared expert at full width."""

    config: NemotronHConfig
    ops: Ops
    gate: Tensor
    bias: Tensor
    up: Weight
    down: Weight
    shared: Mlp
    latent: Latent | None

    def __call__(self, x: Tensor, span: Span) -> Tensor:
        """[T, H] → [T, H]; router and shared expert read the full x, also where there is a latent."""
        c, ops = self.config, self.ops
        ids, weights = ops.router(x, self.gate, self.bias, c.top_k, c.routed_scale, c.norm_topk)
        experts = ops.experts_decode if span.decode else ops.experts_prefill
        narrow = ops.linear(x, self.latent.fc1) if self.latent else x
        routed = experts(narrow, ids, weights, self.up, self.down)
        if self.latent:
            routed = ops.linear(routed, self.latent.fc2)
        return routed + self.shared(x, span)


Mixer = Mamba | Attention | Mlp | MoE


@dataclass(frozen=True, slots=True)
class Layer:
    """A norm and a mixer."""

    norm: Tensor
    mixer: Mixer


def span_of(ids: Tensor, sequence: Sequence, cache: Cache, *, decode: bool) -> Span:
    """The next tokens of a sequence as a span."""
    positions = torch.arange(len(ids), device=ids.device) + sequence.length
    return Span(ids, positions, sequence, cache, decode)
