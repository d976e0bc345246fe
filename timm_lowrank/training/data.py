"""`load_data`: the images of a recipe, in memory where they fit and else streamed from their shards."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch

from ..data.images import ImageData, load_images
from ..data.sources import require
from ..data.streamed import StreamedData, find_data
from ..errors import StreamError
from .recipe import Recipe

Data = ImageData | StreamedData
SHARE_OF_MEMORY = 0.5


def load_data(recipe: Recipe) -> Data:
    """Loads the data set, or looks at its shards if it is to be streamed.

    Streamed it is with `streaming=True` or an `image_size`, and with `streaming="auto"` also where the decoded images
    would take more than half of the memory of the machine or of its accelerator. That is the memory it
    has, not what happens to be free, so that all processes and a resumed run decide alike.

    Raises:
        DataError: if the data is not there or damaged.
    """
    found = None
    if recipe.streaming is True or recipe.image_size is not None:
        return _found(recipe)
    if recipe.streaming == "auto" and recipe.data != "digits":
        with contextlib.suppress(StreamError):  # a source that cannot be streamed may still be loaded
            found = _found(recipe, limits=False)
    return found if found is not None and not _fits(found, recipe) else _loaded(recipe)


def _found(recipe: Recipe, limits: bool = True) -> StreamedData:
    given = recipe.data_args
    if not limits:
        given = {key: value for key, value in given.items() if key not in ("train_limit", "test_limit")}
    return find_data(
        recipe.data, image_size=recipe.image_size, crop_pct=recipe.crop_pct, crop_scale=recipe.crop_scale,
        augment=recipe.augment, **given,
    )  # fmt: skip


def _loaded(recipe: Recipe) -> ImageData:
    return load_images(recipe.data, progress=True, **recipe.data_args)


def _fits(data: StreamedData, recipe: Recipe) -> bool:
    limits = (recipe.data_args.get("train_limit"), recipe.data_args.get("test_limit"))
    taken = [limit if isinstance(limit, int) else count for limit, count in zip(limits, data.counts, strict=True)]
    needed = data.decoded_bytes * sum(taken) / sum(data.counts)
    return needed <= SHARE_OF_MEMORY * memory_of_a_process()


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
