"""The demo model as a thing to train: the engine's mathematics in batches, with gradients.

Rows hold many conversations one after another. Attention, convolution and SSM state all stop at their borders, so
that a row is exactly its conversations side by side. The weights of the formats that will be quantised go through
their quantiser on the way (straight-through gradients), so that the network learns to live with them.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoserve.kernels import nvfp4
from nanoserve.models.config import NemotronHConfig

_RESET = -100.0
"""Added to the log-decay at a conversation's first token: exp of it forgets everything before."""


def attention(q: Tensor, k: Tensor, v: Tensor, place: Tensor) -> Tensor:
    """Causal attention that ends at a conversation's start: [B, heads, L, D].

    With a dense mask. Flex attention would skip what lies outside of it, but did not come through a trial of 70 s
    on the H100 (why was not looked into), so that the shipped model was trained with the dense form alone.
    """
    rows, length = (place == 0).cumsum(dim=-1), place.shape[-1]
    causal = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    same = (rows.unsqueeze(-1) == rows.unsqueeze(-2)) & causal
    return F.scaled_dot_product_attention(q, k, v, attn_mask=same.unsqueeze(1), enable_gqa=True)


def held_nvfp4(weight: Tensor) -> Tensor:
    """What NVFP4 holds of a weight [N, K], or of each matrix of a stack [E, N, K]: `nvfp4.pack`, then expanded."""
    blocks = weight.unflatten(-1, (-1, nvfp4.GROUP))
    amax = blocks.abs().amax(dim=-1, keepdim=True)
    scale = (amax.amax(dim=(-3, -2, -1), keepdim=True) / (6 * 448)).clamp_min(torch.finfo(torch.float32).tiny)
    local = (amax / 6 / scale).clamp(max=448).to(torch.float8_e4m3fn).float()
    local = torch.where(local == 0, 1.0, local)
    codes = nvfp4.nearest_code(blocks / (local * scale))
    values = torch.tensor(nvfp4.E2M1, device=weight.device)[codes.int()]
    return (values * local * scale).flatten(-2)


def held_fp8(weight: Tensor) -> Tensor:
    """What FP8 with one scale holds of a weight."""
    scale = weight.abs().amax() / 448
    return (weight / scale).to(torch.float8_e4m3fn).float() * scale


class Held(nn.Module):
    """A matrix, or a stack of them, that will be quantised: reads as its quantised self, learns as itself.

    What the format holds is worked out once a step by `Network.hold`, outside of the compiled layers.
    """

    def __init__(self, *shape: int, how: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape) * shape[-1] ** -0.5)
        self.held = nn.Buffer(torch.zeros(shape), persistent=False)
        self.how = how

    def forward(self) -> Tensor:
        """The quantised weight."""
        return self.weight + (self.held - self.weight).detach()


def held_bf16(weight: Tensor) -> Tensor:
    """What BF16 holds of a weight."""
    return weight.bfloat16().float()


def fake_bf16(weight: Tensor) -> Tensor:
    """The weight as BF16 would hold it, with the gradient of the weight itself."""
    return weight + (held_bf16(weight.detach()) - weight).detach()


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm in float32."""
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * fake_bf16(weight)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """In bfloat16 on a GPU, in float32 on a CPU."""
    kind = torch.bfloat16 if x.device.type == "cuda" else torch.float32
    return F.linear(x.to(kind), weight.to(kind))


class Mamba(nn.Module):
    """Mamba-2 over rows."""

    def __init__(self, c: NemotronHConfig) -> None:
        super().__init__()
        self.c = c
        self.in_proj = Held(c.d_inner + c.conv_dim + c.mamba_heads, c.hidden_size, how=held_fp8)
        self.out_proj = Held(c.hidden_size, c.d_inner, how=held_fp8)
        self.conv_weight = nn.Parameter(torch.randn(c.conv_dim, c.conv_kernel) * 0.3)
        self.conv_bias = nn.Parameter(torch.zeros(c.conv_dim))
        self.a_log = nn.Parameter(torch.log(torch.linspace(1, 16, c.mamba_heads)))
        self.d = nn.Parameter(torch.ones(c.mamba_heads))
        dt = torch.exp(torch.linspace(-6.9, -2.3, c.mamba_heads))
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self.norm = nn.Parameter(torch.ones(c.d_inner))

    def forward(self, x: Tensor, place: Tensor) -> Tensor:
        """[B, L, H] → [B, L, H]."""
        c = self.c
        z, xbc, dt = linear(x, self.in_proj()).split([c.d_inner, c.conv_dim, c.mamba_heads], dim=-1)
        xbc = F.silu(self._conv(xbc.float(), place)).to(z.dtype)
        inner, b, c_ = xbc.split([c.d_inner, c.groups * c.state_size, c.groups * c.state_size], dim=-1)
        heads = inner.unflatten(-1, (c.mamba_heads, c.mamba_head_dim))
        b, c_ = (m.unflatten(-1, (c.groups, c.state_size)) for m in (b, c_))
        dt = F.softplus(dt.float() + fake_bf16(self.dt_bias))
        decay = -torch.exp(fake_bf16(self.a_log)) * dt + _RESET * (place == 0).unsqueeze(-1)
        y = _scan(heads, dt, decay, b, c_, c.chunk_size) + fake_bf16(self.d).unsqueeze(-1) * heads.float()
        gated = (y.flatten(-2) * F.silu(z.float())).unflatten(-1, (c.groups, -1))
        y = gated * torch.rsqrt(gated.square().mean(dim=-1, keepdim=True) + c.eps)
        return linear(y.flatten(-2) * fake_bf16(self.norm), self.out_proj())

    def _conv(self, x: Tensor, place: Tensor) -> Tensor:
        weight = fake_bf16(self.conv_weight)
        total = x * weight[:, -1] + fake_bf16(self.conv_bias)
        for back in range(1, self.c.conv_kernel):
            before = F.pad(x, (0, 0, back, 0))[:, : x.shape[1]] * (place >= back).unsqueeze(-1)
            total = total + before * weight[:, -1 - back]
        return total


def _scan(x: Tensor, dt: Tensor, decay: Tensor, b: Tensor, c: Tensor, chunk: int) -> Tensor:
    """The chunked scan (Mamba-2, section 6): inside chunks as attention, between them as a recurrence.

    Args:
        x: [B, L, heads, P].
        dt: float32 [B, L, heads].
        decay: float32 [B, L, heads], what the state is multiplied with, as a logarithm.
        b: [B, L, groups, N].
        c: [B, L, groups, N].
        chunk: divides L.

    Returns:
        float32 [B, L, heads, P].
    """
    heads, groups = x.shape[2], b.shape[2]
    x = (x * dt.unsqueeze(-1).to(x.dtype)).unflatten(1, (-1, chunk)).unflatten(3, (groups, -1))
    b, c = b.unflatten(1, (-1, chunk)), c.unflatten(1, (-1, chunk))
    total = decay.unflatten(1, (-1, chunk)).cumsum(dim=2)  # [B, C, Q, heads]
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril().unsqueeze(-1)
    between = (
        (total.unsqueeze(3) - total.unsqueeze(2)).masked_fill(~causal, -torch.inf).exp()
    )  # [B, C, Q, K, heads]
    scores = torch.einsum("zmqgn,zmkgn->zmqkg", c, b)
    mixed = scores.unsqueeze(-1) * between.to(x.dtype).unflatten(-1, (groups, -1))
    inside = torch.einsum("zmqkgh,zmkghp->zmqghp", mixed, x)
    to_end = (total[:, :, -1:] - total).exp().to(x.dtype).unflatten(-1, (groups, -1))
    states = torch.einsum("zmkgn,zmkgh,zmkghp->zmghpn", b, to_end, x).float()
    ends = F.pad(total[:, :, -1], (0, 0, 1, 0)).cumsum(dim=1)  # log-decay from the row's start to each chunk's
    # What is carried from the end of chunk k to the start of chunk m, for k < m: [B, m, k, heads].
    count = states.shape[1]
    order = torch.arange(count, device=x.device)
    span = (ends[:, :-1].unsqueeze(2) - ends[:, 1:].unsqueeze(1)).masked_fill(
        (order.unsqueeze(1) <= order).view(1, count, count, 1), -torch.inf
    )
    carried = span.exp().unflatten(-1, (groups, -1))
    before = torch.einsum("zmkgh,zkghpn->zmghpn", carried, states).to(x.dtype)
    from_start = total.exp().unflatten(-1, (groups, -1))
    across = torch.einsum("zmqgn,zmghpn->zmqghp", c, before).float() * from_start.unsqueeze(-1)
    return (inside.float() + across).flatten(3, 4).flatten(1, 2).unflatten(2, (heads,))


class Attention(nn.Module):
    """Grouped-query attention without positions."""

    def __init__(self, c: NemotronHConfig) -> None:
        super().__init__()
        self.c = c
        self.q_proj = _matrix(c.attention_heads * c.head_dim, c.hidden_size)
        self.k_proj = _matrix(c.kv_heads * c.head_dim, c.hidden_size)
        self.v_proj = _matrix(c.kv_heads * c.head_dim, c.hidden_size)
        self.o_proj = _matrix(c.hidden_size, c.attention_heads * c.head_dim)

    def forward(self, x: Tensor, place: Tensor) -> Tensor:
        """[B, L, H] → [B, L, H]."""
        c = self.c
        q, k, v = (
            linear(x, weight).unflatten(-1, (-1, c.head_dim)).transpose(1, 2)
            for weight in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = attention(q, k, v, place)
        return linear(y.transpose(1, 2).flatten(-2), self.o_proj)


class Mlp(nn.Module):
    """down(relu(up(x))²)."""

    def __init__(self, width: int, size: int, how: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up_proj, self.down_proj = Held(size, width, how=how), Held(width, size, how=how)

    def forward(self, x: Tensor, place: Tensor) -> Tensor:
        """[B, L, H] → [B, L, H]."""
        return linear(F.relu(linear(x, self.up_proj())).square(), self.down_proj())


class MoE(nn.Module):
    """Every expert runs on every token, and the router's weights choose: two large products, no gathering."""

    def __init__(self, c: NemotronHConfig, how: Callable[[Tensor], Tensor] = held_nvfp4) -> None:
        super().__init__()
        assert c.latent_size is not None
        self.c = c
        self.gate = _matrix(c.experts, c.hidden_size)
        self.bias = nn.Buffer(torch.zeros(c.experts))
        self.up_proj = Held(c.experts, c.expert_size, c.latent_size, how=how)
        self.down_proj = Held(c.experts, c.latent_size, c.expert_size, how=how)
        self.fc1, self.fc2 = _matrix(c.latent_size, c.hidden_size), _matrix(c.hidden_size, c.latent_size)
        self.shared = Mlp(c.hidden_size, c.shared_size, how)
        self.load = nn.Buffer(torch.zeros(c.experts), persistent=False)

    def forward(self, x: Tensor, place: Tensor) -> Tensor:
        """[B, L, H] → [B, L, H]; notes the experts' loads."""
        c = self.c
        scores = torch.sigmoid(F.linear(x.float(), fake_bf16(self.gate)))
        chosen = torch.topk(scores + self.bias, c.top_k, dim=-1).indices
        mask = torch.zeros_like(scores).scatter(-1, chosen, 1.0)
        self.load.copy_(mask.detach().mean(dim=(0, 1)))
        weights = scores * mask
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) * c.routed_scale
        hidden = F.relu(linear(linear(x, self.fc1), self.up_proj().flatten(0, 1))).square()
        hidden = hidden.unflatten(-1, (c.experts, -1)) * weights.unsqueeze(-1).to(hidden.dtype)
        routed = linear(hidden.flatten(-2), self.down_proj().transpose(0, 1).flatten(1))
        return linear(routed, self.fc2) + self.shared(x, place)


class Layer(nn.Module):
    """x + mixer(norm(x))."""

    def __init__(self, width: int, eps: float, mixer: nn.Module) -> None:
        super().__init__()
        self.norm, self.mixer, self.eps = nn.Parameter(torch.ones(width)), mixer, eps

    def forward(self, x: Tensor, place: Tensor) -> Tensor:
        """[B, L, H] → [B, L, H], float32."""
        return x + self.mixer(norm(x, self.norm, self.eps), place).float()


class Draft(nn.Module):
    """The multi-token-prediction block, pattern "*E"; it reads the trunk and does not move it."""

    def __init__(self, c: NemotronHConfig) -> None:
        super().__init__()
        self.c = c
        self.enorm, self.hnorm = (nn.Parameter(torch.ones(c.hidden_size)) for _ in range(2))
        self.final_layernorm = nn.Parameter(torch.ones(c.hidden_size))
        self.eh_proj = _matrix(c.hidden_size, 2 * c.hidden_size)
        self.attention = Layer(c.hidden_size, c.eps, Attention(c))
        self.moe = Layer(c.hidden_size, c.eps, MoE(c, how=held_bf16))

    def forward(self, hidden: Tensor, following: Tensor, place: Tensor) -> Tensor:
        """From a token's hidden state and the next token's embedding, the hidden state for the one after."""
        eps = self.c.eps
        both = torch.cat((norm(following, self.enorm, eps), norm(hidden, self.hnorm, eps)), dim=-1)
        x = self.moe(self.attention(linear(both, self.eh_proj).float(), place), place)
        return norm(x, self.final_layernorm, eps)


class Network(nn.Module):
    """The whole model."""

    def __init__(self, c: NemotronHConfig) -> None:
        super().__init__()
        self.c = c
        self.embeddings = nn.Parameter(torch.randn(c.vocab_size, c.hidden_size) * 0.5)
        self.layers = nn.ModuleList([Layer(c.hidden_size, c.eps, _mixer(c, letter)) for letter in c.pattern])
        self.norm_f = nn.Parameter(torch.ones(c.hidden_size))
        self.head = Held(c.vocab_size, c.hidden_size, how=held_nvfp4)
        self.draft = Draft(c)
        for name, parameter in self.named_parameters():
            if name.endswith(("out_proj.weight", "o_proj", "down_proj.weight", "fc2")):
                parameter.data *= (2 * len(c.pattern)) ** -0.5  # a deep residual stream starts near the identity
        self.head.weight.data *= 0.3

    def forward(self, ids: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the next token, and the draft's of the one after: float32 [B, L, V] each.

        Args:
            ids: int64 [B, L].
            place: int64 [B, L], a token's place in its conversation, from 0.
        """
        embedded = F.embedding(ids, fake_bf16(self.embeddings))
        x = embedded
        for layer in self.layers:
            x = layer(x, place)
        hidden, head = norm(x, self.norm_f, self.c.eps), self.head()
        following = F.pad(embedded[:, 1:], (0, 0, 0, 1)).detach()
        drafted = self.draft(hidden.detach(), following, place)
        return linear(hidden, head).float(), linear(drafted, head.detach()).float()

    @torch.no_grad()
    def hold(self, exact: bool = False) -> None:
        """Work out what the formats hold of the weights now; ``exact`` takes the weights as they are."""
        for part in self.modules():
            if isinstance(part, Held):
                part.held.copy_(part.weight if exact else part.how(part.weight))

    def compile_layers(self) -> None:
        """Compile each kind of layer once: the whole network as one graph would take many minutes."""
        for layer in (*self.layers, self.draft.attention, self.draft.moe):
            layer.compile(fullgraph=True)

    @torch.no_grad()
    def balance(self, speed: float) -> None:
        """Move every router's correction bias towards even loads, without a loss of its own."""
        for part in self.modules():
            if isinstance(part, MoE):
                part.bias.add_(speed * torch.sign(part.load.mean() - part.load))


def _mixer(c: NemotronHConfig, letter: str) -> nn.Module:
    match letter:
        case "M":
            return Mamba(c)
        case "*":
            return Attention(c)
        case "E":
            return MoE(c)
        case _:
            return Mlp(c.hidden_size, c.mlp_size, held_nvfp4)


def _matrix(rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, columns) * columns**-0.5)
