"""`TrainingState`: the objects of one run, and how they are made from a recipe and data."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import nn

from ..core.model import LowRankModel
from ..wrapping import wrap
from .augment import Transform
from .errors import RecipeError, RunError
from .images import ImageData
from .loader import EvalBatches, TrainBatches
from .recipe import Recipe


@dataclasses.dataclass
class Progress:
    """How far a run is; saved with every checkpoint."""

    fingerprint: str  # of the data, so that a run is not resumed on other images
    epoch: int = 0  # epochs completed
    step: int = 0  # optimizer steps taken
    seconds: float = 0.0  # spent training, evaluation not counted
    best_train_accuracy: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["fingerprint"] != self.fingerprint:
            raise RunError(
                "the data is not what this run was started with (its fingerprint differs): "
                "give the same data, or start a new run in another folder"
            )
        vars(self).update(state)


@dataclasses.dataclass
class TrainingState:
    """One run while it trains."""

    recipe: Recipe
    accelerator: Accelerator
    lowrank: LowRankModel  # the wrapped network
    network: nn.Module  # the same as accelerate prepared it: what is called in training
    optimizer: Any
    ema: ModelEmaV3 | None
    progress: Progress
    train_batches: TrainBatches
    test_batches: EvalBatches


def build(recipe: Recipe, data: ImageData, output: Path) -> TrainingState:
    """Everything a run needs, on its device. Nothing is written.

    Raises:
        RecipeError: if the network cannot be built, a layer is not there, or the batch cannot be divided.
    """
    accelerator = _accelerator(recipe, output)
    process = {"process": accelerator.process_index, "processes": accelerator.num_processes}
    transform = Transform(data.mean, data.std, recipe.augment, accelerator.device)
    train_batches = TrainBatches(
        data.train_images.to(accelerator.device),
        data.train_labels.to(accelerator.device),
        transform,
        batch_size=recipe.batch_size,
        parts=recipe.gradient_accumulation,
        seed=recipe.seed,
        **process,
    )
    test_batches = EvalBatches(
        data.test_images.to(accelerator.device),
        data.test_labels.to(accelerator.device),
        transform,
        batch_size=recipe.eval_batch_size,
        **process,
    )
    lowrank = _wrapped(recipe, data).to(accelerator.device)
    if recipe.channels_last:
        lowrank = lowrank.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        lowrank.backbone.parameters(),
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.nesterov,
    )
    progress = Progress(data.fingerprint)
    accelerator.register_for_checkpointing(progress)
    ema = None
    if recipe.ema_decay is not None:
        # Of the backbone alone: an average of matrices of rank r is not of rank r.
        ema = ModelEmaV3(lowrank.backbone, decay=recipe.ema_decay, use_warmup=True)
        accelerator.register_for_checkpointing(ema)
    network, prepared = accelerator.prepare(lowrank, optimizer)
    if recipe.compile:
        network.compile()
    torch.manual_seed(recipe.seed + 1 + accelerator.process_index)  # dropout: a stream of its own on each process
    return TrainingState(recipe, accelerator, lowrank, network, prepared, ema, progress, train_batches, test_batches)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the global generators, which weight initialisation and dropout draw from, and restores them after."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global ones are what is meant
    # The device that accelerate will choose: asking for the current one would open a context on the first GPU.
    devices = [int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def _accelerator(recipe: Recipe, output: Path) -> Accelerator:
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", recipe.precision):
        warnings.warn(
            f"accelerate was launched with mixed precision {launched}; the recipe's precision={recipe.precision} "
            f"is used. Set precision={launched} to change it.",
            stacklevel=2,
        )
    try:
        return Accelerator(
            mixed_precision=recipe.precision,
            gradient_accumulation_steps=recipe.gradient_accumulation,
            log_with=list(recipe.trackers) or None,
            project_dir=output,
        )
    except ValueError as error:  # fp16 without a GPU; a second precision in one process
        raise RecipeError(f"precision={recipe.precision} cannot be used here: {error}") from error


def _wrapped(recipe: Recipe, data: ImageData) -> LowRankModel:
    channels = data.image_size[0]
    if recipe.model_args.get("in_chans", channels) != channels:
        raise RecipeError(
            f"model_args.in_chans={recipe.model_args['in_chans']}, but the images have {channels}: drop it"
        )
    # What the network is fed is written into its configuration, and with it into the exported model.
    overlay = {"input_size": data.image_size, "mean": data.mean, "std": data.std, "crop_pct": 1.0}
    try:
        return wrap(
            recipe.model,
            recipe.lowrank_config(),
            num_classes=len(data.class_names),
            example_input=torch.zeros(2, *data.image_size),
            pretrained_cfg_overlay=overlay,
            **{**recipe.model_args, "in_chans": channels},
        )
    except (ValueError, TypeError, RuntimeError) as error:
        raise RecipeError(
            f"cannot build model={recipe.model!r} with model_args={recipe.model_args} "
            f"for images of {data.image_size}: {error}"
        ) from error
