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

B, M and G lie in buffers with room for a whole interval between two projections, so that a step writes its rows and
its border and copies nothing.

Where a batch comes in bfloat16 on a processor that multiplies in it, the two large products are taken in it, from a
copy of B. Rows that enter W are left out: their products are entries of G, from which a projection learns how much of a
row lies outside the span of B, a difference of nearly equal numbers. With these products in bfloat16, too, W had an
eigenvalue of 80 instead of 1 on data of low rank. Without, W is the same, and W x_i in the gradient has the precision
that the activations have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from . import projection
from .config import LowRankConfig
from .device import full_precision, moved
from .head import Rotation

_PIECE = 2**20  # numbers of a tensor that a processor takes at a time
_REFRESH_GRAM_EVERY = 20  # projections; between them the kept rows count as orthonormal, and rounding adds up
_PASSES = 3  # that take away what was lost of it, at most
_ROOM = 2**20  # rows, which no training needs
_LOST = 3e-4  # error of the squared length of such a row, from which on it is measured at once and taken away


def pieces(count: int, other: int, device: torch.device, least: int = 1, parts: int = 1) -> list[slice]:
    """Slices of the `count` rows or columns, of `other` numbers each, of a matrix that is gone through once.

    A processor takes some at a time. Then what is computed on the way stays in its cache and in memory that it has
    already, where a tensor of more than 32 MiB gets new pages each time, which cost as much as the arithmetic: a layer
    of twelve times as many features took fourteen times as long. A GPU takes all at once.

    Args:
        least: in each slice, if there are so many.
        parts: that there are at least.
    """
    size = count if device.type != "cpu" else max(1, min(max(least, _PIECE // max(1, other)), -(-count // parts)))
    return [slice(begin, min(begin + size, count)) for begin in range(0, count, max(1, size))]


def centred(
    values: Tensor,  # (n, m), any float dtype
    bias: Tensor,  # (m,)
) -> Tensor:
    """The rows a + b (n, m) in the dtype of b, by one operation: it converts what comes in half precision."""
    return (values + bias).to(bias.dtype)


def centred_norms(
    values: Tensor,  # (n, m), any float dtype
    bias: Tensor,  # (m,)
) -> Tensor:
    """||a + b|| (n,) of the rows of `centred`, in the dtype of b; on a CPU these are never there as a whole."""
    parts = pieces(len(values), values.shape[1], values.device) or [slice(0)]  # of no rows no norms
    return torch.cat([torch.linalg.vector_norm(centred(values[some], bias), dim=1) for some in parts])


_COLUMNS = 256  # at a time at least: fewer make the products slow
_PARTS = 8  # sums that a product in bfloat16 is cut into: each is rounded to bfloat16, their total is not


def _joined(norms: list[Tensor]) -> Tensor:
    """The norms (n,) of rows from those of their pieces."""
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms), dim=0)


class Reconstruction(NamedTuple):
    """What W makes of the n rows x = a + b of a batch, without a graph."""

    errors: Tensor  # ||W x_i - x_i||^2, (n,)
    norms: Tensor  # ||x_i||, (n,)
    coordinates: Tensor  # (n, kept) in the orthonormal rows that span the range of W since its projection
    products: Tensor | None = None  # P = B X^T (k, n), where W is kept factored
    coefficients: Tensor | None = None  # C = M (G Y - P) - Y (k, n): half the gradient of the errors is X + B^T C


class Slopes(NamedTuple):
    """The gradient of a scalar in what W makes of the n rows of a batch; None is zero."""

    errors: Tensor  # (n,), or a scalar: the same in all of them
    norms: Tensor | None = None  # (n,)
    shift: Tensor | None = None  # (m,): the same in the activations of all rows, of what reads their mean alone
    coordinates: Tensor | None = None  # (n, kept)


class Descent(torch.autograd.Function):
    """A scalar whose gradient in the activations is known, from W as it is now.

    One node of the graph, where autograd would take a dozen small operations, each of which costs a GPU's host more
    than the device. Neither the rows nor their gradient in the dtype of W is ever there as a whole: of what has the
    size of the batch nothing is added to memory but the gradient that is asked for.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        activations: Tensor,  # (n, m)
        value: Tensor,  # the scalar
        bias: Tensor,
        weight: Any,  # that gave `prepared`
        half: bool,
        *prepared: Tensor | None,
    ) -> Tensor:
        ctx.weight, ctx.generation, ctx.half = weight, weight.generation, half  # type: ignore[attr-defined]
        ctx.save_for_backward(activations, bias, *prepared)  # type: ignore[arg-type]
        return value.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def, override]
        activations, bias, *prepared = ctx.saved_tensors
        if ctx.generation != ctx.weight.generation:
            raise RuntimeError("W was updated between penalty() and backward(); call update() after the optimizer step")
        with full_precision(activations.device):  # backward() may be called inside an autocast block
            gradient = ctx.weight.gradient(activations, bias, grad, *prepared, half=ctx.half)
        return gradient, *(None,) * (4 + len(prepared))


class FactoredWeight:
    """The symmetric matrix W (m, m) of a branch, stored as W = B^T M B.

    Attributes:
        basis: B (k, m), `dtype`. The first `kept` rows are orthonormal: the eigenvectors of the last projection.
        core: M (k, k) symmetric, `dtype`.
        gram: G = B B^T (k, k), `dtype`.
        size: k.
        pending: rows p that were remembered since the last step; they stand behind B.
        lost: error of the first `kept` rows and columns of G, in units of the last place, as `_lost_by` bounds it.
    """

    def __init__(self, num_features: int, rank: int, config: LowRankConfig, device: torch.device, dtype: torch.dtype):
        self.num_features, self.rank, self.config = num_features, rank, config
        self._buffer = torch.empty(0, num_features, device=device, dtype=dtype)  # B and the pending rows
        self._core = self._gram = torch.empty(0, 0, device=device, dtype=dtype)
        self._half: Tensor | None = None  # the first rows of the buffer in bfloat16, as many as were asked for
        self._halved = 0
        self.size = self.pending = self.generation = self.projections = 0
        self.lost = 1
        self._load(self._buffer, *(torch.empty(0, 0, device=device, dtype=dtype),) * 2, kept=0)

    def _load(self, basis: Tensor, core: Tensor, gram: Tensor, *, kept: int, room: int = 0) -> None:
        """Take over W = basis^T core basis, whose first `kept` rows are orthonormal; forget all pending rows.

        Args:
            room: for so many rows, or as many as there are. M and G lie in squares of as many, and products of small
                ones may be rounded otherwise in a larger or smaller square.
        """
        if basis.shape[0] == 0:  # W = 0 with one row of zeros: checkpoint writers drop tensors without elements
            basis, core, gram = basis.new_zeros(1, self.num_features), core.new_zeros(1, 1), gram.new_zeros(1, 1)
        self.size = self.pending = 0
        self._buffer = self._buffer.new_empty(0, self.num_features)
        self._reserve(max(basis.shape[0], room))
        self.size, self._halved, self.kept = basis.shape[0], 0, kept
        self._buffer[: self.size] = basis
        self._core.zero_()
        self.core.copy_(core)
        self.gram.copy_(gram)
        self.generation += 1

    def _reserve(self, count: int) -> None:
        """Make room for `count` rows: twice as many as before, or at once for a whole interval between projections if
        that is at most four times as many, so that old and new rows together never take more than it does."""
        if count <= self._buffer.shape[0]:
            return
        most, held = 2 * len(self._buffer), self.size + self.pending
        if self.config.update_rows is not None:
            interval = self.rank + self.config.update_rows * self.config.project_every
            most = interval if 2 * most >= interval else most
        capacity = max(count, most)
        larger = self._buffer.new_empty(capacity, self.num_features)
        larger[:held] = self._buffer[:held]
        self._buffer, self._half, self._halved = larger, None, 0
        for name in ("_core", "_gram"):  # zeros, as a step writes nothing into M where it stays zero
            square = self._buffer.new_zeros(capacity, capacity)
            square[:held, :held] = getattr(self, name)[:held, :held]
            setattr(self, name, square)

    @property
    def basis(self) -> Tensor:
        return self._buffer[: self.size]

    @property
    def core(self) -> Tensor:
        return self._core[: self.size, : self.size]

    @property
    def gram(self) -> Tensor:
        return self._gram[: self.size, : self.size]

    @property
    def half_basis(self) -> Tensor:
        """B in bfloat16, a copy that only grows between two projections."""
        if self._half is None:
            self._half = torch.empty_like(self._buffer, dtype=torch.bfloat16)
        self._half[self._halved : self.size] = self._buffer[self._halved : self.size]
        self._halved = self.size
        return self._half[: self.size]

    # ------------------------------------------------------------------------------------------ forward and step

    def reconstruction(
        self,
        activations: Tensor,  # (n, m), any float dtype
        bias: Tensor,  # b (m,), `dtype`
        half: bool = False,  # whether the large products may be taken in bfloat16
        entering: Sequence[int] | None = None,  # the rows that may enter W; None means all of them
    ) -> Reconstruction:
        """What W makes of a batch (Algorithm 2, line 6), by the formulas of this module."""
        norms, products = self.products(activations, bias, entering if half else None)
        images = self.core @ products  # y
        excess = torch.addmm(products, self.gram, images, beta=-1)  # G y - P
        coefficients = torch.addmm(images, self.core, excess, beta=-1)  # M (G y - P) - y
        # y . (G y - 2 P) = P . (M (G y - P) - y), as y = M P.
        # Of rows that lie in the span of B, rounding may leave less than nothing.
        errors = torch.addcmul((products * coefficients).sum(dim=0), norms, norms).clamp_min_(0)
        return Reconstruction(errors, norms, products[: self.kept].T, products, coefficients)

    def products(
        self,
        activations: Tensor,  # (n, m)
        bias: Tensor,  # (m,)
        exactly: Sequence[int] | None,  # which rows' products are not taken in bfloat16; None: all
    ) -> tuple[Tensor, Tensor]:
        """The norms (n,) of the rows x = a + b, and P = B X^T (k, n); both `dtype`."""
        count = len(activations)
        if exactly is None or len(exactly) == count:
            norms, products = [], bias.new_empty(self.size, count)
            for columns in self._pieces(count):
                rows = centred(activations[:, columns], bias[columns])
                norms.append(torch.linalg.vector_norm(rows, dim=1))
                products.addmm_(self.basis[:, columns], rows.T, beta=int(columns.start > 0))
            return _joined(norms), products
        norms, others = [], torch.ones(count, dtype=torch.bool, device=bias.device)
        index = torch.tensor(exactly, dtype=torch.int64, device=bias.device)
        others[index] = False
        products, rest = bias.new_empty(self.size, len(index)), bias.new_zeros(self.size, count - len(index))
        for columns in self._pieces(count, _PARTS):
            rows = centred(activations[:, columns], bias[columns])
            norms.append(torch.linalg.vector_norm(rows, dim=1))
            products.addmm_(self.basis[:, columns], rows[index].T, beta=int(columns.start > 0))
            rest += self.half_basis[:, columns] @ rows[others].bfloat16().T
        together = bias.new_empty(self.size, count)
        together[:, index], together[:, others] = products, rest
        return _joined(norms), together

    def prepared(self, bias: Tensor, seen: Reconstruction, slopes: Slopes) -> tuple[Tensor, Tensor, Tensor | None]:
        """What `gradient` takes: (n,) or a scalar, (k, n), and (m,) or None; of the size of the batch is none."""
        assert seen.coefficients is not None
        scale, shift = 2 * slopes.errors, slopes.shift
        coefficients = seen.coefficients * scale
        if slopes.coordinates is not None:
            coefficients[: self.kept] += slopes.coordinates.T
        if slopes.norms is not None:
            scale = scale + torch.where(seen.norms > 0, slopes.norms / seen.norms, 0)
        return scale, coefficients, shift

    def gradient(
        self,
        activations: Tensor,  # (n, m)
        bias: Tensor,  # (m,)
        factor: Tensor,  # a scalar
        scale: Tensor,  # s (n,) or a scalar
        coefficients: Tensor,  # C (k, n)
        shift: Tensor | None,  # v (m,)
        *,
        half: bool,
    ) -> Tensor:
        """factor times s_i x_i + B^T C_i + v of each row x = a + b, (n, m) of the dtype of the activations."""
        gradient = torch.empty_like(activations)
        coefficients = coefficients.T.bfloat16() if half else coefficients.T
        for columns in self._pieces(len(activations)):
            rows = centred(activations[:, columns], bias[columns])
            if scale.dim() == 0 and shift is not None:
                rows = torch.addcmul(shift[columns], rows, scale)
            else:
                rows.mul_(scale[:, None] if scale.dim() else scale)
                if shift is not None:
                    rows += shift[columns]
            if half:
                rows += coefficients @ self.half_basis[:, columns]
            else:
                rows.addmm_(coefficients, self.basis[:, columns])
            rows *= factor
            if rows.shape == activations.shape:
                return rows.to(activations.dtype)
            gradient[:, columns] = rows
        return gradient

    def _pieces(self, rows: int, parts: int = 1) -> list[slice]:
        """Of the features, for something that has `rows` numbers of each."""
        return pieces(self.num_features, rows, self._buffer.device, _COLUMNS, parts)

    def room(self, count: int) -> tuple[Tensor, Tensor]:
        """Where `append` takes rows (count, m) and their products with B (k, count) from: whoever calls it writes them
        there, which saves copies."""
        self._reserve(self.size + count)
        end = self.size + count
        return self._buffer[self.size : end], self._gram[: self.size, self.size : end]

    def append(
        self,
        rows: Tensor,  # (p, m), what `room` gave
    ) -> None:
        """Rows for the next step: G+ = [[G, P], [P^T, K]]. A step must follow before the next ones."""
        size, end = self.size, self.size + rows.shape[0]
        self._gram[size:end, :size] = self._gram[:size, size:end].T
        torch.mm(rows, rows.T, out=self._gram[size:end, size:end])
        self.pending = rows.shape[0]

    def pending_gram(self) -> Tensor:
        """K = X X^T (p, p) of the pending rows X."""
        end = self.size + self.pending
        return self._gram[self.size : end, self.size : end]

    def step(
        self,
        scale: Tensor | float,  # scalar: step size times the weight of the loss, over the rows that its mean runs over
    ) -> None:
        """W <- W - scale (X^T R + R^T X) with the pending rows X (Algorithm 2, line 12)."""
        size, end = self.size, self.size + self.pending
        products = self._gram[:size, size:end]
        border = torch.addmm(products, self.core, products, beta=0, alpha=-1).mul_(scale)  # -(s/p) y
        self._core[:size, size:end] = border  # not at once: the bits of a product depend on where it is written
        self._core[size:end, :size] = border.T
        self._core[size:end, size:end].diagonal().add_(scale, alpha=2)  # which was zero, as all around it is
        self.size, self.pending = end, 0
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
        self.pending = 0  # rows that no step has used stay out
        result, kept = self._projected(generator), self.kept
        seen, self.lost = result.seen, self._lost_by(result)
        self._take(result)
        self.projections += 1
        due = self.projections % _REFRESH_GRAM_EVERY == 0
        for _ in range(_PASSES):
            bad = self.lost * torch.finfo(self._buffer.dtype).eps > _LOST
            if bad or due:
                self.gram.copy_(self.basis @ self.basis.T)
                self.lost, due = 1, False
            if not bad:
                break
            # W has this rank already: the same W, from rows that are nearer to orthonormal.
            again = projection.exact_factored(self.core, self.gram, self.rank)
            seen, self.lost = seen @ again.vectors, self._lost_by(again)
            self._take(again)
        self.generation += 1
        return Rotation(seen.T[:, :kept], seen.T[:, kept:])

    def _lost_by(self, result: projection.CoreProjection) -> int:
        """By how much, in units of the last place, rows of `result` may miss length 1 and right angles.

        A direction of a small eigenvalue may be a small difference of large multiples of nearly dependent rows: the
        error of the squared length of a row is then as many times larger. Waits for the device, as a projection does.
        """
        if not result.vectors.numel() or result.vectors.is_meta:
            return 1
        shares = self.gram.diagonal().double()[:, None] * result.vectors.square()
        lost = shares[: self.kept].sum(dim=0) * self.lost + shares[self.kept :].sum(dim=0)
        missed = result.vectors.T @ result.seen  # in the inner product of G, by rounding of float64
        missed.diagonal().sub_(1)
        total = lost.amax() + missed.abs().amax() / torch.finfo(self.gram.dtype).eps
        return math.ceil(float(total.clamp(1, 2.0**50)))

    def _take(self, result: projection.CoreProjection) -> None:
        """W becomes `result`, whose rows count as orthonormal."""
        self._rotate(result.vectors.T.to(self.basis.dtype))
        self.kept = kept = result.vectors.shape[1]
        self.core.zero_()
        self.size, self._halved = max(kept, 1), 0  # W = 0 has a row of zeros, see `_load`
        self.core[:kept, :kept].diagonal().copy_(result.eigenvalues)
        self.gram.zero_()[:kept, :kept].fill_diagonal_(1)

    def _rotate(self, coefficients: Tensor) -> None:
        """The first rows of the buffer become `coefficients` (r, k) B, in place: the one product of a projection with m
        in it."""
        for columns in self._pieces(self.size):
            some = self._buffer[:, columns]
            some[: max(1, len(coefficients))] = coefficients @ some[: self.size] if len(coefficients) else 0

    def _projected(self, generator: torch.Generator) -> projection.CoreProjection:
        config, width, rank = self.config, self.num_features, self.rank
        if config.projection == "exact":
            return projection.exact_factored(self.core, self.gram, rank)
        if config.projection == "nystrom":
            samples = projection.nystrom_samples(width, rank, config.nystrom_columns, config.nystrom_runs, generator)
            sampled = [self.basis[:, sample.to(self.basis.device)] for sample in samples]
            return projection.nystrom_factored(self.core, self.gram, rank, sampled)
        if self.size <= rank + config.oversampling:  # the start would be as wide as B is high: B does as well
            return projection.subspace_factored(self.core, self.gram, rank, self.gram)
        random = projection.random_columns(width, self.kept, rank, config.oversampling, generator)
        start = [self.gram[:, : self.kept], *(self.basis @ columns.to(self.basis) for columns in random)]
        return projection.subspace_factored(self.core, self.gram, rank, torch.cat(start, dim=1))

    # ------------------------------------------------------------------------------------------------- inspection

    def spanning_rows(self) -> Tensor:
        """U (kept, m): the orthonormal rows that span the range of W since the last projection, largest eigenvalue
        first; none before the first one."""
        return self._buffer[: self.kept]

    def eigenvalues(self) -> Tensor:
        """The nonzero eigenvalues of W, by magnitude, float64."""
        return projection.exact_factored(self.core, self.gram, self.size).eigenvalues

    def factor(self) -> Tensor:
        """F (m, r) with F F^T the positive part of W; W itself if it is positive semidefinite."""
        result = projection.exact_factored(self.core, self.gram, self.rank)
        scaled = result.vectors * result.eigenvalues.clamp_min(0).sqrt()
        return self.basis.T @ scaled.to(self.basis.dtype)

    def dense(self) -> Tensor:
        """W as an (m, m) matrix: for tests and narrow layers."""
        return self.basis.T @ (self.core @ self.basis)

    # ------------------------------------------------------------------------------------------------------ state

    def state(self) -> dict[str, Tensor]:
        """What resuming needs, bit for bit; rows that no step has used yet are left out."""
        counters = torch.tensor([self.kept, self.projections, self.lost, len(self._buffer)], device="cpu")
        return {"basis": self.basis.clone(), "core": self.core.clone(), "gram": self.gram.clone(), "factored": counters}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` gave. Raises ValueError if the shapes do not belong to this layer."""
        basis, core, gram = (state[name].to(self._buffer, copy=True) for name in ("basis", "core", "gram"))
        if basis.shape != (core.shape[0], self.num_features) or gram.shape != core.shape or core.dim() != 2:
            raise ValueError(
                f"a factor of shape {tuple(basis.shape)} with a core of shape {tuple(core.shape)} does not fit "
                f"a layer of {self.num_features} features"
            )
        counters, largest = state["factored"].tolist(), float(gram.abs().max()) if gram.numel() else 0.0
        counters = (counters + [1, 0][len(counters) - 2 :])[:4]  # earlier versions wrote two; later ones may more
        kept, projections, lost, room = counters
        if not all(tensor.isfinite().all() for tensor in (basis, core, gram)):
            raise ValueError("W holds values that are NaN or infinite: the training that wrote it had diverged")
        if not torch.allclose(core, core.T, rtol=1e-3, atol=1e-3 * float(core.abs().max()) if core.numel() else 0.0):
            raise ValueError("the core of W is not symmetric: the file was damaged or changed")
        if not torch.allclose(gram, basis @ basis.T, rtol=1e-3, atol=1e-3 * largest):
            raise ValueError("the Gram matrix is not that of the factor of W: the file was damaged or changed")
        if not 0 <= kept <= min(self.rank, len(basis)):
            raise ValueError(f"{kept} directions from the last projection do not fit the target rank {self.rank}")
        if not 0 <= room <= _ROOM:
            raise ValueError(f"room for {room:,} rows of W: the file was damaged or changed")
        self._load(basis, core, gram, kept=kept, room=room)
        self.projections, self.lost = projections, max(1, lost)

    def to(self, device: torch.device) -> None:
        self._buffer, self._core, self._gram = (moved(t, device) for t in (self._buffer, self._core, self._gram))
        self._half, self._halved = None, 0
