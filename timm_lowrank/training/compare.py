"""`measure_run`: the figures by which a regularized network is judged beside its plain twin."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from torch import Tensor

from ..core.spectrum import variance_ratio
from ..data.drawn import drawn_images
from ..data.streamed import StreamedData
from ..evaluation import PixelModel, activations, linear_accuracy, pixel_noise, predictions
from .data import load_data
from .run import Run

Figures = dict[str, float]  # name of the figure: a share in [0, 1]


def measure_run(
    run: Path,
    directions: Sequence[int],
    noise: float,
    limit: int,
    *,
    layers: Sequence[str] | None = None,
    data: str | None = None,
) -> Figures:
    """Measures the exported network of a run.

    Args:
        run: a run folder of `train`.
        directions: numbers of leading directions; those that a layer does not have are left out.
        noise: probability that a pixel is hit, see `timm_lowrank.evaluation.pixel_noise`; seed 0.
        limit: how many training and how many test images the layers are measured on. Of a run on streamed images, all
            figures are of so many, as many of each class.
        layers: which layers to measure; None are those of `layers_of(run)`.
        data: where the images are now; None is where the recipe says.

    Returns:
        "clean", "noise P", and for each layer
        "LAYER variance D" of the test activations and "LAYER linear D", the test accuracy of a linear classifier
        on the D leading directions.

    Raises:
        RunError: not a finished run.
        DataError: the images cannot be read.
    """
    measured = list(layers or layers_of(run))
    recipe = Run.open(run).recipe
    recipe = recipe if data is None else dataclasses.replace(recipe, data=data)
    found = load_data(recipe)
    images = drawn_images(found, limit, limit) if isinstance(found, StreamedData) else found
    model = PixelModel(timm.create_model(f"local-dir:{run / 'model'}", pretrained=True).eval())
    test = images.test_images.float() / 255
    hit = pixel_noise(test, noise, generator=torch.Generator().manual_seed(0))
    figures = {
        "clean": _accuracy(predictions(model, test), images.test_labels),
        f"noise {noise:g}": _accuracy(predictions(model, hit), images.test_labels),
    }
    seen = activations(model, images.train_images[:limit].float() / 255, measured)
    new = activations(model, test[:limit], measured)
    for layer in seen:
        fitting = [count for count in directions if count <= min(*seen[layer].shape, *new[layer].shape)]
        ratios = variance_ratio(new[layer], fitting)
        linear = linear_accuracy(
            seen[layer], images.train_labels[:limit], new[layer], images.test_labels[:limit], fitting
        )
        figures |= {f"{layer} variance {d}": ratio for d, ratio in zip(fitting, ratios, strict=True)}
        figures |= {f"{layer} linear {d}": accuracy for d, accuracy in zip(fitting, linear, strict=True)}
    return figures


def layers_of(run: Path) -> list[str]:
    """The layers that a run regularizes, or in a plain run those that its recipe names.

    Raises:
        RunError: not a finished run.
    """
    return list(Run.open(run).summary.branches)


def _accuracy(predicted: Tensor, labels: Tensor) -> float:
    return float((predicted == labels).float().mean())
