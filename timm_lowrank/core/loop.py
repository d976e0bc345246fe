"""`LossHook` and `attach`: the branches in a training loop that cannot be changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .distributed import refuse_deepspeed_optimizer
from .head import fits_labels
from .model import LowRankModel

_WRAPPED = ("optimizer", "_base_optimizer")  # where wrappers keep the optimizer that they are around


class LossHook(nn.Module):
    """A criterion that includes the penalty: `criterion = LossHook(criterion, model)`, then use it as before.

    In eval mode, and while the branches are off, it is the criterion alone.

    Args:
        criterion: any callable that gives a scalar loss.
        model: the `LowRankModel` itself, not a DDP or compiled wrapper around it.
    """

    def __init__(self, criterion: Callable[..., Tensor], model: LowRankModel):
        super().__init__()
        self.criterion = criterion
        # In a tuple, so that the criterion's parameters and state dict do not come to include the model's.
        self._model = (model,)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = self.criterion(*args, **kwargs)
        model = self._model[0]
        return loss + model.penalty(labels_among(model, args, kwargs)) if model.training and model.enabled else loss


def labels_among(model: LowRankModel, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """What a criterion or a network is given beside its input that can be the labels, for `LowRankModel.penalty`."""
    named = [kwargs[name] for name in ("target", "targets", "labels") if name in kwargs]
    return next((value for value in (*named, *args[1:]) if fits_labels(value, model.classes)), None)


def attach(optimizer: Any, model: LowRankModel) -> torch.utils.hooks.RemovableHandle:
    """Call `model.update()` after each step of `optimizer`: instead of calling it in the loop.

    Args:
        optimizer: a torch optimizer, or a wrapper around one, see `hooked_optimizer`. The hook sits on the torch
            optimizer, so it does not fire where accumulation or an overflow skips the step.
        model: the `LowRankModel` itself.

    Returns:
        A handle; `handle.remove()` detaches.

    Raises:
        TypeError: `optimizer` is no torch optimizer and holds none.
    """
    refuse_deepspeed_optimizer(optimizer)

    def after_step(stepped: torch.optim.Optimizer, *_: Any) -> None:
        waiting = any(branch.waiting for branch in model.branches.values())
        # torch.distributed.checkpoint lets an optimizer that is to be loaded step once, at learning rate 0.
        if waiting or any(group.get("lr") != 0 for group in stepped.param_groups):
            model.update()

    return hooked_optimizer(optimizer).register_step_post_hook(after_step)


def hooked_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside `optimizer` whose `step` calls hooks.

    accelerate keeps it as `.optimizer`. timm's Lookahead is an optimizer itself, but takes hooks and never calls them:
    its inner one does.

    Raises:
        TypeError: `optimizer` is no torch optimizer and holds none.
    """
    raw = optimizer
    while inner := next((held for name in _WRAPPED if (held := getattr(raw, name, None)) is not None), None):
        raw = inner
    if not isinstance(raw, torch.optim.Optimizer):
        raise TypeError(f"attach() needs a torch optimizer, not a {type(optimizer).__name__}")
    return raw
