"""What the layers of a network say of images: the captures that the measurements share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..core.capture import Tap, evaluating, recording
from ..core.config import LowRankConfig
from ..core.model import LowRankModel
from ..core.views import FLATTEN, View
from ..errors import CaptureError, EvaluationError
from ..placement import find_taps
from .pixels import PixelModel, bare


def activations(
    model: nn.Module,
    images: Tensor,  # (n, channels, height, width) float in [0, 1]
    layers: Sequence[str],
    batch_size: int = 500,
    views: Mapping[str, View] | None = None,
) -> dict[str, Tensor]:
    """The activations of layers, {layer: (n, features)} of the network's dtype, in eval mode, no graph.

    Args:
        model: a `PixelModel`, or any module that takes pixels.
        layers: dotted names as in `named_modules()` of the network (a `PixelModel`'s network, that is), each
            meaning that module's output; "pre_logits" is the input of the classifier.
        batch_size: images in one forward pass.
        views: of layers whose samples are not whole images, as of a branch (`LowRankModel.taps`); all others are
            flattened.

    Raises:
        EvaluationError: no images, a layer that does not exist (the nearest are named), that a forward pass does
            not run exactly once, or that is overwritten in place after it was recorded.
    """
    parts: dict[str, list[Tensor]] = {}
    for batch in activation_batches(model, images, layers, batch_size, views):
        for layer, value in batch.items():
            parts.setdefault(layer, []).append(value)
    return {layer: torch.cat(values) for layer, values in parts.items()}


def activation_batches(
    model: nn.Module,
    images: Tensor,
    layers: Sequence[str],
    batch_size: int = 500,
    views: Mapping[str, View] | None = None,
) -> Iterator[dict[str, Tensor]]:
    """As `activations`, batch by batch, for what is too large to hold.

    Raises:
        EvaluationError: as `activations`.
    """
    found_taps = taps_of(model, images, layers)
    taps = [dataclasses.replace(tap, view=(views or {}).get(tap.layer, FLATTEN)) for tap in found_taps]
    for batch in images.split(check_batch_size(batch_size)):
        with evaluating(model):
            found = captured(model, taps, batch)
        yield found


def taps_of(model: nn.Module, images: Tensor, layers: Sequence[str]) -> list[Tap]:
    """Where `layers` are read, flattened, found by one forward pass of the first image.

    Raises:
        EvaluationError: as `activations`.
    """
    check_images(images)
    if isinstance(layers, str) or not layers:
        raise EvaluationError(f"layers must be a list of at least one layer name, not {layers!r}")
    network = network_of(model)
    weight = next(network.parameters(), images)
    try:
        config = LowRankConfig(branches=dict.fromkeys(layers, 1))
        found = find_taps(network, config, images[:1].to(weight.device, weight.dtype))[0]
        return [dataclasses.replace(tap, view=FLATTEN) for tap in found]
    except (ValueError, CaptureError) as error:
        raise EvaluationError(str(error)) from error


def captured(model: nn.Module, taps: Sequence[Tap], images: Tensor) -> dict[str, Tensor]:
    """Activations {layer: (n, features)} of one forward pass, with a graph where gradients are on.

    Raises:
        EvaluationError: a layer did not run exactly once, or was overwritten in place after it was recorded.
    """
    with recording(network_of(model), taps) as record:
        bare(model)(images)
    try:
        return {tap.layer: tap.view.rows(record.activation(tap)) for tap in taps}
    except CaptureError as error:
        raise EvaluationError(str(error)) from error


def network_of(model: nn.Module) -> nn.Module:
    """The network whose module names a user knows: without `PixelModel`, branches or compilation around it."""
    model = bare(model)
    network = bare(model.network) if isinstance(model, PixelModel) else model
    return network.unwrap() if isinstance(network, LowRankModel) else network


def check_images(images: Tensor) -> None:
    """Raises EvaluationError unless `images` are a batch (n, channels, height, width) with n >= 1."""
    if images.dim() != 4 or not images.is_floating_point():
        shape = f"{tuple(images.shape)} {images.dtype}"
        raise EvaluationError(f"images must be (n, channels, height, width) floating point in [0, 1], not {shape}")
    if not len(images):
        raise EvaluationError("there are no images: give at least one")


def check_batch_size(batch_size: int) -> int:
    """`batch_size`, if it is at least one; EvaluationError otherwise."""
    if batch_size < 1:
        raise EvaluationError(f"batch_size must be at least 1, not {batch_size}")
    return batch_size
