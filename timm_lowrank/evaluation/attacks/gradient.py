"""PGD and its relatives: one loop that climbs a loss inside a ball (paper, Appendix D.1, Eq. 5 and 6)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import EvaluationError
from ..arguments import check_choice, check_count, check_labels, check_logits, check_number, checked
from ..pixels import attackable, radius_unit_of
from .balls import NORMS, Ball, ball, seeds_of

LOSSES = ("cross_entropy", "log_odds", "margin")
KEEP = ("last", "first_hit")

OnStep = Callable[[int, Tensor, Tensor], None]  # step, images, logits
Objective = Callable[[Tensor, Tensor], Tensor]  # of logits (m, classes) and targets (m,): a sum that is to grow


class PGDArguments(TypedDict):
    """Keywords of `pgd`."""

    eps: float
    steps: int
    step_size: float
    random_start: bool
    loss: str


@dataclass(frozen=True)
class PGDSetting:
    """A named reading of "k steps in the radius eps": `pgd(model, images, labels, **setting.arguments(eps, steps))`."""

    name: str
    random_start: bool
    step_size: float | None  # in the units of the radius; None: a quarter of it
    loss: str = "cross_entropy"

    def arguments(self, eps: float, steps: int) -> PGDArguments:
        """Keyword arguments of `pgd`."""
        step_size = eps / 4 if self.step_size is None else self.step_size
        start, loss = self.random_start, self.loss
        return {"eps": eps, "steps": steps, "step_size": step_size, "random_start": start, "loss": loss}


MADRY = PGDSetting("Madry", random_start=True, step_size=None)
"""Random start, a step of eps / 4: 2/255 in the radius 8/255, as Madry et al. (2018)."""

FIXED = PGDSetting("fixed", random_start=True, step_size=2 / 255)
"""Random start, a step of 2/255 at every radius: that of Madry et al. (2018) on CIFAR-10, kept where the radius grows.

Seven such steps reach 14/255 from their start, twenty 40/255, so that at the radii 16/255 and 20/255 they cross a part
of the ball alone: a reading of how the columns of Table 1 for 7 and 20 steps draw apart there.
"""

PAPER = PGDSetting("paper", random_start=False, step_size=1 / 255, loss="log_odds")
"""Eq. 5 as printed: no random start, a step of 1/255. It is `iterative_fgsm`, and climbs what that does.

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
    radius_unit: str = "pixel",
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
        eps: radius, in units of `radius_unit`: 8 / 255.
        step_size: in the same units; eps / 4 unless given.
        random_start: uniform in the ball; without it the attack starts at the image.
        restarts: each image keeps the first restart that fooled it, else the last; those fooled leave the batch.
        loss: "cross_entropy"; "log_odds", whose gradient has the direction of the cross-entropy in exact arithmetic,
            also where float32 has the softmax saturated; or "margin", the largest other logit minus that of the label,
            whose gradient does not vanish there either.
        targets: classes to be reached, another one than the label each; then fooled means classified as the target.
        radius_unit: "pixel", the pixel range; or "normalized", the standard deviation of each channel, as attacks on
            an already normalised input have it: 8 / 255 is then about 2 / 255 of the pixel range. Pixels stay in [0, 1]
            in both. Normalised units are those of `model`, which has to be or to hold a `PixelModel`: of a black box
            those of the network that the images are crafted on.
        keep: "last", the last iterate whatever it does, or "first_hit": an image stops at the first iterate
            that fools, the start included. It then leaves the batch, which saves time.
        generator: of the random starts; it moves on by one number. Without one a seed of 0 is taken.
        on_step: called as (step, images, logits) with the start as step 0 and each iterate after, without restarts. The
            network is not as it was in between (see `attackable`): read its layers when the attack is over.

    Raises:
        EvaluationError: arguments out of their range, pixels outside [0, 1], labels that are no classes, targets
            that equal the label, or a model that cannot be differentiated.
    """
    step_size = eps / 4 if step_size is None else step_size
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
    objective = {"cross_entropy": cross_entropy, "log_odds": log_odds, "margin": margin}[loss]
    ascent = Ascent(eps, steps, step_size, towards(objective) if reach else objective, keep == "first_hit", reach)
    return _attack(
        model, pixels, labels, ascent, norm=norm, unit=radius_unit_of(model, radius_unit),
        targets=targets, random_start=random_start, restarts=restarts, generator=generator, on_step=on_step,
    )  # fmt: skip


def fgsm(
    model: nn.Module,
    images: Tensor,  # (n, channels, height, width) float in [0, 1]
    labels: Tensor,  # (n,) int64
    *,
    eps: float,
    radius_unit: str = "pixel",
) -> Tensor:
    """One step of length eps along the sign of the gradient, from the image: adversarial images like `pgd`'s."""
    return pgd(model, images, labels, eps=eps, steps=1, step_size=eps, random_start=False, radius_unit=radius_unit)


def iterative_fgsm(
    model: nn.Module,
    images: Tensor,  # (n, channels, height, width) float in [0, 1]
    labels: Tensor,  # (n,) int64
    *,
    eps: float,
    steps: int,
    step_size: float = 1 / 255,
    radius_unit: str = "pixel",
    stop_at_success: bool = False,
    on_step: OnStep | None = None,
) -> Tensor:
    """Iter-FGSM (Eq. 5): adversarial images like `pgd`'s, which it is, with the image as its start.

    It climbs the cross-entropy by its log-odds: without a random start it begins where a confident network has its
    softmax saturated, and the gradient that float32 leaves of the cross-entropy there misses the label's own logit.

    Args:
        step_size: alpha; the paper's "1" is one of 255 levels of a pixel, as in Kurakin et al. (2017).
        radius_unit: of eps and step_size, as of `pgd`.
        stop_at_success: steps until the network errs and no further (paper, Section D.4, Table 3), at most `steps`.
        on_step: as of `pgd`.
    """
    keep = "first_hit" if stop_at_success else "last"
    return pgd(
        model, images, labels,
        eps=eps, steps=steps, step_size=step_size, radius_unit=radius_unit, random_start=False, keep=keep,
        loss="log_odds", on_step=on_step,
    )  # fmt: skip


def iterative_least_likely(
    model: nn.Module,
    images: Tensor,  # (n, channels, height, width) float in [0, 1]
    labels: Tensor,  # (n,) int64
    *,
    eps: float,
    steps: int,
    step_size: float = 1 / 255,
    radius_unit: str = "pixel",
    stop_at_success: bool = False,
    retarget: bool = True,
    on_step: OnStep | None = None,
) -> Tensor:
    """Iter-LL-FGSM (Eq. 6): towards the least likely class; adversarial images like `pgd`'s.

    It can leave the accuracy as it was, or raise it, and never come near its target: report how often
    `least_likely` is hit beside the accuracy.

    Args:
        radius_unit: of eps and step_size, as of `pgd`.
        stop_at_success: steps until the network errs and no further, whichever class it says then.
        retarget: the least likely class of every iterate, as the paper prints it; without, that of the image, as
            Kurakin et al. (2017).
        on_step: as of `pgd`.
    """
    pixels, labels = checked(images, labels)
    targets = None if retarget else least_likely(model, pixels)
    objective = towards_least_likely if retarget else towards(cross_entropy)
    ascent = Ascent(eps, steps, step_size, objective, stop_at_success)
    unit = radius_unit_of(model, radius_unit)
    return _attack(model, pixels, labels, ascent, unit=unit, targets=targets, on_step=on_step)


def least_likely(
    model: nn.Module,
    images: Tensor,  # (n, channels, height, width) float in [0, 1]
) -> Tensor:
    """The class of smallest logit of each image, (n,) int64: the target of Kurakin's Iter-LL-FGSM."""
    pixels, none = checked(images, torch.zeros(images.shape[:1], dtype=torch.int64))
    if not len(pixels):
        return none
    with attackable(model) as logits_of, torch.no_grad():
        return check_logits(logits_of(pixels), len(pixels)).argmin(dim=1)


# ---- losses ----


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits, labels, reduction="sum")


def log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """log((1 - p) / p), p the probability of the label, which grows with the cross-entropy -log p.

    So the gradients of both have one direction for each image, and a step takes no more of a gradient than that. But
    in float32 p rounds to 1 where the other logits lie 17 below that of the label: the cross-entropy then loses the
    part of its gradient that is the label's own logit, and beyond 104 all of it.
    """
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return (others.logsumexp(dim=1) - logits.gather(1, labels[:, None])[:, 0]).sum()


def margins(
    logits: Tensor,  # (n, classes)
    labels: Tensor,  # (n,) int64
) -> Tensor:
    """The largest other logit minus that of the label, (n,): above zero where the network errs."""
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return (others.max(dim=1, keepdim=True).values - logits.gather(1, labels[:, None]))[:, 0]


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    return margins(logits, labels).sum()


def towards(objective: Objective) -> Objective:
    """What grows on the way towards the targets, where `objective` grows on the way away from them."""
    return lambda logits, targets: -objective(logits, targets)


def towards_least_likely(logits: Tensor, labels: Tensor) -> Tensor:
    """Eq. 6: minus the cross-entropy of the class that these very logits make least likely."""
    return -cross_entropy(logits, logits.detach().argmin(dim=1))


def input_gradient(
    total: Tensor,  # scalar
    points: Tensor,  # (m, channels, height, width), requires grad
    *,
    retain_graph: bool = False,
) -> Tensor:
    """Gradient of `total` by the pixels, (m, channels, height, width); what is not finite in it counts as zero.

    Raises:
        EvaluationError: the model is not differentiable.
    """
    gradient = None
    if total.requires_grad:
        (gradient,) = torch.autograd.grad(total, points, retain_graph=retain_graph, allow_unused=True)
    if gradient is None:
        raise EvaluationError(
            "the logits do not depend on the pixels through operations that torch can differentiate (no_grad, detach, "
            "argmax, numpy?): gradient attacks cannot be run; craft on another model and use transfer()"
        )
    return gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).contiguous()


# ---- the loop ----


@dataclass(frozen=True)
class Ascent:
    """What the relatives of PGD differ in, beside the norm and the start.

    Raises:
        EvaluationError: a radius, a step or a number of steps that is none.
    """

    eps: float
    steps: int
    step_size: float
    objective: Objective
    stop_when_fooled: bool = False
    reach: bool = False  # fooled are those classified as their target, not those that are no longer as their label

    def __post_init__(self) -> None:
        check_number(self.eps, "eps")
        check_number(self.step_size, "step_size")
        check_count(self.steps, "steps")

    def fooled(self, logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
        """(m,) bool."""
        predicted = logits.argmax(dim=1)
        return predicted == targets if self.reach else predicted != labels


def _attack(
    model: nn.Module,
    images: Tensor,  # (n, channels, height, width) float32, checked
    labels: Tensor,  # (n,) int64
    ascent: Ascent,
    *,
    norm: str = "linf",
    unit: Tensor | None = None,  # of the radius, as `ball` takes it
    targets: Tensor | None = None,  # (n,) int64; the labels where there are none
    random_start: bool = False,
    restarts: int = 1,
    generator: torch.Generator | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """The adversarial images of `pgd`, after its checks."""
    targets = labels if targets is None else targets
    if not len(images):
        return images.clone()
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    stream = int(torch.randint(2**62, (), generator=generator, device=generator.device)) if random_start else 0
    with attackable(model, many=restarts * ascent.steps > 1) as logits_of:
        adversarial, waiting = images.clone(), torch.arange(len(images), device=images.device)
        around = ball(images, ascent.eps, norm, unit)
        for restart in range(restarts):
            balls, start = around.rows(waiting), images[waiting]
            if random_start:
                start = balls.random_points(seeds_of(start, stream, restart))
            judged = restart + 1 < restarts
            points, fooled = _climb(logits_of, start, labels[waiting], targets[waiting], ascent, balls, judged, on_step)
            adversarial[waiting] = points
            waiting = waiting[~fooled]
            if not len(waiting):
                break
    return adversarial


def _climb(
    logits_of: Callable[[Tensor], Tensor],
    start: Tensor,
    labels: Tensor,
    targets: Tensor,
    ascent: Ascent,
    ball: Ball,
    judged: bool,
    on_step: OnStep | None,
) -> tuple[Tensor, Tensor]:
    """The last points, and which of them fool; the second is of use only if `judged`.

    The last points are looked at only for `judged` or `on_step`. Under `stop_when_fooled` the points that fool leave
    the batch, and the logits that `on_step` is given of them are those they left with.
    """
    points, going = start, torch.arange(len(start), device=start.device)
    fooled = torch.zeros(len(start), dtype=torch.bool, device=start.device)
    seen = torch.empty(0)
    for step in range(ascent.steps + 1):
        last = step == ascent.steps
        if on_step is None and (not len(going) or (last and not judged)):
            break
        if len(going):
            here = points[going].requires_grad_(not last)
            logits = check_logits(logits_of(here), len(here))
            if step == 0:
                check_labels(labels, logits.shape[1])
                check_labels(targets, logits.shape[1], "targets")
            seen = logits.detach() if len(going) == len(points) else seen.index_copy(0, going, logits.detach())
            fooled[going] = ascent.fooled(logits.detach(), labels[going], targets[going])
        if on_step is not None:
            on_step(step, points, seen)
        rows = ~fooled[going] if ascent.stop_when_fooled else slice(None)
        moving = going[rows]
        if len(moving) and not last:
            gradient = input_gradient(ascent.objective(logits[rows], targets[moving]), here)[rows]
            moved = ball.rows(moving).step(here.detach()[rows], gradient, ascent.step_size)
            points = points.index_copy(0, moving, moved)
        going = moving
    return points, fooled
