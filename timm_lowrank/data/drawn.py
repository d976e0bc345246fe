"""`drawn_images`: a part of a streamed data set in memory, for measurements that go over the same images many times."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .images import ImageData, balanced_rows
from .shards import ShardSplit
from .streamed import StreamedData, check_label


def drawn_images(data: StreamedData, train: int, test: int, *, progress: bool = False) -> ImageData:
    """The first `train` and `test` images of their splits, as many of each class as there are.

    Only these are decoded, training images too as if they were test images: no random part, no mirroring.

    Args:
        data: where they are.
        train, test: how many; at most all there are.
        progress: whether a slow decoding shows a progress bar.

    Returns:
        Images with the mean, std and fingerprint of the whole.

    Raises:
        DataError: a file cannot be read, an image cannot be decoded, a label is wrong.
    """
    parts = [_part(data, split, count, progress) for split, count in ((data.train, train), (data.test, test))]
    return ImageData(
        name=data.name,
        train_images=parts[0][0],
        train_labels=parts[0][1],
        test_images=parts[1][0],
        test_labels=parts[1][1],
        class_names=data.class_names,
        mean=data.mean,
        std=data.std,
        fingerprint=data.fingerprint,
    )


def _part(data: StreamedData, split: ShardSplit, count: int, progress: bool) -> tuple[Tensor, Tensor]:
    labels = split.labels()
    classes = len(data.class_names)
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        check_label(int(labels[wrong[0]]), classes, f"{split.name}, row {wrong[0]}")
    rows = balanced_rows(labels, min(count, len(labels)), classes)
    images = torch.empty(len(rows), *data.image_size, dtype=torch.uint8)
    reading = tqdm(split.read(rows), f"decoding {split.name}", len(rows), delay=2, disable=not progress, leave=False)
    for number, item in enumerate(reading):
        images[number] = data.decode(item.image, item.where)
    return images, torch.from_numpy(labels[rows])
