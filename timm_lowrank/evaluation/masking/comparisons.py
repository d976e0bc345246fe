"""Checks that compare two attacks on the same images."""

from __future__ import annotations

from .chance import paired, share_exceeds
from .check import Check, Observed, made, not_made, percent

FAR = 0.02
"""What an attack that knows or does less than PGD may be ahead of it: two points. On plain and adversarially trained
networks, of digits and of CIFAR-10, it was behind or level; on masked ones ahead by 10 to 80 points."""

FAR_FOR_BETTER_ATTACKS = 0.05
"""What an attack may be ahead that does more than PGD: climbs the margin, aims at single classes as AutoAttack does, or
averages over noise. Five points: on an adversarially trained network that masks nothing AutoAttack was 2.5 points ahead
of PGD with 20 steps, and the margin behind or level. Such a lead is a reason to report AutoAttack, but no sign."""

LATE_RESTARTS = 0.015
"""What the later half of the restarts may still break. On sound networks at most a point, of any radius."""


def black_box(observed: Observed) -> Check:
    return _ahead(
        observed, "black box", "transfer", "the same attack crafted on another network", FAR,
        "a gradient that knows nothing of this network fools it better than its own does",
        without="There was no other network to craft a black-box attack on.",
    )  # fmt: skip


def square(observed: Observed) -> Check:
    return _ahead(
        observed, "Square", "square", f"the Square attack with {observed.setting('queries')} queries", FAR,
        "queries alone do better than gradients", without="The Square attack was not run.",
    )  # fmt: skip


def autoattack(observed: Observed) -> Check:
    return _ahead(
        observed, "AutoAttack", "autoattack", "AutoAttack", FAR_FOR_BETTER_ATTACKS,
        "the accuracy under PGD is that attack's failure", without="AutoAttack was not run.",
    )  # fmt: skip


def random_signs(observed: Observed) -> Check:
    attack = f"the best of {observed.setting('signs')} random sign perturbations"
    return _ahead(observed, "random signs", "signs", attack, FAR, "chance does better than gradients")


def single_step(observed: Observed) -> Check:
    return _ahead(
        observed, "single step", "fgsm", "a single step", FAR, "one step along the gradient does better than many"
    )


def saturated_logits(observed: Observed) -> Check:
    return _ahead(
        observed, "saturated logits", "pgd_margin",
        f"with the margin of the logits as its loss (the softmax is exactly 1 on {observed.percent('saturated')} of "
        f"the images)", FAR_FOR_BETTER_ATTACKS, "the cross-entropy hides the gradient that the logits have",
    )  # fmt: skip


def _ahead(
    observed: Observed, name: str, column: str, attack: str, limit: float, meaning: str, without: str = ""
) -> Check:
    """Whether an attack is further ahead of PGD than it may be."""
    if column not in observed.columns:
        return not_made(name, limit, without)
    found = observed.against_pgd(column)
    says = f"{observed.pgd} leaves {percent(found.first)} right, {attack} {percent(found.second)}"
    return made(name, found.gap, limit, found.beyond_chance, says, meaning)


def averaged_gradients(observed: Observed) -> Check:
    """Expectation over transformation (Athalye et al., 2018), where the network is randomised."""
    name, limit = "averaged gradients", FAR_FOR_BETTER_ATTACKS
    if not observed.randomised:
        return not_made(name, limit, "The network is not randomised: there is nothing to average over.")
    measured = ~observed.columns["pgd_averaged"].isnan()
    found = paired(observed.columns["pgd"][measured], observed.columns["pgd_averaged"][measured] > 0)
    says = (
        f"{observed.pgd} leaves {percent(found.first)} right, "
        f"with gradients averaged over {observed.setting('draws')} forwards {percent(found.second)}"
    )
    return made(name, found.gap, limit, found.beyond_chance, says, "noise hides the gradient")


def more_steps(observed: Observed) -> Check:
    """Longer may be neither worse, the gradient leading astray, nor much better, the attack being too short to tell."""
    pgd, longer = observed.columns["pgd"], observed.columns["pgd_more_steps"]
    found, meaning = paired(longer, pgd), "further steps along the gradient undo what the first ones did"
    if found.gap < 0:
        found, meaning = paired(pgd, longer), "the shorter attack had not come to its end, its figure is too good"
    says = (
        f"{observed.pgd} leaves {observed.percent('pgd')} right, "
        f"with {observed.setting('more_steps')} steps {observed.percent('pgd_more_steps')}"
    )
    return made("more steps", found.gap, FAR, found.beyond_chance, says, meaning, decisive=False)


def restarts(observed: Observed) -> Check:
    """The share of the images that only the later half of the further random starts breaks."""
    name, count, withstood = "restarts", observed.setting("restarts"), observed.columns["restarts_withstood"]
    if observed.randomised:
        says = "The network is randomised and errs at some time whatever the start: restarts tell nothing."
        return not_made(name, LATE_RESTARTS, says, decisive=False)
    middle, last = withstood >= count // 2, withstood >= count
    late = int((middle & ~last).sum())
    says = (
        f"{observed.pgd} leaves {observed.percent('pgd')} right, after {count // 2} more random starts "
        f"{percent(float(middle.double().mean()))}, after {count} {percent(float(last.double().mean()))}"
    )
    return made(
        name, late / len(last), LATE_RESTARTS, share_exceeds(late, len(last), LATE_RESTARTS), says,
        "they go on helping, as tries at random do", decisive=False,
    )  # fmt: skip
