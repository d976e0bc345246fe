"""What counts as one sample of a layer: the whole image, one position of it, or the mean over its positions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import CaptureError

VIEWS = ("flatten", "token", "pool")


@dataclasses.dataclass(frozen=True)
class View:
    """How the output of a layer becomes rows, one for each sample.

    "flatten", the paper's: an image is a row of all its features. "token": every position of a feature map, or every
    token, is a row, and m is the number of channels. "pool": the mean over positions or tokens is the row of an image.
    Class tokens and registers count like any other token, the padding of sequences (NaFlex) does not count.

    Args:
        kind: one of `VIEWS`.
        channel_dim: which dimension of the layer's output holds the channels; negative ones count from the last. It has
            no meaning for "flatten", nor for outputs (batch, features), which all three take as they are.
    """

    kind: str = "flatten"
    channel_dim: int = 1

    def rows(
        self,
        activations: Tensor,  # (batch, ...), at least two dimensions
        valid: Tensor | None = None,  # (batch, positions) bool, as `valid` gives it; None takes all positions
    ) -> Tensor:
        """(samples, m): (batch, all features) or, for "token", (batch x positions, channels), with the graph."""
        if self.kind == "flatten" or activations.dim() == 2:
            return activations.flatten(1)
        positions = activations.movedim(self.channel_dim, -1).flatten(1, -2)  # (batch, positions, channels)
        if valid is None:
            return positions.mean(dim=1) if self.kind == "pool" else positions.flatten(0, 1)
        if self.kind == "token":
            return positions[valid]
        # Not multiplied by zero: what a network computes of padding need not be finite.
        # In single precision at least, as mean() does: the sum of some hundred tokens may overflow float16.
        wide = torch.promote_types(positions.dtype, torch.float32)
        sums = positions.masked_fill(~valid[..., None], 0).sum(dim=1, dtype=wide)
        return (sums / valid.sum(dim=1, keepdim=True).clamp_min(1)).to(positions.dtype)

    def valid(
        self,
        activations: Tensor,  # (batch, ...)
        patches: Tensor | None,  # (batch, patches) bool, as `valid_patches` gives it
    ) -> Tensor | None:
        """Which positions are no padding, (batch, positions) bool; None means all of them.

        Raises:
            CaptureError: there is padding, and the layer has not the same tokens, or is flattened.
        """
        if patches is None or activations.dim() != 3 or bool(patches.all()):  # pooled already, or without padding
            return None
        if self.kind == "flatten":
            raise CaptureError(
                'images of this batch are padded to one number of patches, which the view "flatten" would take for '
                'features: take the view "token" or "pool"'
            )
        tokens = activations.movedim(self.channel_dim, -1).shape[1]
        in_front = tokens - patches.shape[1]  # class tokens and registers
        if in_front < 0:
            raise CaptureError(
                f"images of this batch are padded to {patches.shape[1]} patches, and a layer gives {tokens} tokens of "
                "each, so which of them are padding is not known: train without patch dropout, or on batches without "
                "padding"
            )
        return torch.cat([patches.new_ones(len(patches), in_front), patches], dim=1)

    def agrees(self, other: View) -> bool:
        """Whether both make the same rows of every output: the channels' dimension has no meaning for "flatten"."""
        return self.kind == other.kind and (self.kind == "flatten" or self.channel_dim == other.channel_dim)

    def width(self, activations: Tensor) -> int:
        """m, the number of features of a row of these activations (batch, ...)."""
        if self.kind == "flatten" or activations.dim() == 2:
            return activations[0].numel()
        return activations.shape[self.channel_dim]


FLATTEN = View()


def valid_patches(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Which patches of the images that a network is given are no padding, (batch, patches) bool.

    NaFlex models of timm take it as "patch_valid", by keyword or in the dictionary that timm's loader gives. None where
    nothing says that there is padding.
    """
    for entries in (*args[:1], kwargs.get("x"), kwargs):
        if isinstance(entries, Mapping) and isinstance(entries.get("patch_valid"), Tensor):
            return entries["patch_valid"].bool()  # type: ignore[no-any-return]
    return None
