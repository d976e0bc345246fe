"""Low-rank branches in transformers.Trainer.

    trainer = LowRankTrainer(model=model, args=args, lowrank=LowRankConfig(branches="2-LR"), train_dataset=data)
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model("model")  # the plain model, for from_pretrained, and the branches beside it
    trainer.export("network")    # of a TimmWrapper: the plain timm network, for timm.create_model("local-dir:network")

The model stays the Trainer's own, so that saving, publishing, DistributedDataParallel, torch.compile and gradient
checkpointing work as ever; `trainer.lowrank`, the `LowRankModel` on it, is held aside. For a Trainer of your own:
`class MyLowRankTrainer(LowRankMixin, MyTrainer)`, or `LowRankCallback` alone where the loss has the penalty already.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

try:
    import accelerate  # noqa: F401 - the Trainer asks for it only when it is built
    from transformers import Trainer
except ImportError as error:
    raise ImportError(
        "timm_lowrank.integrations.trainer needs transformers and accelerate: pip install transformers accelerate"
    ) from error

from ..core.config import LowRankConfig
from ..core.model import LowRankModel
from ..errors import LowRankError, LowRankWarning
from .trainer_callback import LowRankCallback
from .trainer_checkpoints import CheckpointMixin
from .trainer_files import read_branches
from .trainer_loss import Means, ignores_items
from .trainer_networks import Seam, as_transformers, is_timm, wrap_network

__all__ = ["LowRankCallback", "LowRankMixin", "LowRankTrainer"]


class LowRankMixin(CheckpointMixin):
    """Low-rank branches for any subclass of transformers.Trainer: `class Mine(LowRankMixin, MyTrainer)`.

    The branches are made at the first training batch, whose images say how wide the layers are; until then `lowrank`
    is None. Their penalty is added to what `compute_loss` of the next class gives, and scaled as that is, under
    gradient accumulation too. Logged beside the loss are "penalty" and, for each layer, "LAYER.reconstruction",
    "LAYER.norm" and "LAYER.activation_norm": means since the last log, on this process.

    Some models of transformers take `num_items_in_batch` and ignore it, so that their loss is too large under gradient
    accumulation and on several processes; this is noticed, warned of and put right.

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
        self.lowrank = None
        self._config = lowrank
        self._seam: Seam | None = None
        self._pending = self._image_shape = None
        self._loss_checked = False
        self._means = Means()
        self._updates = LowRankCallback(start_epoch=start_epoch, start_step=start_step, checkpoints=False)
        if model is not None:
            model = self._adopted(model)
        super().__init__(model, args, *others, **keywords)
        self._refuse()
        self.add_callback(self._updates)
        if example_input is not None:
            self._build(example_input.to(self.args.device))

    def _refuse(self) -> None:
        kinds = {"nn.DataParallel": self.args.n_gpu > 1, "DeepSpeed": self.is_deepspeed_enabled}
        kinds["FSDP"] = self.is_fsdp_enabled
        for name in [name for name, used in kinds.items() if used]:
            raise LowRankError(
                f"the low-rank branches do not work with {name} in the Trainer; use DistributedDataParallel: start the "
                "script with `torchrun --nproc_per_node N` or `accelerate launch`"
            )
        if any(isinstance(callback, LowRankCallback) for callback in self.callback_handler.callbacks):
            raise ValueError("LowRankMixin brings a LowRankCallback of its own; leave yours out of callbacks")

    # ----------------------------------------------------------------------------------------------- the branches

    def _adopted(self, model: nn.Module) -> Any:
        """The model of transformers that the Trainer gets; branches that are on it already are taken over."""
        self.lowrank = self._updates.lowrank = self._image_shape = None
        if isinstance(model, LowRankModel):
            if self._config is not None:
                raise ValueError("the model is wrapped already, so `lowrank` would have no effect; give one of the two")
            self.lowrank = self._updates.lowrank = model
            model = model.unwrap()
        return as_transformers(model) if is_timm(model) else model

    def call_model_init(self, trial: Any = None) -> Any:
        return self._adopted(super().call_model_init(trial))

    def _build(self, images: Tensor) -> LowRankModel:
        """Branches for images (batch, channels, height, width), from a waiting checkpoint if there is one."""
        self._image_shape = tuple(images.shape[1:])
        if self.lowrank is None:
            self.lowrank = wrap_network(self.model, self._config or LowRankConfig(), images[:2])
        self._updates.lowrank = lowrank = self.lowrank
        lowrank.branches.to(self.args.device)
        if self._pending is not None:
            read_branches(lowrank, self._pending)
            self._pending = None
        self._updates.switch(self.state)
        return lowrank

    def _ready(self, inputs: Mapping[str, Any]) -> LowRankModel:
        """The branches, recording what the model's next forward does."""
        lowrank = self.lowrank
        if lowrank is None or self._image_shape is None:
            name = getattr(self.model, "main_input_name", "pixel_values")
            lowrank = self._build(inputs[name] if name in inputs else next(_tensors(inputs)))
        if self._seam is None or self._seam.model is not self.model:
            self._remove_seam()
            self._seam = Seam(self.model, lowrank)
        lowrank.training = True  # not lowrank.train(): the network's mode is the Trainer's business
        lowrank.branches.train()
        return lowrank

    def _remove_seam(self) -> None:
        if self._seam is not None:
            self._seam.remove()
            self._seam = None

    # --------------------------------------------------------------------------------------------------- training

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As of the Trainer. The model is left without a trace of the branches."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self._remove_seam()

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of the next class; in training with the penalty added."""
        if not (self.model.training and torch.is_grad_enabled()):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        lowrank = self._ready(inputs)
        self._check_loss(inputs, num_items_in_batch)
        share = self._share(inputs, num_items_in_batch)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch=num_items_in_batch)
        if lowrank.enabled:
            penalty = lowrank.penalty()
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
        """Finds out, once, whether the model's loss heeds the number of items that it is given."""
        own_loss = self.compute_loss_func is None and self.label_smoother is None and "labels" in inputs
        if self._loss_checked or num_items_in_batch is None or not (self.model_accepts_loss_kwargs and own_loss):
            return
        self._loss_checked = True
        if ignores_items(self.model, inputs):
            self.model_accepts_loss_kwargs = False
            if self.args.gradient_accumulation_steps > 1 or self.accelerator.num_processes > 1:
                warnings.warn(
                    f"the loss of {type(self.model).__name__} takes num_items_in_batch and ignores it: under gradient "
                    "accumulation and on several processes it would be too large. It is averaged instead",
                    LowRankWarning,
                    stacklevel=2,
                )

    # ---------------------------------------------------------------------------------------------------- logging

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """As of the Trainer; logs of the training loss get the losses of the branches, too."""
        if "loss" in logs:
            logs.update(self._means.take())
        super().log(logs, *args, **kwargs)


def _tensors(inputs: Mapping[str, Any]) -> Iterator[Tensor]:
    return (value for value in inputs.values() if isinstance(value, Tensor))


class LowRankTrainer(LowRankMixin, Trainer):  # type: ignore[misc]
    """transformers.Trainer with low-rank branches, see `LowRankMixin`.

    trainer = LowRankTrainer(model=model, args=args, lowrank=LowRankConfig(branches={"layer3": 20}), train_dataset=data)
    """
