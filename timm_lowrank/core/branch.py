"""`LowRankBranch`: the virtual branch of the paper (Section 2, Algorithm 2) on the activations of one layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .config import LowRankConfig
from .dense import DenseWeight
from .errors import raise_if_collapsed
from .factored import FactoredWeight
from .scaling import SCALINGS


class LowRankBranch(nn.Module):
    """The low-rank branch of one layer: W of rank r and the bias b, with their losses and their Update Step.

    Per training step, `penalty` gives the branch's loss for a batch of activations and remembers the batch;
    after the optimizer's step, `update` moves W and b and, every `config.project_every` updates, projects W to
    rank r. W and b are neither parameters nor buffers: no optimizer steps on them and DistributedDataParallel
    does not broadcast them. They follow `.to(device)`, keep their own dtype, and travel in `state_dict()`.

    Args:
        num_features: m, the width of the layer.
        rank: r, the target rank, 1 <= r <= m.
        config: everything else.
        device, dtype: of W and b. All mathematics of the branch runs in `dtype`, outside autocast.

    Raises:
        ValueError: a rank that does not fit the width.
    """

    def __init__(
        self,
        num_features: int,
        rank: int,
        config: LowRankConfig | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        if not 1 <= rank <= num_features:
            raise ValueError(f"rank {rank} must lie between 1 and the width of the layer, {num_features}")
        self.num_features, self.rank = num_features, rank
        self.config = config = (config or LowRankConfig()).for_branch("")
        self.name = ""
        kind = FactoredWeight if config.storage == "factored" else DenseWeight
        place = torch.empty(0, device=device).device
        self.weight: FactoredWeight | DenseWeight = kind(num_features, rank, config, place, dtype)
        self.bias = torch.zeros(num_features, device=place, dtype=dtype)
        self.reference_norm = torch.zeros(
            (), device=place, dtype=dtype
        )  # root mean square of ||a - mean|| at switch-on
        self.updates = 0
        self._started = False  # whether b and the reference norm were taken from a first batch
        self._losses: dict[str, Tensor] = {}
        self._forget_batches()

    def extra_repr(self) -> str:
        return f"num_features={self.num_features}, rank={self.rank}, scale={self.config.scale!r}"

    def _forget_batches(self) -> None:
        self._sum = torch.zeros_like(self.bias)  # of the activations since the last update
        self._squares = torch.zeros_like(self.reference_norm)  # of ||a + b||
        self._count = torch.zeros_like(self.reference_norm)
        self._batches = 0
        self._priorities = torch.zeros(0, dtype=torch.float64)  # of the rows that wait for the next step; see `_lowest`

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
        with torch.autocast(activations.device.type, enabled=False):
            values = activations.to(self.bias.dtype)
            if remember and not self._started and bool(values.isfinite().all()):  # not with an overflow
                self._start(values.detach())
            centred = values + self.bias
            norms = torch.linalg.vector_norm(centred, dim=1)
            factors = SCALINGS[self.config.scale](norms, self.reference_norm)
            chosen = self._choose(values, norms, factors) if remember else None
            reconstruction = (factors.square() * self.weight.reconstruction_error(centred, chosen)).mean()  # L_c
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

    def _start(self, values: Tensor) -> None:
        """b begins at minus the mean of the first batch; at zero if it is to move exactly as printed."""
        mean = values.mean(dim=0)
        if self.config.step_rule == "normalized":
            self.bias = -mean
        spread = (values - mean).square().sum(dim=1).mean().sqrt()
        alone = torch.linalg.vector_norm(mean)  # a batch of one image has no spread
        self.reference_norm = torch.where(spread > 0, spread, alone)
        self._started = True

    def _choose(self, values: Tensor, norms: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of this batch that enter W, drawn evenly, and their factors; the batch joins the next step of b."""
        total = values.detach().sum(dim=0)
        finite = total.isfinite().all()  # an overflow that a gradient scaler will skip must not enter b
        self._sum = self._sum + torch.where(finite, total, 0)
        self._squares = self._squares + torch.where(finite, norms.detach().square().sum(), 0)
        self._count = self._count + finite * values.shape[0]
        self._batches += 1
        priorities = torch.rand(values.shape[0], dtype=torch.float64, generator=self._generator(self._batches))
        chosen = self._lowest(priorities)
        self._priorities = torch.cat([self._priorities, priorities[chosen]])
        rows = chosen.to(values.device)
        return rows, factors.detach()[rows]

    def _lowest(self, priorities: Tensor) -> Tensor:
        """Indices of the `config.update_rows` lowest of some random numbers, (p,) int64, sorted: an even draw.

        The lowest of each batch hold the lowest of all, so the draw stays even over batches of different sizes.
        """
        return priorities.argsort()[: self.config.update_rows].sort().values

    def _generator(self, salt: int) -> torch.Generator:
        """A CPU generator that depends on seed, update and `salt` alone: nothing to save, alike on every process."""
        return torch.Generator().manual_seed(((self.config.seed * 1_000_003 + self.updates) * 1_009 + salt) % 2**63)

    # ------------------------------------------------------------------------------------------------ Update Step

    @torch.no_grad()
    def update(self) -> None:
        """One Update Step (Algorithm 2, lines 11 to 13) from all batches since the last one.

        Raises:
            RuntimeError: no batch was seen since the last update.
            CollapseError: at a projection, if the layer died or turned NaN.
        """
        if self.weight.pending == 0:
            raise RuntimeError(f"update() of the branch on {self.name!r} without a penalty() since the last one")
        if self.config.update_rows is not None and self.weight.pending > self.config.update_rows:
            self.weight.thin_pending(self._lowest(self._priorities).to(self.bias.device))
        with torch.autocast(self.bias.device.type, enabled=False):
            self._step()
        self._forget_batches()

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
            self.weight.project(self._generator(0))

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
        mean = self._sum / self._count.clamp_min(1)
        seen = (self._count > 0).to(mean.dtype)
        if self.config.step_rule == "fixed":  # b <- b - lambda dL_c/db,  dL_c/db = 2 (W - I)^2 (mean + b)
            gradient = 2 * self.reconstruction_weight * self.weight.residual(mean + self.bias)
            self.bias = self.bias - seen * self.config.step_size * gradient
        else:  # minus the mean is the optimum of b for every W, and no offset of the layer can hide in it
            self.bias = self.bias - seen * self.config.bias_momentum * (mean + self.bias)

    def _raise_if_collapsed(self) -> None:
        """The one place of a training step that waits for the device, at projections, which do so anyway."""
        count = float(self._count)
        offset = self._sum / count + self.bias if count > 1 else torch.zeros_like(self.bias)  # b follows the mean late
        spread = float((self._squares / max(count, 1) - offset.square().sum()).clamp_min(0).sqrt())
        raise_if_collapsed(self.name, spread if count else math.nan, float(self.reference_norm), self.updates)

    # ------------------------------------------------------------------------------------------------- inspection

    def losses(self) -> dict[str, Tensor]:
        """Detached scalars of the last `penalty`: "reconstruction" (L_c, unweighted), "norm" (L_n, unweighted) and
        "activation_norm" (root mean square of ||a + b||)."""
        return dict(self._losses)

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """W (num_features, num_features): for tests and narrow layers."""
        return self.weight.dense()

    @torch.no_grad()
    def factor(self) -> Tensor:
        """F (num_features, rank or less); after a projection W = F F^T if W is positive semidefinite."""
        return self.weight.factor()

    @torch.no_grad()
    def effective_rank(self, share: float = 0.99) -> int:
        """How many of the eigenvalues of W hold `share` of the sum of their magnitudes; 0 while W is zero."""
        cumulative = self.weight.eigenvalues().abs().cumsum(dim=0)
        return int((cumulative < share * cumulative[-1]).sum()) + 1 if cumulative.numel() else 0

    # ------------------------------------------------------------------------------------------------------ state

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def, override]
        """Follow the module to another device, never to another dtype: W must not become half precision."""
        device = fn(torch.empty_like(self.bias)).device
        self.weight.to(device)
        for name in ("bias", "reference_norm", "_sum", "_squares", "_count"):
            setattr(self, name, getattr(self, name).to(device))
        self._losses = {name: value.to(device) for name, value in self._losses.items()}
        return super()._apply(fn, recurse)

    def _state(self) -> dict[str, Tensor]:
        counters = torch.tensor([self.updates, int(self._started)])
        own = {"bias": self.bias.clone(), "reference_norm": self.reference_norm.clone(), "counters": counters}
        return {**own, **self.weight.state()}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination.update({prefix + name: value for name, value in self._state().items()})

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # Not buffers: the number of rows of B changes from step to step, and buffers are broadcast by DDP.
        names = self._state().keys()
        missing_keys += [prefix + name for name in names if prefix + name not in state_dict]
        found = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        unexpected_keys += [prefix + name for name in found if name not in names]
        if any(prefix + name not in state_dict for name in names):
            return
        try:
            if found["bias"].shape != self.bias.shape:
                raise ValueError(
                    f"a bias of shape {tuple(found['bias'].shape)} does not fit {self.num_features} features"
                )
            self.weight.load_state(found)
        except ValueError as problem:
            error_msgs.append(f"While loading the low-rank branch {prefix!r}: {problem}")
            return
        self.bias = found["bias"].to(self.bias, copy=True)
        self.reference_norm = found["reference_norm"].to(self.reference_norm, copy=True)
        self.updates, self._started = int(found["counters"][0]), bool(found["counters"][1])
        self._forget_batches()
