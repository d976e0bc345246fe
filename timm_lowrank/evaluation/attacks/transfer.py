"""Black-box transfer: crafted on one network, judged on another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..pixels import attackable
from .inputs import check_logits, checked


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
        attack: of (model, images, labels) like all attacks here: `lambda *a: pgd(*a, eps=8 / 255, steps=20)`.
        batch_size: of the forward passes that judge; the attack is given all images at once.

    Raises:
        EvaluationError: pixels outside [0, 1], or labels that are no classes.
    """
    images, labels = checked(images, labels)
    counted = _right(source, images, labels, batch_size) & _right(target, images, labels, batch_size)
    adversarial = attack(source, images, labels)
    return TransferResult(adversarial, _right(target, adversarial, labels, batch_size), counted)


def _right(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int) -> Tensor:
    """(n,) bool: classified as the label."""
    found = [torch.zeros(0, dtype=torch.bool, device=images.device)]
    with attackable(model) as logits_of, torch.no_grad():
        for pixels, wanted in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            if len(pixels):
                logits = logits_of(pixels)
                check_logits(logits, wanted)
                found.append(logits.argmax(dim=1) == wanted)
    return torch.cat(found)
