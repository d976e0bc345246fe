"""`LowRankBranch`: the virtual branch of the paper (Section 2, Algorithm 2) on the activations of one layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import CollapseError
from .moments import Moments
from .precision import full_precision
from .scaling import SCALINGS
from .state import BranchState
from .window import Drawn


class LowRankBranch(BranchState):
    """The low-rank branch of one layer: W of rank r and the bias b, with their losses and their Update Step.

    Per training step, `penalty` gives the branch's loss for a batch of activations and remembers the batch;
    after the optimizer's step, `update` moves W and b and, every `config.project_every` updates, projects W to
    rank r. W and b are neither parameters nor buffers: no optimizer steps on them and DistributedDataParallel
    does not broadcast them. They follow `.to(device)`, keep their own dtype, and travel in `state_dict()`.

    Where several processes train one model, each has a W and a b of its own, and all are the same to the bit: `update`
    takes the rows that enter W, and the mean that b follows, from the batches of all processes. The penalty is the mean
    over this process's batch, as the task's loss is.

    Args:
        num_features: m, the width of the layer.
        rank: r, the target rank, 1 <= r <= m.
        config: everything else.
        device, dtype: of W and b. All mathematics of the branch runs in `dtype`, outside autocast.

    Raises:
        ValueError: a rank that does not fit the width.
    """

    # --------------------------------------------------------------------------------------------------- the loss

    def penalty(
        self,
        activations: Tensor,  # (batch, features), any float dtype, with or without a graph
    ) -> Tensor:
        """lambda_1 L_c + lambda_2 L_n of one batch, a scalar of the branch's dtype (Algorithm 2, lines 6 to 8).

        In training (grad mode on and `self.training`) the batch is remembered for the next `update`.

        Raises:
            ValueError: activations of another shape than (batch, num_features), or not floating point.
        """
        self._check(activations)
        remember = self.training and torch.is_grad_enabled()
        with full_precision(activations.device):
            values = activations.to(self.bias.dtype)
            if remember and not (self.processes.alone or self.processes.agreed):
                self.processes.agree(self.name, self._alike)  # before one of them waits below for the others
            if remember and not (self._started or self._begun):
                self._begin(values.detach())
            centred = values + self.bias
            norms = torch.linalg.vector_norm(centred, dim=1)
            factors = SCALINGS[self.config.scale](norms, self.reference_norm)
            errors, products = self.weight.reconstruction_error(centred)
            reconstruction = (factors.square() * errors).mean()  # L_c
            if remember:
                self._moments.add(values.detach(), norms.detach())
                self._window.add(activations.detach(), factors.detach(), products, alone=self.processes.alone)
            sizes = torch.linalg.vector_norm(values, dim=1) if self.config.scale == "paper" else factors * norms
            norm = (1 - sizes).abs().mean()  # L_n: as printed, or in the unit that L_c is in
            total = self.reconstruction_weight * reconstruction
            if self.config.norm_weight:  # else a NaN gradient of L_n would not be multiplied away
                total = total + self.config.norm_weight * norm
            total = total * self._warmth()
        spread = norms.detach().square().mean().sqrt()
        self._losses = {"reconstruction": reconstruction.detach(), "norm": norm.detach(), "activation_norm": spread}
        return total

    @property
    def reconstruction_weight(self) -> float:
        """lambda_1 of this branch."""
        assert self.config.reconstruction_weight is not None  # see LowRankConfig.for_branch
        return self.config.reconstruction_weight

    def _warmth(self) -> float:
        """The share of its weight that the penalty has by now, see `LowRankConfig.warmup_updates`."""
        warmup = self.config.warmup_updates
        return min(1.0, max(0.0, self.updates / warmup - 1.0)) if warmup else 1.0

    def _check(self, activations: Tensor) -> None:
        where = f"layer {self.name!r}: " if self.name else ""
        if not activations.is_floating_point():
            raise ValueError(f"{where}activations must be floating point, not {activations.dtype}")
        if activations.dim() != 2 or activations.shape[1] != self.num_features:
            raise ValueError(
                f"{where}activations of shape {tuple(activations.shape)} do not fit (batch, {self.num_features}); "
                "was the model wrapped for another image size?"
            )
        if activations.shape[0] == 0:
            raise ValueError(f"{where}an empty batch has no penalty")

    def _begin(self, values: Tensor) -> None:
        """b and the reference norm of the first penalty, from its batch on all processes.

        Until the first update: then they are taken from all batches that it is made of.
        """
        moments = Moments(self.bias)
        moments.add(values, torch.linalg.vector_norm(values, dim=1))
        moments.join(self.processes)
        if moments.empty():  # an overflow: the next batch will do
            return
        mean = moments.mean()
        about_mean = Moments(-mean)  # two passes: where the mean is large, the squares of the first say nothing
        about_mean.add(values, torch.linalg.vector_norm(values - mean, dim=1))
        about_mean.join(self.processes)
        self._take(mean, about_mean.variance())
        self._moments = Moments(self.bias)
        self._begun = True

    def _take(self, mean: Tensor, variance: Tensor) -> None:
        """b and the reference norm from the mean (m,) and the total variance of some rows."""
        if self.config.step_rule == "normalized":  # else b moves exactly as printed, from zero
            self.bias = -mean
        alone = torch.linalg.vector_norm(mean)  # a single row has no spread
        self.reference_norm = torch.where(variance > 0, variance.sqrt(), alone)

    # ------------------------------------------------------------------------------------------------ Update Step

    @property
    def waiting(self) -> bool:
        """Whether a batch of this process waits for the next update."""
        return bool(self._window.sizes)

    @torch.no_grad()
    def update(self) -> None:
        """One Update Step (Algorithm 2, lines 11 to 13) from all batches since the last one.

        Raises:
            RuntimeError: no batch was seen since the last update.
            CollapseError: at a projection, if the layer died or turned NaN.
        """
        sizes = self.processes.agree(self.name, self._alike, self._window.sizes)
        if not any(map(sum, sizes)):
            raise RuntimeError(f"update() of the branch on {self.name!r} without a penalty() since the last one")
        drawn = self._window.draw(sizes, self.processes.rank)
        with full_precision(self.bias.device):
            self._moments.join(self.processes)
            if not self._started:
                self._start(drawn)
            self.weight.append(*drawn.join(self.bias, self.weight.size, self.processes))
            self._step()
        self._fresh = False
        self._forget_batches()

    def _start(self, drawn: Drawn) -> None:
        """b and the reference norm from all rows of the first update, whatever batches and processes they came in."""
        if self._moments.empty():
            return
        self._take(self._moments.mean(), self._moments.variance())
        self._started = True
        if self.config.scale != "batch":  # whose factors are those of whole batches
            for rows in drawn.parts:
                norms = torch.linalg.vector_norm(rows.values.to(self.bias.dtype) + self.bias, dim=1)
                rows.factors = SCALINGS[self.config.scale](norms, self.reference_norm)

    def _step(self) -> None:
        count = self.weight.pending
        projects = (self.updates + 1) % self.config.project_every == 0
        if projects:
            self._raise_if_collapsed()
        self._step_bias()  # first: its gradient is taken at the old W
        if self.config.step_rule == "fixed":
            self.weight.step(self.config.step_size * self.reconstruction_weight, count)
        else:
            self.weight.step(self.config.step_size / self._largest_curvature(count), count)
        self.updates += 1
        if projects:
            self.weight.project(torch.Generator().manual_seed(self._seed(0)))

    def _largest_curvature(self, count: int) -> Tensor:
        """A tight upper bound of lambda_max(X^T X / count): a step on W below its inverse never overshoots.

        The bound is the Schatten-8 norm (tr K^8)^(1/8) of K = X X^T / count: at most count^(1/8) too large, two
        small matrix products, and no eigenvalue routine that would make a GPU wait for the host.
        """
        gram = self.weight.pending_gram().double() / count
        scale = gram.diagonal().sum().clamp_min(torch.finfo(torch.float64).tiny)  # against overflow of the 8th power
        squared = (gram / scale) @ (gram / scale)
        bound = scale * torch.linalg.matrix_norm(squared @ squared).pow(0.25)
        return bound.to(self.bias.dtype).clamp_min(torch.finfo(self.bias.dtype).tiny ** 0.5)

    def _step_bias(self) -> None:
        mean = self._moments.mean()
        seen = (self._moments.count > 0).to(mean.dtype)
        if self.config.step_rule == "fixed":  # b <- b - lambda dL_c/db,  dL_c/db = 2 (W - I)^2 (mean + b)
            gradient = 2 * self.reconstruction_weight * self.weight.residual(mean + self.bias)
            self.bias = self.bias - seen * self.config.step_size * gradient
        else:  # minus the mean is the optimum of b for every W, and no offset of the layer can hide in it
            self.bias = self.bias - seen * self.config.bias_momentum * (mean + self.bias)

    def _raise_if_collapsed(self) -> None:
        """The one place of a training step that waits for the device, at projections, which do so anyway."""
        count = float(self._moments.count)
        # b follows the mean late. A single row has no spread; its length must do.
        squares = self._moments.variance() if count > 1 else self._moments.squares
        spread = float(squares.sqrt()) if count else math.nan
        _raise_if_collapsed(self.name, spread, float(self.reference_norm), self.updates)

    # ------------------------------------------------------------------------------------------------- inspection

    def losses(self) -> dict[str, Tensor]:
        """Detached scalars of the last `penalty`: "reconstruction" (L_c, unweighted), "norm" (L_n, unweighted) and
        "activation_norm" (root mean square of ||a + b||)."""
        return dict(self._losses)


# Spread of a layer over that at switch-on. In front of a normalisation a layer may shrink tenfold and be sound; below
# a thousandth, float32 sums of squares cannot tell its spread from the offset that b has not followed yet.
_DEAD, _BLOWN_UP = 1e-3, 1e4


def _raise_if_collapsed(layer: str, spread: float, reference: float, updates: int) -> None:
    """Raise CollapseError if a layer is past saving.

    Args:
        layer: its name.
        spread: root mean square norm of its activations about their mean; NaN if none were finite.
        reference: the same when the branch was switched on.
        updates: of the branch so far.
    """
    advice = (
        "Lower reconstruction_weight or the learning rate, switch the branch on later (model.enable) or raise "
        "warmup_updates; the loss as printed (scale='paper') kills most wide layers."
    )
    if not spread < float("inf"):
        raise CollapseError(f"the activations of layer {layer!r} are not finite after {updates} updates. {advice}")
    if not _DEAD * reference < spread < _BLOWN_UP * reference:
        what = "collapsed" if spread <= reference else "blew up"
        raise CollapseError(
            f"layer {layer!r} {what}: after {updates} updates the root mean square norm of its centred activations is "
            f"{spread:.3g}, and it was {reference:.3g} when the branch was switched on. {advice}"
        )
