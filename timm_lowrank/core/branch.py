"""`LowRankBranch`: the virtual branch of the paper (Section 2, Algorithm 2) on the activations of one layer."""

from __future__ import annotations

import dataclasses
import json
import math
import zlib
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CollapseError
from .buffer import ActivationBuffer, Moments, SampledRows, Streak
from .config import LowRankConfig
from .dense import DenseWeight
from .device import full_precision, moved, multiplies_in_bfloat16
from .distributed import Processes, fingerprint, pack, unpack_into
from .factored import Descent, FactoredWeight, Reconstruction, Slopes, centred_norms
from .head import SubspaceHead
from .scaling import CONSTANT, SCALINGS
from .views import FLATTEN, VIEWS, View

# Spread of a layer over its reference norm. In front of a normalisation a layer may shrink tenfold and be sound; below
# a thousandth, float32 sums of squares cannot tell its spread from the offset that b has not followed yet.
_DEAD, _BLOWN_UP = 1e-3, 1e4
# A layer's mean may be so many times as long as its spread, or so many times what that ratio was at switch-on.
_OFFSET = 2.0
_FOLLOWS, _GROWTH = 0.01, 1.03  # at an update: of the way to a larger spread, and how many times as large at most
_KEPT = ("bias", "reference_norm", "offset")  # tensors of a branch itself, with these names in its state
_ROUNDING = 16.0  # of the mean of any number of equal rows, in units of the last place: at most some two are seen
# Updates in a row without a finite row, or of activations that look dead: one may be a batch whose step a gradient
# scaler skips, or of images that are all alike.
_HOPELESS = 2
_ADVICE = (
    "Lower strength, reconstruction_weight or the learning rate, switch the branch on later (model.enable) or raise "
    "warmup_updates. The loss as printed (scale='paper') needs both terms, with weights of about 0.01."
)


@dataclasses.dataclass(frozen=True)
class BranchReport:
    """How far the branch of one layer is, in plain numbers; `penalty` and `outside` are NaN before the first batch.

    Of a batch that is not finite `outside` is infinite.
    """

    penalty: float  # what the last batch added to the loss
    outside: float  # ||W x - x||^2 over ||x||^2, summed over the last batch: the energy that W leaves outside
    rank: int  # of W; between two projections, which take it to the target rank, it is more
    target_rank: int
    updates: int  # Update Steps so far
    warming_up: bool  # whether the penalty has less than its full weight, see `LowRankConfig.warmup_updates`

    def __str__(self) -> str:
        """In words, for a line of a log."""
        if math.isnan(self.outside):
            return "no batch yet"
        warming = ", warming up" if self.warming_up else ""
        return (
            f"penalty {self.penalty:.4g}, {self.outside:.1%} of the energy outside W, rank {self.rank} "
            f"(target {self.target_rank}) after {self.updates:,} updates{warming}"
        )


@dataclasses.dataclass
class _Seen:
    """What the losses of a batch of n rows are made of: most steps report none of them."""

    errors: Tensor  # ||W x - x||^2, (n,)
    norms: Tensor  # ||x||, (n,)
    factors: Tensor  # of the scale, (n,) or one for all
    offset: Tensor | None = None  # L_o
    sizes: Tensor | None = None  # the norms that L_n takes, (n,), where they are not those of the scaled rows
    head: Tensor | None = None  # L_s

    def reconstruction(self) -> Tensor:
        """L_c."""
        return (self.factors.square() * self.errors).mean()

    def norm(self) -> Tensor:
        """L_n: as printed, or in the unit that L_c is in."""
        return (1 - (self.factors * self.norms if self.sizes is None else self.sizes)).abs().mean()

    def norm_slopes(self) -> Tensor:
        """n times the gradient of L_n in the norms, (n,), for factors that do not depend on these."""
        return (self.factors * self.norms - 1).sign() * self.factors

    def outside(self) -> Tensor:
        """See `BranchReport`."""
        return self.errors.sum() / self.norms.square().sum().clamp_min(torch.finfo(self.norms.dtype).tiny)

    def losses(self) -> dict[str, Tensor]:
        """By the names of `LowRankBranch.losses`."""
        own = {"reconstruction": self.reconstruction(), "norm": self.norm(), "head": self.head, "offset": self.offset}
        own |= {"outside": self.outside(), "activation_norm": self.norms.square().mean().sqrt()}
        return {name: value for name, value in own.items() if value is not None}

    def to(self, device: torch.device) -> _Seen:
        return _Seen(**{name: moved(value, device) for name, value in vars(self).items() if value is not None})


class LowRankBranch(nn.Module):
    """The low-rank branch of one layer: W of rank r and the bias b, with their losses and their Update Step.

    Per training step, `penalty` gives the branch's loss for a batch of activations and remembers the batch;
    after the optimizer's step, `update` moves W and b and, every `config.project_every` updates, projects W to
    rank r. W and b are neither parameters nor buffers: no optimizer steps on them, DistributedDataParallel does not
    broadcast them, and the number of rows of B may change from step to step. They follow `.to(device)`, keep their own
    dtype, and travel in `state_dict()`.

    Where several processes train one model, each has a W and a b of its own, and all are the same to the bit: `update`
    takes the rows that enter W, and the mean that b follows, from the batches of all processes. The penalty is the mean
    over this process's batch, as the task's loss is.

    Args:
        num_features: m, the width of the layer.
        rank: r, the target rank, 1 <= r <= m.
        config: everything else.
        classes: how many the labels tell apart, for the subspace head; None where that is not known, and then, or for a
            single one, there is no head.
        device, dtype: of W and b. All mathematics of the branch runs in `dtype`, float32 or float64, outside autocast.

    Raises:
        ValueError: a rank that does not fit the width, or another dtype.
    """

    def __init__(
        self,
        num_features: int,
        rank: int,
        config: LowRankConfig | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        *,
        classes: int | None = None,
    ):
        super().__init__()
        if not 1 <= rank <= num_features:
            raise ValueError(f"rank {rank} must lie between 1 and the width of the layer, {num_features}")
        if dtype not in (torch.float32, torch.float64):  # no eigendecomposition is made in half precision
            raise ValueError(f"dtype of W and b must be torch.float32 or torch.float64, not {dtype}")
        self.num_features, self.rank = num_features, rank
        self.config = config = (config or LowRankConfig()).for_branch("")
        self.name = ""
        self.view = FLATTEN  # what the rows are that it is given; W and b belong to that view of the layer
        self.processes = Processes()
        kind = FactoredWeight if config.storage == "factored" else DenseWeight
        self.bias = torch.zeros(num_features, device=device, dtype=dtype)
        self.weight: FactoredWeight | DenseWeight = kind(num_features, rank, config, self.bias.device, dtype)
        self.loss_weights = config.weights("")
        self.classify(classes)
        # Root mean square of ||a - mean|| at switch-on, and what that of ||a + b|| has grown to since.
        self.reference_norm = self.bias.new_zeros(())
        self.offset = self.bias.new_zeros(2)  # the bound of ||mean|| over the spread, and the spread at the last update
        self.updates = 0
        self._initialized = False  # whether b and the reference norm were taken from the batches of a first update
        self._provisional = False  # whether they were taken from the first of these batches, until then
        self._fresh = True  # whether W and b have not moved since they were made or loaded
        self._expand_offset_loss()
        self._seen: _Seen | None = None  # of the last batch
        self._total: Tensor | None = None  # the penalty of the last batch
        self._without_finite = Streak()
        self._doubtful = False  # whether the last update was of activations that look dead
        self.forget_batches()

    def classify(self, classes: int | None) -> None:
        """A new subspace head for so many classes, if the configuration asks for one and the number is known.

        None where there is a single logit: the softmax of one class is 1, and labels may be numbers of any kind.
        """
        self.head: SubspaceHead | None = None
        if self.loss_weights.head and classes is not None and classes > 1:
            sizes = sorted({min(size, self.rank) for size in self.config.head_sizes})
            self.head = SubspaceHead(classes, sizes, self.bias.device, self.bias.dtype)

    def forget_batches(self) -> None:
        """Leave out of the next update what was seen since the last one."""
        self._moments = Moments(self.bias)
        self._buffer = ActivationBuffer(self.config.update_rows, self._seed(1))
        self._provisional = self._initialized  # of batches that are left out
        if self.head is not None:
            self.head.forget_batches()

    def _seed(self, salt: int) -> int:
        """Depends on the configuration, the update and `salt` alone: nothing to save, alike on every process."""
        return ((self.config.seed * 1_000_003 + self.updates) * 1_009 + salt) % 2**63

    # --------------------------------------------------------------------------------------------------- the loss

    def penalty(
        self,
        activations: Tensor,  # (batch, features), any float dtype, with or without a graph
        labels: Tensor | None = None,  # (images,) integers or (images, classes) shares; see `head.rows_of_labels`
        counts: Tensor | None = None,  # (images,) how many of the rows each image has; None means as many of each
    ) -> Tensor:
        """lambda_1 L_c + lambda_2 L_n of one batch, a scalar of the branch's dtype (Algorithm 2, lines 6 to 8).

        Unless `scale` is "paper", plus lambda_1 L_o (`_expand_offset_loss`). With a subspace head and labels, plus its
        weight times L_s (`head.py`). In training (grad mode on and `self.training`) the batch is remembered for the
        next `update`.

        Raises:
            ValueError: activations of another shape than (batch, num_features), or not floating point; labels that do
                not fit them.
        """
        self._check(activations)
        if labels is not None and not isinstance(labels, Tensor):  # of numpy, or a list
            labels = torch.as_tensor(labels, device=self.bias.device)
        remember = self.training and torch.is_grad_enabled()
        values, learns = activations.detach(), torch.is_grad_enabled() and activations.requires_grad
        with full_precision(activations.device), torch.no_grad():
            if remember and not (self.processes.alone or self.processes.agreed):
                self.processes.agree(self.name, self._common)  # before one of them waits below for the others
            if remember and not (self._initialized or self._provisional):
                self._initialize_provisionally(values)
            entering = self._buffer.add(values, alone=self.processes.alone) if remember else ()
            sums = self._moments.of(values)
            half = self._may_be_half(values)
            images: Reconstruction = self.weight.reconstruction(values, self.bias, half, entering)
            seen = _Seen(images.errors, images.norms, self._factors(images.norms))
            if remember:
                self._moments.add(sums, seen.norms)
                self._buffer.complete(seen.factors, images.products)
            warmth = self._warmup_factor()
            total, slopes = self._descend_rows(seen, warmth, learns)
            if self.config.scale != "paper":
                weight = self.loss_weights.reconstruction * warmth
                seen.offset, direction = self._offset(sums[:-2], len(values))
                total = total.add(seen.offset, alpha=weight)
                slopes = slopes._replace(shift=direction * (-2 * weight / len(values)))
            if self.head is not None and labels is not None:
                weight = self.loss_weights.head * warmth
                seen.head, turned = self.head.loss(images.coordinates, labels, counts, remember=remember)  # L_s
                total = total.add(seen.head, alpha=weight)
                slopes = slopes._replace(coordinates=None if turned is None else turned * weight)
            if learns:
                prepared = self.weight.prepared(self.bias, images, slopes)
        if learns:
            total = Descent.apply(activations, total, self.bias, self.weight, half, *prepared)
        if self.config.scale == "paper":  # L_n is of the rows before b is added, which W never sees
            with full_precision(activations.device):
                sizes = torch.linalg.vector_norm(activations.to(self.bias.dtype), dim=1)
                seen.sizes = sizes.detach()
                if self.loss_weights.norm:
                    total = total.add((1 - sizes).abs().mean(), alpha=self.loss_weights.norm * warmth)
        self._seen, self._total = seen, total.detach().clone()  # which a loop may go on with in place
        return total

    def _descend_rows(self, seen: _Seen, warmth: float, learns: bool) -> tuple[Tensor, Slopes]:
        """lambda_1 L_c + lambda_2 L_n, a scalar without a graph, and its slopes in the errors and the norms; as printed
        without L_n, which is not of these norms. The slopes say nothing where nobody `learns` from them."""
        own, count = self.loss_weights, len(seen.norms)
        if self.config.scale in CONSTANT:
            squared = seen.factors.square() * (own.reconstruction * warmth)
            total = squared * seen.errors.mean()
            slopes = Slopes(squared / count)
            if own.norm and self.config.scale != "paper":
                total = total.add(seen.norm(), alpha=own.norm * warmth)
                slopes = slopes._replace(norms=seen.norm_slopes() * (own.norm * warmth / count))
            return total, slopes
        with torch.set_grad_enabled(learns):
            errors, norms = (values.detach().requires_grad_(learns) for values in (seen.errors, seen.norms))
            seen = _Seen(errors, norms, self._factors(norms))
            total = seen.reconstruction() * (own.reconstruction * warmth)
            if own.norm:  # else a NaN gradient of L_n would not be multiplied away
                total = total.add(seen.norm(), alpha=own.norm * warmth)
        if not learns:
            return total, Slopes(errors)
        return total.detach(), Slopes(*torch.autograd.grad(total, (errors, norms)))

    def _factors(self, norms: Tensor) -> Tensor:
        """By which the scale of the loss multiplies the rows, (n,) or a scalar."""
        if self.config.scale == "reference" and (self._initialized or self._provisional):
            return self._unit
        return SCALINGS[self.config.scale](norms, self._reference(norms))

    def _expand_offset_loss(self) -> None:
        """L_o to the first order about the mean that b knows, and the factor of the scale "reference", for the
        penalties until the next update.

            L_o = (||mean|| - bound * spread)+^2 / reference^2

        L_c does not see the mean of a layer, b takes it away. So the network may shift what enters a ReLU to where it
        is the identity, which keeps the rank of its input. With a mean of many times the spread, the running means of a
        normalisation behind the layer are off by more than the spread: a network that is sound in train mode fails in
        eval mode. As printed, L_n holds the length of an activation with its mean.

        Mean and spread are those of the last update, so that the penalty stays a mean over rows, however an update is
        cut into batches and processes.
        """
        self._unit = SCALINGS["reference"](self.bias, self.reference_norm)
        length, (bound, spread) = torch.linalg.vector_norm(self.bias), self.offset
        excess = torch.addcmul(length, bound, spread, value=-1).clamp_min_(0)
        steep = excess * self._unit.square()
        # At the mean -b L_o is steep * excess and its gradient 2 steep mean / length. So at the mean zero it would be:
        constant = torch.addcmul(excess * steep, length, steep, value=-2)
        self._offset_loss = constant, self.bias * (steep / length.clamp_min(torch.finfo(length.dtype).tiny))

    def _offset(self, total: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """L_o, a scalar, of a batch of `count` rows a whose sum is `total` (m,), and minus half its gradient in their
        mean, (m,); see `_expand_offset_loss`."""
        constant, direction = self._offset_loss
        return constant.add(direction @ total, alpha=-2 / count), direction

    def _reference(self, norms: Tensor) -> Tensor:
        """The reference norm; before there is one, for a penalty that is only looked at, the spread of its batch."""
        return self.reference_norm if self._initialized or self._provisional else norms.detach().square().mean().sqrt()

    def _may_be_half(self, activations: Tensor) -> bool:
        """Whether loss and gradient lose nothing if the large products are taken in bfloat16."""
        low = activations.dtype == torch.bfloat16 and self.bias.dtype == torch.float32
        return low and multiplies_in_bfloat16(activations.device)

    def _warmup_factor(self) -> float:
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
                "was the model wrapped for another image size? Give wrap() one batch as it is trained on: "
                "example_input=images"
            )
        if activations.shape[0] == 0:
            raise ValueError(f"{where}an empty batch has no penalty")

    def _initialize_provisionally(self, values: Tensor) -> None:  # (n, m), of the network's dtype
        """b and the reference norm of the first penalty, from its batch on all processes.

        Until the first update: then they are taken from all batches that it is made of.
        """
        moments = Moments(self.bias)
        moments.add(moments.of(values), centred_norms(values, torch.zeros_like(self.bias)))
        moments.sum_over(self.processes)
        if moments.empty():  # an overflow: the next batch will do
            return
        mean = moments.mean()
        about_mean = Moments(-mean)  # two passes: where the mean is large, the squares of the first say nothing
        about_mean.add(about_mean.of(values), centred_norms(values, -mean))
        about_mean.sum_over(self.processes)
        self._set_reference(mean, about_mean.variance())
        if not (self.reference_norm.is_meta or bool(self.reference_norm > 0)):  # a layer of zeros: the next batch
            return
        zeros, self._moments = self._moments.count, Moments(self.bias)
        own = torch.cat([self.bias.new_zeros(len(self.bias) + 1), zeros[None]])  # of the finite batches before it
        self._moments.add(own, (zeros.sqrt() * torch.linalg.vector_norm(self.bias))[None])
        self._provisional = True

    def _set_reference(self, mean: Tensor, variance: Tensor) -> None:
        """b and the references from the mean (m,) and the total variance of some rows."""
        if self.config.step_rule == "normalized":  # else b moves exactly as printed, from zero
            self.bias = -mean
        offset, spread = torch.linalg.vector_norm(mean), variance.sqrt()
        # A single row has no spread. Rows that are all alike have that of their mean's rounding.
        least = _ROUNDING * torch.finfo(spread.dtype).eps * offset
        self.reference_norm = torch.where(spread > least, spread, offset)
        self.offset = self._first_offset(offset, self.reference_norm)
        self._expand_offset_loss()

    @staticmethod
    def _first_offset(length: Tensor, spread: Tensor) -> Tensor:
        """`offset` (2,) at switch-on, from the length of the mean and the spread, scalars."""
        ratio = length / spread.clamp_min(torch.finfo(spread.dtype).tiny)
        return torch.stack([_OFFSET * ratio.clamp_min(1), spread])

    # ------------------------------------------------------------------------------------------------ Update Step

    @property
    def waiting(self) -> bool:
        """Whether a batch of this process waits for the next update."""
        return bool(self._buffer.sizes)

    @torch.no_grad()
    def update(self) -> None:
        """One Update Step (Algorithm 2, lines 11 to 13) from all batches since the last one.

        Raises:
            RuntimeError: no batch was seen since the last update.
            CollapseError: the layer died, which is seen at the update after a projection, or turned NaN for two updates
                in a row.
        """
        images = 0 if self.head is None else self.head.images
        numbers = self.processes.agree(self.name, self._common, [images, *self._buffer.sizes])
        sizes = [own[1:] for own in numbers]
        if not any(map(sum, sizes)):
            raise RuntimeError(f"update() of the branch on {self.name!r} without a penalty() since the last one")
        sampled = self._buffer.sample(sizes, self.processes.rank)
        with full_precision(self.bias.device):
            self._moments.sum_over(self.processes)
            begins = not self._initialized
            if begins:
                self._initialize(sampled)
            rows, products = self.weight.room(sampled.count)
            sampled.gather(self.bias, rows, products, self.processes)
            self.weight.append(rows)
            if self.head is not None:
                self.head.update(self.processes, images=sum(own[0] for own in numbers))
            self._step(begins)
        self._fresh = False
        self.forget_batches()

    def _initialize(self, sampled: SampledRows) -> None:
        """b and the reference norm from all rows of the first update, whatever batches and processes they came in."""
        if self._moments.empty():
            return
        self._set_reference(self._moments.mean(), self._moments.variance())
        if not (self.reference_norm.is_meta or bool(self.reference_norm > 0)):  # a layer of zeros: the next update
            return
        self._initialized = True
        if self.config.scale != "batch":  # whose factors are those of whole batches
            for rows in sampled.parts:
                rows.factors = SCALINGS[self.config.scale](centred_norms(rows.values, self.bias), self.reference_norm)

    def _step(self, begins: bool) -> None:
        count = self.weight.pending
        projects = (self.updates + 1) % self.config.project_every == 0
        if self._without_finite.extend(self._moments.count) >= _HOPELESS:
            raise CollapseError(self._not_finite())
        if projects or self._doubtful:
            symptom = self._symptom()
            if symptom and self._doubtful:
                raise CollapseError(symptom)
            self._doubtful = bool(symptom)
        self._step_bias()  # first: its gradient is taken at the old W
        if not begins:  # else the parts of a batch were centred with the mean of the first one
            self._follow_layer()
        self._expand_offset_loss()
        if self.config.step_rule == "fixed":
            self.weight.step(self.config.step_size * self.loss_weights.reconstruction / count)
        else:
            self.weight.step(self._inverse_curvature() * self.config.step_size)
        self.updates += 1
        if projects:
            self._project()

    def _follow_layer(self) -> None:
        """The spread of the layer about -b; the reference norm follows one that grows, by a few hundredths at a time.

        A layer that is not trained yet may be nearly constant, as a transformer's class token is. In units of that
        spread L_c soon had a hundred times its weight. The reference does not follow one that shrinks: then nothing
        would be left of the pull. It is no part of the graph, so growing is not rewarded, and one update of wild
        activations changes it little.
        """
        spread = self._moments.spread(self.offset[1])
        self.offset = torch.stack([self.offset[0], spread])
        reference = self.reference_norm
        self.reference_norm = reference.lerp(spread, _FOLLOWS).clamp(reference, reference * _GROWTH)

    @torch.no_grad()
    def project(self) -> None:
        """W <- its rank-r approximation (Algorithm 2, line 13), as `update` does every `project_every` times.

        Between two of these W holds the rows of the updates since the last one; without them its state is small. Of
        batches that wait for the next update W will take the rows; the subspace head leaves them out.
        """
        self._project()
        self._buffer.renew(lambda values: self.weight.reconstruction(values, self.bias).products)

    def _project(self) -> None:
        rotation = self.weight.project(torch.Generator("cpu").manual_seed(self._seed(0)))
        if self.head is not None:
            self.head.move(rotation)

    def _inverse_curvature(self) -> Tensor:
        """A tight lower bound of 1 / lambda_max(X^T X): a step on W below it never overshoots.

        It is the inverse of the Schatten-8 norm (tr K^8)^(1/8) of K = X X^T: at most p^(1/8) too small for p rows, two
        small matrix products, and no eigenvalue routine that would make a GPU wait for the host. In float64 the 8th
        power of what float32 can hold neither overflows nor, above the bound that is set here, vanishes.
        """
        gram = self.weight.pending_gram().double()
        squared = gram @ gram
        least = torch.finfo(torch.float32).tiny ** 0.5
        return torch.linalg.matrix_norm(squared @ squared).clamp_min(least**4).pow(-0.25)

    def _step_bias(self) -> None:
        if self.config.step_rule == "fixed":  # b <- b - lambda dL_c/db,  dL_c/db = 2 (W - I)^2 (mean + b)
            mean = self._moments.mean()
            seen = (self._moments.count > 0).to(mean.dtype)
            gradient = 2 * self.loss_weights.reconstruction * self.weight.residual(mean + self.bias)
            self.bias = self.bias - seen * self.config.step_size * gradient
        else:  # minus the mean is the optimum of b for every W, and no offset of the layer can hide in it
            self.bias = self._moments.moved(self.bias, self.config.bias_momentum)

    def _symptom(self) -> str | None:
        """What looks wrong with the activations of this update, for an error; None if nothing does.

        The one point of a training step that waits for the device, at projections, which do so anyway, and behind one
        where something looked wrong.
        """
        count, reference = float(self._moments.count), float(self.reference_norm)
        # b follows the mean late. A single row has no spread, and the first one is minus b: its length must do.
        single = torch.maximum(self._moments.squares, self._moments.mean().square().sum())
        squares = self._moments.variance() if count > 1 else single
        spread = float(squares.sqrt()) if count else math.nan
        if not spread < math.inf:
            return self._not_finite()
        if _DEAD * reference < spread < _BLOWN_UP * reference:
            return None
        return (
            f"layer {self.name!r} {'collapsed' if spread <= reference else 'blew up'}: after {self.updates} updates "
            f"the root mean square norm of its centred activations is {spread:.3g}, and it was {reference:.3g} before. "
            f"{_ADVICE}"
        )

    def _not_finite(self) -> str:
        return f"the activations of layer {self.name!r} are not finite after {self.updates} updates. {_ADVICE}"

    def _common(self) -> dict[str, int]:
        """What must be the same on all processes, by what to call it; W and b themselves where they are fresh."""
        common = {"their number of updates": self.updates, "the size of their factors": self.weight.size}
        common |= {"whether they have begun": int(self._initialized), "when their states were loaded": int(self._fresh)}
        if self._fresh:  # later, reading them would make the host wait for the device
            head = {} if self.head is None else self.head.state()
            tensors = (*(getattr(self, name) for name in _KEPT), *self.weight.state().values(), *head.values())
            common["W or b"] = fingerprint(*tensors)
            configuration = [self.config.to_dict(), dataclasses.asdict(self.view)]
            common["their configuration"] = zlib.crc32(json.dumps(configuration, sort_keys=True).encode())
        return common

    # ------------------------------------------------------------------------------------------------- inspection

    def losses(self) -> dict[str, Tensor]:
        """Detached scalars of the last `penalty`: unweighted "reconstruction" (L_c), "norm" (L_n), "head" (L_s, where
        there is a subspace head) and "offset" (L_o, but of the scale "paper"); "outside" (see `BranchReport`) and
        "activation_norm" (root mean square of ||a + b||)."""
        with torch.no_grad():
            return {} if self._seen is None else self._seen.losses()

    @torch.no_grad()
    def report(self) -> BranchReport:
        """How far the branch is. Waits for the device: for a line in a log now and then, not for every step."""
        penalty = math.nan if self._total is None else float(self._total)
        outside = math.nan if self._seen is None else float(self._seen.outside().nan_to_num(nan=math.inf))
        sizes = self.weight.eigenvalues().abs()
        rank = int((sizes > 1e-6 * sizes.amax()).sum()) if sizes.numel() else 0
        return BranchReport(penalty, outside, rank, self.rank, self.updates, self._warmup_factor() < 1)

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

    def extra_repr(self) -> str:
        return f"num_features={self.num_features}, rank={self.rank}, scale={self.config.scale!r}"

    # ------------------------------------------------------------------------------------------ devices and states

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def, override]
        """Follow the module to another device, never to another dtype: W must not become half precision."""
        device = fn(torch.empty_like(self.bias)).device
        self.weight.to(device)
        if self.head is not None:
            self.head.to(device)
        self._buffer.to(device)
        self._moments.to(device)
        for name in _KEPT:
            setattr(self, name, moved(getattr(self, name), device))
        constant, direction = self._offset_loss
        self._offset_loss, self._unit = (moved(constant, device), moved(direction, device)), moved(self._unit, device)
        self._seen = None if self._seen is None else self._seen.to(device)
        return super()._apply(fn, recurse)

    def _state(self) -> dict[str, Tensor]:
        # The view rides along: earlier versions read the first two numbers, and would refuse a tensor of a new name.
        view = [VIEWS.index(self.view.kind), self.view.channel_dim]
        counters = torch.tensor([self.updates, int(self._initialized), *view], device="cpu")
        own = {**{name: getattr(self, name).clone() for name in _KEPT}, "counters": counters}
        return {**own, **self.weight.state(), **({} if self.head is None else self.head.state())}

    def get_extra_state(self) -> bytes:
        """The whole state in one piece, as a model with sharded parameters saves it; see `distributed.pack`."""
        return pack(self._state())

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
        unpack_into(state_dict, prefix)
        names = self._state().keys()
        state = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        # The head may be switched on or off between two trainings: a new one begins at zero, an old one is left out.
        heads = {name: state.pop(name) for name in list(state) if name.startswith("head.")}
        if "offset" not in state and state.keys() >= {"bias", "reference_norm"}:  # of an earlier version
            length = torch.linalg.vector_norm(state["bias"].to(self.bias))
            state["offset"] = self._first_offset(length, state["reference_norm"].to(length))
        missing = [prefix + name for name in names if name not in state and not name.startswith("head.")]
        missing_keys += missing
        unexpected_keys += [prefix + name for name in state if name not in names]
        if missing:
            return
        try:
            self._check_kinds({**state, **heads})
            if state["bias"].shape != self.bias.shape:
                raise ValueError(
                    f"a bias of shape {tuple(state['bias'].shape)} does not fit {self.num_features} features"
                )
            if not all(state[name].isfinite().all() for name in _KEPT):
                raise ValueError("b or the reference norm is NaN or infinite: the training that wrote it had diverged")
            fits = state["reference_norm"].numel() == 1 and state["offset"].shape == self.offset.shape
            if not fits or state["counters"].dim() != 1 or len(state["counters"]) < 2:
                raise ValueError("the reference norm and the counters have other shapes than a branch writes")
            self._check_view(*state["counters"][2:].tolist())
            self.weight.load_state(state)
            if self.head is not None:
                self.classify(self.head.classes)  # what the present one knows is of another W
                if heads:
                    self.head.load_state(heads, self.weight.kept)
        except (ValueError, IndexError, RuntimeError) as problem:
            error_msgs.append(f"While loading the low-rank branch {prefix!r}: {problem}")
            return
        for name in _KEPT:
            setattr(self, name, state[name].to(getattr(self, name), copy=True))
        self._expand_offset_loss()
        self.updates, self._initialized = int(state["counters"][0]), bool(state["counters"][1])
        self._fresh, self._doubtful = True, False
        self.forget_batches()

    def _check_kinds(self, state: dict[str, Tensor]) -> None:
        """Raises ValueError for tensors that are no floats, or integers, of as many dimensions as those of a branch."""
        for name, own in self._state().items():
            given = state.get(name)
            if given is None:
                continue
            kind = own.is_floating_point(), own.dim()
            if (given.is_floating_point(), given.dim()) != kind or given.dtype == torch.bool or given.is_complex():
                raise ValueError(
                    f"{name} must be {'floating point' if kind[0] else 'integers'} of {kind[1]} dimensions, and is "
                    f"{tuple(given.shape)} {given.dtype}"
                )

    def _check_view(self, kind: int = -1, channel_dim: int = 0) -> None:
        """Raises ValueError if W and b were trained on another view of the layer; states from before views say none."""
        if kind < 0:
            return
        saved = View(VIEWS[kind] if kind < len(VIEWS) else "unknown", channel_dim)
        if not saved.agrees(self.view):
            raise ValueError(f"W and b of the view {saved} do not fit a branch of the view {self.view}")
