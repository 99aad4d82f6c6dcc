"""FlashInfer's experts, stood in for by their documented arithmetic: our arguments make it the reference's.

None of these kernels has run here: they need an SM120 or SM121.
"""

from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import flashinfer_arithmetic as arithmetic
import interpreted  # before any kernel
import pytest
import torch
from flashinfer_arithmetic import Recorder
from torch import Tensor

from nanoserve.errors import BackendError
from nanoserve.kernels import flashinfer_ops, fused, nvfp4
from nanoserve.kernels.flashinfer_experts import BUCKETS, TOLERANCES, prepare, prepared, run, share, warm
from nanoserve.kernels.flashinfer_moe import moe_add_b12x, moe_add_w4a16
from nanoserve.kernels.fused import MoeWeights, Norm
from nanoserve.kernels.linear import Nvfp4, Plain
from nanoserve.kernels.moe import PREFILL_FROM, experts
from nanoserve.kernels.place import Experts
from nanoserve.kernels.swizzle import swizzle, swizzled_shape, unswizzle
from nanoserve.traffic import nbytes

assert interpreted
CPU, BF16 = torch.device("cpu"), torch.bfloat16


def stack(count: int, rows: int, columns: int, input_scale: float | None = 1 / 256) -> Nvfp4:
    """Random experts, quantised; their input scales differ, and the largest is the one given."""
    values = torch.randn(count, rows, columns) / columns**0.5 * 1.5
    data, scales, wide = (torch.stack(parts) for parts in zip(*map(nvfp4.pack, values), strict=True))
    inputs = None if input_scale is None else input_scale * torch.linspace(0.5, 1, count)
    return Nvfp4(data, scales, wide, inputs)


def facts(up: Nvfp4, top_k: int) -> Experts:
    count, size, half = up.data.shape
    return Experts("nvfp4", up.input_scale is not None, "relu2", count, top_k, 2 * half, size, 1)


def routes(tokens: int, count: int, top_k: int) -> tuple[Tensor, Tensor]:
    ids = torch.stack([torch.randperm(count)[:top_k] for _ in range(tokens)]).int()
    weights = torch.rand(tokens, top_k) + 0.1
    return ids, weights / weights.sum(-1, keepdim=True) * 2.5


def libraries(record: Recorder, *names: str) -> dict[str, Any]:
    return {name: getattr(arithmetic, name)(record) for name in names}


def difference(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want).square().mean().sqrt() / want.square().mean().sqrt())


@pytest.mark.parametrize(
    ("rows", "columns"), [(2688, 1024 // 16), (1856, 2688 // 16), (2688, 1856 // 16), (1, 1), (130, 6)]
)
def test_the_swizzle_byte_by_byte(rows: int, columns: int) -> None:
    scales = torch.randint(0, 127, (2, rows, columns), dtype=torch.uint8).view(torch.float8_e4m3fn)
    ordered = swizzle(scales)
    padded_rows, padded_columns = swizzled_shape(rows, columns)
    assert ordered.shape == (2, padded_rows, padded_columns)
    assert torch.equal(arithmetic.logical(ordered.view(torch.uint8), rows, columns), scales.float())
    whole = arithmetic.logical(ordered.view(torch.uint8), padded_rows, padded_columns)
    assert not whole[:, rows:].any()
    assert not whole[:, :, columns:].any()
    assert torch.equal(unswizzle(ordered, rows, columns).view(torch.uint8), scales.view(torch.uint8))


def test_the_swizzle_is_what_flashinfers_own_view_reads() -> None:
    scales = torch.randint(0, 127, (3, 200, 12), dtype=torch.uint8).view(torch.float8_e4m3fn)
    layout = arithmetic.real("flashinfer.cute_dsl.utils", "convert_sf_to_mma_layout")
    view = layout(swizzle(scales), m=200, k=12 * 16, num_groups=3)
    m, k = torch.arange(200)[:, None], torch.arange(12)[None, :]
    for e in range(3):
        read = view[m % 32, m % 128 // 32, m // 128, k % 4, k // 4, torch.full_like(m + k, e)]
        assert torch.equal(read.float(), scales[e].float())


@pytest.mark.parametrize(
    ("backend", "width", "size", "tokens"),
    [
        ("cutlass", 256, 384, 70),
        ("cutlass", 192, 320, 64),  # rows of scales padded to 384, of which it is shown 320, as with Nano's 1,856
        ("w4a16", 256, 384, 5),
        ("w4a16", 96, 224, 1),
        ("b12x", 256, 384, 1),
        ("b12x", 128, 256, 63),
    ],
)
def test_each_backends_arithmetic_is_the_reference(backend: str, width: int, size: int, tokens: int) -> None:
    up, down = stack(8, size, width), stack(8, width, size, 1 / 64)
    x, (ids, weights) = torch.randn(tokens, width).bfloat16(), routes(tokens, 8, 3)
    record = Recorder()
    shared = share(libraries(record, backend), facts(up, 3), 128, BF16, CPU)
    got = run(backend, x, ids, weights, *prepare(up, down, shared))
    want = experts(x.float(), ids, weights, up, down)
    assert got.dtype == BF16
    assert got.shape == x.shape
    assert difference(got, want) < TOLERANCES[backend]


def test_scales_cancel_where_quantising_loses_nothing() -> None:
    """Values that are codes already: what is left is the rounding of the second quantisation, and no factor."""
    up, down = stack(4, 256, 128, 1 / 256), stack(4, 128, 256, 1 / 64)
    codes = torch.tensor(nvfp4.E2M1)[torch.randint(0, 16, (3, 8, 16))]
    codes[..., 0] = 6.0  # then amax / 6 is the scale
    x = (codes * torch.tensor([1.0, 2.0, 0.5, 0.125] * 2)[:, None] / 256).flatten(1).bfloat16()
    assert torch.equal(arithmetic.quantised(x, torch.tensor(1 / 256)) / 256, x.float())
    ids, weights = routes(3, 4, 2)
    shared = share(libraries(Recorder(), "cutlass", "b12x"), facts(up, 2), 64, BF16, CPU)
    first, second = prepare(up, down, shared)
    want = torch.zeros(3, 128)
    for token, choice, e in arithmetic.pairs(ids):
        hidden = (x[token].float() @ nvfp4.unpack(up.data[e], up.scales[e], up.global_scale[e]).T).relu().square()
        seen = arithmetic.quantised(hidden, torch.tensor(1 / 64)) / 64
        want[token] += weights[token, choice] * (
            seen @ nvfp4.unpack(down.data[e], down.scales[e], down.global_scale[e]).T
        )
    assert difference(run("b12x", x, ids, weights, first, second), want) < 0.01
    assert (
        difference(run("cutlass", x, ids, weights, first, second), want) < 0.05
    )  # hidden in BF16 before its codes


def test_what_flashinfer_is_given() -> None:
    """Types and shapes that its bindings check, the one copy of packed values, scales as they were."""
    record = Recorder()
    up, down = stack(8, 384, 256), stack(8, 256, 384)
    x, (ids, weights) = torch.randn(64, 256).bfloat16(), routes(64, 8, 2)
    shared = share(libraries(record, "cutlass", "w4a16", "b12x"), facts(up, 2), 512, BF16, CPU)
    first, second = prepare(up, down, shared)
    run("cutlass", x, ids, weights, first, second)
    (call,) = record.calls["cutlass_fused_moe"]
    assert call["fc1_expert_weights"].dtype == torch.int64
    assert call["fc1_expert_weights"].shape == (8, 384, 16)
    assert call["fc1_expert_weights"].data_ptr() == up.data.data_ptr()
    assert call["fc2_expert_weights"].data_ptr() == down.data.data_ptr()
    assert [scale.dtype for scale in call["quant_scales"]] == [torch.float32, torch.int32, torch.float32] * 2
    assert [tuple(scale.shape) for scale in call["quant_scales"]] == [
        (), (8, 384, 4), (8,), (), (8, 256, 6), (8,),
    ]  # fmt: skip
    assert float(call["quant_scales"][0]) == 256
    assert call["use_fused_finalize"] is False
    assert call["nvfp4_4over6"] is None
    assert call["workspace_buffer"].dtype == torch.uint8
    (space,) = record.calls["cutlass_fused_moe_workspace_size"]
    assert (space["max_num_tokens"], space["use_fused_finalize"], space["weight_dtype"]) == (
        512,
        False,
        torch.int64,
    )

    run("w4a16", x[:3], ids[:3], weights[:3], first, second)
    (call,) = record.calls["run_moe_w4a16"]
    assert call["hidden_states"].shape == (4, 256)
    assert (call["topk_ids"].dtype, call["topk_weights"].dtype) == (torch.int32, torch.float32)
    assert call["w13"].data_ptr() == up.data.data_ptr()
    assert call["w13_gs"] is up.global_scale
    assert call["workspace"] == 4, "of the bucket"

    run("b12x", x[:3], ids[:3], weights[:3], first, second)
    (call,) = record.calls["B12xMoEWrapper.run"]
    assert call["w1_weight"].data_ptr() == up.data.data_ptr()
    assert call["w1_weight_sf"].data_ptr() == prepared(first).scales.data_ptr()
    assert call["w1_alpha"] is up.global_scale, "not multiplied into E4M3, nor by the input's scale"
    assert call["input_global_scale"].tolist() == [1 / 256]
    assert call["fc2_input_scale"].shape == (1,)
    assert torch.equal(call["w2_alpha"], down.global_scale / 256)
    assert torch.equal(unswizzle(prepared(first).scales, 384, 16).float(), up.scales.float())


def test_layers_share_what_is_not_their_weights() -> None:
    record = Recorder()
    stacks = [(stack(4, 256, 128), stack(4, 128, 256)) for _ in range(2)]
    shared = share(libraries(record, "cutlass", "w4a16", "b12x"), facts(stacks[0][0], 2), 64, BF16, CPU)
    layers = [prepare(*pair, shared) for pair in stacks]
    assert len(record.calls["cutlass_fused_moe_workspace_size"]) == 1
    assert len(record.calls["allocate_workspace"]) == len(BUCKETS)
    assert len(record.calls["allocate_sm120_moe_workspace"]) == 1
    wrappers = record.calls["B12xMoEWrapper"]
    assert len(wrappers) == 2, "a layer's own: it keeps views of its weights"
    assert wrappers[0]["shared_output"] is wrappers[1]["shared_output"]
    assert wrappers[0]["max_num_tokens"] == PREFILL_FROM - 1
    assert nbytes(layers[0]) == nbytes(stacks[0]), "a token reads the scales in one order"
    runners = [prepared(layer[0]).runners for layer in layers]
    assert runners[0]["cutlass"] is runners[1]["cutlass"]
    assert runners[0]["w4a16"] is runners[1]["w4a16"]


@pytest.mark.parametrize(("width", "size", "copies"), [(1024, 2688, False), (2688, 1856, True)])
def test_which_shapes_b12x_reads_without_a_copy(
    width: int, size: int, copies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FlashInfer's own preparation, at Super's and Nano's sizes: the latter's scales would be kept once more."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    prepare_views = arithmetic.real(
        "flashinfer.fused_moe.cute_dsl.blackwell_sm12x.moe_dispatch", "_prepare_weight_views"
    )
    layout = arithmetic.real("flashinfer.cute_dsl.utils", "convert_sf_to_mma_layout")
    one = torch.ones(1)
    w1, w2 = (torch.zeros(1, *shape, dtype=torch.uint8) for shape in ((size, width // 2), (width, size // 2)))
    scales = [torch.zeros(1, n, k // 16).to(torch.float8_e4m3fn) for n, k in ((size, width), (width, size))]
    s1, s2 = map(swizzle, scales)
    views = prepare_views(
        w1_fp4=w1, w1_blockscale=layout(s1, m=size, k=width), w2_fp4=w2, w2_blockscale=layout(s2, m=width, k=size),
        w1_alphas=one, w2_alphas=one, n=size, k=width, quant_mode="nvfp4", activation="relu2",
    )  # fmt: skip
    packed = (*views.compact_tma_weights(), views.static_w13_fp4, views.static_down_fp4)
    assert [view.data_ptr() for view in packed] == [w1.data_ptr(), w2.data_ptr()] * 2
    kept = [view.data_ptr() for view in views.padded_scales()]
    assert (kept != [s1.data_ptr(), s2.data_ptr()]) == copies


@pytest.mark.parametrize("latent", [None, 128])
@pytest.mark.parametrize(("backend", "function"), [("w4a16", moe_add_w4a16), ("b12x", moe_add_b12x)])
@pytest.mark.parametrize("count", [1, 3, 20])
def test_a_decode_step_around_them(backend: str, function: Any, latent: int | None, count: int) -> None:
    hidden, size, number = 128, 256, 8
    up, down = stack(number, size, latent or hidden), stack(number, latent or hidden, size, 1 / 64)
    shared = share(libraries(Recorder(), backend), facts(up, 3), 64, BF16, CPU)

    def plain(*shape: int) -> Plain:
        return Plain((torch.randn(*shape) / shape[-1] ** 0.5).bfloat16())

    w = MoeWeights(
        gate=torch.randn(number, hidden) / 7, bias=torch.randn(number) * 0.1, top_k=3, scale=2.5, normalize=True,
        up=up, down=down, shared_up=plain(80, hidden), shared_down=plain(hidden, 80),
        latent_in=plain(latent, hidden) if latent else None, latent_out=plain(hidden, latent) if latent else None,
        tickets=torch.zeros(fused.tickets(hidden), dtype=torch.int32),
    )  # fmt: skip
    stream, norm = torch.randn(count, hidden).bfloat16(), Norm(torch.ones(hidden), 1e-5)
    first, second = prepare(up, down, shared)
    new, want = function(stream, norm, replace(w, up=first, down=second)), fused.moe_add(stream, norm, w)
    assert new.shape == stream.shape
    assert difference(new, want.float()) < TOLERANCES[backend] + 0.01
    assert not w.tickets.any()


def test_all_counts_of_tokens_are_compiled_before_they_are_wanted() -> None:
    record = Recorder()
    up, down = stack(4, 128, 128), stack(4, 128, 128)
    layer = prepare(up, down, share(libraries(record, "w4a16"), facts(up, 2), 64, BF16, CPU))
    warm("w4a16", *layer, top_k=2)
    assert [len(call["hidden_states"]) for call in record.calls["run_moe_w4a16"]] == [1, 2, 4, 8, 16, 32, 64]


def test_another_mode_of_b12x_is_refused() -> None:
    library = arithmetic.b12x(Recorder())

    def forced(*args: Any, **kwargs: Any) -> Any:
        return SimpleNamespace(quant_mode="w4a16")

    up, down = stack(4, 128, 128), stack(4, 128, 128)
    shared = share({"b12x": replace(library, wrapper=forced)}, facts(up, 2), 64, BF16, CPU)
    with pytest.raises(BackendError, match="FLASHINFER_B12X_FORCE_MOE_W4A16"):
        prepare(up, down, shared)


def test_the_entry_points_are_there() -> None:
    for part in (flashinfer_ops.cutlass(), flashinfer_ops.w4a16(), flashinfer_ops.b12x()):
        names = [field.name for field in fields(part) if field.name != "relu2"]
        assert all(callable(getattr(part, name)) for name in names)
    assert flashinfer_ops.cutlass().relu2 == arithmetic.RELU2
    assert not any(package.error for package in flashinfer_ops.packages().values())


def test_what_cannot_be_run_is_refused() -> None:
    up, down = stack(4, 256, 128), stack(4, 128, 256)
    x, (ids, weights) = torch.randn(1, 128), routes(1, 4, 2)
    with pytest.raises(BackendError, match="not prepared for w4a16"):
        run("w4a16", x.bfloat16(), ids, weights, up, down)
    shared = share(libraries(Recorder(), "cutlass"), facts(up, 2), 64, BF16, CPU)
    with pytest.raises(BackendError, match="bfloat16 activations"):
        run("cutlass", x, ids, weights, *prepare(up, down, shared))
    with pytest.raises(BackendError, match="bfloat16 activations"):  # what is quantised already
        run("cutlass", x.to(torch.uint8), ids, weights, *prepare(up, down, shared))
    zero = replace(up, input_scale=torch.zeros(4))
    with pytest.raises(BackendError, match="input_scale"):
        prepare(zero, down, shared)
