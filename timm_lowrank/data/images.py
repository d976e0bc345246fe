"""`load_images`: a whole data set as tensors of pixels, decoded once and kept in memory."""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import DataError
from .sources import Columns, Split, read_splits, require


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

    @property
    def image_size(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width

    @property
    def counts(self) -> tuple[int, int]:
        """(training images, test images)."""
        return len(self.train_images), len(self.test_images)

    @property
    def data_config(self) -> dict[str, Any]:
        """What the network is fed, in timm's words: it goes into the configuration of the exported model."""
        return {"input_size": self.image_size, "mean": self.mean, "std": self.std, "crop_pct": 1.0}


def load_images(
    source: str = "digits",
    *,
    config: str | None = None,
    image_column: str | None = None,
    label_column: str = "label",
    train_split: str = "train",
    test_split: str = "test",
    extra: bool = False,
    train_limit: int | None = None,
    test_limit: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    progress: bool = False,
) -> ImageData:
    """Loads a data set.

    Args:
        source: "digits" (built in), a folder with train*.parquet and test*.parquet, or a name on the Hub.
        config: the configuration of a Hub data set, or the subfolder of a folder that holds several.
        image_column: the column of encoded images; None takes "img" or "image".
        label_column: the column of integer labels.
        train_split: what the source calls the split of training images.
        test_split: the same of the test images, such as "validation".
        extra: whether a split "extra" joins the training images (SVHN).
        train_limit: the first so many training images, the same number from every class; None takes all.
        test_limit: the same for the test images.
        mean: of each channel in [0, 1], if it should not be computed from the training images.
        std: the same for the standard deviation.
        progress: whether a slow decoding shows a progress bar.

    Raises:
        DataError: if the data is not there or damaged, or if a label, a limit or the size of an image is wrong.
    """
    names = {"train": train_split, "test": test_split, **({"extra": "extra"} if extra else {})}
    splits = read_splits(source, config, Columns(image_column, label_column), names)
    class_names = _class_names(splits)
    train = _decoded(_limited(splits["train"], train_limit, len(class_names)), progress)
    test = _decoded(_limited(splits["test"], test_limit, len(class_names)), progress)
    if extra and "extra" in splits:
        more = _decoded(splits["extra"], progress)
        train = _joined(train, more)
    elif extra:
        raise DataError(f"data={source!r} has no extra images: set data_args.extra=false")
    if train[0].shape[1:] != test[0].shape[1:]:
        raise DataError(
            f"training images are {train[0].shape[1:]} and test images {test[0].shape[1:]}: one size is needed"
        )
    statistics = _statistics(train[0])
    return ImageData(
        name=source,
        train_images=torch.from_numpy(train[0]),
        train_labels=torch.from_numpy(train[1]),
        test_images=torch.from_numpy(test[0]),
        test_labels=torch.from_numpy(test[1]),
        class_names=class_names,
        mean=per_channel("mean", mean, train[0].shape[1]) or statistics[0],
        std=per_channel("std", std, train[0].shape[1]) or statistics[1],
        fingerprint=_fingerprint([*train, *test], class_names),
    )


def _class_names(splits: dict[str, Split]) -> tuple[str, ...]:
    """The names that the source gives, or numbers up to the largest training label; every label is checked."""
    for split in splits.values():
        if len(split.labels) == 0:
            raise DataError(f"{split.name} is empty")
    train = splits["train"]
    names = train.class_names or tuple(str(label) for label in range(int(train.labels.max()) + 1))
    for split in splits.values():
        wrong = np.flatnonzero((split.labels < 0) | (split.labels >= len(names)))
        if len(wrong):
            raise DataError(
                f"{split.name}: row {wrong[0]} has the label {split.labels[wrong[0]]}, "
                f"outside the {len(names)} classes 0 to {len(names) - 1}"
                + (f" ({len(wrong)} such rows)" if len(wrong) > 1 else "")
            )
    if len(np.unique(train.labels)) < 2:
        raise DataError(f"{train.name} holds a single class, {names[train.labels[0]]}: there is nothing to learn")
    return names


def _limited(split: Split, limit: int | None, classes: int) -> Split:
    """The first `limit` rows with, as far as there are enough, as many of each class; the order is kept."""
    count = len(split.labels)
    if limit is None or limit == count:
        return split
    if isinstance(limit, bool) or not isinstance(limit, int) or not 0 < limit <= count:
        raise DataError(f"cannot take limit={limit!r} of the {count} images of {split.name}")
    rows = balanced_rows(split.labels, limit, classes)
    images = split.images[rows] if isinstance(split.images, np.ndarray) else split.images.take(_arrow(rows))
    return dataclasses.replace(split, images=images, labels=split.labels[rows])


def balanced_rows(labels: np.ndarray, limit: int, classes: int) -> np.ndarray:
    """The first `limit` rows with, as far as there are enough, as many of each class; in ascending order.

    Args:
        labels: (n,), int64, in [0, classes).
        limit: at most n.
        classes: how many there are.
    """
    place_in_class = np.empty(len(labels), dtype=np.int64)
    for label in range(classes):
        rows = np.flatnonzero(labels == label)
        place_in_class[rows] = np.arange(len(rows))
    # Sorted by place within the class, the first `limit` rows take every class in turn.
    return np.sort(np.lexsort((np.arange(len(labels)), place_in_class))[:limit])


def _arrow(rows: np.ndarray) -> Any:
    return require("pyarrow", "pyarrow").array(rows)


def _decoded(split: Split, progress: bool) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (n, c, h, w), uint8, and labels (n,), int64."""
    if isinstance(split.images, np.ndarray):
        return split.images, split.labels
    first = _pixels(split, 0, None)
    mode = "L" if first.ndim == 2 else "RGB"
    pixels = np.empty((len(split.labels), *first.shape), dtype=np.uint8)
    for row in tqdm(range(len(pixels)), desc=f"decoding {split.name}", delay=2, disable=not progress, leave=False):
        image = _pixels(split, row, mode)
        if image.shape != first.shape:
            raise DataError(
                f"{split.name}: row {row} is {image.shape[1]} x {image.shape[0]} pixels and row 0 is "
                f"{first.shape[1]} x {first.shape[0]}: "
                "all images must have one size to be held in memory (a recipe with image_size streams them)"
            )
        pixels[row] = image
    pixels = pixels[:, None] if mode == "L" else pixels.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(pixels), split.labels


def _pixels(split: Split, row: int, mode: str | None) -> np.ndarray:
    """One image, (h, w) or (h, w, 3), uint8; without a mode, grey images stay grey and all others become RGB."""
    image_module = require("PIL.Image", "pillow")
    try:
        with image_module.open(io.BytesIO(split.images[row].as_py())) as image:
            return np.asarray(image.convert(mode or ("L" if image.mode in ("1", "L") else "RGB")))
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{split.name}: the image in row {row} cannot be decoded: {error}") from error


def _joined(one: tuple[np.ndarray, np.ndarray], two: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    if one[0].shape[1:] != two[0].shape[1:]:
        raise DataError(
            f"training images are {one[0].shape[1:]} and extra images {two[0].shape[1:]}: one size is needed"
        )
    return np.concatenate([one[0], two[0]]), np.concatenate([one[1], two[1]])


def per_channel(name: str, values: Sequence[float] | None, channels: int) -> tuple[float, ...] | None:
    if values is None:
        return None
    if not isinstance(values, list | tuple) or len(values) != channels:
        raise DataError(f"data_args.{name}={values!r} must list a number for each of the {channels} channels")
    if name == "std" and min(values) <= 0:
        raise DataError(f"data_args.std={values!r} must be positive")
    return tuple(float(value) for value in values)


def _statistics(pixels: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel in [0, 1], from exact counts of the 256 values."""
    values = np.arange(256) / 255
    means, stds = [], []
    for channel in range(pixels.shape[1]):
        counts = np.zeros(256, dtype=np.int64)
        for start in range(0, len(pixels), 10_000):
            counts += np.bincount(pixels[start : start + 10_000, channel].ravel(), minlength=256)
        share = counts / counts.sum()
        mean = float(share @ values)
        means.append(round(mean, 4))
        # A constant channel would be divided by zero; one grey level is the smallest spread that pixels can show.
        stds.append(round(max(float(np.sqrt(share @ (values - mean) ** 2)), 1 / 255), 4))
    return tuple(means), tuple(stds)


def _fingerprint(arrays: Sequence[np.ndarray], class_names: Sequence[str]) -> str:
    digest = hashlib.sha256("\0".join(class_names).encode())
    for array in arrays:
        digest.update(str(array.shape).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
