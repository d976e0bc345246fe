"""`StreamedData`: a data set that stays in its files, and the worker processes that read and decode it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..errors import DataError
from .decode import INTERPOLATION, Decoder
from .images import ImageData, decoded, fingerprint, per_channel
from .order import ReadPlan, mix
from .sources import DataOrigin, Encoded, Source, Split

# Of ImageNet, over colours and over grey values: those of the data itself cannot be had without reading all of it.
MEAN, STD = {3: (0.485, 0.456, 0.406), 1: (0.449,)}, {3: (0.229, 0.224, 0.225), 1: (0.226,)}
FINGERPRINT = "shards:"

Part = tuple[Tensor, Tensor]  # uint8 images (n, channels, height, width) and int64 labels (n,)


@dataclasses.dataclass(frozen=True)
class StreamedData:
    """Training and test images in their files.

    `decoder` gives pixels of one size. `mean` and `std` are of pixels in [0, 1], a number for each channel.
    `fingerprint` is the SHA-256 of the names, sizes and row groups of the shards and of the class names.
    """

    name: str
    train: Split
    test: Split
    class_names: tuple[str, ...]
    decoder: Decoder
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str
    origin: DataOrigin | None = None  # None: not known

    @property
    def image_size(self) -> tuple[int, int, int]:
        """(channels, height, width), after resizing."""
        return self.decoder.shape

    @property
    def counts(self) -> tuple[int, int]:
        """(training images, test images)."""
        return len(self.train), len(self.test)

    @property
    def data_config(self) -> dict[str, Any]:
        """What the network is fed, in timm's words: it goes into the configuration of the exported model."""
        resized = {"interpolation": INTERPOLATION} if self.decoder.resize else {}
        fed = {"input_size": self.image_size, "mean": self.mean, "std": self.std, "crop_pct": self.decoder.crop_pct}
        return {**fed, **resized}

    def subset(self, train: int, test: int, *, progress: bool = False) -> ImageData:
        """The first `train` and `test` images of their splits, as many of each class as there are, in memory.

        For measurements that go over the same images many times. Only these are decoded, training images too as if
        they were test images: no random part, no mirroring.

        Args:
            train, test: how many; at most all there are.
            progress: whether a slow decoding shows a progress bar.

        Returns:
            Images with the mean, std, fingerprint and origin of the whole.

        Raises:
            DataError: a file cannot be read, an image cannot be decoded.
        """
        splits = [
            decoded(split, min(limit, len(split)), len(self.class_names), self.decoder, progress)
            for split, limit in ((self.train, train), (self.test, test))
        ]
        return ImageData(
            self.name, *splits[0], *splits[1], self.class_names, self.mean, self.std, self.fingerprint, self.origin
        )


def stream(
    source: Source, decoder: Decoder, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> StreamedData:
    """`source` as it is read whenever it is needed; without `mean` and `std` with those of ImageNet.

    Raises:
        DataError: `mean` or `std` are not of as many channels as the images have.
    """
    channels = decoder.shape[0]
    # Without folders, so that a copy in another place is the same data.
    shards = (
        f"\0{use} {shard.name} {shard.size} {shard.groups}".encode()
        for use, split in (("train", source.train), ("test", source.test))
        for shard in split.shards
    )
    return StreamedData(
        source.name, source.train, source.test, source.class_names, decoder,
        mean=per_channel("mean", mean, channels) or MEAN[channels],
        std=per_channel("std", std, channels) or STD[channels],
        fingerprint=FINGERPRINT + fingerprint(source.class_names, shards), origin=source.origin,
    )  # fmt: skip


def read_in_workers(
    split: Split,
    decoder: Decoder,
    plans: Callable[[int, int], list[ReadPlan]],
    *,
    seed: int | None = None,
    workers: int,
    device: torch.device,
) -> Iterator[Part]:
    """Batches, or parts of them, from all workers in turn.

    Args:
        split, decoder: what is read, and how it is decoded.
        plans: (worker, workers) -> what that worker reads; of every plan it takes one count of images for each part.
        seed: of the random parts of training images; None is for test images.
        workers: processes; 0 does it in this one.
        device: where the parts will go.

    Raises:
        DataError: a file or an image is damaged, or a worker died.
    """
    loader = DataLoader(
        _Decoded(split, decoder, plans, seed),
        batch_size=None,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator().manual_seed(0),  # without one, torch would draw from the global one
    )
    parts = iter(loader)
    try:
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
    finally:
        # An error would keep it alive in a cycle with its own traceback. Collected with a cycle, its queues close
        # before it can tell the workers to end, and it waits five seconds for each of them.
        del parts


class _Decoded(IterableDataset[Any]):
    """One pass over a split as a DataLoader runs it, in each of its workers. Arguments as in `read_in_workers`."""

    def __init__(
        self, split: Split, decoder: Decoder, plans: Callable[[int, int], list[ReadPlan]], seed: int | None
    ) -> None:
        self.split, self.decoder, self.plans, self.seed = split, decoder, plans, seed

    def __iter__(self) -> Iterator[Part | DataError]:
        info = get_worker_info()
        plans = self.plans(info.id, info.num_workers) if info else self.plans(0, 1)
        readers = [_reordered(self.split.read(plan.rows), plan.order) for plan in plans]
        try:
            for counts in zip(*(plan.counts.tolist() for plan in plans), strict=True):
                items = [next(reader) for reader, count in zip(readers, counts, strict=True) for _ in range(count)]
                pixels = np.stack([self._pixels(item) for item in items])
                yield torch.from_numpy(pixels), torch.tensor([item.label for item in items])
        except DataError as error:
            yield error  # raised here, it would arrive as a traceback in a message

    def _pixels(self, item: Encoded) -> np.ndarray:
        return self.decoder(item.image, item.where, None if self.seed is None else mix(self.seed, item.row))


def _reordered(items: Iterator[Encoded], order: np.ndarray) -> Iterator[Encoded]:
    """The `order[k]`-th of `items` as the k-th; those that are read before their turn are held."""
    held: dict[int, Encoded] = {}
    count = 0
    for wanted in order.tolist():
        while wanted not in held:
            held[count] = next(items)
            count += 1
        yield held.pop(wanted)
