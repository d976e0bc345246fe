"""Whether a difference or a share is more than the images at hand could show by chance."""

from __future__ import annotations

from math import exp, lgamma, log
from typing import NamedTuple

from torch import Tensor

CHANCE = 0.01
"""Above this probability a finding is put down to chance.

A dozen checks are made of each network. Each also asks for a difference that matters, its limit, and sound networks
stay clear of the limits, so that a false alarm is far less likely than a dozen times this.
"""


class Paired(NamedTuple):
    """Two accuracies over the same images."""

    first: float
    second: float
    chance: float

    @property
    def gap(self) -> float:
        """How far the second accuracy lies below the first."""
        return self.first - self.second

    @property
    def beyond_chance(self) -> bool:
        """The second lies below the first, and chance is unlikely to have done that."""
        return self.chance < CHANCE


def paired(
    first: Tensor,  # (n,) bool
    second: Tensor,  # (n,) bool
) -> Paired:
    """Whether `second` is right less often than `first`: McNemar's exact test, one-sided.

    Both are of the same images, so only those on which they differ speak: if it were chance, either would be the one
    that is right with probability 1/2. Comparing two intervals instead would need far more images.
    """
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    chance = at_least(only_first, only_first + only_second, 0.5)
    return Paired(float(first.double().mean()), float(second.double().mean()), chance)


def share_exceeds(hits: int, count: int, limit: float) -> bool:
    """Whether so many hits are unlikely if a share of `limit` of all images were hit."""
    return at_least(hits, count, limit) < CHANCE


def at_least(hits: int, count: int, probability: float) -> float:
    """The probability of `hits` or more in `count` independent trials."""
    if hits <= 0:
        return 1.0
    if hits > count or probability <= 0:
        return 0.0
    if probability >= 1:
        return 1.0
    logs = (
        lgamma(count + 1) - lgamma(k + 1) - lgamma(count - k + 1) + k * log(probability)
        + (count - k) * log(1 - probability)
        for k in range(hits, count + 1)
    )  # fmt: skip
    return min(1.0, sum(exp(value) for value in logs))


def at_most(hits: int, count: int, probability: float) -> float:
    """The probability of `hits` or fewer in `count` independent trials."""
    return at_least(count - hits, count, 1 - probability)
