"""The ops of a decode step by CUDA C++, on a CPU, against the references."""

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from cuda_on_cpu import HAS_COMPILER, CpuKernel, Machine
from cuda_products_checks import tensors_of, weight
from torch import Tensor

from nanoserve.kernels import cuda_ops, cuda_products, fused, nvrtc, triton_experts, triton_linear
from nanoserve.kernels.fused import MoeWeights, Norm, tickets
from nanoserve.kernels.linear import Fp8, Nvfp4, Plain, Weight

pytestmark = pytest.mark.skipif(not HAS_COMPILER, reason="g++ is not installed: CUDA C++ is not run on the CPU")


@dataclass(slots=True)
class Step(Machine):
    """A CPU in the place of a card, for launches that follow one another.

    Attributes:
        front: what the launch in front wrote: late for the next one.
        launches: so far.
        major: of the chip, for which launches are cut.
    """

    major: int = 9
    front: list[Tensor] = field(default_factory=list[Tensor])
    launches: int = 0

    def load(
        self, name: str, defines: Mapping[str, str], threads: int, shared: int, device: torch.device
    ) -> "StepKernel":
        return StepKernel(self, name, defines, threads, shared)

    def empty(
        self, size: tuple[int, ...], dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> Tensor:
        """In place of torch.empty: nobody's results yet."""
        made = torch.full(size, torch.nan if dtype.is_floating_point else -1, dtype=dtype)
        self.tensors = [*self.tensors, made]
        return made


class StepKernel(CpuKernel):
    """A kernel that sees late what the one in front of it wrote."""

    def launch(self, blocks: int, arguments: ctypes.Structure, device: torch.device) -> None:
        step = self.machine
        assert isinstance(step, Step)
        step.late = step.front
        before = [bits(t).clone() for t in step.tensors]
        CpuKernel.launch(self, blocks, arguments, device)
        written = [t for t, old in zip(step.tensors, before, strict=True) if not torch.equal(bits(t), old)]
        assert written
        step.front = written
        step.launches += 1


def bits(values: Tensor) -> Tensor:
    """So that NaN is itself."""
    return values.view(-1).view(torch.uint8)


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> Step:
    """A CPU in the place of a card."""
    step = Step()
    monkeypatch.setattr(nvrtc, "load", step.load)
    monkeypatch.setattr(cuda_products, "_multiprocessors", lambda _: step.multiprocessors)  # pyright: ignore[reportUnknownLambdaType]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (step.major, 0))  # pyright: ignore[reportUnknownLambdaType]
    torch.manual_seed(0)
    return step


def scaled(bits_: int, *shape: int) -> Weight:
    """Random, so that results are about as large as what it multiplies."""
    w = weight(bits_, *shape)
    root = shape[-1] ** 0.5
    match w:
        case Nvfp4(data, scales, factor):
            return Nvfp4(data, scales, torch.ones_like(factor) * (0.15 + 0.1 * torch.rand(factor.shape)) / root)
        case Fp8(data, scale):
            return Fp8(data, torch.ones_like(scale) * (0.02 + 0.01 * torch.rand(scale.shape)) / root)
        case Plain(data):
            return Plain(data * (5 / root))


def mixture(
    experts: int, top_k: int, shared: int, gate: torch.dtype, latent: tuple[int, int] | None
) -> MoeWeights:
    """Of sizes that no step divides; ``shared`` and ``latent`` in bits of a weight."""
    h, size, own, width = 320, 192, 448, 64 if latent else 320
    return MoeWeights(
        gate=(torch.randn(experts, h) / h**0.5).to(gate),
        bias=torch.randn(experts) * 0.1,
        top_k=top_k,
        scale=2.5,
        normalize=True,
        up=scaled(4, experts, size, width),
        down=scaled(4, experts, width, size),
        shared_up=scaled(shared, own, h),
        shared_down=scaled(shared, h, own),
        latent_in=scaled(latent[0], width, h) if latent else None,
        latent_out=scaled(latent[1], h, width) if latent else None,
        tickets=torch.zeros(tickets(h), dtype=torch.int32),
    )


def norm_of(columns: int) -> Norm:
    return Norm(torch.rand(columns) + 0.5, 1e-5)


def give(step: Step, norm: Norm | None, stream: Tensor, *others: Tensor | Weight | None) -> None:
    """All that the launches read beside what they make; the launch in front wrote the stream."""
    tensors = [stream] if norm is None else [stream, norm.weight]
    for other in others:
        if isinstance(other, Tensor):
            tensors.append(other)
        elif other is not None:
            tensors += tensors_of(other)
    step.tensors, step.front = tensors, [stream]


def near(got: Tensor, want: Tensor, base: Tensor | float = 0.0) -> None:
    """But for roundings the other way."""
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    assert got.isfinite().all()
    off = (got.double() - want.double()).norm() / (want.double() - base).norm()
    assert off < 5e-3, float(off)


def made_by(
    step: Step, monkeypatch: pytest.MonkeyPatch, call: Callable[[], Tensor | tuple[Tensor, ...]]
) -> Tensor | tuple[Tensor, ...]:
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", step.empty)
        return call()


MIXTURES = {
    "nano": (128, 6, 4, torch.float32, None),
    "lightning": (128, 6, 4, torch.bfloat16, None),
    "super": (64, 22, 8, torch.bfloat16, (16, 16)),
    "super, layer 1": (64, 22, 4, torch.bfloat16, (8, 16)),
    "super, layer 3": (64, 22, 8, torch.bfloat16, (8, 8)),
    "super, shared in BF16": (64, 22, 16, torch.bfloat16, (16, 16)),
    "few in FP8": (128, 6, 8, torch.float32, None),
    "few in BF16": (128, 6, 16, torch.float32, (16, 8)),
}
CHIPS = [
    *((name, 9) for name in MIXTURES),
    *((name, 12) for name in ("nano", "super, layer 1", "few in BF16")),
]


@pytest.mark.parametrize(("name", "major"), CHIPS)
def test_moe_add(step: Step, monkeypatch: pytest.MonkeyPatch, name: str, major: int) -> None:
    """Again and again over the same weights."""
    step.major = major
    w, norm, latent = mixture(*MIXTURES[name]), norm_of(320), MIXTURES[name][-1]
    weights = (w.up, w.down, w.shared_up, w.shared_down, w.latent_in, w.latent_out)
    streams = [torch.randn(1, 320).bfloat16() for _ in range(2)]
    first: list[Tensor] = []
    for seed, which in ((0, 0), (3, 0), (6, 1), (4 + len(name), 0)):
        step.seed, step.apart, step.launches, stream = seed, seed == 6, 0, streams[which]
        give(step, norm, stream, w.gate, w.bias, w.tickets, *weights)
        got = made_by(step, monkeypatch, lambda stream=stream: cuda_ops.moe_add(stream, norm, w))
        assert isinstance(got, Tensor)
        near(got, fused.moe_add(stream, norm, w), stream.double())
        assert step.launches == (4 if latent else 3)
        assert w.tickets.count_nonzero() == 0
        if which == 0:
            first.append(got)
    assert all(torch.equal(first[0], other) for other in first[1:])


@pytest.mark.parametrize("formats", [(4, 4), (8, 4), (16, 8), (8, 16)])
def test_mlp_add(step: Step, monkeypatch: pytest.MonkeyPatch, formats: tuple[int, int]) -> None:
    up, down, norm = scaled(formats[0], 448, 320), scaled(formats[1], 320, 448), norm_of(320)
    stream = torch.randn(1, 320).bfloat16()
    want = fused.mlp_add(stream, norm, up, down)
    for seed, major in ((0, 9), (5, 12)):
        step.seed, step.major, step.launches = seed, major, 0
        give(step, norm, stream, up, down)
        got = made_by(step, monkeypatch, lambda: cuda_ops.mlp_add(stream, norm, up, down))
        assert isinstance(got, Tensor)
        near(got, want, stream.double())
        assert step.launches == 2


@pytest.mark.parametrize("formats", [(4,), (16, 4), (4, 8, 16), (8, 16, 8), (32, 4, 8)])
def test_norm_linears(step: Step, monkeypatch: pytest.MonkeyPatch, formats: tuple[int, ...]) -> None:
    weights = tuple(scaled(bits, 40 + 24 * i, 448) for i, bits in enumerate(formats))
    norm, stream = norm_of(448), torch.randn(1, 448).bfloat16()
    give(step, norm, stream, *weights)
    got = made_by(step, monkeypatch, lambda: cuda_ops.norm_linears(stream, norm, weights))
    for one, want in zip(got, fused.norm_linears(stream, norm, weights), strict=True):
        near(one, want)
    assert step.launches == 1


@pytest.mark.parametrize("bits", [4, 8, 16, 32])
def test_linear_add_and_head(step: Step, monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    w, x, stream = scaled(bits, 108, 320), torch.randn(1, 640).bfloat16()[:, ::2], torch.randn(1, 108).bfloat16()
    x = x.contiguous()
    give(step, None, x, w, stream)
    got = made_by(step, monkeypatch, lambda: cuda_ops.linear_add(x, w, stream))
    assert isinstance(got, Tensor)
    near(got, fused.linear_add(x, w, stream), stream.double())
    norm, own = norm_of(320), torch.full((1, 108), torch.nan)
    for out in (None, own):
        give(step, norm, x, w, out)
        got = made_by(step, monkeypatch, lambda out=out: cuda_ops.head(x, norm, w, out))
        assert isinstance(got, Tensor)
        near(got, fused.head(x, norm, w))
        assert out is None or got is out
    assert step.launches == 3


NO_WEIGHTS = {
    "codes in no whole steps": weight(4, 16, 80),
    "scales in no whole sixteens": weight(4, 18, 64),
    "FP8 in no whole sixteens": weight(8, 16, 328),
    "FP8 that are long, in no whole steps": weight(8, 16, 2112 + 16),
    "BF16 in no whole steps": weight(16, 16, 96),
    "F16": Plain(torch.zeros(16, 64, dtype=torch.float16)),
    "codes whose rows are too long": weight(4, 16, 8256),
}


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Triton's column, which is only written down here; and no kernel of ours."""
    called: list[str] = []
    for module, names in (
        (triton_linear, ("norm_linears", "linear_add", "mlp_add", "head")),
        (triton_experts, ("moe_add",)),
    ):
        for name in names:
            monkeypatch.setattr(module, name, lambda *_, name=name: called.append(name))  # pyright: ignore[reportUnknownLambdaType]

    def load(*arguments: object) -> None:
        raise AssertionError(arguments)

    monkeypatch.setattr(nvrtc, "load", load)
    return called


@pytest.mark.parametrize("name", NO_WEIGHTS)
def test_odd_weights_are_tritons(triton: list[str], name: str) -> None:
    w = NO_WEIGHTS[name]
    columns = w.data.shape[-1] * (2 if isinstance(w, Nvfp4) else 1)
    x, norm, fine = torch.zeros(1, columns).bfloat16(), norm_of(columns), weight(16, 16, 64)
    cuda_ops.norm_linears(x, norm, (w,))
    cuda_ops.linear_add(x, w, torch.zeros(1, 16).bfloat16())
    cuda_ops.mlp_add(x, norm, w, fine)
    cuda_ops.mlp_add(torch.zeros(1, 64).bfloat16(), norm_of(64), fine, w)
    cuda_ops.head(x, norm, w)
    assert triton == ["norm_linears", "linear_add", "mlp_add", "mlp_add", "head"]


def test_several_tokens_and_other_types_are_tritons(triton: list[str]) -> None:
    w, norm = weight(8, 64, 64), norm_of(64)
    for x in (torch.zeros(2, 64).bfloat16(), torch.zeros(1, 64)):
        cuda_ops.norm_linears(x, norm, (w,))
        cuda_ops.linear_add(x, w, x)
        cuda_ops.mlp_add(x, norm, w, w)
        cuda_ops.head(x, norm, w)
    cuda_ops.norm_linears(torch.zeros(1, 64).bfloat16(), norm, (w, w, w, w))
    assert triton == ["norm_linears", "linear_add", "mlp_add", "head"] * 2 + ["norm_linears"]


def test_mixtures_that_are_tritons(triton: list[str]) -> None:
    w, norm, stream = mixture(64, 22, 8, torch.bfloat16, (8, 8)), norm_of(320), torch.zeros(1, 320).bfloat16()
    odd = weight(8, 448, 328)
    for change in (
        {"top_k": 33},
        {"shared_down": odd},
        {"latent_in": odd},
        {"gate": w.gate.half()},
        {"down": weight(4, 2, 64, 80)},
    ):
        changed: dict[str, Any] = change
        cuda_ops.moe_add(stream, norm, replace(w, **changed))
    cuda_ops.moe_add(stream.repeat(2, 1), norm, w)
    assert triton == ["moe_add"] * 6
