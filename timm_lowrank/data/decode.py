"""From the bytes of one image file to pixels of the size that the network takes."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from .sources import require

INTERPOLATION = "bicubic"


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Decodes, and cuts and resizes where a size is given.

    Args:
        mode: "L" or "RGB".
        size: (height, width) of the pixels that are given. Without `resize`, images of any other size are an error.
        resize: whether images are brought to `size`: for training by a random part of the image that is stretched
            to it, otherwise by resizing the shorter side to size / crop_pct and cutting out the centre.
        crop_pct: see `resize`.
        augment: "crop-flip", "crop" (no mirroring) or "none" (training images are treated like test images).
        crop_scale: the smallest share of an image's area that a random part has; the largest is 1.
    """

    mode: str
    size: tuple[int, int]
    resize: bool = False
    crop_pct: float = 1.0
    augment: str = "none"
    crop_scale: float = 0.08

    def __call__(self, encoded: bytes, where: str, seed: int | None = None) -> Tensor:
        """(channels, height, width), uint8.

        Args:
            encoded: PNG, JPEG or what else pillow reads.
            where: file and row, for errors.
            seed: of the random part and the mirroring; None is for test images.

        Raises:
            DataError: it cannot be decoded, or has another size and `resize` is off.
        """
        image = open_image(encoded, where, self.mode)
        if self.resize:
            image = self._fitted(image) if seed is None or self.augment == "none" else self._random(image, seed)
        if (image.height, image.width) != self.size:
            raise DataError(
                f"{where}: the image is {image.width} x {image.height} pixels and the first one is "
                f"{self.size[1]} x {self.size[0]}: set image_size, so that they are brought to one size"
            )
        pixels = torch.from_numpy(np.array(image))
        return pixels[None] if self.mode == "L" else pixels.permute(2, 0, 1).contiguous()

    def _random(self, image: Any, seed: int) -> Any:
        transforms = require("torchvision.transforms.v2", "torchvision")
        crop = transforms.RandomResizedCrop(
            self.size, scale=(self.crop_scale, 1.0), interpolation=_interpolation(), antialias=True
        )
        # torchvision draws from the global generator: lent to it, so that nothing else depends on what it draws.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # and not those of the accelerators, which dropout draws from
            image = crop(image)
            return transforms.RandomHorizontalFlip()(image) if self.augment == "crop-flip" else image

    def _fitted(self, image: Any) -> Any:
        functional = require("torchvision.transforms.v2.functional", "torchvision")
        scale = max(self.size[0] / image.height, self.size[1] / image.width) / self.crop_pct
        larger = [
            max(side, round(scale * old)) for side, old in zip(self.size, (image.height, image.width), strict=True)
        ]
        return functional.center_crop(functional.resize(image, larger, _interpolation(), antialias=True), self.size)


def open_image(encoded: bytes, where: str, mode: str | None = None) -> Any:
    """A pillow image, converted to `mode`; without a mode as it is, and then only its header is read.

    Raises:
        DataError: it cannot be decoded.
    """
    image_module = require("PIL.Image", "pillow")
    try:
        image = image_module.open(io.BytesIO(encoded))
        return image if mode is None else image.convert(mode)
    except (OSError, ValueError, SyntaxError, image_module.DecompressionBombError) as error:
        raise DataError(f"{where}: the image cannot be decoded: {error}") from error


def _interpolation() -> Any:
    return require("torchvision.transforms", "torchvision").InterpolationMode(INTERPOLATION)
