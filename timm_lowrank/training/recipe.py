"""`Recipe`: everything that decides the outcome of a training run, read from YAML and checked at once."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import math
import sys
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..comparators import COMPARATORS, Comparator, comparator_from
from ..core.config import LowRankConfig
from ..data import load_data
from ..errors import RecipeError, nearest
from ..files import parse_yaml
from ..records import decode, decode_fields, default_of, encode, in_words

# ---------------------------------------------------------------------------------------------------------- the keys


def _key(text: str, default: Any = dataclasses.MISSING) -> Any:
    """A field of `Recipe` and what it means; without a default it has to be given."""
    return dataclasses.field(default=default, metadata={"text": text})


@dataclasses.dataclass(frozen=True)
class FieldInfo:
    """One key of a recipe, for a help text."""

    name: str
    type: str  # in words: "an integer", "a number or null"
    required: bool
    default: Any  # None where it is required
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run. The same recipe on the same data with the same number of threads gives the same weights.

    `describe_fields` lists the keys with type, default and meaning, for programs and help texts.

    Raises:
        RecipeError: with every problem found, in one message.
    """

    name: str = _key("what the run is called; a file that does not say has its own name", "recipe")
    model: str = _key("a timm name")
    model_args: dict[str, Any] = dataclasses.field(
        default_factory=dict, metadata={"text": "further keywords of timm.create_model"}
    )
    data: str = _key('"digits" (built in), a folder of parquet files or images, or a data set on the Hub', "digits")
    data_args: dict[str, Any] = dataclasses.field(
        default_factory=dict, metadata={"text": "keywords of load_data, such as train_limit or label_column"}
    )
    lowrank: dict[str, Any] = dataclasses.field(
        default_factory=dict,
        metadata={
            "text": "the fields of LowRankConfig, and enabled, which when false trains the plain network; with a "
            "comparator it is false"
        },
    )
    comparator: str | None = _key(
        f"{', '.join(COMPARATORS)}: trains this in the place of the branches, which then say what layers are measured "
        "and where bottlenecks sit; null trains with branches",
        None,
    )
    comparator_args: dict[str, Any] = dataclasses.field(
        default_factory=dict, metadata={"text": "settings of the comparator, such as sparsity of snip"}
    )
    init_from: str | None = _key(
        "a run, a checkpoint folder or a model.safetensors of the same plain network whose weights the training starts "
        "from; null starts anew",
        None,
    )
    epochs: int = _key("passes over the training images")
    pretrain_epochs: int = _key("epochs of plain training before the branches are switched on (paper: 50 of 350)", 0)
    ramp_epochs: int = _key("epochs after that over which the weight of the penalty grows from zero to one", 0)
    cooldown_epochs: int = _key("epochs at the end over which the weight of the penalty falls to zero", 0)
    batch_size: int = _key("images of one optimizer step, over all processes and accumulated parts together", 128)
    eval_batch_size: int = _key("images of one forward in evaluation", 500)
    optimizer: str = _key(
        '"sgd" or "adamw"; AdamW does not decay biases, norms and what timm says its network should not', "sgd"
    )
    learning_rate: float = _key("of the optimizer", 0.1)
    momentum: float = _key("of SGD; the first beta of AdamW, whose second is 0.999", 0.9)
    weight_decay: float = _key("of the optimizer", 5e-4)
    nesterov: bool = _key("Nesterov's momentum, of SGD", False)
    schedule: str = _key('"step" (multiplied by gamma at each epoch in milestones) or "cosine" (to zero)', "step")
    milestones: tuple[int, ...] = _key("epochs at which the step schedule multiplies the learning rate by gamma", ())
    gamma: float = _key("the factor of the step schedule", 0.1)
    warmup_epochs: int = _key("epochs over which the learning rate grows linearly from zero", 0)
    augment: str = _key(
        '"crop-flip", "crop" or "none", on the batch on the device; with image_size a crop is a random part of the '
        "image stretched to that size, otherwise the image moved over a black border",
        "crop-flip",
    )
    image_size: int | None = _key(
        "height and width that images are brought to while they are read, which streams them; null leaves them as "
        "they are, and they must have one size",
        None,
    )
    crop_scale: float = _key("with image_size, the smallest share of the area that a random part has", 0.08)
    crop_pct: float = _key(
        "with image_size, the share of the resized test image's side that is cut out of its centre", 0.875
    )
    streaming: bool | str = _key(
        "whether images are read from their files whenever they are needed instead of being held in memory, "
        'decoded; "auto" streams with image_size, and if they would take more than half the memory; a streamed data '
        "set needs data_args.mean and std where ImageNet's do not suit",
        "auto",
    )
    shuffle_buffer: int = _key(
        "in streaming, encoded images held for shuffling, over all processes together; a folder of images, which are "
        "read in any order, needs none",
        10_000,
    )
    workers: int = _key(
        "in streaming, processes that read and decode, for each training process; 0 does it in that one", 4
    )
    precision: str = _key(
        '"no", "bf16" or "fp16" (mixed precision); "auto": bf16 if it is faster, config.yaml has which',
        "no",
    )
    channels_last: bool = _key("whether images and weights lie in memory pixel by pixel, all channels together", False)
    compile: bool = _key("whether torch.compile compiles the network", False)
    ema_decay: float | None = _key(
        "of an exponential moving average of the backbone's weights; null keeps none. With it, the averaged network "
        "is what is measured and exported in the end",
        None,
    )
    gradient_accumulation: int = _key("parts that batch_size is split into, to save memory", 1)
    clip_norm: float | None = _key("the largest norm of the gradient; null does not clip", None)
    seed: int = _key("of weights, order of images, augmentation and branches", 0)
    trackers: tuple[str, ...] = _key('names of experiment trackers that accelerate knows, such as "tensorboard"', ())
    save_every: int = _key("epochs between two checkpoints", 1)
    save_every_steps: int | None = _key(
        "optimizer steps between two checkpoints inside an epoch; null writes none there", None
    )
    keep_checkpoints: int = _key("checkpoints that are kept, the newest ones", 2)
    twin: bool | str = _key(
        "true trains the plain network with the same seed and schedule first, for comparison; or the folder of an "
        "existing plain run",
        False,
    )
    spectrum_images: int | None = _key(
        "test images, as many of each class, from which the spectrum of the activations is measured; null takes all",
        2000,
    )

    def __post_init__(self) -> None:
        problems = [*_numbers(self), *_choices(self), *_together(self), *_inner(self)]
        if problems:
            raise RecipeError(_listed(f"recipe {self.name!r}", problems))

    @property
    def lowrank_enabled(self) -> bool:
        """Whether this run switches the branches on at all."""
        return bool(self.lowrank.get("enabled", self.comparator is None))

    def lowrank_config(self) -> LowRankConfig:
        """The branches of this run; a plain run has them too, so that the same layers are measured."""
        values = {key: value for key, value in self.lowrank.items() if key != "enabled"}
        return LowRankConfig.from_dict({"seed": self.seed, **values})

    def compared(self) -> Comparator:
        """What is trained in the place of the branches; one that does nothing where the recipe names none."""
        return Comparator() if self.comparator is None else comparator_from(self.comparator, self.comparator_args)

    def plain(self) -> Recipe:
        """The twin: the same run without branches and comparator."""
        off = {"lowrank": {**self.lowrank, "enabled": False}, "comparator": None, "comparator_args": {}}
        return dataclasses.replace(self, name=f"{self.name} (plain)", twin=False, **off)  # type: ignore[arg-type]

    def without_effect(self) -> list[str]:
        """Keys of the schedule that do not what they say, a sentence each: no error, as a recipe may be cut short."""
        found = []
        if self.warmup_epochs > self.epochs:
            found.append(f"warmup_epochs={self.warmup_epochs} does not end in epochs={self.epochs}")
        if self.schedule != "step" and (self.milestones or self.gamma != type(self).gamma):
            found.append(f"milestones and gamma belong to schedule=step and have no effect in schedule={self.schedule}")
        elif late := [milestone for milestone in self.milestones if milestone >= self.epochs]:
            found.append(f"milestones {', '.join(map(str, late))} have no effect in epochs={self.epochs}")
        trained = self.epochs - self.pretrain_epochs
        if self.lowrank_enabled and 0 < trained < self.ramp_epochs + self.cooldown_epochs:
            found.append(
                f"ramp_epochs={self.ramp_epochs} and cooldown_epochs={self.cooldown_epochs} are more than the "
                f"{trained} epochs with branches: the penalty never has its whole weight"
            )
        return found

    def data_options(self) -> dict[str, Any]:
        """The keywords of `timm_lowrank.data.load_data` that this recipe means."""
        own = ("streaming", "image_size", "crop_pct", "crop_scale", "augment")
        return {**self.data_args, **{name: getattr(self, name) for name in own}}

    def to_dict(self) -> dict[str, Any]:
        """Plain values that YAML and JSON can hold; `from_dict` is the inverse."""
        return {field.name: encode(getattr(self, field.name)) for field in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Builds a recipe from plain values.

        Raises:
            RecipeError: unknown keys (the nearest known ones are named), missing keys, values of a wrong type.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        problems = [f"there is no key {key!r}. {nearest(str(key), known)}" for key in values if key not in known]
        # YAML takes the word no for false.
        values = {
            key: "no" if value is False and "no" in CHOICES.get(key, ()) else value for key, value in values.items()
        }
        checked = decode_fields(cls, values, problems)
        if problems:
            raise RecipeError(_listed(f"recipe {values.get('name', 'recipe')!r}", problems))
        return cls(**checked)

    @classmethod
    def describe_fields(cls) -> list[FieldInfo]:
        """Every key in the order of the class: name, type in words, default and meaning."""
        hints = typing.get_type_hints(cls)
        return [
            FieldInfo(
                name=field.name,
                type=in_words(hints[field.name]),
                required=(required := default_of(field) is dataclasses.MISSING),
                default=None if required else default_of(field),
                text=field.metadata["text"],
            )
            for field in dataclasses.fields(cls)
        ]


# ------------------------------------------------------------------------------------------------ files and overrides


def recipe_names() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(path.stem for path in _recipe_folder().glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """The YAML file of a recipe that comes with the package.

    Raises:
        RecipeError: there is none of that name; lists them all.
    """
    names = recipe_names()
    if name not in names:
        raise RecipeError(
            f"there is no recipe {name!r}. {nearest(name, names)} Recipes by name: {', '.join(names)}. "
            "A recipe of your own is a file: give its path, such as my/recipe.yaml"
        )
    return _recipe_folder() / f"{name}.yaml"


def _recipe_folder() -> Path:
    """recipes/configs, which an installed wheel has as timm_lowrank/configs."""
    package = Path(__file__).parent.parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "recipes" / "configs"


def load_recipe(source: str | Path, overrides: Sequence[str] = (), **replace: Any) -> Recipe:
    """Reads a YAML recipe and changes keys of it.

    Args:
        source: the path of a YAML file, whose stem is the recipe's name unless it sets one; or the name of a recipe
            that comes with the package, see `recipe_names`.
        overrides: "key=value" each, value in YAML; a dotted key reaches inside (`lowrank.scale=paper`).
        replace: keys that are set when they are not None.

    Raises:
        RecipeError: a file or name that is not there, a file that is not YAML, an override without "=", and all that
            `Recipe` refuses.
    """
    path = Path(source)
    if isinstance(source, str) and not path.suffix and path.name == source and not path.is_file():
        path = recipe_path(source)
    values = read_recipe(path)
    for override in overrides:
        _override(values, override)
    values.update({key: value for key, value in replace.items() if value is not None})
    return Recipe.from_dict(values)


LEAST_TESTED = 2  # test images, of which spectra are measured
MOST_BYTES, MOST_WORKERS = 1 << 20, 512


def read_recipe(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML recipe as they are written, its name added.

    Raises:
        RecipeError: it is not there, not YAML, or holds something else.
    """
    try:
        if (size := path.stat().st_size) > MOST_BYTES:
            raise RecipeError(f"{path} has {size:,} bytes, and a recipe at most {MOST_BYTES:,}: give another file")
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        near = sorted(other.stem for other in path.parent.glob("*.yaml"))
        known = f" Recipes there: {', '.join(near)}." if near else ""
        reason = error.strerror if isinstance(error, OSError) else error
        raise RecipeError(f"cannot read the recipe {path}: {reason}.{known}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path} must hold a mapping of keys to values")
    return {"name": path.stem, **values}


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise RecipeError(f"--set {override}: write it as key=value, such as --set lowrank.reconstruction_weight=0.3")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override}: the value is not valid YAML: {error}") from error
    # A layer name may hold dots of its own: lowrank.branches.layer3.1 is the key "layer3.1".
    *parents, last = key.split(".", 2)
    for parent in parents:
        inner = values.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"--set {override}: {parent} is {inner!r}, which has no keys inside")
        values = inner
    values[last] = value


def _listed(what: str, problems: Sequence[str]) -> str:
    return f"{what}: {problems[0]}" if len(problems) == 1 else f"{what}:\n" + "\n".join(f"- {p}" for p in problems)


# ------------------------------------------------------------------------------------------------------------ schedule


def learning_rate(recipe: Recipe, epoch: int, step: int, steps: int) -> float:
    """The learning rate of optimizer step `step` (from 0) of `steps` in epoch `epoch` (from 0): no state to resume."""
    if recipe.schedule == "cosine":
        decay = 0.5 * (1 + math.cos(math.pi * (epoch + step / steps) / recipe.epochs))
    else:
        decay = recipe.gamma ** sum(milestone <= epoch for milestone in recipe.milestones)
    return recipe.learning_rate * decay * _grown(epoch + (step + 1) / steps, recipe.warmup_epochs)


def penalty_weight(recipe: Recipe, epoch: int, step: int, steps: int) -> float:
    """The factor of the penalty: 0 while the branches are off, then growing to 1 over `ramp_epochs`, and falling in the
    end over `cooldown_epochs`."""
    if not recipe.lowrank_enabled or epoch < recipe.pretrain_epochs:
        return 0.0
    risen = _grown(epoch - recipe.pretrain_epochs + (step + 1) / steps, recipe.ramp_epochs)
    return min(risen, _grown(recipe.epochs - epoch - step / steps, recipe.cooldown_epochs))


def _grown(epochs: float, over: int) -> float:
    return min(1.0, epochs / over) if over else 1.0


# -------------------------------------------------------------------------------------------------------------- checks

CHOICES = {
    "optimizer": ("sgd", "adamw"),
    "schedule": ("step", "cosine"),
    "augment": ("crop-flip", "crop", "none"),
    "precision": ("no", "bf16", "fp16", "auto"),
}
POSITIVE = (
    "epochs", "batch_size", "eval_batch_size", "gradient_accumulation", "save_every", "keep_checkpoints",
    "learning_rate", "gamma", "clip_norm", "spectrum_images", "image_size", "shuffle_buffer", "save_every_steps",
)  # fmt: skip
NOT_NEGATIVE = (
    "pretrain_epochs",
    "ramp_epochs",
    "cooldown_epochs",
    "warmup_epochs",
    "momentum",
    "weight_decay",
    "seed",
    "workers",
)

# accelerate's trackers. Each is the name of its importable package, too.
TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")


def _numbers(recipe: Recipe) -> Iterable[str]:
    for name in (*POSITIVE, *NOT_NEGATIVE):
        value = getattr(recipe, name)
        if value is None:
            continue
        if not 0 <= value <= sys.float_info.max or (name in POSITIVE and value == 0):
            yield f"{name}={value!r} must be {'> 0' if name in POSITIVE else '>= 0'} and finite"
    if recipe.spectrum_images is not None and 0 < recipe.spectrum_images < LEAST_TESTED:
        yield f"spectrum_images={recipe.spectrum_images!r} must be >= {LEAST_TESTED}: one has no variance"
    if recipe.workers > MOST_WORKERS:
        yield f"workers={recipe.workers!r} must be <= {MOST_WORKERS}: each is a process"
    if recipe.seed >= 2**63:
        yield f"seed={recipe.seed!r} must be < 2**63"
    if recipe.ema_decay is not None and not 0 < recipe.ema_decay < 1:
        yield f"ema_decay={recipe.ema_decay!r} must lie between 0 and 1, or be null"
    for name in ("crop_scale", "crop_pct"):
        if not 0 < getattr(recipe, name) <= 1:
            yield f"{name}={getattr(recipe, name)!r} must be > 0 and <= 1"
    if any(epoch < 1 for epoch in recipe.milestones) or list(recipe.milestones) != sorted(set(recipe.milestones)):
        yield f"milestones={list(recipe.milestones)} must be increasing epochs >= 1"


def _choices(recipe: Recipe) -> Iterable[str]:
    for name, allowed in CHOICES.items():
        if getattr(recipe, name) not in allowed:
            yield f"{name}={getattr(recipe, name)!r} is not one of {', '.join(allowed)}"
    if recipe.streaming not in (True, False, "auto"):
        yield f"streaming={recipe.streaming!r} is not one of auto, true, false"
    for name in recipe.trackers:
        if name not in TRACKERS:
            yield f"there is no tracker {name!r}. {nearest(name, TRACKERS)}"


def _together(recipe: Recipe) -> Iterable[str]:
    if recipe.gradient_accumulation > 0 and recipe.batch_size % recipe.gradient_accumulation:
        parts = recipe.gradient_accumulation
        yield f"batch_size={recipe.batch_size} cannot be split into gradient_accumulation={parts}"
    if recipe.optimizer == "adamw" and recipe.nesterov:
        yield "nesterov=true belongs to optimizer=sgd"
    if recipe.optimizer == "adamw" and recipe.momentum >= 1:
        yield f"momentum={recipe.momentum!r} is the first beta of AdamW and must be < 1"
    if recipe.optimizer == "sgd" and recipe.momentum >= 1:
        yield f"momentum={recipe.momentum!r} of SGD must be < 1: older gradients would never fade"
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
    if recipe.comparator is not None and recipe.lowrank.get("enabled") is True:
        yield f"comparator={recipe.comparator!r} takes the place of the branches: drop lowrank.enabled=true"
    if recipe.comparator is None and recipe.comparator_args:
        yield "comparator_args belong to a comparator: name it, or drop them"
    if recipe.twin and not recipe.lowrank_enabled and recipe.comparator is None:
        yield "twin compares with a plain network, and lowrank.enabled=false makes this run one: set twin=false"


def _inner(recipe: Recipe) -> Iterable[str]:
    if not isinstance(recipe.lowrank.get("enabled", True), bool):
        yield f"lowrank.enabled={recipe.lowrank['enabled']!r} must be true or false"
    try:
        recipe.lowrank_config()
    except (ValueError, TypeError) as error:
        yield f"lowrank: {error}"
    try:
        recipe.compared()
    except ValueError as error:
        yield str(error)
    # The others are keys of the recipe itself.
    known = [name for name in inspect.signature(load_data).parameters if not hasattr(recipe, name)]
    known = [name for name in known if name not in ("source", "progress")]
    hints, wrong = typing.get_type_hints(load_data), list[str]()
    for key, value in recipe.data_args.items():
        if key not in known:
            yield f"there is no key data_args.{key}. {nearest(key, known)}"
        elif key not in ("mean", "std"):  # which are lists of as many numbers as the images have channels
            decode(hints[key], value, f"data_args.{key}", wrong)
    yield from wrong
    train, test, extra = (recipe.data_args.get(key) for key in ("train_split", "test_split", "extra"))
    if test is not None and test in (train or "train", "extra" if extra else None):
        yield f"data_args.test_split={test!r} is a split of the training images: name another one"
    if extra and train == "extra":
        yield "data_args.extra=true adds the split 'extra', which data_args.train_split names already: drop one"
    for key in ("num_classes", "model_name", "pretrained_cfg_overlay"):
        if key in recipe.model_args:
            yield f"model_args.{key} cannot be set: it follows from {'model' if key == 'model_name' else 'the data'}"


def require_trackers(recipe: Recipe) -> None:
    """Raises a RecipeError unless the packages of the recipe's trackers are installed on this machine."""
    missing = [name for name in recipe.trackers if importlib.util.find_spec(name) is None]
    if missing:
        problems = [f"the tracker {n!r} needs its package: pip install {n.replace('_', '-')}" for n in missing]
        raise RecipeError(_listed(f"recipe {recipe.name!r}", problems))
