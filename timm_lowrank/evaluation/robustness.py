"""How robust a network is, image by image: the smallest radius that fools (paper, Section 3.1, Appendix D.3, Tables 3
and 10), and what an attack does step by step (Appendix D.4, Fig. 11)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import EvaluationError
from .arguments import check_images
from .attacks import deepfool
from .attacks.transfer import RadiusAttack, SteppingAttack
from .pixels import classified_right, predictions
from .representations import rho


class SmallestRadii(NamedTuple):
    """Per image, so that chunks can be concatenated."""

    radius: Tensor  # (n,) float64: 0 for an image misclassified from the start, inf for one that withstood all radii
    rho: Tensor  # (n,) float64, of the image that fooled; NaN where none did, or the image is zero everywhere


class MinimumPerturbation(NamedTuple):
    """What it takes to fool a share of the images."""

    eps: float | None  # None: not even the largest radius was enough
    rho: float | None  # mean over the images fooled within eps; None: there is no such mean
    hits: int  # images fooled within eps, or within the largest radius tried
    of: int  # images counted


def smallest_radii(
    judge: nn.Module,
    images: Tensor,  # (n, channels, height, width) float in [0, 1]
    labels: Tensor,  # (n,) int64
    attack: RadiusAttack,
    radii: Sequence[float],
    *,
    batch_size: int = 500,
) -> SmallestRadii:
    """The smallest of `radii` at which an attack fools `judge`, and rho there, image by image.

    Radii are tried in ascending order on the images that still stand: one that was fooled within a small ball is so
    within every larger one. Hence rho belongs to the smallest radius of that image, and is at most what one run
    at the final radius would give.

    Args:
        attack: (images, labels, eps) to adversarial images. It should stop at success, as the paper's does here:
            `lambda x, y, eps: iterative_fgsm(model, x, y, eps=eps, steps=50, stop_at_success=True)`, or for a black
            box `until_fooled(source, judge, partial(iterative_fgsm, steps=50))`.

    Raises:
        EvaluationError: no images, labels that do not fit, or radii that are not positive.
    """
    grid = sorted(set(radii))
    if not grid or not all(0 < eps < math.inf for eps in grid):
        raise EvaluationError(f"radii must be positive, in the units of the attack like 8 / 255, not {list(radii)}")
    check_images(images)
    right = classified_right(judge, images, labels, batch_size)
    radius = torch.zeros(len(images), dtype=torch.float64, device=images.device)
    distance = torch.zeros_like(radius)
    radius[right], distance[right] = torch.inf, torch.nan
    standing = right.nonzero().flatten()
    for eps in grid:
        if not len(standing):
            break
        clean, wanted = images[standing], labels[standing]
        adversarial = attack(clean, wanted, eps)
        fooled = ~classified_right(judge, adversarial, wanted, batch_size)
        if fooled.any():
            radius[standing[fooled]] = eps
            distance[standing[fooled]] = rho(clean[fooled], adversarial[fooled])
        standing = standing[~fooled]
    return SmallestRadii(radius, distance)


def minimum_perturbation(
    radii: SmallestRadii, share: float = 0.99, *, count_misclassified: bool = False
) -> MinimumPerturbation:
    """The smallest radius at which at least `share` of the images fool the network, and the mean rho there.

    Args:
        radii: of all images; chunks concatenated.
        count_misclassified: whether images that were misclassified from the start count, as fooled with rho 0. The
            paper does not say. Without them the figure does not improve with a worse network.

    Raises:
        EvaluationError: a share outside (0, 1], or no image to count.
    """
    if not 0 < share <= 1:
        raise EvaluationError(f"share must lie in (0, 1], for example 0.99, not {share}")
    counted = torch.ones_like(radii.radius, dtype=torch.bool) if count_misclassified else radii.radius > 0
    radius, distance = radii.radius[counted], radii.rho[counted]
    if not len(radius):
        raise EvaluationError("no image was classified correctly from the start, so there is none to be fooled")
    needed = math.ceil(share * len(radius) - 1e-9)  # 0.99 * 100 is a little more than 99 in some products
    eps = float(radius.sort().values[needed - 1])
    if eps == math.inf:
        return MinimumPerturbation(None, None, int(radius.isfinite().sum()), len(radius))
    within = radius <= eps
    defined = distance[within & ~distance.isnan()].double()
    rho_there = float(defined.mean()) if len(defined) else None
    return MinimumPerturbation(eps, rho_there, int(within.sum()), len(radius))


def deepfool_rho(
    model: nn.Module,
    images: Tensor,  # (n, channels, height, width) float in [0, 1]
    labels: Tensor,  # (n,) int64
    *,
    judge: nn.Module | None = None,
    batch_size: int = 500,
    **arguments: Any,
) -> SmallestRadii:
    """DeepFool's perturbation of each image: rho, and as `radius` its length ||x_a - x||_2, both of pixels.

    0 for images that the judge misclassifies from the start, inf and NaN for those that withstand. Take
    `minimum_perturbation` of it with share=1 or less, as of the other attacks.

    Args:
        judge: whom the images are to fool; None is `model`, on which they are crafted. DeepFool stops as soon as
            it fools `model`, so few of its images fool another network.
        arguments: of `deepfool`.

    Raises:
        EvaluationError: no images, or labels that do not fit.
    """
    check_images(images)
    judge = model if judge is None else judge
    right = classified_right(judge, images, labels, batch_size)
    adversarial = deepfool(model, images, labels, **arguments)
    length = (adversarial.double() - images.double()).flatten(1).norm(dim=1)
    withstood = classified_right(judge, adversarial, labels, batch_size)
    distance = rho(images, adversarial).masked_fill(~right, 0.0)
    return SmallestRadii(
        length.masked_fill(~right, 0.0).masked_fill(right & withstood, torch.inf),
        distance.masked_fill(right & withstood, torch.nan),
    )


def noise_at(
    accuracies: Sequence[float],  # (k,), at growing amounts of noise
    sizes: Sequence[float],  # (k,) mean rho of each
    accuracy: float = 0.5,
) -> float:
    """The amount of noise at which accuracy has fallen to `accuracy`, between two points along the line through them
    (paper, Section 3.1, Fig. 4a, where it is 50 %).

    The size at the first point if accuracy is no higher there; inf if it never falls so low.

    Raises:
        EvaluationError: no points, or accuracies and sizes of different numbers.
    """
    points = list(zip(sizes, accuracies, strict=False))
    if not points or len(sizes) != len(accuracies):
        raise EvaluationError(f"{len(sizes)} sizes and {len(accuracies)} accuracies: give as many, at least one")
    before = points[0]
    for size, here in points:
        if here <= accuracy:
            share = 1.0 if before[1] <= here else (before[1] - accuracy) / (before[1] - here)
            return before[0] + share * (size - before[0])
        before = (size, here)
    return math.inf


class StepAccuracies(NamedTuple):
    """The two curves of Fig. 11, from step 0 on."""

    instantaneous: list[float]
    cumulative: list[float]


def trajectory(
    model: nn.Module,
    images: Tensor,  # (n, channels, height, width) float in [0, 1]
    labels: Tensor,  # (n,) int64
    attack: SteppingAttack,
    *,
    judge: nn.Module | None = None,
) -> Tensor:
    """The class that each image is given at the start of an attack and after each step, (n, steps + 1) int64.

    Args:
        attack: with everything but the images given, and without a random start, so that step 0 is the clean image:
            `functools.partial(iterative_fgsm, eps=0.1, steps=20, step_size=0.01)`.
        judge: who classifies; None is `model`, on which the attack is crafted.

    Raises:
        EvaluationError: no images, and what the attack raises.
    """
    check_images(images)
    seen: list[Tensor] = []

    def note(step: int, here: Tensor, logits: Tensor) -> None:
        seen.append(logits.argmax(dim=1) if judge is None else here.clone())

    attack(model, images, labels, on_step=note)
    if not seen:
        raise EvaluationError("the attack never called on_step, so there is nothing to follow: take one with steps")
    # Not in between: the judge may read layers of the very network, whose BatchNorms are folded meanwhile.
    return torch.stack(seen if judge is None else [predictions(judge, here) for here in seen], dim=1)


def step_accuracies(
    predicted: Tensor,  # (n, steps + 1) int64, of `trajectory`; chunks may be concatenated
    labels: Tensor | None = None,  # (n,) int64
) -> StepAccuracies:
    """Instantaneous and cumulative accuracy after k = 0, 1, ... steps (Appendix D.4).

    With y(x; k) the class after k steps, a_I(k) is the share of images with y(x; k) = y(x; 0), and a_C(k) of those for
    which this held after every one of the steps 1 ... k; both begin at 1.

    Args:
        labels: the true classes, to be compared with instead of y(x; 0); then both begin at the clean accuracy.

    Raises:
        EvaluationError: no images, or labels of another number.
    """
    if predicted.dim() != 2 or not predicted.numel():
        raise EvaluationError(f"predicted must be (n, steps + 1) with n >= 1, not {tuple(predicted.shape)}")
    reference = predicted[:, 0] if labels is None else labels
    if reference.shape != predicted.shape[:1]:
        raise EvaluationError(f"{len(predicted)} images need as many labels, not {tuple(reference.shape)}")
    same = (predicted == reference[:, None]).double()
    return StepAccuracies(same.mean(dim=0).tolist(), same.cummin(dim=1).values.mean(dim=0).tolist())
