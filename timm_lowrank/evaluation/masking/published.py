"""What accuracies under PGD say of gradient masking where nothing else is known: those that a paper prints, say.

`diagnose` looks at a network; this looks at a table. Most of its checks cannot be made then, but some can: whether the
attack that sees the gradients does worse than the one that does not, whether more steps and larger radii do what they
must, whether accuracy stops falling with the radius.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ...errors import EvaluationError
from ...text import counted, percent
from ..arguments import check_count, check_number
from ..results import MASKED, SOUND, SUSPECT, Check, Evaluation, Kind, Verdict, radius_text
from .verdict import CHANCE, FAR, made, not_made

IMAGES = 10_000  # of the test sets of CIFAR


@dataclasses.dataclass(frozen=True, kw_only=True)
class PGDAccuracy:
    """Accuracies under PGD of one radius and number of steps: a cell of a table, shares in [0, 1].

    Raises:
        EvaluationError: a share outside [0, 1], or a radius or number of steps that is none.
    """

    eps: float
    steps: int
    white_box: float | None = None  # attacked itself
    black_box: float | None = None  # attacked with images crafted on another network
    images: int | None = None  # that they were measured on, where that is known

    def __post_init__(self) -> None:
        check_number(self.eps, "eps")
        check_count(self.steps, "steps")
        for name in ("white_box", "black_box"):
            _check_share(getattr(self, name), name)
        if self.images is not None:
            check_count(self.images, "images")

    @property
    def where(self) -> str:
        return f"at {radius_text(self.eps)} with {counted(self.steps, 'step')}"


@dataclasses.dataclass(frozen=True)
class _Pair:
    """Two accuracies of which the second may not lie far below the first."""

    first: float
    second: float
    says: str

    @property
    def gap(self) -> float:
        return self.first - self.second


def diagnose_published(
    accuracies: Iterable[PGDAccuracy], *, clean: float | None = None, images: int = IMAGES
) -> Verdict:
    """The verdict on one network by its accuracies under PGD alone, in one unit of the radius and with one step size.

    "gradient masking" if an attack that knows less does better; "suspect" if the attack does not do what more steps or
    a larger radius must do, or accuracy hardly falls with the radius; "no sign" if nothing of that is there, which says
    less than after a look at the network. A gap counts if it exceeds the limits of `judge` (two points) by more than
    chance, with the figures taken for independent shares of so many images.

    Args:
        accuracies: cells of the table; of those without a figure to compare with nothing is said.
        clean: accuracy without an attack, where it is known.
        images: that those were measured on that do not say it.

    Raises:
        EvaluationError: there is no accuracy under attack, or two of one radius and number of steps.
    """
    cells = sorted(accuracies, key=lambda one: (one.steps, one.eps))
    names = [(one.eps, one.steps) for one in cells]
    if all(one.white_box is None for one in cells) or len(set(names)) < len(names):
        raise EvaluationError("give accuracies under white-box attacks, one for each radius and number of steps")
    _check_share(clean, "clean")
    check_count(images, "images")
    images = min((one.images for one in cells if one.images is not None), default=images)
    checks = (
        _black_box(cells, images), _attack_helps(cells, clean, images), _more_steps(cells, images),
        _larger_radius(cells, images), _double_radius(cells, clean, images),
    )  # fmt: skip
    decided = [check for check in checks if check.passed is not None]
    failed = [check for check in decided if not check.passed]
    verdict = MASKED if any(check.decisive for check in failed) else SUSPECT if failed else SOUND
    if failed:
        first = max(failed, key=lambda check: check.decisive)
        text = f"{first.says} {len(failed)} of {len(decided)} checks failed: {', '.join(c.name for c in failed)}."
    else:
        text = f"The {counted(len(decided), 'check')} passed that such figures allow."
    return Verdict(verdict, f"{text} Judged by {counted(len(cells), 'figure')} alone, not by the network.", checks)


def accuracies_of(
    evaluation: Evaluation, title: str, *, radius_unit: str = "pixel", setting: str = "Madry"
) -> list[PGDAccuracy]:
    """The accuracies of a network under PGD in L_inf, in one unit and with one step size, from its evaluation.

    Args:
        setting: as `AttackProtocol.setting` names it: "Madry", "fixed", "paper".

    Raises:
        EvaluationError: there are none.
    """
    found: dict[tuple[float, int], dict[str, Any]] = {}
    for kind, name in ((Kind.ATTACK, "white_box"), (Kind.TRANSFER, "black_box")):
        for figure in evaluation.by_kind(kind):
            attack, value = figure.protocol.attack, figure.values.get(title)
            if attack is None or value is None or not value.known or attack.eps is None or attack.steps is None:
                continue
            alike = (attack.name, attack.norm, attack.targeted, attack.restarts) == ("PGD", "linf", False, 1)
            if alike and (attack.setting, attack.radius_unit) == (setting, radius_unit):
                found.setdefault((attack.eps, attack.steps), {"images": value.of})[name] = value.value
    if not found:
        raise EvaluationError(
            f"{title} was not attacked with PGD in the setting {setting!r} and radii in {radius_unit} units: "
            "evaluate it with --suite paper"
        )
    return [PGDAccuracy(eps=eps, steps=steps, **shares) for (eps, steps), shares in sorted(found.items())]


def _check_share(share: float | None, name: str) -> None:
    if share is not None and not 0 <= share <= 1:
        raise EvaluationError(f"{name} must be a share in [0, 1], not {share!r}: divide per cent by 100")


def _check(
    name: str, pairs: Sequence[_Pair], images: int, meaning: str, without: str, *, decisive: bool = False
) -> Check:
    """Of the pair that says most; chance is shared out among all that were looked at."""
    if not pairs:
        return not_made(name, FAR, without, decisive=decisive)
    worst = _worst(pairs, images)
    far = sum(pair.gap > FAR for pair in pairs)
    count = (
        f" ({far} of {len(pairs)} such pairs are more than {percent(FAR, 0)} points apart)" if len(pairs) > 1 else ""
    )
    beyond_chance = _beyond_chance(worst, images, len(pairs))
    return made(name, worst.gap, FAR, beyond_chance, worst.says + count, meaning, decisive=decisive)


def _worst(pairs: Sequence[_Pair], images: int) -> _Pair:
    """The pair that lies furthest apart, of those that do so by more than chance if there are any.

    Near 0 and near 1 a small gap tells more than a larger one near one half.
    """
    told = [pair for pair in pairs if pair.gap > FAR and _beyond_chance(pair, images, len(pairs))]
    return max(told or pairs, key=lambda pair: pair.gap)


def _beyond_chance(pair: _Pair, images: int, of: int) -> bool:
    """Whether chance is unlikely to have drawn `pair` apart, where so many pairs were looked at."""
    return _chance(pair.first, pair.second, images) * of < CHANCE


def _chance(first: float, second: float, images: int) -> float:
    """The probability that two equal shares of `images` independent images each lie so far apart, one-sided."""
    pooled = (first + second) / 2
    spread = math.sqrt(2 * pooled * (1 - pooled) / images)
    if not spread:
        return float(first <= second)
    return 1 - statistics.NormalDist().cdf((first - second) / spread)


def _black_box(cells: Sequence[PGDAccuracy], images: int) -> Check:
    pairs = [
        _Pair(white, black, f"White-box PGD {one.where} leaves {percent(white)} % right, black box {percent(black)} %")
        for one in cells
        if (white := one.white_box) is not None and (black := one.black_box) is not None
    ]
    meaning = "an attack that sees the gradients does worse than one that does not, so the gradients mislead it"
    return _check("black box", pairs, images, meaning, "There are no black-box figures.", decisive=True)


def _attack_helps(cells: Sequence[PGDAccuracy], clean: float | None, images: int) -> Check:
    pairs = [
        _Pair(white, clean, f"PGD {one.where} leaves {percent(white)} % right, no attack {percent(clean)} %")
        for one in cells
        if (white := one.white_box) is not None and clean is not None
    ]
    return _check("clean accuracy", pairs, images, "the attack helps", "Clean accuracy is not given.", decisive=True)


def _more_steps(cells: Sequence[PGDAccuracy], images: int) -> Check:
    pairs = []
    for few, many in _neighbours(cells, lambda one: one.eps, lambda one: one.steps):
        one, other = _white(few), _white(many)
        says = f"PGD {few.where} leaves {percent(one)} % right, with {many.steps} {percent(other)} %"
        if one < other:
            pairs.append((_Pair(other, one, says), "further steps undo what the first ones did"))
        else:
            pairs.append(
                (_Pair(one, other, says), "the shorter attack had not come to its end, its figure is too good")
            )
    meanings = dict(pairs)
    without = "There are no two numbers of steps at one radius."
    meaning = meanings[_worst(list(meanings), images)] if pairs else ""
    return _check("more steps", list(meanings), images, meaning, without)


def _larger_radius(cells: Sequence[PGDAccuracy], images: int) -> Check:
    pairs = [
        _Pair(
            _white(large), _white(small),
            f"PGD {large.where} leaves {percent(_white(large))} % right, at {radius_text(small.eps)} "
            f"{percent(_white(small))} %",
        )
        for small, large in _neighbours(cells, lambda one: one.steps, lambda one: one.eps)
    ]  # fmt: skip
    meaning = "the larger ball holds the smaller one, so the attack fails there, or the figure is a misprint"
    return _check("larger radius", pairs, images, meaning, "There are no two radii with one number of steps.")


def _double_radius(cells: Sequence[PGDAccuracy], clean: float | None, images: int) -> Check:
    """As of `judge`: what withstands a radius should at twice of it fall by half the share that fell at the radius.

    Of the longest attack, at the smallest radius of which twice was measured.
    """
    name, without = "double radius", "There is no radius of which twice was measured, or clean accuracy is not given."
    measured = [one for one in cells if one.white_box is not None]
    longest = [one for one in measured if one.steps == max(cell.steps for cell in measured)]
    for one, double in itertools.permutations(longest, 2):
        here, there = _white(one), _white(double)
        if clean and here and math.isclose(double.eps, 2 * one.eps):
            expected = max(1 - here / clean, 0) / 2
            says = (
                f"Accuracy is {percent(clean)} % without an attack, {percent(here)} % under PGD {one.where}, "
                f"{percent(there)} % at twice the radius"
            )
            chance = _chance(there, (1 - expected) * here, images)
            meaning = "it hardly goes on falling with the radius"
            return made(name, there / here, 1 - expected, chance < CHANCE, says, meaning, decisive=False)
    return not_made(name, 1.0, without, decisive=False)


def _neighbours(
    cells: Sequence[PGDAccuracy], same: Callable[[PGDAccuracy], float], by: Callable[[PGDAccuracy], float]
) -> list[tuple[PGDAccuracy, PGDAccuracy]]:
    """Cells with a white-box figure that agree in `same` and follow each other in `by`."""
    measured = sorted((one for one in cells if one.white_box is not None), key=lambda one: (same(one), by(one)))
    return [(one, other) for one, other in itertools.pairwise(measured) if same(one) == same(other)]


def _white(cell: PGDAccuracy) -> float:
    return math.nan if cell.white_box is None else cell.white_box
