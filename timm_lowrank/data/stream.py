"""Batches out of parquet shards, read and decoded by worker processes: the streamed twins of those in loader.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..errors import DataError
from .augment import Transform
from .loader import check_batch, mix
from .order import EpochOrder, Lane
from .shards import Encoded, ShardSplit
from .streamed import StreamedData, check_label

Part = tuple[Tensor, Tensor]  # uint8 images (n, channels, height, width) and int64 labels (n,)


class StreamTrainBatches:
    """The training images of one process, read from their shards; the interface and promises of `TrainBatches`.

    The order, and the random part of each image that `data.decode` cuts out, are functions of the seed, the epoch and
    the shards, not of the number of processes and workers: a run goes on at any batch, on any number of processes,
    with the images that it would have been given. What `transform` draws depends on the process, too.

    Args:
        data: the shards.
        transform: applied to each batch on its device.
        device: of the batches.
        batch_size, parts, seed, process, processes: as in `TrainBatches`.
        buffer: encoded images held for shuffling, over all processes.
        workers: processes that read and decode; 0 does it in this one.

    Raises:
        RecipeError: if `batch_size` cannot be divided, or there are fewer images than that.
    """

    def __init__(
        self, data: StreamedData, transform: Transform, device: torch.device,
        *, batch_size: int, parts: int = 1, seed: int = 0, process: int = 0, processes: int = 1,
        buffer: int = 10_000, workers: int = 0,
    ) -> None:  # fmt: skip
        check_batch(batch_size, parts, processes, len(data.train))
        self.data, self.transform, self.device = data, transform, device
        self.batch_size, self.parts, self.seed, self.process = batch_size, parts, seed, process
        self.steps = len(data.train) // batch_size
        whole, share = batch_size // parts, batch_size // parts // processes
        self.places = range(process * share, (process + 1) * share)  # of this process in every batch
        self.workers = min(workers, share)
        groups, group_bytes = data.train.groups, data.train.group_bytes
        self.order = EpochOrder(groups, whole, self.steps * parts, buffer, seed, group_bytes)

    def __len__(self) -> int:
        """Batches that this process yields in an epoch: optimizer steps times parts."""
        return self.steps * self.parts

    def indices(self, epoch: int) -> Iterator[Tensor]:
        """(batch_size / parts / processes,), int64, for each batch of this process: rows of the training split."""
        yield from torch.from_numpy(self.order.indices(epoch, self.places))

    def epoch(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images (batch, channels, height, width) and their labels (batch,), from batch `first` on.

        Raises:
            DataError: a shard, an image or a label is damaged; the message names file and row.
        """
        work = _TrainWork(self.order, self.places, epoch, first)
        shows = _Pass(self.data, self.data.train, work, mix(self.seed, epoch))
        parts = _delivered(shows, self.workers, self.device)
        width = max(1, self.workers)
        for number in range(first, len(self)):
            images, labels = (torch.cat(tensors) for tensors in zip(*(next(parts) for _ in range(width)), strict=True))
            # A generator for each batch: nothing to catch up on when a run is resumed.
            generator = torch.Generator(self.device).manual_seed(mix(self.seed, epoch, 1 + self.process, number))
            yield self.transform(images.to(self.device, non_blocking=True), generator), labels.to(self.device)


class StreamEvalBatches:
    """Every test image once, in the order of the shards, over all processes together.

    A process has neighbouring rows, a worker every so many batches of them. Arguments as in `StreamTrainBatches`.
    """

    def __init__(
        self, data: StreamedData, transform: Transform, device: torch.device,
        *, batch_size: int, process: int = 0, processes: int = 1, workers: int = 0,
    ) -> None:  # fmt: skip
        self.data, self.transform, self.device = data, transform, device
        first, last = (len(data.test) * p // processes for p in (process, process + 1))
        self.batches = [np.arange(start, min(start + batch_size, last)) for start in range(first, last, batch_size)]
        self.workers = min(workers, len(self.batches))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        shows = _Pass(self.data, self.data.test, _EvalWork(self.batches))
        for images, labels in _delivered(shows, self.workers, self.device):
            yield self.transform(images.to(self.device, non_blocking=True)), labels.to(self.device)


@dataclasses.dataclass(frozen=True)
class _TrainWork:
    """What a worker reads: its places of every batch, so that a batch is put together of one part from each."""

    order: EpochOrder
    places: range
    epoch: int
    first: int

    def __call__(self, worker: int, workers: int) -> list[Lane]:
        cut = (self.places.start + len(self.places) * part // workers for part in (worker, worker + 1))
        return self.order.share(self.epoch, range(*cut), self.first)


@dataclasses.dataclass(frozen=True)
class _EvalWork:
    """What a worker reads: whole batches, in turn with the other workers."""

    batches: list[np.ndarray]

    def __call__(self, worker: int, workers: int) -> list[Lane]:
        batches = self.batches[worker::workers]
        rows = np.concatenate([np.empty(0, dtype=np.int64), *batches])
        return [Lane(rows, np.arange(len(rows)), np.array([len(batch) for batch in batches], dtype=np.int64))]


class _Pass(IterableDataset[Any]):
    """One pass over a split as a DataLoader runs it, in each of its workers.

    Args:
        data: the shards.
        split: that one of its splits.
        work: (worker, workers) -> what that worker reads.
        seed: of the random parts of training images; None is for test images.
    """

    def __init__(
        self, data: StreamedData, split: ShardSplit, work: Callable[[int, int], list[Lane]], seed: int | None = None
    ) -> None:
        self.data, self.split, self.work, self.seed = data, split, work, seed

    def __iter__(self) -> Iterator[Part | DataError]:
        info = get_worker_info()
        lanes = self.work(info.id, info.num_workers) if info else self.work(0, 1)
        readers = [_reordered(self.split.read(lane.rows), lane.order) for lane in lanes]
        try:
            for counts in zip(*(lane.counts.tolist() for lane in lanes), strict=True):
                items = [next(reader) for reader, count in zip(readers, counts, strict=True) for _ in range(count)]
                yield torch.stack([self._pixels(item) for item in items]), torch.tensor([item.label for item in items])
        except DataError as error:
            yield error  # raised here, it would arrive as a traceback in a message

    def _pixels(self, item: Encoded) -> Tensor:
        check_label(item.label, len(self.data.class_names), item.where)
        return self.data.decode(item.image, item.where, None if self.seed is None else mix(self.seed, item.row))


def _reordered(items: Iterator[Encoded], order: np.ndarray) -> Iterator[Encoded]:
    """The `order[k]`-th of `items` as the k-th; those that are read before their turn are held."""
    held: dict[int, Encoded] = {}
    count = 0
    for wanted in order.tolist():
        while wanted not in held:
            held[count] = next(items)
            count += 1
        yield held.pop(wanted)


def _delivered(shows: _Pass, workers: int, device: torch.device) -> Iterator[Part]:
    """The parts of all workers in turn, one of each; a worker's error is raised here."""
    loader = DataLoader(
        shows,
        batch_size=None,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator().manual_seed(0),  # without one, torch would draw from the global one
    )
    parts = iter(loader)
    while True:
        try:
            part = next(parts)
        except StopIteration:
            return
        except RuntimeError as error:
            if not workers:
                raise
            raise DataError(
                f"a worker that reads images died ({error}): if memory ran out, lower workers (now {workers}) "
                "or shuffle_buffer"
            ) from error
        if isinstance(part, DataError):
            raise part
        yield part
