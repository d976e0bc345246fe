"""What every attack asks of its arguments: one clear error instead of a wrong figure."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import EvaluationError


def checked(
    images: Tensor,  # (n, channels, height, width) floating point in [0, 1]
    labels: Tensor,  # (n,) integers
    name: str = "labels",
) -> tuple[Tensor, Tensor]:
    """The images, contiguous float32 without a graph, and the labels int64 beside them.

    Raises:
        EvaluationError: another shape or dtype, pixels outside [0, 1], or another number of labels.
    """
    if images.ndim != 4 or not images.is_floating_point():
        raise EvaluationError(
            f"images must be floating point (n, channels, height, width) in [0, 1], "
            f"not {images.dtype} {tuple(images.shape)}"
        )
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


def check_logits(logits: Tensor, labels: Tensor, name: str = "labels") -> None:
    """Logits (n, classes) of at least two classes, and labels (n,) that are among them.

    Raises:
        EvaluationError: they are not.
    """
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[0] != labels.shape[0]:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise EvaluationError(f"the model must give logits ({labels.shape[0]}, classes), not {shape}")
    classes = logits.shape[1]
    if classes < 2:
        raise EvaluationError("an attack needs logits of at least two classes; this model gives one")
    low, high = labels.aminmax()
    if low < 0 or high >= classes:
        raise EvaluationError(f"{name} must lie in 0..{classes - 1}, the model's classes, not in {low}..{high}")


def check_number(value: float, name: str, least: float | None = None) -> None:
    """A finite number above zero, or `least` and more where given, or an EvaluationError."""
    if not (math.isfinite(value) and (value > 0 if least is None else value >= least)):
        wanted = "above 0" if least is None else f"of {least} or more"
        raise EvaluationError(f"{name} must be a finite number {wanted}, not {value!r}")


def check_count(value: int, name: str, least: int = 1) -> None:
    """A whole number, `least` or more, or an EvaluationError."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise EvaluationError(f"{name} must be a whole number, {least} or more, not {value!r}")


def check_choice(value: str, choices: Sequence[str], name: str) -> None:
    """One of the choices, or an EvaluationError that names the nearest."""
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise EvaluationError(f"{name} must be one of {', '.join(map(repr, choices))}, not {value!r}{hint}")


def input_gradient(
    total: Tensor,  # scalar
    points: Tensor,  # (m, channels, height, width), requires grad
    *,
    retain_graph: bool = False,
) -> Tensor:
    """Gradient of `total` by the pixels, (m, channels, height, width); what is not finite in it counts as zero.

    Raises:
        EvaluationError: the model is not differentiable.
    """
    gradient = None
    if total.requires_grad:
        (gradient,) = torch.autograd.grad(total, points, retain_graph=retain_graph, allow_unused=True)
    if gradient is None:
        raise EvaluationError(
            "the logits do not depend on the pixels through operations that torch can differentiate (no_grad, detach, "
            "argmax, numpy?): gradient attacks cannot be run; craft on another model and use transfer()"
        )
    return gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
