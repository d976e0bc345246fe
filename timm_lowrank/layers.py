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
from .errors import CaptureError, nearest
from .views import view_of


@dataclasses.dataclass(frozen=True)
class LayerInfo:
    """One layer that a branch can sit on."""

    name: str  # as `LowRankConfig.branches` takes it
    kind: str  # class of the module
    shape: tuple[int, ...]  # of its output for one image, without the batch dimension
    width: int  # m, the number of features of one sample
    view: str = "flatten"  # what counts as one sample by default, see `timm_lowrank.views.view_of`


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
    for name, value in list(record.values.items()):
        item = settled(backbone, Tap(name, name), value, len(images)).item
        record.values[name] = value if item is None else value[item]  # type: ignore[index]
        with contextlib.suppress(CaptureError):  # then no branch can sit there
            activations = record.activation(Tap(name, name))
            if activations.shape[0] == images.shape[0]:
                found.append(_info(backbone, name, type(backbone.get_submodule(name)).__name__, activations))
    with contextlib.suppress(ValueError):  # no classifier
        tap = _pre_logits_tap(backbone, images)
        activations = example_forward(backbone, [tap], images).activation(tap)
        found.append(_info(backbone, PRE_LOGITS, f"input of {tap.path}", activations))
    return found


def _info(backbone: nn.Module, name: str, kind: str, value: Tensor) -> LayerInfo:
    view = view_of(backbone, value, {})
    return LayerInfo(name, kind, tuple(value.shape[1:]), view.width(value), view.kind)


def tap_on(backbone: nn.Module, layer: str, images: Tensor | None = None) -> Tap:
    """The tap of a branch on one layer. `images` are needed for "pre_logits" of a network that is not timm's.

    Raises:
        AttributeError: the network has no such layer.
        ValueError: "pre_logits" of a network without a classifier, or of one that is not timm's without images.
    """
    return _pre_logits_tap(backbone, images) if layer == PRE_LOGITS else Tap.at(layer, layer, backbone)


def _pre_logits_tap(backbone: nn.Module, images: Tensor | None) -> Tap:
    """The tap on the input of the classifier: timm's `get_classifier()`, else the last linear layer that runs."""
    if hasattr(backbone, "get_classifier") or hasattr(backbone, "pretrained_cfg"):
        classifier = _classifier(backbone)
        for name, module in backbone.named_modules():
            if module is classifier and not isinstance(module, nn.Identity):
                return Tap.at(PRE_LOGITS, name, backbone, takes_input=True)
        raise ValueError(
            f"{type(backbone).__name__} has no classifier (an encoder, or num_classes=0?), so there is no "
            f"{PRE_LOGITS!r}; name a layer instead, for example branches={{{_example(backbone)!r}: 50}}"
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


def _classifier(backbone: nn.Module) -> Any:
    """timm's classifier, or the part of it that turns features into logits; None if there is none."""
    found: Any = backbone.get_classifier() if hasattr(backbone, "get_classifier") else None  # type: ignore[operator]
    if isinstance(found, tuple | list):  # labels first, then the teacher of a distilled network
        found = found[0]
    if isinstance(found, nn.ModuleList):  # one for each of several features: the last sees the deepest
        found = found[-1]
    while hasattr(found, "global_pool") and hasattr(found, "fc"):  # a head that pools: its input is no classifier's
        found = found.fc
    return found


def _example(backbone: nn.Module) -> str:
    return (stage_names(backbone) or [name for name, _ in backbone.named_children()])[-1]


def stage_names(backbone: nn.Module) -> list[str]:
    """Names of the layers behind which timm's `feature_info` sees the ends of the stages, as far as they exist.

    Where it names a list of blocks, which never runs as a whole, the last block stands for it.
    """
    info = getattr(backbone, "feature_info", None)
    entries = [] if info is None else (info.info if hasattr(info, "info") else info)
    modules, names = dict(backbone.named_modules()), []
    for name in [entry["module"] for entry in entries]:
        # MViTv2 and Twins say "block.2" of what they call stages.2 and blocks.2; Gemma4 leaves "encoder." out.
        for known in (name, name.replace("block.", "stages."), name.replace("block.", "blocks."), f"encoder.{name}"):
            if known in modules:
                names.append(_last_of_list(known, modules[known]))
                break
    if len(names) > 1 and names[-2] == names[-1]:  # CoaT: scales in parallel, behind stages in series
        series = [name for name, module in backbone.named_children() if isinstance(module, nn.ModuleList)]
        names[-2:] = [_last_of_list(name, modules[name]) for name in series[-2:]]
    return names


def _last_of_list(name: str, module: nn.Module) -> str:
    return f"{name}.{len(module) - 1}" if isinstance(module, nn.ModuleList) and len(module) else name


def settled(backbone: nn.Module, tap: Tap, value: object, batch: int) -> Tap:
    """`tap` itself, or on one of the tensors that a stage of timm's gives: its features may come with their size or
    with class tokens. The first that has a row for each image is meant.

    Args:
        value: what the tap saw.
        batch: number of images that it saw.
    """
    if isinstance(value, tuple | list) and tap.layer in stage_names(backbone):
        for item, one in enumerate(value):
            if isinstance(one, Tensor) and one.is_floating_point() and one.dim() > 1 and len(one) == batch:
                return dataclasses.replace(tap, item=item)
    return tap


def example_forward(backbone: nn.Module, taps: Sequence[Tap], images: Tensor) -> Recording:
    """What `taps` see in one forward in eval mode, without gradients."""
    with evaluating(backbone), recording(backbone, taps) as record:
        backbone(images)
    return record
