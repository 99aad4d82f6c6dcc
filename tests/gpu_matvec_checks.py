"""The checks of gpu_matvec.py: the kernels against their references, on the card."""

from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from gpu_inputs import (
    BF16,
    CUDA,
    every_block,
    moe_on,
    norm_on,
    product_error,
    random_tokens,
    random_weight,
)
from gpu_report import Report
from torch import Tensor

from nanoserve.kernels import fused, nvfp4, triton_experts, triton_linear
from nanoserve.kernels.linear import Nvfp4
from nanoserve.kernels.norm import norm as rms_norm
from nanoserve.kernels.router import router
from nanoserve.kernels.triton_linear import products
from nanoserve.kernels.weight_launches import SHAPES


def check_products(report: Report) -> None:
    worst: dict[str, float] = {}
    for bits, (rows, columns), count in product((4, 8, 16), ((2688, 4096), (1867, 1856)), (1, 3, 8, 16, 40, 300)):
        w, x = random_weight(bits, rows, columns), random_tokens(count, columns)
        call = partial(products, x, (w,), torch.float32)
        got, again = call()[0], call()[0]
        error = product_error(got, x, w)
        worst[f"{bits} bits, {'few' if count <= 16 else 'many'}"] = max(
            error if torch.equal(got, again) else float("nan"),
            worst.get(f"{bits} bits, {'few' if count <= 16 else 'many'}", 0.0),
        )
    data, scales = (m.to(CUDA) for m in every_block())
    w = Nvfp4(data, scales, torch.tensor(1.0, device=CUDA))
    want, eye = nvfp4.unpack(data, scales, w.global_scale).T, torch.eye(512, device=CUDA).to(BF16)
    few = torch.cat([products(part, (w,), torch.float32)[0] for part in eye.split(16)])
    exact = torch.equal(few, want) and torch.equal(products(eye, (w,), torch.float32)[0], want)
    report.add("products", {"worst": worst, "codes_exact": exact}, f"products: {worst}, every code exact: {exact}")


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def check_layers(report: Report) -> None:
    for name, count in product(SHAPES, (1, 2, 8)):
        s = SHAPES[name]
        w, stream, norm = moe_on(s), random_tokens(count, s.hidden), norm_on(s.hidden)
        x = triton_linear.norm(stream, norm.weight, norm.eps)
        ids, _ = triton_experts.router(x, w.gate, w.bias, w.top_k, w.scale, True)
        want_ids, _ = router(x, w.gate, w.bias, w.top_k, w.scale, True)
        want = fused.moe_add(stream, norm, w)
        got = triton_experts.moe_add(stream, norm, w)
        again = triton_experts.moe_add(stream, norm, w)
        row = {
            "same_choice": float((ids == want_ids).float().mean()),
            "norm": relative(x, rms_norm(stream, norm.weight, norm.eps)),
            "stream": relative(got, want),
            "equal_twice": torch.equal(got, again),
            "tickets": int(w.tickets.abs().sum()),
        }
        back, mixed = random_weight(s.mamba_bits, s.hidden, s.inner), random_tokens(count, s.inner)
        ended = triton_linear.linear_add(mixed, back, stream)
        row["linear_add"] = relative(ended, fused.linear_add(mixed, back, stream))
        report.add(f"moe {name} {count}", row, f"moe {name} {count} tokens: {row}")


def check_chain(report: Report) -> None:
    """Early launches must not read what the launch before has yet to write."""
    s, layers = SHAPES["nano"], 6
    mixtures = [moe_on(s) for _ in range(layers)]
    ins = [random_weight(4, s.projected, s.hidden) for _ in range(layers)]
    outs, norm = [random_weight(4, s.hidden, s.inner) for _ in range(layers)], norm_on(s.hidden)
    first = random_tokens(1, s.hidden)

    def chain(between: Callable[[], None]) -> Tensor:
        stream = first
        for into, out, mixture in zip(ins, outs, mixtures, strict=True):
            (wide,) = triton_linear.norm_linears(stream, norm, (into,))
            between()
            stream = triton_linear.linear_add(wide[:, : s.inner].contiguous(), out, stream)
            between()
            stream = triton_experts.moe_add(stream, norm, mixture)
            between()
        return stream

    want = chain(torch.cuda.synchronize)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain(lambda: None)
    wrong = 0
    for _ in range(200):
        got.fill_(float("nan"))
        graph.replay()
        wrong += not torch.equal(got, want)
    report.add("chain", {"replays": 200, "wrong": wrong}, f"chain of {layers} layers, 200 replays: {wrong} differ")
