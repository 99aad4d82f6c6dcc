"""Which launches cuda_plans.py makes of an op, and how they are cut."""

import pytest

from nanoserve.cuda_launches import launches
from nanoserve.kernels import cuda_attention, cuda_plans
from nanoserve.kernels.chips import MULTIPROCESSORS, shared_room
from nanoserve.kernels.cubin import RESERVED
from nanoserve.kernels.cuda_plans import MEASURED, Matrix, fitted, key, normed, plain
from nanoserve.kernels.cuda_products import Cut, Plan, Router

ROUTER = Router(128, 6, True, "here")


def test_every_measured_cut_is_of_a_released_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """And fits it: else it would be left for the rule without a word."""
    seen: dict[tuple[str, int, int], set[bool]] = {}

    def noted(plan: Plan, major: int) -> tuple[Plan, Cut]:
        whole, cut = fitted(plan, major)
        if (own := key(plan)) in MEASURED[9]:
            assert cut == MEASURED[9][own][0]
            assert tuple(part.eights for part in whole.parts)[: len(MEASURED[9][own]) - 1] == MEASURED[9][own][1:]
        seen.setdefault(own, set()).add(whole.shared(cut) <= shared_room(9))
        return whole, cut

    monkeypatch.setattr(cuda_plans, "fitted", noted)
    for shape in ("nano", "lightning", "super"):
        assert list(launches(shape, (9, 0)))
    assert set(MEASURED[9]) <= set(seen)
    assert all(fits == {True} for fits in seen.values())


@pytest.mark.parametrize("major", [9, 12])
@pytest.mark.parametrize("matrix", [Matrix(4, 2688, 8192), Matrix(8, 2688, 4096), Matrix(16, 40, 8192)])
def test_what_is_not_measured_follows_the_rule(major: int, matrix: Matrix) -> None:
    plan, cut = fitted(plain(matrix, "BF16", ready=False), major)
    assert plan.shared(cut) <= shared_room(major)
    assert cut.stages % cut.groups == 0


@pytest.mark.parametrize("hidden", [2688, 4096])
def test_what_reads_attention_has_room_beside_it(hidden: int) -> None:
    """On Hopper, with an FP8 cache: else its weights come only when attention has ended (1.5 us a layer)."""
    plan, cut = fitted(plain(Matrix(16, hidden, 4096), "STREAM", ready=False), 9)
    assert plan.shared(cut) + RESERVED + cuda_attention.shared_bytes(True) <= shared_room(9)


def test_a_measured_cut_that_does_not_fit_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plain(Matrix(4, 2688, 4096), "STREAM", ready=False)
    monkeypatch.setitem(MEASURED[9], ("add", 4, 4096), (Cut(4, 16), 2))
    fitted.cache_clear()
    try:
        whole, cut = fitted(plan, 9)
    finally:
        fitted.cache_clear()
    assert whole == plan
    assert whole.shared(cut) <= shared_room(9)


@pytest.mark.parametrize(("bits", "columns", "experts", "shared"), [(32, 2688, 128, 3712), (16, 4096, 512, 5376)])
@pytest.mark.parametrize("blocks", MULTIPROCESSORS.values())
def test_no_block_has_much_more_than_the_others(
    bits: int, columns: int, experts: int, shared: int, blocks: int
) -> None:
    """Where some have the router and nothing else."""
    front = (Matrix(bits, experts, columns), Matrix(8, shared, columns))
    plan = normed(front, ("FLOAT", "SQUARED"), (0, 8), ROUTER)
    own = plan.own(blocks)
    assert 0 < own < blocks
    sizes = [m.bits * m.columns for m in front]
    jobs = [-(-m.rows // 8) for m in front]
    most = max(-(-jobs[0] // own) * sizes[0], -(-jobs[1] // (blocks - own)) * sizes[1])
    even = sum(size * count for size, count in zip(sizes, jobs, strict=True)) / blocks
    assert most <= even + max(sizes) * 1.5


def test_one_block_has_all_and_so_has_a_router_alone() -> None:
    gate, shared = Matrix(16, 128, 2688), Matrix(4, 3712, 2688)
    assert normed((gate, shared), ("FLOAT", "SQUARED"), (0, 4), ROUTER).own(1) == 0
    assert normed((gate,), ("FLOAT",), (0,), ROUTER).own(132) == 0
    assert normed((gate, shared), ("FLOAT", "SQUARED"), (0, 4)).own(132) == 0
