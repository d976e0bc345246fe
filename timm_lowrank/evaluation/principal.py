"""Principal directions, by the smaller of the two Gram matrices."""

from __future__ import annotations

import torch
from torch import Tensor


def principal(
    matrix: Tensor,  # (n, m) float64, its columns centred by the caller
    count: int,
) -> tuple[Tensor, Tensor]:
    """Projections (n, count) on the leading principal directions, and these, (m, count) with orthonormal columns.

    Directions beyond the rank of the matrix carry nothing but round-off; they come back as zeros. Signs are those
    of LAPACK. Takes 8 * min(n, m)^2 bytes and `count` may be at most min(n, m).
    """
    rows, width = matrix.shape
    wide = width > rows
    energies, vectors = torch.linalg.eigh(matrix @ matrix.T if wide else matrix.T @ matrix)
    energies, vectors = energies[-count:].flip(0), vectors[:, -count:].flip(1)
    lost = energies <= min(rows, width) * torch.finfo(matrix.dtype).eps * energies[0]
    basis = matrix.T @ vectors / energies.clamp_min(torch.finfo(matrix.dtype).tiny).sqrt() if wide else vectors
    basis = basis.masked_fill(lost, 0.0)
    return matrix @ basis, basis
