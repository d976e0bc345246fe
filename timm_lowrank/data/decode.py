"""From the bytes of one image file to pixels of the size that the network takes."""

from __future__ import annotations

import dataclasses
import io
import math
from itertools import islice
from typing import Any

import numpy as np
import torch

from ..environment import require
from ..errors import DataError, ImageSizesError
from .sources import Source, Split

INTERPOLATION = "bicubic"
LONGEST = 8  # times the side that is cut out of an image: what is resized of it at most
PROBED = 32  # images whose headers are looked at, at either end of a split
MODES = {"rgb": "RGB", "grey": "L"}  # what may be declared, and what pillow calls it
DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N")  # modes of pillow for grey values of 16 bits
DEEP_AS_I = ("PNG", "PPM")  # formats whose 16 bits pillow may open as "I"; of all others that mode is signed or 32 bits
GREY = ("1", "L", "LA", *DEEP)
ORIENTATION = 0x0112  # of EXIF
UPRIGHT = {
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE",
    8: "ROTATE_90",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Decodes, and cuts and resizes where a size is given.

    Args:
        mode: "L" or "RGB".
        declared: whether `mode` was asked for, so that coloured images are made grey; else one is an error.
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
    declared: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the pixels that are given."""
        return (1 if self.mode == "L" else 3, *self.size)

    def __call__(self, encoded: bytes, where: str, seed: int | None = None) -> np.ndarray:
        """(channels, height, width), uint8.

        Args:
            encoded: PNG, JPEG or what else pillow reads.
            where: file and row, for errors.
            seed: of the random part and the mirroring; None is for test images.

        Raises:
            DataError: it cannot be decoded, or has another size and `resize` is off.
        """
        image = _opened(encoded, where, self.mode, self.declared)
        if self.resize:
            image = self._fitted(image) if seed is None or self.augment == "none" else self._random(image, seed)
        if (image.height, image.width) != self.size:
            raise DataError(
                f"{where}: the image is {image.width} x {image.height} pixels and the first one is "
                f"{self.size[1]} x {self.size[0]}: set image_size, so that they are brought to one size"
            )
        pixels = np.asarray(image)
        return pixels[None] if self.mode == "L" else np.ascontiguousarray(pixels.transpose(2, 0, 1))

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
        # Of a line of 8,000 x 1 pixels, scaled as a whole, all but the centre would be gigabytes for nothing.
        most = [math.ceil(LONGEST * side / scale) for side in self.size]
        kept = [
            min(old, side + (old - side) % 2)  # about the same centre
            for side, old in zip(most, (image.height, image.width), strict=True)
        ]
        if kept != [image.height, image.width]:
            image = functional.center_crop(image, kept)
        larger = [
            max(side, round(scale * old)) for side, old in zip(self.size, (image.height, image.width), strict=True)
        ]
        return functional.center_crop(functional.resize(image, larger, _interpolation(), antialias=True), self.size)


def find_decoder(
    source: Source,
    image_size: int | None = None,
    crop_pct: float = 0.875,
    augment: str = "none",
    crop_scale: float = 0.08,
    mode: str | None = None,
) -> Decoder:
    """The decoder for all images of a data set: grey if all are, and of the size of the first if none is given.

    Of a data set on the Hub that is read whenever it is needed, the first and the last images of its splits decide: a
    coloured one among grey ones is then an error when its turn comes.

    Args:
        mode: "rgb" or "grey" decides instead.

    Raises:
        DataError: an image cannot be decoded, images are not of one kind, or an unknown mode.
    """
    if mode is not None and mode not in MODES:
        raise DataError(f"data_args.mode={mode!r} is not one of {', '.join(MODES)}, or null")
    train, test = source.train, source.test
    rows = np.arange(min(PROBED, len(train)))
    images = [_opened(item.image, item.where, upright=image_size is None) for item in islice(train.read(rows), PROBED)]
    pillow = MODES.get(mode or "", "L" if all(map(_is_grey, images)) else "RGB")
    sizes = {(image.height, image.width) for image in images}
    if image_size is not None:
        decoder = Decoder(pillow, (image_size, image_size), True, crop_pct, augment, crop_scale)
    elif len(sizes) > 1:
        shown = ", ".join(f"{width} x {height}" for height, width in sorted(sizes)[:3])
        raise ImageSizesError(f"{train.name} holds images of different sizes ({shown}): set image_size")
    else:
        decoder = Decoder(pillow, sizes.pop())
    if mode is not None:
        decoder = dataclasses.replace(decoder, declared=True)
    elif pillow == "L" and _coloured(train, source.remote) is not None:
        decoder = dataclasses.replace(decoder, mode="RGB")
    elif pillow == "L" and (where := _coloured(test, source.remote)) is not None:
        raise DataError(
            f"training images are grey and test images are not ({where}): set data_args.mode=rgb or grey, "
            "which all images of both are then made"
        )
    first = next(test.read(np.arange(1)))
    decoder(first.image, first.where)  # a test set of another size is found before training
    return decoder


def _coloured(split: Split, remote: bool) -> str | None:
    """Where an image is that is not grey; of PNGs, as most grey data sets are, the byte that says it is enough, and of
    portable greymaps the first two.

    Of a `remote` split alone the first and the last ones are looked at.
    """
    rows = np.arange(len(split))
    if remote:
        rows = np.union1d(rows[:PROBED], rows[-PROBED:])
    for item in split.read(rows):
        if (item.image[:8] == b"\x89PNG\r\n\x1a\n" and item.image[25:26] == b"\0") or item.image[:2] == b"P5":
            continue
        if not _is_grey(_opened(item.image, item.where)):
            return item.where
    return None


def _is_grey(image: Any) -> bool:
    """Whether a pillow image has one channel, transparency apart, or a palette of greys."""
    if image.mode == "P":
        palette = np.reshape(image.getpalette("RGB") or (), (-1, 3))
        return bool((palette == palette[:, :1]).all())
    return image.mode in GREY


def _opened(
    encoded: bytes, where: str, mode: str | None = None, declared: bool = False, *, upright: bool = False
) -> Any:
    """A pillow image, converted to `mode` and upright as its EXIF orientation says; without a mode as it is.

    Args:
        encoded, where, declared: as of `Decoder`.
        mode: "L" or "RGB".
        upright: whether it is turned without a mode, too, which decodes the image.

    Raises:
        DataError: it cannot be decoded, is of 32 bits, or is coloured where "L" is wanted but was not `declared`.
    """
    image_module = require("PIL.Image", "pillow")
    try:
        image = image_module.open(io.BytesIO(encoded))
        if mode is None:
            return _upright(image) if upright else image
        kind = image.format
        image = _upright(image)
        if mode == "L" and not declared and not _is_grey(image):
            raise DataError(
                f"{where}: the image is coloured, and those that were looked at before training are grey: declare what "
                "all are made with data_args.mode=rgb or data_args.mode=grey"
            )
        if image.mode == "F" or (image.mode == "I" and kind not in DEEP_AS_I):
            raise DataError(f"{where}: the image has values of 32 bits, whose range is not known: store 8 or 16 bits")
        if image.mode in DEEP:  # convert() would cut at 255
            image = image_module.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return image.convert(mode)
    except (OSError, ValueError, SyntaxError, image_module.DecompressionBombError) as error:
        raise DataError(f"{where}: the image cannot be decoded: {error}") from error


def _upright(image: Any) -> Any:
    """A pillow image, turned as its EXIF orientation says.

    Not pillow's `exif_transpose`, which writes all tags anew, to leave that one out, and raises for an image whose
    pixels are sound where it cannot: for a unit of the resolution in words, say.
    """
    image.load()
    method = UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    return image if method is None else image.transpose(require("PIL.Image", "pillow").Transpose[method])


def _interpolation() -> Any:
    return require("torchvision.transforms", "torchvision").InterpolationMode(INTERPOLATION)
