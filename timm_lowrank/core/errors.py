"""Every error of the package that a caller may want to catch by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LowRankError(RuntimeError):
    """Base of the errors that the low-rank branch raises while it trains."""


class CollapseError(LowRankError):
    """A regularized layer died (its centred activations vanished) or turned NaN.

    Training on cannot help: with every activation equal, the reconstruction loss is zero, and the norm
    loss of the paper has no gradient at zero to bring the layer back.
    """


class CaptureError(LowRankError):
    """The activations of a named layer could not be had from a forward pass."""


class ProjectionWarning(UserWarning):
    """A factorisation inside a rank projection failed and was repeated with a smoothed matrix."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """The tail of an error message about an unknown name: `known` names that look like `name`, or all of a few."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=count, cutoff=0.5) or known[:8]
    return "Did you mean: " + ", ".join(close) + "?" if close else "There are none."
