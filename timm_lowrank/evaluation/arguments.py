"""What attacks and measurements ask of their arguments: one clear error instead of a wrong figure."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import EvaluationError

RADIUS_UNITS = ("pixel", "normalized")
"""Of a radius and a step: the pixel range, or the standard deviation of each channel, as networks are given images."""


def check_images(images: Tensor, least: int = 1) -> None:
    """Raises EvaluationError unless `images` are floating point (n, channels, height, width) with n >= `least`."""
    if images.ndim != 4 or not images.is_floating_point():
        raise EvaluationError(
            f"images must be floating point (n, channels, height, width) in [0, 1], "
            f"not {images.dtype} {tuple(images.shape)}"
        )
    if len(images) < least:
        raise EvaluationError("there are no images: give at least one")


def checked(
    images: Tensor,  # (n, channels, height, width) floating point in [0, 1]; n may be 0
    labels: Tensor,  # (n,) integers; an array of numpy does, too
    name: str = "labels",
) -> tuple[Tensor, Tensor]:
    """The images, contiguous float32 without a graph, and the labels int64 beside them.

    Raises:
        EvaluationError: another shape or dtype, pixels outside [0, 1], or another number of labels.
    """
    check_images(images, least=0)
    labels = labels if isinstance(labels, Tensor) else torch.as_tensor(labels)  # of numpy, or a list
    if images.numel():
        low, high = images.detach().aminmax()
        if not (low >= 0 and high <= 1):  # NaN too
            raise EvaluationError(
                f"pixels must lie in [0, 1], these in [{low:.3g}, {high:.3g}]: divide by 255, "
                f"and leave the normalisation to a PixelModel"
            )
    if labels.shape != images.shape[:1] or labels.is_floating_point() or labels.is_complex():
        raise EvaluationError(
            f"{name} must be integers ({images.shape[0]},), one for each image, "
            f"not {labels.dtype} {tuple(labels.shape)}"
        )
    pixels = images.detach().to(torch.float32, memory_format=torch.contiguous_format)
    return pixels, labels.detach().to(images.device, torch.int64)


def check_logits(logits: Tensor, count: int) -> Tensor:
    """The logits, if they are finite (count, classes) of at least two classes; EvaluationError otherwise."""
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[0] != count:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise EvaluationError(f"the model must give logits ({count}, classes), not {shape}")
    if logits.shape[1] < 2:
        raise EvaluationError("an attack needs logits of at least two classes; this model gives one")
    finite = logits.detach().isfinite().all(dim=1)
    if not finite.all():
        share = (~finite).float().mean().item()
        raise EvaluationError(
            f"{share:.0%} of the images get logits that are NaN or infinite: a diverged checkpoint, or half precision?"
        )
    return logits


def check_labels(labels: Tensor, classes: int, name: str = "labels") -> None:
    """Raises EvaluationError unless all labels (n,), n >= 1, are in 0 ... classes - 1."""
    low, high = labels.aminmax()
    if low < 0 or high >= classes:
        raise EvaluationError(f"{name} must lie in 0..{classes - 1}, the model's classes, not in {low}..{high}")


def check_number(value: float, name: str, least: float | None = None) -> None:
    """A finite number above zero, or `least` and more where given, or an EvaluationError."""
    if not (abs(value) <= sys.float_info.max and (value > 0 if least is None else value >= least)):
        wanted = "above 0" if least is None else f"of {least} or more"
        raise EvaluationError(f"{name} must be a finite number {wanted}, not {value!r}")


def check_count(value: int, name: str, least: int = 1) -> int:
    """A whole number, `least` or more, or an EvaluationError."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise EvaluationError(f"{name} must be a whole number, {least} or more, not {value!r}")
    return value


def check_choice(value: str, choices: Sequence[str], name: str) -> None:
    """One of the choices, or an EvaluationError that names the nearest."""
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise EvaluationError(f"{name} must be one of {', '.join(map(repr, choices))}, not {value!r}{hint}")
