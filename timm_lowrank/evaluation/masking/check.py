"""A check, and what it is made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .chance import Paired, paired


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        passed: False if the value lies beyond the limit by more than chance. None if the check could not be made; then
            there is no value. None also, with a value, if it lies beyond the limit but the images are too few to tell.
        limit: the largest value that passes.
        says: a sentence with the numbers.
        decisive: whether failing it shows that the gradient misleads attacks, rather than that it may.
    """

    name: str
    passed: bool | None
    value: float | None
    limit: float
    says: str
    decisive: bool = True

    def to_dict(self) -> dict[str, Any]:
        """name, passed, value, limit and says, as JSON takes them."""
        return {key: getattr(self, key) for key in ("name", "passed", "value", "limit", "says")}

    @property
    def undecided(self) -> bool:
        return self.passed is None and self.value is not None


def made(
    name: str, value: float, limit: float, beyond_chance: bool, says: str, meaning: str, *, decisive: bool = True
) -> Check:
    """A check with a value; `meaning` is added to the sentence if it fails."""
    if value <= limit:
        return Check(name, True, value, limit, f"{says}.", decisive)
    if beyond_chance:
        return Check(name, False, value, limit, f"{says}: {meaning}.", decisive)
    return Check(name, None, value, limit, f"{says}: too few images to tell that from chance.", decisive)


def not_made(name: str, limit: float, says: str, *, decisive: bool = True) -> Check:
    """A check that could not be made, and why."""
    return Check(name, None, None, limit, says, decisive)


@dataclass(frozen=True)
class Observed:
    """Columns (n,) of `observe`, and the settings that they were made with."""

    columns: Mapping[str, Tensor]
    settings: Mapping[str, float]

    @property
    def radius(self) -> str:
        """8/255 where it is a whole number of levels."""
        eps = self.settings["eps"]
        levels = round(255 * eps)
        return f"{levels}/255" if levels and abs(255 * eps - levels) < 1e-6 else f"{eps:.3g}"

    @property
    def pgd(self) -> str:
        return f"PGD-{self.setting('steps')} at {self.radius}"

    @property
    def randomised(self) -> bool:
        return not bool(self.columns["repeats"].all())

    def setting(self, name: str) -> int:
        return int(self.settings[name])

    def count(self, name: str) -> int:
        return int(self.columns[name].sum())

    def share(self, name: str) -> float:
        return float(self.columns[name].double().mean())

    def percent(self, name: str) -> str:
        return percent(self.share(name))

    def against_pgd(self, name: str) -> Paired:
        """The accuracy under PGD first, that under another attack second."""
        return paired(self.columns["pgd"], self.columns[name])


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"
