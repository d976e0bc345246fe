"""Black-box attacks: crafted on one network, judged on another (paper, Section 3.1 and Appendix D.5)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..arguments import checked
from ..pixels import classified_right

SteppingAttack = Callable[..., Tensor]  # (model, images, labels, *, on_step), as the attacks that take steps
RadiusAttack = Callable[[Tensor, Tensor, float], Tensor]  # (images, labels, eps) to adversarial images


@dataclass(frozen=True)
class TransferResult:
    images: Tensor  # (n, channels, height, width) float32: adversarial, crafted on the source
    robust: Tensor  # (n,) bool: the target classifies the adversarial image as its label
    counted: Tensor  # (n,) bool: both networks classify the clean image as its label

    @property
    def accuracy(self) -> float:
        """The share of robust images among those counted; NaN where none is."""
        return float(self.robust[self.counted].double().mean())


def transfer(
    source: nn.Module,
    target: nn.Module,
    images: Tensor,  # (n, channels, height, width) float in [0, 1]
    labels: Tensor,  # (n,) int64
    attack: Callable[[nn.Module, Tensor, Tensor], Tensor],
    *,
    batch_size: int = 500,
) -> TransferResult:
    """What `target` makes of the images that an attack finds on `source`.

    Only images that both classify correctly at first can tell anything of the transfer: those are `counted`. With
    the target as its own source it is the white-box attack.

    Args:
        attack: of (model, images, labels) like all attacks here: `lambda *a: pgd(*a, eps=8 / 255, steps=20)`. A radius
            in normalised units is in those of the source, on which the images are crafted.
        batch_size: of the forward passes that judge; the attack is given all images at once.

    Raises:
        EvaluationError: pixels outside [0, 1], or labels that are no classes.
    """
    images, labels = checked(images, labels)
    counted = classified_right(source, images, labels, batch_size)
    counted &= classified_right(target, images, labels, batch_size)
    adversarial = attack(source, images, labels)
    return TransferResult(adversarial, classified_right(target, adversarial, labels, batch_size), counted)


def until_fooled(source: nn.Module, judge: nn.Module, attack: SteppingAttack) -> RadiusAttack:
    """An attack that is crafted on `source` and stops, for each image, as soon as it fools `judge` (Appendix D.5).

    The black-box attack of Tables 3, 6 and 10. Images that never fool `judge` come back after the last step, those
    that it misclassifies from the start unchanged.

    Args:
        attack: as of `trajectory`, with the radius left open: `functools.partial(iterative_fgsm, steps=50)`, where
            wanted with radius_unit="normalized", in the units of the source.
    """

    def stopped(images: Tensor, labels: Tensor, eps: float) -> Tensor:
        adversarial, standing = images.clone(), torch.ones_like(labels, dtype=torch.bool)

        def note(step: int, here: Tensor, logits: Tensor) -> None:
            going = standing.nonzero().flatten()
            if len(going):
                adversarial[going] = here[going].detach()
                standing[going] = classified_right(judge, here[going], labels[going])

        attack(source, images, labels, eps=eps, on_step=note)
        return adversarial

    return stopped
