"""What an attack does step by step, and where it first succeeds (paper, Appendix D.4, Fig. 11)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..core.capture import evaluating
from ..errors import EvaluationError
from .activations import check_images

SteppingAttack = Callable[..., Tensor]  # (model, images, labels, *, on_step), as the attacks that take steps
RadiusAttack = Callable[[Tensor, Tensor, float], Tensor]  # (images, labels, eps) to adversarial images


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
        attack: with everything but the images settled, and without a random start, so that step 0 is the clean image:
            `functools.partial(iterative_fgsm, eps=0.1, steps=20, step_size=0.01)`.
        judge: who classifies; None is `model`, on which the attack is crafted.

    Raises:
        EvaluationError: no images, and what the attack raises.
    """
    check_images(images)
    columns: list[Tensor] = []

    def note(step: int, here: Tensor, logits: Tensor) -> None:
        columns.append((logits.argmax(dim=1) if judge is None else _classes(judge, here)).clone())

    attack(model, images, labels, on_step=note)
    if not columns:
        raise EvaluationError("the attack never called on_step, so there is nothing to follow: take one with steps")
    return torch.stack(columns, dim=1)


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


def until_fooled(source: nn.Module, judge: nn.Module, attack: SteppingAttack) -> RadiusAttack:
    """An attack that is crafted on `source` and stops, for each image, as soon as it fools `judge` (Appendix D.5).

    The black-box attack of Tables 3, 6 and 10. Images that never fool `judge` come back after the last step, those
    that it misclassifies from the start unchanged.

    Args:
        attack: as of `trajectory`, with the radius left open: `functools.partial(iterative_fgsm, steps=50)`.
    """

    def stopped(images: Tensor, labels: Tensor, eps: float) -> Tensor:
        found, standing = images.clone(), torch.ones_like(labels, dtype=torch.bool)

        def note(step: int, here: Tensor, logits: Tensor) -> None:
            going = standing.nonzero().flatten()
            if len(going):
                found[going] = here[going].detach()
                standing[going] = _classes(judge, here[going]) == labels[going]

        attack(source, images, labels, eps=eps, on_step=note)
        return found

    return stopped


def _classes(model: nn.Module, images: Tensor) -> Tensor:
    """(n,) int64; inside an attack, whose gradients are on."""
    with evaluating(model):
        found: Tensor = model(images.detach()).argmax(dim=1)
    return found
