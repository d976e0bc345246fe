"""From bytes to the network's input: crop, flip and normalisation of a whole batch on its device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def crop(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """A window of the original size out of each image padded with black, at a place of its own.

    Args:
        images: (batch, channels, height, width), any dtype.
        padding: pixels added on every side.
        generator: on the device of the images.
    """
    batch, channels, height, width = images.shape
    padded = functional.pad(images, (padding,) * 4)
    offsets = torch.randint(0, 2 * padding + 1, (2, batch, 1), generator=generator, device=images.device)
    rows = offsets[0] + torch.arange(height, device=images.device)
    columns = offsets[1] + torch.arange(width, device=images.device)
    sample = torch.arange(batch, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[None, :, None, None]
    return padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]


def flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image mirrored left to right with probability 1/2; images as in `crop`."""
    mirrored = torch.rand(len(images), generator=generator, device=images.device) < 0.5
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


class Transform:
    """Turns bytes into what the network takes.

    Args:
        mean, std: of each channel, of pixels in [0, 1].
        augment: "crop-flip", "crop" or "none"; used only where a generator is given.
        device: where the batches are.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], augment: str, device: torch.device) -> None:
        self.mean = 255 * torch.tensor(mean, device=device).view(1, -1, 1, 1)
        self.std = 255 * torch.tensor(std, device=device).view(1, -1, 1, 1)
        self.augment = augment

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(batch, channels, height, width): uint8 in, normalised float32 out, augmented if there is a generator."""
        if generator is not None and self.augment != "none":
            # Four pixels at 32 x 32, as is usual for CIFAR, and in proportion elsewhere.
            images = crop(images, max(1, images.shape[-2] // 8), generator)
            if self.augment == "crop-flip":
                images = flip(images, generator)
        return (images.float() - self.mean) / self.std
