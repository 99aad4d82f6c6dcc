"""FlashInfer's recurrence, stood in for by its documented arithmetic: it needs a chip that is not here."""

from collections.abc import Callable
from typing import Any

import flashinfer_arithmetic as arithmetic
import interpreted  # before any kernel
import pytest
import torch
from flashinfer_arithmetic import Recorder
from torch import Tensor

from nanoserve.kernels import flashinfer_ops
from nanoserve.kernels.flashinfer_mamba import mamba_decode
from nanoserve.kernels.mamba import mamba_decode as reference
from nanoserve.kernels.random_inputs import mamba_inputs

assert interpreted
CPU, BF16 = torch.device("cpu"), torch.bfloat16
NANO = (64, 64, 8, 128, 4)
"""Of a Mamba layer: heads, size of a head, groups, states, width of the convolution."""


def difference(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


def ssu(record: Recorder) -> Callable[..., Tensor]:
    """`selective_state_update_kernel_simple`, in float32; checked as `run_selective_state_update_stp` does."""
    function = arithmetic.real("flashinfer.mamba.selective_state_update", "selective_state_update")

    def run(*args: Any, **kwargs: Any) -> Tensor:
        a = record.bind(function, args, kwargs)
        state, x, dt, out = a["state"], a["x"], a["dt"], a["out"]
        _, heads, dim, states = state.shape
        groups = a["B"].shape[1]
        assert state.dtype == torch.float32
        assert state.stride()[1:] == (dim * states, states, 1)
        assert (x.shape, x.stride()[1:]) == ((1, heads, dim), (dim, 1))
        assert (dt.shape, dt.stride()[1:]) == ((1, heads, dim), (1, 0))
        assert (a["A"].dtype, a["A"].shape, a["A"].stride()) == (torch.float32, state.shape[1:], (1, 0, 0))
        for name in ("D", "dt_bias"):
            assert (a[name].shape, a[name].stride(), a[name].dtype) == ((heads, dim), (1, 0), dt.dtype)
        for name in ("B", "C"):
            assert (a[name].shape, a[name].stride()[1:]) == ((1, groups, states), (states, 1))
        assert {a[name].dtype for name in ("x", "B", "C", "out")} == {BF16}
        assert all(a[name].data_ptr() % 16 == 0 for name in ("x", "B", "C", "state"))
        assert (out.shape, out.is_contiguous()) == (x.shape, True)
        assert (a["backend"], a["dt_softplus"], a["cache_steps"]) == ("flashinfer", True, 0)
        assert a["z"] is a["state_batch_indices"] is a["cu_seqlens"] is None
        step = dt[0, :, 0] + a["dt_bias"][:, 0]
        step = torch.where(step <= 20, torch.log1p(step.exp()), step)
        keys, queries = (a[n][0].float().repeat_interleave(heads // groups, 0)[:, None] for n in ("B", "C"))
        wide = x[0].float()[..., None]
        state[0].mul_((a["A"][:, :1, :1] * step[:, None, None]).exp())
        state[0].add_(keys * step[:, None, None] * wide)
        return out[0].copy_((state[0] * queries).sum(-1) + a["D"] * wide[..., 0])

    return run


@pytest.mark.parametrize("sizes", [NANO, (8, 32, 2, 32, 4)])
@pytest.mark.parametrize("tokens", [1, 3])
def test_the_recurrence_is_the_reference(
    sizes: tuple[int, int, int, int, int], tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Recorder()
    monkeypatch.setattr(flashinfer_ops, "ssu", lambda: ssu(record))
    torch.manual_seed(3)
    projected, weights, state = mamba_inputs(tokens, sizes, CPU)
    torch.manual_seed(3)
    want_state = mamba_inputs(tokens, sizes, CPU)[2]
    got, want = mamba_decode(projected, weights, state), reference(projected, weights, want_state)
    assert difference(got, want) < 4e-3
    assert difference(state.ssm, want_state.ssm) < 4e-3
    assert torch.equal(state.conv, want_state.conv)
    assert len(record.calls["selective_state_update"]) == tokens


def test_flashinfer_has_it() -> None:
    assert callable(flashinfer_ops.ssu())
