"""Embeddings in the plane (paper, Appendix C.4, Fig. 8)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..errors import EvaluationError
from .principal import principal


@dataclasses.dataclass(frozen=True)
class Plane:
    """The plane of largest variance of some activations. Made by `fit_plane`."""

    mean: Tensor  # (m,) float64
    basis: Tensor  # (m, 2) float64, orthonormal columns; the second is zero if there is one direction alone
    shares: tuple[float, float]  # of the variance that the two directions hold

    def project(
        self,
        activations: Tensor,  # (n, m) or (n, ...), any float dtype
    ) -> Tensor:
        """Coordinates (n, 2) float64 of activations in the plane.

        Raises:
            EvaluationError: another number of features than the plane was fitted on.
        """
        rows = activations.detach().flatten(1)
        if rows.shape[1] != len(self.mean):
            raise EvaluationError(f"the plane was fitted on {len(self.mean)} features, these are {rows.shape[1]}")
        return (rows.double() - self.mean) @ self.basis


def fit_plane(
    activations: Tensor,  # (n, m) or (n, ...), any float dtype
) -> Plane:
    """The first two principal directions of centred activations.

    Signs are fixed: the coefficient of largest absolute value of each direction is positive, so that the picture does
    not flip from one machine to the next.

    Raises:
        EvaluationError: fewer than two images or two features, values that are not finite, or no variance.
    """
    rows = activations.detach().flatten(1).double()
    if min(rows.shape) < 2:
        raise EvaluationError(f"a plane needs at least two images and two features, not {tuple(rows.shape)}")
    mean = rows.mean(dim=0)
    centred = rows - mean
    total = float(centred.square().sum())
    if not 0 < total < float("inf"):
        raise EvaluationError("a plane needs activations that are finite and not all equal")
    seen, basis = principal(centred, 2)
    largest = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True))
    basis = torch.where(largest < 0, -basis, basis)
    first, second = (float(value) / total for value in seen.square().sum(dim=0))
    return Plane(mean, basis, (first, second))
