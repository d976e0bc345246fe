"""Random pixel noise (paper, Section 3.2, Table 4)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..errors import EvaluationError
from .arguments import check_images


@dataclasses.dataclass(frozen=True)
class NoiseReading:
    """One reading of "a Gaussian noise drawn from N(0, 128/255)", by name: the paper leaves it open."""

    name: str
    sigma: float  # standard deviation, in `unit`
    per_channel: bool  # whether the channels of a pixel that is hit get values of their own, or one together
    unit: str = "pixel"  # of sigma: the pixel range, or "normalized", the standard deviation of each channel


STANDARD_DEVIATION = NoiseReading("standard deviation 128/255", 128 / 255, True)
VARIANCE = NoiseReading("variance 128/255", (128 / 255) ** 0.5, True)
IN_PIXELS = (
    STANDARD_DEVIATION,
    VARIANCE,
    NoiseReading(f"{STANDARD_DEVIATION.name}, channels together", STANDARD_DEVIATION.sigma, False),
    NoiseReading(f"{VARIANCE.name}, channels together", VARIANCE.sigma, False),
)
NORMALIZED = tuple(
    dataclasses.replace(reading, name=f"{reading.name}, normalised units", unit="normalized") for reading in IN_PIXELS
)
NOISE_READINGS = {reading.name: reading for reading in (*IN_PIXELS, *NORMALIZED)}


def pixel_noise(
    images: Tensor,  # (n, channels, height, width) float in [0, 1]
    probability: float,
    *,
    sigma: float = STANDARD_DEVIATION.sigma,
    per_channel: bool = STANDARD_DEVIATION.per_channel,
    std: Tensor | None = None,  # (channels,) or (1, channels, 1, 1)
    generator: torch.Generator | None = None,
) -> Tensor:
    """Images in which each pixel is hit with `probability` and then gets Gaussian noise; clipped to [0, 1].

    The paper writes N(0, 128/255) and leaves open whether that is the variance or the standard deviation, and
    whether the channels of a pixel are drawn together, and does not say whether pixels are normalised before:
    `NOISE_READINGS` names four readings in units of the pixel range, and the same four in normalised units. The
    default is `STANDARD_DEVIATION`. A pixel is hit in all its channels or in none, and stays in [0, 1] in all readings.

    Args:
        sigma, per_channel: as of a `NoiseReading`.
        std: what sigma is in units of, for a reading in normalised units: `PixelModel.std`. None: the pixel range.
        generator: on the images' device. Images are drawn for in their order, so a chunk of images gets noise of
            its own whatever else is measured, if it comes with a generator of its own.

    Raises:
        EvaluationError: a probability outside [0, 1], a negative sigma, images of another shape, or `std` that is no
            positive number for each channel.
    """
    if not 0 <= probability <= 1 or not sigma >= 0:
        raise EvaluationError(f"probability must lie in [0, 1] and sigma be >= 0, not {probability} and {sigma}")
    check_images(images)
    count, channels, height, width = images.shape
    unit: Tensor | float = 1.0
    if std is not None:
        if std.numel() != channels or not bool((std > 0).all()):
            raise EvaluationError(f"std must be {channels} positive numbers, one for each channel, not {std.tolist()}")
        unit = std.to(images).view(1, channels, 1, 1)
    options = {"generator": generator, "device": images.device, "dtype": images.dtype}
    hit = torch.rand(count, 1, height, width, **options) < probability  # type: ignore[arg-type]
    noise = torch.randn(count, channels if per_channel else 1, height, width, **options)  # type: ignore[arg-type]
    return (images + sigma * unit * hit * noise).clamp(0, 1)
