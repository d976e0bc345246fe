"""How much of each class lies along its leading directions (paper, Appendix C.3, Fig. 7)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.spectrum import variance_ratio
from ..errors import EvaluationError, EvaluationWarning


def class_variance_ratio(
    activations: Tensor,  # (n, m) or (n, ...), any float dtype
    labels: Tensor,  # (n,) int64
    ranks: Sequence[int] = (1,),
    *,
    centred: bool = True,
) -> dict[int, list[float]]:
    """sum_{i <= r} sigma_i^2 / sum_i sigma_i^2 for every r in `ranks`, of the rows of each class alone.

    Args:
        centred: sigma_i are the singular values of the class's activations minus their mean, or of the activations
            as they are. The paper's "inverse stable rank" sigma_1^2 / ||A||_F^2 is of A as it is: there the mean
            of the class counts as a direction, and mostly it is the first.

    Returns:
        {class: ratios}, by class, for the classes that occur. NaN, with an `EvaluationWarning`, where a class has
        no variance: all its rows are equal, which one row always is (centred), or all are zero (not centred).

    Raises:
        EvaluationError: labels that do not fit, no activations, values that are not finite, ranks below 1.
    """
    rows = _checked(activations, labels)
    found: dict[int, list[float]] = {}
    for label in labels.unique().tolist():
        matrix = rows[labels == label]
        if bool((matrix == (matrix[:1] if centred else 0)).all()):
            found[label] = [math.nan] * len(ranks)
            continue
        try:
            # The mean of A and -A together is zero, and their squared singular values are twice those of A alone.
            found[label] = variance_ratio(matrix if centred else torch.cat([matrix, -matrix]), ranks)
        except (TypeError, ValueError) as error:
            raise EvaluationError(f"class {label}: {error}") from error
    if flat := [label for label, ratios in found.items() if any(map(math.isnan, ratios))]:
        warnings.warn(
            f"classes {flat} have no variance, so their variance ratio is NaN: all their activations are "
            + ("equal" if centred else "zero"),
            EvaluationWarning,
            stacklevel=2,
        )
    return found


def _checked(activations: Tensor, labels: Tensor) -> Tensor:
    if activations.dim() < 2 or not activations.is_floating_point() or not len(activations):
        shape = f"{tuple(activations.shape)} {activations.dtype}"
        raise EvaluationError(f"activations must be (n, features) floating point with n >= 1, not {shape}")
    if labels.shape != activations.shape[:1]:
        raise EvaluationError(f"{len(activations)} activations need as many labels, not {tuple(labels.shape)}")
    return activations.detach().flatten(1)
