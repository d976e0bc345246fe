"""Measurements of trained networks. Everything here that speaks of pixels takes them in [0, 1]."""

from ..errors import EvaluationError, EvaluationWarning
from . import attacks, masking
from .activations import activation_batches, activations
from .checks import check_before_attack
from .cushion import Histograms, histograms, layer_cushion, operator_norm, weight_layers
from .hybrid import HybridModel, HybridVerdict, judge_hybrid, parameters_behind
from .intervals import wilson
from .maxmargin import (
    CompressionRow,
    MaxMarginClassifier,
    compression,
    label_transfer,
    max_margin_classifiers,
)
from .minimum import (
    MinimumPerturbation,
    SmallestRadii,
    classified_right,
    deepfool_rho,
    minimum_perturbation,
    smallest_radii,
)
from .noise import NOISE_READINGS, STANDARD_DEVIATION, VARIANCE, NoiseReading, pixel_noise
from .perturbation import DefinedMean, Stability, mean_where_defined, rho, stability
from .pixels import PixelModel, predictions
from .plane import Plane, fit_plane
from .probes import linear_accuracy
from .trajectory import StepAccuracies, step_accuracies, trajectory, until_fooled
from .variance import class_variance_ratio

__all__ = [
    "NOISE_READINGS",
    "STANDARD_DEVIATION",
    "VARIANCE",
    "CompressionRow",
    "DefinedMean",
    "EvaluationError",
    "EvaluationWarning",
    "Histograms",
    "HybridModel",
    "HybridVerdict",
    "MaxMarginClassifier",
    "MinimumPerturbation",
    "NoiseReading",
    "PixelModel",
    "Plane",
    "SmallestRadii",
    "Stability",
    "StepAccuracies",
    "activation_batches",
    "activations",
    "attacks",
    "check_before_attack",
    "class_variance_ratio",
    "classified_right",
    "compression",
    "deepfool_rho",
    "fit_plane",
    "histograms",
    "judge_hybrid",
    "label_transfer",
    "layer_cushion",
    "linear_accuracy",
    "masking",
    "max_margin_classifiers",
    "mean_where_defined",
    "minimum_perturbation",
    "operator_norm",
    "parameters_behind",
    "pixel_noise",
    "predictions",
    "rho",
    "smallest_radii",
    "stability",
    "step_accuracies",
    "trajectory",
    "until_fooled",
    "weight_layers",
    "wilson",
]
