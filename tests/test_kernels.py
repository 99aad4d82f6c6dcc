"""Every reference op against its mathematics written out naively, mutated state included."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from nanoserve.kernels.attention import LayerKV, attention, kv_append
from nanoserve.kernels.conv import conv
from nanoserve.kernels.linear import Plain
from nanoserve.kernels.moe import experts
from nanoserve.kernels.norm import gated_norm, norm
from nanoserve.kernels.router import router
from nanoserve.kernels.ssm import SsmWeights, ssm_scan, ssm_step


def test_norm_is_over_each_token() -> None:
    x, weight = torch.randn(5, 24), torch.randn(24)
    assert_close(norm(x, weight, 1e-5), torch.nn.functional.rms_norm(x, (24,), weight, 1e-5))


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_gated_norm_gates_before_it_normalises_each_group(groups: int) -> None:
    y, gate, weight = torch.randn(3, 64), torch.randn(3, 64), torch.randn(64)
    gated = y * gate * torch.sigmoid(gate)
    parts = [torch.nn.functional.rms_norm(p, (64 // groups,), None, 1e-5) for p in gated.chunk(groups, -1)]
    assert_close(gated_norm(y, gate, weight, groups, 1e-5), torch.cat(parts, -1) * weight)


@pytest.mark.parametrize("splits", [[11], [1] * 11, [2, 1, 8], [10, 1]])
@pytest.mark.parametrize("width", [4, 2])
def test_conv_continues_over_any_split(splits: list[int], width: int) -> None:
    x, weight, bias = torch.randn(11, 6), torch.randn(6, width), torch.randn(6)
    before = torch.randn(6, width - 1)
    state, padded = before.clone(), torch.cat((before.T, x))
    naive = torch.stack([(padded[t : t + width] * weight.T).sum(0) + bias for t in range(11)])
    got = torch.cat([conv(part, weight, bias, state) for part in x.split(splits)])
    assert_close(got, torch.nn.functional.silu(naive))
    assert torch.equal(state, padded[-(width - 1) :].T)


def naive_ssm(x: Tensor, dt: Tensor, b: Tensor, c: Tensor, w: SsmWeights, state: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence in float64, a head and a token at a time."""
    x, dt, b, c, state = (m.double() for m in (x, dt, b, c, state))
    y = torch.zeros_like(x)
    state = state.clone()
    for t in range(x.shape[0]):
        for h in range(x.shape[1]):
            g = h // (x.shape[1] // b.shape[1])
            step = torch.log1p(torch.exp(dt[t, h] + w.dt_bias[h].double()))
            decay = torch.exp(step * -torch.exp(w.a_log[h].double()))
            state[h] = decay * state[h] + step * torch.outer(x[t, h], b[t, g])
            y[t, h] = state[h] @ c[t, g] + w.d[h].double() * x[t, h]
    return y, state


@pytest.mark.parametrize("tokens", [1, 7, 16, 33])
@pytest.mark.parametrize("chunk", [1, 8, 128])
def test_scan_and_steps_are_the_recurrence(tokens: int, chunk: int) -> None:
    heads, groups, size, states = 6, 2, 5, 3
    x, dt = torch.randn(tokens, heads, size), torch.randn(tokens, heads)
    b, c = torch.randn(2, tokens, groups, states)
    w = SsmWeights(torch.rand(heads) * 3, torch.randn(heads), torch.randn(heads))
    before = torch.randn(heads, size, states)
    want, want_state = naive_ssm(x, dt, b, c, w, before)
    scanned, stepped = before.clone(), before.clone()
    got = ssm_scan(x, dt, b, c, w, scanned, chunk)
    assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    assert_close(scanned.double(), want_state, rtol=1e-4, atol=1e-4)
    assert_close(ssm_step(x, dt, b, c, w, stepped).double(), want, rtol=1e-4, atol=1e-4)
    assert_close(stepped.double(), want_state, rtol=1e-4, atol=1e-4)


def test_the_scan_is_as_exact_as_the_steps() -> None:
    """Float32 sums of log decay reach -1e4 in a chunk; their differences must not lose what matters."""
    tokens, heads = 128, 16
    w = SsmWeights(torch.log(1 + 15 * torch.rand(heads)), torch.ones(heads), torch.zeros(heads))
    x, dt, (b, c) = torch.randn(tokens, heads, 8), 2 * torch.randn(tokens, heads), torch.randn(2, tokens, 1, 16)
    want, _ = naive_ssm(x, dt, b, c, w, torch.zeros(heads, 8, 16))
    for got in (
        ssm_scan(x, dt, b, c, w, torch.zeros(heads, 8, 16), 128),
        ssm_step(x, dt, b, c, w, torch.zeros(heads, 8, 16)),
    ):
        assert (got.double() - want).abs().max() < 1e-4


def test_the_scan_survives_strong_decay() -> None:
    """exp(sum of dt * A) underflows inside a chunk; the masked upper triangle must not turn into inf * 0."""
    tokens, heads = 64, 2
    w = SsmWeights(torch.full((heads,), 4.0), torch.ones(heads), torch.full((heads,), 5.0))
    x, dt, (b, c) = torch.randn(tokens, heads, 4), torch.randn(tokens, heads), torch.randn(2, tokens, 1, 3)
    state = torch.randn(heads, 4, 3)
    before = state.clone()
    got = ssm_scan(x, dt, b, c, w, state, 32)
    want, want_state = naive_ssm(x, dt, b, c, w, before)
    assert_close(got.double(), want, rtol=1e-4, atol=1e-3)
    assert_close(state.double(), want_state, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("splits", [[37], [1] * 37, [16, 20, 1]])
def test_attention_over_scattered_pages(dtype: torch.dtype, splits: list[int]) -> None:
    page, heads, kv_heads, size = 16, 6, 2, 8
    table = torch.tensor([5, 0, 3, 0], dtype=torch.int32)
    scales = (0.05, 0.02) if dtype == torch.float8_e4m3fn else (1.0, 1.0)
    shape = (7, page, kv_heads, size)
    cache = LayerKV(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype), *scales)
    q, k, v = torch.randn(37, heads, size), *torch.randn(2, 37, kv_heads, size)
    positions = torch.arange(37)
    parts = zip(q.split(splits), k.split(splits), v.split(splits), positions.split(splits), strict=True)
    outputs: list[Tensor] = []
    for q_, k_, v_, p in parts:
        kv_append(k_, v_, cache, table, p)
        outputs.append(attention(q_, cache, table, p))
    stored_k, stored_v = ((m / s).to(dtype).float() * s for m, s in zip((k, v), scales, strict=True))
    k_, v_ = (m.repeat_interleave(heads // kv_heads, dim=1) for m in (stored_k, stored_v))
    scores = torch.einsum("thd,shd->hts", q, k_) / size**0.5
    scores = scores.masked_fill(torch.ones(37, 37, dtype=torch.bool).triu(1), -torch.inf)
    assert_close(torch.cat(outputs), torch.einsum("hts,shd->thd", scores.softmax(-1), v_), rtol=1e-4, atol=1e-5)


def test_fp8_keys_out_of_range_saturate() -> None:
    keys, values = torch.zeros(2, 1, 16, 1, 1).to(torch.float8_e4m3fn)
    cache = LayerKV(keys, values)
    kv_append(
        torch.full((1, 1, 1), 1e6), torch.full((1, 1, 1), -1e6), cache, torch.zeros(1).int(), torch.zeros(1).long()
    )
    assert (float(cache.k[0, 0, 0, 0]), float(cache.v[0, 0, 0, 0])) == (448.0, -448.0)


@pytest.mark.parametrize("normalize", [True, False])
def test_router_bias_chooses_but_does_not_weigh(normalize: bool) -> None:
    x, gate, bias = torch.randn(9, 12), torch.randn(20, 12), torch.randn(20) * 3
    ids, weights = router(x, gate, bias, 4, 2.5, normalize)
    scores = torch.sigmoid(x @ gate.T)
    for t in range(9):
        chosen = sorted(range(20), key=lambda e, t=t: -float(scores[t, e] + bias[e]))[:4]
        assert ids[t].tolist() == chosen
        own = scores[t, chosen]
        assert_close(weights[t], 2.5 * (own / own.sum() if normalize else own))
    assert (ids.dtype, weights.dtype) == (torch.int32, torch.float32)


def test_experts_are_summed_with_their_weights() -> None:
    x, up, down = torch.randn(5, 16), torch.randn(7, 24, 16), torch.randn(7, 16, 24)
    ids = torch.stack([torch.randperm(7)[:3] for _ in range(5)]).int()
    weights = torch.rand(5, 3)
    want = torch.zeros(5, 16)
    for t in range(5):
        for k in range(3):
            e = int(ids[t, k])
            want[t] += weights[t, k] * (down[e] @ torch.relu(up[e] @ x[t]).square())
    assert_close(experts(x, ids, weights, Plain(up), Plain(down)), want, rtol=1e-4, atol=1e-3)
