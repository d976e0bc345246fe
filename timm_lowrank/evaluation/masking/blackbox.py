"""Attacks that see the logits and no gradient."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor, nn

from ..attacks.balls import seeds_of
from ..attacks.upstream import find_package
from ..pixels import attackable, random_state_kept
from .networks import margins


def square(
    model: nn.Module,
    images: Tensor,  # (n, channels, height, width) float32 in [0, 1]
    labels: Tensor,  # (n,) int64
    *,
    eps: float,
    queries: int,
    seed: int,
) -> Tensor:
    """The Square attack (Andriushchenko et al., 2020), L_inf: adversarial images like `pgd`'s.

    Its schedule is shortened to so many queries. AutoAttack's own Square is not: cut short it would still be trying
    its largest squares. All images of a call are tried with the same squares.

    Raises:
        ImportError: no package with AutoAttack is installed.
    """
    package, *_ = find_package()
    attack_class = import_module(f"{package.__name__}.square").SquareAttack
    with attackable(model) as logits_of, torch.no_grad(), random_state_kept():
        classes = logits_of(images[:1]).shape[1]

        def predict(points: Tensor) -> Tensor:
            # It writes into the logits it gets, and asks about no image at all where all margins are exactly 0.
            return logits_of(points).clone() if len(points) else points.new_zeros(0, classes)

        attack = attack_class(predict, norm="Linf", n_queries=queries, eps=eps, seed=seed, device=images.device)
        found: Tensor = attack.perturb(images, labels)
    return found


def best_signs(
    model: nn.Module,
    images: Tensor,  # (n, channels, height, width) float32 in [0, 1]
    labels: Tensor,  # (n,) int64
    *,
    eps: float,
    count: int,
    seed: int,
) -> Tensor:
    """Of `count` perturbations of +-eps, each pixel's sign drawn by itself, the one with the largest margin.

    Judged by another forward, it does not give a randomised network a chance to err with every draw.
    """
    best, found = torch.full(labels.shape, -torch.inf, device=images.device), images
    with attackable(model) as logits_of, torch.no_grad():
        for draw in range(count):
            generators = (torch.Generator().manual_seed(each) for each in seeds_of(images, seed, draw))
            drawn = torch.stack([torch.rand(images.shape[1:], generator=generator) for generator in generators])
            points = (images + eps * (drawn.to(images.device) - 0.5).sign()).clamp(0, 1)
            reached = margins(logits_of(points), labels)
            better = reached > best
            best = torch.where(better, reached, best)
            found = torch.where(better.view(-1, 1, 1, 1), points, found)
    return found
