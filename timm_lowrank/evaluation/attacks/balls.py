"""The sets that an attack may not leave: a ball around the image and the box [0, 1], held to the last bit."""

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


def ball(images: Tensor, eps: float, norm: str) -> Ball:
    """The ball of a norm in `NORMS` around each of the images (n, channels, height, width), float32 in [0, 1]."""
    return L2Ball(images, eps) if norm == "l2" else LinfBall.around(images, eps)


class LinfBall:
    """|adversarial - image| <= eps in every pixel, in float64 arithmetic with eps as given.

    max(x - eps, 0) and min(x + eps, 1) are rounded to float32 towards x once; clamping to them rounds nothing.
    """

    def __init__(self, lower: Tensor, upper: Tensor) -> None:
        self.lower, self.upper = lower, upper

    @classmethod
    def around(cls, images: Tensor, eps: float) -> LinfBall:
        exact = _double(images)
        return cls(_inward(images, (exact - eps).clamp_min(0), eps), _inward(images, (exact + eps).clamp_max(1), eps))

    def rows(self, index: Tensor) -> LinfBall:
        return LinfBall(self.lower[index], self.upper[index])

    def step(self, points: Tensor, gradient: Tensor, size: float) -> Tensor:
        return self._clamp(points + size * gradient.sign())

    def random_points(self, seeds: list[int]) -> Tensor:
        """Uniform in the ball and the box: uniform between the bounds."""
        share = _random(self.lower, seeds, torch.rand)
        return self._clamp(self.lower + share * (self.upper - self.lower))

    def _clamp(self, points: Tensor) -> Tensor:
        return points.clamp(self.lower, self.upper)


class L2Ball:
    """||adversarial - image||_2 <= eps for every image, in float64 arithmetic with eps as given."""

    def __init__(self, images: Tensor, eps: float) -> None:
        self.images, self.eps = images, eps

    def rows(self, index: Tensor) -> L2Ball:
        return L2Ball(self.images[index], self.eps)

    def step(self, points: Tensor, gradient: Tensor, size: float) -> Tensor:
        return self._project(points + size * _unit(gradient))

    def random_points(self, seeds: list[int]) -> Tensor:
        """Uniform in the ball, before the box cuts it."""
        directions = _unit(_random(self.images, seeds, torch.randn))
        shares = _random(self.images[:, :1, :1, :1], [seed ^ 1 for seed in seeds], torch.rand)
        return self._project(self.images + self.eps * shares ** (1 / self.images[0].numel()) * directions)

    def _project(self, points: Tensor) -> Tensor:
        centre = _double(self.images)
        change = _double(points) - centre
        lengths = change.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
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


def _inward(images: Tensor, wanted: Tensor, most: float | None = None) -> Tensor:
    """`wanted` (float64) in float32, a bit nearer to the images wherever rounding led away from them.

    Away is further than `wanted` is, or than `most` where given.
    """
    exact = _double(images)
    rounded = wanted.float()
    limit = (wanted - exact).abs()
    if most is not None:
        limit = limit.clamp_max(most)
    away = (rounded.double() - exact).abs() > limit
    return torch.where(away, torch.nextafter(rounded, exact.float()), rounded).to(images.device)
