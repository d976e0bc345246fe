"""`Recipe`: everything that decides the outcome of a training run, read from YAML and checked at once."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..core.config import LowRankConfig
from ..core.errors import nearest
from .checks import problems_of
from .errors import RecipeError
from .typed import typed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run. The same recipe on the same data with the same number of threads gives the same weights.

    Args:
        model: a timm name; `model_args` are further keywords of `timm.create_model`.
        data: "digits" (built in), a folder of parquet files, or a data set on the Hub; `data_args` are
            keywords of `load_images`.
        lowrank: the fields of `LowRankConfig`, and `enabled`: False trains the plain network.
        epochs: passes over the training images.
        pretrain_epochs: epochs of plain training before the branches are switched on (paper: 50 of 350).
        ramp_epochs: epochs after that over which the weight of the penalty grows from zero to one.
        batch_size: images of one optimizer step, over all processes and accumulated parts together.
        eval_batch_size: images of one forward in evaluation.
        optimizer: "sgd" or "adamw". AdamW does not decay biases, norms and what timm says its network should not.
        learning_rate, weight_decay: of the optimizer.
        momentum: of SGD; the first beta of AdamW, whose second is 0.999.
        nesterov: of SGD.
        schedule: "step" (multiplied by `gamma` at each epoch in `milestones`) or "cosine" (to zero).
        warmup_epochs: epochs over which the learning rate grows linearly from zero.
        augment: "crop-flip", "crop" or "none", on the batch on the device. With `image_size` a crop is a random
            part of the image stretched to that size, otherwise the image moved over a black border.
        image_size: height and width that images are brought to while they are read, which streams them; None
            leaves them as they are, and they must have one size.
        crop_scale: with `image_size`, the smallest share of the area that a random part has.
        crop_pct: with `image_size`, the share of the resized test image's side that is cut out of its centre.
        streaming: whether images are read from their parquet shards whenever they are needed instead of being held
            in memory, decoded; "auto" streams with `image_size`, and if they would take more than half the memory.
            A streamed data set needs `data_args.mean` and `std` where ImageNet's do not suit.
        shuffle_buffer: in streaming, encoded images held for shuffling, over all processes together.
        workers: in streaming, processes that read and decode, for each training process; 0 does it in that one.
        precision: "no", "bf16" or "fp16" (mixed precision).
        ema_decay: of an exponential moving average of the backbone's weights; None keeps none. With it, the
            averaged network is what is measured and exported in the end.
        gradient_accumulation: parts that `batch_size` is split into, to save memory.
        clip_norm: the largest norm of the gradient; None does not clip.
        seed: of weights, order of images, augmentation and branches.
        trackers: names of experiment trackers that accelerate knows, such as "tensorboard".
        save_every, keep_checkpoints: epochs between two checkpoints, and how many are kept.
        save_every_steps: optimizer steps between two checkpoints inside an epoch; None writes none there.
        twin: True trains the plain network with the same seed and schedule first, for comparison; or the
            folder of an existing plain run.
        spectrum_images: test images from which the spectrum of the activations is measured; None takes all.

    Raises:
        RecipeError: with every problem found, in one message.
    """

    name: str = "recipe"
    model: str
    model_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    data: str = "digits"
    data_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    lowrank: dict[str, Any] = dataclasses.field(default_factory=dict)
    epochs: int
    pretrain_epochs: int = 0
    ramp_epochs: int = 0
    batch_size: int = 128
    eval_batch_size: int = 500
    optimizer: str = "sgd"
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = False
    schedule: str = "step"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    warmup_epochs: int = 0
    augment: str = "crop-flip"
    image_size: int | None = None
    crop_scale: float = 0.08
    crop_pct: float = 0.875
    streaming: bool | str = "auto"
    shuffle_buffer: int = 10_000
    workers: int = 4
    precision: str = "no"
    channels_last: bool = False
    compile: bool = False
    ema_decay: float | None = None
    gradient_accumulation: int = 1
    clip_norm: float | None = None
    seed: int = 0
    trackers: tuple[str, ...] = ()
    save_every: int = 1
    save_every_steps: int | None = None
    keep_checkpoints: int = 2
    twin: bool | str = False
    spectrum_images: int | None = 2000

    def __post_init__(self) -> None:
        problems = problems_of(self)
        if problems:
            raise RecipeError(_listed(f"recipe {self.name!r}", problems))

    @property
    def lowrank_enabled(self) -> bool:
        """Whether this run switches the branches on at all."""
        return bool(self.lowrank.get("enabled", True))

    def lowrank_config(self) -> LowRankConfig:
        """The branches of this run; a plain run has them too, so that the same layers are measured."""
        values = {key: value for key, value in self.lowrank.items() if key != "enabled"}
        return LowRankConfig.from_dict({"seed": self.seed, **values})

    def plain(self) -> Recipe:
        """The twin: the same run with the branches switched off."""
        return dataclasses.replace(
            self, name=f"{self.name} (plain)", lowrank={**self.lowrank, "enabled": False}, twin=False
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values that YAML and JSON can hold; `from_dict` is the inverse."""
        values = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Builds a recipe from plain values.

        Raises:
            RecipeError: unknown keys (the nearest known ones are named), missing keys, values of a wrong type.
        """
        hints = typing.get_type_hints(cls)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        problems = [f"there is no key {key!r}. {nearest(str(key), fields)}" for key in values if key not in fields]
        problems += [
            f"the key {name!r} is missing"
            for name, field in fields.items()
            if name not in values
            and field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        ]
        checked = {}
        for key in values.keys() & fields.keys():
            try:
                checked[key] = typed(values[key], hints[key])
            except TypeError as error:
                problems.append(f"{key}={values[key]!r} {error}")
        if problems:
            raise RecipeError(_listed(f"recipe {values.get('name', 'recipe')!r}", problems))
        return cls(**checked)


def load_recipe(path: str | Path, overrides: Sequence[str] = (), **replace: Any) -> Recipe:
    """Reads a YAML recipe and changes keys of it.

    Args:
        path: the YAML file; its stem is the recipe's name unless it sets one.
        overrides: "key=value" each, value in YAML; a dotted key reaches inside (`lowrank.scale=paper`).
        replace: keys that are set when they are not None.

    Raises:
        RecipeError: a file that is not there or not YAML, an override without "=", and all that `Recipe` refuses.
    """
    path = Path(path)
    try:
        values = parse_yaml(path.read_text())
    except OSError as error:
        near = sorted(other.stem for other in path.parent.glob("*.yaml"))
        known = f" Recipes there: {', '.join(near)}." if near else ""
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror}.{known}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path} must hold a mapping of keys to values")
    values.setdefault("name", path.stem)
    for override in overrides:
        _override(values, override)
    values.update({key: value for key, value in replace.items() if value is not None})
    return Recipe.from_dict(values)


def parse_yaml(text: str) -> Any:
    """YAML in which 5e-4 is a number (YAML 1.1, and with it PyYAML, takes it for a string)."""
    return yaml.load(text, Loader=_Loader)


class _Loader(yaml.SafeLoader):
    pass


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


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
