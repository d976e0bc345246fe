"""The scale of what the reconstruction loss sees.

As printed, L_c has the unit of a squared activation norm: thousands at a wide layer before training has shaped
it. That swamps the task's loss, and killing the layer is then the network's cheapest answer. Each function here
maps the norms of the rows of A + b (n,) to the factors by which these rows are multiplied in L_c and L_n: (n,), or a
scalar where all rows have the same.
`docs/objective.md` has the measurements that the default was chosen by.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Scaling = Callable[[Tensor, Tensor], Tensor]


def unit(norms: Tensor, reference: Tensor) -> Tensor:
    """Every row divided by its own norm: L_c is the mean share of a sample's energy outside the subspace, in [0, 1].

    This is L_c with the norm constraint that L_n asks for (||a|| = 1) satisfied exactly instead of penalised. It
    has no gradient along a row, so shrinking the layer does not pay. Inflating the directions that W keeps does.
    """
    return norms.clamp_min(torch.finfo(norms.dtype).tiny ** 0.25).reciprocal()


def reference(norms: Tensor, reference: Tensor) -> Tensor:
    """Divided by the root mean square norm that the layer had at switch-on, or has grown to since, without a graph.

    Nothing that the network does to the directions that W keeps is rewarded; only what lies outside them shrinks.
    """
    return reference.clamp_min(torch.finfo(norms.dtype).tiny ** 0.25).reciprocal()


def batch(norms: Tensor, reference: Tensor) -> Tensor:
    """Divided by the root mean square norm of the batch, differentiated through: the batch's unexplained variance.

    Kept for comparison: a few samples with huge norms make it small without explaining the others.
    """
    return norms.square().mean().clamp_min(torch.finfo(norms.dtype).tiny ** 0.5).rsqrt()


def paper(norms: Tensor, reference: Tensor) -> Tensor:
    """As printed: not scaled."""
    return torch.ones_like(reference)


SCALINGS: dict[str, Scaling] = {"unit": unit, "reference": reference, "batch": batch, "paper": paper}
CONSTANT = ("reference", "paper")  # those whose factors do not depend on the norms
