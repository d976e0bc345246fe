"""Gradient masking: whether the accuracy under attack is the network's or the attack's failure.

A network can look robust because attacks that follow its gradient are led astray: the gradient is zero (quantised
inputs, saturated logits), wrong on the scale of a step (shattered), or random. Its images can then be fooled all
the same, and the accuracy under PGD says nothing. `diagnose` looks for what gives that away (Athalye et al., 2018;
Carlini et al., 2019) and gives one of three verdicts, with the number, the limit and a sentence for every check:

* "gradient masking": an attack that knows or does less finds errors that PGD does not, or the gradient vanishes.
  This is proven on the images at hand; accuracy under gradient attacks must not be reported as robustness.
* "suspect": nothing of that, but the loss or the attack behaves oddly, or the network is randomised.
* "no sign of gradient masking": the checks passed. That is not a proof of robustness, nor that there is no masking:
  an attack made for this one network may still do better, and effects below what the images can tell from chance
  stay unseen (the summary says how small). It does not say that the network is robust either: one that falls to 0 %
  under PGD masks nothing.

`observe` and `judge` are the two halves, so that observations of parts of the images can be made apart and joined.
`diagnose_published` does what can be done where there are figures and no network.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..results import Verdict
from .observations import BUDGETS, Budget, observe
from .published import PGDAccuracy, accuracies_of, diagnose_published
from .verdict import judge

__all__ = [
    "BUDGETS",
    "Budget",
    "PGDAccuracy",
    "accuracies_of",
    "diagnose",
    "diagnose_published",
    "judge",
    "observe",
]


def diagnose(
    model: nn.Module,
    images: Tensor,  # (n, channels, height, width) float in [0, 1]
    labels: Tensor,  # (n,) int64
    *,
    eps: float,
    **options: Any,
) -> Verdict:
    """`judge(observe(...))`: the verdict on a network at the radius eps (L_inf, in units of the pixel range).

    Args:
        options: `radius_unit`, `seed`, `source`, `autoattack`, `budget` and `batch_size` of `observe`.

    Raises:
        EvaluationError: as `observe` and `judge`.
        ImportError: as `observe`.
    """
    return judge(observe(model, images, labels, eps=eps, **options))
