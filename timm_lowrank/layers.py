"""Layers by name: what a branch can sit on, and what "pre_logits" means for a network."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from .core.capture import Recording, Tap, evaluating, recording
from .core.config import PRE_LOGITS
from .core.errors import CaptureError, nearest


@dataclasses.dataclass(frozen=True)
class LayerInfo:
    """One layer that a branch can sit on."""

    name: str  # as `LowRankConfig.branches` takes it
    kind: str  # class of the module
    shape: tuple[int, ...]  # of its output for one image, without the batch dimension
    width: int  # m, the number of features of the flattened output


def create_backbone(name: str, **kwargs: Any) -> nn.Module:
    """`timm.create_model`, with an error that names the nearest architectures.

    Raises:
        ValueError: timm has no architecture of that name.
    """
    architecture = name.split(":")[-1] if name.startswith("timm:") else name
    if ":" not in name and "/" not in name and not timm.is_model(architecture):
        raise ValueError(
            f"timm {timm.__version__} has no model {name!r}. "
            + nearest(architecture.split(".")[0], timm.list_models(), count=5)
        )
    return timm.create_model(name, **kwargs)


def example_input(backbone: nn.Module, **create_kwargs: Any) -> Tensor:
    """One image of zeros, (1, channels, height, width) float32, of the size that a timm network was configured for.

    Args:
        create_kwargs: what `timm.create_model` was given: `in_chans` and `img_size` change the size.

    Raises:
        ValueError: the network has no `pretrained_cfg`, so its input size is not known.
    """
    size = dict(getattr(backbone, "pretrained_cfg", None) or {}).get("input_size")
    if size is None:
        raise ValueError(
            f"the input size of a {type(backbone).__name__} is not known; pass example_input=images, "
            "one batch as the network takes it"
        )
    channels, height, width = size
    if image_size := create_kwargs.get("img_size"):
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    place = next(backbone.parameters(), torch.empty(0))
    return torch.zeros(
        1, create_kwargs.get("in_chans", channels), height, width, device=place.device, dtype=place.dtype
    )


def list_layers(model: str | nn.Module, *, images: Tensor | None = None, **create_kwargs: Any) -> list[LayerInfo]:
    """Every layer that a branch can sit on, in the order in which a forward pass meets them.

    Args:
        model: a timm name, or any module.
        images: an example batch (batch, ...); needed for a module without timm's `pretrained_cfg`.
        create_kwargs: for `timm.create_model`.
    """
    backbone = create_backbone(model, **create_kwargs) if isinstance(model, str) else model
    images = example_input(backbone, **create_kwargs) if images is None else images
    names = [name for name, _ in backbone.named_modules() if name]
    # On the modules themselves, not inside Sequentials: every name gets a row of its own.
    record = example_forward(backbone, [Tap(name, name) for name in names], images)
    found = []
    for name in record.values:
        with contextlib.suppress(CaptureError):  # then no branch can sit there
            value = record.activation(Tap(name, name))
            if value.shape[0] == images.shape[0]:
                kind = type(backbone.get_submodule(name)).__name__
                found.append(LayerInfo(name, kind, tuple(value.shape[1:]), value[0].numel()))
    with_logits = _pre_logits_tap(backbone, images)
    value = example_forward(backbone, [with_logits], images).activation(with_logits)
    return [*found, LayerInfo(PRE_LOGITS, f"input of {with_logits.path}", tuple(value.shape[1:]), value[0].numel())]


def tap_on(backbone: nn.Module, layer: str, images: Tensor | None = None) -> Tap:
    """The tap of a branch on one layer. `images` are needed for "pre_logits" of a network that is not timm's.

    Raises:
        AttributeError: the network has no such layer.
        ValueError: "pre_logits" of a network without a classifier, or of one that is not timm's without images.
    """
    return _pre_logits_tap(backbone, images) if layer == PRE_LOGITS else Tap.at(layer, layer, backbone)


def _pre_logits_tap(backbone: nn.Module, images: Tensor | None) -> Tap:
    """The tap on the input of the classifier: timm's `get_classifier()`, else the last linear layer that runs."""
    if hasattr(backbone, "get_classifier"):
        classifier: Any = backbone.get_classifier()  # type: ignore[operator]
        classifier = classifier[0] if isinstance(classifier, tuple | list) else classifier
        for name, module in backbone.named_modules():
            if module is classifier and not isinstance(module, nn.Identity):
                return Tap.at(PRE_LOGITS, name, backbone, takes_input=True)
        raise ValueError(
            f"{type(backbone).__name__} has no classifier (num_classes=0?), so there is no {PRE_LOGITS!r}; "
            "name a layer instead"
        )
    if images is None:
        raise ValueError(f"{type(backbone).__name__} is no timm network: finding {PRE_LOGITS!r} takes example images")
    linear = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    ran = example_forward(backbone, [Tap(name, name) for name in linear], images).values
    if not ran:
        raise ValueError(
            f"{type(backbone).__name__} runs no nn.Linear, so there is no {PRE_LOGITS!r}; name a layer instead"
        )
    return Tap(PRE_LOGITS, list(ran)[-1], takes_input=True)


def example_forward(backbone: nn.Module, taps: Sequence[Tap], images: Tensor) -> Recording:
    """What `taps` see in one forward in eval mode, without gradients."""
    with evaluating(backbone), recording(backbone, taps) as record:
        backbone(images)
    return record
