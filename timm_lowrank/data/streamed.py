"""`StreamedData`: a data set that stays in its shards, and what has to be known of it before training begins."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

from ..errors import DataError, StreamError
from .decode import INTERPOLATION, Decoder, open_image
from .images import per_channel
from .shards import ShardSplit, find_split
from .sources import Columns

# Of ImageNet, over colours and over grey values: those of the data itself cannot be had without reading all of it.
MEAN, STD = {3: (0.485, 0.456, 0.406), 1: (0.449,)}, {3: (0.229, 0.224, 0.225), 1: (0.226,)}
PROBED = 32  # images whose headers are looked at
FINGERPRINT = "shards:"


@dataclasses.dataclass(frozen=True)
class StreamedData:
    """Training and test images in parquet shards.

    `decode` gives pixels of one size. `mean` and `std` are of pixels in [0, 1], a number for each channel.
    `fingerprint` is the SHA-256 of the names, sizes and row groups of the shards and of the class names.
    """

    name: str
    train: ShardSplit
    test: ShardSplit
    class_names: tuple[str, ...]
    decode: Decoder
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str

    @property
    def image_size(self) -> tuple[int, int, int]:
        """(channels, height, width), after resizing."""
        return (1 if self.decode.mode == "L" else 3, *self.decode.size)

    @property
    def counts(self) -> tuple[int, int]:
        """(training images, test images)."""
        return len(self.train), len(self.test)

    @property
    def decoded_bytes(self) -> int:
        """What the images would take in memory."""
        return sum(self.counts) * int(np.prod(self.image_size))

    @property
    def data_config(self) -> dict[str, Any]:
        """What the network is fed, in timm's words: it goes into the configuration of the exported model."""
        resized = {"interpolation": INTERPOLATION} if self.decode.resize else {}
        fed = {"input_size": self.image_size, "mean": self.mean, "std": self.std, "crop_pct": self.decode.crop_pct}
        return {**fed, **resized}


def find_data(
    source: str,
    *,
    image_size: int | None = None,
    crop_pct: float = 0.875,
    crop_scale: float = 0.08,
    augment: str = "none",
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
) -> StreamedData:
    """Looks at the footers of all shards and at the first images of one.

    Args:
        source: a folder with train*.parquet and test*.parquet, or a name on the Hub.
        image_size: height and width that all images are brought to; None leaves them, and all must have one size.
        crop_pct, crop_scale, augment: see `Decoder`; without `image_size` they mean nothing.
        mean, std: None takes those of ImageNet.
        config, image_column, label_column, train_split, test_split, extra: as in `load_images`.
        train_limit, test_limit: must be None: an equal share of every class would need all labels.

    Raises:
        DataError: if the data is not there, is damaged, or cannot be streamed.
    """
    if train_limit is not None or test_limit is not None:
        raise StreamError(
            "data_args.train_limit and test_limit take as many images of every class, which a stream does not know: "
            "drop them, or hold the images in memory (streaming=false, without image_size)"
        )
    columns = Columns(image_column, label_column)
    train, test = (find_split(source, config, name, columns) for name in (train_split, test_split))
    if extra:
        more = find_split(source, config, "extra", columns)
        train = ShardSplit(train.name, train.shards + more.shards)
    names = _class_names(train)
    for split in (train, test):
        _check_labels(split, len(names))
    decode = _decoder(train, image_size, crop_pct, augment, crop_scale)
    channels = 1 if decode.mode == "L" else 3
    return StreamedData(
        source, train, test, names, decode,
        mean=per_channel("mean", mean, channels) or MEAN[channels],
        std=per_channel("std", std, channels) or STD[channels],
        fingerprint=_fingerprint({"train": train, "test": test}, names),
    )  # fmt: skip


def _class_names(train: ShardSplit) -> tuple[str, ...]:
    """The names in the footers, or numbers up to the largest label that they note."""
    named = train.shards[0].class_names
    if named is not None:
        return named
    ranges = [shard.label_range(group) for shard, group, _ in train.places]
    if any(found is None for found in ranges):
        raise StreamError(
            f"{train.name} neither names its classes nor notes the largest label: write it with the datasets library "
            "and a ClassLabel feature"
        )
    return tuple(str(label) for label in range(1 + max(found[1] for found in ranges if found is not None)))


def _check_labels(split: ShardSplit, classes: int) -> None:
    """Finds a wrong label before training where the footers note the range of labels; the rest is found when read."""
    starts = np.cumsum(split.groups) - split.groups
    for number, (shard, group, _) in enumerate(split.places):
        found = shard.label_range(group)
        if found is not None and not 0 <= found[0] <= found[1] < classes:
            for item in split.read(starts[number] + np.arange(split.groups[number])):
                check_label(item.label, classes, item.where)


def check_label(label: int, classes: int, where: str) -> None:
    """Raises DataError unless `label` is one of 0 to classes - 1."""
    if not 0 <= label < classes:
        raise DataError(f"{where} has the label {label}, outside the {classes} classes 0 to {classes - 1}")


def _decoder(train: ShardSplit, image_size: int | None, crop_pct: float, augment: str, crop_scale: float) -> Decoder:
    """Grey if the first images all are; their size, if no other is set."""
    rows = np.arange(min(PROBED, len(train)))
    images = [open_image(item.image, item.where) for item in islice(train.read(rows), PROBED)]
    mode = "L" if all(image.mode in ("1", "L") for image in images) else "RGB"
    if image_size is not None:
        return Decoder(mode, (image_size, image_size), True, crop_pct, augment, crop_scale)
    sizes = {(image.height, image.width) for image in images}
    if len(sizes) > 1:
        shown = ", ".join(f"{width} x {height}" for height, width in sorted(sizes)[:3])
        raise DataError(f"{train.name} holds images of different sizes ({shown}): set image_size")
    return Decoder(mode, sizes.pop())


def _fingerprint(splits: Mapping[str, ShardSplit], class_names: Sequence[str]) -> str:
    """Without folders, so that a copy in another place is the same data."""
    digest = hashlib.sha256("\0".join(class_names).encode())
    for use, split in splits.items():
        for shard in split.shards:
            digest.update(f"\0{use} {shard.name} {shard.size} {shard.groups}".encode())
    return FINGERPRINT + digest.hexdigest()
