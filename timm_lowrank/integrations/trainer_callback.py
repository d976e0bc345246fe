"""`LowRankCallback`: switch, Update Step and checkpoints of the branches, at the Trainer's own events."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..core.model import LowRankModel
from .trainer_files import read_branches, write_branches


class LowRankCallback(TrainerCallback):  # type: ignore[misc]
    """Switches the branches on, makes the Update Step after each real optimizer step, keeps W and b in checkpoints.

    Alone it is for a Trainer whose loss includes `lowrank.penalty()` already; `LowRankMixin` brings its own.

    Args:
        lowrank: the wrapped model. None does nothing until it is set.
        start_epoch, start_step: train plainly until so many epochs (a fraction is possible) and optimizer steps are
            over. With both 0 the callback leaves the switch alone.
        checkpoints: whether to write the branches into checkpoint-N and to read them on resuming and at
            `load_best_model_at_end`. Not done where the Trainer's model is `lowrank` itself, whose state holds them.
    """

    def __init__(
        self,
        lowrank: LowRankModel | None = None,
        *,
        start_epoch: float = 0.0,
        start_step: int = 0,
        checkpoints: bool = True,
    ) -> None:
        if start_epoch < 0 or start_step < 0:
            raise ValueError(f"start_epoch={start_epoch} and start_step={start_step} must not be negative")
        self.lowrank = lowrank
        self.start_epoch, self.start_step, self.checkpoints = start_epoch, start_step, checkpoints

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
            read_branches(lowrank, self._folder(args, state))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.should_save and (lowrank := self._aside(kwargs)) is not None:
            write_branches(lowrank, self._folder(args, state))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        if best is not None and (lowrank := self._aside(kwargs)) is not None:
            read_branches(lowrank, best)

    def _aside(self, kwargs: Mapping[str, Any]) -> LowRankModel | None:
        """The branches, if the Trainer does not keep them."""
        return self.lowrank if self.checkpoints and kwargs.get("model") is not self.lowrank else None

    @staticmethod
    def _folder(args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}"
