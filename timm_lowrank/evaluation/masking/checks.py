"""The checks: each turns columns of observations into a number, a limit, and a sentence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .statistics import CHANCE, Paired, at_most, paired, share_exceeds

FAR = 0.02
"""What a weaker attack may be ahead of PGD: two points. On sound networks it was behind, or ahead by half a point."""

FAR_FOR_BETTER_LOSSES = 0.05
"""What an attack may be ahead that climbs a margin, or aims at single classes as AutoAttack does: five points.

Such attacks beat the cross-entropy by up to four points on adversarially trained networks that mask nothing: that
is a better attack, and a reason to report it, but no sign.
"""

UNBOUNDED = 0.05
ZERO_GRADIENTS = 0.01
UNSMOOTH = 0.1
LATE_RESTARTS = 0.015
EARLY_FALL = 0.8


@dataclass(frozen=True)
class Check:
    """One check. `passed` is None if it could not be made; then there is no value either.

    Attributes:
        value, limit: the check fails where the value lies above the limit, and by more than chance.
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
        return f"{levels}/255" if abs(255 * eps - levels) < 1e-6 and levels else f"{eps:.3g}"

    @property
    def pgd(self) -> str:
        return f"PGD-{self.setting('steps')} at {self.radius}"

    @property
    def randomised(self) -> bool:
        return not bool(self.columns["repeats"].all())

    def setting(self, name: str) -> int:
        return int(self.settings[name])

    def share(self, name: str) -> float:
        return float(self.columns[name].double().mean())

    def against_pgd(self, name: str) -> Paired:
        """PGD's accuracy, and how far that under another attack lies below it."""
        return paired(self.columns["pgd"], self.columns[name])


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _ahead(
    observed: Observed, name: str, column: str, attack: str, limit: float, missing: str, otherwise: str
) -> Check:
    """Whether an attack that should not be ahead of PGD is."""
    if column not in observed.columns:
        return Check(name, None, None, limit, missing)
    found = observed.against_pgd(column)
    failed = found.exceeds(limit)
    says = f"{observed.pgd} leaves {percent(found.first)} right, {attack} {percent(found.second)}"
    return Check(name, not failed, found.gap, limit, f"{says}: {otherwise}." if failed else f"{says}.")


def black_box(observed: Observed) -> Check:
    return _ahead(
        observed, "black box", "transfer", "the same attack crafted on the other network", FAR,
        "There was no second network to craft a black-box attack on.",
        "a gradient that knows nothing of this network fools it better than its own",
    )  # fmt: skip


def square_attack(observed: Observed) -> Check:
    return _ahead(
        observed, "Square", "square", f"the Square attack with {observed.setting('queries')} queries", FAR,
        "The Square attack was not run.", "queries alone do better than gradients",
    )  # fmt: skip


def autoattack(observed: Observed) -> Check:
    return _ahead(
        observed, "AutoAttack", "autoattack", "AutoAttack", FAR_FOR_BETTER_LOSSES, "AutoAttack was not run.",
        "the accuracy under PGD is an artefact of that attack",
    )  # fmt: skip


def random_signs(observed: Observed) -> Check:
    return _ahead(
        observed, "random signs", "signs", f"the best of {observed.setting('signs')} random sign perturbations", FAR,
        "", "chance does better than gradients",
    )  # fmt: skip


def single_step(observed: Observed) -> Check:
    return _ahead(
        observed, "single step", "fgsm", "a single step", FAR, "",
        "many steps along the gradient lead less far than one",
    )  # fmt: skip


def saturated_logits(observed: Observed) -> Check:
    attack = "PGD on the margin of the logits instead of the cross-entropy"
    check = _ahead(
        observed, "saturated logits", "pgd_margin", attack, FAR_FOR_BETTER_LOSSES, "",
        "the cross-entropy hides the gradient that the logits have",
    )  # fmt: skip
    softmax = f"The softmax is exactly 1 on {percent(observed.share('saturated'))} of the images."
    return Check(check.name, check.passed, check.value, check.limit, f"{check.says} {softmax}")


def averaged_gradients(observed: Observed) -> Check:
    name, limit = "averaged gradients", FAR_FOR_BETTER_LOSSES
    if not observed.randomised:
        return Check(name, None, None, limit, "The network is not randomised: there is nothing to average over.")
    measured = ~observed.columns["pgd_averaged"].isnan()
    averaged = observed.columns["pgd_averaged"][measured] > 0
    found = paired(observed.columns["pgd"][measured], averaged)
    says = (
        f"{observed.pgd} leaves {percent(found.first)} right, "
        f"with gradients of {observed.setting('draws')} forwards averaged {percent(found.second)}"
    )
    failed = found.exceeds(limit)
    return Check(name, not failed, found.gap, limit, f"{says}: noise hides the gradient." if failed else f"{says}.")


def unbounded_radius(observed: Observed) -> Check:
    withstood = observed.columns["pgd_unbounded"]
    failed = share_exceeds(int(withstood.sum()), len(withstood), UNBOUNDED)
    says = f"Free to make any image of any other, PGD-{observed.setting('steps')} leaves {percent(float(withstood.float().mean()))} right"
    return Check(
        "unbounded radius", not failed, observed.share("pgd_unbounded"), UNBOUNDED,
        f"{says}: the gradient does not lead to errors that are there." if failed else f"{says}.",
    )  # fmt: skip


def double_radius(observed: Observed) -> Check:
    """Of the images that fall within twice the radius, the share that falls within the first half of it.

    A plateau, that is: on sound networks the second half breaks at least as many, unless the first broke nearly all.
    """
    clean, pgd, double = (observed.columns[key] for key in ("clean", "pgd", "pgd_double"))
    early = int(clean.sum()) - int(pgd.sum())
    late = int(pgd.sum()) - int(double.sum())
    share = early / (early + late) if early + late > 0 else 0.0
    left = float(pgd.float().mean())
    plateau = left > 0.1 and early > 0 and at_most(max(late, 0), early + max(late, 0), 1 - EARLY_FALL) < CHANCE
    rises = paired(double, pgd).exceeds(FAR)
    says = (
        f"Accuracy is {observed.share('clean') * 100:.1f} % without attack, {percent(left)} under {observed.pgd} "
        f"and {percent(float(double.float().mean()))} at twice the radius"
    )
    failed = plateau or rises
    return Check(
        "double radius", not failed, share, EARLY_FALL,
        f"{says}: it does not go on falling." if failed else f"{says}.", decisive=False,
    )  # fmt: skip


def more_steps(observed: Observed) -> Check:
    pgd, longer = observed.columns["pgd"], observed.columns["pgd_more_steps"]
    worse, better = paired(longer, pgd), paired(pgd, longer)
    says = f"{observed.pgd} leaves {percent(worse.second)} right, {observed.setting('more_steps')} steps {percent(worse.first)}"
    if worse.exceeds(FAR):
        says += ": further steps along the gradient undo what the first ones did"
    elif better.exceeds(FAR):
        says += ": the attack had not come to its end, and the first figure is too good"
    passed = not (worse.exceeds(FAR) or better.exceeds(FAR))
    return Check("more steps", passed, abs(worse.gap), FAR, f"{says}.", decisive=False)


def restarts(observed: Observed) -> Check:
    """The share of images that fall only to the later half of the further random starts."""
    count = observed.setting("restarts")
    first = count // 2
    if observed.randomised:
        says = "The network is randomised: it errs at some time whatever the start, so restarts tell nothing."
        return Check("restarts", None, None, LATE_RESTARTS, says, decisive=False)
    withstood = observed.columns["restarts_withstood"]
    late = int(((withstood >= first) & (withstood < count)).sum())
    failed = share_exceeds(late, len(withstood), LATE_RESTARTS)
    says = (
        f"{observed.pgd} leaves {observed.share('pgd') * 100:.1f} % right, {first} more random starts "
        f"{percent(float((withstood >= first).float().mean()))}, {count} more "
        f"{percent(float((withstood >= count).float().mean()))}"
    )
    return Check(
        "restarts", not failed, late / len(withstood), LATE_RESTARTS,
        f"{says}: they keep helping, as tries at random do." if failed else f"{says}.", decisive=False,
    )  # fmt: skip


def zero_gradients(observed: Observed) -> Check:
    bad = observed.columns["zero_gradient"] | ~observed.columns["finite_gradient"]
    failed = share_exceeds(int(bad.sum()), len(bad), ZERO_GRADIENTS)
    infinite = percent(1 - observed.share("finite_gradient"))
    says = f"The gradient of the cross-entropy is zero on {percent(observed.share('zero_gradient'))} of the images and not finite on {infinite}"
    return Check(
        "zero gradients", not failed, float(bad.float().mean()), ZERO_GRADIENTS,
        f"{says}: there attacks have nothing to follow." if failed else f"{says}.",
    )  # fmt: skip


def smooth_loss(observed: Observed) -> Check:
    """The share of images on which a step along the gradient brings less than a quarter, or over four times, of what
    the gradient promises: of the margin, which is scale-free and does not saturate, for a step of a quarter radius."""
    ratio = observed.columns["kept_promise"]
    ratio = ratio[~ratio.isnan()]
    if len(ratio) * 2 < len(observed.columns["kept_promise"]):
        says = "Most images have no gradient along which a step could be made."
        return Check("smooth loss", None, None, UNSMOOTH, says, decisive=False)
    rough = (ratio < 1 / 4) | (ratio > 4)
    failed = share_exceeds(int(rough.sum()), len(ratio), UNSMOOTH)
    says = (
        f"A step of a quarter radius brings {float(ratio.median()):.2f} times (median) what the gradient promises, "
        f"and less than 1/4 or more than 4 times on {percent(float(rough.float().mean()))} of the images"
    )
    return Check(
        "smooth loss", not failed, float(rough.float().mean()), UNSMOOTH,
        f"{says}: the gradient says little about the loss." if failed else f"{says}.", decisive=False,
    )  # fmt: skip


def deterministic(observed: Observed) -> Check:
    changed = ~observed.columns["repeats"]
    share = float(changed.float().mean())
    says = f"Two forwards of the same images give different logits on {percent(share)} of them"
    if observed.randomised:
        says += ": figures of attacks that look at one forward say nothing about what more forwards would find"
    return Check("deterministic", not observed.randomised, share, 0.0, f"{says}.", decisive=False)


CHECKS: tuple[Callable[[Observed], Check], ...] = (
    black_box, square_attack, autoattack, random_signs, single_step, saturated_logits, unbounded_radius, zero_gradients,
    averaged_gradients, deterministic, smooth_loss, double_radius, more_steps, restarts,
)  # fmt: skip
