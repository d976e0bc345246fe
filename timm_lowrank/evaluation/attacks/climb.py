"""The loop that PGD and its relatives are: climb a loss, step by step, inside a ball."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..pixels import attackable
from .balls import Ball, seeds_of
from .inputs import check_logits, input_gradient

LOSSES = ("cross_entropy", "margin")

OnStep = Callable[[int, Tensor, Tensor], None]
Objective = Callable[[Tensor, Tensor], Tensor]  # of logits (m, classes) and targets (m,): a sum that is to grow


@dataclass(frozen=True)
class Climb:
    """What the relatives of PGD differ in, beside the ball and the start."""

    steps: int
    step_size: float
    objective: Objective
    stop_when_fooled: bool = False
    reach: bool = False  # fooled are those classified as their target, not those that are no longer as their label

    def fooled(self, logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
        """(m,) bool."""
        found = logits.argmax(dim=1)
        return found == targets if self.reach else found != labels


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits, labels, reduction="sum")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """The largest other logit minus that of the label: above zero where the network errs."""
    own = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return (others.max(dim=1, keepdim=True).values - own).sum()


def towards_least_likely(logits: Tensor, labels: Tensor) -> Tensor:
    """Eq. 6: minus the cross-entropy of the class that these very logits make least likely."""
    return -cross_entropy(logits, logits.detach().argmin(dim=1))


def objective_of(loss: str, targeted: bool) -> Objective:
    """What grows on the way away from the aims, or towards them."""
    away = margin if loss == "margin" else cross_entropy
    return (lambda logits, targets: -away(logits, targets)) if targeted else away


def attack(
    model: nn.Module,
    images: Tensor,  # (n, channels, height, width) float32, checked
    labels: Tensor,  # (n,) int64
    climb: Climb,
    ball: Ball,
    *,
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
    with attackable(model) as logits_of:
        found, waiting = images.clone(), torch.arange(len(images), device=images.device)
        for restart in range(restarts):
            balls = ball.rows(waiting)
            start = images[waiting]
            if random_start:
                start = balls.random_points(seeds_of(start, stream, restart))
            judged = restart + 1 < restarts
            points, fooled = _climb(logits_of, start, labels[waiting], targets[waiting], climb, balls, judged, on_step)
            found[waiting] = points
            waiting = waiting[~fooled]
            if not len(waiting):
                break
    return found


def _climb(
    logits_of: Callable[[Tensor], Tensor],
    start: Tensor,
    labels: Tensor,
    targets: Tensor,
    climb: Climb,
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
    for step in range(climb.steps + 1):
        last = step == climb.steps
        if on_step is None and (not len(going) or (last and not judged)):
            break
        if len(going):
            here = points[going].requires_grad_(not last)
            logits = logits_of(here)
            if step == 0:
                check_logits(logits, labels)
                check_logits(logits, targets, "targets")
            seen = logits.detach() if len(going) == len(points) else seen.index_copy(0, going, logits.detach())
            fooled[going] = climb.fooled(logits.detach(), labels[going], targets[going])
        if on_step is not None:
            on_step(step, points, seen)
        rows = ~fooled[going] if climb.stop_when_fooled else slice(None)
        moving = going[rows]
        if len(moving) and not last:
            gradient = input_gradient(climb.objective(logits[rows], targets[moving]), here)[rows]
            moved = ball.rows(moving).step(here.detach()[rows], gradient, climb.step_size)
            points = points.index_copy(0, moving, moved)
        going = moving
    return points, fooled
