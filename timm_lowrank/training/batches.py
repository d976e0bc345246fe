"""The batches of a run: from memory or from shards, by what its data is."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from ..data.augment import Transform
from ..data.images import ImageData
from ..data.loader import EvalBatches, TrainBatches
from ..data.stream import StreamEvalBatches, StreamTrainBatches
from .data import Data
from .recipe import Recipe

TrainingBatches = TrainBatches | StreamTrainBatches
TestBatches = EvalBatches | StreamEvalBatches


def training_batches(recipe: Recipe, data: Data, accelerator: Accelerator) -> TrainingBatches:
    """The share of this process in the training images.

    Raises:
        RecipeError: the batch cannot be divided among processes and parts.
    """
    device = accelerator.device
    options = {
        "batch_size": recipe.batch_size,
        "parts": recipe.gradient_accumulation,
        "seed": recipe.seed,
        "process": accelerator.process_index,
        "processes": accelerator.num_processes,
    }
    transform = _transform(recipe, data, device)
    if isinstance(data, ImageData):
        return TrainBatches(data.train_images.to(device), data.train_labels.to(device), transform, **options)
    return StreamTrainBatches(data, transform, device, **options, buffer=recipe.shuffle_buffer, workers=recipe.workers)


def evaluation_batches(
    recipe: Recipe, data: Data, device: torch.device, *, process: int = 0, processes: int = 1
) -> TestBatches:
    """The share of a process in the test images; that of the first of one are all of them."""
    options = {"batch_size": recipe.eval_batch_size, "process": process, "processes": processes}
    transform = _transform(recipe, data, device)
    if isinstance(data, ImageData):
        return EvalBatches(data.test_images.to(device), data.test_labels.to(device), transform, **options)
    return StreamEvalBatches(data, transform, device, **options, workers=recipe.workers)


def _transform(recipe: Recipe, data: Data, device: torch.device) -> Transform:
    # Images that are brought to one size while they are read are also cut and mirrored there.
    augment = recipe.augment if recipe.image_size is None else "none"
    return Transform(data.mean, data.std, augment, device)
