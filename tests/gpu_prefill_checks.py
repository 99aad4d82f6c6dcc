"""The checks of gpu_prefill.py: every prefill kernel against its reference, on fresh random inputs."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu_inputs import random_tokens, random_weight
from gpu_report import Report
from prefill_cases import (
    BF16,
    DEVICE,
    FP8,
    REHEARSE,
    SCANS,
    attention_case,
    experts_case,
    mamba_case,
    routing,
)
from torch import Tensor

from nanoserve.kernels import attention, conv, moe, norm, router, ssm, triton_linear
from nanoserve.kernels.linear import linear_f32
from nanoserve.kernels.prefill_experts import experts_prefill
from nanoserve.kernels.prefill_router import router_many
from nanoserve.kernels.triton_flash import attention_prefill
from nanoserve.kernels.triton_prefill import conv_prefill, gated_norm
from nanoserve.kernels.triton_scan import ssm_prefill

COUNTS = (17,) if REHEARSE else (17, 63, 100, 512, 2048)


def relative(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    return float((got.double() - want.double()).norm() / want.double().norm())


def tell(report: Report, key: str, errors: dict[str, float], limit: float, *, same: bool = True) -> None:
    right = same and all(error < limit for error in errors.values())  # a NaN is not right
    shown = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    line = f"{'right' if right else 'WRONG'} {key}: {shown}{'' if same else '; DIFFERS WHEN REPEATED'}"
    report.add(f"check {key}", {"errors": errors, "limit": limit, "same": same, "right": right}, line)


def check_experts(report: Report, name: str, bits: int, counts: tuple[int, ...]) -> None:
    up, down, s = experts_case(name, bits)
    width, errors, same = up.data.shape[-1] * (2 if bits == 4 else 1), dict[str, float](), True
    for count in counts:
        x, (ids, weights) = random_tokens(count, width, DEVICE), routing(count, s.experts, s.top_k)
        call = partial(experts_prefill, x, ids, weights, up, down)
        got = call()
        same &= torch.equal(got, call())
        errors[f"T={count}"] = relative(got, moe.experts(x, ids, weights, up, down))
    tell(report, f"experts {name} {bits} bits", errors, 4e-3, same=same)


def check_dense(report: Report, rows: int, columns: int, counts: tuple[int, ...]) -> None:
    for bits in (16, 8, 4):
        w, errors = random_weight(bits, rows, columns, device=DEVICE), dict[str, float]()
        for count in counts:
            x = random_tokens(count, columns, DEVICE)
            want = linear_f32(x, w)
            errors[f"T={count}"] = relative(triton_linear.linear_f32(x, w), want)
        tell(report, f"dense {rows}x{columns} {bits} bits", errors, 2e-5)


def check_scan(report: Report, name: str, spread: float, counts: tuple[int, ...]) -> None:
    errors, same = dict[str, float](), True
    for count in counts:
        projected, w, state = mamba_case(count, *SCANS[name])
        heads, size, groups, states = SCANS[name]
        inner = heads * size
        z, xbc, dt = projected.split([inner, inner + 2 * groups * states, heads], dim=-1)
        dt.mul_(spread)
        conv_states = [state.conv.clone() for _ in range(2)]
        mixed = conv_prefill(xbc, w.conv, w.conv_bias, conv_states[0])
        want = conv.conv(xbc, w.conv, w.conv_bias, conv_states[1])
        same &= torch.equal(*conv_states)
        errors[f"conv T={count}"] = relative(mixed, want)
        x, b, c = want.split([inner, groups * states, groups * states], dim=-1)
        x, (b, c) = x.unflatten(1, (heads, size)), (m.unflatten(1, (groups, states)) for m in (b, c))
        got_state, again_state, want_state = (state.ssm.clone() for _ in range(3))
        y = ssm_prefill(x, dt, b, c, w.ssm, got_state, 128)
        again = ssm_prefill(x, dt, b, c, w.ssm, again_state, 128)
        wanted = ssm.ssm_scan(x, dt, b, c, w.ssm, want_state, 128)
        same &= torch.equal(y, again) and torch.equal(got_state, again_state)
        errors[f"y T={count}"], errors[f"state T={count}"] = relative(y, wanted), relative(got_state, want_state)
        flat = wanted.flatten(1)
        errors[f"norm T={count}"] = relative(
            gated_norm(flat, z, w.norm, groups, 1e-5), norm.gated_norm(flat, z, w.norm, groups, 1e-5)
        )
    tell(report, f"mamba {name}, time steps x {spread}", errors, 4e-3, same=same)


def check_attention(
    report: Report, kv: torch.dtype, sizes: tuple[int, int, int], cases: list[tuple[int, int]]
) -> None:
    errors, same = dict[str, float](), True
    for count, before in cases:
        case: Any = attention_case(count, count + before, *sizes, kv)
        got = attention_prefill(*case)
        same &= torch.equal(got, attention_prefill(*case))
        errors[f"T={count} after {before}"] = relative(got, attention.attention(*case))
    tell(report, f"attention {sizes} {'FP8' if kv == FP8 else 'BF16'}", errors, 5e-3, same=same)


def check_router(report: Report, experts: int, hidden: int, top_k: int, dtype: torch.dtype) -> None:
    errors: dict[str, float] = {}
    for count in COUNTS:
        x = random_tokens(count, hidden, DEVICE)
        gate = (torch.randn(experts, hidden, device=DEVICE) * hidden**-0.5).to(dtype)
        bias = torch.randn(experts, device=DEVICE) * 0.1
        ids, weights = router_many(x, gate, bias, top_k, 2.5, True)
        want_ids, want = router.router(x, gate, bias, top_k, 2.5, True)
        other = float((ids.sort(-1).values != want_ids.sort(-1).values).float().mean())
        errors[f"T={count}"] = other or relative(weights, want)  # near ties may fall otherwise
    tell(report, f"router {experts} top {top_k}", errors, 1e-3)


def checks(report: Report) -> list[tuple[str, Callable[[], None]]]:
    """Every check, by name."""
    if REHEARSE:
        return [
            ("experts", partial(check_experts, report, "odd", 4, COUNTS)),
            ("dense", partial(check_dense, report, 37, 272, COUNTS)),
            ("mamba", partial(check_scan, report, "odd", 1.0, COUNTS)),
            ("attention", partial(check_attention, report, FP8, (6, 2, 20), [(17, 3)])),
            ("router", partial(check_router, report, 12, 64, 3, BF16)),
        ]
    long = [(17, 0), (63, 100), (100, 2048), (512, 1541), (2048, 0), (1, 30), (2048, 4096)]
    return [
        ("experts nano", partial(check_experts, report, "nano", 4, COUNTS)),
        ("experts super", partial(check_experts, report, "super", 4, (17, 2048))),
        ("experts odd", partial(check_experts, report, "odd", 4, (17, 100, 512))),
        ("experts odd FP8", partial(check_experts, report, "odd", 8, (17, 100, 512))),
        ("experts odd BF16", partial(check_experts, report, "odd", 16, (17, 100, 512))),
        ("dense", partial(check_dense, report, 2688, 4096, COUNTS)),
        ("dense odd", partial(check_dense, report, 1867, 1856, (17, 100))),
        *(
            (f"mamba {name} {spread}", partial(check_scan, report, name, spread, COUNTS))
            for name, spread in (("nano", 1.0), ("super", 1.0), ("nano", 30.0), ("odd", 1.0), ("odd", 30.0))
        ),
        *(
            (f"attention {kv}", partial(check_attention, report, kv, sizes, long))
            for kv in (BF16, FP8)
            for sizes in ((32, 2, 128), (6, 2, 20))
        ),
        ("router nano", partial(check_router, report, 128, 2688, 6, torch.float32)),
        ("router super", partial(check_router, report, 512, 4096, 22, BF16)),
    ]
