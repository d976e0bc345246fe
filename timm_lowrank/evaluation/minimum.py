"""The smallest perturbation that fools 99 % of the images (paper, Section 3.1, Appendix D.3, Tables 3 and 10)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.capture import evaluating
from ..errors import EvaluationError
from .activations import check_images
from .attacks import deepfool
from .perturbation import mean_where_defined, rho
from .trajectory import RadiusAttack


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
    grid = _checked_radii(radii)
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
    found: SmallestRadii, share: float = 0.99, *, count_misclassified: bool = False
) -> MinimumPerturbation:
    """The smallest radius at which at least `share` of the images fool the network, and the mean rho there.

    Args:
        found: of all images; chunks concatenated.
        count_misclassified: whether images that were misclassified from the start count, as fooled with rho 0. The
            paper does not say. Without them the figure does not improve with a worse network.

    Raises:
        EvaluationError: a share outside (0, 1], or no image to count.
    """
    if not 0 < share <= 1:
        raise EvaluationError(f"share must lie in (0, 1], for example 0.99, not {share}")
    counted = torch.ones_like(found.radius, dtype=torch.bool) if count_misclassified else found.radius > 0
    radii = found.radius[counted]
    if not len(radii):
        raise EvaluationError("no image was classified correctly from the start, so there is none to be fooled")
    needed = math.ceil(share * len(radii) - 1e-9)  # 0.99 * 100 is a little more than 99 in some products
    eps = float(radii.sort().values[needed - 1])
    within = found.radius[counted] <= (eps if eps < math.inf else torch.finfo(torch.float64).max)
    if eps == math.inf:
        return MinimumPerturbation(None, None, int(within.sum()), len(radii))
    mean = mean_where_defined(found.rho[counted][within])
    return MinimumPerturbation(eps, mean.mean if mean.images else None, int(within.sum()), len(radii))


def deepfool_rho(
    model: nn.Module,
    images: Tensor,  # (n, channels, height, width) float in [0, 1]
    labels: Tensor,  # (n,) int64
    *,
    judge: nn.Module | None = None,
    batch_size: int = 500,
    **arguments: Any,
) -> SmallestRadii:
    """DeepFool's perturbation of each image: rho, and as `radius` its length ||x_a - x||_2.

    0 for images that the judge misclassifies from the start, inf and NaN for those that withstand. Take
    `minimum_perturbation` of it with share=1 or less, as of the other attacks.

    Args:
        judge: whom the images are to fool; None is `model`, on which they are crafted. DeepFool stops as soon as
            it fools `model`, so few of its images fool another network.
        arguments: of `deepfool`.

    Raises:
        EvaluationError: no images, or labels that do not fit.
    """
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


def _checked_radii(radii: Sequence[float]) -> list[float]:
    grid = sorted(set(radii))
    if not grid or not all(0 < eps < math.inf for eps in grid):
        raise EvaluationError(f"radii must be positive, in units of the pixel range like 8 / 255, not {list(radii)}")
    return grid


def classified_right(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 500) -> Tensor:
    """Whether each image is classified as its label, (n,) bool, in eval mode.

    Raises:
        EvaluationError: no images, or labels that do not fit.
    """
    check_images(images)
    if labels.shape != images.shape[:1]:
        raise EvaluationError(f"{len(images)} images need as many labels, not {tuple(labels.shape)}")
    with evaluating(model):
        found = torch.cat([model(batch).argmax(dim=1) for batch in images.split(batch_size)])
    return found == labels
