"""Every error and warning of the package that a caller may want to catch by name. Needs nothing but Python.

`LowRankError` is what a branch raises while it trains; `CheckpointError`, `EvaluationError` and `TrainingError` are the
bases of what saving and publishing, measuring, and recipes raise. Each message says what is wrong and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# ------------------------------------------------------------------------------------------------------- branches


class LowRankError(RuntimeError):
    """Base of the errors that the low-rank branch raises while it trains."""


class CollapseError(LowRankError):
    """A regularized layer died (its centred activations vanished) or turned NaN.

    Training on cannot help: with every activation equal, the reconstruction loss is zero, and the norm
    loss of the paper has no gradient at zero to bring the layer back.
    """


class CaptureError(LowRankError):
    """The activations of a named layer could not be had from a forward pass."""


class LowRankWarning(UserWarning):
    """The branches are on a network, but its training loop does not use them."""


class ProjectionWarning(UserWarning):
    """A factorisation inside a rank projection failed and was repeated with a smoothed matrix."""


# ---------------------------------------------------------------------------------------- checkpoints and the Hub


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, read, fetched or published; the message says why and what to do."""


class CheckpointDamagedError(CheckpointError):
    """A file that was cut off, changed or exchanged since it was written."""


class CheckpointWriteError(CheckpointError, OSError):
    """The disk is full or not writable. What was there before is there still."""


# ----------------------------------------------------------------------------------------------------- evaluation


class EvaluationError(ValueError):
    """A network, data or setting with which the figures would be wrong or could not be computed; says what to do."""


class EvaluationWarning(UserWarning):
    """The figures can be computed, but mean something else than they seem to."""


# ----------------------------------------------------------------------------------------------- data and training


class TrainingError(RuntimeError):
    """Base of what `train` raises for a mistake in its input or a run that went wrong."""


class RecipeError(TrainingError):
    """A recipe with an unknown key, a value of the wrong type, or values that contradict each other."""


class DataError(TrainingError):
    """Images that cannot be loaded or do not fit the recipe."""


class ImageSizesError(DataError):
    """The images of a data set have different sizes, and nothing says which they are brought to."""


class RunError(TrainingError):
    """A run folder that cannot be used, written or resumed."""


class ProcessLostError(RunError):
    """Another of the processes that train or evaluate together has ended; this one cannot go on alone."""


class DivergedError(TrainingError):
    """A loss that is not a number any more, or an accuracy that fell back to chance."""


# ------------------------------------------------------------------------------------------------------- messages


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """The tail of an error message about an unknown name: `known` names that look like `name`, or all of a few."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=count, cutoff=0.5) or known[:8]
    return "Did you mean: " + ", ".join(close) + "?" if close else "There are none."
