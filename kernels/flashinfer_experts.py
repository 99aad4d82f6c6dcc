"""The routed experts on FlashInfer's kernels for SM120 and SM121, over the packed values as they are.

Numerics. ``w4a16`` multiplies what the checkpoint has with activations narrowed to float16, and sums in float32.
``cutlass`` and ``b12x`` quantise what each of the two weights reads to NVFP4: of 16 values, the scale is
E4M3(amax / 6 / input_scale) and the codes are E2M1(x / (scale * input_scale)). All three keep the E4M3 scales
normalised, with the global scales beside them: multiplied into E4M3, most scales of the released models would be
subnormal.
Conventions, read in flashinfer-python 0.7.4: ../shared/facts/flashinfer.md, sections 1 and 2.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nanoserve.errors import BackendError
from nanoserve.kernels.linear import Nvfp4, Weight
from nanoserve.kernels.moe import PREFILL_FROM
from nanoserve.kernels.place import Experts
from nanoserve.kernels.prepared import Activations, B12x, Cutlass, Prepared, Runner, W4a16
from nanoserve.kernels.swizzle import swizzle

BUCKETS = tuple(1 << power for power in range(PREFILL_FROM.bit_length()))
"""Numbers of tokens that w4a16 is compiled for: each takes seconds, so that others are padded to the next."""

TOLERANCES: Mapping[str, float] = {"cutlass": 0.16, "w4a16": 0.005, "b12x": 0.17}
"""Backend → the most that its result may differ from `nanoserve.kernels.moe.experts` on normally distributed
values: root of the mean square of the difference, as a share of that of the result. Two quantisations to 4 bits
are most of it where there are any (tests/test_flashinfer_experts.py emulates all three)."""


@dataclass(frozen=True, slots=True)
class OnCutlass:
    """`cutlass_fused_moe` for up to as many tokens as its workspace was made for."""

    library: Cutlass
    workspace: Tensor

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor, up: Nvfp4, down: Nvfp4) -> Tensor:
        """As `nanoserve.kernels.moe.experts`."""
        (first, read), (second, hidden) = _quantised(up), _quantised(down)
        size = 2 * down.data.shape[-1]
        # It asks for rows of scales padded to 64 and reads those padded to 128 (flashinfer issue 4653). Once that
        # is put right it will refuse this; requirements.py keeps other releases from such sizes.
        rows = -(-size // 64) * 64
        out = torch.empty_like(x)
        self.library.moe(
            x,
            ids,
            weights,
            up.data.view(torch.int64),
            down.data.view(torch.int64),
            x.dtype,
            [
                read.multiplier,
                first.scales.view(torch.int32)[:, :rows],
                read.alpha,
                hidden.multiplier,
                second.scales.view(torch.int32),
                hidden.alpha,
            ],
            output=out,
            activation_type=self.library.relu2,
            workspace_buffer=self.workspace,
            use_fused_finalize=False,  # the fused one adds with atomics, and answers would differ from run to run
            enable_pdl=False,
            nvfp4_4over6=None,  # and not by environment variables
        )
        return out


@dataclass(frozen=True, slots=True)
class OnW4a16:
    """`run_moe_w4a16` for up to the largest of `BUCKETS`; ``workspaces`` has one a bucket, which layers share."""

    library: W4a16
    workspaces: Mapping[int, Any]

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor, up: Nvfp4, down: Nvfp4) -> Tensor:
        """As `nanoserve.kernels.moe.experts`."""
        first, second, tokens = prepared(up), prepared(down), len(x)
        assert tokens <= BUCKETS[-1], f"w4a16 is for few tokens, and these are {tokens}"
        bucket = next(size for size in BUCKETS if size >= tokens)
        x, ids, weights = padded(x, ids, weights, bucket)
        out = torch.empty_like(x)
        self.library.run(
            x, ids, weights,
            up.data, first.scales, up.global_scale, down.data, second.scales, down.global_scale,
            out, self.workspaces[bucket],
        )  # fmt: skip
        return out[:tokens]


@dataclass(frozen=True, slots=True)
class OnB12x:
    """A layer's `B12xMoEWrapper`, which keeps views of its weights; the next layer's overwrites the result."""

    wrapper: Any
    up_scales: Tensor
    down_scales: Tensor

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor, up: Nvfp4, down: Nvfp4) -> Tensor:
        """As `nanoserve.kernels.moe.experts`."""
        read, hidden = _quantised(up)[1], _quantised(down)[1]
        return self.wrapper.run(
            x,
            up.data,
            self.up_scales,
            down.data,
            self.down_scales,
            ids,
            weights,
            w1_alpha=up.global_scale,  # times input_global_scale, which the wrapper multiplies in
            w2_alpha=hidden.alpha,
            fc2_input_scale=hidden.divisor,
            input_global_scale=read.divisor,
        )


@dataclass(frozen=True, slots=True)
class Shared:
    """What the layers of a model share: workspaces, for they run one after another.

    Attributes:
        runners: of the backends that one runner serves in all layers.
        b12x: makes a layer's runner of its two stacks; None where b12x is not used.
    """

    runners: Mapping[str, Runner]
    b12x: Callable[[Prepared, Prepared], Runner] | None


def share(
    backends: Mapping[str, Any], experts: Experts, chunk: int, dtype: torch.dtype, device: torch.device
) -> Shared:
    """Allocate what the layers share.

    Args:
        backends: name → entry points, as `nanoserve.kernels.flashinfer_ops` loads them.
        experts: the model's.
        chunk: the most tokens of a prefill step.
        dtype: the activations'.
        device: where.
    """
    e, runners, b12x = experts, dict[str, Runner](), None
    for name, library in backends.items():
        match library:
            case Cutlass():
                size = library.workspace_size(
                    max(chunk, PREFILL_FROM), e.width, e.size, e.count, e.top_k,
                    x_dtype=dtype, weight_dtype=torch.int64, output_dtype=dtype,
                    activation_type=library.relu2, use_fused_finalize=False, device=device,
                )  # fmt: skip
                runners[name] = OnCutlass(library, torch.empty(size, dtype=torch.uint8, device=device))
            case W4a16():
                spaces = {
                    n: library.workspace(n, e.width, e.size, e.count, e.top_k, False, device) for n in BUCKETS
                }
                runners[name] = OnW4a16(library, spaces)
            case _:
                b12x = _b12x(library, experts, dtype, device)
    return Shared(runners, b12x)


def _b12x(
    library: B12x, e: Experts, dtype: torch.dtype, device: torch.device
) -> Callable[[Prepared, Prepared], Runner]:
    tokens = PREFILL_FROM - 1
    shape: dict[str, Any] = {"k": e.width, "n": e.size, "num_topk": e.top_k, "activation": "relu2"}
    shape |= {"state_E": e.count, "weight_E": e.count, "device": device, "quant_mode": "nvfp4"}
    rows = tokens * e.top_k
    static = library.workspace(max_rows=rows, backend="static", **shape)
    most = library.backend(
        num_tokens=tokens, num_topk=e.top_k, quant_mode="nvfp4", num_experts=e.count, intermediate_size=e.size,
        hidden_size=e.width, activation="relu2", capacity_tokens=tokens,
    )  # fmt: skip
    dynamic = library.workspace(routed_rows=rows, backend="dynamic", **shape) if most == "dynamic" else None
    out = torch.empty((tokens, e.width), dtype=dtype, device=device)

    def make(up: Prepared, down: Prepared) -> Runner:
        wrapper = library.wrapper(
            e.count, e.top_k, e.width, e.size,
            use_cuda_graph=True, max_num_tokens=tokens, output_dtype=dtype, device=str(device),
            activation="relu2", quant_mode="nvfp4",
            shared_static_workspace=static, shared_dynamic_workspace=dynamic, shared_output=out,
        )  # fmt: skip
        if wrapper.quant_mode != "nvfp4":  # it would keep a second copy of the weights
            raise BackendError(
                "b12x: FLASHINFER_B12X_FORCE_MOE_W4A16 is set, which asks it for another mode: unset it"
            )
        first = library.layout(up.scales, m=e.size, k=e.width, num_groups=e.count)
        return OnB12x(wrapper, first, library.layout(down.scales, m=e.width, k=e.size, num_groups=e.count))

    return make


def prepare(up: Nvfp4, down: Nvfp4, shared: Shared) -> tuple[Nvfp4, Nvfp4]:
    """A layer's stacks with what the kernels need beside them; the packed values are not copied.

    Raises:
        BackendError: activations are to be divided by 0.
    """
    first, second = (Prepared(swizzle(w.scales), _activations(w), {}) for w in (up, down))
    own = {"b12x": shared.b12x(first, second)} if shared.b12x else {}
    first = replace(first, runners={**shared.runners, **own})
    return replace(up, prepared=first), replace(down, prepared=second)


def warm(backend: str, up: Nvfp4, down: Nvfp4, top_k: int) -> None:
    """Compile a backend for every number of tokens that it will be run with, which takes seconds each."""
    width, device = 2 * up.data.shape[-1], up.data.device
    for bucket in BUCKETS:
        tokens = min(bucket, PREFILL_FROM - 1)
        x = torch.zeros((tokens, width), dtype=torch.bfloat16, device=device)
        ids = torch.arange(top_k, dtype=torch.int32, device=device).expand(tokens, -1).contiguous()
        run(backend, x, ids, torch.ones(ids.shape, device=device), up, down)


def _activations(weight: Nvfp4) -> Activations | None:
    if weight.input_scale is None:
        return None
    largest = weight.input_scale.max()
    if not float(largest) > 0:
        raise BackendError("the experts' input_scale is 0, by which activations would be divided: choose triton")
    return Activations(largest.view(1), 1 / largest, (largest * weight.global_scale).contiguous())


def experts_cutlass(x: Tensor, ids: Tensor, weights: Tensor, up: Weight, down: Weight) -> Tensor:
    """As `nanoserve.kernels.moe.experts`, by `cutlass_fused_moe`."""
    return run("cutlass", x, ids, weights, up, down)


def experts_w4a16(x: Tensor, ids: Tensor, weights: Tensor, up: Weight, down: Weight) -> Tensor:
    """As `nanoserve.kernels.moe.experts`, by `run_moe_w4a16`; fewer than `PREFILL_FROM` tokens."""
    return run("w4a16", x, ids, weights, up, down)


def experts_b12x(x: Tensor, ids: Tensor, weights: Tensor, up: Weight, down: Weight) -> Tensor:
    """As `nanoserve.kernels.moe.experts`, by `B12xMoEWrapper`; fewer than `PREFILL_FROM` tokens."""
    return run("b12x", x, ids, weights, up, down)


def run(backend: str, x: Tensor, ids: Tensor, weights: Tensor, up: Weight, down: Weight) -> Tensor:
    """The routed experts on a backend that they were prepared for.

    Raises:
        BackendError: they were not, or x is not BF16 (these kernels quantise it themselves).
    """
    if x.dtype != torch.bfloat16:
        raise BackendError(
            f"{backend} reads bfloat16 activations, and these are {x.dtype}: choose torch for the op"
        )
    if not isinstance(up, Nvfp4) or up.prepared is None or backend not in up.prepared.runners:
        raise BackendError(
            f"these experts were not prepared for {backend}: choose it before the weights are loaded"
        )
    return up.prepared.runners[backend](x.contiguous(), ids, weights, up, down)


def prepared(weight: Nvfp4) -> Prepared:
    """What was prepared of a stack."""
    assert weight.prepared is not None, "experts run on a backend that they were not prepared for"
    return weight.prepared


def _quantised(weight: Nvfp4) -> tuple[Prepared, Activations]:
    own = prepared(weight)
    assert own.activations is not None, "a backend that quantises activations was chosen without an input_scale"
    return own, own.activations


def padded(x: Tensor, ids: Tensor, weights: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens up to ``size``; those added are copies of the first with weights of 0, and read no other expert."""
    more = size - len(x)
    if not more:
        return x, ids, weights
    parts: Sequence[Tensor] = (x, ids, torch.zeros_like(weights[:1]))
    extra = (part[:1].expand(more, -1) for part in parts)
    grown = [torch.cat((whole, rest)) for whole, rest in zip((x, ids, weights), extra, strict=True)]
    return grown[0], grown[1], grown[2]
