"""Image models of transformers as the branches see them: which network is inside, where its stages are, its forward."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TimmWrapperConfig, TimmWrapperForImageClassification

from ..checkpoint.saving import made_with
from ..core.capture import recording
from ..core.config import LowRankConfig
from ..core.model import LowRankModel
from ..wrapping import wrap

TIMM = "timm_model"  # the attribute that holds the timm network of a TimmWrapper


def is_timm(network: nn.Module) -> bool:
    """Whether a network was made by timm."""
    return bool(getattr(network, "pretrained_cfg", None)) and not isinstance(network, PreTrainedModel)


def as_transformers(network: nn.Module) -> Any:
    """A `TimmWrapperForImageClassification` around a timm network: the same module, neither copied nor changed.

    It takes pixel_values and labels and gives a loss, as the Trainer wants it.

    Raises:
        CheckpointError: the network was made with classes or functions as arguments: what the Trainer saves would be
            loaded as another network.
    """
    arguments = made_with(network)
    arguments.pop("num_classes", None)
    source: Any = network.pretrained_cfg
    config = TimmWrapperConfig(
        architecture=source["architecture"],
        num_labels=network.num_classes,
        model_args=arguments or None,
        pretrained_cfg={key: value for key, value in source.items() if key != "num_classes"},
    )
    with torch.device("meta"), torch.random.fork_rng(devices=[]):  # a shell without weights
        shell = TimmWrapperForImageClassification(config)
    setattr(shell, TIMM, network)
    shell.training = network.training
    return shell


def wrap_network(model: nn.Module, config: LowRankConfig, images: Tensor) -> LowRankModel:
    """The branches of `config` on the network inside `model`; `model` itself stays as it is.

    Layers of a TimmWrapper may be named as in timm ("layer3") or with the prefix "timm_model.".

    Args:
        images: a batch (batch, channels, height, width) of the size that the model is trained on.

    Raises:
        ValueError, CaptureError: as `timm_lowrank.wrap`.
    """
    inner = getattr(model, TIMM, None)
    network = inner if isinstance(inner, nn.Module) and isinstance(model, PreTrainedModel) else model
    if network is inner and isinstance(config.branches, Mapping):
        branches = {name.removeprefix(f"{TIMM}."): options for name, options in config.branches.items()}
        config = dataclasses.replace(config, branches=branches)
    dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), images.dtype)
    return wrap(network, config, example_input=images.to(dtype))


class RecordingForward:
    """A forward that records, instead of a model's own, until `remove`.

    It sits inside DistributedDataParallel, autocast and torch.compile, all of which call the model itself, and hooks
    on layers exist only while it runs. A copy of the model does not record.

    Args:
        model: whose forward is replaced.
        lowrank: branches on `model` or on a network inside it.
    """

    def __init__(self, model: nn.Module, lowrank: LowRankModel) -> None:
        self.model = model
        self._active = True
        self._before = model.__dict__.get("forward")  # accelerate's autocast, for example
        own = type(model).forward
        below = model.forward

        @functools.wraps(own)
        def forward(this: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if this is not model:
                return own(this, *args, **kwargs)
            if not (self._active and model.training and lowrank.enabled and torch.is_grad_enabled()):
                return below(*args, **kwargs)
            with recording(lowrank.backbone, lowrank.taps) as record:
                output = below(*args, **kwargs)
            lowrank.take(record)
            return output

        self._forward = MethodType(forward, model)
        model.forward = self._forward

    def remove(self) -> None:
        """Give the model its own forward back."""
        self._active = False
        if self.model.__dict__.get("forward") is not self._forward:
            return  # something was put on top since; what is below it only passes on
        if self._before is None:
            del self.model.forward
        else:
            self.model.forward = self._before  # type: ignore[method-assign]
