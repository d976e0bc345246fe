"""`wrap`: from a timm name or any network to a `LowRankModel`, with what "1-LR" and "2-LR" mean for it."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from .core.capture import Recording, Tap, evaluating, recording
from .core.config import PRE_LOGITS, LowRankConfig
from .core.model import LowRankModel
from .errors import CaptureError, LowRankError, nearest
from .layers import (
    class_count,
    create_backbone,
    default_input,
    example_forward,
    last_stage_input,
    natural_view,
    pick_item,
    rows_of_images,
    tap_on,
)

PRE_LOGITS_RANK, STAGE_RANK = 100, 500  # paper, Section 3


def wrap(
    model: str | nn.Module,
    config: LowRankConfig | str | Mapping[str, Any] | None = None,
    *,
    example_input: Tensor | None = None,
    **create_kwargs: Any,
) -> LowRankModel:
    """Put the low-rank branches of `config` on a network.

    Args:
        model: a timm name (`create_kwargs` go to `timm.create_model`), or any `nn.Module` that takes a batch of
            images. A module is wrapped, not copied: training the wrapper trains it.
        config: what to regularize; None is `LowRankConfig()`, one branch before the classifier. "2-LR" or {layer: rank}
            stand for `LowRankConfig(branches=...)`.
        example_input: a batch (batch, channels, height, width) as the network takes it, to find the widths of
            the layers by one forward in eval mode. Needed where the images have another size than timm's
            `pretrained_cfg` says, and for a module that has none. One image of zeros otherwise.

    Returns:
        The wrapped model, in the mode (train or eval) of the network.

    Raises:
        ValueError: unknown timm name or layer (the nearest are named), a rank larger than its layer, a network that
            does not take images of the size in its `pretrained_cfg`.
        TypeError: `create_kwargs` for a module that exists already, a model that is neither name nor module, or one
            that was compiled, scripted or put into an nn.DataParallel before.
        CaptureError: a layer without usable activations.
    """
    if config is None or isinstance(config, str | Mapping):
        config = LowRankConfig() if config is None else LowRankConfig(branches=config)
    if isinstance(model, LowRankModel):
        raise TypeError("the model is wrapped already; wrap model.unwrap() to change its branches")
    if not isinstance(model, str | nn.Module):
        raise TypeError(f"a timm name or an nn.Module is needed, not a {type(model).__name__}")
    if isinstance(model, nn.Module) and (hasattr(model, "_orig_mod") or model._compiled_call_impl is not None):
        raise TypeError(
            "the network is compiled already, and what it compiled does not see the branches: wrap the plain network "
            "first, and then torch.compile the wrapped model"
        )
    if isinstance(model, nn.DataParallel):
        raise TypeError(
            "the network is in an nn.DataParallel, whose replicas would share one recording: wrap the network inside, "
            "model.module, and use DistributedDataParallel around what wrap gives"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "the network is a ScriptModule, whose layers cannot be looked into: wrap the network that it was made of, "
            "and script or trace model.unwrap() after the training"
        )
    if create_kwargs and isinstance(model, nn.Module):
        raise TypeError(f"{', '.join(create_kwargs)}: keywords for timm.create_model, but the model exists already")
    backbone = create_backbone(model, **create_kwargs) if isinstance(model, str) else model
    images = default_input(backbone, **create_kwargs) if example_input is None else example_input
    try:
        taps, widths, ranks = find_taps(backbone, config, images)
    except (AssertionError, RuntimeError) as problem:  # timm's networks refuse images of a wrong size with either
        if example_input is not None or isinstance(problem, LowRankError):
            raise
        raise ValueError(
            f"the {type(backbone).__name__} does not take an image of {tuple(images.shape[1:])}, the size in its "
            f"pretrained_cfg ({problem}); pass example_input=images, one batch as the network takes it"
        ) from problem
    heads = any(config.weights(tap.layer, feeds_classifier=tap.feeds_classifier).head for tap in taps)
    classes = class_count(backbone, images) if heads else None
    return LowRankModel(backbone, config, taps, widths, ranks, classes)


def find_taps(
    backbone: nn.Module, config: LowRankConfig, images: Tensor
) -> tuple[list[Tap], dict[str, int], dict[str, int]]:
    """Taps, widths and target ranks of the branches that `config` asks for.

    The ranks of the presets are capped by the width of the layer, with a warning. For a stage of tokens they are a
    quarter of the channels at most: the paper's 500 are a thirtieth of the features that it has before the last stage,
    and in a network with 384 or 768 channels it would be no constraint at all. Where the last stage is entered by one
    vector per image, as the fully connected layers of a VGG are, it is the paper's 100 there, too.

    Raises:
        ValueError: layers that do not exist (all named in one message, with the nearest ones), or ranks larger
            than the width of their layer.
        CaptureError: a layer that one forward of `images` does not run exactly once, or without float activations.
    """
    if isinstance(config.branches, Mapping):
        wanted = config.ranks()
    elif config.branches == "1-LR":
        wanted = {PRE_LOGITS: PRE_LOGITS_RANK}
    else:
        wanted = {last_stage_input(backbone, images): STAGE_RANK, PRE_LOGITS: PRE_LOGITS_RANK}
    _raise_if_unknown(backbone, wanted)
    taps = [tap_on(backbone, layer, images) for layer in wanted]
    record = example_forward(backbone, taps, images)
    whole, taps = taps, [pick_item(backbone, tap, record.values.get(tap.layer), len(images)) for tap in taps]
    if taps != whole:
        record = example_forward(backbone, taps, images)
    features = _classifier_input(backbone, images, taps)
    record = record if features is None else example_forward(backbone, [*taps, features], images)
    viewed, widths = [], {}
    for tap in taps:
        value, options = record.activation(tap), config.options(tap.layer)
        path = "" if tap.takes_input else tap.path
        view = natural_view(backbone, value, options.view, options.channel_dim, layer=path, images=images)
        if len(value) != len(images) and view.kind != "token":
            raise CaptureError(
                f"layer {tap.layer!r} gives a tensor of shape {tuple(value.shape)} for {len(images)} images; its first "
                'dimension is not the batch, so its rows are not images: choose another layer, or the view "token"'
            )
        same = features is not None and _is_same(value, record.values.get(features.layer))
        viewed.append(dataclasses.replace(tap, view=view, feeds_classifier=same and tap.layer != PRE_LOGITS))
        widths[tap.layer] = view.width(value)
        if isinstance(config.branches, str) and view.kind == "token" and value.dim() > 2:
            wanted[tap.layer] = min(wanted[tap.layer], max(1, widths[tap.layer] // 4))
        elif isinstance(config.branches, str) and value[0].numel() == value.shape[view.channel_dim]:
            wanted[tap.layer] = min(wanted[tap.layer], PRE_LOGITS_RANK)
    _raise_if_dropped_in_place(backbone, viewed, images)
    _raise_if_labels_do_not_fit(backbone, config, viewed, images, record)
    return viewed, widths, _fitting_ranks(wanted, widths, capped=isinstance(config.branches, str))


def _raise_if_dropped_in_place(backbone: nn.Module, taps: list[Tap], images: Tensor) -> None:
    """Raises CaptureError for a layer whose output a dropout overwrites, which it does in train mode alone.

    A training forward would say so, too, but not a compiled one, where overwriting cannot be seen.
    """
    dropouts = [module for module in backbone.modules() if isinstance(module, _DropoutNd) and module.inplace]
    if dropouts:
        devices = [images.device] if images.device.type == "cuda" else []
        with torch.random.fork_rng(devices), evaluating(backbone), recording(backbone, taps) as record:
            for module in dropouts:
                module.train()
            backbone(images)
        for tap in taps:
            record.activation(tap)


def _raise_if_labels_do_not_fit(
    backbone: nn.Module, config: LowRankConfig, taps: list[Tap], images: Tensor, record: Recording
) -> None:
    """Raises CaptureError for a layer with a subspace head whose rows do not come image by image.

    Looks where that may be: at sequences, if their first dimension is not the batch or could be another one as long.
    """
    doubtful = []
    for tap in taps:
        value, weights = record.activation(tap), config.weights(tap.layer, feeds_classifier=tap.feeds_classifier)
        if weights.head and value.dim() == 3 and (len(value) != len(images) or len(images) > 1):
            doubtful.append(tap)
    fits = rows_of_images(backbone, doubtful, images) if doubtful else {}
    for layer in [layer for layer, whether in fits.items() if not whether]:
        raise CaptureError(
            f"the first dimension of what layer {layer!r} gives is not the batch (was it made with batch_first=False?)"
            ", so its subspace head would learn from the labels of other images: choose a layer that has the batch "
            f'first, or switch the head off, branches={{{layer!r}: {{"rank": ..., "head_weight": 0}}}}'
        )


def _classifier_input(backbone: nn.Module, images: Tensor, taps: list[Tap]) -> Tap | None:
    """The tap of "pre_logits" where other layers may give the same tensor; None where there is no such thing."""
    if all(tap.layer == PRE_LOGITS for tap in taps):
        return None
    try:
        return dataclasses.replace(tap_on(backbone, PRE_LOGITS, images), layer="")
    except (ValueError, CaptureError):
        return None


def _is_same(value: Tensor, other: object) -> bool:
    """Whether two activations are one tensor, perhaps in two shapes."""
    if not isinstance(other, Tensor) or value.is_meta:
        return False
    return value.data_ptr() == other.data_ptr() and value.numel() == other.numel()


def _raise_if_unknown(backbone: nn.Module, wanted: Mapping[str, int]) -> None:
    known = [name for name, _ in backbone.named_modules(remove_duplicate=False) if name]
    unknown = [layer for layer in wanted if layer != PRE_LOGITS and layer not in known]
    if unknown:
        kind = type(backbone).__name__
        advice = {layer: nearest(layer, [*known, PRE_LOGITS], count=5) for layer in unknown}
        raise ValueError("; ".join(f"{kind} has no layer {layer!r}. {names}" for layer, names in advice.items()))


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
    loose = {layer: rank for layer, rank in wanted.items() if widths[layer] / 2 < rank <= widths[layer]}
    if loose and capped:
        text = "; ".join(
            f"rank {rank} is more than half of the {widths[layer]} features of {layer!r}"
            for layer, rank in loose.items()
        )
        advice = {layer: max(1, widths[layer] // 4) for layer in loose}
        warnings.warn(
            f"{text}, where the branch has little effect: name the layers and smaller ranks, such as {advice}",
            stacklevel=3,
        )
    return {layer: min(rank, widths[layer]) for layer, rank in wanted.items()}
