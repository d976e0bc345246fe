"""What is put around a network before it is looked at, and read off its logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..pixels import bare


class Differentiable(nn.Module):
    """The same logits, always with a graph to the pixels: where there is none, with a gradient of zero.

    Attacks refuse a network without one (a threshold or an argmax on the way); here it is a finding.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.network = bare(model)
        self.training = model.training

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, classes) float32 of images (n, channels, height, width) in [0, 1]."""
        logits: Tensor = self.network(images)
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            return logits  # refused by `check_logits`, which names the shape
        return logits.float() + 0.0 * images.flatten(1).sum(dim=1, keepdim=True)


class Averaged(nn.Module):
    """The mean logits of several forwards of a randomised network: the expectation over its randomness."""

    def __init__(self, model: nn.Module, draws: int) -> None:
        super().__init__()
        self.network, self.draws = model, draws
        self.training = model.training

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, classes) of images (n, channels, height, width) in [0, 1]."""
        return torch.stack([self.network(images) for _ in range(self.draws)]).mean(dim=0)


def margins(
    logits: Tensor,  # (n, classes)
    labels: Tensor,  # (n,) int64
) -> Tensor:
    """The largest other logit minus that of the label, (n,): above zero where the network errs."""
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return others.amax(dim=1) - logits.gather(1, labels[:, None])[:, 0]
