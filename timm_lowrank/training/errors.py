"""Errors that a person at the terminal can act on: each says what is wrong and what to do."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """Base of what `train` raises for a mistake in its input or a run that went wrong."""


class RecipeError(TrainingError):
    """A recipe with an unknown key, a value of the wrong type, or values that contradict each other."""


class DataError(TrainingError):
    """Images that cannot be loaded or do not fit the recipe."""


class StreamError(DataError):
    """Images that cannot be streamed; loading all of them may work."""


class RunError(TrainingError):
    """A run folder that cannot be used, written or resumed."""


class DivergedError(TrainingError):
    """A loss that is not a number any more, or an accuracy that fell back to chance."""
