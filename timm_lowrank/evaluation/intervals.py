"""Confidence intervals of shares."""

from __future__ import annotations

import math
from statistics import NormalDist

from ..errors import EvaluationError


def wilson(hits: int, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (low, high) of the share hits / count.

    Both ends solve |hits / count - p| = z sqrt(p (1 - p) / count), z the quantile of the normal distribution that
    leaves (1 - confidence) / 2 above it. Unlike the textbook interval it stays in [0, 1] and does not
    shrink to a point at 0 or at `count` hits.

    Raises:
        EvaluationError: no trials, hits outside 0 ... count, or a confidence outside (0, 1).
    """
    if count < 1 or not 0 <= hits <= count:
        raise EvaluationError(f"hits must lie between 0 and a count of at least 1, not {hits} of {count}")
    if not 0 < confidence < 1:
        raise EvaluationError(f"confidence must lie between 0 and 1, for example 0.95, not {confidence}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, spread = hits / count, z * z / count
    centre = (share + spread / 2) / (1 + spread)
    half = (spread * (share * (1 - share) + spread / 4)) ** 0.5 / (1 + spread)
    # The ends at no and at all hits are 0 and 1 exactly; round-off would leave 1e-17 of them.
    return (0.0 if hits == 0 else centre - half), (1.0 if hits == count else centre + half)


def newcombe(
    one: tuple[float, float, float],
    other: tuple[float, float, float],
) -> tuple[float, float]:
    """The interval of one - other, each given as (value, low, high) and measured independently of each other.

    Newcombe (1998), method 10: the distances between the shares and the ends of their own Wilson intervals, squared and
    added. The same recipe holds for other figures with intervals.
    """
    value, low, high = one
    other_value, other_low, other_high = other
    gap = value - other_value
    return gap - math.hypot(value - low, other_high - other_value), gap + math.hypot(
        high - value, other_value - other_low
    )
