"""`nanoserve.kernels.ssm.ssm_scan` in Triton, on tensor cores: three launches.

1. For every chunk and head: the log decays summed from the chunk's start, and what the chunk adds to the state.
2. For every head: the states, chunk after chunk; what was added is replaced by the state in front of the chunk.
3. For every chunk, head and block of its tokens: the outputs, from the tokens before in the chunk and that state.

B, C and x are BF16 and go to the tensor cores as they are. What meets them (decayed scores, decayed inputs,
states) is float32, and goes there as two BF16, its rounded value and the rest, so that it keeps sixteen bits.
Source: "Transformers are SSMs" (Dao and Gu, 2024), section 6.
"""

# Triton's types are those of its compiler, and not of the language that it compiles.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportReturnType=false, reportCallIssue=false
# pyright: reportAssignmentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoserve.kernels.prefill_checks import checked_rows
from nanoserve.kernels.prefill_tiles import tiles_on
from nanoserve.kernels.ssm import SsmWeights
from nanoserve.kernels.tiles import blocks, launch, power_of_two
from nanoserve.kernels.triton_mamba import softplus


@triton.jit
def _dot(a: tl.tensor, b: tl.tensor, acc: tl.tensor) -> tl.tensor:
    """Acc + a @ b, with a float32 of which two BF16 are taken, and b BF16."""
    high = a.to(tl.bfloat16)
    acc = tl.dot(high, b, acc)
    return tl.dot((a - high.to(tl.float32)).to(tl.bfloat16), b, acc)


@triton.jit(do_not_specialize=["tokens"])
def chunk_kernel(
    x: tl.tensor,
    x_row: tl.tensor,
    dt: tl.tensor,
    dt_row: tl.tensor,
    b: tl.tensor,
    b_row: tl.tensor,
    a_log: tl.tensor,
    dt_bias: tl.tensor,
    decays: tl.tensor,
    added: tl.tensor,
    tokens: tl.tensor,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    STATES: tl.constexpr,
    GROUPS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Grid (heads, chunks). added: [chunks, HEADS, SIZE, STATES]; decays: [3, HEADS, tokens]."""
    head, chunk = tl.program_id(0), tl.program_id(1)
    place = tl.arange(0, BLOCK_L)
    t = chunk * CHUNK + place
    there = (place < CHUNK) & (t < tokens)
    raw = tl.load(dt + t.to(tl.int64) * dt_row + head, mask=there, other=0.0).to(tl.float32)
    steps = tl.where(there, softplus(raw + tl.load(dt_bias + head)), 0.0)
    # In float64, for the sums reach -1e4 and what counts is their small differences; kept as two float32.
    total = tl.cumsum((steps * -tl.exp(tl.load(a_log + head))).to(tl.float64), 0)
    high = total.to(tl.float32)
    out = decays + head * tokens + t
    tl.store(out, steps, mask=there)
    tl.store(out + HEADS * tokens, high, mask=there)
    tl.store(out + 2 * HEADS * tokens, (total - high.to(tl.float64)).to(tl.float32), mask=there)

    last = tl.sum(tl.where(place == BLOCK_L - 1, total, 0.0), 0)  # padded tokens add nothing
    to_end = tl.exp((last - total).to(tl.float32))
    p, n = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    from_x = x + t.to(tl.int64)[None, :] * x_row + (head * SIZE + p)[:, None]
    values = tl.load(from_x, mask=there[None, :] & (p < SIZE)[:, None], other=0.0).to(tl.float32)
    group = head // (HEADS // GROUPS)
    from_b = b + t.to(tl.int64)[:, None] * b_row + (group * STATES + n)[None, :]
    keys = tl.load(from_b, mask=there[:, None] & (n < STATES)[None, :], other=0.0)
    acc = _dot(values * (steps * to_end)[None, :], keys, tl.zeros([BLOCK_P, BLOCK_N], tl.float32))
    target = added + ((chunk * HEADS + head).to(tl.int64) * SIZE + p[:, None]) * STATES + n[None, :]
    tl.store(target, acc, mask=(p < SIZE)[:, None] & (n < STATES)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def pass_kernel(
    added: tl.tensor,
    decays: tl.tensor,
    state: tl.tensor,
    tokens: tl.tensor,
    HEADS: tl.constexpr,
    NUMBERS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Grid (heads, blocks of a head's NUMBERS): state in and out; added becomes each chunk's state in front."""
    head = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < NUMBERS
    place = head.to(tl.int64) * NUMBERS + at
    s, here = tl.load(state + place, mask=inside, other=0.0), added + place
    for chunk in range(tl.cdiv(tokens, CHUNK)):
        end = tl.minimum((chunk + 1) * CHUNK, tokens) - 1
        decay = tl.exp(tl.load(decays + (HEADS + head) * tokens + end))
        new = tl.load(here, mask=inside, other=0.0)
        tl.store(here, s, mask=inside)
        s, here = s * decay + new, here + HEADS * NUMBERS
    tl.store(state + place, s, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def output_kernel(
    x: tl.tensor,
    x_row: tl.tensor,
    b: tl.tensor,
    b_row: tl.tensor,
    c: tl.tensor,
    c_row: tl.tensor,
    d: tl.tensor,
    decays: tl.tensor,
    states: tl.tensor,
    out: tl.tensor,
    tokens: tl.tensor,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    STATES: tl.constexpr,
    GROUPS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Grid (heads, chunks, blocks of BLOCK_Q tokens of a chunk)."""
    head, chunk = tl.program_id(0), tl.program_id(1)
    begin = chunk * CHUNK
    end = tl.minimum(begin + CHUNK, tokens)
    start = begin + tl.program_id(2) * BLOCK_Q
    if start >= end:
        return
    group = head // (HEADS // GROUPS)
    p, n = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    t = start + tl.arange(0, BLOCK_Q)
    there = t < end
    own = decays + head * tokens + t
    high = tl.load(own + HEADS * tokens, mask=there, other=0.0)
    low = tl.load(own + 2 * HEADS * tokens, mask=there, other=0.0)
    from_c = c + t.to(tl.int64)[:, None] * c_row + (group * STATES + n)[None, :]
    queries = tl.load(from_c, mask=there[:, None] & (n < STATES)[None, :], other=0.0)

    # [N, P], so that the product needs no transposition of two halves
    from_state = states + ((chunk * HEADS + head).to(tl.int64) * SIZE + p[None, :]) * STATES + n[:, None]
    state = tl.load(from_state, mask=(p < SIZE)[None, :] & (n < STATES)[:, None], other=0.0)
    rounded = state.to(tl.bfloat16)
    acc = tl.dot(queries, rounded)
    acc = tl.dot(queries, (state - rounded.to(tl.float32)).to(tl.bfloat16), acc)
    acc = acc * tl.exp(high)[:, None]

    for at in range(begin, tl.minimum(start + BLOCK_Q, end), BLOCK_Q):
        u = at + tl.arange(0, BLOCK_Q)
        known = u < end
        from_b = b + u.to(tl.int64)[None, :] * b_row + (group * STATES + n)[:, None]
        keys = tl.load(from_b, mask=known[None, :] & (n < STATES)[:, None], other=0.0)
        from_x = x + u.to(tl.int64)[:, None] * x_row + (head * SIZE + p)[None, :]
        values = tl.load(from_x, mask=known[:, None] & (p < SIZE)[None, :], other=0.0)
        other = decays + head * tokens + u
        steps = tl.load(other, mask=known, other=0.0)
        other_high = tl.load(other + HEADS * tokens, mask=known, other=0.0)
        other_low = tl.load(other + 2 * HEADS * tokens, mask=known, other=0.0)
        between = (high[:, None] - other_high[None, :]) + (low[:, None] - other_low[None, :])
        # Masked before exp: above the diagonal, and for tokens past the end, it may be positive and overflow.
        seen = (t[:, None] >= u[None, :]) & there[:, None]
        reach = tl.exp(tl.where(seen, between, float("-inf")))
        acc = _dot(tl.dot(queries, keys) * (reach * steps[None, :]), values, acc)

    target = t.to(tl.int64)[:, None] * (HEADS * SIZE) + (head * SIZE + p)[None, :]
    mask = there[:, None] & (p < SIZE)[None, :]
    own_x = x + t.to(tl.int64)[:, None] * x_row + (head * SIZE + p)[None, :]
    acc += tl.load(own_x, mask=mask, other=0.0).to(tl.float32) * tl.load(d + head)
    tl.store(out + target, acc.to(tl.bfloat16), mask=mask)


def ssm_prefill(
    x: Tensor,
    dt: Tensor,
    b: Tensor,
    c: Tensor,
    weights: SsmWeights,
    state: Tensor,
    chunk: int,
    tile: tuple[int, int, int, int] | None = None,
) -> Tensor:
    """As `nanoserve.kernels.ssm.ssm_scan`; chunks of ``chunk`` tokens, or of as many as fit.

    ``tile`` overrides the chip's.
    """
    most, queries, state_warps, warps = tile or tiles_on(x.device).scan
    chunk = min(chunk, most)
    (tokens, heads, size), (groups, states) = x.shape, b.shape[1:]
    x, b, c, dt = (checked_rows(m.flatten(1)) for m in (x, b, c, dt))
    chunks, queries = blocks(tokens, chunk), min(queries, max(16, power_of_two(chunk)))
    decays = torch.empty((3, heads, tokens), dtype=torch.float32, device=x.device)
    kept = torch.empty((chunks, heads, size, states), dtype=torch.float32, device=x.device)
    out = torch.empty((tokens, heads, size), dtype=x.dtype, device=x.device)
    block_p, block_n = max(16, power_of_two(size)), max(16, power_of_two(states))
    shape = {"HEADS": heads, "SIZE": size, "STATES": states, "GROUPS": groups, "CHUNK": chunk}
    launch(
        chunk_kernel, (heads, chunks),
        x, x.stride(0), dt, dt.stride(0), b, b.stride(0), weights.a_log, weights.dt_bias, decays, kept, tokens,
        **shape, BLOCK_L=max(16, power_of_two(chunk)), BLOCK_P=block_p, BLOCK_N=block_n, num_warps=state_warps,
    )  # fmt: skip
    launch(
        pass_kernel, (heads, blocks(size * states, 1024)),
        kept, decays, state, tokens, HEADS=heads, NUMBERS=size * states, CHUNK=chunk, BLOCK=1024, num_warps=4,
    )  # fmt: skip
    launch(
        output_kernel, (heads, chunks, blocks(chunk, queries)),
        x, x.stride(0), b, b.stride(0), c, c.stride(0), weights.d, decays, kept, out, tokens,
        **shape, BLOCK_Q=queries, BLOCK_P=block_p, BLOCK_N=block_n, num_warps=warps,
    )  # fmt: skip
    return out
