"""What the exact and the streaming spectrum ask of their input, and the size of a block of work."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable

import torch
from torch import Tensor

BLOCK_ELEMENTS = 2**22  # float64 elements of one block of work, 32 MiB
_ZERO_VARIANCE = 2.0**-88  # share of the raw energy below which the centred energy is round-off of float64


def as_matrix(
    activations: Tensor,  # (n, ...), any float dtype
) -> Tensor:
    """`activations` as a detached (n, m) matrix of the same dtype, everything behind the batch flattened.

    Raises:
        TypeError: if they are not a floating-point tensor.
        ValueError: if there is no feature dimension, or it is empty.
    """
    if not isinstance(activations, Tensor):
        raise TypeError(
            f"activations must be tensors, got {type(activations).__name__}: "
            "pass the features alone, as torch.Tensor of shape (n, m)"
        )
    if not activations.is_floating_point():
        raise TypeError(f"activations must be of a floating-point dtype, got {activations.dtype}")
    if activations.ndim < 2 or math.prod(activations.shape[1:]) == 0:
        raise ValueError(f"activations must be of shape (n, m) with m >= 1 features, got {tuple(activations.shape)}")
    return activations.detach().flatten(1)


def check_values(
    matrix: Tensor,  # (n, m), n >= 1
    largest: float,
) -> None:
    """Raises ValueError if an element is not finite, or above `largest` in absolute value."""
    low, high = (float(end) for end in torch.aminmax(matrix))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("activations hold NaN or infinite values")
    if max(-low, high) > largest:
        raise ValueError(f"activations reach {max(-low, high):.1e}: divide them by a constant first")


def compute_device(device: torch.device) -> torch.device:
    """`device` where it has float64, else the CPU."""
    return torch.device("cpu") if device.type == "mps" else device


def check_ranks(ranks: Iterable[int]) -> list[int]:
    """`ranks` as a list of positive ints.

    Raises:
        ValueError: if there are none, or one is not an integer >= 1.
    """
    checked: list[int] = []
    for rank in [ranks] if isinstance(ranks, int) else ranks:
        try:
            checked.append(-1 if isinstance(rank, bool) else operator.index(rank))
        except TypeError:
            checked.append(-1)
        if checked[-1] < 1:
            raise ValueError(f"ranks must be integers >= 1, got {rank!r}")
    if not checked:
        raise ValueError("ranks is empty: name at least one number of directions")
    return checked


def check_share(share: float) -> float:
    """`share`, if it lies in (0, 1].

    Raises:
        ValueError: if it does not.
    """
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share must lie in (0, 1], got {share!r}")
    return float(share)


def check_rows(rows: int) -> None:
    """Raises ValueError unless there are at least two rows."""
    if rows == 0:
        raise ValueError("activations are empty: no rows were given")
    if rows == 1:
        raise ValueError("one row has no variance: give the activations of at least two samples")


def check_variance(centred: float, raw: float) -> None:
    """Raises ValueError unless `centred` energy is more than what round-off leaves of `raw` energy."""
    if centred <= _ZERO_VARIANCE * raw:
        raise ValueError("the activations have no variance: all rows are equal")
