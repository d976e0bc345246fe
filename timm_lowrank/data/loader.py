"""Batches out of tensors in memory: every process takes its share of one common order."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import RecipeError
from .augment import Transform


class TrainBatches:
    """The training images of one process, in an order that `seed` and the epoch alone decide.

    In every epoch an image is seen once at most, on one process only, and all processes take the same number
    of steps; the images that do not fill a last batch are left out, others in each epoch. As nothing depends
    on what was drawn before, a run resumes at any batch without state of its own.

    Args:
        images: (n, channels, height, width), uint8.
        labels: (n,), int64.
        transform: applied to each batch.
        batch_size: images of one optimizer step, over all processes and parts.
        parts: forward passes that each process makes of its share of a batch (gradient accumulation).
        seed: of the order and of the augmentation.
        process, processes: this process and their number.

    Raises:
        RecipeError: if `batch_size` cannot be divided, or there are fewer images than that.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, transform: Transform,
        *, batch_size: int, parts: int = 1, seed: int = 0, process: int = 0, processes: int = 1,
    ) -> None:  # fmt: skip
        check_batch(batch_size, parts, processes, len(images))
        self.images, self.labels, self.transform = images, labels, transform
        self.batch_size, self.parts, self.seed = batch_size, parts, seed
        self.process, self.processes = process, processes
        self.steps = len(images) // batch_size

    def __len__(self) -> int:
        """Batches that this process yields in an epoch: optimizer steps times parts."""
        return self.steps * self.parts

    def indices(self, epoch: int) -> Iterator[Tensor]:
        """(batch_size / parts / processes,), int64, for each batch of this process."""
        generator = torch.Generator().manual_seed(mix(self.seed, epoch, 0))
        order = torch.randperm(len(self.images), generator=generator)
        shares = order[: self.steps * self.batch_size].view(len(self), self.processes, -1)
        yield from shares[:, self.process]

    def epoch(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images (batch, channels, height, width) and their labels (batch,), from batch `first` on."""
        device = self.images.device
        generator = torch.Generator(device).manual_seed(mix(self.seed, epoch, 1 + self.process))
        for number, chosen in enumerate(self.indices(epoch)):
            rows = chosen.to(device)
            images = self.transform(self.images[rows], generator)  # also of those left out: it draws what they drew
            if number >= first:
                yield images, self.labels[rows]


class EvalBatches:
    """Every test image once, over all processes together, not augmented. Arguments as in `TrainBatches`."""

    def __init__(
        self, images: Tensor, labels: Tensor, transform: Transform,
        *, batch_size: int, process: int = 0, processes: int = 1,
    ) -> None:  # fmt: skip
        self.images, self.labels = images[process::processes], labels[process::processes]
        self.transform, self.batch_size = transform, batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self.images), self.batch_size):
            rows = slice(start, start + self.batch_size)
            yield self.transform(self.images[rows]), self.labels[rows]


def check_batch(batch_size: int, parts: int, processes: int, images: int) -> None:
    """Raises RecipeError if `batch_size` cannot be divided among processes and parts, or there are fewer images."""
    if batch_size % (parts * processes):
        raise RecipeError(
            f"batch_size={batch_size} cannot be divided among {processes} processes with gradient_accumulation={parts}"
        )
    if images < batch_size:
        raise RecipeError(f"batch_size={batch_size} is more than the {images} training images")


def mix(*numbers: int) -> int:
    """Distinct seeds for distinct numbers such as (seed, epoch, stream), far apart even where they are small."""
    mixed = 0
    for value in numbers:
        mixed = ((mixed ^ value) * 0x9E3779B97F4A7C15 + 0x7F4A7C15) % 2**63
    return mixed
