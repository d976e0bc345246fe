"""How long to look for gradient masking."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ...errors import EvaluationError
from ..attacks.inputs import check_choice, check_count


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The lengths of the attacks.

    Attributes:
        steps: of every PGD but one.
        more_steps: of that one.
        restarts: further random starts, of `steps` steps each, for images that still stand.
        signs: random sign perturbations of each image.
        queries: of the Square attack; 0 leaves it out, and with it the need for pyautoattack.
        draws: forwards over which the gradient of a randomised network is averaged.

    Raises:
        EvaluationError: a length below 1 (of restarts: 2), or no more `more_steps` than `steps`.
    """

    steps: int = 20
    more_steps: int = 100
    restarts: int = 4
    signs: int = 20
    queries: int = 200
    draws: int = 8

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            check_count(value, f"budget.{name}", {"queries": 0, "restarts": 2}.get(name, 1))
        if self.more_steps <= self.steps:
            raise EvaluationError(f"budget.more_steps must exceed budget.steps={self.steps}, not {self.more_steps}")


BUDGETS = {"quick": Budget(), "full": Budget(restarts=10, signs=100, queries=2000, draws=20)}
"""By name. "quick" costs some 300 forwards and backwards of an image that withstands everything."""


def budget_of(budget: str | Budget) -> Budget:
    """The budget of that name, or the budget itself.

    Raises:
        EvaluationError: there is none of that name.
    """
    if isinstance(budget, Budget):
        return budget
    check_choice(budget, tuple(BUDGETS), "budget")
    return BUDGETS[budget]
