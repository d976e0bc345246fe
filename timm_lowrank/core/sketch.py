"""`SpectrumSketch`: the leading energies of a centred matrix that is seen once, batch by batch, with a bound.

A Frequent Directions sketch (Liberty 2013; Ghashami, Liberty, Phillips, Woodruff 2016) of the scatter
S = sum_i (a_i - mean)(a_i - mean)^T of the rows a_i. It keeps a buffer B of at most 2 * size rows. When B is
full, the eigenvalues of B B^T are lowered by the (size + 1)-th one, which empties half of the buffer, and that
amount is added to the shrinkage delta. In exact arithmetic 0 <= S - B^T B <= delta I at all times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .matrices import (
    BLOCK_ELEMENTS,
    as_matrix,
    check_ranks,
    check_rows,
    check_share,
    check_values,
    check_variance,
    compute_device,
)

_FLOAT64_SLACK = 1e-14  # relative to the total energy: round-off of one Gram matrix and its decomposition
_LARGEST = {torch.float32: 1e30, torch.float64: 1e140}  # beyond these a row or its square may overflow


class SpectrumSketch:
    """Leading energies (squared singular values) of centred activations in one pass and little memory.

    Every batch is centred by its own mean and the shift between means enters as one more row,
    sqrt(n1 n2 / (n1 + n2)) (mean1 - mean2): the centring is exact and nothing cancels. The true energies
    e_1 >= e_2 >= ... of all rows seen satisfy

        energies()[i] <= e_i <= energies()[i] + error_bound,

    energies that the sketch does not list (i beyond its length) being at most `error_bound`. `error_bound` is the
    accumulated shrinkage, which is at most total / size and zero while the rank of the centred rows is at most
    `size`, plus the measured rounding of the rows to `dtype` (of the order of 1e-6 of the total for float32) and
    an allowance of 1e-14 of the total for each decomposition in float64.

    Memory is 2 * size * num_features elements of `dtype`, 64 MiB for 16,384 features at size 512 in float32,
    besides blocks of 32 MiB and matrices of 2 * size x 2 * size. Each `size` rows cost one shrink,
    12 * size^2 * num_features flops in float64.

    Args:
        num_features: m, the width of the rows.
        size: directions kept after a shrink, capped at num_features. Take at least twice the rank of interest.
        device: of the sketch; None takes the first batch's (the CPU where the device has no float64).
        dtype: in which rows are kept, torch.float32 or torch.float64; sums and decompositions are float64.

    Raises:
        ValueError: for num_features or size below 1, or another dtype.
    """

    def __init__(
        self,
        num_features: int,
        size: int = 512,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if num_features < 1 or size < 1:
            raise ValueError(f"num_features and size must be at least 1, got {num_features} and {size}")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
        self.num_features = num_features
        self.size = min(size, num_features)
        self.dtype = dtype
        self.count = 0  # rows seen
        self.total = 0.0  # tr S, exact up to float64
        self._device = None if device is None else compute_device(torch.device(device))
        self._rows = torch.empty(0, num_features, dtype=dtype)  # B, (2 * size, m) from the first row on
        self._mean = torch.zeros(num_features, dtype=torch.float64)
        self._filled = 0
        self._raw = 0.0  # energy before centring
        self._delta = 0.0
        self._rounding = 0.0
        self._decompositions = 0

    @property
    def mean(self) -> Tensor:
        """The mean of all rows seen, (m,), float64. Raises ValueError before the first row."""
        if not self.count:
            raise ValueError("the sketch is empty: update() it with activations first")
        return self._mean.clone()

    @property
    def error_bound(self) -> float:
        """How far an energy of `energies()` may lie below the true one."""
        return self._delta + 2.0 * self._slack()

    @torch.no_grad()
    def update(
        self,
        batch: Tensor,  # (n, m) or (n, ...), any float dtype and device; n may be 0
    ) -> None:
        """Takes in n more rows. On an error the sketch is as it was.

        Raises:
            TypeError: if `batch` is not a floating-point tensor.
            ValueError: if it has other than m features, or a value is not finite.
        """
        batch = as_matrix(batch)
        if batch.shape[1] != self.num_features:
            raise ValueError(f"the batch has {batch.shape[1]} features, the sketch is of {self.num_features}")
        if not len(batch):
            return
        check_values(batch, _LARGEST[self.dtype])
        if not self.count:
            self._device = self._device or compute_device(batch.device)
            shape = (2 * self.size, self.num_features)
            self._rows = torch.zeros(shape, device=self._device, dtype=self.dtype)
            self._mean = self._mean.to(self._device)
        for chunk in batch.split(max(1, BLOCK_ELEMENTS // self.num_features)):
            rows = chunk.to(self._device).double()
            self._raw += float(rows.square().sum())
            mean = rows.mean(0)
            shift = mean - self._mean
            if len(rows) > 1:
                self._insert(rows - mean)
            if self.count:
                self._insert(math.sqrt(self.count * len(rows) / (self.count + len(rows))) * shift[None])
            self._mean += len(rows) / (self.count + len(rows)) * shift
            self.count += len(rows)

    def energies(self) -> Tensor:
        """Lower ends of the true energies, descending, float64, at most min(2 * size, m, count - 1) of them.

        Raises:
            ValueError: if fewer than two rows were seen, or all rows were equal.
        """
        check_rows(self.count)
        check_variance(self.total, self._raw)
        values = torch.linalg.eigvalsh(self._gram()).flip(0)[: self.max_rank]
        return (values - self._slack()).clamp_(min=0.0)

    @property
    def max_rank(self) -> int:
        """The largest rank that the centred rows can have, min(m, count - 1)."""
        return min(self.num_features, max(self.count - 1, 0))

    def variance_ratio(self, ranks: Sequence[int]) -> list[tuple[float, float]]:
        """For each r of `ranks`, bounds (lower, upper) of the share of the total in the r largest energies.

        The upper end uses both that no energy was shrunk by more than `error_bound` and that all of them
        together lost no more than the total lacks. From r = min(m, count - 1) on both ends are 1.

        Raises:
            ValueError: for bad ranks, fewer than two rows, or all rows equal.
        """
        return self._bounds(check_ranks(ranks), self.energies())

    def _bounds(self, ranks: Sequence[int], energies: Tensor) -> list[tuple[float, float]]:
        kept = energies.cumsum(0).tolist()
        missing = max(self.total - kept[-1], 0.0)
        bounds = []
        for rank in ranks:
            if rank >= self.max_rank:
                bounds.append((1.0, 1.0))
                continue
            lower = kept[min(rank, len(kept)) - 1]
            upper = lower + min(rank * self.error_bound, missing + (2 * rank + 1) * self._slack())
            bounds.append((min(lower / self.total, 1.0), min(upper / self.total, 1.0)))
        return bounds

    def effective_rank(self, share: float = 0.99) -> tuple[int, int]:
        """Bounds (lower, upper) of the number of directions that hold `share` of the total energy.

        Raises:
            ValueError: for a share outside (0, 1], fewer than two rows, all rows equal, or if the directions
                that the sketch holds do not certainly reach `share`.
        """
        check_share(share)
        energies = self.energies()
        bounds = self._bounds(range(1, len(energies) + 1), energies)
        upper = next((rank for rank, (low, _) in enumerate(bounds, 1) if low >= share), None)
        if upper is None:
            raise ValueError(
                f"the sketch of size {self.size} certifies no more than {bounds[-1][0]:.4f} of the variance in "
                f"its {len(bounds)} directions, {share} was asked for: enlarge the sketch"
            )
        return next(rank for rank, (_, high) in enumerate(bounds, 1) if high >= share), upper

    def _slack(self) -> float:
        """Bound of the spectral norm of what rounding added to or took from B^T B."""
        return self._rounding + (self._decompositions + 1) * _FLOAT64_SLACK * self.total

    def _insert(self, rows: Tensor) -> None:
        """Adds float64 rows (k, m) to the buffer and to the total, shrinking as often as it is full."""
        self.total += float(rows.square().sum())
        while len(rows):
            if self._filled == 2 * self.size:
                self._shrink()
            space = 2 * self.size - self._filled
            self._store(rows[:space], self._filled)
            self._filled += len(rows[:space])
            rows = rows[space:]

    def _store(self, rows: Tensor, start: int) -> None:
        """Writes float64 rows (k, m) into the buffer and books what rounding them to `dtype` may change.

        For X stored as X + E, ||(X + E)^T (X + E) - X^T X||_2 <= 2 ||X||_F ||E||_F + ||E||_F^2.
        """
        target = self._rows[start : start + len(rows)]
        target.copy_(rows)
        if self.dtype != torch.float64:
            error = float((target.double() - rows).norm())
            self._rounding += (2.0 * float(rows.norm()) + error) * error

    def _gram(self) -> Tensor:
        """B B^T of the filled rows, float64, in blocks of columns."""
        rows = self._rows[: self._filled]
        gram = rows.new_zeros((len(rows), len(rows)), dtype=torch.float64)
        for block in rows.split(max(1, BLOCK_ELEMENTS // max(len(rows), 1)), dim=1):
            wide = block.double()
            gram.addmm_(wide, wide.T)
        return gram

    def _shrink(self) -> None:
        """Rotates B to its principal directions, lowers every energy by the (size + 1)-th, keeps `size` rows."""
        values, vectors = torch.linalg.eigh(self._gram())
        values, vectors = values.flip(0), vectors.flip(1)
        cut = values[self.size].clamp(min=0.0)
        # row i becomes sqrt(1 - cut / value_i) u_i^T B, of energy value_i - cut
        kept = values[: self.size].clamp(min=torch.finfo(torch.float64).tiny)
        scales = (1.0 - cut / kept).clamp(min=0.0).sqrt()
        rotation = scales[:, None] * vectors[:, : self.size].T  # (size, 2 * size)
        self._delta += float(cut)
        self._decompositions += 1
        self._rotate(rotation)

    def _rotate(self, rotation: Tensor) -> None:
        """B <- rotation B in blocks of columns, with the rounding booked for all blocks together."""
        error, energy = 0.0, 0.0
        for block in self._rows.split(max(1, BLOCK_ELEMENTS // len(self._rows)), dim=1):
            rotated = rotation @ block.double()
            block[: self.size].copy_(rotated)
            if self.dtype != torch.float64:
                error += float((block[: self.size].double() - rotated).square().sum())
                energy += float(rotated.square().sum())
        self._rounding += 2.0 * math.sqrt(energy * error) + error
        self._filled = self.size
