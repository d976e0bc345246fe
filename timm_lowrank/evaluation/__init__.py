"""Measurements of trained networks. Everything here that speaks of pixels takes them in [0, 1]."""

from . import attacks, masking
from .checks import check_before_attack
from .cushion import layer_cushion
from .maxmargin import HybridModel, linear_accuracy, max_margin_classifiers, parameters_behind
from .noise import NOISE_READINGS, pixel_noise
from .pixels import PixelModel, classified_right, predictions
from .representations import activations, class_variance_ratio, fit_plane, rho, stability
from .robustness import deepfool_rho, minimum_perturbation, noise_at, smallest_radii, step_accuracies, trajectory

__all__ = [
    "NOISE_READINGS",
    "HybridModel",
    "PixelModel",
    "activations",
    "attacks",
    "check_before_attack",
    "class_variance_ratio",
    "classified_right",
    "deepfool_rho",
    "fit_plane",
    "layer_cushion",
    "linear_accuracy",
    "masking",
    "max_margin_classifiers",
    "minimum_perturbation",
    "noise_at",
    "parameters_behind",
    "pixel_noise",
    "predictions",
    "rho",
    "smallest_radii",
    "stability",
    "step_accuracies",
    "trajectory",
]
