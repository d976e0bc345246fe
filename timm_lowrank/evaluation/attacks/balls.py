"""The sets that an attack may not leave: a ball around the image and the box [0, 1], held to the last bit.

A radius in units of the pixel range is the same in every channel. One in normalised units is that many standard
deviations of the channel, as attacks on an already normalised input have it: the ball is |x_a - x| <= eps * std (L_inf)
or ||(x_a - x) / std|| <= eps (L2), and a step is taken in the normalised image. The box is that of valid pixels in
both: in normalised units [-mean / std, (1 - mean) / std]. An attack that clips a normalised image to [0, 1], or not at
all, makes images that are none, or too few of those that there are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

NORMS = ("linf", "l2")


class Ball(Protocol):
    """The points within eps of each image that are images themselves."""

    def rows(self, index: Tensor) -> Ball:
        """The balls of some of the images."""

    def step(self, points: Tensor, gradient: Tensor, size: float) -> Tensor:
        """The points one steepest-ascent step of length `size` further, brought back into the ball."""

    def random_points(self, seeds: list[int]) -> Tensor:
        """A point of each ball, from a random stream of its own."""


def ball(
    images: Tensor,  # (n, channels, height, width) float32 in [0, 1]
    eps: float,
    norm: str,  # one of NORMS
    unit: Tensor | None = None,  # (1, channels, 1, 1): what a radius of 1 is in each channel; None: the pixel range
) -> Ball:
    """The ball around each of the images."""
    unit = _double(torch.ones(1, 1, 1, 1, device=images.device) if unit is None else unit.to(images.device))
    return L2Ball(images, eps, unit) if norm == "l2" else LinfBall.around(images, eps, unit)


class LinfBall:
    """|adversarial - image| <= eps * unit in every pixel, in float64 arithmetic with eps and unit as given.

    max(x - eps, 0) and min(x + eps, 1) are rounded to float32 towards x once; clamping to them rounds nothing.
    """

    def __init__(self, lower: Tensor, upper: Tensor, unit: Tensor) -> None:
        self.lower, self.upper, self.unit = lower, upper, unit

    @classmethod
    def around(cls, images: Tensor, eps: float, unit: Tensor) -> LinfBall:
        exact, reach = _double(images), eps * unit
        lower, upper = (exact - reach).clamp_min(0), (exact + reach).clamp_max(1)
        return cls(_inward(images, lower, reach), _inward(images, upper, reach), unit)

    def rows(self, index: Tensor) -> LinfBall:
        return LinfBall(self.lower[index], self.upper[index], self.unit)

    def step(self, points: Tensor, gradient: Tensor, size: float) -> Tensor:
        return self.clamp(points + (size * self.unit).to(points) * gradient.sign())

    def random_points(self, seeds: list[int]) -> Tensor:
        """Uniform in the ball and the box: uniform between the bounds."""
        share = _random(self.lower, seeds, torch.rand)
        return self.clamp(self.lower + share * (self.upper - self.lower))

    def clamp(self, points: Tensor) -> Tensor:
        return points.clamp(self.lower, self.upper)


class L2Ball:
    """||(adversarial - image) / unit||_2 <= eps for every image, in float64 arithmetic with eps and unit as given."""

    def __init__(self, images: Tensor, eps: float, unit: Tensor) -> None:
        self.images, self.eps, self.unit = images, eps, unit

    def rows(self, index: Tensor) -> L2Ball:
        return L2Ball(self.images[index], self.eps, self.unit)

    def step(self, points: Tensor, gradient: Tensor, size: float) -> Tensor:
        unit = self.unit.to(points)
        return self._project(points + size * unit * _unit(unit * gradient))

    def random_points(self, seeds: list[int]) -> Tensor:
        """Uniform in the ball, before the box cuts it."""
        directions = _unit(_random(self.images, seeds, torch.randn))
        shares = _random(self.images[:, :1, :1, :1], [seed ^ 1 for seed in seeds], torch.rand)
        lengths = self.eps * shares ** (1 / self.images[0].numel())
        return self._project(self.images + lengths * directions * self.unit.to(directions))

    def _project(self, points: Tensor) -> Tensor:
        centre = _double(self.images)
        change = _double(points) - centre
        lengths = (change / self.unit).flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        # A hair inside, so that what float64 rounds cannot lead out; then each pixel is rounded towards the image.
        change = torch.where(lengths > self.eps, change * (self.eps * (1 - 1e-7) / lengths), change)
        return _inward(self.images, (centre + change).clamp(0, 1))


def seeds_of(images: Tensor, stream: int, restart: int) -> list[int]:
    """A seed for each image from its pixels: its random start does not depend on its place or company in a batch."""
    key = f"{stream}/{restart}".encode()
    return [
        int.from_bytes(hashlib.blake2b(image.numpy().tobytes(), digest_size=4, key=key).digest(), "big")
        for image in images.cpu()
    ]


def _random(like: Tensor, seeds: list[int], draw: Callable[..., Tensor]) -> Tensor:
    """One draw of the shape of each row, always on the CPU: the same numbers whatever the device."""
    rows = [draw(like.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).to(like)


def _unit(directions: Tensor) -> Tensor:
    """Each row with norm 1; a row of zeros stays one. Scaled first: squares of small gradients underflow."""
    largest = directions.abs().amax(dim=(1, 2, 3), keepdim=True)
    scaled = directions / largest.where(largest > 0, 1)
    lengths = scaled.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return scaled / lengths.where(lengths > 0, 1)


def _double(tensor: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def _inward(images: Tensor, wanted: Tensor, most: Tensor | None = None) -> Tensor:
    """`wanted` (float64) in float32, a bit nearer to the images wherever rounding led away from them.

    Away is further than `wanted` is, or than `most` where given.
    """
    exact = _double(images)
    rounded = wanted.float()
    limit = (wanted - exact).abs()
    if most is not None:
        limit = limit.minimum(most)
    away = (rounded.double() - exact).abs() > limit
    return torch.where(away, torch.nextafter(rounded, exact.float()), rounded).to(images.device)
