"""`RecipeFields`: what a training run is told, and what each value means."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..core.config import LowRankConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeFields:
    """The values of a `Recipe`, not checked yet.

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

    @property
    def lowrank_enabled(self) -> bool:
        """Whether this run switches the branches on at all."""
        return bool(self.lowrank.get("enabled", True))

    def lowrank_config(self) -> LowRankConfig:
        """The branches of this run; a plain run has them too, so that the same layers are measured."""
        values = {key: value for key, value in self.lowrank.items() if key != "enabled"}
        return LowRankConfig.from_dict({"seed": self.seed, **values})
