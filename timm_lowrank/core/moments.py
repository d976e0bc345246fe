"""`Moments`: mean and spread of a layer since the last update, which b and the collapse check follow."""

from __future__ import annotations

import torch
from torch import Tensor

from .processes import Processes


class Moments:
    """Count, sum and squares of rows (n, m) that were centred with one and the same b.

    Everything stays on the device: adding a batch waits for nothing.

    Args:
        bias: b (m,), whose dtype and device the sums take.
    """

    def __init__(self, bias: Tensor) -> None:
        self._bias = bias
        self.total = torch.zeros_like(bias)  # sum of a
        self.squares = bias.new_zeros(())  # sum of ||a + b||^2
        self.count = bias.new_zeros(())

    def add(self, values: Tensor, norms: Tensor) -> None:
        """A batch: a (n, m), and ||a + b|| (n,). One that is not finite is left out: a gradient scaler will skip it."""
        total = values.sum(dim=0)
        finite = total.isfinite().all()
        self.total = self.total + torch.where(finite, total, 0)
        self.squares = self.squares + torch.where(finite, norms.square().sum(), 0)
        self.count = self.count + finite * values.shape[0]

    def join(self, processes: Processes) -> None:
        """From here on the moments of all processes' batches; each must have had the same b."""
        self.total, self.squares, self.count = processes.sum(self.total, self.squares, self.count)

    def empty(self) -> bool:
        """Whether no finite row was added. Waits for the device."""
        return not (self.count.is_meta or bool(self.count > 0))

    def mean(self) -> Tensor:
        """Of a, (m,); zero without rows."""
        return self.total / self.count.clamp_min(1)

    def variance(self) -> Tensor:
        """Mean of ||a - mean||^2, a scalar; the nearer b is to minus the mean, the more exactly."""
        share = self.squares / self.count.clamp_min(1)
        return (share - (self.mean() + self._bias).square().sum()).clamp_min(0)

    def to(self, device: torch.device) -> None:
        for name in ("_bias", "total", "squares", "count"):
            setattr(self, name, getattr(self, name).to(device))
