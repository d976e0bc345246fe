"""W as a plain m x m matrix: Algorithm 2 as printed, its gradients by autograd. The slow twin of `factored.py`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import projection
from .config import LowRankConfig
from .device import moved
from .factored import Reconstruction, Slopes
from .head import Rotation


class DenseWeight:
    """The symmetric matrix W (m, m) of a branch, stored as such. Same methods as `FactoredWeight`."""

    def __init__(self, num_features: int, rank: int, config: LowRankConfig, device: torch.device, dtype: torch.dtype):
        self.num_features, self.rank, self.config = num_features, rank, config
        self.matrix = torch.zeros(num_features, num_features, device=device, dtype=dtype)
        self.start = torch.zeros(num_features, 0, device=device, dtype=dtype)
        self._rows = torch.zeros(0, num_features, device=device, dtype=dtype)
        self._seen = self._rows  # since the last projection
        self.generation = 0

    @property
    def pending(self) -> int:
        return self._rows.shape[0]

    @property
    def kept(self) -> int:
        """Rows that span the range of W since the last projection."""
        return self.start.shape[1]

    size = 0  # rows whose products with a batch the step needs

    def reconstruction(
        self,
        activations: Tensor,
        bias: Tensor,
        half: bool = False,
        entering: Sequence[int] | None = None,
    ) -> Reconstruction:
        """What W makes of a batch (Algorithm 2, line 6); in its own dtype always."""
        rows = activations.to(bias.dtype) + bias
        errors = (rows @ self.matrix - rows).square().sum(dim=1)
        return Reconstruction(errors, torch.linalg.vector_norm(rows, dim=1), rows @ self.start)

    def prepared(self, bias: Tensor, seen: Reconstruction, slopes: Slopes) -> Slopes:
        """What `gradient` takes: the slopes themselves, of the shapes that they have."""
        return slopes

    def gradient(self, activations: Tensor, bias: Tensor, factor: Tensor, *slopes: Tensor | None, half: bool) -> Tensor:
        """The gradient (n, m) in the activations of `factor` times the scalar whose gradient is `slopes`."""
        with torch.enable_grad():
            rows = activations.detach().to(bias.dtype).requires_grad_()
            seen, of = self.reconstruction(rows, bias), Slopes(*slopes)  # type: ignore[arg-type]
            scalar = (seen.errors * of.errors).sum()
            if of.norms is not None:
                scalar = scalar + (seen.norms * of.norms).sum()
            if of.shift is not None:
                scalar = scalar + (rows * of.shift).sum()
            if of.coordinates is not None:
                scalar = scalar + (seen.coordinates * of.coordinates).sum()
            (gradient,) = torch.autograd.grad(scalar * factor, rows)
        return gradient.to(activations.dtype)

    def room(self, count: int) -> tuple[Tensor, Tensor]:
        """Where `append` takes rows from, (count, m); of their products it needs none."""
        return self._rows.new_empty(count, self.num_features), self._rows.new_empty(self.size, count)

    def append(self, rows: Tensor) -> None:
        """Rows (p, m) for the next step."""
        self._rows = torch.cat([self._rows, rows])

    def pending_gram(self) -> Tensor:
        """K = X X^T (p, p) of the pending rows X."""
        return self._rows @ self._rows.T

    def step(self, scale: Tensor | float) -> None:
        """W_s <- W_s - scale d(n L_c)/dW_s at W = (W_s + W_s^T) / 2 (Algorithm 2, line 12)."""
        with torch.enable_grad():
            parameter = self.matrix.clone().requires_grad_()
            symmetric = (parameter + parameter.T) / 2
            loss = (self._rows @ symmetric - self._rows).square().sum()
            (gradient,) = torch.autograd.grad(loss, parameter)
        self.matrix = self.matrix - scale * gradient
        self.generation += 1
        self._seen = torch.cat([self._seen, self._rows])
        self._rows = self._rows[:0]

    def residual(self, vector: Tensor) -> Tensor:
        """(W - I)^2 vector, (m,)."""
        once = self.matrix @ vector - vector
        return self.matrix @ once - once

    def project(self, generator: torch.Generator) -> Rotation:
        """W <- the rank-r approximation of W that `config.projection` asks for (Algorithm 2, line 13)."""
        config, rank = self.config, self.rank
        self.generation += 1
        if config.projection == "exact":
            self.matrix = projection.exact(self.matrix, rank)
        elif config.projection == "nystrom":
            self.matrix = projection.nystrom(self.matrix, rank, config.nystrom_columns, config.nystrom_runs, generator)
        else:
            start = self.start if self.start.shape[1] else None
            self.matrix = projection.subspace(self.matrix, rank, start, config.oversampling, generator)
        eigenvalues, vectors = torch.linalg.eigh(self.matrix)
        order = eigenvalues.abs().argsort(descending=True)[:rank]
        order = order[eigenvalues[order].abs() > 1e-12 * eigenvalues.abs().amax()]
        old, self.start = self.start, vectors[:, order]
        rotation = Rotation((self.start.T @ old).double(), (self.start.T @ self._seen.T).double())
        self._seen = self._seen[:0]
        return rotation

    def spanning_rows(self) -> Tensor:
        """U (kept, m): the orthonormal rows that span the range of W since the last projection, largest eigenvalue
        first; none before the first one."""
        return self.start.T

    def eigenvalues(self) -> Tensor:
        """The nonzero eigenvalues of W, by magnitude, float64."""
        values = torch.linalg.eigvalsh(self.matrix.double())
        values = values[values.abs().argsort(descending=True)]
        return values[values.abs() > 1e-13 * values.abs().amax()]

    def factor(self) -> Tensor:
        """F (m, r) with F F^T the positive part of W; W itself if it is positive semidefinite."""
        eigenvalues, vectors = torch.linalg.eigh(self.matrix)
        return vectors[:, -self.rank :] * eigenvalues[-self.rank :].clamp_min(0).sqrt()

    def dense(self) -> Tensor:
        """W as an (m, m) matrix."""
        return self.matrix

    def state(self) -> dict[str, Tensor]:
        """What resuming needs, bit for bit; rows that no step has used yet are left out."""
        # With a column of zeros in front: checkpoint writers drop tensors without elements.
        padded = (torch.nn.functional.pad(self.start, (1, 0)), torch.nn.functional.pad(self._seen, (0, 0, 1, 0)))
        return {"matrix": self.matrix.clone(), "start": padded[0], "seen": padded[1]}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` gave. Raises ValueError if the shapes do not belong to this layer."""
        matrix = state["matrix"].to(self.matrix, copy=True)
        if matrix.shape != self.matrix.shape:
            raise ValueError(
                f"a matrix of shape {tuple(matrix.shape)} does not fit a layer of {self.num_features} features"
            )
        if not matrix.isfinite().all():
            raise ValueError("W holds values that are NaN or infinite: the training that wrote it had diverged")
        if not torch.allclose(matrix, matrix.T, rtol=1e-3, atol=1e-3 * float(matrix.abs().max())):
            raise ValueError("W is not symmetric: the file was damaged or changed")
        self.matrix, self.start = matrix, state["start"][:, 1:].to(self.start, copy=True)
        self.generation += 1
        self._rows, self._seen = self._rows[:0], state["seen"][1:].to(self._seen, copy=True)

    def to(self, device: torch.device) -> None:
        for name in ("matrix", "start", "_rows", "_seen"):
            setattr(self, name, moved(getattr(self, name), device))
