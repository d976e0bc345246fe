"""Checks of the gradient and of one attack at several radii."""

from __future__ import annotations

from .chance import CHANCE, at_most, share_exceeds
from .check import Check, Observed, made, not_made, percent

UNBOUNDED = 0.05
"""What PGD may leave right when it may make any image of any other. Sound networks keep nothing; what does not
follow the gradient at all keeps everything, as the attack starts at the image."""

ZERO_GRADIENTS = 0.01
"""Share of the images without a gradient. Sound networks had none, also where the softmax was 1 on a third of them."""

UNSMOOTH, BROKEN_PROMISE = 0.1, 1 / 4
"""Share of the images on which a step brings less than a quarter of what the gradient promises. On plain networks of
CIFAR-10 no image kept less than a third at radii up to 20/255, and 1 % of them less than a quarter at 32/255; on
shattered gradients nearly all keep less than a fifth."""


def unbounded_radius(observed: Observed) -> Check:
    count = len(observed.columns["pgd_unbounded"])
    says = (
        f"PGD-{observed.setting('steps')} that may make any image of any other leaves "
        f"{observed.percent('pgd_unbounded')} right"
    )
    return made(
        "unbounded radius", observed.share("pgd_unbounded"), UNBOUNDED,
        share_exceeds(observed.count("pgd_unbounded"), count, UNBOUNDED), says,
        "the gradient does not lead to errors that exist",
    )  # fmt: skip


def double_radius(observed: Observed) -> Check:
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


def zero_gradients(observed: Observed) -> Check:
    bad = observed.columns["zero_gradient"] | ~observed.columns["finite_gradient"]
    says = (
        f"The gradient of the cross-entropy is zero on {observed.percent('zero_gradient')} of the images and "
        f"not finite on {percent(1 - observed.share('finite_gradient'))}"
    )
    return made(
        "zero gradients", float(bad.double().mean()), ZERO_GRADIENTS,
        share_exceeds(int(bad.sum()), len(bad), ZERO_GRADIENTS), says, "attacks have nothing to follow there",
    )  # fmt: skip


def smooth_loss(observed: Observed) -> Check:
    """Whether small steps along the gradient bring what it promises; see `observations._kept_promise`."""
    name, ratios = "smooth loss", observed.columns["kept_promise"]
    known = ratios[~ratios.isnan()]
    if 2 * len(known) < len(ratios):
        says = "Most of the images have no gradient along which to step."
        return not_made(name, UNSMOOTH, says, decisive=False)
    broken = int((known < BROKEN_PROMISE).sum())
    says = (
        f"Small steps along the gradient bring {float(known.median()):.2f} times what it promises (median), and less "
        f"than a quarter on {percent(broken / len(known))} of the images"
    )
    return made(
        name, broken / len(known), UNSMOOTH, share_exceeds(broken, len(known), UNSMOOTH), says,
        "the gradient says little about the loss a step away", decisive=False,
    )  # fmt: skip


def deterministic(observed: Observed) -> Check:
    share = 1 - observed.share("repeats")
    says = f"Two forwards of the same images give different logits on {percent(share)} of them"
    return made(
        "deterministic", share, 0.0, True, says,
        "the figures of attacks hold for single forwards, and attacks that average may do better", decisive=False,
    )  # fmt: skip
