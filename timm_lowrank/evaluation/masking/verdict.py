"""From observations to a verdict: fourteen checks, each with its number, its limit and a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import ceil, exp, lgamma, log
from typing import NamedTuple

from torch import Tensor

from ...errors import EvaluationError
from ...text import percent
from ..arguments import RADIUS_UNITS
from ..results import MASKED, SOUND, SUSPECT, Check, Verdict
from .observations import SETTING, Budget

CHANCE = 0.01
"""Above this probability a finding is put down to chance.

A dozen checks are made of each network. Each also asks for a difference that matters, its limit, and sound networks
stay clear of the limits, so that a false alarm is far less likely than a dozen times this.
"""

FEWEST = ceil(log(CHANCE) / log(0.5))
"""Images on which two attacks must differ, all in one direction, before it is more than chance: seven."""

FAR = 0.02
"""What an attack that knows or does less than PGD may be ahead of it: two points. On plain and adversarially trained
networks, of digits and of CIFAR-10, it was behind or level; on masked ones ahead by 10 to 80 points."""

FAR_FOR_BETTER_ATTACKS = 0.05
"""What an attack may be ahead that does more than PGD: climbs the margin, aims at single classes as AutoAttack does, or
averages over noise. Five points: on an adversarially trained network that masks nothing AutoAttack was 2.5 points ahead
of PGD with 20 steps, and the margin behind or level. Such a lead is a reason to report AutoAttack, but no sign."""

LATE_RESTARTS = 0.015
"""What the later half of the restarts may still break. On sound networks at most a point, of any radius."""

UNBOUNDED = 0.05
"""What PGD may leave right when it may make any image of any other. Sound networks keep nothing; what does not
follow the gradient at all keeps everything, as the attack starts at the image."""

ZERO_GRADIENTS = 0.01
"""Share of the images without a gradient. Sound networks had none, also where the softmax was 1 on a third of them."""

UNSMOOTH, BROKEN_PROMISE = 0.1, 1 / 4
"""Share of the images on which a step brings less than a quarter of what the gradient promises. On plain networks of
CIFAR-10 no image kept less than a third at radii up to 20/255, and 1 % of them less than a quarter at 32/255; on
shattered gradients nearly all keep less than a fifth."""


def judge(observations: Mapping[str, Tensor]) -> Verdict:
    """The verdict on the columns of `observe`, or on several of them concatenated column by column.

    "gradient masking" if a decisive check fails, "suspect" if only others do. A check fails if its number lies beyond
    its limit and the images at hand are enough to rule out chance (one-sided, one per cent); comparisons of attacks
    are made image by image.

    Raises:
        EvaluationError: columns are missing, of different lengths or made with different settings, or the network
            is right on too few of the images for any check to fail.
    """
    observed = _observed(observations)
    right = int(observed.columns["clean"].sum())
    count = len(observed.columns["clean"])
    if right < FEWEST:
        raise EvaluationError(
            f"the network is right on {right} of {count} images: with fewer than {FEWEST} no check could fail; "
            f"take more images, or a network that has learnt something"
        )
    checks = tuple(check(observed) for check in CHECKS)
    failed = [check for check in checks if check.passed is False]
    verdict = MASKED if any(check.decisive for check in failed) else SUSPECT if failed else SOUND
    return Verdict(verdict, _summary(checks, count), checks)


def _observed(observations: Mapping[str, Tensor]) -> _Observed:
    names = [SETTING + name for name in ("eps", "unit", *Budget.__dataclass_fields__)]
    needed = [
        "clean", "repeats", "zero_gradient", "finite_gradient", "saturated", "kept_promise", "fgsm", "pgd",
        "pgd_more_steps", "pgd_margin", "pgd_double", "pgd_unbounded", "restarts_withstood", "signs", "pgd_averaged",
        *names,
    ]  # fmt: skip
    missing = [name for name in needed if name not in observations]
    if missing:
        raise EvaluationError(f"observations lack the columns {', '.join(missing)}: pass what observe() returned")
    lengths = {tuple(column.shape) for column in observations.values()}
    if len(lengths) != 1 or len(next(iter(lengths))) != 1:
        raise EvaluationError("all columns of the observations must have one number for each image")
    settings = {}
    for name in names:
        values = observations[name].unique()
        if len(values) != 1:
            raise EvaluationError(f"{name.removeprefix(SETTING)} must be the same in all parts of the observations")
        settings[name.removeprefix(SETTING)] = float(values)
    eps, unit = settings.pop("eps"), RADIUS_UNITS[int(settings.pop("unit"))]
    budget = Budget(**{name: int(value) for name, value in settings.items()})
    return _Observed({name: column for name, column in observations.items() if name not in names}, eps, unit, budget)


def _summary(checks: tuple[Check, ...], count: int) -> str:
    """The strongest reason, what failed, and how small a difference the images can show."""
    decided = [check for check in checks if check.passed is not None]
    failed = [check for check in decided if not check.passed]
    open_ones = [check.name for check in checks if check.undecided]
    if failed:
        first = max(failed, key=lambda check: (check.decisive, (check.value or 0) - (check.limit or 0)))
        text = f"{first.says} {len(failed)} of {len(decided)} checks failed: {', '.join(c.name for c in failed)}."
    else:
        text = f"All {len(decided)} checks passed that could be made."
    if open_ones:
        text += f" Undecided, for too few images: {', '.join(open_ones)}."
    seen = max(FAR, FEWEST / count)
    return f"{text} On {count} images two attacks are told apart from a difference of {100 * seen:.1f} points on."


@dataclass(frozen=True)
class _Observed:
    """Columns (n,) of `observe`, and the radius and the lengths of the attacks that they were made with."""

    columns: Mapping[str, Tensor]
    eps: float
    radius_unit: str
    budget: Budget

    @property
    def pgd(self) -> str:
        """PGD-20 at 8/255, where the radius is a whole number of levels; "in normalised units" where it is so."""
        levels = round(255 * self.eps)
        whole = levels and abs(255 * self.eps - levels) < 1e-6
        unit = " in normalised units" * (self.radius_unit == "normalized")
        return f"PGD-{self.budget.steps} at {f'{levels}/255' if whole else f'{self.eps:.3g}'}{unit}"

    @property
    def randomised(self) -> bool:
        return not bool(self.columns["repeats"].all())

    def count(self, name: str) -> int:
        return int(self.columns[name].sum())

    def share(self, name: str) -> float:
        return float(self.columns[name].double().mean())

    def percent(self, name: str) -> str:
        return f"{percent(self.share(name))} %"


# ---- chance ----


class Paired(NamedTuple):
    """Two accuracies over the same images."""

    first: float
    second: float
    chance: float

    @property
    def gap(self) -> float:
        """How far the second accuracy lies below the first."""
        return self.first - self.second

    @property
    def beyond_chance(self) -> bool:
        """The second lies below the first, and chance is unlikely to have done that."""
        return self.chance < CHANCE


def paired(
    first: Tensor,  # (n,) bool
    second: Tensor,  # (n,) bool
) -> Paired:
    """Whether `second` is right less often than `first`: McNemar's exact test, one-sided.

    Both are of the same images, so only those on which they differ speak: if it were chance, either would be the one
    that is right with probability 1/2. Comparing two intervals instead would need far more images.
    """
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    chance = at_least(only_first, only_first + only_second, 0.5)
    return Paired(float(first.double().mean()), float(second.double().mean()), chance)


def at_least(hits: int, count: int, probability: float) -> float:
    """The probability of `hits` or more in `count` independent trials."""
    if hits <= 0:
        return 1.0
    if hits > count or probability <= 0:
        return 0.0
    if probability >= 1:
        return 1.0
    logs = (
        lgamma(count + 1) - lgamma(k + 1) - lgamma(count - k + 1) + k * log(probability)
        + (count - k) * log(1 - probability)
        for k in range(hits, count + 1)
    )  # fmt: skip
    return min(1.0, sum(exp(value) for value in logs))


def at_most(hits: int, count: int, probability: float) -> float:
    """The probability of `hits` or fewer in `count` independent trials."""
    return at_least(count - hits, count, 1 - probability)


# ---- the checks ----


def made(
    name: str, value: float, limit: float, beyond_chance: bool, says: str, meaning: str, *, decisive: bool = True
) -> Check:
    """A check with a value; `meaning` is added to the sentence if it fails."""
    if value <= limit:
        return Check(name, True, value, limit, f"{says}.", decisive)
    if beyond_chance:
        return Check(name, False, value, limit, f"{says}: {meaning}.", decisive)
    return Check(name, None, value, limit, f"{says}: too few images to tell that from chance.", decisive)


def made_of_share(name: str, hits: Tensor, limit: float, says: str, meaning: str, *, decisive: bool = True) -> Check:
    """`made` of the share of hits (n,) bool; chance is that a share of `limit` of all images would be hit."""
    count = int(hits.sum())
    beyond_chance = at_least(count, len(hits), limit) < CHANCE
    return made(name, count / len(hits), limit, beyond_chance, says, meaning, decisive=decisive)


def not_made(name: str, limit: float, says: str, *, decisive: bool = True) -> Check:
    """A check that could not be made, and why."""
    return Check(name, None, None, limit, says, decisive)


@dataclass(frozen=True)
class Rival:
    """An attack that may be little further ahead of PGD, since it does or knows less, or aims at one thing alone."""

    name: str  # of the check
    column: str
    attack: str  # in words, with lengths of the `Budget` in braces
    limit: float
    meaning: str  # of a lead beyond the limit
    without: str = ""  # why there may be no such column

    def check(self, observed: _Observed) -> Check:
        if self.column not in observed.columns:
            return not_made(self.name, self.limit, self.without)
        words = self.attack.format(saturated=observed.percent("saturated"), **asdict(observed.budget))
        pair = paired(observed.columns["pgd"], observed.columns[self.column])
        says = f"{observed.pgd} leaves {percent(pair.first)} % right, {words} {percent(pair.second)} %"
        return made(self.name, pair.gap, self.limit, pair.beyond_chance, says, self.meaning)


RIVALS = (
    Rival(
        "black box", "transfer", "the same attack crafted on another network", FAR,
        "a gradient that knows nothing of this network fools it better than its own does",
        "There was no other network to craft a black-box attack on.",
    ),
    Rival(
        "Square", "square", "the Square attack with {queries} queries", FAR,
        "queries alone do better than gradients", "The Square attack was not run.",
    ),
    Rival(
        "AutoAttack", "autoattack", "AutoAttack", FAR_FOR_BETTER_ATTACKS,
        "the accuracy under PGD is that attack's failure", "AutoAttack was not run.",
    ),
    Rival(
        "random signs", "signs", "the best of {signs} random sign perturbations", FAR,
        "chance does better than gradients",
    ),
    Rival("single step", "fgsm", "a single step", FAR, "one step along the gradient does better than many"),
    Rival(
        "saturated logits", "pgd_margin",
        "with the margin of the logits as its loss (the softmax is exactly 1 on {saturated} of the images)",
        FAR_FOR_BETTER_ATTACKS, "the cross-entropy hides the gradient that the logits have",
    ),
)  # fmt: skip


def averaged_gradients(observed: _Observed) -> Check:
    """Expectation over transformation (Athalye et al., 2018), where the network is randomised."""
    name, limit = "averaged gradients", FAR_FOR_BETTER_ATTACKS
    if not observed.randomised:
        return not_made(name, limit, "The network is not randomised: there is nothing to average over.")
    measured = ~observed.columns["pgd_averaged"].isnan()
    pair = paired(observed.columns["pgd"][measured], observed.columns["pgd_averaged"][measured] > 0)
    says = (
        f"{observed.pgd} leaves {percent(pair.first)} % right, "
        f"with gradients averaged over {observed.budget.draws} forwards {percent(pair.second)} %"
    )
    return made(name, pair.gap, limit, pair.beyond_chance, says, "noise hides the gradient")


def more_steps(observed: _Observed) -> Check:
    """Longer may be neither worse, the gradient leading astray, nor much better, the attack being too short to tell."""
    pgd, longer = observed.columns["pgd"], observed.columns["pgd_more_steps"]
    pair, meaning = paired(longer, pgd), "further steps along the gradient undo what the first ones did"
    if pair.gap < 0:
        pair, meaning = paired(pgd, longer), "the shorter attack had not come to its end, its figure is too good"
    says = (
        f"{observed.pgd} leaves {observed.percent('pgd')} right, "
        f"with {observed.budget.more_steps} steps {observed.percent('pgd_more_steps')}"
    )
    return made("more steps", pair.gap, FAR, pair.beyond_chance, says, meaning, decisive=False)


def restarts(observed: _Observed) -> Check:
    """The share of the images that only the later half of the further random starts breaks."""
    name, count, withstood = "restarts", observed.budget.restarts, observed.columns["restarts_withstood"]
    if observed.randomised:
        says = "The network is randomised and errs at some time whatever the start: restarts tell nothing."
        return not_made(name, LATE_RESTARTS, says, decisive=False)
    middle, last = withstood >= count // 2, withstood >= count
    says = (
        f"{observed.pgd} leaves {observed.percent('pgd')} right, after {count // 2} more random starts "
        f"{percent(float(middle.double().mean()))} %, after {count} {percent(float(last.double().mean()))} %"
    )
    meaning = "they go on helping, as tries at random do"
    return made_of_share(name, middle & ~last, LATE_RESTARTS, says, meaning, decisive=False)


def unbounded_radius(observed: _Observed) -> Check:
    says = (
        f"PGD-{observed.budget.steps} that may make any image of any other leaves "
        f"{observed.percent('pgd_unbounded')} right"
    )
    meaning = "the gradient does not lead to errors that exist"
    return made_of_share("unbounded radius", observed.columns["pgd_unbounded"], UNBOUNDED, says, meaning)


def double_radius(observed: _Observed) -> Check:
    """Of the images that withstand the radius, the share that withstands twice the radius: a plateau if nearly all.

    Sound networks lose a larger share in the second half than in the first. Half the share of the first is allowed.
    """
    clean, pgd, double = (observed.count(name) for name in ("clean", "pgd", "pgd_double"))
    if not pgd or not clean:
        return not_made("double radius", 1.0, f"{observed.pgd} leaves nothing right already.", decisive=False)
    expected = (1 - pgd / clean) / 2
    says = (
        f"Accuracy is {observed.percent('clean')} without an attack, {observed.percent('pgd')} under {observed.pgd}, "
        f"{observed.percent('pgd_double')} at twice the radius"
    )
    return made(
        "double radius", double / pgd, 1 - expected, at_most(max(pgd - double, 0), pgd, expected) < CHANCE, says,
        "it does not go on falling with the radius", decisive=False,
    )  # fmt: skip


def zero_gradients(observed: _Observed) -> Check:
    bad = observed.columns["zero_gradient"] | ~observed.columns["finite_gradient"]
    says = (
        f"The gradient of the cross-entropy is zero on {observed.percent('zero_gradient')} of the images and "
        f"not finite on {percent(1 - observed.share('finite_gradient'))} %"
    )
    return made_of_share("zero gradients", bad, ZERO_GRADIENTS, says, "attacks have nothing to follow there")


def smooth_loss(observed: _Observed) -> Check:
    """Whether small steps along the gradient bring what it promises; see `_kept_promise`."""
    name, ratios = "smooth loss", observed.columns["kept_promise"]
    known = ratios[~ratios.isnan()]
    if 2 * len(known) < len(ratios):
        says = "Most of the images have no gradient along which to step."
        return not_made(name, UNSMOOTH, says, decisive=False)
    broken = known < BROKEN_PROMISE
    says = (
        f"Small steps along the gradient bring {float(known.median()):.2f} times what it promises (median), and less "
        f"than a quarter on {percent(float(broken.double().mean()))} % of the images"
    )
    meaning = "the gradient says little about the loss a step away"
    return made_of_share(name, broken, UNSMOOTH, says, meaning, decisive=False)


def deterministic(observed: _Observed) -> Check:
    share = 1 - observed.share("repeats")
    says = f"Two forwards of the same images give different logits on {percent(share)} % of them"
    return made(
        "deterministic", share, 0.0, True, says,
        "the figures of attacks hold for single forwards, and attacks that average may do better", decisive=False,
    )  # fmt: skip


CHECKS = (
    *(rival.check for rival in RIVALS), averaged_gradients, zero_gradients, unbounded_radius, smooth_loss,
    deterministic, double_radius, more_steps, restarts,
)  # fmt: skip
