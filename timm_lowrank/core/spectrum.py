"""Variance ratio, effective rank and spectrum of activations (paper, Section 3, "Effective Rank").

All are of centred activations A (n samples, m features): sigma_i are the singular values of A minus its mean row,
and sigma_i^2 / (n - 1) the variances along its principal directions.

A tensor is treated exactly, through the Gram matrix of its smaller side. An iterable of batches is read once and
summarised by a `Sketch`, whose size sets memory and error: 16,384 features at size 1,000 take 130 MB, however many
samples there are. Batches that come one at a time go into a `Sketch` of one's own:

>>> sketch = Sketch(num_features=3, size=2)
>>> for batch in torch.eye(3).split(1):
...     sketch.update(batch)
>>> sketch.energies().sum().round(decimals=5), sketch.effective_rank()
(tensor(2., dtype=torch.float64), (2, 2))
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

__all__ = ["Sketch", "effective_rank", "rank_of_ratios", "singular_energies", "variance_ratio"]

Activations = Tensor | Iterable[Tensor]

BLOCK_ELEMENTS = 2**22  # float64 elements of one block of work, 32 MiB

_DEFAULT_SIZE = 512
_SMALLEST_SIZE = 128
_SHARE_TOLERANCE = 1e-12  # shares that differ by less are equal: float64 round-off of the sums
_ZERO_VARIANCE = 2.0**-88  # share of the raw energy below which the centred energy is round-off of float64
_FLOAT64_SLACK = 1e-14  # relative to the total energy: round-off of one Gram matrix and its decomposition
_LARGEST = {torch.float32: 1e30, torch.float64: 1e140}  # beyond these a row or its square may overflow


def singular_energies(
    activations: Activations,  # (n, m) or (n, ...), any float dtype; or batches of it
    *,
    centred: bool = True,
    sketch_size: int = _DEFAULT_SIZE,
) -> Tensor:
    """Squared singular values sigma_1^2 >= sigma_2^2 >= ... of the centred activations, float64.

    With centred=False those of the activations as they are, which is what the paper's formula says: there the mean
    counts as a direction, and mostly it is the first. Of a tensor alone.

    Of a tensor: all min(n, m), with an absolute error of the order of 1e-15 sigma_1^2. What lies below the
    round-off of float64, min(n, m) * 2^-52 * sigma_1^2, is returned as 0. Takes 8 * min(n, m)^2 bytes for the
    Gram matrix and blocks of 32 MiB; no float64 copy of the activations is made.

    Of an iterable of batches: the certified lower ends of the first at most 2 * sketch_size; each true value is
    larger by at most `Sketch.error_bound`, at most total / sketch_size plus the rounding described there.

    Raises:
        TypeError: if activations are not floating-point tensors.
        ValueError: if there are fewer than two rows, no features, values that are not finite, no variance, batches
            of different widths, or batches that are not to be centred.
    """
    if isinstance(activations, Tensor):
        return _exact_energies(_as_matrix(activations), centred=centred)
    if not centred:
        raise ValueError("batches are always centred: give one tensor, or centred=True")
    return Sketch.of(activations, sketch_size).energies()


def variance_ratio(
    activations: Activations,  # (n, m) or (n, ...), any float dtype; or batches of it
    ranks: Sequence[int],
    *,
    sketch_size: int | None = None,
) -> list[float]:
    """sum_{i <= r} sigma_i^2 / sum_i sigma_i^2 of the centred activations for every r in `ranks`.

    1.0 for r beyond the rank of the activations. Exact for a tensor (absolute error of the order of 1e-15 r).
    For an iterable of batches the certified lower end is returned: the true ratio is larger by at most
    r * error_bound / total, where error_bound <= total / sketch_size in the worst case and far less for a
    decaying spectrum; use `Sketch` itself for both ends. `sketch_size` is by default twice the largest
    of `ranks` and at least 128.

    Raises:
        TypeError, ValueError: as `singular_energies`, and for ranks that are empty or not integers >= 1.
    """
    checked = _check_ranks(ranks)
    if not isinstance(activations, Tensor):
        size = max(2 * max(checked), _SMALLEST_SIZE) if sketch_size is None else sketch_size
        return [lower for lower, _ in Sketch.of(activations, size).variance_ratio(checked)]
    held = singular_energies(activations).cumsum(0)
    return [float(held[min(rank, len(held)) - 1] / held[-1]) for rank in checked]


def effective_rank(
    activations: Activations,  # (n, m) or (n, ...), any float dtype; or batches of it
    share: float = 0.99,
    *,
    sketch_size: int = _DEFAULT_SIZE,
) -> int:
    """The smallest r whose variance ratio reaches `share`, to within 1e-12.

    Exact for a tensor. For an iterable of batches the certified upper end: so many directions do hold `share`;
    the true number may be smaller.

    Raises:
        TypeError, ValueError: as `singular_energies`, for a share outside (0, 1], and for batches whose sketch
            is too small to certify `share` (the message says to enlarge `sketch_size`).
    """
    _check_share(share)
    if not isinstance(activations, Tensor):
        return Sketch.of(activations, sketch_size).effective_rank(share)[1]
    held = singular_energies(activations).cumsum(0)
    return rank_of_ratios((held / held[-1]).tolist(), share)


def rank_of_ratios(ratios: Iterable[float], share: float = 0.99) -> int:
    """The smallest r whose variance ratio reaches `share`, to within 1e-12, of the `ratios` for r = 1, 2, ..."""
    return 1 + sum(ratio < share - _SHARE_TOLERANCE for ratio in ratios)


class Sketch:
    """Leading energies (squared singular values) of centred activations in one pass and little memory.

    A Frequent Directions sketch (Liberty 2013; Ghashami, Liberty, Phillips, Woodruff 2016) of the scatter
    S = sum_i (a_i - mean)(a_i - mean)^T of the rows a_i. It keeps a buffer B of at most 2 * size rows. When B is full,
    the eigenvalues of B B^T are lowered by the (size + 1)-th one, which empties half of the buffer, and that amount is
    added to the shrinkage delta. In exact arithmetic 0 <= S - B^T B <= delta I at all times.

    Every batch is centred by its own mean and the shift between means enters as one more row,
    sqrt(n1 n2 / (n1 + n2)) (mean1 - mean2): the centring is exact and nothing cancels. The true energies
    e_1 >= e_2 >= ... of all rows seen satisfy

        energies()[i] <= e_i <= energies()[i] + error_bound,

    energies that the sketch does not list (i beyond its length) being at most `error_bound`. `error_bound` is the
    accumulated shrinkage, which is at most total / size and zero while the rank of the centred rows is at most
    `size`, plus the measured rounding of the rows to `dtype` (of the order of 1e-6 of the total for float32) and
    an allowance of 1e-14 of the total for each decomposition in float64.

    It lives where its first batch does, or on the CPU where that device has no float64. Memory is
    2 * size * num_features elements of `dtype`, 64 MiB for 16,384 features at size 512 in float32,
    besides blocks of 32 MiB and matrices of 2 * size x 2 * size. Each `size` rows cost one shrink,
    12 * size^2 * num_features flops in float64.

    Args:
        num_features: m, the width of the rows.
        size: directions kept after a shrink, capped at num_features. Take at least twice the rank of interest.
        dtype: in which rows are kept, torch.float32 or torch.float64; sums and decompositions are float64.

    Raises:
        ValueError: for num_features or size below 1, or another dtype.
    """

    def __init__(
        self,
        num_features: int,
        size: int = _DEFAULT_SIZE,
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
        self._rows = torch.empty(0, num_features, dtype=dtype)  # B, (2 * size, m) from the first row on
        self._mean = torch.zeros(num_features, dtype=torch.float64)
        self._filled = 0
        self._raw = 0.0  # energy before centring
        self._delta = 0.0
        self._rounding = 0.0
        self._decompositions = 0

    @classmethod
    def of(
        cls,
        batches: Iterable[Tensor],  # each (n_i, m) or (n_i, ...), any float dtype
        size: int = _DEFAULT_SIZE,
    ) -> Sketch:
        """A sketch of all batches, on the device of the first; float64 if that is float64.

        Raises:
            TypeError: if a batch is not a floating-point tensor.
            ValueError: if there is no batch, or as `update`, which names the batch.
        """
        sketch: Sketch | None = None
        for index, batch in enumerate(batches):
            try:
                if sketch is None:
                    dtype = torch.float64 if _as_matrix(batch).dtype == torch.float64 else torch.float32
                    sketch = cls(_as_matrix(batch).shape[1], size, dtype=dtype)
                sketch.update(batch)
            except (TypeError, ValueError) as error:
                raise type(error)(f"batch {index}: {error}") from error
        if sketch is None:
            raise ValueError("activations are empty: there was no batch")
        return sketch

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
        batch = _as_matrix(batch)
        if batch.shape[1] != self.num_features:
            raise ValueError(f"the batch has {batch.shape[1]} features, the sketch is of {self.num_features}")
        if not len(batch):
            return
        _check_values(batch, _LARGEST[self.dtype])
        if not self.count:
            shape, device = (2 * self.size, self.num_features), _compute_device(batch.device)
            self._rows, self._mean = torch.zeros(shape, device=device, dtype=self.dtype), self._mean.to(device)
        for chunk in batch.split(max(1, BLOCK_ELEMENTS // self.num_features)):
            rows = chunk.to(self._mean.device).double()
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
        _check_rows(self.count)
        _check_variance(self.total, self._raw)
        values = torch.linalg.eigvalsh(self._gram()).flip(0)[: self._max_rank]
        return (values - self._slack()).clamp_(min=0.0)

    @property
    def _max_rank(self) -> int:
        """The largest rank that the centred rows can have, min(m, count - 1)."""
        return min(self.num_features, max(self.count - 1, 0))

    def variance_ratio(self, ranks: Sequence[int]) -> list[tuple[float, float]]:
        """For each r of `ranks`, bounds (lower, upper) of the share of the total in the r largest energies.

        The upper end uses both that no energy was shrunk by more than `error_bound` and that all of them
        together lost no more than the total lacks. From r = min(m, count - 1) on both ends are 1.

        Raises:
            ValueError: for bad ranks, fewer than two rows, or all rows equal.
        """
        return self._bounds(_check_ranks(ranks), self.energies())

    def _bounds(self, ranks: Sequence[int], energies: Tensor) -> list[tuple[float, float]]:
        kept = energies.cumsum(0).tolist()
        missing = max(self.total - kept[-1], 0.0)
        bounds = []
        for rank in ranks:
            if rank >= self._max_rank:
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
        _check_share(share)
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
            stored = rows[: 2 * self.size - self._filled]
            target = self._rows[self._filled : self._filled + len(stored)]
            target.copy_(stored)
            error = float((target.double() - stored).norm())
            # For X stored as X + E: ||(X + E)^T (X + E) - X^T X||_2 <= 2 ||X||_F ||E||_F + ||E||_F^2.
            self._rounding += (2.0 * float(stored.norm()) + error) * error
            self._filled += len(stored)
            rows = rows[len(stored) :]

    def _gram(self) -> Tensor:
        """B B^T of the filled rows, float64."""
        return _gram_of_rows(self._rows[: self._filled], centred=False)[0]

    def _shrink(self) -> None:
        """Rotates B to its principal directions, lowers every energy by the (size + 1)-th, keeps `size` rows."""
        values, vectors = torch.linalg.eigh(self._gram())
        values, vectors = values.flip(0), vectors.flip(1)
        cut = values[self.size].clamp(min=0.0)
        # row i becomes sqrt(1 - cut / value_i) u_i^T B, of energy value_i - cut
        kept = values[: self.size].clamp(min=torch.finfo(torch.float64).tiny)
        scales = (1.0 - cut / kept).clamp(min=0.0).sqrt()
        rotation = scales[:, None] * vectors[:, : self.size].T  # (size, 2 * size)
        error, energy = 0.0, 0.0
        for block in self._rows.split(max(1, BLOCK_ELEMENTS // len(self._rows)), dim=1):
            rotated = rotation @ block.double()
            block[: self.size].copy_(rotated)
            error += float((block[: self.size].double() - rotated).square().sum())
            energy += float(rotated.square().sum())
        self._rounding += 2.0 * math.sqrt(energy * error) + error
        self._delta += float(cut)
        self._decompositions += 1
        self._filled = self.size


# --------------------------------------------------------------------------------------------------- exact, of a tensor


@torch.no_grad()
def _exact_energies(
    matrix: Tensor,  # (n, m), any float dtype
    *,
    centred: bool,
) -> Tensor:
    rows, columns = matrix.shape
    _check_rows(rows)
    _check_values(matrix, largest=1e140)
    gram_of = _gram_of_rows if rows <= columns else _gram_of_columns
    gram, raw = gram_of(matrix, centred=centred)
    _check_variance(float(gram.trace()), raw)
    energies = torch.linalg.eigvalsh(gram).flip(0)
    noise = len(energies) * torch.finfo(torch.float64).eps * energies[0]
    return torch.where(energies > noise, energies, 0.0)


def _gram_of_rows(matrix: Tensor, *, centred: bool) -> tuple[Tensor, float]:
    """C C^T (n, n) of the matrix C, centred or as it is, and its energy before that, in blocks of columns."""
    device = _compute_device(matrix.device)
    gram = torch.zeros(len(matrix), len(matrix), device=device, dtype=torch.float64)
    raw = 0.0
    for block in matrix.split(max(1, BLOCK_ELEMENTS // len(matrix)), dim=1):
        wide = block.to(device).double()
        raw += float(wide.square().sum())
        if centred:
            wide = wide - wide.mean(0)
        gram.addmm_(wide, wide.T)
    return gram, raw


def _gram_of_columns(matrix: Tensor, *, centred: bool) -> tuple[Tensor, float]:
    """C^T C (m, m) of the matrix C, centred or as it is, and its energy before that, in blocks of rows."""
    device, width = _compute_device(matrix.device), matrix.shape[1]
    blocks = matrix.split(max(1, BLOCK_ELEMENTS // width))
    mean = torch.zeros(width, device=device, dtype=torch.float64)
    for block in blocks if centred else ():
        mean += block.to(device).double().sum(0) / len(matrix)
    gram = torch.zeros(width, width, device=device, dtype=torch.float64)
    raw = 0.0
    for block in blocks:
        wide = block.to(device).double()
        raw += float(wide.square().sum())
        wide = wide - mean
        gram.addmm_(wide.T, wide)
    return gram, raw


# -------------------------------------------------------------------------------------------------------------- checks


def _as_matrix(
    activations: Tensor,  # (n, ...), any float dtype
) -> Tensor:
    """`activations` as a detached (n, m) matrix of the same dtype, everything behind the batch flattened.

    Raises:
        TypeError: if they are not a floating-point tensor.
        ValueError: if there is no feature dimension, or it is empty.
    """
    if not isinstance(activations, Tensor):
        raise TypeError(
            f"activations must be tensors, got {type(activations).__name__}: "
            "pass the features alone, as torch.Tensor of shape (n, m)"
        )
    if not activations.is_floating_point():
        raise TypeError(f"activations must be of a floating-point dtype, got {activations.dtype}")
    if activations.ndim < 2 or math.prod(activations.shape[1:]) == 0:
        raise ValueError(f"activations must be of shape (n, m) with m >= 1 features, got {tuple(activations.shape)}")
    return activations.detach().flatten(1)


def _check_values(
    matrix: Tensor,  # (n, m), n >= 1
    largest: float,
) -> None:
    """Raises ValueError if an element is not finite, or above `largest` in absolute value."""
    low, high = (float(end) for end in torch.aminmax(matrix))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("activations hold NaN or infinite values")
    if max(-low, high) > largest:
        raise ValueError(f"activations reach {max(-low, high):.1e}: divide them by a constant first")


def _compute_device(device: torch.device) -> torch.device:
    """`device` where it has float64, else the CPU."""
    return torch.device("cpu") if device.type == "mps" else device


def _check_ranks(ranks: Iterable[int]) -> list[int]:
    """`ranks` as a list of positive ints.

    Raises:
        ValueError: if there are none, or one is not an integer >= 1.
    """
    checked: list[int] = []
    for rank in [ranks] if isinstance(ranks, int) else ranks:
        try:
            checked.append(-1 if isinstance(rank, bool) else operator.index(rank))
        except TypeError:
            checked.append(-1)
        if checked[-1] < 1:
            raise ValueError(f"ranks must be integers >= 1, got {rank!r}")
    if not checked:
        raise ValueError("ranks is empty: name at least one number of directions")
    return checked


def _check_share(share: float) -> None:
    """Raises ValueError unless `share` lies in (0, 1]."""
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share must lie in (0, 1], got {share!r}")


def _check_rows(rows: int) -> None:
    """Raises ValueError unless there are at least two rows."""
    if rows == 0:
        raise ValueError("activations are empty: no rows were given")
    if rows == 1:
        raise ValueError("one row has no variance: give the activations of at least two samples")


def _check_variance(centred: float, raw: float) -> None:
    """Raises ValueError unless `centred` energy is more than what round-off leaves of `raw` energy."""
    if centred <= _ZERO_VARIANCE * raw:
        raise ValueError("the activations have no variance: all rows are equal")
