"""Measurements of trained networks. Everything here that speaks of pixels takes them in [0, 1]."""

from .noise import pixel_noise
from .pixels import PixelModel, predictions
from .probes import linear_accuracy

__all__ = ["PixelModel", "linear_accuracy", "pixel_noise", "predictions"]
