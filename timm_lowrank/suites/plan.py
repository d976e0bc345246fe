"""`measurements_of`: what each suite measures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from ..errors import EvaluationError
from ..evaluation.noise import VARIANCE
from .measurements.accuracy import PGD, AccuracyByRadius, AutoAttack, Clean, Diagnosis, PixelNoise
from .measurements.base import Measurement
from .measurements.classifiers import Compression, Hybrid, LeadingFeatures, OtherLabels
from .measurements.perturbations import AdversarialStrip, DeepFool, IteratedFGSM, MinimumPerturbation, OverSteps
from .measurements.representations import Cushion, CutPreactivations, Plane, Sparsity, Spectrum, Stability

LEVEL = 1 / 255
NOISE = (0.4, 0.6, 0.8, 1.0)  # paper, Table 4
TABLE_RADII = tuple(level * LEVEL for level in (8, 10, 16, 20))  # paper, Table 1
SMALL_RADII = tuple(level * LEVEL for level in (2, 4, 8))
DIMENSIONS = (5, 10, 20)  # paper, Tables 5 and 8
EMBEDDINGS = (2, *DIMENSIONS, 50, 100, 200, 512)  # numbers per image that somebody might store
DIAGNOSED_RADIUS = 8 * LEVEL
GRID = tuple(level * LEVEL for level in (0.5, 1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32))


def _quick() -> list[Measurement]:
    return [
        Clean(),
        *(PGD("madry", eps, 20) for eps in SMALL_RADII),
        PGD("madry", 8 * LEVEL, 20, black_box=True),
        *(PixelNoise(probability) for probability in NOISE),
        Spectrum(),
        Compression(DIMENSIONS),
        Stability(8 * LEVEL, 20),
        Diagnosis(DIAGNOSED_RADIUS, "quick"),
        AdversarialStrip("pgd"),
    ]


def _paper() -> list[Measurement]:
    return [
        Clean(),
        *(PGD("madry", eps, steps) for eps in (*SMALL_RADII[:2], *TABLE_RADII) for steps in (7, 20)),
        *(PGD("paper", eps, steps) for eps in TABLE_RADII for steps in (7, 20)),
        PGD("madry", 8 * LEVEL, 20, restarts=5),
        *(PGD("madry", eps, steps, black_box=True) for eps in TABLE_RADII for steps in (7, 20)),
        *(IteratedFGSM(least_likely, 8 * LEVEL, 10) for least_likely in (False, True)),
        *(IteratedFGSM(least_likely, 8 * LEVEL, 10, stop_at_success=True) for least_likely in (False, True)),
        DeepFool(),
        DeepFool(black_box=True),
        *(IteratedFGSM(least_likely, 8 * LEVEL, 10, black_box=True) for least_likely in (False, True)),
        *(MinimumPerturbation(least_likely, GRID) for least_likely in (False, True)),
        *(MinimumPerturbation(least_likely, GRID, black_box=True) for least_likely in (False, True)),
        *(OverSteps(least_likely, eps=0.1, step_size=0.01, steps=30) for least_likely in (False, True)),
        AccuracyByRadius(tuple(level * LEVEL for level in (0.5, 1, 2, 4, 6, 8, 12, 16)), 20),
        *(PixelNoise(probability) for probability in NOISE),
        *(PixelNoise(probability, VARIANCE.name) for probability in NOISE),
        Spectrum(),
        Compression(EMBEDDINGS),
        LeadingFeatures(EMBEDDINGS),
        Sparsity(),
        CutPreactivations(),
        Stability(8 * LEVEL, 20),
        Cushion(),
        Hybrid(8 * LEVEL, 20),
        Plane(),
        OtherLabels(),
        Diagnosis(DIAGNOSED_RADIUS, "full"),
        AdversarialStrip("deepfool"),
        AdversarialStrip("pgd"),
    ]


def _autoattack() -> list[Measurement]:
    return [
        Clean(),
        *(PGD("madry", eps, steps) for eps in SMALL_RADII for steps in (7, 20)),
        *(PGD("madry", eps, 20, black_box=True) for eps in SMALL_RADII),
        *(AutoAttack("linf", eps) for eps in (2 * LEVEL, 8 * LEVEL)),
        AutoAttack("linf", 8 * LEVEL, black_box=True),
        AutoAttack("l2", 0.5),
        Diagnosis(DIAGNOSED_RADIUS, "full"),
        AdversarialStrip("pgd"),
    ]


@dataclasses.dataclass(frozen=True)
class Suite:
    """A set of measurements, and on how many images unless told otherwise."""

    measurements: Callable[[], list[Measurement]]
    images: int
    train_images: int  # that PCA and linear classifiers are fitted on


SUITES = {
    "quick": Suite(_quick, 500, 2000),
    "paper": Suite(_paper, 1000, 5000),
    "autoattack": Suite(_autoattack, 1000, 2000),
}


def chosen_suites(names: Sequence[str]) -> list[Suite]:
    """The suites of these names.

    Raises:
        EvaluationError: no or an unknown name.
    """
    unknown = [name for name in names if name not in SUITES]
    if unknown or not names:
        raise EvaluationError(f"there is no suite {', '.join(unknown) or 'given'}: choose of {', '.join(SUITES)}")
    return [SUITES[name] for name in names]


def measurements_of(suites: Sequence[Suite]) -> list[Measurement]:
    """The measurements of all suites, each once; of two that differ in effort alone the later one."""
    return list({measurement.key: measurement for suite in suites for measurement in suite.measurements()}.values())
