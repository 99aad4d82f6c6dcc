"""The Triton kernels of a prefill, interpreted, against their references: state and rounding too."""

import interpreted  # before any kernel
import pytest
import torch
from test_triton_weights import tokens, weight
from torch import Tensor
from torch.testing import assert_close

from nanoserve.kernels import attention, conv, moe, norm, router, ssm
from nanoserve.kernels.attention import LayerKV
from nanoserve.kernels.prefill_experts import experts_prefill
from nanoserve.kernels.prefill_router import router_many
from nanoserve.kernels.prefill_tiles import ExpertTile
from nanoserve.kernels.ssm import SsmWeights
from nanoserve.kernels.triton_flash import attention_prefill
from nanoserve.kernels.triton_prefill import conv_prefill, gated_norm
from nanoserve.kernels.triton_scan import ssm_prefill

assert interpreted
BF16, FP8, F32 = torch.bfloat16, torch.float8_e4m3fn, torch.float32


def error(got: Tensor, want: Tensor) -> float:
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    return float((got.double() - want.double()).norm() / want.double().norm())


def choices(count: int, experts: int, top_k: int) -> tuple[Tensor, Tensor]:
    ids = torch.stack([torch.randperm(experts)[:top_k] for _ in range(count)]).int()
    return ids, torch.rand(count, top_k)


@pytest.mark.parametrize(
    ("forms", "count"), [("nvfp4 nvfp4", 33), ("fp8 bf16", 17), ("nvfp4 fp8", 5), ("bf16 nvfp4", 20)]
)
def test_experts_at_odd_sizes(forms: str, count: int) -> None:
    """With experts that nobody chose, and one that all did, in more blocks than one."""
    up, down = (weight(form, 9, *shape) for form, shape in zip(forms.split(), ((80, 48), (48, 80)), strict=True))
    x, (ids, weights) = tokens(count, 48), choices(count, 6, 3)
    ids += 1
    ids[:, 1] = 8
    for tile in (ExpertTile(64, 16, 64, 4, 2), ExpertTile(32, 32, 128, 4, 2)):
        got = experts_prefill(x, ids, weights, up, down, tile)
        assert error(got, moe.experts(x, ids, weights, up, down)) < 2e-3


def recurrence(heads: int) -> SsmWeights:
    return SsmWeights(torch.log(1 + 15 * torch.rand(heads)), torch.randn(heads), torch.randn(heads) - 3)


@pytest.mark.parametrize("spread", [1.0, 30.0])
@pytest.mark.parametrize(
    ("count", "heads", "size", "groups", "states", "chunk"), [(75, 4, 16, 2, 16, 32), (17, 2, 10, 1, 20, 128)]
)
def test_scan_is_the_reference(
    count: int, heads: int, size: int, groups: int, states: int, chunk: int, spread: float
) -> None:
    """From a state, on inputs that lie in a wider tensor; also where tokens of long and short steps are mixed."""
    wide = torch.randn(count, heads * size + 2 * groups * states + heads + 3).to(BF16)
    x, b, c, dt, _ = wide.split([heads * size, groups * states, groups * states, heads, 3], dim=-1)
    x, (b, c) = x.unflatten(1, (heads, size)), (m.unflatten(1, (groups, states)) for m in (b, c))
    dt.mul_(spread)
    weights, start = recurrence(heads), torch.randn(heads, size, states)
    got_state, want_state = start.clone(), start.double()
    got = ssm_prefill(x, dt, b, c, weights, got_state, chunk)
    want = exact_scan(x, dt, b, c, weights, want_state)
    assert got.dtype == BF16
    assert error(got.double(), want) < 2.5e-3  # the result is rounded to BF16
    assert error(got_state.double(), want_state) < 3e-5
    split_state = start.clone()
    cut = count // 3
    parts = [
        ssm_prefill(x[s], dt[s], b[s], c[s], weights, split_state, chunk)
        for s in (slice(0, cut), slice(cut, count))
    ]
    assert error(torch.cat(parts), got) < 3e-3
    assert error(split_state, got_state) < 3e-5


def exact_scan(x: Tensor, dt: Tensor, b: Tensor, c: Tensor, weights: SsmWeights, state: Tensor) -> Tensor:
    """Token after token in float64."""
    steps = torch.nn.functional.softplus(dt.double() + weights.dt_bias.double())
    decay = torch.exp(steps * -torch.exp(weights.a_log.double()))
    repeat = x.shape[1] // b.shape[1]
    keys, queries = (m.double().repeat_interleave(repeat, dim=1) for m in (b, c))
    rows: list[Tensor] = []
    for t in range(len(x)):
        put = (x[t].double() * steps[t, :, None]).unsqueeze(-1) * keys[t].unsqueeze(1)
        state.mul_(decay[t, :, None, None]).add_(put)
        rows.append((state * queries[t].unsqueeze(1)).sum(-1))
    return torch.stack(rows) + x.double() * weights.d.double().unsqueeze(-1)


def test_scan_keeps_small_differences_of_large_sums() -> None:
    """A step that forgets everything, and then short ones: float32 sums of the chunk would lose a part in 1e3."""
    heads, size, states, count = 2, 16, 16, 64
    x, b, c = (torch.randn(count, n, 16).to(BF16) for n in (heads, 1, 1))
    dt = torch.full((count, heads), -6.0).to(BF16)
    dt[3] = 3000.0
    weights = SsmWeights(torch.log(torch.tensor([16.0, 12.0])), torch.zeros(heads), torch.zeros(heads))
    state, want_state = torch.zeros(heads, size, states), torch.zeros(heads, size, states, dtype=torch.float64)
    ssm_prefill(x, dt, b, c, weights, state, 64)
    exact_scan(x, dt, b, c, weights, want_state)
    assert error(state.double(), want_state) < 3e-5
    reference = torch.zeros(heads, size, states)
    ssm.ssm_scan(x, dt, b, c, weights, reference, 64)
    assert_close(state, reference, rtol=1e-3, atol=1e-3 * float(reference.abs().max()))


@pytest.mark.parametrize("kv_dtype", [BF16, FP8])
@pytest.mark.parametrize(
    ("count", "before", "heads", "kv_heads", "dim"), [(33, 0, 16, 1, 16), (17, 40, 6, 2, 20), (1, 5, 4, 4, 8)]
)
def test_attention_is_the_reference(
    count: int, before: int, heads: int, kv_heads: int, dim: int, kv_dtype: torch.dtype
) -> None:
    k, v = (torch.randn(8, 16, kv_heads, dim).clamp(-3, 3).to(kv_dtype) for _ in range(2))
    cache = LayerKV(k, v, 0.5, 0.25) if kv_dtype == FP8 else LayerKV(k, v)
    table = torch.randperm(8).int()
    q, positions = tokens(count, heads * dim).view(count, heads, dim), torch.arange(count) + before
    want = attention.attention(q, cache, table, positions)
    assert error(attention_prefill(q, cache, table, positions, (16, 16, 4, 2)), want) < 5e-3
    assert error(attention_prefill(q, cache, table, positions, (64, 32, 4, 2)), want) < 5e-3


@pytest.mark.parametrize("width", [4, 2, 1])
@pytest.mark.parametrize("count", [1, 2, 3, 16, 37])
def test_convolution_is_the_reference_and_leaves_its_state(count: int, width: int) -> None:
    """Also with fewer tokens than the state holds, and on a part of a wider tensor."""
    x = torch.randn(count, 43).to(BF16)[:, 3:40]
    kernel, bias, state = torch.randn(37, width), torch.randn(37), torch.randn(37, width - 1).to(BF16)
    want_state = state.clone()
    want = conv.conv(x, kernel, bias, want_state)
    assert error(conv_prefill(x, kernel, bias, state, (16, 32, 4)), want) < 2e-3
    assert torch.equal(state, want_state)


@pytest.mark.parametrize(("count", "groups", "size"), [(5, 2, 24), (3, 1, 300)])
def test_gated_norm_is_the_reference(count: int, groups: int, size: int) -> None:
    y, z = tokens(count, groups * size), tokens(count, groups * size + 5)[:, 5:]
    scale = 1 + 0.1 * torch.randn(groups * size)
    assert error(gated_norm(y, z, scale, groups, 1e-5), norm.gated_norm(y, z, scale, groups, 1e-5)) < 2e-3


@pytest.mark.parametrize(("experts", "top_k"), [(128, 6), (11, 3)])
def test_router_chooses_as_the_reference(experts: int, top_k: int) -> None:
    x, gate, bias = tokens(18, 72), torch.randn(experts, 72) / 24, torch.randn(experts) * 0.2
    ids, weights = router_many(x, gate, bias, top_k, 2.5, True)
    want_ids, want = router.router(x, gate, bias, top_k, 2.5, True)
    assert torch.equal(ids, want_ids)
    assert_close(weights, want, rtol=1e-5, atol=1e-6)
