"""FlashInfer's experts in torch: what their sources say they compute, over the arguments that they are given.

Every call is held against the real function's signature. Scales are read by a layout of this file's own, one by
one: offset = row // 128 * 128 C + column // 4 * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4.
Sources, flashinfer-python 0.7.4: `quantize_block_fp4` (cute_dsl/fp4_common.py), `k_fused` (moe_nvfp4_w4a16.py),
`getQuantParams` (flashinfer_cutlass_fused_moe_binding.cu); ../shared/facts/flashinfer.md.
"""

import importlib
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nanoserve.kernels.nvfp4 import E2M1, nearest_code
from nanoserve.kernels.prepared import B12x, Cutlass, W4a16

RELU2 = 6
"""`ActivationType.Relu2`."""


def real(module: str, name: str) -> Callable[..., Any]:
    """A function of the installed FlashInfer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(importlib.import_module(module), name)


def logical(swizzled: Tensor, rows: int, columns: int) -> Tensor:
    """Block scales [E, rows, columns] in float32 out of bytes in 128 x 4 order, however the tensor is shaped."""
    padded = -(-rows // 128) * 128, -(-columns // 4) * 4
    flat = swizzled.as_strided((len(swizzled), padded[0] * padded[1]), (padded[0] * padded[1], 1))
    row, column = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
    offset = row // 128 * 128 * padded[1] + column // 4 * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4
    return flat[:, offset].view(torch.float8_e4m3fn).float()


def codes(packed: Tensor) -> Tensor:
    """Values of packed codes [..., K] in float32."""
    table = torch.tensor(E2M1)
    return torch.stack((table[(packed & 15).int()], table[(packed >> 4).int()]), -1).flatten(-2)


def products(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """X times one matrix of codes and block scales, without any global scale."""
    return x @ (codes(packed) * scales.repeat_interleave(16, -1)).T


def quantised(x: Tensor, divisor: Tensor) -> Tensor:
    """X as codes times E4M3 scales of 16 values: x / divisor, rounded."""
    blocks = x.float().unflatten(-1, (-1, 16))
    scales = (blocks.abs().amax(-1, keepdim=True) / (6 * divisor)).clamp(max=448).to(torch.float8_e4m3fn).float()
    inverse = torch.where(scales == 0, 0, 1 / (scales * divisor))
    return (torch.tensor(E2M1)[nearest_code(blocks * inverse).int()] * scales).flatten(-2)


@dataclass
class Recorder:
    """Calls by function: bound arguments, under the names of the real signature."""

    calls: dict[str, list[dict[str, Any]]] = field(default_factory=dict[str, list[dict[str, Any]]])

    def bind(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments as the real function would get them."""
        bound = inspect.signature(function).bind(*args, **kwargs)
        self.calls.setdefault(function.__qualname__, []).append(dict(bound.arguments))
        bound.apply_defaults()
        return dict(bound.arguments)


def cutlass(record: Recorder) -> Cutlass:
    """`cutlass_fused_moe`: both products in float32, hidden values and results of an expert in BF16."""
    moe, size = (real("flashinfer.fused_moe.core", f"cutlass_fused_moe{end}") for end in ("", "_workspace_size"))

    def run(*args: Any, **kwargs: Any) -> Tensor:
        a = record.bind(moe, args, kwargs)
        first, second = a["fc1_expert_weights"].view(torch.uint8), a["fc2_expert_weights"].view(torch.uint8)
        read, up_scales, up_alpha, hidden_read, down_scales, down_alpha = a["quant_scales"]
        rows, width = first.shape[1], second.shape[1]
        up = logical(up_scales.view(torch.uint8), rows, width // 16)
        down = logical(down_scales.view(torch.uint8), width, rows // 16)
        total, x = torch.zeros(len(a["input"]), width), quantised(a["input"], 1 / read)
        for token, choice, e in pairs(a["token_selected_experts"]):
            hidden = (products(x[token], first[e], up[e]) * up_alpha[e]).bfloat16().float()
            act = quantised(hidden.clamp(min=0).square(), 1 / hidden_read)
            out = (products(act, second[e], down[e]) * down_alpha[e]).bfloat16().float()
            total[token] += a["token_final_scales"][token, choice] * out
        return a["output"].copy_(total)

    def space(*args: Any, **kwargs: Any) -> int:
        record.bind(size, args, kwargs)
        return 4096

    return Cutlass(run, space, RELU2)


_W4A16 = "flashinfer.fused_moe.cute_dsl.blackwell_sm12x.moe_nvfp4_w4a16"


def w4a16(record: Recorder) -> W4a16:
    """`run_moe_w4a16`: sums of 16 products in float16, of those in float32; hidden values in BF16 and float16."""
    run_real, space_real = (real(_W4A16, name) for name in ("run_moe_w4a16", "allocate_workspace"))

    def halves(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
        parts = x.half().unflatten(-1, (-1, 16)) * codes(packed).half().unflatten(-1, (-1, 16))
        while parts.shape[-1] > 1:
            parts = parts[..., ::2] + parts[..., 1::2]
        return (parts.squeeze(-1).float() * scales).sum(-1)

    def run(*args: Any, **kwargs: Any) -> Tensor:
        a = record.bind(run_real, args, kwargs)
        rows, width = a["w13"].shape[1], a["w2"].shape[1]
        assert a["w13_sf"].shape[1:] == (-(-rows // 128) * 128, -(-width // 64) * 4)
        assert a["w2_sf"].shape[1:] == (-(-width // 128) * 128, -(-rows // 64) * 4)
        up = logical(a["w13_sf"].view(torch.uint8), rows, width // 16)
        down = logical(a["w2_sf"].view(torch.uint8), width, rows // 16)
        total = torch.zeros(len(a["hidden_states"]), width)
        for token, choice, e in pairs(a["topk_ids"]):
            hidden = halves(a["hidden_states"][token], a["w13"][e], up[e]) * a["w13_gs"][e]
            out = halves(hidden.clamp(min=0).square().bfloat16(), a["w2"][e], down[e]) * a["w2_gs"][e]
            total[token] += a["topk_weights"][token, choice] * out
        return a["out"].copy_(total)

    def space(*args: Any, **kwargs: Any) -> object:
        return record.bind(space_real, args, kwargs)["num_tokens"]

    return W4a16(run, space)


_B12X = "flashinfer.fused_moe.cute_dsl"


def b12x(record: Recorder) -> B12x:
    """`B12xMoEWrapper`: sums in float32, added in BF16 for an expert and 128 hidden values (its micro kernel)."""
    wrapper = real(f"{_B12X}.b12x_moe", "B12xMoEWrapper")
    dispatch = f"{_B12X}.blackwell_sm12x.moe_dispatch"
    layout = real("flashinfer.cute_dsl.utils", "convert_sf_to_mma_layout")
    workspace = real(dispatch, "allocate_sm120_moe_workspace")

    class Wrapper:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.own = record.bind(wrapper, args, kwargs)
            self.quant_mode = self.own["quant_mode"]

        def run(self, *args: Any, **kwargs: Any) -> Tensor:
            a = record.bind(wrapper.run, (self, *args), kwargs)  # pyright: ignore[reportFunctionMemberAccess]
            rows, width = a["w1_weight"].shape[1], a["w2_weight"].shape[1]
            stored = [a[name].permute(5, 2, 4, 0, 1, 3) for name in ("w1_weight_sf", "w2_weight_sf")]
            assert all(view.is_contiguous() for view in stored), "the wrapper would copy the scales"
            up = logical(stored[0].view(torch.uint8), rows, width // 16)
            down = logical(stored[1].view(torch.uint8), width, rows // 16)
            out = self.own["shared_output"][: len(a["x"])].zero_()
            x = quantised(a["x"], a["input_global_scale"])
            alpha = a["w1_alpha"] * a["input_global_scale"]  # as the wrapper folds them
            for token, choice, e in pairs(a["token_selected_experts"]):
                hidden = products(x[token], a["w1_weight"][e], up[e]) * alpha[e]
                act = quantised(hidden.clamp(min=0).square(), a["fc2_input_scale"])
                for start in range(0, rows, 128):
                    part, part_scales = (
                        a["w2_weight"][e][:, start // 2 :][:, :64],
                        down[e][:, start // 16 :][:, :8],
                    )
                    add = products(act[start : start + 128], part, part_scales) * a["w2_alpha"][e]
                    out[token] += (add * a["token_final_scales"][token, choice]).bfloat16()
            return out

    def space(*args: Any, **kwargs: Any) -> object:
        return record.bind(workspace, args, kwargs)["backend"]

    return B12x(Wrapper, layout, space, real(dispatch, "select_sm120_moe_backend"))


def pairs(ids: Tensor) -> list[tuple[int, int, int]]:
    """(token, choice, expert) of every choice."""
    return [(t, c, int(e)) for t, row in enumerate(ids.tolist()) for c, e in enumerate(row)]
