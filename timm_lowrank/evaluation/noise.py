"""Random pixel noise (paper, Section 3.2, Table 4)."""

from __future__ import annotations

import torch
from torch import Tensor


def pixel_noise(
    images: Tensor,  # (n, channels, height, width) float in [0, 1]
    probability: float,
    *,
    sigma: float = 128 / 255,
    per_channel: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Images in which each pixel is hit with `probability` and then gets Gaussian noise; clipped to [0, 1].

    The paper writes N(0, 128/255) and leaves open whether that is the variance or the standard deviation, and
    whether the channels of a pixel are drawn together.

    Args:
        sigma: standard deviation; (128 / 255) ** 0.5 is the other reading.
        per_channel: whether the channels of a pixel that is hit get values of their own, or one together.
        generator: on the images' device.

    Raises:
        ValueError: a probability outside [0, 1] or a negative sigma.
    """
    if not 0 <= probability <= 1 or sigma < 0:
        raise ValueError(f"probability must lie in [0, 1] and sigma be >= 0, not {probability} and {sigma}")
    count, channels, height, width = images.shape
    options = {"generator": generator, "device": images.device, "dtype": images.dtype}
    hit = torch.rand(count, 1, height, width, **options) < probability  # type: ignore[arg-type]
    noise = torch.randn(count, channels if per_channel else 1, height, width, **options)  # type: ignore[arg-type]
    return (images + sigma * hit * noise).clamp(0, 1)
