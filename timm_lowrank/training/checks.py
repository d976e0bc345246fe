"""What a recipe must satisfy beyond the types of its values, before anything is loaded or written."""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections.abc import Iterable

from ..data.images import load_images
from ..errors import nearest
from .fields import RecipeFields

CHOICES = {
    "optimizer": ("sgd", "adamw"),
    "schedule": ("step", "cosine"),
    "augment": ("crop-flip", "crop", "none"),
    "precision": ("no", "bf16", "fp16"),
}
POSITIVE = (
    "epochs", "batch_size", "eval_batch_size", "gradient_accumulation", "save_every", "keep_checkpoints",
    "learning_rate", "gamma", "clip_norm", "spectrum_images", "image_size", "shuffle_buffer", "save_every_steps",
)  # fmt: skip
NOT_NEGATIVE = ("pretrain_epochs", "ramp_epochs", "warmup_epochs", "momentum", "weight_decay", "seed", "workers")

# The importable package behind each of accelerate's trackers.
TRACKERS = {
    "aim": "aim",
    "clearml": "clearml",
    "comet_ml": "comet_ml",
    "dvclive": "dvclive",
    "mlflow": "mlflow",
    "swanlab": "swanlab",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
}


def problems_of(recipe: RecipeFields) -> list[str]:
    """One sentence for each thing that is wrong with `recipe`."""
    return [*_numbers(recipe), *_choices(recipe), *_together(recipe), *_inner(recipe), *_trackers(recipe)]


def _numbers(recipe: RecipeFields) -> Iterable[str]:
    for name in (*POSITIVE, *NOT_NEGATIVE):
        value = getattr(recipe, name)
        if value is None:
            continue
        if not math.isfinite(value) or value < 0 or (name in POSITIVE and value == 0):
            yield f"{name}={value!r} must be {'> 0' if name in POSITIVE else '>= 0'}"
    if recipe.ema_decay is not None and not 0 < recipe.ema_decay < 1:
        yield f"ema_decay={recipe.ema_decay!r} must lie between 0 and 1, or be null"
    for name in ("crop_scale", "crop_pct"):
        if not 0 < getattr(recipe, name) <= 1:
            yield f"{name}={getattr(recipe, name)!r} must be > 0 and <= 1"
    if any(epoch < 1 for epoch in recipe.milestones) or list(recipe.milestones) != sorted(set(recipe.milestones)):
        yield f"milestones={list(recipe.milestones)} must be increasing epochs >= 1"


def _choices(recipe: RecipeFields) -> Iterable[str]:
    for name, allowed in CHOICES.items():
        if getattr(recipe, name) not in allowed:
            yield f"{name}={getattr(recipe, name)!r} is not one of {', '.join(allowed)}"
    if recipe.streaming not in (True, False, "auto"):
        yield f"streaming={recipe.streaming!r} is not one of auto, true, false"


def _together(recipe: RecipeFields) -> Iterable[str]:
    if recipe.gradient_accumulation > 0 and recipe.batch_size % recipe.gradient_accumulation:
        parts = recipe.gradient_accumulation
        yield f"batch_size={recipe.batch_size} cannot be split into gradient_accumulation={parts}"
    if recipe.optimizer == "adamw" and recipe.nesterov:
        yield "nesterov=true belongs to optimizer=sgd"
    if recipe.optimizer == "adamw" and recipe.momentum >= 1:
        yield f"momentum={recipe.momentum!r} is the first beta of AdamW and must be < 1"
    if recipe.image_size is not None and recipe.streaming is False:
        yield f"image_size={recipe.image_size} needs streaming: set streaming=auto, or image_size=null"
    if recipe.data == "digits" and (recipe.image_size is not None or recipe.streaming is True):
        yield "data='digits' is built in and always held in memory: set streaming=auto and image_size=null"
    if recipe.nesterov and not recipe.momentum:
        yield "nesterov=true needs a momentum > 0"
    if recipe.lowrank_enabled and recipe.pretrain_epochs >= recipe.epochs:
        yield (
            f"pretrain_epochs={recipe.pretrain_epochs} leaves none of epochs={recipe.epochs} for the low-rank branch: "
            "lower it, or set lowrank.enabled=false for a plain network"
        )
    if recipe.twin and not recipe.lowrank_enabled:
        yield "twin compares with a plain network, and lowrank.enabled=false makes this run one: set twin=false"


def _inner(recipe: RecipeFields) -> Iterable[str]:
    if not isinstance(recipe.lowrank.get("enabled", True), bool):
        yield f"lowrank.enabled={recipe.lowrank['enabled']!r} must be true or false"
    try:
        recipe.lowrank_config()
    except (ValueError, TypeError) as error:
        yield f"lowrank: {error}"
    known = [name for name in inspect.signature(load_images).parameters if name not in ("source", "progress")]
    for key in recipe.data_args:
        if key not in known:
            yield f"there is no key data_args.{key}. {nearest(key, known)}"
    for key in ("num_classes", "model_name", "pretrained_cfg_overlay"):
        if key in recipe.model_args:
            yield f"model_args.{key} cannot be set: it follows from {'model' if key == 'model_name' else 'the data'}"


def _trackers(recipe: RecipeFields) -> Iterable[str]:
    for name in recipe.trackers:
        if name not in TRACKERS:
            yield f"there is no tracker {name!r}. {nearest(name, TRACKERS)}"
        elif importlib.util.find_spec(TRACKERS[name]) is None:
            yield f"the tracker {name!r} needs its package: pip install {TRACKERS[name].replace('_', '-')}"
