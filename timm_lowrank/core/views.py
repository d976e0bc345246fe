"""What counts as one sample of a layer: the whole image, one position of it, or the mean over its positions."""

from __future__ import annotations

import dataclasses

from torch import Tensor

VIEWS = ("flatten", "token", "pool")


@dataclasses.dataclass(frozen=True)
class View:
    """How the output of a layer becomes rows, one for each sample.

    "flatten", the paper's: an image is a row of all its features. "token": every position of a feature map, or every
    token, is a row, and m is the number of channels. "pool": the mean over positions or tokens is the row of an image.
    Class tokens, registers and the padding of sequences (NaFlex) count like any other token.

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
    ) -> Tensor:
        """(samples, m): (batch, all features) or, for "token", (batch x positions, channels), with the graph."""
        if self.kind == "flatten" or activations.dim() == 2:
            return activations.flatten(1)
        positions = activations.movedim(self.channel_dim, -1).flatten(1, -2)  # (batch, positions, channels)
        return positions.mean(dim=1) if self.kind == "pool" else positions.flatten(0, 1)

    def agrees(self, other: View) -> bool:
        """Whether both make the same rows of every output: the channels' dimension has no meaning for "flatten"."""
        return self.kind == other.kind and (self.kind == "flatten" or self.channel_dim == other.channel_dim)

    def width(self, activations: Tensor) -> int:
        """m, the number of features of a row of these activations (batch, ...)."""
        if self.kind == "flatten" or activations.dim() == 2:
            return activations[0].numel()
        return activations.shape[self.channel_dim]


FLATTEN = View()
