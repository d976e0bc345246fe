"""A short Square attack: queries alone, no gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..pixels import attackable


def square(
    model: nn.Module,
    images: Tensor,  # (n, channels, height, width) float32 in [0, 1]
    labels: Tensor,  # (n,) int64
    *,
    eps: float,
    queries: int,
    seed: int,
) -> Tensor:
    """Adversarial images like `pgd`'s of the Square attack (Andriushchenko et al., 2020), L_inf, with its schedule
    shortened to `queries`. All images of a call see the same squares, and torch's global generator is reseeded.

    Raises:
        ImportError: pyautoattack is not installed.
    """
    try:
        from pyautoattack.square import SquareAttack
    except ImportError as error:
        raise ImportError(
            "the Square attack needs pyautoattack: pip install 'timm_lowrank[evaluate]', or a Budget with queries=0"
        ) from error
    with attackable(model) as logits_of, torch.no_grad():
        classes = logits_of(images[:1]).shape[1]

        def predict(points: Tensor) -> Tensor:
            # The attack overwrites the logits it gets, and may ask about no image at all when margins are exactly 0.
            return logits_of(points).clone() if len(points) else points.new_zeros(0, classes)

        attack = SquareAttack(predict, norm="Linf", n_queries=queries, eps=eps, seed=seed, device=images.device)
        found: Tensor = attack.perturb(images, labels)
    return found
