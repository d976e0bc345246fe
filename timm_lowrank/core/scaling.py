"""The scale of the rows that the reconstruction loss sees.

As printed, L_c has the unit of a squared activation norm: thousands at a wide layer before training has shaped
it. That swamps the task's loss, and killing the layer is then the network's cheapest answer. Each function here
maps centred activations A + b (n, m) to the rows that take their place in L_c. `docs/objective.md` has the
measurements that the default was chosen by.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Scaling = Callable[[Tensor, Tensor], Tensor]


def unit(centred: Tensor, reference: Tensor) -> Tensor:
    """Every row divided by its own norm: L_c becomes the mean share of a sample's energy outside the subspace, in [0, 1].

    This is L_c with the norm constraint that L_n asks for (||a|| = 1) satisfied exactly instead of penalised. It
    has no gradient along a row, so neither shrinking the layer nor inflating a few samples pays.
    """
    norms = torch.linalg.vector_norm(centred, dim=1, keepdim=True)
    return centred / norms.clamp_min(torch.finfo(centred.dtype).tiny ** 0.5)


def reference(centred: Tensor, reference: Tensor) -> Tensor:
    """Divided by the root mean square norm that the layer had when the branch was switched on: a fixed scale."""
    return centred / reference


def batch(centred: Tensor, reference: Tensor) -> Tensor:
    """Divided by the root mean square norm of the batch, differentiated through: the batch's unexplained variance.

    Kept for comparison: a few samples with huge norms make it small without explaining the others.
    """
    return centred / centred.square().sum(dim=1).mean().clamp_min(torch.finfo(centred.dtype).tiny).sqrt()


def paper(centred: Tensor, reference: Tensor) -> Tensor:
    """As printed: not scaled."""
    return centred


SCALINGS: dict[str, Scaling] = {"unit": unit, "reference": reference, "batch": batch, "paper": paper}
