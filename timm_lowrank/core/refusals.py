"""What the branches do not work under, said at once: DeepSpeed."""

from __future__ import annotations

import sys
from types import FrameType

import torch
from torch import nn

from ..errors import LowRankError

_ADVICE = (
    "it steps and shards in an order of its own, which the branches are not made for; use DistributedDataParallel or "
    "FSDP2, for example `accelerate launch --multi_gpu` or `accelerate launch --use_fsdp --fsdp_version 2`"
)
_ENGINE = "deepspeed.runtime"  # not deepspeed.ops: its optimizers are torch's own kind and need no engine
_WRAPPERS = "accelerate.utils.deepspeed"


def refuse_deepspeed(model: nn.Module) -> None:
    """Raise if a DeepSpeed engine calls the forward of `model` in which this is called.

    Costs nothing where DeepSpeed was never imported, nor in a graph of torch.compile, where it does not look.

    Raises:
        LowRankError: with what to use instead.
    """
    if torch.compiler.is_compiling() or "deepspeed" not in sys.modules:
        return
    hooks = [*model._forward_pre_hooks.values(), *model._forward_hooks.values()]  # the engine leaves some on its module
    if any(_is_within(getattr(hook, "__module__", None), _ENGINE) for hook in hooks) or _called_by_engine():
        raise LowRankError(f"the model runs in a DeepSpeed engine: {_ADVICE}")


def refuse_deepspeed_optimizer(optimizer: object) -> None:
    """Raise if `optimizer`, or one that it keeps as `.optimizer`, belongs to a DeepSpeed engine.

    Raises:
        LowRankError: with what to use instead.
    """
    inner: object | None = optimizer
    while inner is not None:
        classes = [] if type(inner).__mro__.count(torch.optim.Optimizer) else type(inner).__mro__
        wraps = _is_within(type(inner).__module__, _WRAPPERS)
        if wraps or any(_is_within(kind.__module__, _ENGINE) for kind in classes):
            raise LowRankError(f"{type(inner).__name__} belongs to DeepSpeed: {_ADVICE}")
        inner = getattr(inner, "optimizer", None)


def _called_by_engine() -> bool:
    """Also where the model is a part of the engine's module, on which the engine leaves nothing."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if _is_within(frame.f_globals.get("__name__"), _ENGINE):
            return True
        frame = frame.f_back
    return False


def _is_within(module: object, package: str) -> bool:
    return isinstance(module, str) and (module == package or module.startswith(package + "."))
