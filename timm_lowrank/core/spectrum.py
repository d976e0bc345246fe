"""Variance ratio, effective rank and spectrum of activations (paper, Section 3, "Effective Rank").

All are of centred activations A (n samples, m features): sigma_i are the singular values of A minus its mean row,
and sigma_i^2 / (n - 1) the variances along its principal directions.

A tensor is treated exactly, through the Gram matrix of its smaller side. An iterable of batches is read once and
summarised by a `SpectrumSketch`, whose size sets memory and error: 16,384 features at size 1,000 take 130 MB,
however many samples there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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
from .sketch import SpectrumSketch

__all__ = ["SpectrumSketch", "effective_rank", "singular_energies", "sketch", "variance_ratio"]

Activations = Tensor | Iterable[Tensor]

_DEFAULT_SIZE = 512
_SMALLEST_SIZE = 128
_SHARE_TOLERANCE = 1e-12  # shares that differ by less are equal: float64 round-off of the sums


def singular_energies(
    activations: Activations,  # (n, m) or (n, ...), any float dtype; or batches of it
    *,
    sketch_size: int = _DEFAULT_SIZE,
) -> Tensor:
    """Squared singular values sigma_1^2 >= sigma_2^2 >= ... of the centred activations, float64.

    Of a tensor: all min(n, m), with an absolute error of the order of 1e-15 sigma_1^2. What lies below the
    round-off of float64, min(n, m) * 2^-52 * sigma_1^2, is returned as 0. Takes 8 * min(n, m)^2 bytes for the
    Gram matrix and blocks of 32 MiB; no float64 copy of the activations is made.

    Of an iterable of batches: the certified lower ends of the first at most 2 * sketch_size; each true value is
    larger by at most `SpectrumSketch.error_bound`, at most total / sketch_size plus the rounding described there.

    Raises:
        TypeError: if activations are not floating-point tensors.
        ValueError: if there are fewer than two rows, no features, values that are not finite, no variance, or
            batches of different widths.
    """
    if isinstance(activations, Tensor):
        return _exact_energies(as_matrix(activations))
    return sketch(activations, sketch_size).energies()


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
    decaying spectrum; use `SpectrumSketch` itself for both ends. `sketch_size` is by default twice the largest
    of `ranks` and at least 128.

    Raises:
        TypeError, ValueError: as `singular_energies`, and for ranks that are empty or not integers >= 1.
    """
    checked = check_ranks(ranks)
    if not isinstance(activations, Tensor):
        size = max(2 * max(checked), _SMALLEST_SIZE) if sketch_size is None else sketch_size
        return [lower for lower, _ in sketch(activations, size).variance_ratio(checked)]
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
    check_share(share)
    if not isinstance(activations, Tensor):
        return sketch(activations, sketch_size).effective_rank(share)[1]
    held = singular_energies(activations).cumsum(0)
    return 1 + int((held / held[-1] < share - _SHARE_TOLERANCE).sum())


def sketch(
    batches: Iterable[Tensor],  # each (n_i, m) or (n_i, ...), any float dtype
    size: int = _DEFAULT_SIZE,
) -> SpectrumSketch:
    """A `SpectrumSketch` of `size` of all batches, on the device of the first; float64 if that is float64.

    Raises:
        TypeError: if a batch is not a floating-point tensor.
        ValueError: if there is no batch, or as `SpectrumSketch.update`, which names the batch.
    """
    summary: SpectrumSketch | None = None
    for index, batch in enumerate(batches):
        try:
            if summary is None:
                width = as_matrix(batch).shape[1]
                dtype = torch.float64 if batch.dtype == torch.float64 else torch.float32
                summary = SpectrumSketch(width, size, dtype=dtype)
            summary.update(batch)
        except (TypeError, ValueError) as error:
            raise type(error)(f"batch {index}: {error}") from error
    if summary is None:
        raise ValueError("activations are empty: there was no batch")
    return summary


@torch.no_grad()
def _exact_energies(
    matrix: Tensor,  # (n, m), any float dtype
) -> Tensor:
    rows, columns = matrix.shape
    check_rows(rows)
    check_values(matrix, largest=1e140)
    gram, raw = _gram_of_rows(matrix) if rows <= columns else _gram_of_columns(matrix)
    check_variance(float(gram.trace()), raw)
    energies = torch.linalg.eigvalsh(gram).flip(0)
    noise = len(energies) * torch.finfo(torch.float64).eps * energies[0]
    return torch.where(energies > noise, energies, 0.0)


def _gram_of_rows(matrix: Tensor) -> tuple[Tensor, float]:
    """C C^T (n, n) of the centred matrix C, and the energy before centring, in blocks of columns."""
    device = compute_device(matrix.device)
    gram = torch.zeros(len(matrix), len(matrix), device=device, dtype=torch.float64)
    raw = 0.0
    for block in matrix.split(max(1, BLOCK_ELEMENTS // len(matrix)), dim=1):
        wide = block.to(device).double()
        raw += float(wide.square().sum())
        wide = wide - wide.mean(0)
        gram.addmm_(wide, wide.T)
    return gram, raw


def _gram_of_columns(matrix: Tensor) -> tuple[Tensor, float]:
    """C^T C (m, m) of the centred matrix C, and the energy before centring, in blocks of rows, in two passes."""
    device, width = compute_device(matrix.device), matrix.shape[1]
    blocks = matrix.split(max(1, BLOCK_ELEMENTS // width))
    mean = torch.zeros(width, device=device, dtype=torch.float64)
    for block in blocks:
        mean += block.to(device).double().sum(0) / len(matrix)
    gram = torch.zeros(width, width, device=device, dtype=torch.float64)
    raw = 0.0
    for block in blocks:
        wide = block.to(device).double()
        raw += float(wide.square().sum())
        wide = wide - mean
        gram.addmm_(wide.T, wide)
    return gram, raw
