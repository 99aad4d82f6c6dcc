"""The four mixers of Nemotron-H. Every layer is one of them: stream = stream + mixer(norm(stream)).

A mixer holds its weights and works on a `Span`: consecutive tokens of one sequence. It takes the residual stream
[T, H] and the norm in front of the layer, and returns the new stream: its first op applies the norm, so that one
kernel can norm and read, and its last adds the result. What it computes with stands in the op table; the ops'
references have the mathematics.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nanoserve.cache import Cache, Sequence
from nanoserve.kernels.fused import MoeWeights, Norm
from nanoserve.kernels.linear import Weight, relu2
from nanoserve.kernels.mamba import MambaWeights
from nanoserve.kernels.moe import PREFILL_FROM
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

    def __call__(self, stream: Tensor, norm: Norm, span: Span) -> Tensor:
        """Advances the layer's conv and SSM state."""
        c, ops, slot = self.config, self.ops, span.sequence.slot
        weights, state = SsmWeights(self.a_log, self.d, self.dt_bias), span.cache.mamba(self.index, slot)
        projected = ops.project(stream, norm, self.in_proj)
        if span.decode:
            between = MambaWeights(self.conv_weight, self.conv_bias, weights, self.norm, c.eps)
            y = ops.mamba_decode(projected, between, state)
            return ops.linear_add(y, self.out_proj, stream)
        z, xbc, dt = projected.split([c.d_inner, c.conv_dim, c.mamba_heads], dim=-1)
        xbc = ops.conv_prefill(xbc, self.conv_weight, self.conv_bias, state.conv)
        bc_size = c.groups * c.state_size
        inner, b, c_ = xbc.split([c.d_inner, bc_size, bc_size], dim=-1)
        heads = inner.unflatten(-1, (c.mamba_heads, c.mamba_head_dim))
        b, c_ = (m.unflatten(-1, (c.groups, c.state_size)) for m in (b, c_))
        y = ops.ssm_prefill(heads, dt, b, c_, weights, state.ssm, c.chunk_size)
        y = ops.gated_norm(y.flatten(1), z, self.norm, c.groups, c.eps)
        return ops.linear_add(y, self.out_proj, stream)


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

    def __call__(self, stream: Tensor, norm: Norm, span: Span) -> Tensor:
        """Appends to the layer's KV pages."""
        c, ops = self.config, self.ops
        kv, table = span.cache.kv[self.index], span.sequence.page_table
        projected = ops.norm_linears(stream, norm, (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (m.unflatten(-1, (-1, c.head_dim)) for m in projected)
        if span.decode:
            mixed = ops.attention_decode(q, k, v, kv, table, span.positions)
        else:
            ops.kv_append(k, v, kv, table, span.positions)
            mixed = ops.attention_prefill(q, kv, table, span.positions)
        return ops.linear_add(mixed.flatten(1), self.o_proj, stream)


@dataclass(frozen=True, slots=True)
class Mlp:
    """A dense layer: down(relu(up(x))²)."""

    ops: Ops
    up_proj: Weight
    down_proj: Weight

    def __call__(self, stream: Tensor, norm: Norm, span: Span) -> Tensor:
        """Keeps no state."""
        return self.ops.mlp_add(stream, norm, self.up_proj, self.down_proj)


@dataclass(frozen=True, slots=True)
class MoE:
    """Routed experts (at latent width, if there is one) plus one shared expert at full width."""

    ops: Ops
    weights: MoeWeights

    def __call__(self, stream: Tensor, norm: Norm, span: Span) -> Tensor:
        """Keeps no state; router and shared expert read the full width, also where there is a latent."""
        ops, w = self.ops, self.weights
        if span.decode:
            return ops.moe_add(stream, norm, w)
        x = ops.norm(stream, norm.weight, norm.eps)
        ids, weights = ops.router(x, w.gate, w.bias, w.top_k, w.scale, w.normalize)
        narrow = ops.linear(x, w.latent_in) if w.latent_in else x
        experts = ops.experts_prefill if len(x) >= PREFILL_FROM else ops.experts_few
        routed = experts(narrow, ids, weights, w.up, w.down)
        if w.latent_out:
            routed = ops.linear(routed, w.latent_out)
        shared = ops.linear(relu2(ops.linear(x, w.shared_up)), w.shared_down)
        return stream + (routed + shared)


Mixer = Mamba | Attention | Mlp | MoE


def span_of(ids: Tensor, sequence: Sequence, cache: Cache, *, decode: bool) -> Span:
    """The next tokens of a sequence as a span."""
    positions = torch.arange(len(ids), device=ids.device) + sequence.length
    return Span(ids, positions, sequence, cache, decode)
