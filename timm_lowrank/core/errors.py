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


# Spread of a layer over that at switch-on. In front of a normalisation a layer may shrink tenfold and be sound; below
# a thousandth, float32 sums of squares cannot tell its spread from the offset that b has not followed yet.
_DEAD, _BLOWN_UP = 1e-3, 1e4


def raise_if_collapsed(layer: str, spread: float, reference: float, updates: int) -> None:
    """Raise CollapseError if a layer is past saving.

    Args:
        layer: its name.
        spread: root mean square norm of its activations about their mean; NaN if none were finite.
        reference: the same when the branch was switched on.
        updates: of the branch so far.
    """
    advice = (
        "Lower reconstruction_weight or the learning rate, switch the branch on later (model.enable) or raise "
        "warmup_updates; the loss as printed (scale='paper') kills most wide layers."
    )
    if not spread < float("inf"):
        raise CollapseError(f"the activations of layer {layer!r} are not finite after {updates} updates. {advice}")
    if not _DEAD * reference < spread < _BLOWN_UP * reference:
        what = "collapsed" if spread <= reference else "blew up"
        raise CollapseError(
            f"layer {layer!r} {what}: after {updates} updates the root mean square norm of its centred activations is "
            f"{spread:.3g}, and it was {reference:.3g} when the branch was switched on. {advice}"
        )


class CaptureError(LowRankError):
    """The activations of a named layer could not be had from a forward pass."""


class LowRankWarning(UserWarning):
    """The branches are on a network, but its training loop does not use them."""


class ProjectionWarning(UserWarning):
    """A factorisation inside a rank projection failed and was repeated with a smoothed matrix."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """The tail of an error message about an unknown name: `known` names that look like `name`, or all of a few."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=count, cutoff=0.5) or known[:8]
    return "Did you mean: " + ", ".join(close) + "?" if close else "There are none."
