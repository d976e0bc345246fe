"""What an evaluation raises and warns of."""

from __future__ import annotations


class EvaluationError(ValueError):
    """A network, data or setting with which the figures would be wrong or could not be computed; says what to do."""


class EvaluationWarning(UserWarning):
    """The figures can be computed, but mean something else than they seem to."""
