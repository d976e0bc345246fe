"""`LowRankTask`: timm's classification task with low-rank branches on its network.

    task = LowRankTask(network, lowrank=LowRankConfig(branches="2-LR"), criterion_kwargs={"smoothing": 0.1})
    optimizer = create_optimizer_v2(task.get_trainable_module(), "sgd", lr=0.1)
    ...
    task(images, labels)["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()
    task.update_ema(step=step)  # as timm's train script does: the Update Step, and the EMA if there is one

What timm saves, validates, averages and exports is the plain network; W and b travel in the checkpoint's "task_state".
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from timm.task import ClassificationTask, MultiLabelClassificationTask
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ..checkpoint.branches import FORMAT, BranchDescription
from ..core.config import LowRankConfig
from ..core.loop import after_steps, labels_among
from ..core.model import STEPS_BEFORE_WARNING, LowRankModel
from ..wrapping import wrap

_logger = logging.getLogger(__name__)


class LowRankTask(ClassificationTask):  # type: ignore[misc]  # timm is not typed
    """Classification with low-rank branches: the loss is the criterion's plus the penalty.

    The Update Step is made once per optimizer step. By default `update_ema` makes it, which timm's loop calls after
    each update whether it keeps an EMA or not. That hook does not know whether a gradient scaler skipped the step:
    `attach(optimizer)` ties the Update Step to the optimizer's real steps instead, and is what a loop needs that never
    calls `update_ema`.

    Args:
        model: the network, or a `LowRankModel` around it. It is wrapped, not copied.
        args, kwargs: further arguments of timm's task: criterion, criterion_kwargs, device, dtype, verbose.
        lowrank: the branches; None is `LowRankConfig()`. Must be None for a `LowRankModel`, which has its own.
        example_input: see `timm_lowrank.wrap`; needed where the images have another size than the network's
            `pretrained_cfg` says.
        start_epoch: epochs of plain training before the branches are switched on (paper: 50). The loop must then
            call `set_epoch`.
        start_update: updates of plain training before the branches are switched on.

    Raises:
        ValueError: unknown layer, a rank larger than its layer, a scripted network, a negative start.
        TypeError: `lowrank` or `example_input` for a network that is wrapped already.
        CaptureError: a layer without usable activations.
    """

    def __init__(
        self,
        model: nn.Module,
        *args: Any,
        lowrank: LowRankConfig | None = None,
        example_input: Tensor | None = None,
        start_epoch: int = 0,
        start_update: int = 0,
        **kwargs: Any,
    ):
        if start_epoch < 0 or start_update < 0:
            raise ValueError(f"start_epoch={start_epoch} and start_update={start_update} must not be negative")
        if isinstance(model, torch.jit.ScriptModule):
            raise ValueError("the layers of a scripted network cannot be read: train without torchscript")
        if not isinstance(model, LowRankModel):
            wrapped = wrap(model, lowrank, example_input=example_input)
        elif lowrank is None and example_input is None:
            wrapped = model
        else:
            raise TypeError(
                "the network is wrapped already: leave out lowrank and example_input, or pass model.unwrap()"
            )
        super().__init__(wrapped, *args, **kwargs)
        # In a tuple: compiled and DDP wrappers come to stand around it, and it must not be a second submodule.
        self._lowrank = (wrapped,)
        self.start_epoch, self.start_update = start_epoch, start_update
        self.updates = 0  # optimizer steps so far
        self._epoch: int | None = None
        self._forwards, self._penalized = 0, False  # in training, since the last optimizer step
        self._attached = False
        self._due = True
        if self.verbose:
            _logger.info(f"{type(self).__name__}: branches {BranchDescription.of(wrapped)}")
        self._switch()

    @property
    def lowrank(self) -> LowRankModel:
        """The wrapped model, whatever stands around it by now."""
        return self._lowrank[0]

    @property
    def backbone(self) -> nn.Module:
        """The plain network."""
        return self.lowrank.backbone

    def forward(
        self,
        input: Tensor,  # (batch, channels, height, width), as the network takes it
        target: Tensor,  # labels (batch,) int64, or whatever the criterion takes
    ) -> dict[str, Tensor]:
        """The losses of one batch.

        Returns:
            "loss", a scalar with a graph; "output", the logits (batch, classes). In train mode with the branches on,
            also "task_loss" and "penalty", the detached parts of the loss.

        Raises:
            RuntimeError: `start_epoch` is set and `set_epoch` was never called.
        """
        # timm's loop switches the mode of what get_trainable_module() and get_eval_model() give: of the backbone.
        self.lowrank.training = self.backbone.training
        self.lowrank.branches.train(self.backbone.training)
        trains = self.lowrank.training and torch.is_grad_enabled()
        if trains and self.start_epoch and self._epoch is None:
            raise RuntimeError(
                f"start_epoch={self.start_epoch}, but the task was never told the epoch: call task.set_epoch(epoch) "
                "before each epoch, or use start_update"
            )
        result: dict[str, Tensor] = super().forward(input, target)
        if trains:
            self._count_forward()
        if self.lowrank.training and self.lowrank.enabled:
            penalty = self.lowrank.penalty(labels_among(self.lowrank, (input, target), {}))
            self._penalized |= trains
            parts = {"task_loss": result["loss"].detach(), "penalty": penalty.detach()}
            result = {**result, **parts, "loss": result["loss"] + penalty}
        return result

    # ------------------------------------------------------------------------------------------- the Update Step

    def update_ema(self, step: int | None = None) -> None:
        """After each optimizer step: the Update Step, unless an optimizer is attached, and the EMA if there is one.

        Args:
            step: number of the update, for the EMA's warm-up.
        """
        if not self._attached:
            self._after_step()
        if self.has_ema():
            ema: Any = self.get_trainable_module(ema=True)
            ema.update(self.backbone, step=step)

    def attach(self, optimizer: Any) -> LowRankTask:
        """Make the Update Step whenever `optimizer` really steps, and no longer in `update_ema`. Returns the task.

        A step that a gradient scaler skips does not count. A fused optimizer skips inside its own kernel: there it
        does count.

        Args:
            optimizer: a torch optimizer, or a wrapper around one (accelerate's, timm's Lookahead).

        Raises:
            TypeError: `optimizer` is no torch optimizer and does not hold exactly one.
            LowRankError: it belongs to DeepSpeed.
        """
        after_steps(optimizer, self._after_step, waiting=lambda: self._forwards > 0)
        self._attached = True
        return self

    def _after_step(self) -> None:
        # Once for all the forwards since the last step. A second call for the same step (a second optimizer, say)
        # finds nothing to do.
        if not self._forwards:
            return
        if self._penalized:
            self.lowrank.update()
        self._forwards, self._penalized = 0, False
        self.updates += 1
        self._switch()

    def _count_forward(self) -> None:
        self._forwards += 1
        if self._forwards == STEPS_BEFORE_WARNING:
            reason = "the attached optimizer never stepped" if self._attached else "update_ema() was never called"
            self.lowrank.warn_of_no_effect(
                f"{self._forwards} batches were trained on, but {reason}",
                "call task.update_ema() after each optimizer step, or task.attach(optimizer) once",
            )

    def set_epoch(self, epoch: int) -> None:
        """Tell the task that `epoch` (from 0) begins, for `start_epoch`."""
        self._epoch = epoch
        self._switch()

    def _switch(self) -> None:
        """The branches on or off, at the moment when that changes only: `task.lowrank.enable` stays the user's."""
        due = self.updates >= self.start_update and (self._epoch or 0) >= self.start_epoch
        if due == self._due:
            return
        self._due = due
        self._penalized = False
        self.lowrank.enable(due)
        if self.verbose:
            _logger.info(f"{type(self).__name__}: branches {'on' if due else 'off'} after {self.updates} updates")

    # --------------------------------------------------------------------------------- what timm sees of the model

    def get_trainable_module(self, ema: bool = False) -> nn.Module | None:
        """The plain network until it is compiled or wrapped in DDP: an optimizer's groups, made from the names of
        its parameters (no weight decay, layer decay), are those of plain training."""
        module: nn.Module | None = super().get_trainable_module(ema)
        return self.backbone if module is self.lowrank else module

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """The plain network, compiled if the task is: for validation, checkpoints and export."""
        if module is None and not ema and not hasattr(self, "eval_model"):
            return self.backbone
        evaluated: nn.Module | None = super().get_eval_model(module, ema)
        return evaluated

    def setup_ema(
        self, decay: float = 0.9999, use_warmup: bool = False, device: torch.device | None = None, **kwargs: Any
    ) -> nn.Module:
        """An EMA of the plain network: an average of matrices of rank r has not rank r."""
        ema: nn.Module = ModelEmaV3(self.backbone, decay=decay, use_warmup=use_warmup, device=device, **kwargs)
        self.trainable_module_ema = ema
        return ema

    def compile(self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any) -> nn.Module:
        """Compile the network with the recording of its layers, and for evaluation the plain network."""
        compiled: nn.Module = super().compile(backend, mode, **compile_kwargs)
        self.eval_model = torch.compile(self.backbone, backend=backend, mode=mode, **compile_kwargs)
        return compiled

    def prepare_distributed(self, device_ids: list[Any] | None = None, **ddp_kwargs: Any) -> LowRankTask:
        """Wrap the model in DistributedDataParallel; on the CPU, where DDP takes no `device_ids`, without them."""
        on_cpu = all(parameter.device.type == "cpu" for parameter in self.backbone.parameters())
        super().prepare_distributed(None if on_cpu else device_ids, **ddp_kwargs)
        return self

    # ------------------------------------------------------------------------------------------------ checkpoints

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """W, b and the counters, as plain values and tensors; nothing for the EMA, which has no branches."""
        if ema:
            return {}
        self.lowrank.follow_classifier()
        description = BranchDescription.of(self.lowrank).to_dict()
        return {**description, "branches": dict(self.lowrank.branches.state_dict()), "updates": self.updates}

    def load_task_state(
        self,
        state: Mapping[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """The inverse of `get_task_state`. A checkpoint of plain training has none: the branches begin anew.

        Whether they are on is the task's own business where it has a `start_epoch` or `start_update`, else the state's.

        Raises:
            CheckpointError: the checkpoint's branches sit on other layers, or have other widths, ranks or views.
        """
        if ema:
            return
        if not state:
            _logger.warning("The checkpoint holds no low-rank branches: W and b begin at zero.")
            return
        described(state, "the checkpoint").require_fit(self.lowrank, "the checkpoint")
        self.lowrank.follow_classifier()
        self.lowrank.branches.load_state_dict(state["branches"], strict=strict)
        self.updates = int(state["updates"])
        self._forwards, self._penalized = 0, False
        if not (self.start_epoch or self.start_update):
            self.lowrank.enable(bool(state.get("enabled", True)))
        self._switch()


def described(state: Mapping[str, Any], where: str) -> BranchDescription:
    """The branches that a task's state is of.

    Args:
        state: as `LowRankTask.get_task_state` gives it, which is the "task_state" of timm's checkpoints.
        where: the file, for errors.

    Raises:
        CheckpointError: it makes no sense, or is of a newer version.
    """
    saved = {key: value for key, value in state.items() if key not in ("branches", "sizes", "updates")}
    if "sizes" in state:  # earlier versions wrote features and rank of each layer, and no view
        sizes = state["sizes"].items()
        saved["layers"] = {layer: {"num_features": width, "rank": rank} for layer, (width, rank) in sizes}
        saved["format"] = FORMAT
    return BranchDescription.from_dict(saved, where)


class LowRankMultiLabelTask(LowRankTask, MultiLabelClassificationTask):  # type: ignore[misc]
    """timm's `MultiLabelClassificationTask` with low-rank branches: targets (batch, classes) float.

    Takes the arguments of `LowRankTask`, and `threshold`.
    """
