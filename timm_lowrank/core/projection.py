"""Rank projections: the hard thresholding operator of Algorithm 2, line 13.

Each of the three methods stands here twice. `exact`, `nystrom` and `subspace` take a dense symmetric matrix and
are written as literally as torch allows. Their `*_factored` twins take the same matrix as W = B^T M B, given by
its core M (k, k) and the Gram matrix G = B B^T (k, k), and return the result in the coordinates of B: nothing in
them is larger than k x k. The twins agree to rounding; the tests hold them to it.

What goes through a Gram matrix, which squares the condition number, is done in float64: in float32 the small
directions would be lost. What stands in orthonormal coordinates is done in the dtype of M.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import CollapseError, ProjectionWarning

_DEPENDENT = 1e-13  # of the largest eigenvalue of a Gram matrix: below it a direction is rounding noise
_NOISE = {torch.float64: 1e-13, torch.float32: 1e-6}  # of the largest eigenvalue of W, in orthonormal coordinates
_COLUMNS = 64  # random ones at a time
_WELL_CONDITIONED = 1e-5  # smallest over largest Cholesky pivot that the fast orthonormalisation accepts


class CoreProjection(NamedTuple):
    """A rank-r symmetric matrix in the coordinates of a row basis B: sum_i eigenvalues[i] q_i q_i^T with
    q_i = B^T vectors[:, i]."""

    vectors: Tensor  # (k, r) float64, orthonormal in the inner product of G
    eigenvalues: Tensor  # (r,) float64, by magnitude, largest first
    seen: Tensor  # G vectors (k, r) float64, the products of B with the q_i


# ---------------------------------------------------------------------------------------------- dense, literal


def exact(
    matrix: Tensor,  # (m, m) symmetric, float32 or float64
    rank: int,
) -> Tensor:
    """The best rank-`rank` approximation in Frobenius norm: the eigenvalues of largest magnitude and their vectors."""
    eigenvalues, vectors = _eigh(matrix)
    keep = eigenvalues.abs().argsort(descending=True)[:rank]
    return (vectors[:, keep] * eigenvalues[keep]) @ vectors[:, keep].T


def nystrom(
    matrix: Tensor,  # (m, m) symmetric positive semidefinite, float32 or float64
    rank: int,
    columns: int | None = None,
    runs: int = 4,
    generator: torch.Generator | None = None,
    *,
    truncate: bool = True,
) -> Tensor:
    """The paper's ensembled Nystrom approximation (Appendix B.2, equation 3): the mean over `runs` of C Z_r^+ C^T.

    Each run samples `columns` (None: 2 * rank) of the m columns uniformly without replacement. The mean of t
    matrices of rank r has rank up to t r; the paper leaves it there. `truncate` projects it once more, so that
    the promise rank(W) <= r holds.
    """
    total = torch.zeros_like(matrix)
    for sample in nystrom_samples(matrix.shape[0], rank, columns, runs, generator):
        c = matrix[:, sample.to(matrix.device)]
        root = _inverse_root(c[sample.to(matrix.device)], rank)
        total += (c @ root) @ (c @ root).T / runs
    return exact(total, rank) if truncate else total


def subspace(
    matrix: Tensor,  # (m, m) symmetric, float32 or float64
    rank: int,
    start: Tensor | None = None,  # (m, s): a guess of the leading eigenvectors, for example the previous result's
    oversampling: int = 10,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One step of subspace iteration from `start`, widened by random columns, and a Rayleigh-Ritz truncation.

    It computes the best rank-`rank` approximation within the range of `matrix @ [start, random]`. It does not
    iterate to convergence: W moves little between two projections, and the previous factor is a good start. On a
    slowly decaying spectrum the error was 1 to 7 % above the best one's (`benchmarks/projection.py`).
    """
    wide = widen(start, matrix.shape[0], rank, oversampling, generator).to(matrix)
    q, _ = torch.linalg.qr(matrix @ wide)
    return q @ exact(q.T @ matrix @ q, rank) @ q.T


# ------------------------------------------------------------------------------------------------- factored twins


def exact_factored(
    core: Tensor,  # (k, k) M, symmetric, float32 or float64
    gram: Tensor,  # (k, k) G = B B^T, of the same dtype
    rank: int,
) -> CoreProjection:
    """`exact` of B^T M B. Costs two eigendecompositions of size k, in float64."""
    identity = torch.eye(core.shape[0], dtype=torch.float64, device=core.device)
    return _ritz(core.double(), gram.double(), identity, rank)


def nystrom_factored(
    core: Tensor,  # (k, k) M, symmetric positive semidefinite, float32 or float64
    gram: Tensor,  # (k, k) G = B B^T, of the same dtype
    rank: int,
    samples: list[Tensor],  # t times (k, l): the sampled columns of B, of the same dtype
) -> CoreProjection:
    """`nystrom` of B^T M B, with the final truncation, in float64. C = B^T (M B[:, I]) is never formed."""
    core, gram, roots = core.double(), gram.double(), []
    for sampled in (sample.double() for sample in samples):
        c = core @ sampled  # C in coordinates, (k, l)
        roots.append(c @ _inverse_root(sampled.T @ c, rank) / len(samples) ** 0.5)
    half = torch.cat(roots, dim=1)  # (k, t r); the averaged core is half @ half.T
    return _ritz(half @ half.T, gram, half, rank)


def subspace_factored(
    core: Tensor,  # (k, k) M, symmetric, float32 or float64
    gram: Tensor,  # (k, k) G = B B^T, of the same dtype
    rank: int,
    start: Tensor,  # (k, s), of the same dtype: B @ [start, random], the widened start seen from B
) -> CoreProjection:
    """`subspace` of B^T M B. W [start, random] has the coordinates M (B [start, random])."""
    return _ritz(core, gram.double(), (core @ start).double(), rank)


def nystrom_samples(
    width: int, rank: int, columns: int | None, runs: int, generator: torch.Generator | None
) -> list[Tensor]:
    """The column indices of each Nystrom run, (l,) int64 on the CPU, so that every process and device draws alike."""
    count = min(width, 2 * rank if columns is None else columns)
    return [torch.randperm(width, generator=generator, device="cpu")[:count].sort().values for _ in range(runs)]


def random_columns(
    width: int, known: int, rank: int, oversampling: int, generator: torch.Generator | None
) -> Iterator[Tensor]:
    """Random columns, rank - known + oversampling in all, float64 on the CPU, to widen a start of `known` columns.

    A direction that is exactly orthogonal to the start stays invisible to the iteration without them. They come some at
    a time, (width, <= 64): all of them may need more memory than the factor of W.
    """
    count = min(width, max(0, rank - known) + oversampling)
    for begin in range(0, count, _COLUMNS):
        yield torch.randn(width, min(_COLUMNS, count - begin), generator=generator, device="cpu").double()


def widen(start: Tensor | None, width: int, rank: int, oversampling: int, generator: torch.Generator | None) -> Tensor:
    """`start` (width, s) with `random_columns` beside it, float64 on the CPU if there is no start."""
    known = 0 if start is None else start.shape[1]
    none = torch.zeros(width, 0, dtype=torch.float64, device="cpu")
    extra = torch.cat([*random_columns(width, known, rank, oversampling, generator), none], dim=1)
    return extra if start is None else torch.cat([start, extra.to(start)], dim=1)


# ------------------------------------------------------------------------------------------------- common steps


def _ritz(
    core: Tensor,  # (k, k) M, whose dtype is that of the algebra in orthonormal coordinates
    gram: Tensor,  # (k, k) float64
    span: Tensor,  # (k, s) float64
    rank: int,
) -> CoreProjection:
    """The best rank-`rank` approximation of Q Q^T W Q Q^T, Q an orthonormal basis of the columns B^T span.

    Eigenvalues below the rounding of `core`'s dtype are no part of it: 1e-6 of the largest in float32.
    """
    gram_span = gram @ span
    basis = _orthonormalizer(span.T @ gram_span)  # (s, q)
    seen = (gram_span @ basis).to(core.dtype)  # B Q, (k, q)
    eigenvalues, vectors = _eigh(seen.T @ (core @ seen))  # Q^T W Q
    order = eigenvalues.abs().argsort(descending=True)[:rank]
    eigenvalues = eigenvalues[order]
    noise = _NOISE[core.dtype]
    nonzero = eigenvalues.abs() > noise * eigenvalues.abs().amax() if eigenvalues.numel() else eigenvalues.bool()
    order, eigenvalues = order[nonzero], eigenvalues[nonzero]
    vectors = vectors[:, order]
    return CoreProjection(span @ (basis @ vectors.double()), eigenvalues.double(), (seen @ vectors).double())


def _orthonormalizer(gram: Tensor) -> Tensor:
    """R (s, q) with R^T gram R = I, of full column rank: by Cholesky where that is safe, else by eigenvectors."""
    if not gram.numel():
        return gram
    # The lengths of the columns, which differ as the eigenvalues of W do, are no matter of their angles.
    lengths = gram.diagonal().clamp_min(torch.finfo(gram.dtype).tiny).rsqrt()
    factor, failed = torch.linalg.cholesky_ex(gram * lengths * lengths[:, None])
    pivots = factor.diagonal()
    if bool((failed == 0) & (pivots.min() > _WELL_CONDITIONED * pivots.max())):
        return torch.linalg.solve_triangular(factor, torch.diag(lengths), upper=False).T
    eigenvalues, vectors = _eigh(gram)
    keep = eigenvalues > _DEPENDENT * eigenvalues.amax().clamp_min(torch.finfo(gram.dtype).tiny)
    return vectors[:, keep] / eigenvalues[keep].sqrt()


def _inverse_root(block: Tensor, rank: int) -> Tensor:
    """H (l, <= rank) with H H^T = Z_r^+, the pseudo-inverse of the best rank-r approximation of a PSD block (l, l)."""
    eigenvalues, vectors = _eigh((block + block.T) / 2)
    # The theory asks for a positive semidefinite matrix: what rounding pushed below zero is cut off with the noise.
    floor = eigenvalues.amax().clamp_min(0) * block.shape[0] * torch.finfo(block.dtype).eps
    eigenvalues, vectors = eigenvalues[-rank:], vectors[:, -rank:]
    keep = eigenvalues > floor
    return vectors[:, keep] / eigenvalues[keep].sqrt()


def _eigh(matrix: Tensor, tries: int = 3) -> tuple[Tensor, Tensor]:
    """`torch.linalg.eigh`, smoothed only as far as a failing factorisation needs (paper, Appendix B.1).

    The paper adds 0.01 I until the decomposition converges. Adding it always would be by far the largest error
    of a projection, so the first try adds nothing.

    A GPU decomposes in float64, whatever the dtype: for float32 of up to 512 rows its library takes Jacobi's method,
    which took three times as long on an H100 (15.0 and 4.9 ms at 510 rows), and for more rows both take as long.
    """
    dtype, matrix = matrix.dtype, matrix.double() if matrix.is_cuda else matrix
    jitter = 0.0
    identity = torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
    for attempt in range(tries):
        if attempt:
            jitter = 10.0 ** (attempt - 4) * float(matrix.diagonal().abs().mean())
            warnings.warn(
                f"an eigendecomposition failed; trying again with {jitter:.1e} I added", ProjectionWarning, stacklevel=2
            )
        try:
            eigenvalues, vectors = torch.linalg.eigh(matrix + jitter * identity if jitter else matrix)
            return (eigenvalues - jitter).to(dtype), vectors.to(dtype)
        except torch.linalg.LinAlgError:
            if not matrix.isfinite().all():
                raise CollapseError("the rank projection met NaN or infinite values in W") from None
    raise CollapseError(f"the rank projection failed {tries} times, the last time with {jitter:.1e} I added")
