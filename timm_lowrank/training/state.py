"""`TrainingState`: the objects of one run, and how they are made from a recipe and data."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import timm
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, gather_object
from safetensors.torch import load_file
from timm.optim import param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ..checkpoint.files import NETWORK_WEIGHTS, check_safetensors, require_checkpoint
from ..checkpoint.loading import local_folder
from ..comparators import Comparator, Start
from ..core.capture import evaluating
from ..core.model import LowRankModel
from ..data import Data
from ..data.batches import TestBatches, TrainingBatches, evaluation_batches, training_batches
from ..errors import CheckpointError, DataError, RecipeError, RunError
from ..layers import create_backbone
from ..wrapping import wrap
from .checkpoints import OwnState, Progress
from .recipe import Recipe, require_trackers


@dataclasses.dataclass
class TrainingState:
    """One run while it trains."""

    recipe: Recipe
    comparator: Comparator
    accelerator: Accelerator
    lowrank: LowRankModel  # the wrapped network
    network: nn.Module  # the same as accelerate prepared it: what is called in training
    optimizer: Any
    ema: ModelEmaV3 | None
    progress: Progress
    train_batches: TrainingBatches
    test_batches: TestBatches
    classes: int


def build(recipe: Recipe, data: Data, output: Path, *, resumed: Callable[[], bool] = lambda: False) -> TrainingState:
    """Everything a run needs, on its device. Nothing is written.

    Args:
        recipe: of the run.
        data: what it trains on.
        output: its folder.
        resumed: whether a checkpoint brings the weights, so that neither those of `init_from` nor pretrained ones are
            needed; all processes, which have joined by then, ask together.

    Raises:
        RecipeError: if the network cannot be built, a layer is not there, or the batch cannot be divided.
        DataError: if the processes do not see the same data.
    """
    accelerator = _accelerator(recipe, output)
    if len(set(gather_object([data.fingerprint]))) > 1:
        raise DataError("the processes do not see the same data (its fingerprints differ): set streaming=true or false")
    process, processes = accelerator.process_index, accelerator.num_processes
    train_batches = training_batches(
        data, accelerator.device, augment=recipe.augment, batch_size=recipe.batch_size,
        parts=recipe.gradient_accumulation, seed=recipe.seed, process=process, processes=processes,
        buffer=recipe.shuffle_buffer, workers=recipe.workers,
    )  # fmt: skip
    tested = evaluation_batches(
        data, accelerator.device, batch_size=recipe.eval_batch_size,
        process=process, processes=processes, workers=recipe.workers,
    )  # fmt: skip
    takes_weights = recipe.init_from is not None or bool(recipe.model_args.get("pretrained"))
    left_out = takes_weights and resumed()
    start = Start(
        torch.zeros(2, *data.image_size),
        recipe.lowrank_config().branches,
        lambda batches: itertools.islice(train_batches.epoch(0), batches * train_batches.parts),
        lambda value: accelerator.reduce(value, "mean"),
        resumed=left_out,
    )
    comparator = recipe.compared()
    built = _without_initial_weights(recipe) if left_out else recipe
    lowrank = _wrapped(built, comparator, data, start).to(accelerator.device)
    if recipe.channels_last:
        lowrank = lowrank.to(memory_format=torch.channels_last)
    optimizer = _optimizer(recipe, lowrank.backbone)
    progress = Progress(data.fingerprint)
    ema = None
    if recipe.ema_decay is not None:
        # Of the backbone alone: an average of matrices of rank r is not of rank r.
        ema = ModelEmaV3(lowrank.backbone, decay=recipe.ema_decay, use_warmup=True)
    OwnState(progress, ema).travel_with(accelerator)
    network, prepared = accelerator.prepare(lowrank, optimizer)
    if recipe.compile:
        network.compile()
    torch.manual_seed(recipe.seed + 1 + accelerator.process_index)  # dropout: a stream of its own on each process
    return TrainingState(
        recipe,
        comparator,
        accelerator,
        lowrank,
        network,
        prepared,
        ema,
        progress,
        train_batches,
        tested,
        len(data.class_names),
    )


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
    require_trackers(recipe)
    for variable, passive, what, key in (
        ("ACCELERATE_MIXED_PRECISION", "no", "mixed precision", "precision"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1", "gradient accumulation steps", "gradient_accumulation"),
    ):
        launched, ours = os.environ.get(variable, passive), getattr(recipe, key)
        if launched not in (passive, str(ours)):
            warnings.warn(
                f"accelerate was launched with {what} {launched}; the recipe's {key}={ours} is used. "
                f"Set {key}={launched} to change it.",
                stacklevel=2,
            )
    try:
        accelerator = Accelerator(
            mixed_precision=recipe.precision,
            # A bare number would give way to what accelerate was launched with.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=recipe.gradient_accumulation),
            log_with=list(recipe.trackers) or None,
            project_dir=output,
        )
    except ValueError as error:  # fp16 without a GPU; a second precision in one process
        raise RecipeError(f"precision={recipe.precision} cannot be used here: {error}") from error
    launched_processes = int(os.environ.get("WORLD_SIZE", 1))
    if launched_processes != accelerator.num_processes:
        raise RunError(
            f"{launched_processes} processes were launched, but accelerate does not join them and each would train "
            "alone into the same folder. Without GPUs: ACCELERATE_USE_CPU=true accelerate launch --multi_gpu "
            f"--num_processes {launched_processes} ..."
        )
    return accelerator


def _optimizer(recipe: Recipe, network: nn.Module) -> torch.optim.Optimizer:
    rate, decay = recipe.learning_rate, recipe.weight_decay
    if recipe.optimizer == "adamw":
        kept: Any = getattr(network, "no_weight_decay", tuple)
        groups = param_groups_weight_decay(network, decay, no_weight_decay_list=kept())
        return torch.optim.AdamW(groups, lr=rate, betas=(recipe.momentum, 0.999))
    parameters = network.parameters()
    return torch.optim.SGD(parameters, lr=rate, momentum=recipe.momentum, weight_decay=decay, nesterov=recipe.nesterov)


def _without_initial_weights(recipe: Recipe) -> Recipe:
    """The same network, for which nothing is read or downloaded: a checkpoint brings its weights."""
    arguments = {key: value for key, value in recipe.model_args.items() if key != "pretrained"}
    return dataclasses.replace(recipe, init_from=None, model_args=arguments)


def _wrapped(recipe: Recipe, comparator: Comparator, data: Data, start: Start) -> LowRankModel:
    channels = data.image_size[0]
    if recipe.model_args.get("in_chans", channels) != channels:
        raise RecipeError(
            f"model_args.in_chans={recipe.model_args['in_chans']}, but the images have {channels}: drop it"
        )
    try:
        network = create_backbone(
            recipe.model,
            num_classes=len(data.class_names),
            pretrained_cfg_overlay=data.data_config | {"input_size": (_weight_channels(recipe), *data.image_size[1:])},
            **{**recipe.model_args, "in_chans": channels},
        )
        # What the network is fed is written into its configuration, and with it into the exported model.
        cast("dict[str, Any]", network.pretrained_cfg).update(data.data_config)  # in place: it has a second name
        if recipe.init_from is not None:
            _load_initial(network, recipe.init_from)
        comparator.attach(network, start)
        wrapped = wrap(network, recipe.lowrank_config(), example_input=start.example_input)
        _require_logits(network, start.example_input, len(data.class_names))
        return wrapped
    except (ValueError, TypeError, RuntimeError, OSError) as error:  # the last of weights that cannot be read
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(
            f"cannot build model={recipe.model!r} with model_args={recipe.model_args}"
            f"{'' if recipe.comparator is None else f' and comparator={recipe.comparator!r}'} "
            f"for images of {data.image_size}: {str(error) or type(error).__name__}"
        ) from error


def _require_logits(network: nn.Module, images: Tensor, classes: int) -> None:
    """Raises ValueError unless the network tells `classes` apart, as one of feature maps or tokens does not."""
    with evaluating(network):
        output = network(images)
    if not isinstance(output, Tensor) or output.shape != (len(images), classes):
        shown = tuple(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise ValueError(
            f"it gives {shown} and no logits (batch, {classes} classes): drop what changes its output, such as "
            "features_only or global_pool"
        )


def _weight_channels(recipe: Recipe) -> int:
    """For how many channels pretrained weights were made, which timm sums up for fewer: 3 where nothing says so."""
    given = recipe.model_args.get("pretrained_cfg")
    size = given.get("input_size") if isinstance(given, Mapping) else None
    if size is None and ":" not in recipe.model and (config := timm.get_pretrained_cfg(recipe.model)):
        size = config.input_size
    return int(size[0]) if size else 3


def _load_initial(network: nn.Module, source: str) -> None:
    """Takes over the weights of a trained network.

    Raises:
        RecipeError: there are none, or they are those of another network.
    """
    try:
        path = Path(source).expanduser()
        if not path.exists():  # `local_folder` would advise a repository, which is not taken here
            raise CheckpointError(
                f"{path} does not exist: give the folder of a run or of a checkpoint, or a model.safetensors. One on "
                "the Hub has to be fetched before, with timm-lowrank pull"
            )
        folder = None if path.is_file() else local_folder(path)
        if folder is not None:
            require_checkpoint(folder)
            path = folder / NETWORK_WEIGHTS
        check_safetensors(path)
    except CheckpointError as error:
        raise RecipeError(f"init_from={source!r}: {error}") from error
    try:
        network.load_state_dict(load_file(path))
    except RuntimeError as error:
        raise RecipeError(f"init_from={source!r} holds the weights of another network: {error}") from error
