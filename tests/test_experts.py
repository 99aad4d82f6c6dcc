"""Which experts a step takes, and what their backends cost in memory on the cards that there are."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flashinfer_arithmetic import Recorder, cutlass, real, w4a16
from torch import Tensor

from nanoserve.cache import Cache, CacheShape
from nanoserve.checkpoint import open_checkpoint
from nanoserve.config import EngineConfig, ShapeName
from nanoserve.errors import MemoryPlanError
from nanoserve.experts import NO_COSTS, expert_costs, expert_facts, with_prepared
from nanoserve.kernels import flashinfer_experts, moe
from nanoserve.kernels.flashinfer_experts import BUCKETS, TOLERANCES
from nanoserve.kernels.fused import MoeWeights, Norm
from nanoserve.kernels.linear import Plain
from nanoserve.kernels.moe import PREFILL_FROM
from nanoserve.kernels.place import Experts
from nanoserve.kernels.table import Ops, select
from nanoserve.models.config import NemotronHConfig
from nanoserve.models.layers import MoE, Span
from nanoserve.models.nemotron_h import NemotronH
from nanoserve.plan import MemoryPlan, plan_memory
from nanoserve.shapes import shape_checkpoint
from nanoserve.startup import prepare
from nanoserve.step import prefill
from nanoserve.weights import load, resolve

CPU = torch.device("cpu")
OWN = {"moe_add": "triton", "experts_prefill": "triton", "experts_few": "triton"}
DEFAULT = {**OWN, "experts_prefill": "cutlass"}
GIB = 1 << 30
SM12X = "flashinfer.fused_moe.cute_dsl.blackwell_sm12x"


def plan(name: ShapeName, backends: Mapping[str, str], available: int, fraction: float = 0.95) -> MemoryPlan:
    """With 32k of context, chunks of 2,048 tokens, an FP8 cache and the GPU's attention."""
    checkpoint = shape_checkpoint(name)
    config = NemotronHConfig.from_json(checkpoint.config)
    manifest = resolve(checkpoint, config)
    return plan_memory(
        config, manifest, CacheShape(0, 16, torch.float8_e4m3fn, torch.bfloat16),
        wanted_context=32768, prefill_chunk=2048, keys_at_once=False, available=available, fraction=fraction,
        experts=expert_costs(expert_facts(config, manifest), backends, 2048),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "backends", "left"),
    [
        # GB that stay free of 95 % of 24, 32, 96 and 128 GB (decimal); None where it does not fit
        ("nano", OWN, (2.6, 10.2, 71.0, 101.4)),
        ("nano", DEFAULT, (0.5, 8.1, 68.9, 99.3)),
        ("nano", {**DEFAULT, "moe_add": "w4a16"}, (0.5, 8.1, 68.9, 99.3)),
        ("lightning", OWN, (3.1, 10.7, 71.5, 101.9)),  # weight-only: it has no backend that quantises activations
        ("lightning", {**OWN, "moe_add": "w4a16"}, (1.2, 8.8, 69.6, 100.0)),
        ("super", OWN, (None, None, 14.3, 44.7)),
        ("super", DEFAULT, (None, None, 6.8, 37.2)),
        ("super", {**DEFAULT, "moe_add": "w4a16", "experts_few": "w4a16"}, (None, None, 6.8, 37.2)),
        ("super", {**DEFAULT, "moe_add": "b12x", "experts_few": "w4a16"}, (None, None, 6.7, 37.1)),
    ],
)
def test_what_fits_which_card(
    name: ShapeName, backends: Mapping[str, str], left: tuple[float | None, ...]
) -> None:
    for gigabytes, margin in zip((24, 32, 96, 128), left, strict=True):
        if margin is None:
            with pytest.raises(MemoryPlanError):
                plan(name, backends, gigabytes * 10**9)
        else:
            assert margin <= plan(name, backends, gigabytes * 10**9).left / 1e9 < margin + 0.1


def test_nano_fits_a_24_gib_card_with_the_options_as_they_are() -> None:
    free = 24 * GIB - GIB // 2  # what a driver and a desktop have taken
    assert plan("nano", DEFAULT, free, 0.9).left > 0


def test_scales_are_counted_once_more_and_no_weight_is() -> None:
    own, default = (plan("super", ops, 128 * 10**9) for ops in (OWN, DEFAULT))
    assert own.weights == default.weights
    assert (own.second_scales, default.second_scales) == (0, 40 * 512 * 2 * 2688 * 1024 // 16)
    assert default.second_scales == plan("super", {**DEFAULT, "moe_add": "b12x"}, 128 * 10**9).second_scales
    rows = dict(default.rows())
    assert rows["scales again"] == "7.05 GB swizzled"
    assert "scales again" not in dict(own.rows())


def test_the_refusal_says_what_a_backend_would_save() -> None:
    with pytest.raises(MemoryPlanError, match=r"experts_prefill=triton.*1\.87 GB"):
        plan("nano", DEFAULT, 22 * 10**9, 0.95)


def test_what_backends_are_told_of_the_experts() -> None:
    found = {}
    for name in ("nano", "lightning", "super"):
        checkpoint = shape_checkpoint(name)
        config = NemotronHConfig.from_json(checkpoint.config)
        facts = expert_facts(config, resolve(checkpoint, config))
        assert facts
        found[name] = (facts.format, facts.input_scales, facts.count, facts.top_k, facts.width, facts.size)
    assert found == {
        "nano": ("nvfp4", True, 128, 6, 2688, 1856),
        "lightning": ("nvfp4", False, 128, 6, 2688, 1856),
        "super": ("nvfp4", True, 512, 22, 1024, 2688),
    }


def test_without_flashinfer_nothing_is_prepared() -> None:
    fields: dict[tuple[int | None, str], Any] = {(0, "up"): 1}
    assert with_prepared(fields, None, DEFAULT, 64, torch.bfloat16, CPU) is fields
    assert expert_costs(None, DEFAULT, 64) == NO_COSTS


def watched(seen: list[str]) -> Ops:
    """Ops of the torch column that note which experts ran."""
    ops = select(CPU, torch.float32, {})

    def noted(name: str) -> Any:
        run = getattr(ops, name)

        def call(*args: Any) -> Any:
            seen.append(name)
            return run(*args)

        return call

    return replace(ops, **{name: noted(name) for name in OWN})


@pytest.mark.parametrize(
    ("tokens", "decode", "op"),
    [
        (PREFILL_FROM - 1, False, "experts_few"),
        (PREFILL_FROM, False, "experts_prefill"),
        (1, False, "experts_few"),
        (1, True, "moe_add"),
        (8, True, "moe_add"),
    ],
)
def test_which_experts_a_step_takes(tokens: int, decode: bool, op: str, span: Span) -> None:
    assert PREFILL_FROM == 64
    hidden, number = 16, 4

    def plain(*shape: int) -> Plain:
        return Plain(torch.randn(*shape) / 4)

    weights = MoeWeights(
        torch.randn(number, hidden), torch.zeros(number), 2, 1.0, True,
        plain(number, 32, hidden), plain(number, hidden, 32), plain(8, hidden), plain(hidden, 8), None, None,
        torch.zeros(1, dtype=torch.int32),
    )  # fmt: skip
    seen: list[str] = []
    x = torch.randn(tokens, hidden)
    MoE(watched(seen), weights)(x, Norm(torch.ones(hidden), 1e-5), replace(span, decode=decode))
    assert seen == [op]


@pytest.fixture
def span() -> Span:
    """Of which a mixture of experts reads nothing but whether it decodes."""
    nothing: Any = None
    return Span(torch.zeros(1), torch.zeros(1), nothing, nothing, False)


def test_the_workspace_of_w4a16_is_flashinfers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own count, over all buckets; multiprocessors change the grid and no buffer."""
    allocate = real(f"{SM12X}.moe_nvfp4_w4a16", "allocate_workspace")

    def card(device: object) -> SimpleNamespace:
        return SimpleNamespace(multi_processor_count=188)

    monkeypatch.setattr(torch.cuda, "get_device_properties", card)
    total = 0
    for bucket in BUCKETS:
        parts = allocate(bucket, 1024, 2688, 512, 22, False, torch.device("meta"))
        total += sum(part.numel() * part.element_size() for part in parts)
    experts = Experts("nvfp4", True, "relu2", 512, 22, 1024, 2688, 40)
    counted = expert_costs(experts, {**OWN, "moe_add": "w4a16"}, 2048).workspace
    assert total <= counted < 1.1 * total


def test_the_workspace_of_b12x_is_flashinfers() -> None:
    allocate = real(f"{SM12X}.moe_dispatch", "allocate_sm120_moe_workspace")
    rows = (PREFILL_FROM - 1) * 22
    space = allocate(
        state_E=512, weight_E=512, max_rows=rows, k=1024, n=2688, num_topk=22, device=CPU, quant_mode="nvfp4",
        backend="static", activation="relu2",
    )  # fmt: skip
    tensors = {
        part.untyped_storage().data_ptr(): part for part in vars(space).values() if isinstance(part, Tensor)
    }
    total = sum(part.untyped_storage().nbytes() for part in tensors.values())
    experts = Experts("nvfp4", True, "relu2", 512, 22, 1024, 2688, 40)
    counted = expert_costs(experts, {**OWN, "moe_add": "b12x"}, 2048).workspace
    assert total <= counted < 1.1 * total


@pytest.mark.parametrize(
    ("recipe", "backends"), [("super", ("cutlass", "w4a16")), ("lightning", ("triton", "w4a16"))]
)
def test_a_checkpoint_runs_on_them_from_end_to_end(
    recipe: str, backends: tuple[str, str], make_checkpoint: Callable[..., Path]
) -> None:
    """Loaded, prepared and run over 70 tokens and then 3, on their documented arithmetic."""
    checkpoint = open_checkpoint(make_checkpoint(recipe=recipe))
    prepared = prepare(checkpoint, EngineConfig(device="cpu", dtype="bfloat16", max_context=128))
    manifest, facts = prepared.manifest, prepared.experts
    assert facts
    assert facts.input_scales == (recipe == "super")
    fields = load(checkpoint, manifest, CPU, lambda done, total: None)
    for place, weight in fields.items():
        if facts.input_scales and place[1] in ("up", "down"):
            assert weight.input_scale.tolist() == pytest.approx([0.002] * facts.count)
            fields[place] = replace(weight, input_scale=weight.input_scale * 16)  # as large as the noise needs
    chosen = dict(zip(("experts_prefill", "experts_few"), backends, strict=True))
    record = Recorder()
    grown = with_prepared(
        fields, facts, {**OWN, **chosen}, 128, torch.bfloat16, CPU,
        {"cutlass": lambda: cutlass(record), "w4a16": lambda: w4a16(record)},
    )  # fmt: skip
    up = grown[prepared.config.pattern.index("E"), "up"]
    assert (up.prepared.activations is not None) == facts.input_scales
    errors: dict[str, list[float]] = {name: [] for name in chosen.values()}

    def beside(name: str) -> Callable[..., Tensor]:
        """The reference, which the model goes on with, and a backend over the same values."""

        def call(x: Tensor, *rest: Any) -> Tensor:
            want = moe.experts(x, *rest)
            error = flashinfer_experts.run(name, x, *rest).float() - want.float()
            errors[name].append(float(error.square().mean().sqrt() / want.float().square().mean().sqrt()))
            return want

        return call

    ops = replace(prepared.ops, **{op: beside(name) for op, name in chosen.items() if name != "triton"})
    model = NemotronH.build(prepared.config, ops, torch.bfloat16, grown)
    scales = ((1.0, 1.0),) * len(prepared.config.layers("*"))
    cache = Cache.allocate(prepared.config, prepared.shape, CPU, scales)
    with cache.sequence(128) as sequence:
        prefill(model, cache, sequence, torch.arange(70) + 5)
        prefill(model, cache, sequence, torch.tensor([7, 8, 9]))
    layers = prepared.config.pattern.count("E")
    assert {name: len(each) for name, each in errors.items()} == {
        name: 0 if name == "triton" else layers for name in errors
    }
    assert all(
        max(each) < TOLERANCES[name] + 0.004 for name, each in errors.items() if each
    )  # the reference's BF16
    assert len(record.calls["run_moe_w4a16"]) == len(BUCKETS) + layers, "compiled for each count at load"
