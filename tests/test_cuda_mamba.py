"""cuda/mamba.cu on a CPU, against the op's reference: a few tokens, one launch each."""

import pytest
import torch
from cuda_on_cpu import HAS_COMPILER, Machine

from nanoserve.kernels import cuda_mamba, mamba, nvrtc
from nanoserve.kernels.mamba import MambaState, MambaWeights, state_of
from nanoserve.kernels.ssm import SsmWeights

pytestmark = pytest.mark.skipif(not HAS_COMPILER, reason="g++ is not installed: CUDA C++ is not run on the CPU")

STATES = cuda_mamba.STATES
SHAPES = [
    (8, 64, 2), (16, 64, 2), (8, 64, 1), (6, 64, 3), (2, 64, 1), (1, 64, 1), (2, 16, 1), (24, 4, 3), (5, 32, 1),
]  # fmt: skip
"""Heads, rows of a head, groups: clusters of 8, 4, 2 and 1."""


def unwritten(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """In place of torch.empty: nobody's results yet."""
    return torch.full(size, torch.nan, dtype=dtype, device=device)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A CPU in the place of a card."""
    machine = Machine()
    monkeypatch.setattr(nvrtc, "load", machine.load)
    monkeypatch.setattr(torch, "empty", unwritten)
    return machine


@pytest.mark.parametrize(("heads", "size", "groups"), SHAPES)
def test_tokens(machine: Machine, heads: int, size: int, groups: int) -> None:
    inner = heads * size
    channels = inner + 2 * groups * STATES
    weights = MambaWeights(
        torch.randn(channels, 4) * 0.5,
        torch.randn(channels) * 0.1,
        SsmWeights(torch.rand(heads), torch.randn(heads), torch.randn(heads)),
        torch.rand(inner) + 0.5,
        1e-5,
    )
    begun = state_of(torch.randn(channels, 3).bfloat16(), torch.randn(heads, size, STATES), groups)
    tokens = torch.randn(4, 1, 2 * inner + 2 * groups * STATES + heads).bfloat16()
    tokens[2, :, -heads:] *= 12  # softplus far out on both sides
    ours: list[list[torch.Tensor]] = []
    for seed in (0, 3, 4):
        state = MambaState(begun.conv.clone(), begun.ssm.clone(), begun.tickets)
        want = MambaState(begun.conv.clone(), begun.ssm.clone(), begun.tickets)
        outs: list[torch.Tensor] = []
        for i, token in enumerate(tokens):
            machine.seed, machine.apart = seed + 8 * i if seed else 0, seed == 4
            machine.late = [token, state.conv, state.ssm]
            machine.tensors = [*machine.late, weights.conv, weights.conv_bias, weights.ssm.a_log, weights.ssm.d]
            machine.tensors = [*machine.tensors, weights.ssm.dt_bias, weights.norm]
            outs.append(cuda_mamba.mamba_decode(token, weights, state))
            if seed == 0:
                expected = mamba.mamba_decode(token, weights, want)
                torch.testing.assert_close(outs[-1].float(), expected.float(), rtol=1.6e-2, atol=4e-3)
                assert (outs[-1] != expected).float().mean() < 0.05  # but for roundings the other way
                assert torch.equal(state.conv, want.conv)
                torch.testing.assert_close(state.ssm, want.ssm, rtol=1e-5, atol=1e-4)
        ours.append([*outs, state.conv, state.ssm])
    for other in ours[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, ours[0], strict=True))
