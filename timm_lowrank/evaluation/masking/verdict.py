"""From observations to a verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, log
from typing import Any

from torch import Tensor

from ...errors import EvaluationError
from . import comparisons, symptoms
from .budget import Budget
from .chance import CHANCE
from .check import Check, Observed
from .observations import SETTING

CHECKS = (
    comparisons.black_box, comparisons.square, comparisons.autoattack, comparisons.random_signs,
    comparisons.single_step, comparisons.saturated_logits, comparisons.averaged_gradients, symptoms.zero_gradients,
    symptoms.unbounded_radius, symptoms.smooth_loss, symptoms.deterministic, symptoms.double_radius,
    comparisons.more_steps, comparisons.restarts,
)  # fmt: skip

SOUND = "no sign of gradient masking"
SUSPECT = "suspect"
MASKED = "gradient masking"

FEWEST = ceil(log(CHANCE) / log(0.5))
"""Images on which two attacks must differ, all in one direction, before it is more than chance: seven."""


@dataclass(frozen=True)
class Diagnosis:
    """A verdict with its evidence.

    Attributes:
        verdict: "no sign of gradient masking", "suspect" or "gradient masking".
        summary: the strongest reason, what failed, and how small a difference the images can show.
        checks: every check, with its numbers.
    """

    verdict: str
    summary: str
    checks: tuple[Check, ...]

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the checks that failed."""
        return tuple(check.name for check in self.checks if check.passed is False)

    def to_dict(self) -> dict[str, Any]:
        """verdict, summary and checks, as JSON takes them."""
        return {"verdict": self.verdict, "summary": self.summary, "checks": [each.to_dict() for each in self.checks]}


def judge(observations: Mapping[str, Tensor]) -> Diagnosis:
    """The verdict on the columns of `observe`, or on several of them concatenated column by column.

    "gradient masking" if a decisive check fails, "suspect" if only others do. A check fails if its number lies beyond
    its limit and the images at hand are enough to rule out chance (one-sided, one per cent); comparisons of attacks
    are made image by image.

    Raises:
        EvaluationError: columns are missing, of different lengths or made with different settings, or the network
            is right on too few of the images for any check to fail.
    """
    observed = _observed(observations)
    right = int(observed.columns["clean"].sum())
    count = len(observed.columns["clean"])
    if right < FEWEST:
        raise EvaluationError(
            f"the network is right on {right} of {count} images: with fewer than {FEWEST} no check could fail; "
            f"take more images, or a network that has learnt something"
        )
    checks = tuple(check(observed) for check in CHECKS)
    failed = [check for check in checks if check.passed is False]
    verdict = MASKED if any(check.decisive for check in failed) else SUSPECT if failed else SOUND
    return Diagnosis(verdict, _summary(checks, count), checks)


def _observed(observations: Mapping[str, Tensor]) -> Observed:
    names = [SETTING + name for name in ("eps", *Budget.__dataclass_fields__)]
    needed = [
        "clean", "repeats", "zero_gradient", "finite_gradient", "saturated", "kept_promise", "fgsm", "pgd",
        "pgd_more_steps", "pgd_margin", "pgd_double", "pgd_unbounded", "restarts_withstood", "signs", "pgd_averaged",
        *names,
    ]  # fmt: skip
    missing = [name for name in needed if name not in observations]
    if missing:
        raise EvaluationError(f"observations lack the columns {', '.join(missing)}: pass what observe() returned")
    lengths = {tuple(column.shape) for column in observations.values()}
    if len(lengths) != 1 or len(next(iter(lengths))) != 1:
        raise EvaluationError("all columns of the observations must have one number for each image")
    settings = {}
    for name in names:
        values = observations[name].unique()
        if len(values) != 1:
            raise EvaluationError(f"{name.removeprefix(SETTING)} must be the same in all parts of the observations")
        settings[name.removeprefix(SETTING)] = float(values)
    return Observed({name: column for name, column in observations.items() if name not in names}, settings)


def _summary(checks: tuple[Check, ...], count: int) -> str:
    decided = [check for check in checks if check.passed is not None]
    failed = [check for check in decided if not check.passed]
    open_ones = [check.name for check in checks if check.undecided]
    if failed:
        first = max(failed, key=lambda check: (check.decisive, (check.value or 0) - check.limit))
        text = f"{first.says} {len(failed)} of {len(decided)} checks failed: {', '.join(c.name for c in failed)}."
    else:
        text = f"All {len(decided)} checks passed that could be made."
    if open_ones:
        text += f" Undecided, for too few images: {', '.join(open_ones)}."
    seen = max(comparisons.FAR, FEWEST / count)
    return f"{text} On {count} images two attacks are told apart from a difference of {100 * seen:.1f} points on."
