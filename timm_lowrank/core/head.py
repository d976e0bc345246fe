"""`SubspaceHead`: a linear classifier that reads a layer through the leading directions of its branch.

L_c says how many directions a layer may use, not that a class can be read from the first ones. The head asks for
that. With U (kept, m) the orthonormal rows that span the range of W and D (q, kept) the principal directions of the
activations inside it,

    z_i = D U (a_i + b)                                     (q,)      the activations in their leading directions
    L_s = mean over i and d of CE(h + H[:d]^T z_i[:d], y_i)           for each d of a few sizes, such as 5, 10 and 20

The activations get the gradient of L_s, W does not. Head and branch are dropped together at prediction time. It is not
part of the paper; nested sizes are those of Matryoshka representations (Kusupati et al., 2022), at a layer inside.

H is no parameter of the optimizer, whose learning rate is right for another scale of inputs: it takes a step of its
own. The Hessian of the cross-entropy is at most 1/2 E[x x^T] (x) I with x = (z, 1) (Boehning, 1992), so the step

    H <- H - 2 s E[x x^T]^-1 dL_s/dH,       0 < s <= 1

never raises the loss of the batch that it is taken on, in whatever unit the activations are. A batch of few images
tells little of most of the q directions, and H would follow its noise: a running mean M of E[x x^T] is added with the
weight q / n, which leaves a step of n / (n + q) of that. A projection moves U, and D is taken anew from the rows that
entered W since the one before: H and M are carried over into the new coordinates.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import LowRankWarning
from .device import moved
from .distributed import Processes

STEP = 0.5  # s: fast enough to follow a W that moves; the bound makes it average over several batches all the same
_RIDGE = 1e-3  # of the diagonal of E[x x^T]
_ITERATIONS = 4  # of `leading`
_MEMORY = 0.1  # the share of a batch in the running mean M
_ROUNDING = 0.01  # a share of 1 in bfloat16, after some arithmetic
_FAINT = 1e-6  # weight of a direction that was known beside rows: it decides where these say nothing
_IDLE = 2  # projections in a row without a label that counts: then it is said


class Rotation(NamedTuple):
    """What a projection did to the orthonormal rows U (kept, m) that span the range of W; all float64."""

    kept: Tensor  # U_new U_old^T (kept_new, kept_old)
    rows: Tensor  # U_new X^T (kept_new, p) of the p rows X that entered W since the projection before


class SubspaceHead:
    """H (q, classes) and h (classes,) on the q leading directions of a branch; q grows up to the largest of `sizes`.

    Args:
        classes: how many there are.
        sizes: for each a classifier on so many leading directions, all of them parts of one H.
        device, dtype: of H.
    """

    def __init__(self, classes: int, sizes: Sequence[int], device: torch.device, dtype: torch.dtype) -> None:
        self.classes, self.sizes = classes, tuple(sizes)
        self.directions = torch.zeros(0, 0, device=device, dtype=dtype)  # D (q, kept), orthonormal rows
        self.weight = torch.zeros(1, classes, device=device, dtype=dtype)  # H (q, classes) and, last, h
        self.moment = torch.zeros(1, 1, device=device, dtype=dtype)  # M (q + 1, q + 1)
        self._counted: Tensor | None = None  # rows whose labels counted at the last update; None without labels
        self._idle = 0  # projections in a row at which none did
        self._numbers: Tensor | None = None  # the class numbers of the last batch that counts for an update
        self._told = False  # that some of them are larger than those of the classes
        self._begin()

    def _begin(self) -> None:
        """With the directions that there are by now: which of them each size reads, made once for all steps."""
        count = len(self.directions)
        self._sizes = sorted({min(size, count) for size in self.sizes})
        reads = [[float(at < size or at == count) for size in self._sizes] for at in range(count + 1)]
        masks = torch.tensor(reads, dtype=self.weight.dtype, device="cpu")  # (q + 1, sizes); all read the constant
        self._masks = masks.to(self.weight.device, non_blocking=True)
        self._read = (masks @ masks.T).to(self.weight.device, non_blocking=True)  # by how many sizes, (q + 1, q + 1)
        self.forget_batches()

    def forget_batches(self) -> None:
        """Leave out of the next update what was seen since the last one."""
        width = len(self._sizes) * self.classes
        # x^T [t - p | x], summed over the batches, x = (z, 1): minus dL_s/dH of each size as if it read all directions,
        # and E[x x^T], both times the number of rows, which is the last number of all.
        self._shape = len(self.weight), width + len(self.weight)
        self._sums: Tensor | None = None  # of no batch yet
        self.images = 0  # that have entered them

    @property
    def ready(self) -> bool:
        """Whether a projection has given it directions."""
        return self.directions.shape[0] > 0

    @torch.no_grad()
    def loss(
        self,
        coordinates: Tensor,  # U (a_i + b) of each row, (n, kept)
        labels: Tensor,  # see `rows_of_labels`
        counts: Tensor | None = None,  # of the rows of each image, see there
        *,
        remember: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """L_s of one batch, a scalar, and its gradient in the coordinates; zero and None before the first projection.

        Args:
            remember: whether the batch counts for the next `update`.

        Raises:
            ValueError: the labels do not fit.
        """
        if not self.ready:
            _check_labels(labels, len(coordinates), self.classes, counts)
            return self.weight.new_zeros(()), None
        targets = rows_of_labels(labels, len(coordinates), self.classes, counts).to(coordinates)[:, None]
        shape = len(self._sizes), self.classes
        valid = targets.sum(dim=2)
        self._numbers = labels if remember and labels.dim() == 1 else self._numbers
        weight = (self._masks[:, :, None] * self.weight[:, None]).flatten(1)  # (q + 1, sizes x classes)
        both = coordinates.new_ones(len(coordinates), self._shape[1])
        missing, inputs = both.tensor_split([weight.shape[1]], dim=1)
        missing = missing.unflatten(1, shape)
        torch.mm(coordinates, self.directions.T, out=inputs[:, :-1])  # x = (z, 1)
        logarithms = (inputs @ weight).unflatten(1, shape).log_softmax(dim=2)  # (n, sizes, classes)
        torch.exp(logarithms, out=missing)
        both.mul_(valid)
        torch.sub(targets, missing, out=missing)  # minus the gradient in the logits
        if remember:
            self._add(inputs.T @ both)
            self.images += len(labels)
        count = valid.sum().clamp_min(1) * -len(self._sizes)
        return (targets * logarithms).sum() / count, missing.flatten(1) @ weight[:-1].T @ self.directions / count

    def _add(self, sums: Tensor) -> None:
        """The part of a batch; one that is not finite is left out: a gradient scaler will skip it."""
        finite = torch.linalg.vector_norm(sums, math.inf) < torch.inf
        if self._sums is None:
            self._sums = torch.where(finite, sums, 0)
        else:
            self._sums = torch.where(finite, self._sums + sums, self._sums)

    def update(self, processes: Processes, images: int | None = None) -> None:
        """One step on H from all batches since the last one, the same to the bit on every process.

        Args:
            images: of the batches of all processes; None means that there is this one alone.
        """
        self._counted = None
        if self.ready and (images or self.images):  # else M would fade, of no batch
            (sums,) = processes.sum(self.weight.new_zeros(self._shape) if self._sums is None else self._sums)
            width, share = len(self._sizes) * self.classes, len(self.directions) / max(1, images or self.images)
            rows = sums[-1, -1].clamp_min(1)
            self._counted = sums[-1, -1]
            descent = torch.bmm(self._masks[:, None], sums[:, :width].unflatten(1, (-1, self.classes))).squeeze(1)
            moment = sums[:, width:] * self._read / rows
            damped = torch.add(moment.double(), self.moment, alpha=share)
            damped.diagonal().mul_(1 + _RIDGE).add_(torch.finfo(torch.float64).tiny ** 0.5)
            factor = torch.linalg.cholesky_ex(damped).L  # without a check, which would wait for the device
            step = torch.cholesky_solve(descent.double(), factor).to(self.weight)
            moved = torch.addcdiv(self.weight, step, rows, value=2 * STEP)
            finite = torch.linalg.vector_norm(moved, math.inf) < torch.inf
            self.weight = torch.where(finite, moved, self.weight).contiguous()  # the solution of a system is not
            self.moment = torch.lerp(self.moment, moment, _MEMORY)
        self.forget_batches()

    def move(self, rotation: Rotation) -> None:
        """After a projection, which has waited for the device: new directions, and H in them.

        Warns, once, if no label of the last update before this projection and the one before it counted, and once if
        some count and others are class numbers of a larger classifier.
        """
        if self.ready and self._counted is not None and not self._counted.is_meta:
            counts = float(self._counted) > 0
            self._idle = 0 if counts else self._idle + 1
            if self._idle == _IDLE:
                warnings.warn(
                    f"the subspace head learns nothing: of the labels that penalty() was given none is a class number "
                    f"in [0, {self.classes}) or a share of each of {self.classes} classes. Give it such labels, or set "
                    "head_weight=0",
                    LowRankWarning,
                    stacklevel=2,
                )
            largest = int(self._numbers.max()) if counts and self._numbers is not None else -1
            if largest >= self.classes and not self._told:
                self._told = True
                warnings.warn(
                    f"the subspace head leaves out the labels from {self.classes} on, and {largest} is one: the "
                    f"network gave {self.classes} logits when it was wrapped. If its classifier was replaced since, "
                    "set model.unwrap().num_classes to the number of the new one",
                    LowRankWarning,
                    stacklevel=2,
                )
        rows, count = rotation.rows, max(self.sizes)
        old = rotation.kept.new_zeros(len(rotation.kept), 0)  # the present directions, seen from the new U
        if self.ready:
            old = rotation.kept @ self.directions.double().T
        if rows.shape[1] < count:  # what so few do not tell stays as it is, in its order
            order = torch.arange(old.shape[1], 0, -1, dtype=old.dtype, device=old.device)
            length = torch.linalg.matrix_norm(rows) if rows.numel() else 1.0
            rows = torch.cat([rows, old * order * (_FAINT * length)], dim=1)
        new = leading(rows, count).T
        turned = new @ old  # of the new directions with the old ones
        turned = torch.block_diag(turned, turned.new_ones(1, 1))  # and the constant stays
        self.weight = (turned @ self.weight.double()).to(self.weight)
        self.moment = (turned @ self.moment.double() @ turned.T).to(self.moment)
        self.directions = new.to(self.weight).contiguous()  # as when it is loaded: products are rounded alike
        self._begin()

    # ------------------------------------------------------------------------------------------ devices and states

    def state(self) -> dict[str, Tensor]:
        """What resuming needs, bit for bit."""
        padded = functional.pad(self.directions, (1, 0, 1, 0))  # checkpoint writers drop tensors without elements
        return {"head.directions": padded, "head.weight": self.weight.clone(), "head.moment": self.moment.clone()}

    def load_state(self, state: dict[str, Tensor], kept: int) -> None:
        """Take over what `state` gave, for a W whose range has `kept` rows.

        Raises:
            ValueError: it is of another number of classes or of another W.
        """
        directions, weight, moment = state["head.directions"][1:, 1:], state["head.weight"], state["head.moment"]
        count = len(directions) + 1
        fits = weight.shape == (count, self.classes) and moment.shape == (count, count)
        fits &= directions.shape[1] in (0, kept)
        if not fits or len(directions) > max(self.sizes):
            raise ValueError(
                f"a subspace head of shape {tuple(weight.shape)} on {directions.shape[1]} directions does not fit "
                f"{self.classes} classes, sizes {self.sizes} and the {kept} directions of W"
            )
        directions, weight, moment = (part.to(self.weight, copy=True) for part in (directions, weight, moment))
        self.directions, self.weight, self.moment = directions.contiguous(), weight.contiguous(), moment.contiguous()
        self._begin()

    def to(self, device: torch.device) -> None:
        on_meta = self.weight.is_meta
        for name in ("directions", "weight", "moment", "_masks", "_read"):
            setattr(self, name, moved(getattr(self, name), device))
        self._sums = None if self._sums is None else moved(self._sums, device)
        if on_meta:
            self._begin()


def leading(
    rows: Tensor,  # (kept, p) float64
    count: int,
) -> Tensor:
    """The leading left singular vectors (kept, <= count), largest first.

    Of few rows exactly. Of many by subspace iteration from the samples themselves: an eigendecomposition of all that is
    kept would be the larger half of a projection, and the first of the directions, which tell the most, are exact to
    many digits all the same.
    """
    block = 2 * count
    if min(rows.shape) <= 4 * block:
        return torch.linalg.eigh(rows @ rows.T).eigenvectors.flip(1)[:, :count]
    # Sums of samples that are far apart; what they do not see, nothing would bring back.
    start = rows[:, : rows.shape[1] // block * block].unflatten(1, (-1, block)).sum(dim=1)
    for _ in range(_ITERATIONS):
        start = torch.linalg.qr(rows @ (rows.T @ start)).Q
    seen = start.T @ rows
    return start @ torch.linalg.eigh(seen @ seen.T).eigenvectors.flip(1)[:, :count]


def rows_of_labels(
    labels: Tensor,  # (batch,) integers, or (batch, classes) floating point
    rows: int,
    classes: int,
    counts: Tensor | None = None,  # (batch,) integers whose sum is `rows`; None means as many rows for each
) -> Tensor:
    """(rows, classes): the distribution over classes of each row.

    Labels may be class numbers, with any number outside of [0, classes) for a sample that does not count, such as -100;
    or a share for each class, as mixing of images makes them; or ones for all classes that are there, which then have
    equal shares. Rows with numbers outside of [0, 1] are no shares, and do not count either: they may be logits. Where
    a layer has several rows for an image, as tokens are, all have the image's label.

    Raises:
        ValueError: another shape.
    """
    _check_labels(labels, rows, classes, counts)
    if labels.dim() == 1:
        targets = (labels[:, None] == torch.arange(classes, device=labels.device)).float()
    else:
        targets = labels if labels.dtype == torch.float64 else labels.float()
        shares = ((targets >= 0) & (targets <= 1 + _ROUNDING)).all(dim=1, keepdim=True)  # NaN is none
        targets = torch.where(shares, targets, 0)
        targets = targets / targets.sum(dim=1, keepdim=True).clamp_min(1e-12)
    if counts is not None:
        return targets.repeat_interleave(counts.to(targets.device), dim=0, output_size=rows)
    return targets if rows == len(labels) else targets.repeat_interleave(rows // len(labels), dim=0)


def _check_labels(labels: Tensor, rows: int, classes: int, counts: Tensor | None = None) -> None:
    """Raises ValueError for labels of a shape or type that `rows_of_labels` does not take."""
    fits = fits_labels(labels, classes) and len(labels)
    if not fits or (rows % len(labels) if counts is None else len(counts) != len(labels)):
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} and type {labels.dtype} do not fit {rows} rows and "
            f"{classes} classes: the subspace head needs class numbers (batch,) or shares (batch, {classes})"
        )


def fits_labels(value: Any, classes: int | None) -> bool:
    """Whether `value` looks like the labels of a batch: what a criterion takes beside the logits may be anything."""
    if not isinstance(value, Tensor) or classes is None:
        return False
    if value.dim() == 1:
        return not (value.is_floating_point() or value.is_complex())
    return value.dim() == 2 and value.shape[1] == classes and not value.is_complex()
