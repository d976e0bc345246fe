"""W in factored form: what makes the low-rank branch affordable on wide layers.

Between two rank projections W changes only by products of activations that were seen since the last one, so

    W = B^T M B      B (k, m): the rows seen so far, M (k, k) symmetric,

holds exactly at all times. With the Gram matrix G = B B^T kept beside them, loss, gradient and Update Step need
two products of size k x n x m and otherwise only small matrices; the m x m matrix never exists. For a batch X
(n, m) of rows:

    P = B X^T                   (k, n)      the first large product
    y = M P                     (k, n)      W x_i = B^T y_i
    ||W x_i - x_i||^2           = |x_i|^2 + y_i . (G y_i - 2 P_i)
    its gradient in x_i         = 2 (x_i + B^T (M (G y_i - P_i) - y_i))      the second large product

The subspace head reads the first rows of P, the coordinates of X in the range of W after the last projection. Its
gradient c_i in these coordinates adds B^T c_i: more coefficients of the second product, and no product of its own.

and the Update Step with p rows X, W <- W - s (1/p) (X^T R + R^T X), R = X W - X, appends X to B and borders M:

    M <- [[M, -(s/p) y], [-(s/p) y^T, (2s/p) I]]
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from . import projection
from .config import LowRankConfig
from .head import Rotation

_REFRESH_GRAM_EVERY = 20  # projections; between them the kept rows count as orthonormal, and rounding adds up


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A block in which autocast is off for `device`: branches compute in their own dtype, whatever the network does."""
    if device.type == "meta":  # which has no autocast: networks that are only looked at, not computed
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


class _Reconstruction(torch.autograd.Function):
    """Squared norms (n,) of W x_i - x_i for fixed W, and the coordinates (n, kept) of the rows in the range of W.

    With the gradient in x alone (the formulas of this module).
    """

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, products: Tensor, weight: FactoredWeight) -> tuple[Tensor, Tensor]:
        core, gram = weight.core, weight.gram
        images = core @ products  # y
        excess = gram @ images - products  # G y - P
        ctx.weight, ctx.generation = weight, weight.generation  # type: ignore[attr-defined]
        ctx.save_for_backward(rows, core @ excess - images)
        error = torch.linalg.vector_norm(rows, dim=1).square() + (images * (excess - products)).sum(dim=0)
        # Of rows that lie in the span of B, rounding may leave less than nothing.
        return error.clamp_min(0), products[: weight.kept].T.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_errors: Tensor, grad_coordinates: Tensor):  # type: ignore[no-untyped-def, override]
        rows, coefficients = ctx.saved_tensors
        weight = ctx.weight
        if ctx.generation != weight.generation:
            raise RuntimeError("W was updated between penalty() and backward(); call update() after the optimizer step")
        with full_precision(rows.device):  # backward() may be called inside an autocast block
            scale = 2 * grad_errors
            coefficients = coefficients * scale
            coefficients[: weight.kept] += grad_coordinates.T
            gradient = (rows * scale[:, None]).addmm_(coefficients.T, weight.basis)
        return gradient, None, None


class Reconstruction(NamedTuple):
    """What W makes of a batch of n rows."""

    errors: Tensor  # ||W x_i - x_i||^2, (n,), with a graph
    coordinates: Tensor  # (n, kept) in the orthonormal rows that span the range of W since its projection, with a graph
    products: Tensor | None  # P = B X^T (k, n), where W is kept factored


class FactoredWeight:
    """The symmetric matrix W (m, m) of a branch, stored as W = B^T M B.

    Attributes:
        basis: B (k, m), `dtype`. The first `kept` rows are orthonormal: the eigenvectors of the last projection.
        core: M (k, k) symmetric, `dtype`.
        gram: G = B B^T (k, k), `dtype`.
    """

    def __init__(self, num_features: int, rank: int, config: LowRankConfig, device: torch.device, dtype: torch.dtype):
        self.num_features, self.rank, self.config = num_features, rank, config
        self._buffer = torch.empty(0, num_features, device=device, dtype=dtype)
        self._load(self._buffer, *(torch.empty(0, 0, device=device, dtype=dtype),) * 2, kept=0)
        self.projections = 0

    def _load(self, basis: Tensor, core: Tensor, gram: Tensor, *, kept: int) -> None:
        """Take over W = basis^T core basis, whose first `kept` rows are orthonormal; forget all pending rows."""
        if basis.shape[0] == 0:  # W = 0 with one row of zeros: checkpoint writers drop tensors without elements
            basis, core, gram = basis.new_zeros(1, self.num_features), core.new_zeros(1, 1), gram.new_zeros(1, 1)
        self._reserve(basis.shape[0])
        self._buffer[: basis.shape[0]] = basis
        self.core = core
        self._gram = gram  # of basis and pending rows together
        self.kept = kept
        self.generation = getattr(self, "generation", 0) + 1

    def _reserve(self, count: int) -> None:
        """Make room for `count` rows: twice as many as before, at most for a whole interval between projections."""
        if count <= self._buffer.shape[0]:
            return
        interval = self.rank + (self.config.update_rows or 0) * self.config.project_every
        larger = self._buffer.new_empty(max(count, min(interval, 2 * len(self._buffer))), self.num_features)
        larger[: self._buffer.shape[0]] = self._buffer
        self._buffer = larger

    @property
    def basis(self) -> Tensor:
        return self._buffer[: self.core.shape[0]]

    @property
    def gram(self) -> Tensor:
        size = self.core.shape[0]
        return self._gram[:size, :size]

    @property
    def pending(self) -> int:
        """Rows that were remembered since the last step."""
        return self._gram.shape[0] - self.core.shape[0]

    # ------------------------------------------------------------------------------------------ forward and step

    @property
    def size(self) -> int:
        """k, the rows of B."""
        return self.core.shape[0]

    def reconstruction(
        self,
        rows: Tensor,  # (n, m) centred activations with a graph, `dtype`
    ) -> Reconstruction:
        """What W makes of a batch (Algorithm 2, line 6)."""
        with torch.no_grad():
            products = self.basis @ rows.T
        errors, coordinates = _Reconstruction.apply(rows, products, self)
        return Reconstruction(errors, coordinates, products)

    def append(
        self,
        rows: Tensor,  # (p, m)
        products: Tensor,  # (k, p) of B and these rows
    ) -> None:
        """Rows for the next step: G+ = [[G, P], [P^T, K]]."""
        size = self.core.shape[0]
        self._reserve(size + rows.shape[0])
        self._buffer[size : size + rows.shape[0]] = rows
        top = torch.cat([self._gram, products], dim=1)
        bottom = torch.cat([products.T, rows @ rows.T], dim=1)
        self._gram = torch.cat([top, bottom])

    def pending_gram(self) -> Tensor:
        """K = X X^T (p, p) of the pending rows X."""
        return self._gram[self.core.shape[0] :, self.core.shape[0] :]

    def step(
        self,
        step_size: Tensor | float,  # scalar: step size times the weight of the loss
        count: Tensor | int,  # scalar: rows that the mean of the loss runs over
    ) -> None:
        """W <- W - step_size (1/count) (X^T R + R^T X) with the pending rows X (Algorithm 2, line 12)."""
        size, pending = self.core.shape[0], self.pending
        border = self.core @ self._gram[:size, size:] * (-step_size / count)  # -(s/p) y
        corner = torch.eye(pending, device=border.device, dtype=border.dtype) * (2 * step_size / count)
        self.core = torch.cat([torch.cat([self.core, border], dim=1), torch.cat([border.T, corner], dim=1)])
        self.generation += 1

    def residual(
        self,
        vector: Tensor,  # (m,)
    ) -> Tensor:
        """(W - I)^2 vector, (m,)."""
        image = self.core @ (self.basis @ vector)
        return vector + self.basis.T @ (self.core @ (self.gram @ image) - 2 * image)

    # ------------------------------------------------------------------------------------------------ projection

    def project(self, generator: torch.Generator) -> Rotation:
        """W <- the rank-r approximation of W that `config.projection` asks for (Algorithm 2, line 13).

        Returns:
            Where the rows that span its range have moved.
        """
        self._gram = self.gram  # pending rows stay out: a projection follows a step
        core, gram = self.core.double(), self.gram.double()
        result = self._projected(core, gram, generator)
        moved = result.vectors.T @ gram  # of the new rows with all of B
        rotation = Rotation(moved[:, : self.kept], moved[:, self.kept :])
        basis = result.vectors.T.to(self.basis.dtype) @ self.basis  # the one product with m in it
        self.projections += 1
        if self.projections % _REFRESH_GRAM_EVERY:
            gram = torch.eye(basis.shape[0], device=basis.device, dtype=basis.dtype)
        else:
            gram = basis @ basis.T
        self._load(basis, torch.diag(result.eigenvalues.to(basis.dtype)), gram, kept=basis.shape[0])
        return rotation

    def _projected(self, core: Tensor, gram: Tensor, generator: torch.Generator) -> projection.CoreProjection:
        config, width, rank = self.config, self.num_features, self.rank
        if config.projection == "exact":
            return projection.exact_factored(core, gram, rank)
        if config.projection == "nystrom":
            samples = projection.nystrom_samples(width, rank, config.nystrom_columns, config.nystrom_runs, generator)
            sampled = [self.basis[:, sample.to(core.device)].double() for sample in samples]
            return projection.nystrom_factored(core, gram, rank, sampled)
        extra = projection.random_columns(width, self.kept, rank, config.oversampling, generator)
        start = torch.cat([gram[:, : self.kept], (self.basis @ extra.to(self.basis)).double()], dim=1)
        return projection.subspace_factored(core, gram, rank, start)

    # ------------------------------------------------------------------------------------------------- inspection

    def eigenvalues(self) -> Tensor:
        """The nonzero eigenvalues of W, by magnitude, float64."""
        return projection.exact_factored(self.core.double(), self.gram.double(), self.core.shape[0]).eigenvalues

    def factor(self) -> Tensor:
        """F (m, r) with F F^T the positive part of W; W itself if it is positive semidefinite."""
        result = projection.exact_factored(self.core.double(), self.gram.double(), self.rank)
        scaled = result.vectors * result.eigenvalues.clamp_min(0).sqrt()
        return self.basis.T @ scaled.to(self.basis.dtype)

    def dense(self) -> Tensor:
        """W as an (m, m) matrix: for tests and narrow layers."""
        return self.basis.T @ (self.core @ self.basis)

    # ------------------------------------------------------------------------------------------------------ state

    def state(self) -> dict[str, Tensor]:
        """What resuming needs, bit for bit; rows that no step has used yet are left out."""
        counters = torch.tensor([self.kept, self.projections])
        return {"basis": self.basis.clone(), "core": self.core.clone(), "gram": self.gram.clone(), "factored": counters}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` gave. Raises ValueError if the shapes do not belong to this layer."""
        basis, core, gram = (state[name].to(self._buffer, copy=True) for name in ("basis", "core", "gram"))
        if basis.shape != (core.shape[0], self.num_features) or gram.shape != core.shape or core.dim() != 2:
            raise ValueError(
                f"a factor of shape {tuple(basis.shape)} with a core of shape {tuple(core.shape)} does not fit "
                f"a layer of {self.num_features} features"
            )
        kept, largest = state["factored"].tolist()[0], float(gram.abs().max()) if gram.numel() else 0.0
        if not all(tensor.isfinite().all() for tensor in (basis, core, gram)):
            raise ValueError("W holds values that are NaN or infinite: the training that wrote it had diverged")
        if not torch.allclose(core, core.T, rtol=1e-3, atol=1e-3 * float(core.abs().max()) if core.numel() else 0.0):
            raise ValueError("the core of W is not symmetric: the file was damaged or changed")
        if not torch.allclose(gram, basis @ basis.T, rtol=1e-3, atol=1e-3 * largest):
            raise ValueError("the Gram matrix is not that of the factor of W: the file was damaged or changed")
        if not 0 <= kept <= min(self.rank, len(basis)):
            raise ValueError(f"{kept} directions from the last projection do not fit the target rank {self.rank}")
        self._load(basis, core, gram, kept=kept)
        self.projections = int(state["factored"][1])

    def to(self, device: torch.device) -> None:
        self._buffer, self.core, self._gram = (t.to(device) for t in (self._buffer, self.core, self._gram))
