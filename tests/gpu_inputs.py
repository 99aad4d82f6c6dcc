"""Random weights and the timed cases of gpu_matvec.py."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from nanoserve.kernels import random_inputs
from nanoserve.kernels.fused import MoeWeights, Norm, tickets
from nanoserve.kernels.linear import Weight
from nanoserve.kernels.random_inputs import random_norm
from nanoserve.kernels.triton_experts import down_products, front, moe_add, up_products
from nanoserve.kernels.triton_linear import linears_add, products
from nanoserve.kernels.weight_launches import Shape
from nanoserve.kernels.weight_tiles import Cut

BF16 = torch.bfloat16
CUDA = torch.device("cuda")

Calls = list[Callable[[], object]]


def random_tokens(count: int, width: int, device: torch.device = CUDA) -> Tensor:
    return random_inputs.random_tokens(count, width, device)


def random_weight(bits: int, *shape: int, device: torch.device = CUDA) -> Weight:
    return random_inputs.random_weight(bits, *shape, device=device)


def every_block() -> tuple[Tensor, Tensor]:
    """All 256 bytes of two codes, in rows with every scale that a checkpoint may hold."""
    scales = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    return torch.arange(256, dtype=torch.uint8).repeat(127, 1), scales.unsqueeze(1).repeat(1, 32)


def product_error(got: Tensor, x: Tensor, w: Weight) -> float:
    """Of a float32 product, to float64 over the exactly expanded weight."""
    want = x.double() @ w.rows(0, len(got[0])).double().T
    return float((got.double() - want).norm() / want.norm())


def norm_on(size: int, device: torch.device = CUDA) -> Norm:
    return random_norm(size, device)


def moe_on(s: Shape, device: torch.device = CUDA) -> MoeWeights:
    """An expert layer; its router's scores spread, so that tokens choose different experts."""
    width = s.latent or s.hidden
    return MoeWeights(
        gate=(torch.randn(s.experts, s.hidden, device=device) * s.hidden**-0.5).to(s.gate),
        bias=torch.randn(s.experts, device=device) * 0.1,
        top_k=s.top_k,
        scale=2.5,
        normalize=True,
        up=random_weight(4, s.experts, s.size, width, device=device),
        down=random_weight(4, s.experts, width, s.size, device=device),
        shared_up=random_weight(s.shared_bits, s.shared, s.hidden, device=device),
        shared_down=random_weight(s.shared_bits, s.hidden, s.shared, device=device),
        latent_in=random_weight(16, s.latent, s.hidden, device=device) if s.latent else None,
        latent_out=random_weight(16, s.hidden, s.latent, device=device) if s.latent else None,
        tickets=torch.zeros(tickets(s.hidden), dtype=torch.int32, device=device),
    )


def stored_bytes(bits: int, rows: int, columns: int) -> float:
    return rows * columns * (9 / 16 if bits == 4 else bits / 8)


def cases(s: Shape) -> Iterator[tuple[str, int, float]]:
    """(kind, bits, bytes that one launch must read) of every launch of a shape."""
    width = s.latent or s.hidden
    gate = s.experts * s.hidden * s.gate.itemsize
    shared_down = stored_bytes(s.shared_bits, s.hidden, s.shared)
    yield "in_proj", s.mamba_bits, stored_bytes(s.mamba_bits, s.projected, s.hidden)
    yield "out_proj", s.mamba_bits, stored_bytes(s.mamba_bits, s.hidden, s.inner)
    yield "qkv", 16, stored_bytes(16, s.heads + 2 * s.kv, s.hidden)
    yield "o_proj", 16, stored_bytes(16, s.hidden, s.heads)
    yield "head", s.head_bits, stored_bytes(s.head_bits, s.vocab, s.hidden)
    front_bytes = gate + stored_bytes(s.shared_bits, s.shared, s.hidden) + stored_bytes(16, s.latent, s.hidden)
    yield "front", s.shared_bits, front_bytes
    yield "up", 4, s.top_k * stored_bytes(4, s.size, width)
    yield "down", 4, s.top_k * stored_bytes(4, width, s.size) + (0 if s.latent else shared_down)
    if s.latent:
        yield "back", 16, stored_bytes(16, s.hidden, s.latent) + shared_down


def case_of(s: Shape, kind: str, count: int, cut: Cut, device: torch.device, cold: int = 0) -> tuple[Calls, float]:
    """Launches of a kind over different weights, together of more than ``cold`` bytes; and the bytes of one."""
    if kind.startswith("dense"):
        return _dense(int(kind.split(" ")[1]), int(kind.split(" ")[2]), count, cut, device, cold)
    sizes = {name: size for name, _, size in cases(s)}
    size = sizes[kind] if kind in sizes else sum(sizes[k] for k in ("front", "up", "down", "back") if k in sizes)
    sets = max(2, min(64, int(cold / size) + 1)) if cold else 1
    x = random_tokens(count, s.hidden, device)
    calls: Calls = []
    match kind:
        case "in_proj" | "qkv" | "head":
            for _ in range(sets):
                weights = _read(s, kind, device)
                dtype = torch.float32 if kind == "head" else BF16
                calls.append(partial(products, x, weights, dtype, cut=cut))
        case "out_proj" | "o_proj":
            bits, columns = (s.mamba_bits, s.inner) if kind == "out_proj" else (16, s.heads)
            wide = random_tokens(count, columns, device)
            for _ in range(sets):
                w = random_weight(bits, s.hidden, columns, device=device)
                calls.append(partial(linears_add, wide, w, None, None, x, cut=cut))
        case _:
            calls = _expert_calls(s, kind, count, cut, device, sets, x)
    return calls, size


def _dense(rows: int, columns: int, count: int, cut: Cut, device: torch.device, cold: int) -> tuple[Calls, float]:
    size, x = stored_bytes(4, rows, columns), random_tokens(count, columns, device)
    sets = max(2, min(128, int(cold / size) + 1)) if cold else 1
    weights = [random_weight(4, rows, columns, device=device) for _ in range(sets)]
    return [partial(products, x, (w,), BF16, cut=cut) for w in weights], size


def _read(s: Shape, kind: str, device: torch.device) -> tuple[Weight, ...]:
    if kind == "qkv":
        return tuple(random_weight(16, rows, s.hidden, device=device) for rows in (s.heads, s.kv, s.kv))
    bits, rows = (s.mamba_bits, s.projected) if kind == "in_proj" else (s.head_bits, s.vocab)
    return (random_weight(bits, rows, s.hidden, device=device),)


def _expert_calls(
    s: Shape, kind: str, count: int, cut: Cut, device: torch.device, sets: int, stream: Tensor
) -> Calls:
    norm, width = norm_on(s.hidden, device), s.latent or s.hidden
    # Two layers of all experts are more than any second cache; which are chosen differs from call to call.
    layers = [moe_on(s, device) for _ in range(min(2, sets))]
    narrow = random_tokens(count, width, device)
    hidden = random_tokens(count * s.top_k, s.size, device)
    shared = random_tokens(count, s.shared, device)
    weights = torch.rand(count, s.top_k, device=device)
    calls: Calls = []
    for index in range(sets):
        w = layers[index % len(layers)]
        ids = torch.stack([torch.randperm(s.experts, device=device)[: s.top_k] for _ in range(count)]).int()
        match kind:
            case "front":
                fresh = _replaced(w, s, device)
                calls.append(partial(front, stream, fresh, cut))
            case "up":
                calls.append(partial(up_products, narrow, ids, w.up, cut))
            case "down":
                call = partial(
                    down_products, hidden, ids, weights, w.down, torch.empty_like(narrow), w.tickets, cut
                )
                second = None if s.latent else random_weight(s.shared_bits, s.hidden, s.shared, device=device)
                calls.append(partial(call, ending=(shared, second, stream) if second else None))
            case "back":
                out = random_weight(16, s.hidden, width, device=device)
                second = random_weight(s.shared_bits, s.hidden, s.shared, device=device)
                calls.append(partial(linears_add, narrow, out, shared, second, stream, cut=cut))
            case _:
                other = random_tokens(count, s.hidden, device)
                calls.append(partial(moe_add, other, norm, _replaced(w, s, device), cut=cut))
    return calls


def _replaced(w: MoeWeights, s: Shape, device: torch.device) -> MoeWeights:
    """The same experts with a router, a shared expert and latent projections of their own."""
    return replace(
        w,
        gate=(torch.randn(s.experts, s.hidden, device=device) * s.hidden**-0.5).to(s.gate),
        shared_up=random_weight(s.shared_bits, s.shared, s.hidden, device=device),
        shared_down=random_weight(s.shared_bits, s.hidden, s.shared, device=device),
        latent_in=random_weight(16, s.latent, s.hidden, device=device) if s.latent else None,
        latent_out=random_weight(16, s.hidden, s.latent, device=device) if s.latent else None,
    )
