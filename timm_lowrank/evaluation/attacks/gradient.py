"""PGD and its relatives: one loop that climbs a loss inside a ball (paper, Appendix D.1, Eq. 5 and 6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import EvaluationError
from ..pixels import attackable
from .balls import NORMS, ball
from .climb import LOSSES, Climb, OnStep, attack, objective_of, towards_least_likely
from .inputs import check_choice, check_count, check_logits, check_number, checked

KEEP = ("last", "first_hit")


@dataclass(frozen=True)
class PGDSetting:
    """A named reading of "k steps in the radius eps": `pgd(model, images, labels, **setting.arguments(eps, steps))`."""

    name: str
    random_start: bool
    step_size: float | None  # in units of the pixel range; None: a quarter of the radius

    def arguments(self, eps: float, steps: int) -> dict[str, Any]:
        """Keyword arguments of `pgd`."""
        step_size = eps / 4 if self.step_size is None else self.step_size
        return {"eps": eps, "steps": steps, "step_size": step_size, "random_start": self.random_start}


MADRY = PGDSetting("Madry", random_start=True, step_size=None)
"""Random start, a step of eps / 4: 2/255 in the radius 8/255, as Madry et al. (2018)."""

PAPER = PGDSetting("paper", random_start=False, step_size=1 / 255)
"""Eq. 5 as printed: no random start, a step of 1/255.

Seven such steps reach 7/255 at most, so with them the radii 8 to 20 /255 of Table 1 would be one and the same attack.
Table 1 tells them apart: its step must have been another one, which the paper does not give.
"""


def pgd(
    model: nn.Module,
    images: Tensor,  # (n, channels, height, width) float in [0, 1]
    labels: Tensor,  # (n,) int64
    *,
    eps: float,
    steps: int,
    step_size: float | None = None,
    random_start: bool = True,
    restarts: int = 1,
    loss: str = "cross_entropy",
    targets: Tensor | None = None,  # (n,) int64
    norm: str = "linf",
    keep: str = "last",
    generator: torch.Generator | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Projected gradient ascent of the loss: adversarial images (n, channels, height, width) float32.

    x <- project(x + step_size * sign(gradient)), with the gradient over its length instead of its sign for l2. The
    distance to the image is at most eps and the pixels lie in [0, 1], both to the last bit: see `balls.py`. The
    loss is summed over images and random starts depend on each image alone, so that an image is treated alike in
    any batch, up to the rounding of the network itself. An image whose gradient is zero or not finite stays put.

    Args:
        model: takes pixels in [0, 1] and gives logits (n, classes), like a `PixelModel`.
        eps: radius, in units of the pixel range: 8 / 255.
        step_size: in the same units; eps / 4 unless given.
        random_start: uniform in the ball; without it the attack starts at the image.
        restarts: each image keeps the first restart that fooled it, else the last; those fooled leave the batch.
        loss: "cross_entropy", or "margin", the largest other logit minus that of the label, whose gradient does not
            vanish where the softmax is saturated.
        targets: classes to be reached, another one than the label each; then fooled means classified as the target.
        keep: "last", the last iterate whatever it does, or "first_hit": an image stops at the first iterate
            that fools, the start included. It then leaves the batch, which saves time.
        generator: of the random starts; it moves on by one number. Without one a seed of 0 is taken.
        on_step: called as (step, images, logits) with the start as step 0 and each iterate after, without restarts.

    Raises:
        EvaluationError: arguments out of their range, pixels outside [0, 1], labels that are no classes, targets
            that equal the label, or a model that cannot be differentiated.
    """
    step_size = eps / 4 if step_size is None else step_size
    _check(eps, steps, step_size)
    check_count(restarts, "restarts")
    check_choice(loss, LOSSES, "loss")
    check_choice(norm, NORMS, "norm")
    check_choice(keep, KEEP, "keep")
    if restarts > 1 and (on_step is not None or not random_start):
        raise EvaluationError("restarts need random_start=True and no on_step: they would all be the same, or mixed up")
    pixels, labels = checked(images, labels)
    if targets is not None:
        targets = checked(images, targets, "targets")[1]
        if (targets == labels).any():
            raise EvaluationError("targets must differ from the labels: an image cannot be led to where it is")
    reach = targets is not None
    climb = Climb(steps, step_size, objective_of(loss, reach), keep == "first_hit", reach)
    return attack(
        model, pixels, labels, climb, ball(pixels, eps, norm),
        targets=targets, random_start=random_start, restarts=restarts, generator=generator, on_step=on_step,
    )  # fmt: skip


def fgsm(
    model: nn.Module,
    images: Tensor,  # (n, channels, height, width) float in [0, 1]
    labels: Tensor,  # (n,) int64
    *,
    eps: float,
) -> Tensor:
    """One step of length eps along the sign of the gradient, from the image: adversarial images like `pgd`'s."""
    return pgd(model, images, labels, eps=eps, steps=1, step_size=eps, random_start=False)


def iterative_fgsm(
    model: nn.Module,
    images: Tensor,  # (n, channels, height, width) float in [0, 1]
    labels: Tensor,  # (n,) int64
    *,
    eps: float,
    steps: int,
    step_size: float = 1 / 255,
    stop_at_success: bool = False,
    on_step: OnStep | None = None,
) -> Tensor:
    """Iter-FGSM (Eq. 5): adversarial images like `pgd`'s, which it is, with the image as its start.

    Args:
        step_size: alpha; the paper's "1" is one of 255 levels of a pixel, as in Kurakin et al. (2017).
        stop_at_success: steps until the network errs and no further (paper, Section D.4, Table 3), at most `steps`.
        on_step: as of `pgd`.
    """
    keep = "first_hit" if stop_at_success else "last"
    return pgd(
        model, images, labels,
        eps=eps, steps=steps, step_size=step_size, random_start=False, keep=keep, on_step=on_step,
    )  # fmt: skip


def iterative_least_likely(
    model: nn.Module,
    images: Tensor,  # (n, channels, height, width) float in [0, 1]
    labels: Tensor,  # (n,) int64
    *,
    eps: float,
    steps: int,
    step_size: float = 1 / 255,
    stop_at_success: bool = False,
    retarget: bool = True,
    on_step: OnStep | None = None,
) -> Tensor:
    """Iter-LL-FGSM (Eq. 6): towards the least likely class; adversarial images like `pgd`'s.

    It can leave the accuracy as it was, or raise it, and never come near its target: report how often
    `least_likely` is hit beside the accuracy.

    Args:
        stop_at_success: steps until the network errs and no further, whichever class it says then.
        retarget: the least likely class of every iterate, as the paper prints it; without, that of the image, as
            Kurakin et al. (2017).
        on_step: as of `pgd`.
    """
    _check(eps, steps, step_size)
    pixels, labels = checked(images, labels)
    targets = None if retarget else least_likely(model, pixels)
    objective = towards_least_likely if retarget else objective_of("cross_entropy", targeted=True)
    climb = Climb(steps, step_size, objective, stop_at_success)
    return attack(model, pixels, labels, climb, ball(pixels, eps, "linf"), targets=targets, on_step=on_step)


def least_likely(
    model: nn.Module,
    images: Tensor,  # (n, channels, height, width) float in [0, 1]
) -> Tensor:
    """The class of smallest logit of each image, (n,) int64: the target of Kurakin's Iter-LL-FGSM."""
    pixels, none = checked(images, torch.zeros(images.shape[:1], dtype=torch.int64))
    if not len(pixels):
        return none
    with attackable(model) as logits_of, torch.no_grad():
        logits = logits_of(pixels)
    check_logits(logits, none)
    return logits.argmin(dim=1)


def _check(eps: float, steps: int, step_size: float) -> None:
    check_number(eps, "eps")
    check_number(step_size, "step_size")
    check_count(steps, "steps")
