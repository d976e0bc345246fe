"""What a run has measured: read from summary.json and evaluation.json, and never made up."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint import CheckpointError
from ..evaluation.intervals import newcombe, wilson
from .markup import percent

EVALUATION_FORMAT = 1
CLEAN, PGD, AUTOATTACK = "clean", "pgd-madry-20-8-255", "autoattack-linf-8-255"
HEADLINE = {CLEAN: "clean accuracy", PGD: "PGD-20, 8/255", AUTOATTACK: "AutoAttack, 8/255"}
_AGAIN = "evaluate again with recipes/evaluate.py --overwrite"


@dataclasses.dataclass(frozen=True)
class Measured:
    """A figure with its interval and the number of images (or, of a class variance, classes) behind it."""

    value: float
    low: float | None = None
    high: float | None = None
    of: int | None = None

    @property
    def shown(self) -> str:
        """A share as 96.1 % (93.6 to 97.7)."""
        interval = "" if self.low is None or self.high is None else f" ({percent(self.low)} to {percent(self.high)})"
        return f"{percent(self.value)} %{interval}"


def share_of(share: float, images: int) -> Measured:
    """A share of images that was written down rounded, with its Wilson interval."""
    hits = round(share * images)
    return Measured(hits / images, *wilson(hits, images), images)


def measured(figure: Mapping[str, Any] | None, title: str | None) -> Measured | None:
    """The value of one network in a figure of evaluation.json; None where it was not measured."""
    value = (figure or {}).get("values", {}).get(title)
    if value is None or value.get("value") is None or not math.isfinite(value["value"]):
        return None
    return Measured(float(value["value"]), value.get("low"), value.get("high"), value.get("of"))


def gap(one: Measured, other: Measured) -> tuple[float, bool | None]:
    """one - other, and whether Newcombe's interval of the difference leaves out zero; None without intervals."""
    difference = one.value - other.value
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return difference, None
    low, high = newcombe((one.value, one.low, one.high), (other.value, other.low, other.high))
    return difference, not low <= 0 <= high


def check_evaluation(evaluation: Mapping[str, Any], path: Path) -> None:
    """Raises CheckpointError unless evaluation.json has what a card is made of."""
    if evaluation.get("format") != EVALUATION_FORMAT:
        raise CheckpointError(
            f"{path} has format {evaluation.get('format')!r}, and this version reads {EVALUATION_FORMAT}: {_AGAIN}"
        )
    try:
        problem = _problem(evaluation)
    except (AttributeError, KeyError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
    if problem:
        raise CheckpointError(f"{path} is not complete ({problem}): {_AGAIN}")


def _problem(evaluation: Mapping[str, Any]) -> str | None:
    data, titles = evaluation["data"], [network["title"] for network in evaluation["networks"]]
    if not (isinstance(data["source"], str) and isinstance(data["images"], int) and isinstance(data["split"], str)):
        return "data needs source, split and images"
    for figure in evaluation["figures"]:
        if not all(isinstance(figure[key], str) for key in ("key", "group", "label", "unit")):
            return "a figure without key, group, label or unit"
        dict(figure["protocol"])
        for title, value in figure["values"].items():
            if title not in titles or not isinstance(value["value"], int | float | None):
                return f"the figure {figure['key']!r} of {title!r}"
    for title, verdict in evaluation["verdicts"].items():
        if title not in titles or not isinstance(verdict["verdict"], str) or not isinstance(verdict["summary"], str):
            return f"the verdict on {title!r}"
        for check in verdict["checks"]:
            _ = check["passed"], check["name"], check["says"]
    list(evaluation["warnings"])
    return None
