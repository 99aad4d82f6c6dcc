"""cuda/attention.cu on a CPU, against the op's reference; the cache, too."""

import pytest
import torch
from cuda_on_cpu import HAS_COMPILER, Machine

from nanoserve.kernels import cuda_attention, nvrtc, triton_attention
from nanoserve.kernels.attention import TICKETS, LayerKV, attention_decode

pytestmark = pytest.mark.skipif(not HAS_COMPILER, reason="g++ is not installed: CUDA C++ is not run on the CPU")

PAGE, PAGES, SIZE = 16, 24, 128
LONG = 200  # pages of a context that takes a block several chunks
FP8, BF16 = torch.float8_e4m3fn, torch.bfloat16


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A CPU in the place of a card; nobody has written what is allocated, and few positions take many clusters."""
    machine = Machine()
    monkeypatch.setattr(nvrtc, "load", machine.load)
    monkeypatch.setattr(cuda_attention, "BLOCKS", 48)
    monkeypatch.setattr(cuda_attention, "ALONE", 4 * 2 * SIZE)

    def empty(size: tuple[int, ...], dtype: torch.dtype = torch.float32, device: object = None) -> torch.Tensor:
        made = torch.full(size, torch.nan, dtype=dtype)
        machine.tensors = [*machine.tensors, made]
        return made

    monkeypatch.setattr(torch, "empty", empty)
    return machine


def pages_of(dtype: torch.dtype, kv_heads: int, pages: int) -> torch.Tensor:
    return (torch.randn(pages, PAGE, kv_heads, SIZE) * 2).to(dtype)


@pytest.mark.parametrize("dtype", [BF16, FP8])
@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 2), (4, 1), (15, 3)])
@pytest.mark.parametrize("position", [0, 1, 15, 16, 47, 48, 100, 250])
def test_a_token(machine: Machine, dtype: torch.dtype, heads: int, kv_heads: int, position: int) -> None:
    check(machine, dtype, heads, kv_heads, position, PAGES)


@pytest.mark.parametrize("dtype", [BF16, FP8])
@pytest.mark.parametrize("alone", [0, LONG * PAGE * 2 * SIZE])
@pytest.mark.parametrize("position", [2560, LONG * PAGE - 1])
def test_several_chunks(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, alone: int, position: int
) -> None:
    """A block's last chunks are copied while it is at work; by one cluster, and by two."""
    monkeypatch.setattr(cuda_attention, "BLOCKS", 16)
    monkeypatch.setattr(cuda_attention, "ALONE", alone)
    check(machine, dtype, 5, 1, position, LONG)


def check(machine: Machine, dtype: torch.dtype, heads: int, kv_heads: int, position: int, pages: int) -> None:
    """Against the reference, and one run against another."""
    scales = (0.5, 0.25) if dtype == FP8 else (1.0, 1.0)
    table = torch.randperm(pages).int()
    q = torch.randn(1, heads, SIZE).bfloat16()
    k, v = (torch.randn(1, kv_heads, SIZE).bfloat16() for _ in range(2))
    k[0, 0, :3] *= 1e4  # past what FP8 holds
    positions = torch.tensor([position])
    begun = pages_of(dtype, kv_heads, pages), pages_of(dtype, kv_heads, pages)
    want_cache = LayerKV(begun[0].clone(), begun[1].clone(), *scales)
    want = attention_decode(q.clone(), k, v, want_cache, table, positions)
    outs: list[torch.Tensor] = []
    tickets = torch.zeros((kv_heads, TICKETS), dtype=torch.int32)
    for seed in (0, 3, 4):
        cache = LayerKV(begun[0].clone(), begun[1].clone(), *scales, tickets)
        machine.seed, machine.apart, machine.late = seed, seed == 4, [q, k, v]
        machine.tensors = [q, k, v, cache.k, cache.v, table, positions, tickets]
        outs.append(cuda_attention.attention_decode(q, k, v, cache, table, positions))
        for got, expected in ((cache.k, want_cache.k), (cache.v, want_cache.v)):
            assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))
    assert not tickets.any()
    error = (outs[0].float() - want.float()).norm() / want.float().norm()
    assert error < 4e-3, error
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_other_heads_and_more_tokens_are_tritons(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []

    def attend(q: torch.Tensor, *_: object) -> torch.Tensor:
        seen.append(tuple(q.shape))
        return q

    monkeypatch.setattr(triton_attention, "attention_decode", attend)
    table = torch.arange(PAGES).int()
    for tokens, heads, size in ((2, 4, SIZE), (1, 4, 64), (1, 17, SIZE)):
        cache = LayerKV(torch.zeros(PAGES, PAGE, 1, size).bfloat16(), torch.zeros(PAGES, PAGE, 1, size).bfloat16())
        k = torch.zeros(tokens, 1, size).bfloat16()
        q = torch.zeros(tokens, heads, size).bfloat16()
        cuda_attention.attention_decode(q, k, k, cache, table, torch.arange(tokens))
    assert seen == [(2, 4, SIZE), (1, 4, 64), (1, 17, SIZE)]
