"""Layers by name: what a branch can sit on, what "pre_logits" and "2-LR" mean for a network, and how wide it is."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from .core.capture import Recording, Tap, evaluating, recording
from .core.config import PRE_LOGITS, LowRankConfig
from .core.errors import CaptureError, nearest

PRE_LOGITS_RANK, STAGE_RANK = 100, 500  # paper, Section 3


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
    record = _example_forward(backbone, [Tap(name, name) for name in names], images)
    found = []
    for name in record.values:
        with contextlib.suppress(CaptureError):  # then no branch can sit there
            value = record.activation(Tap(name, name))
            if value.shape[0] == images.shape[0]:
                kind = type(backbone.get_submodule(name)).__name__
                found.append(LayerInfo(name, kind, tuple(value.shape[1:]), value[0].numel()))
    with_logits = _pre_logits_tap(backbone, images)
    value = _example_forward(backbone, [with_logits], images).activation(with_logits)
    return [*found, LayerInfo(PRE_LOGITS, f"input of {with_logits.path}", tuple(value.shape[1:]), value[0].numel())]


def find_taps(
    backbone: nn.Module, config: LowRankConfig, images: Tensor
) -> tuple[list[Tap], dict[str, int], dict[str, int]]:
    """Taps, widths and target ranks of the branches that `config` asks for.

    The ranks of the presets are capped by the width of the layer, with a warning.

    Raises:
        ValueError: layers that do not exist (all named in one message, with the nearest ones), or ranks larger
            than the width of their layer.
        CaptureError: a layer that one forward of `images` does not run exactly once, or without float activations.
    """
    wanted = _wanted_ranks(backbone, config)
    _raise_if_unknown(backbone, wanted)
    taps = [tap_on(backbone, layer, images) for layer in wanted]
    record = _example_forward(backbone, taps, images)
    widths = {}
    for tap in taps:
        value = record.activation(tap)
        if value.shape[0] != images.shape[0]:
            raise CaptureError(
                f"layer {tap.layer!r} gives a tensor of shape {tuple(value.shape)} for {images.shape[0]} images; "
                "its first dimension is not the batch, so its rows are not images"
            )
        widths[tap.layer] = value[0].numel()
    return taps, widths, _fitting_ranks(wanted, widths, capped=isinstance(config.branches, str))


def tap_on(backbone: nn.Module, layer: str, images: Tensor | None = None) -> Tap:
    """The tap of a branch on one layer. `images` are needed for "pre_logits" of a network that is not timm's.

    Raises:
        AttributeError: the network has no such layer.
        ValueError: "pre_logits" of a network without a classifier, or of one that is not timm's without images.
    """
    return _pre_logits_tap(backbone, images) if layer == PRE_LOGITS else Tap.at(layer, layer, backbone)


def _wanted_ranks(backbone: nn.Module, config: LowRankConfig) -> dict[str, int]:
    if isinstance(config.branches, Mapping):
        return {layer: spec["rank"] if isinstance(spec, Mapping) else spec for layer, spec in config.branches.items()}
    if config.branches == "1-LR":
        return {PRE_LOGITS: PRE_LOGITS_RANK}
    return {_last_stage_input(backbone): STAGE_RANK, PRE_LOGITS: PRE_LOGITS_RANK}


def _last_stage_input(backbone: nn.Module) -> str:
    """The name of the layer whose output enters the last stage, from timm's `feature_info`."""
    if hasattr(backbone, "lowrank_stage"):  # a network that knows better, such as a VGG
        return str(backbone.lowrank_stage)
    info = getattr(backbone, "feature_info", None)
    stages: Sequence[str] = (
        [] if info is None else [entry["module"] for entry in (info.info if hasattr(info, "info") else info)]
    )
    if len(stages) < 2:
        raise ValueError(
            f'"2-LR" needs timm\'s feature_info with at least two stages, which {type(backbone).__name__} does '
            'not have; name the layers instead, for example branches={"layer3": 500, "pre_logits": 100}'
        )
    return stages[-2]


def _raise_if_unknown(backbone: nn.Module, wanted: Mapping[str, int]) -> None:
    known = [name for name, _ in backbone.named_modules() if name]
    unknown = [layer for layer in wanted if layer != PRE_LOGITS and layer not in known]
    if unknown:
        raise ValueError(
            "; ".join(
                f"{type(backbone).__name__} has no layer {layer!r}. " + nearest(layer, [*known, PRE_LOGITS], count=5)
                for layer in unknown
            )
        )


def _fitting_ranks(wanted: Mapping[str, int], widths: Mapping[str, int], *, capped: bool) -> dict[str, int]:
    too_large = {layer: rank for layer, rank in wanted.items() if rank > widths[layer]}
    text = "; ".join(
        f"rank {rank} is larger than the {widths[layer]} features of layer {layer!r}"
        for layer, rank in too_large.items()
    )
    if too_large and not capped:
        raise ValueError(f"{text}; a branch needs a rank well below the width to have an effect")
    if too_large:
        warnings.warn(
            f"{text}; capped there, where the branch has no effect: name the layers and smaller ranks", stacklevel=3
        )
    return {layer: min(rank, widths[layer]) for layer, rank in wanted.items()}


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
    ran = _example_forward(backbone, [Tap(name, name) for name in linear], images).values
    if not ran:
        raise ValueError(
            f"{type(backbone).__name__} runs no nn.Linear, so there is no {PRE_LOGITS!r}; name a layer instead"
        )
    return Tap(PRE_LOGITS, list(ran)[-1], takes_input=True)


def _example_forward(backbone: nn.Module, taps: Sequence[Tap], images: Tensor) -> Recording:
    with evaluating(backbone), recording(backbone, taps) as record:
        backbone(images)
    return record
