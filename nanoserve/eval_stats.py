"""The statistics of an evaluation: pure functions of counts and lists."""

import math
from collections.abc import Sequence

_Z95 = 1.959963984540054
"""The normal distribution's two-sided 95 % point."""


def wilson(correct: int, total: int) -> tuple[float, float]:
    """Wilson's score interval of a share, at 95 %.

    Args:
        correct: successes, in [0, total].
        total: trials, from 1.

    Returns:
        (low, high), both in [0, 1].
    """
    assert 0 <= correct <= total > 0
    share, z2 = correct / total, _Z95 * _Z95
    scale = 1 + z2 / total
    middle = (share + z2 / (2 * total)) / scale
    half = _Z95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total)) / scale
    # At the ends the formula gives the bound exactly, and rounding would put it beside it.
    low = 0.0 if correct == 0 else middle - half
    high = 1.0 if correct == total else middle + half
    return low, high


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """McNemar's test on pairs, exact and two-sided: could both be right equally often?

    Args:
        only_first: pairs of which only the first is right.
        only_second: pairs of which only the second is right.

    Returns:
        The p-value, in [0, 1]; 1 when no pair differs.
    """
    assert only_first >= 0 <= only_second
    differing = only_first + only_second
    tail = ways = 1
    for k in range(min(only_first, only_second)):
        ways = ways * (differing - k) // (k + 1)  # binomial coefficients, in whole numbers of any size
        tail += ways
    return min(1.0, 2 * tail / 2**differing)


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which ``percent`` of the values lie, with linear interpolation as numpy's default.

    Args:
        values: at least one, in any order.
        percent: in [0, 100].
    """
    assert values
    assert 0 <= percent <= 100
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def perplexity(logprobs: Sequence[float]) -> float:
    """The exponential of the mean of -ln p; infinite when a token was impossible.

    Args:
        logprobs: ln p of each token, at least one.
    """
    assert logprobs
    mean = -math.fsum(logprobs) / len(logprobs)
    return math.exp(mean) if mean < 700 else math.inf  # exp overflows at 710
