"""`Embedder`: what the branch was trained for, the few numbers that say what a layer's activations are.

With the orthonormal rows U (r, m) that span the range of W and the principal directions D (q, r) of the activations
inside it, largest variance first,

    z_i = D U (a_i + b)                                     (q,)      the embedding of an image

The first d numbers of z are the embedding of d numbers, and the distance of two embeddings of all r is that of the
activations inside the subspace.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .capture import evaluating, recording
from .device import full_precision
from .head import SubspaceHead
from .model import LowRankModel
from .views import valid_patches


class Embedder(nn.Module):
    """The plain network with the leading directions of one layer as its output: images -> (batch, size).

    The directions are those of the branch, which is no longer needed: an embedder is the network, shared and not
    copied, and two tensors. Gradients pass through it. It computes in the dtype of the branch, outside autocast.

    Args:
        model: with trained branches, as `wrap` or `from_pretrained` gave it.
        layer: of the branch; may be left out where there is one branch.
        size: numbers per image, at most as many as W has directions; by default all of these. Of a branch that takes
            tokens for samples the output is (batch, tokens, size), with those that are padding (NaFlex).
        images: batches that the network takes, (n, ...) each or tuples that begin with them, for example a loader of
            the training images. The directions are then the principal ones of these images inside the subspace, and
            their mean is the origin. Without them they are what training has left: the origin is -b, the leading
            directions are those that the subspace head reads, as many as its largest size, and there are no leading
            ones of a branch without a head: the eigenvalues of W do not tell them apart.

    Attributes:
        directions: D U (size, m), orthonormal rows.
        offset: D U b (size,).
        variance: (size,) of each number over `images`; None without them.

    Raises:
        TypeError: `model` is no `LowRankModel`, `size` no integer, or `images` gives no tensors.
        ValueError: no branch on `layer`, a size that W does not have, or that needs images, a branch that was never
            trained, or fewer than two images.
    """

    directions: Tensor
    offset: Tensor
    variance: Tensor | None

    def __init__(
        self,
        model: LowRankModel,
        layer: str | None = None,
        size: int | None = None,
        *,
        images: Iterable[Any] | None = None,
    ):
        super().__init__()
        if not isinstance(model, LowRankModel):
            raise TypeError(
                f"Embedder needs the LowRankModel itself, as wrap() or from_pretrained() gave it, not a "
                f"{type(model).__name__}: a network without branches has no directions"
            )
        layer = _layer_of(model, layer)
        branch = model.branches[layer]
        spanning = branch.weight.spanning_rows()
        if not len(spanning):
            raise ValueError(f"the branch on {layer!r} has no directions before its first projection: train it first")
        read = 0 if branch.head is None else len(branch.head.directions)
        try:
            size = len(spanning) if size is None else operator.index(size)
        except TypeError:
            raise TypeError(f"size is a number of directions, an integer, not {size!r}") from None
        if not 1 <= size <= len(spanning):
            raise ValueError(f"size {size} must lie between 1 and {len(spanning)}, the directions of W on {layer!r}")
        if images is None and read < size < len(spanning):
            known = f"its head reads {read} leading directions" if read else "without a subspace head"
            raise ValueError(
                f"which {size} of the {len(spanning)} directions on {layer!r} lead is not known ({known}): give images"
            )
        self.network = model.backbone
        self.tap = next(tap for tap in model.taps if tap.layer == layer)
        self.training = self.network.training
        self.register_buffer("directions", spanning.clone())
        self.register_buffer("offset", spanning @ branch.bias)
        self.register_buffer("variance", None)
        turn = self._principal(images) if images is not None else self._as_trained(branch.head)
        self._turn(turn[:size].to(self.directions))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the network takes -> the embedding (batch, size), of tokens (batch, tokens, size)."""
        with recording(self.network, [self.tap]) as record:
            self.network(*args, **kwargs)
        activations = record.activation(self.tap)
        # Of padding a token has numbers, too, so that the output is one tensor; a mean is of what is no padding.
        padded = None if self.tap.view.kind == "token" else valid_patches(args, kwargs)
        rows = self.tap.view.rows(activations, self.tap.view.valid(activations, padded))
        with full_precision(rows.device):
            numbers = functional.linear(rows.to(self.directions.dtype), self.directions, self.offset)
        of_tokens = self.tap.view.kind == "token" and activations.dim() > 2
        return numbers.unflatten(0, (len(activations), -1)) if of_tokens else numbers

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if f"{prefix}directions" in state_dict:  # variances belong to these, and not all directions have them
            variance = state_dict.get(f"{prefix}variance")
            self.variance = None if variance is None else self.offset.new_empty(variance.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _turn(self, turn: Tensor) -> None:
        """Takes other directions (size, kept) inside those that there are."""
        self.directions, self.offset = turn @ self.directions, turn @ self.offset
        self.variance = None if self.variance is None else self.variance[: len(turn)]

    def _as_trained(self, head: SubspaceHead | None) -> Tensor:
        """D (kept, kept): first what the head reads, then what is left, in no order that means anything."""
        kept = len(self.directions)
        identity = torch.eye(kept, dtype=torch.float64)
        if head is None or not head.ready:
            return identity
        known = head.directions.double().cpu()
        basis = torch.linalg.qr(torch.cat([known.T, identity], dim=1)).Q[:, :kept]
        return torch.cat([known, basis[:, len(known) :].T])

    @torch.no_grad()
    def _principal(self, images: Iterable[Any]) -> Tensor:
        """D (kept, kept) from images; moves the origin to their mean."""
        count, total, squares = 0, torch.zeros(1), torch.zeros(1)
        batches = [images] if isinstance(images, Tensor) else images
        device = next(self.network.parameters(), self.directions).device
        with evaluating(self):
            for batch in batches:
                pixels = batch[0] if isinstance(batch, tuple | list) else batch
                if not isinstance(pixels, Tensor):
                    raise TypeError(
                        "images= takes batches of images, or tuples that begin with them, not a "
                        f"{type(pixels).__name__}: of a loader of dictionaries "
                        '(batch["pixel_values"] for batch in loader)'
                    )
                rows = self(pixels.to(device)).flatten(0, -2).double().cpu()
                count, total, squares = count + len(rows), total + rows.sum(dim=0), squares + rows.T @ rows
        if count < 2:
            raise ValueError(f"principal directions need at least 2 images, and there were {count}")
        mean = total / count
        if not squares.isfinite().all():
            raise ValueError("the network gives NaN or infinite values for some of the images: leave them out")
        variance, vectors = torch.linalg.eigh(squares / count - mean.outer(mean))
        self.offset = self.offset - mean.to(self.offset)
        self.variance = variance.flip(0).clamp_min(0).to(self.offset)
        return vectors.flip(1).T


def _layer_of(model: LowRankModel, layer: str | None) -> str:
    layers = list(model.branches.keys())
    if layer is not None and layer in layers:
        return layer
    if layer is None and len(layers) == 1:
        return layers[0]
    asked = "of which layer?" if layer is None else f"there is no branch on {layer!r}."
    raise ValueError(f"Embedder: {asked} The branches are on {', '.join(map(repr, layers))}")
