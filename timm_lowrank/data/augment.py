"""From bytes to the network's input: crop, flip and normalisation of a whole batch on its device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


@dataclasses.dataclass
class Draws:
    """What is random in the augmentation of some images."""

    offsets: Tensor | None = None  # (2, batch, 1) int64: top and left edge of each window; None cuts none out
    mirrored: Tensor | None = None  # (batch,) bool; None mirrors none

    @classmethod
    def joined(cls, batches: Sequence[Draws]) -> Draws:
        """The draws of several batches, one behind the other."""
        offsets = [draws.offsets for draws in batches if draws.offsets is not None]
        mirrored = [draws.mirrored for draws in batches if draws.mirrored is not None]
        return cls(torch.cat(offsets, dim=1) if offsets else None, torch.cat(mirrored) if mirrored else None)


def crop(
    images: Tensor,  # (batch, channels, height, width), any dtype
    padding: int,  # pixels added on every side
    offsets: Tensor,  # (2, batch, 1) int64, in [0, 2 * padding]
) -> Tensor:
    """A window of the original size out of each image padded with black, at a place of its own."""
    batch, channels, height, width = images.shape
    padded = functional.pad(images, (padding,) * 4)
    rows = offsets[0] + torch.arange(height, device=images.device)
    columns = offsets[1] + torch.arange(width, device=images.device)
    sample = torch.arange(batch, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[None, :, None, None]
    return padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]


def flip(
    images: Tensor,  # (batch, channels, height, width), any dtype
    mirrored: Tensor,  # (batch,) bool
) -> Tensor:
    """Some of the images mirrored left to right."""
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


class Transform:
    """Turns bytes into what the network takes.

    Args:
        mean, std: of each channel, of pixels in [0, 1].
        augment: "crop-flip", "crop" or "none"; used only where something was drawn.
        device: where the batches are.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], augment: str, device: torch.device) -> None:
        self.mean = 255 * torch.tensor(mean, device=device).view(1, -1, 1, 1)
        self.std = 255 * torch.tensor(std, device=device).view(1, -1, 1, 1)
        self.augment = augment

    def draw(self, batch: int, height: int, generator: torch.Generator) -> Draws:
        """What `augment` needs for a batch of images of this height, from a generator on the batches' device."""
        draws, device = Draws(), self.mean.device
        if self.augment != "none":
            size = (2, batch, 1)
            draws.offsets = torch.randint(0, 2 * _padding(height) + 1, size, generator=generator, device=device)
        if self.augment == "crop-flip":
            draws.mirrored = torch.rand(batch, generator=generator, device=device) < 0.5
        return draws

    def __call__(self, images: Tensor, draws: Draws | None = None) -> Tensor:
        """(batch, channels, height, width): uint8 in, normalised float32 out, augmented as was drawn."""
        if draws is not None and draws.offsets is not None:
            images = crop(images, _padding(images.shape[-2]), draws.offsets)
        if draws is not None and draws.mirrored is not None:
            images = flip(images, draws.mirrored)
        return torch.sub(images, self.mean).div_(self.std)  # bytes become float32 within the subtraction


def _padding(height: int) -> int:
    """Four pixels at 32 x 32, as is usual for CIFAR, and in proportion elsewhere."""
    return max(1, height // 8)
