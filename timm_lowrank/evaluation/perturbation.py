"""How large a perturbation is, in the input and in the representations (paper, Sections 3.1 and 3.2)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import EvaluationError, EvaluationWarning
from .activations import activation_batches, check_images


class Stability(NamedTuple):
    """Per image, squared and normalised: how far the input moved, and how far each representation did."""

    inputs: Tensor  # (n,) float64, ||delta||^2 / ||x||^2
    layers: dict[str, Tensor]  # {layer: (n,) float64}, ||f(x + delta) - f(x)||^2 / ||f(x)||^2


class DefinedMean(NamedTuple):
    """The mean over the images for which a quantity is defined."""

    mean: float  # NaN if there are none
    images: int  # how many these are


def rho(
    images: Tensor,  # (n, channels, height, width) clean
    adversarial: Tensor,  # of the same shape
) -> Tensor:
    """||x_a - x||_2 / ||x||_2 of each image, (n,) float64; the paper's rho is the mean of it (Section 3.1).

    NaN, with an `EvaluationWarning`, for an image that is zero everywhere: nothing can be said relative to it.
    `mean_where_defined` leaves such images out.

    Raises:
        EvaluationError: no images, or of different shapes.
    """
    _check_pair(images, adversarial)
    found = _moved(images, adversarial).sqrt()
    _warn_of_zeros(found, "images are zero everywhere, so rho of them is NaN")
    return found


def mean_where_defined(
    values: Tensor,  # (n,) float
) -> DefinedMean:
    """The mean of the values that are not NaN, and how many these are."""
    defined = values[~values.isnan()].double()
    return DefinedMean(float(defined.mean()), len(defined))


def stability(
    model: nn.Module,
    images: Tensor,  # (n, channels, height, width) float in [0, 1]
    adversarial: Tensor,  # of the same shape, the same images perturbed
    layers: Sequence[str],
    batch_size: int = 500,
) -> Stability:
    """How far each perturbation moves the input and the representations (paper, Fig. 4b and 16), in eval mode.

    Input norms are those of the pixels in [0, 1], before the normalisation inside the model. NaN, with an
    `EvaluationWarning`, where the clean image or its representation is zero.

    Args:
        model, layers: as in `activations`.

    Raises:
        EvaluationError: images of different shapes, and as `activations`.
    """
    _check_pair(images, adversarial)
    parts: dict[str, list[Tensor]] = {}
    before = activation_batches(model, images, layers, batch_size)
    after = activation_batches(model, adversarial, layers, batch_size)
    for clean, moved in zip(before, after, strict=True):
        for layer, value in clean.items():
            parts.setdefault(layer, []).append(_moved(value, moved[layer]))
    found = {layer: torch.cat(values) for layer, values in parts.items()}
    inputs = _moved(images, adversarial)
    _warn_of_zeros(inputs, "images are zero everywhere, so their stability is NaN")
    for layer, values in found.items():
        _warn_of_zeros(values, f"images have a representation of zeros at layer {layer!r}: NaN there")
    return Stability(inputs, found)


def _moved(clean: Tensor, moved: Tensor) -> Tensor:
    """||moved - clean||^2 / ||clean||^2 of each row, float64; NaN where clean is zero."""
    start = clean.detach().flatten(1).double()
    energy = start.square().sum(dim=1)
    ratio = (moved.detach().flatten(1).double() - start).square().sum(dim=1) / energy
    return ratio.masked_fill(energy == 0, torch.nan)


def _check_pair(images: Tensor, adversarial: Tensor) -> None:
    check_images(images)
    if images.shape != adversarial.shape:
        shapes = f"{tuple(images.shape)} and {tuple(adversarial.shape)}"
        raise EvaluationError(f"clean and perturbed images must be of one shape, not {shapes}")


def _warn_of_zeros(values: Tensor, text: str) -> None:
    if count := int(values.isnan().sum()):
        warnings.warn(f"{count} of {len(values)} {text}", EvaluationWarning, stacklevel=3)
