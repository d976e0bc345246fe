"""What the penalty needs to know about the Trainer's loss, and the means of its parts between two logs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.capture import evaluating
from ..core.model import LowRankModel


def ignores_items(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether a model that takes `num_items_in_batch` gives the same loss for any number: then it is a plain mean.

    Args:
        inputs: keyword arguments of the forward, labels among them; two images are enough.
    """
    few = {key: value[:2] if isinstance(value, Tensor) else value for key, value in inputs.items()}
    with evaluating(model):
        first, second = (loss_of(model(**few, num_items_in_batch=count)) for count in (1, 2))
    return torch.equal(first, second)


def loss_of(output: Any) -> Tensor:
    """The loss in what a model of transformers returns."""
    loss: Tensor = output["loss"] if isinstance(output, dict) else output[0]
    return loss


class Means:
    """Means of the penalty and its parts over some batches, on this process. Nothing waits for the device to add."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, penalty: Tensor, lowrank: LowRankModel) -> None:
        """Counts the penalty of one batch, a scalar, and the losses of the branches."""
        values = {"penalty": penalty.detach()}
        for layer, parts in lowrank.losses().items():
            values.update({f"{layer}.{part}": value for part, value in parts.items()})
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += 1

    def take(self) -> dict[str, float]:
        """The means since the last call; empty if there was no batch."""
        means = {name: float(total) / self._count for name, total in self._sums.items()}
        self._sums, self._count = {}, 0
        return means
