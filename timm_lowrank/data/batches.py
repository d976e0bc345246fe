"""Batches on their device, out of tensors in memory or out of files: every process takes its share of one common order.

`training_batches` and `evaluation_batches` give those that a data set needs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ..errors import RecipeError
from .augment import Draws, Transform
from .images import ImageData, balanced_rows
from .order import EpochOrder, ReadPlan, mix
from .stream import StreamedData, read_in_workers

_PREPARED_BYTES = 16 << 20  # of the images that are augmented at once on a GPU


@dataclasses.dataclass(kw_only=True, eq=False)
class _Shares:
    """How an epoch of training is divided; `TrainBatches` says what the fields are."""

    batch_size: int
    parts: int = 1
    seed: int = 0
    process: int = 0
    processes: int = 1
    steps: int = dataclasses.field(init=False)  # optimizer steps of an epoch

    def _divide(self, images: int) -> None:
        """Sets `steps`; raises a RecipeError if `batch_size` cannot be divided or there are fewer images."""
        if self.batch_size % (self.parts * self.processes):
            raise RecipeError(
                f"batch_size={self.batch_size} cannot be divided among {self.processes} processes "
                f"with gradient_accumulation={self.parts}"
            )
        if images < self.batch_size:
            raise RecipeError(f"batch_size={self.batch_size} is more than the {images} training images")
        self.steps = images // self.batch_size

    def __len__(self) -> int:
        """Batches that this process yields in an epoch: optimizer steps times parts."""
        return self.steps * self.parts


@dataclasses.dataclass(eq=False)
class TrainBatches(_Shares):
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

    images: Tensor
    labels: Tensor
    transform: Transform

    def __post_init__(self) -> None:
        self._divide(len(self.images))

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
        order = torch.stack(list(self.indices(epoch))).to(device)  # at once: each copy makes a GPU wait for the host
        batch, height = order.shape[1], self.images.shape[-2]
        for _ in range(first):
            self.transform.draw(batch, height, generator)  # what the batches that are left out have drawn
        for rows in order[first:].split(self._prepared_together(batch)):
            draws = Draws.joined([self.transform.draw(batch, height, generator) for _ in rows])
            images = self.transform(self.images[rows.flatten()], draws)
            yield from zip(images.split(batch), self.labels[rows], strict=True)

    def _prepared_together(self, batch: int) -> int:
        """How many batches are augmented at once: many small kernels would keep a GPU waiting, a cache is small."""
        size = 4 * batch * self.images[0].numel()
        return max(1, _PREPARED_BYTES // size) if self.images.is_cuda else 1


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


@dataclasses.dataclass(eq=False)
class StreamTrainBatches(_Shares):
    """The training images of one process, read from their files; the interface and promises of `TrainBatches`.

    The order, and the random part of each image that the decoder cuts out, are functions of the seed, the epoch and
    the shards, not of the number of processes and workers: a run goes on at any batch, on any number of processes,
    with the images that it would have been given. What `transform` draws depends on the process, too.

    Args:
        data: where the images are.
        transform: applied to each batch on its device.
        device: of the batches.
        batch_size, parts, seed, process, processes: as in `TrainBatches`.
        buffer: encoded images held for shuffling, over all processes; images that are files of their own need none.
        workers: processes that read and decode; 0 does it in this one.

    Raises:
        RecipeError: if `batch_size` cannot be divided, or there are fewer images than that.
    """

    data: StreamedData
    transform: Transform
    device: torch.device
    _: dataclasses.KW_ONLY
    buffer: int = 10_000
    workers: int = 0

    def __post_init__(self) -> None:
        self._divide(len(self.data.train))
        whole = self.batch_size // self.parts
        share = whole // self.processes
        self.positions = range(self.process * share, (self.process + 1) * share)  # of this process in every batch
        self.workers = min(self.workers, share)
        split = self.data.train
        if split.apart:  # a folder of images, sorted by class: each as a row group of its own they all change places
            each = np.ones(len(split), dtype=np.int64)
            self.order = EpochOrder(each, whole, len(self), 1, self.seed)
        else:
            self.order = EpochOrder(split.group_rows, whole, len(self), self.buffer, self.seed, split.group_bytes)

    def indices(self, epoch: int) -> Iterator[Tensor]:
        """(batch_size / parts / processes,), int64, for each batch of this process: rows of the training split."""
        yield from torch.from_numpy(self.order.indices(epoch, self.positions))

    def epoch(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images (batch, channels, height, width) and their labels (batch,), from batch `first` on.

        Raises:
            DataError: a shard or an image is damaged; the message names file and row.
        """
        plans = functools.partial(_train_plans, self.order, self.positions, epoch, first)
        parts = read_in_workers(
            self.data.train, self.data.decoder, plans,
            seed=mix(self.seed, epoch), workers=self.workers, device=self.device,
        )  # fmt: skip
        width = max(1, self.workers)
        for number in range(first, len(self)):
            images, labels = (torch.cat(tensors) for tensors in zip(*(next(parts) for _ in range(width)), strict=True))
            # A generator for each batch: nothing to catch up on when a run is resumed.
            generator = torch.Generator(self.device).manual_seed(mix(self.seed, epoch, 1 + self.process, number))
            draws = self.transform.draw(len(images), images.shape[-2], generator)
            images, labels = (tensor.to(self.device, non_blocking=True) for tensor in (images, labels))
            yield self.transform(images, draws), labels


class StreamEvalBatches:
    """Every test image once, in the order of the shards, over all processes together.

    A process has neighbouring rows, a worker every so many batches of them. Arguments as in `StreamTrainBatches`, and
    `rows` of the test split, (n,), int64, ascending: these alone; None are all.
    """

    def __init__(
        self, data: StreamedData, transform: Transform, device: torch.device,
        *, batch_size: int, process: int = 0, processes: int = 1, workers: int = 0, rows: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        self.data, self.transform, self.device = data, transform, device
        rows = np.arange(len(data.test)) if rows is None else rows
        first, last = (len(rows) * p // processes for p in (process, process + 1))
        self.batches = [rows[start : min(start + batch_size, last)] for start in range(first, last, batch_size)]
        self.workers = min(workers, len(self.batches))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        plans = functools.partial(_eval_plans, self.batches)
        read = read_in_workers(self.data.test, self.data.decoder, plans, workers=self.workers, device=self.device)
        for images, labels in read:
            images, labels = (tensor.to(self.device, non_blocking=True) for tensor in (images, labels))
            yield self.transform(images), labels


TrainingBatches = TrainBatches | StreamTrainBatches
TestBatches = EvalBatches | StreamEvalBatches


def training_batches(
    data: ImageData | StreamedData, device: torch.device, *, augment: str, buffer: int, workers: int, **share: int
) -> TrainingBatches:
    """The share of a process in the training images.

    Args:
        data: the images.
        device: of the batches.
        augment: "crop-flip", "crop" or "none". Images that are brought to one size while they are read are also cut
            and mirrored there.
        buffer, workers: as in `StreamTrainBatches`; in memory they mean nothing.
        share: batch_size, parts, seed, process and processes as in `TrainBatches`.

    Raises:
        RecipeError: the batch cannot be divided among processes and parts.
    """
    if isinstance(data, ImageData):
        transform = Transform(data.mean, data.std, augment, device)
        return TrainBatches(data.train_images.to(device), data.train_labels.to(device), transform, **share)
    transform = Transform(data.mean, data.std, "none" if data.decoder.resize else augment, device)
    return StreamTrainBatches(data, transform, device, **share, buffer=buffer, workers=workers)


def evaluation_batches(
    data: ImageData | StreamedData, device: torch.device, *, workers: int, limit: int | None = None, **share: int
) -> TestBatches:
    """The share of a process in the test images; without process and processes all of them.

    Args:
        data, device, workers, share: as in `training_batches`.
        limit: so many test images alone, as `balanced_rows` takes them: where the classes lie one behind the other, as
            in a folder of images, the first ones would be of a few of them. None takes all.
    """
    transform = Transform(data.mean, data.std, "none", device)
    limit = None if limit is None or limit >= data.counts[1] else limit
    if isinstance(data, ImageData):
        images, labels = data.test_images, data.test_labels
        if limit is not None:
            rows = torch.from_numpy(balanced_rows(labels.numpy(), limit, len(data.class_names)))
            images, labels = images[rows], labels[rows]
        return EvalBatches(images.to(device), labels.to(device), transform, **share)
    wanted = None if limit is None else balanced_rows(data.test.labels(), limit, len(data.class_names))
    return StreamEvalBatches(data, transform, device, **share, workers=workers, rows=wanted)


# What a worker reads. Functions of the module, which travel to other processes.


def _train_plans(
    order: EpochOrder, positions: range, epoch: int, first: int, worker: int, workers: int
) -> list[ReadPlan]:
    """Its positions of every batch, so that a batch is put together of one part from each worker."""
    start, width = positions.start, len(positions)
    own = range(start + width * worker // workers, start + width * (worker + 1) // workers)
    return order.share(epoch, own, first)


def _eval_plans(batches: list[np.ndarray], worker: int, workers: int) -> list[ReadPlan]:
    """Whole batches, in turn with the other workers."""
    own = batches[worker::workers]
    rows = np.concatenate([np.empty(0, dtype=np.int64), *own])
    return [ReadPlan(rows, np.arange(len(rows)), np.array([len(batch) for batch in own], dtype=np.int64))]
