"""Low-rank branches in transformers.Trainer.

    trainer = LowRankTrainer(model=model, args=args, lowrank=LowRankConfig(branches="2-LR"), train_dataset=data)
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model("model")  # the plain model, for transformers' from_pretrained, and the branches beside it
    trainer.export("network")    # of a TimmWrapper: the plain timm network, for timm.create_model("local-dir:network")

The model stays the Trainer's own, so that saving, publishing, DistributedDataParallel, torch.compile and gradient
checkpointing work as ever; `trainer.lowrank`, the `LowRankModel` on it, is held aside. For a Trainer of your own:
`class MyLowRankTrainer(LowRankMixin, MyTrainer)`, or `LowRankCallback` alone where the loss has the penalty already.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

try:
    import accelerate  # noqa: F401 - the Trainer asks for it only when it is built
    from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState
    from transformers.trainer import TRAINER_STATE_NAME
except ImportError as error:
    raise ImportError(
        "timm_lowrank.integrations.trainer needs transformers and accelerate, which cannot be imported: pip install "
        f"transformers accelerate ({error})"
    ) from error

from ..checkpoint.branches import has_branches, load_branches, write_branches
from ..checkpoint.files import LOWRANK_CONFIG, LOWRANK_WEIGHTS
from ..checkpoint.saving import save_pretrained
from ..core.capture import evaluating
from ..core.config import LowRankConfig
from ..core.loop import labels_among
from ..core.model import COMPILED_BY_REGIONS, LowRankModel
from ..errors import CheckpointError, LowRankError, LowRankWarning
from .transformers_models import RecordingForward, as_transformers, is_timm, wrap_network

__all__ = ["LowRankCallback", "LowRankMixin", "LowRankTrainer"]

_Base = Trainer if TYPE_CHECKING else object


class LowRankCallback(TrainerCallback):  # type: ignore[misc]
    """Switches the branches on, makes the Update Step after each real optimizer step, keeps W and b in checkpoints.

    Alone it is for a Trainer whose loss includes `lowrank.penalty()` already; `LowRankMixin` brings its own.

    Args:
        lowrank: the wrapped model. None does nothing until it is set.
        start_epoch, start_step: train plainly until so many epochs (a fraction is possible) and optimizer steps are
            over. With both 0 the callback leaves the switch alone.
        checkpoints: whether to write the branches into checkpoint-N and to read them on resuming and at
            `load_best_model_at_end`. Not done where the Trainer's model is `lowrank` itself, whose state holds them.
        resume_from: the checkpoint that the Trainer resumes from, where that is not in its `output_dir`: callbacks are
            not told. Raises a CheckpointError on resuming if it is of another run or step.
    """

    def __init__(
        self,
        lowrank: LowRankModel | None = None,
        *,
        start_epoch: float = 0.0,
        start_step: int = 0,
        checkpoints: bool = True,
        resume_from: str | Path | None = None,
    ) -> None:
        if start_epoch < 0 or start_step < 0:
            raise ValueError(f"start_epoch={start_epoch} and start_step={start_step} must not be negative")
        self.lowrank = lowrank
        self.start_epoch, self.start_step, self.checkpoints = start_epoch, start_step, checkpoints
        self.resume_from = resume_from

    def switch(self, state: Any) -> None:
        """On or off, by the epochs and optimizer steps of a TrainerState."""
        if self.lowrank is None or not (self.start_epoch or self.start_step):
            return
        on = (state.epoch or 0.0) >= self.start_epoch and state.global_step >= self.start_step
        if on != self.lowrank.enabled:
            self.lowrank.enable(on)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.switch(state)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        # With fp16 it comes after a step that the gradient scaler left out, too.
        if self.lowrank is not None and not getattr(optimizer, "step_was_skipped", False):
            self.lowrank.update()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step and (lowrank := self._aside(kwargs)) is not None:
            load_branches(lowrank, self._resumed_from(args, state))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.should_save and (lowrank := self._aside(kwargs)) is not None:
            write_branches(lowrank, self._folder(args, state))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        if best is not None and (lowrank := self._aside(kwargs)) is not None:
            load_branches(lowrank, best)

    def _aside(self, kwargs: Mapping[str, Any]) -> LowRankModel | None:
        """The branches, if the Trainer does not keep them."""
        return self.lowrank if self.checkpoints and kwargs.get("model") is not self.lowrank else None

    def _resumed_from(self, args: Any, state: Any) -> Path:
        """The checkpoint that `state` is of."""
        folder = Path(self.resume_from) if self.resume_from else self._folder(args, state)
        saved = folder / TRAINER_STATE_NAME
        if not saved.is_file() or _history(TrainerState.load_from_json(str(saved))) != _history(state):
            raise CheckpointError(
                f"the Trainer resumes at step {state.global_step:,} of a run whose checkpoint {folder} is not, so its "
                "branches are not there: give LowRankCallback(resume_from=...) the path that train() is given"
            )
        return folder

    @staticmethod
    def _folder(args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _history(state: TrainerState) -> tuple[int, str]:
    """What tells a run from another at the same step; in JSON, where NaN equals itself."""
    return state.global_step, json.dumps(state.log_history)


class LowRankMixin(_Base):  # type: ignore[misc, valid-type]
    """Low-rank branches for any subclass of transformers.Trainer: `class Mine(LowRankMixin, MyTrainer)`.

    The branches are made at the first training batch, whose images say how wide the layers are; until then `lowrank`
    is None. Their penalty is added to what `compute_loss` of the next class gives, and scaled as that is, under
    gradient accumulation too. Logged beside the loss are "penalty" and, for each layer, "LAYER.reconstruction",
    "LAYER.norm", "LAYER.activation_norm" and "LAYER.outside", the share of energy that W leaves outside: means since
    the last log, on this process; and "LAYER.rank", the rank of W.

    Some models of transformers take `num_items_in_batch` and ignore it, and in its first versions label smoothing did,
    so that the loss is too large under gradient accumulation and on several processes; this is noticed, warned of and
    put right.

    Args:
        model: a model of transformers; a timm network, which is put into a TimmWrapperForImageClassification; or a
            `LowRankModel` around either. Models from `model_init` may be any of these, too.
        args and everything after it: as for the Trainer.
        lowrank: what to regularize; None is `LowRankConfig()`. Layers of a TimmWrapper are named as in timm
            ("layer3"). "2-LR" is the input of the last stage (ResNet) or block (ViT), and of the classifier.
        start_epoch, start_step: see `LowRankCallback`.
        example_input: images (batch, channels, height, width) as the model takes them, to have the branches at once.

    Raises:
        ValueError: a `LowRankModel` and `lowrank`; two callbacks. At the first batch also as `timm_lowrank.wrap`.
        LowRankError: nn.DataParallel, DeepSpeed or FSDP.
    """

    model_accepts_loss_kwargs: bool  # the Trainer's

    def __init__(
        self,
        model: nn.Module | None = None,
        args: Any = None,
        *others: Any,
        lowrank: LowRankConfig | None = None,
        start_epoch: float = 0.0,
        start_step: int = 0,
        example_input: Tensor | None = None,
        **keywords: Any,
    ) -> None:
        self.lowrank: LowRankModel | None = None  # until the first training batch
        self._config = lowrank
        self._forward: RecordingForward | None = None
        self._pending: str | None = None  # folder of branches that wait to be built
        self._image_shape: tuple[int, ...] | None = None  # of the images that the branches were built for
        self._misnamed = False  # whether the last checkpoint holds the model's weights under other names
        self._loss_checked = False
        self._means = _Means()
        self._callback = LowRankCallback(start_epoch=start_epoch, start_step=start_step, checkpoints=False)
        if model is not None:
            model = self._adopted(model)
        super().__init__(model, args, *others, **keywords)
        self._refuse()
        self.add_callback(self._callback)
        if example_input is not None:
            self._build(example_input.to(self.args.device))

    def _refuse(self) -> None:
        kinds = {
            "nn.DataParallel": self.args.n_gpu > 1,
            "DeepSpeed": self.is_deepspeed_enabled,
            "FSDP": self.is_fsdp_enabled,
        }
        if name := next((name for name, used in kinds.items() if used), None):
            raise LowRankError(
                f"the low-rank branches do not work with {name} in the Trainer; use DistributedDataParallel: start the "
                "script with `torchrun --nproc_per_node N` or `accelerate launch`"
            )
        if any(isinstance(callback, LowRankCallback) for callback in self.callback_handler.callbacks):
            raise ValueError("LowRankMixin brings a LowRankCallback of its own; leave yours out of callbacks")

    # ----------------------------------------------------------------------------------------------- the branches

    def _adopted(self, model: nn.Module) -> Any:
        """The model of transformers that the Trainer gets; branches that are on it already are taken over."""
        self.lowrank = self._callback.lowrank = self._image_shape = None
        if isinstance(model, LowRankModel):
            if self._config is not None:
                raise ValueError("the model is wrapped already, so `lowrank` would have no effect; give one of the two")
            self.lowrank = self._callback.lowrank = model
            model = model.backbone
        return as_transformers(model) if is_timm(model) else model

    def call_model_init(self, trial: Any = None) -> Any:
        return self._adopted(super().call_model_init(trial))

    def _build(self, images: Tensor) -> LowRankModel:
        """Branches for images (batch, channels, height, width), from a waiting checkpoint if there is one."""
        self._image_shape = tuple(images.shape[1:])
        if self.lowrank is None:
            self.lowrank = wrap_network(self.model, self._config or LowRankConfig(), images[:2])
        self._callback.lowrank = lowrank = self.lowrank
        lowrank.branches.to(self.args.device)
        if self._pending is not None:
            load_branches(lowrank, self._pending)
            self._pending = None
        self._callback.switch(self.state)
        return lowrank

    def _ready(self, model: nn.Module, inputs: Mapping[str, Any]) -> LowRankModel:
        """The branches, recording what the model's next forward does.

        Args:
            model: what is called, with the Trainer's own model inside.
        """
        lowrank = self.lowrank
        if lowrank is None or self._image_shape is None:
            images = inputs.get(getattr(self.model, "main_input_name", "pixel_values"))
            if images is None:
                images = next(value for value in inputs.values() if isinstance(value, Tensor))
            lowrank = self._build(images)
        if self._forward is None or self._forward.model is not self.model:
            self._restore_forward()
            if all(module is not self.model for module in model.modules()):
                raise LowRankError(COMPILED_BY_REGIONS)
            self._forward = RecordingForward(self.model, lowrank)
        lowrank.training = True  # not lowrank.train(): the network's mode is the Trainer's business
        lowrank.branches.train()
        return lowrank

    def _restore_forward(self) -> None:
        if self._forward is not None:
            self._forward.remove()
            self._forward = None

    # --------------------------------------------------------------------------------------------------- training

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As of the Trainer. The model is left without a trace of the branches."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self._restore_forward()

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of the next class; in training with the penalty added."""
        if not (self.model.training and torch.is_grad_enabled()):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        lowrank = self._ready(model, inputs)
        self._check_loss(inputs, num_items_in_batch)
        share = self._share(inputs, num_items_in_batch)
        labels = labels_among(lowrank, (), inputs)  # before the Trainer takes them out of the inputs, to smooth them
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch=num_items_in_batch)
        if lowrank.enabled:
            penalty = lowrank.penalty(labels)
            loss = loss + share * penalty
            self._means.add(penalty, lowrank)
        return (loss, outputs) if return_outputs else loss

    def _share(self, inputs: Mapping[str, Any], num_items_in_batch: Any) -> Any:
        """What the mean over a batch counts for in the loss that `compute_loss` gives.

        1 where the Trainer divides by the batches that it accumulates, else the batch's share of all their items.
        """
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            accepted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = accepted or self.compute_loss_func is not None
        if not scaled:
            return 1.0
        if num_items_in_batch is None:
            return 1.0 / getattr(self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps)
        items = (inputs["labels"] != -100).sum()
        world = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return items * world / num_items_in_batch

    def _check_loss(self, inputs: Mapping[str, Any], num_items_in_batch: Any) -> None:
        """Finds out, once, whether the loss heeds the number of items that the Trainer knows of."""
        known = num_items_in_batch is not None and self.model_accepts_loss_kwargs and "labels" in inputs
        said = getattr(self, "loss_is_scaled_for_ga", None) is not None or self.compute_loss_func is not None
        if self._loss_checked or not known or said:
            return
        self._loss_checked = True
        if self._loss_heeds_items(inputs, num_items_in_batch):
            return
        self.model_accepts_loss_kwargs = False
        if self.args.gradient_accumulation_steps > 1 or self.accelerator.num_processes > 1:
            later = type(self).__mro__[type(self).__mro__.index(LowRankMixin) + 1 :]
            owner = next(kind for kind in later if "compute_loss" in vars(kind))
            whose = f"the loss of {type(self.model).__name__}" if owner is Trainer else f"{owner.__name__}.compute_loss"
            ignores = f"{whose} takes num_items_in_batch and ignores it"
            if self.label_smoother is not None:
                ignores = "label smoothing of this version of transformers ignores num_items_in_batch"
            warnings.warn(
                f"{ignores}: under gradient accumulation and on several processes the loss would be too large. It is "
                "averaged instead",
                LowRankWarning,
                stacklevel=2,
            )

    def _loss_heeds_items(self, inputs: Mapping[str, Any], num_items_in_batch: Any) -> bool:
        """If the loss of the next class, which may not be the model's, is the same for any number of items, it is a
        plain mean. Two images are enough to see it."""
        few = {key: value[:2] if isinstance(value, Tensor) else value for key, value in inputs.items()}
        losses = []
        with evaluating(self.model):
            for count in (num_items_in_batch, 2 * num_items_in_batch):
                with torch.random.fork_rng(devices=[]):  # what it draws must not make the difference
                    losses.append(super().compute_loss(self.model, dict(few), num_items_in_batch=count))
        return not torch.equal(*losses)

    # ---------------------------------------------------------------------------------------------------- logging

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """As of the Trainer; logs of the training loss get the losses of the branches, too."""
        if "loss" in logs:
            logs.update(self._means.take())
            if self.lowrank is not None and self.lowrank.enabled:
                logs.update({f"{layer}.rank": one.rank for layer, one in self.lowrank.report().items()})
        super().log(logs, *args, **kwargs)

    # ------------------------------------------------------------------------------------------------ checkpoints

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        if not self.args.should_save:
            return
        if self._pending is not None:  # resumed, but no batch came: they are what they were
            for name in (LOWRANK_CONFIG, LOWRANK_WEIGHTS):
                with contextlib.suppress(shutil.SameFileError):
                    shutil.copyfile(Path(self._pending) / name, folder / name)
        elif self.lowrank is not None:
            write_branches(self.lowrank, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._misnamed = False
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._take_checkpoint(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._misnamed = False
        super()._load_best_model()
        self._take_checkpoint(self.state.best_model_checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """As of the Trainer; but weights that a checkpoint holds under older names are not missing.

        transformers saves some models, ViT among them, under the names of its earlier versions, and its Trainer then
        goes on with the weights that were there before, after a warning.
        """
        if isinstance(self.model, PreTrainedModel) and load_result.missing_keys and load_result.unexpected_keys:
            self._misnamed = True
        else:
            super()._issue_warnings_after_load(load_result)

    def _take_checkpoint(self, folder: str) -> None:
        if self._misnamed:  # from_pretrained knows the names of earlier versions
            with torch.random.fork_rng(devices=[]):
                saved = type(self.model).from_pretrained(folder, config=copy.deepcopy(self.model.config))
            self.model.load_state_dict(saved.state_dict())
        if not has_branches(folder):
            warnings.warn(f"{folder} holds no branches: they start anew", LowRankWarning, stacklevel=2)
        elif self.lowrank is not None:
            load_branches(self.lowrank, folder)
        else:
            self._pending = folder

    def export(
        self,
        folder: str | os.PathLike[str],
        *,
        label_names: list[str] | None = None,
        data_config: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write the timm network of a TimmWrapper as `timm_lowrank.save_pretrained` does, with the branches beside it.

        `timm.create_model("local-dir:FOLDER", pretrained=True)` loads it without this package. Only the process that
        saves checkpoints writes.

        Args:
            folder: is made if it does not exist.
            label_names: one per class; None takes those of the model's configuration.
            data_config: mean, std and so on of the images, over the network's `pretrained_cfg`. The input size is
                that of the images trained on unless it is given here.

        Returns:
            The folder.

        Raises:
            CheckpointError: the model holds no timm network, or nothing was trained yet.
        """
        lowrank = self.lowrank
        if lowrank is None:
            raise CheckpointError("there are no branches to export before the first training batch, or example_input")
        if not is_timm(lowrank.backbone):
            raise CheckpointError(
                f"{type(self.model).__name__} holds no timm network; save_model(folder) writes it for transformers' "
                "from_pretrained"
            )
        if label_names is None:
            by_class = getattr(self.model.config, "id2label", None) or {}
            names = [by_class[index] for index in sorted(by_class, key=int)]  # in whatever order they stand there
            label_names = None if names == [f"LABEL_{index}" for index in range(len(names))] else names
        size = {} if self._image_shape is None else {"input_size": self._image_shape}
        if self.args.should_save:
            save_pretrained(lowrank, folder, label_names=label_names, data_config={**size, **(data_config or {})})
        return Path(folder)


class LowRankTrainer(LowRankMixin, Trainer):  # type: ignore[misc]
    """transformers.Trainer with low-rank branches, see `LowRankMixin`."""


class _Means:
    """Means of the penalty and its parts over some batches, on this process. Nothing waits for the device to add."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, penalty: Tensor, lowrank: LowRankModel) -> None:
        """Counts the penalty of one batch, a scalar, and the losses of the branches."""
        values = {"penalty": penalty.detach()}
        for layer, parts in lowrank.losses().items():
            values.update({f"{layer}.{part}": value for part, value in parts.items()})
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += 1

    def take(self) -> dict[str, float]:
        """The means since the last call; empty if there was no batch."""
        means = {name: float(total) / self._count for name, total in self._sums.items()}
        self._sums, self._count = {}, 0
        return means
