"""Images and their batches: held in memory where they fit, else streamed from their files.

>>> from timm_lowrank.data import load_data
>>> load_data("digits", train_limit=500).counts
(500, 360)
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch

from ..environment import require
from ..errors import DataError
from .decode import find_decoder
from .images import ImageData, hold
from .sources import open_source
from .stream import StreamedData, stream

__all__ = ["Data", "ImageData", "StreamedData", "load_data", "load_images"]

Data = ImageData | StreamedData
SHARE_OF_MEMORY = 0.5
MOST_SIDE = 8192  # pixels of a side that images are brought to


def load_data(
    source: str = "digits",
    *,
    config: str | None = None,
    image_column: str | None = None,
    label_column: str = "label",
    train_split: str = "train",
    test_split: str | None = None,
    extra: bool = False,
    train_limit: int | None = None,
    test_limit: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    streaming: bool | str = "auto",
    image_size: int | None = None,
    crop_pct: float = 0.875,
    crop_scale: float = 0.08,
    mode: str | None = None,
    augment: str = "none",
    progress: bool = False,
) -> Data:
    """Loads a data set, or looks at its files if it is to be streamed.

    Args:
        source: "digits" (built in), a folder with train*.parquet and test*.parquet, a folder of images as `datasets`
            reads it (train/CLASS/NAME.png and test/CLASS/NAME.png, or metadata.csv with the labels), or a name on the
            Hub, of either kind.
        config: the configuration of a Hub data set, or the subfolder of a folder that holds several.
        image_column: the column of encoded images; None takes "img" or "image".
        label_column: the column of labels, integers from 0; without class names in the files, none may be left out.
        train_split: what the source calls the split of training images.
        test_split: the same of the test images, such as "validation"; None takes "test", or "validation" where there
            is no "test" or it is trained on. The folder of images of the split "validation" may also be called val,
            valid or dev.
        extra: whether a split "extra" joins the training images (SVHN); it comes after them.
        train_limit: the first so many training images, those of `extra` among them, the same number from every class;
            None takes all.
        test_limit: the same for the test images.
        mean: of each channel in [0, 1]; None computes it from the training images, of streamed ones takes ImageNet's.
        std: the same for the standard deviation.
        streaming: whether images stay in their files until they are needed. "auto" streams with an `image_size`, and
            if the decoded images would take more than half of the memory of the machine or of its accelerator. That
            is the memory it has, not what happens to be free, so that all processes and a resumed run decide alike.
        image_size: height and width that all images are brought to as they are read; None leaves them, and all must
            have one size.
        crop_pct, crop_scale, augment: see `Decoder`; without `image_size` they mean nothing.
        mode: "rgb" or "grey", which all images are made; None is grey where all are. Of a data set that is read from
            the Hub as it is needed not all are looked at: a coloured one among grey ones is an error in its turn.
        progress: whether a slow decoding shows a progress bar.

    Raises:
        DataError: the data is not there or damaged; a label, a limit or the size of an image is wrong; an equal share
            of every class is wanted of what must be streamed.
    """
    if image_size is not None and not 1 <= image_size <= MOST_SIDE:
        raise DataError(f"image_size={image_size!r} must be at least 1 and at most {MOST_SIDE} pixels")
    limits = (train_limit, test_limit)
    streamed = streaming is True or (streaming == "auto" and image_size is not None)
    _check_limits(limits, streamed)
    opened = functools.partial(
        open_source, source, config=config, image_column=image_column, label_column=label_column,
        train_split=train_split, test_split=test_split, extra=extra,
    )  # fmt: skip
    images = opened(download=streaming is False)
    decide = functools.partial(
        find_decoder, image_size=image_size, crop_pct=crop_pct, augment=augment, crop_scale=crop_scale, mode=mode
    )
    decoder = decide(images)
    if not streamed and streaming == "auto":
        counts = (len(images.train), len(images.test))
        taken = [
            min(limit, count) if isinstance(limit, int) else count for limit, count in zip(limits, counts, strict=True)
        ]
        streamed = sum(taken) * math.prod(decoder.shape) > SHARE_OF_MEMORY * memory_of_a_process()
        _check_limits(limits, streamed)
    if streamed:
        return stream(images, decoder, mean, std)
    if images.remote:
        images = opened(download=True)
        decoder = decide(images)  # now from all images
    return hold(images, decoder, train_limit=train_limit, test_limit=test_limit, mean=mean, std=std, progress=progress)


def load_images(source: str = "digits", **options: Any) -> ImageData:
    """`load_data` with everything in memory, whatever it takes; `options` as there."""
    return cast(ImageData, load_data(source, **options, streaming=False))


def _check_limits(limits: Sequence[int | None], streamed: bool) -> None:
    if streamed and any(limit is not None for limit in limits):
        raise DataError(
            "data_args.train_limit and test_limit take as many images of every class, which a stream does not know: "
            "drop them, or hold the images in memory (streaming=false, without image_size)"
        )


def memory_of_a_process() -> int:
    """Bytes of the machine, or of what the container may use of it, for each process; at most its accelerator's."""
    total = int(require("psutil", "psutil").virtual_memory().total)
    with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    total //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if torch.cuda.is_available():
        device = int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()
        total = min(total, torch.cuda.get_device_properties(device).total_memory)
    return total
