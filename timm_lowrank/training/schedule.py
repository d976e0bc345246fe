"""The learning rate and the weight of the penalty as functions of the place in a run: no state to resume."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .recipe import Recipe


def learning_rate(recipe: Recipe, epoch: int, step: int, steps: int) -> float:
    """The learning rate of optimizer step `step` (from 0) of `steps` in epoch `epoch` (from 0)."""
    if recipe.schedule == "cosine":
        decay = 0.5 * (1 + math.cos(math.pi * (epoch + step / steps) / recipe.epochs))
    else:
        decay = recipe.gamma ** sum(milestone <= epoch for milestone in recipe.milestones)
    return recipe.learning_rate * decay * _grown(epoch + (step + 1) / steps, recipe.warmup_epochs)


def penalty_weight(recipe: Recipe, epoch: int, step: int, steps: int) -> float:
    """The factor of the penalty: 0 while the branches are off, then growing to 1 over `ramp_epochs`."""
    if not recipe.lowrank_enabled or epoch < recipe.pretrain_epochs:
        return 0.0
    return _grown(epoch - recipe.pretrain_epochs + (step + 1) / steps, recipe.ramp_epochs)


def _grown(epochs: float, over: int) -> float:
    return min(1.0, epochs / over) if over else 1.0
