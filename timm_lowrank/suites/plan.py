"""`measurements_of`: what each suite measures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from ..errors import EvaluationError
from ..evaluation.arguments import RADIUS_UNITS, check_choice
from ..evaluation.noise import NOISE_READINGS
from .measurements.accuracy import PGD, AccuracyByRadius, AutoAttack, Clean, Diagnosis, PGDSteps, PixelNoise
from .measurements.base import Measurement
from .measurements.classifiers import UNTIL_FOOLED, Compression, FooledHybrid, Hybrid, LeadingFeatures, OtherLabels
from .measurements.perturbations import (
    AccuracyByNoise,
    AdversarialStrip,
    DeepFool,
    IteratedFGSM,
    MinimumPerturbation,
    OverSteps,
)
from .measurements.representations import Cushion, CutPreactivations, Plane, Sparsity, Spectrum, Stability

LEVEL = 1 / 255
NOISE = (0.4, 0.6, 0.8, 1.0)  # paper, Table 4
TABLE_RADII = tuple(level * LEVEL for level in (8, 10, 16, 20))  # paper, Table 1
SMALL_RADII = tuple(level * LEVEL for level in (2, 4, 8))
DIMENSIONS = (5, 10, 20)  # paper, Tables 5 and 8
EMBEDDINGS = (2, *DIMENSIONS, 50, 100, 200, 512)  # numbers per image that somebody might store
DIAGNOSED_RADIUS = 8 * LEVEL
GRID = tuple(level * LEVEL for level in (0.5, 1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32))


TABLE_SETTINGS = ("madry", "fixed", "paper")  # the steps that PGD of Table 1 may have had


@dataclasses.dataclass(frozen=True)
class Extent:
    """What may be chosen of a suite.

    Attributes:
        radius_units: of PGD and of the diagnosis.
        table_images: test images of the grid of Table 1; None are all.
        radii: of which the smallest that misclassifies nearly all is sought.
        random_network: whether the cushion of a network that was never trained is measured, too.
    """

    radius_units: tuple[str, ...] = ("pixel",)
    table_images: int | None = None
    radii: tuple[float, ...] = GRID
    random_network: bool = False


def _quick(extent: Extent) -> list[Measurement]:
    units = extent.radius_units
    return [
        Clean(),
        *(PGD("madry", eps, 20, radius_unit=unit) for unit in units for eps in SMALL_RADII),
        *(PGD("madry", 8 * LEVEL, 20, radius_unit=unit, black_box=True) for unit in units),
        *(PixelNoise(probability) for probability in NOISE),
        Spectrum(),
        Compression(DIMENSIONS),
        Stability(8 * LEVEL, 20),
        *(Diagnosis(DIAGNOSED_RADIUS, "quick", unit) for unit in units),
        AdversarialStrip("pgd"),
    ]


def _paper(extent: Extent) -> list[Measurement]:
    units, images = extent.radius_units, extent.table_images
    table = [
        PGDSteps(setting, eps, (7, 20), unit, images)
        for unit in units
        for setting in TABLE_SETTINGS
        for eps in TABLE_RADII
    ]
    return [
        Clean(),
        *(PGDSteps("madry", eps, (7, 20)) for eps in SMALL_RADII[:2]),
        *table,
        PGD("madry", 8 * LEVEL, 20, restarts=5),
        *(IteratedFGSM(least_likely, 8 * LEVEL, 10) for least_likely in (False, True)),
        *(IteratedFGSM(least_likely, 8 * LEVEL, 10, stop_at_success=True) for least_likely in (False, True)),
        DeepFool(),
        DeepFool(black_box=True),
        *(IteratedFGSM(least_likely, 8 * LEVEL, 10, black_box=True) for least_likely in (False, True)),
        *(
            MinimumPerturbation(least_likely, extent.radii, black_box=black_box)
            for black_box in (False, True)
            for least_likely in (False, True)
        ),
        *(OverSteps(least_likely, eps=0.1, step_size=0.01, steps=30) for least_likely in (False, True)),
        *(AccuracyByNoise(least_likely, 32 * LEVEL, 32) for least_likely in (False, True)),
        AccuracyByRadius(tuple(level * LEVEL for level in (0.5, 1, 2, 4, 6, 8, 12, 16)), 20),
        *(PixelNoise(probability, reading) for reading in NOISE_READINGS for probability in NOISE),
        Spectrum(uncentred=True),
        Compression(EMBEDDINGS),
        LeadingFeatures(EMBEDDINGS),
        Sparsity(),
        CutPreactivations(),
        Stability(8 * LEVEL, 20),
        Cushion(extent.random_network),
        Hybrid(8 * LEVEL, 20),
        *map(FooledHybrid, UNTIL_FOOLED),
        Plane(),
        OtherLabels(),
        *(Diagnosis(DIAGNOSED_RADIUS, "full" if unit == "pixel" else "quick", unit) for unit in units),
        AdversarialStrip("deepfool"),
        AdversarialStrip("pgd"),
    ]


def _autoattack(extent: Extent) -> list[Measurement]:
    units = extent.radius_units
    return [
        Clean(),
        *(PGDSteps("madry", eps, (7, 20), unit) for unit in units for eps in SMALL_RADII),
        *(AutoAttack("linf", eps) for eps in (2 * LEVEL, 8 * LEVEL)),
        AutoAttack("linf", 8 * LEVEL, black_box=True),
        AutoAttack("l2", 0.5),
        *(Diagnosis(DIAGNOSED_RADIUS, "full", unit) for unit in units),
        AdversarialStrip("pgd"),
    ]


@dataclasses.dataclass(frozen=True)
class Suite:
    """A set of measurements, and on how many images and in which units of a radius unless told otherwise."""

    measurements: Callable[[Extent], list[Measurement]]
    images: int
    train_images: int  # that PCA and linear classifiers are fitted on
    spectrum_images: int = 2500  # test images that spectra are taken of at most; wide layers get twice their width
    radius_units: tuple[str, ...] = ("pixel",)


SUITES = {
    "quick": Suite(_quick, 500, 2000),
    "paper": Suite(_paper, 1000, 5000, 10_000, RADIUS_UNITS),
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


def measurements_of(
    suites: Sequence[Suite],
    radius_units: Sequence[str] | None = None,
    table_images: int | None = None,
    radii: Sequence[float] | None = None,
    random_network: bool = False,
) -> list[Measurement]:
    """The measurements of all suites, each once; of two that differ in effort alone the later one.

    Args:
        radius_units: instead of those of the suites.
        table_images: test images of the grid of Table 1; None are all.
        radii, random_network: as of an `Extent`; None are its default.

    Raises:
        EvaluationError: an unknown unit, none, less than one image, or radii that are none.
    """
    for unit in () if radius_units is None else (radius_units or ("none",)):
        check_choice(unit, RADIUS_UNITS, "a unit of radii")
    if table_images is not None and table_images < 1:
        raise EvaluationError(f"--table-limit must be at least 1, not {table_images}")
    if radii is not None and not (radii and all(0 < eps <= 1 for eps in radii)):
        raise EvaluationError(f"--radii must be numbers of levels of 255, between 0 and 255, not {list(radii)}")
    grid = GRID if radii is None else tuple(sorted(set(radii)))
    measurements: dict[str, Measurement] = {}
    for suite in suites:
        units = suite.radius_units if radius_units is None else tuple(dict.fromkeys(radius_units))
        measurements |= {one.key: one for one in suite.measurements(Extent(units, table_images, grid, random_network))}
    chosen = measurements.values()
    if radius_units is not None and "pixel" not in radius_units and any(isinstance(one, AutoAttack) for one in chosen):
        raise EvaluationError(
            "AutoAttack has one radius for all channels, in parts of the pixel range: give --radius-unit pixel "
            "normalized for both beside each other, or leave out --suite autoattack"
        )
    return [one for one in chosen if not any(other.covers(one) for other in chosen)]
