"""`LossHook` and `attach`: the branches in a training loop that cannot be changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .distributed import refuse_deepspeed_optimizer
from .head import fits_labels
from .model import LowRankModel


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
    """What a criterion or a network is given beside its input that can be the labels, for `LowRankModel.penalty`.

    By name, else the first class numbers, else the first floats (batch, classes), which may be a teacher's logits.
    """
    named = [kwargs[name] for name in ("target", "targets", "labels") if name in kwargs]
    fitting = [value for value in (*named, *args[1:]) if fits_labels(value, model.classes)]
    numbers = [value for value in fitting if value.dim() == 1]
    return next(iter(numbers or fitting), None)


def attach(optimizer: Any, model: LowRankModel) -> torch.utils.hooks.RemovableHandle:
    """Call `model.update()` after each step of `optimizer`: instead of calling it in the loop.

    Args:
        optimizer: a torch optimizer, or a wrapper around one, see `hooked_optimizer`. The hook sits on the torch
            optimizer, so it does not fire where accumulation or an overflow skips the step; a fused optimizer skips
            inside its own kernel, and there it does.
        model: the `LowRankModel` itself, not a DDP or compiled wrapper around it.

    Returns:
        A handle; `handle.remove()` detaches.

    Raises:
        TypeError: `optimizer` is no torch optimizer and does not hold exactly one, or `model` is no `LowRankModel`.
        ValueError: the model is attached to an optimizer already.
    """
    if not isinstance(model, LowRankModel):
        raise TypeError(
            f"attach() needs the LowRankModel itself, as wrap() gave it, not a {type(model).__name__}: "
            "attach(optimizer, model)"
        )
    if model.attached:
        raise ValueError(
            "the model is attached to an optimizer already, and one step must not make two updates: call remove() on "
            "the handle that attach() gave first. Of several optimizers, attach the one that steps last"
        )

    model.attachment = after_steps(optimizer, model.update, lambda: any(b.waiting for b in model.branches.values()))
    return model.attachment


def after_steps(
    optimizer: Any, call: Callable[[], object], waiting: Callable[[], bool] = lambda: False
) -> torch.utils.hooks.RemovableHandle:
    """`call()` after each real step of `optimizer`; see `attach`.

    torch.distributed.checkpoint lets an optimizer that is to be loaded step once, at learning rate 0: then only where
    something is `waiting` for the step.
    """
    refuse_deepspeed_optimizer(optimizer)

    def after_step(stepped: torch.optim.Optimizer, *_: Any) -> None:
        if waiting() or any(group.get("lr") != 0 for group in stepped.param_groups):
            call()

    return hooked_optimizer(optimizer).register_step_post_hook(after_step)


def hooked_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer whose `step` calls hooks: `optimizer` itself, or the one that it keeps in an attribute.

    Wrappers keep it under many names: `optimizer` (accelerate), `_base_optimizer` (timm's Lookahead), `base_optimizer`
    (SAM), `base` (schedule-free). Even one that is a torch optimizer itself may take hooks and never call them, as
    Lookahead, or have no `step` that is used, as SAM: the inner one is what really steps.

    Raises:
        TypeError: `optimizer` is no torch optimizer and holds none, or holds several.
    """
    found = {id(inner): inner for inner in _innermost(optimizer, ())}
    if len(found) > 1:
        names = ", ".join(type(inner).__name__ for inner in found.values())
        raise TypeError(
            f"the {type(optimizer).__name__} holds several optimizers ({names}): attach the one that steps last, or "
            "call model.update() after their step"
        )
    if not found:
        raise TypeError(
            f"attach() needs a torch optimizer, not a {type(optimizer).__name__}, which holds none either: "
            "call model.update() after its step instead"
        )
    return next(iter(found.values()))


def _innermost(holder: Any, outside: tuple[int, ...]) -> Iterator[torch.optim.Optimizer]:
    """The torch optimizers that hold no further one, in `holder` and the optimizers in its attributes."""
    held: list[Any] = []
    for value in vars(holder).values() if hasattr(holder, "__dict__") else ():
        parts = value if isinstance(value, list | tuple) else value.values() if type(value) is dict else (value,)
        held += [part for part in parts if _steps(part) and id(part) not in outside]
    inner = [one for part in held for one in _innermost(part, (*outside, id(holder)))]
    if inner:
        yield from inner
    elif isinstance(holder, torch.optim.Optimizer):
        yield holder


def _steps(value: Any) -> bool:
    """Whether `value` is an optimizer or looks like one."""
    return isinstance(value, torch.optim.Optimizer) or (
        callable(getattr(type(value), "step", None))
        and (hasattr(type(value), "param_groups") or "param_groups" in getattr(value, "__dict__", ()))
    )
