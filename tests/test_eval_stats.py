"""Statistics against values known from elsewhere."""

import math
import random

import numpy as np
import pytest

from nanoserve.eval_stats import mcnemar_exact, percentile, perplexity, wilson


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        (8, 10, 0.4902, 0.9433),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (1, 1, 0.2065, 1.0),
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, the standard example
    ],
)
def test_wilson(correct: int, total: int, low: float, high: float) -> None:
    assert wilson(correct, total) == pytest.approx((low, high), abs=5e-5)


def test_wilson_stays_inside_and_around_the_share() -> None:
    for total in (1, 2, 7, 100, 1319):
        for correct in range(total + 1):
            low, high = wilson(correct, total)
            assert 0 <= low <= correct / total <= high <= 1


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"),
    [(1, 9, 0.021484375), (9, 1, 0.021484375), (0, 0, 1.0), (5, 5, 1.0), (0, 5, 0.0625), (0, 1, 1.0)],
)
def test_mcnemar(only_first: int, only_second: int, p: float) -> None:
    assert mcnemar_exact(only_first, only_second) == p


def test_mcnemar_of_many_pairs_does_not_overflow() -> None:
    assert mcnemar_exact(3000, 3000) == 1.0
    assert 0 < mcnemar_exact(900, 1100) < 1e-4
    assert mcnemar_exact(0, 3000) == 0.0  # 2^-2999, below the smallest float


def test_percentile_is_numpys() -> None:
    values = [random.Random(1).random() for _ in range(1001)]
    for percent in (0, 50, 99.9, 100):
        assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)), abs=1e-12)
    assert percentile([3.0], 99.9) == 3.0


def test_perplexity() -> None:
    assert perplexity([math.log(0.5), math.log(0.125)]) == pytest.approx(4.0)
    assert perplexity([-math.inf]) == math.inf
