"""`ImageData`: a whole data set, or a part of one, as tensors of pixels, decoded once and kept in memory."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import DataError
from .decode import Decoder
from .sources import DataOrigin, Source, Split


@dataclasses.dataclass(frozen=True)
class ImageData:
    """Training and test images of one size.

    Images are (n, channels, height, width), uint8; labels are (n,), int64, in [0, len(class_names)).
    `mean` and `std` are of the training pixels in [0, 1], a number for each channel. `fingerprint` is the
    SHA-256 of all pixels and labels: two runs with the same one have seen the same data.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str
    origin: DataOrigin | None = None  # None: not known

    @property
    def image_size(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width

    @property
    def counts(self) -> tuple[int, int]:
        """(training images, test images)."""
        return len(self.train_images), len(self.test_images)

    def store(self, file: Path) -> None:
        """Writes everything, for other processes of this machine to map."""
        torch.save({field.name: getattr(self, field.name) for field in dataclasses.fields(self)}, file)

    @classmethod
    def stored(cls, file: Path) -> ImageData:
        """What `store` wrote; pixels are mapped, so that processes that read the same file share their memory."""
        return cls(**torch.load(file, mmap=True, weights_only=True))

    @property
    def data_config(self) -> dict[str, Any]:
        """What the network is fed, in timm's words: it goes into the configuration of the exported model."""
        return {"input_size": self.image_size, "mean": self.mean, "std": self.std, "crop_pct": 1.0}


def hold(
    source: Source,
    decoder: Decoder,
    *,
    train_limit: int | None = None,
    test_limit: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    progress: bool = False,
) -> ImageData:
    """Decodes a data set into memory; beside the pixels no more than a row group is held. Arguments as in `load_data`.

    Raises:
        DataError: a file cannot be read, an image cannot be decoded or has another size, a limit is wrong.
    """
    classes = len(source.class_names)
    train = decoded(source.train, train_limit, classes, decoder, progress)
    test = decoded(source.test, test_limit, classes, decoder, progress)
    statistics = _statistics(train[0].numpy())
    arrays = [tensor.numpy() for tensor in (*train, *test)]
    pieces = (piece for array in arrays for piece in (str(array.shape).encode(), array.data))
    return ImageData(
        source.name, *train, *test, source.class_names,
        mean=per_channel("mean", mean, decoder.shape[0]) or statistics[0],
        std=per_channel("std", std, decoder.shape[0]) or statistics[1],
        fingerprint=fingerprint(source.class_names, pieces), origin=source.origin,
    )  # fmt: skip


def decoded(
    split: Split, limit: int | None, classes: int, decoder: Decoder, progress: bool = False
) -> tuple[Tensor, Tensor]:
    """Images (n, channels, height, width), uint8, without a random part, and labels (n,), int64, of a split.

    Args:
        limit: how many, as `balanced_rows` takes them; None are all.

    Raises:
        DataError: a file cannot be read, an image cannot be decoded or has another size, or there are not so many.
    """
    rows = held_rows(split, limit, classes)
    try:
        images = np.empty((len(rows), *decoder.shape), dtype=np.uint8)
    except MemoryError as error:
        _, height, width = decoder.shape
        raise DataError(
            f"{len(rows)} images of {width} x {height} pixels do not fit into memory ({split.name}): set image_size, "
            "or streaming=true"
        ) from error
    labels = np.empty(len(rows), dtype=np.int64)
    hidden = None if progress else True  # None: shown on a terminal alone, a log would get a line for every step of it
    reading = tqdm(split.read(rows), f"decoding {split.name}", len(rows), delay=2, disable=hidden, leave=False)
    for number, item in enumerate(reading):
        images[number] = decoder(item.image, item.where)
        labels[number] = item.label
    return torch.from_numpy(images), torch.from_numpy(labels)


def held_rows(split: Split, limit: int | None, classes: int) -> np.ndarray:
    """(n,), int64: the rows of a split that are held in memory, in ascending order; arguments as of `decoded`.

    Raises:
        DataError: a file cannot be read, or there are not so many images.
    """
    count = len(split)
    if limit is None or limit == count:
        return np.arange(count)
    if isinstance(limit, bool) or not isinstance(limit, int) or not 0 < limit <= count:
        raise DataError(f"cannot take limit={limit!r} of the {count} images of {split.name}")
    return balanced_rows(split.labels(), limit, classes)


def balanced_rows(labels: np.ndarray, limit: int, classes: int) -> np.ndarray:
    """The first `limit` rows with, as far as there are enough, as many of each class; in ascending order.

    Args:
        labels: (n,), int64, in [0, classes).
        limit: at most n.
        classes: how many there are.
    """
    number_in_class = np.empty(len(labels), dtype=np.int64)
    for label in range(classes):
        rows = np.flatnonzero(labels == label)
        number_in_class[rows] = np.arange(len(rows))
    # Sorted by number within the class, the first `limit` rows take every class in turn.
    return np.sort(np.lexsort((np.arange(len(labels)), number_in_class))[:limit])


def fingerprint(class_names: Sequence[str], pieces: Iterable[bytes | memoryview]) -> str:
    """The SHA-256 of class names and of what tells one data set from another, in hexadecimal digits."""
    digest = hashlib.sha256("\0".join(class_names).encode())
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def per_channel(name: str, values: Sequence[float] | None, channels: int) -> tuple[float, ...] | None:
    """`values`, one for each channel, or None. Raises DataError if they are not."""
    if values is None:
        return None
    numbers = isinstance(values, list | tuple) and all(type(value) in (int, float) for value in values)
    if not numbers or len(values) != channels:
        raise DataError(f"data_args.{name}={values!r} must list a number for each of the {channels} channels")
    if not all(0 <= value <= 1 for value in values):  # NaN too
        raise DataError(f"data_args.{name}={values!r} must be of pixels in [0, 1]: divide what is in 0 to 255 by 255")
    if name == "std" and min(values) <= 0:
        raise DataError(f"data_args.std={values!r} must be positive")
    return tuple(float(value) for value in values)


def _statistics(pixels: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel in [0, 1], from exact counts of the 256 values."""
    values = np.arange(256) / 255
    means, stds = [], []
    step = max(1, (1 << 20) // int(np.prod(pixels.shape[2:])))  # images counted at once: bincount takes 8 bytes a pixel
    for channel in range(pixels.shape[1]):
        counts = np.zeros(256, dtype=np.int64)
        for start in range(0, len(pixels), step):
            counts += np.bincount(pixels[start : start + step, channel].ravel(), minlength=256)
        share = counts / counts.sum()
        mean = float(share @ values)
        means.append(round(mean, 4))
        # A constant channel would be divided by zero; one grey level is the smallest spread that pixels can show.
        stds.append(round(max(float(np.sqrt(share @ (values - mean) ** 2)), 1 / 255), 4))
    return tuple(means), tuple(stds)
