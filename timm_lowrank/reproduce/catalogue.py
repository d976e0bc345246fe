"""For each table, figure and claim of the paper the runs that it needs, what is measured, and how it is laid out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeVar

import torch

from ..errors import EvaluationError, nearest
from ..evaluation.masking import PGDAccuracy, diagnose_published
from ..evaluation.representations import cut_spectrum
from ..evaluation.results import Unit
from ..suites.measurements.accuracy import AccuracyByRadius, AutoAttack, Diagnosis, PGDSteps, PixelNoise
from ..suites.measurements.base import Measurement
from ..suites.measurements.classifiers import (
    UNTIL_FOOLED,
    Compression,
    FooledHybrid,
    Hybrid,
    LeadingFeatures,
    OtherLabels,
)
from ..suites.measurements.perturbations import (
    AccuracyByNoise,
    AdversarialStrip,
    DeepFool,
    MinimumPerturbation,
    OverSteps,
)
from ..suites.measurements.representations import Cushion, CutPreactivations, Plane, Sparsity, Spectrum, Stability
from ..suites.plan import EMBEDDINGS, LEVEL, NOISE, SUITES, TABLE_RADII, measurements_of
from . import published
from .published import Printed
from .reproduction import Cell, Line, Panel
from .setups import (
    C10_R18,
    C10_R50,
    C10_VGG,
    C10_VIT,
    C100_R50,
    FINE_R50,
    PLAIN,
    RANK_FACTORS,
    SVHN_R18,
    SVHN_VGG,
)

Print = float | Printed | None
EMPTY: Mapping[str, Mapping[str, Sequence[Print]]] = {}
# The catalogue shows what these suites measure, and nothing else.
PAPER, AUTOATTACK = (tuple(measurements_of([SUITES[name]])) for name in ("paper", "autoattack"))
Kind = TypeVar("Kind", bound=Measurement)


def _measurement(kind: type[Kind], **settings: object) -> Kind:
    """The one measurement of the suites of this class and these settings."""
    (measurement,) = [one for one in PAPER + AUTOATTACK if type(one) is kind and vars(one).items() >= settings.items()]
    return measurement


def quickened(measurement: Measurement) -> Measurement | None:
    """What is measured in its place at a scale that is quick; None for nothing."""
    if isinstance(measurement, AutoAttack):
        return None  # half a minute of a small network that withstands it, however few images there are
    if isinstance(measurement, Diagnosis):
        return dataclasses.replace(measurement, budget="quick") if measurement.radius_unit == "pixel" else None
    if isinstance(measurement, MinimumPerturbation):
        return dataclasses.replace(measurement, radii=tuple(level * LEVEL for level in (2, 8, 16)))
    if isinstance(measurement, OverSteps | AccuracyByNoise):
        return dataclasses.replace(measurement, steps=8)
    return measurement


DIAGNOSES = {one.radius_unit: one for one in PAPER if isinstance(one, Diagnosis)}
COMPRESSION = _measurement(Compression)
STABILITY, HYBRID = _measurement(Stability), _measurement(Hybrid)
CUSHION = dataclasses.replace(_measurement(Cushion), random_network=True)
LEADING, SPECTRUM = _measurement(LeadingFeatures), _measurement(Spectrum)


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of a panel.

    Args:
        label: its heading.
        key: of the figure in evaluation.json; {inside} and {last} are the first and the last layer that was measured.
            Empty for what the summary of the run says.
        measurement: that makes the figure.
        unit: of the figure.
        source: "figure" takes its value, "detail" an entry of its protocol, "share replaced" how many parameters a
            linear classifier has over those that it replaces. Of the summary: "clean" is the accuracy on all test
            images, "target" the target rank of a layer, "nested" that of a classifier on the first features.
        detail: which entry; "inside" or "last"; how many features.
    """

    label: str
    key: str = ""
    measurement: Measurement | None = None
    unit: Unit = "share"
    source: Literal["figure", "detail", "share replaced", "clean", "target", "nested"] = "figure"
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the paper, or one of ours without a counterpart there: then nothing is printed."""

    setup: str
    condition: str
    printed: tuple[Print, ...] = ()
    verdict: str | None = None  # on gradient masking, by the paper's own figures


@dataclasses.dataclass(frozen=True)
class PanelPlan:
    """A table with the same columns for all of its rows.

    Args:
        positions: what the columns stand at, where they are numbers.
        masking: the unit of the radius of the diagnosis of gradient masking that stands beside each line; None: none.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    positions: tuple[float, ...] = ()
    masking: str | None = None


@dataclasses.dataclass(frozen=True)
class CurvePlan:
    """One plot: a curve of evaluation.json, of several networks together. `key` as of `Column`; "*" at its end takes
    every curve whose key begins so."""

    key: str
    measurement: Measurement
    rows: tuple[Row, ...]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A table, figure or claim of the paper.

    Args:
        name: "table-5".
        title: what it shows.
        source: where it stands in the paper.
        statements: what the paper says about it in words.
        notes: what is done otherwise, and what is read differently.
        strips: pictures of adversarial images: (measurement, key of the strip), of the rows in `shown`.
        compute: panels that need no run.
    """

    name: str
    title: str
    source: str
    panels: tuple[PanelPlan, ...] = ()
    curves: tuple[CurvePlan, ...] = ()
    statements: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    strips: tuple[tuple[Measurement, str], ...] = ()
    shown: tuple[Row, ...] = ()
    compute: Callable[[], tuple[Panel, ...]] | None = None

    @property
    def rows(self) -> tuple[Row, ...]:
        """Everything that it shows."""
        parts = [*(panel.rows for panel in self.panels), *(curve.rows for curve in self.curves), self.shown]
        return tuple(row for rows in parts for row in rows)


def _rows(setup: str, printed: Mapping[str, Sequence[Print]], *more: str) -> tuple[Row, ...]:
    """The rows of the paper with the plain twin first, and more conditions that it does not have."""
    conditions = dict.fromkeys([PLAIN, *printed, *more])
    return tuple(Row(setup, condition, tuple(printed.get(condition, ()))) for condition in conditions)


def _all_rows(printed: Mapping[str, Mapping[str, Sequence[Print]]], *more: str) -> tuple[Row, ...]:
    return tuple(row for setup, rows in printed.items() for row in _rows(setup, rows, *more))


# ------------------------------------------------------------------------------------------------------------- attacks


CLEAN = Column("clean", source="clean")
SETTINGS = {
    "madry": "random start, step radius/4",
    "fixed": "random start, step 2/255",
    "paper": "no random start, step 1/255 as Appendix D.1 prints it",
}
UNITS = {"pixel": "units of the pixel range", "normalized": "units of a channel's standard deviation (normalised)"}


def _pgd_columns(black_box: bool) -> dict[tuple[str, str], tuple[Column, ...]]:
    """For each reading of the paper's radius and step in the suite, (unit, setting), the columns of Table 1."""
    readings: dict[tuple[str, str], list[Column]] = {}
    for one in PAPER:
        if isinstance(one, PGDSteps) and one.eps in TABLE_RADII:
            readings.setdefault((one.radius_unit, one.setting), []).extend(
                Column(f"{round(255 * one.eps)}/255, {steps} steps", one.part(steps, black_box=black_box).key, one)
                for steps in one.steps
            )
    return {reading: (*columns, CLEAN) for reading, columns in readings.items()}


def _autoattack_panel(rows: tuple[Row, ...]) -> PanelPlan:
    """What the paper did not run, of the same networks."""
    attacks = {"L_inf 8/255": _measurement(AutoAttack, norm="linf", eps=8 * LEVEL, black_box=False)}
    attacks["L2 0.5"] = _measurement(AutoAttack, norm="l2", eps=0.5)
    columns = tuple(Column(label, one.key, one) for label, one in attacks.items())
    return PanelPlan(
        "AutoAttack (standard), radii in units of the pixel range: not in the paper",
        (*columns, CLEAN),
        tuple(Row(row.setup, row.condition) for row in rows),
    )


def _attack_panels(white: tuple[Row, ...], black: tuple[Row, ...] = ()) -> tuple[PanelPlan, ...]:
    """A panel for each reading of the radius and the step, the white box of all first; the last is of AutoAttack."""
    panels = []
    for title, rows, black_box in (("White box", white, False), ("Black box, crafted on N-LR", black, True)):
        for (unit, setting), columns in _pgd_columns(black_box).items() if rows else ():
            text = f"{title}: radius in {UNITS[unit]}, {SETTINGS[setting]}"
            panels.append(PanelPlan(text, columns, rows, masking=None if black_box else unit))
    return (*panels, _autoattack_panel(white))


def _diagnosed(rows: tuple[Row, ...], black: Mapping[str, Mapping[str, Sequence[Print]]] = EMPTY) -> tuple[Row, ...]:
    """Rows of Table 1 with what the paper's own figures say of gradient masking."""
    cells = [(eps, steps) for eps in TABLE_RADII for steps in (7, 20)]
    diagnosed = []
    for row in rows:
        transferred = black.get(row.setup, {}).get(row.condition, (None,) * len(cells))
        if row.printed:
            accuracies = [
                PGDAccuracy(eps=eps, steps=steps, white_box=_number(own), black_box=_number(other))
                for (eps, steps), own, other in zip(cells, row.printed, transferred, strict=False)
            ]
            clean = _number(row.printed[len(cells)]) if len(row.printed) > len(cells) else None
            row = dataclasses.replace(row, verdict=diagnose_published(accuracies, clean=clean).verdict)
        diagnosed.append(row)
    return tuple(diagnosed)


def _number(printed: Print) -> float | None:
    return printed.value if isinstance(printed, Printed) else printed


MASKING_NOTE = (
    "The diagnosis of gradient masking (at 8/255) stands beside each network: a figure of PGD that it calls masked is "
    "no robustness. Beside the paper's rows stands what can be told from its printed figures alone. Its ResNet-50 1-LR "
    "row withstands PGD-20 at 8/255 on 78.5 % of the images as a white box and on 56.8 % as a black box: an attack "
    "that sees the gradients does worse than one that does not."
)
BLACK_BOX_NOTE = "Black-box images are crafted on the plain twin of the same seed."


def _without_plain(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    return tuple(row for row in rows if row.condition != PLAIN)


# ----------------------------------------------------------------------------------------------------------- spectrums

SHOWN_DIRECTIONS = (1, 5, 10, 20)


def _spectrum_columns(*layers: str, uncentred: bool = False) -> tuple[Column, ...]:
    """The paper's formula takes activations as they are; a mean that is large then counts as the first direction."""
    columns = []
    ending = "-uncentred" if uncentred else ""
    for layer in layers:
        where = "before the last stage" if layer == "inside" else "before the classifier"
        columns += [
            Column(f"{where}: variance in {count}", f"variance-{{{layer}}}-{count}{ending}", SPECTRUM)
            for count in SHOWN_DIRECTIONS
        ]
        if not uncentred:
            columns.append(Column(f"{where}: effective rank", f"effective-rank-{{{layer}}}", SPECTRUM, "count"))
    return tuple(columns)


def _spectrum_entry(
    number: int, source: str, title: str, setup: str, conditions: Sequence[str], statements: tuple[str, ...] = ()
) -> Entry:
    rows = tuple(Row(setup, condition) for condition in conditions)
    return Entry(
        f"figure-{number}",
        title,
        source,
        panels=(
            PanelPlan(
                "Variance ratio and effective rank (99 %) of test activations",
                _spectrum_columns("last", "inside"),
                rows,
            ),
            PanelPlan(
                "Variance ratio of test activations as they are (not centred), as the paper's formula has it",
                _spectrum_columns("last", "inside", uncentred=True),
                rows,
            ),
        ),
        curves=tuple(CurvePlan(f"variance-{{{layer}}}", SPECTRUM, rows) for layer in ("last", "inside")),
        statements=statements,
    )


def _embedded(layer: str, sizes: Sequence[int | None]) -> tuple[Column, ...]:
    return tuple(
        Column(
            "all features" if size is None else f"{size} directions",
            f"compression-{{{layer}}}-{size or 'all'}",
            COMPRESSION,
        )
        for size in sizes
    )


def _cushion_entry(number: int, stage: int, setup: str, source: str) -> Entry:
    conditions = (PLAIN, "1-LR", "2-LR")
    return Entry(
        f"figure-{number}",
        f"Layer cushion of stage {stage}, {setup}",
        source,
        curves=(CurvePlan(f"cushion-layer{stage}*", CUSHION, tuple(Row(setup, one) for one in conditions)),),
    )


# -------------------------------------------------------------------------------------------------------------- claims


def _counter_example() -> tuple[Panel, ...]:
    matrix = torch.tensor([[1.0, -1, 1], [-1, 1, -1]])
    behind = cut_spectrum(matrix, torch.relu, 1).rank
    cells = (
        Cell.of("rank before ReLU", "count", {0: float(torch.linalg.matrix_rank(matrix))}, 1),
        Cell.of("rank behind ReLU", "count", {0: float(behind)}, 2),
    )
    line = Line(
        row="A = [[1, -1, 1], [-1, 1, -1]]", condition="", recipe="computed", network=None, seeds=(0,), cells=cells
    )
    return (Panel(title="Ranks", columns=tuple(cell.column for cell in cells), lines=(line,)),)


def _claims() -> list[Entry]:
    everything = "compression-{inside}-all"
    with_bottleneck = (PLAIN, "1-LR", "2-LR", "2-LR-light", "2-LR-strong", "Bottle-LR", "Bottle-2LR")
    one_lr = (PLAIN, "1-LR", "2-LR")
    directions = (
        Column("directions for 99 %, inside", "effective-rank-{inside}", SPECTRUM, "count"),
        Column("directions for 99 %, before the classifier", "effective-rank-{last}", SPECTRUM, "count"),
    )
    zeros = (
        Column("zeros before the last stage", "sparsity-{inside}", Sparsity()),
        Column("zeros before the classifier", "sparsity-{last}", Sparsity()),
    )
    ranks = ["2-LR" if factor == 1 else f"2-LR-ranks-x{factor:g}" for factor in RANK_FACTORS]
    return [
        Entry(
            "claim-sparsity",
            "Sparse activations are not activations of low rank",
            "Appendix A",
            panels=(
                PanelPlan(
                    "Share of zeros and directions that hold 99 % of the variance",
                    zeros + directions,
                    _rows(C10_R18, {"1-LR": published.SPARSITY}, "2-LR"),
                ),
            ),
            notes=('The paper\'s "after the 4th block" is read as the input of the classifier, behind the pooling.',),
        ),
        Entry(
            "claim-low-rank-preactivations",
            "Pre-activations cut to rank 100 give activations of full rank",
            "Appendix A",
            panels=(
                PanelPlan(
                    "Behind ReLU, before the last stage, not centred",
                    (
                        Column("rank", "cut-preactivations-{inside}-rank", CutPreactivations(), "count"),
                        Column("singular value 101", "cut-preactivations-{inside}-next", CutPreactivations(), "number"),
                        Column(
                            "singular value 1,000", "cut-preactivations-{inside}-tenfold", CutPreactivations(), "number"
                        ),
                        Column("share of the first 100", "cut-preactivations-{inside}-share", CutPreactivations()),
                    ),
                    _rows(C10_R18, {PLAIN: published.CUT}),
                ),
            ),
            statements=(
                '"in spite of setting a rank of 100 to the pre-activation matrix, the post-activation matrix had '
                'full rank"',
            ),
            notes=(
                "The paper does not say which network and layer it took, nor on how many images; singular values "
                "grow with their number. With fewer than 100 features or images the cut is to half of them.",
            ),
        ),
        Entry(
            "claim-relu-counter-example",
            "ReLU raises the rank of a matrix of rank 1",
            "Appendix A",
            compute=_counter_example,
        ),
        Entry(
            "claim-directions",
            "How many directions hold 99 % of the variance",
            "Section 3, Effective Rank",
            panels=(
                PanelPlan(
                    "Effective rank of test activations",
                    directions,
                    tuple(
                        Row(C10_R18, one, (None, Printed(10, "as low as 10")) if one == PLAIN else ()) for one in one_lr
                    ),
                ),
            ),
            statements=('"even for NLR, the effective rank is as low as 10" before the classifier',),
        ),
        Entry(
            "claim-noise",
            "LR networks take about twice the noise until half of the images are misclassified",
            "Section 3.1",
            panels=(_half_panel(tuple(Row(C10_R18, one) for one in with_bottleneck)),),
            statements=(
                '"to reach an adversarial mis-classification rate of 50%, our models require about twice the noise as '
                'the N-LR or Bottle-LR"',
            ),
        ),
        Entry(
            "claim-target-rank",
            "The target rank is not a sensitive hyper-parameter",
            "Section 3 and Appendix C",
            panels=(
                PanelPlan(
                    "2-LR with five pairs of target ranks",
                    (
                        Column("target rank inside", unit="count", source="target", detail="inside"),
                        Column("effective rank inside", "effective-rank-{inside}", SPECTRUM, "count"),
                        Column("target rank before the classifier", unit="count", source="target", detail="last"),
                        Column("effective rank before the classifier", "effective-rank-{last}", SPECTRUM, "count"),
                        CLEAN,
                        *_embedded("inside", (10,)),
                    ),
                    tuple(Row(C10_R18, condition) for condition in (PLAIN, *ranks)),
                ),
            ),
            statements=('"the training enforces a much lower rank than what it is set to"',),
        ),
        Entry(
            "claim-parameters",
            "The last stage and the classifier give way to a linear classifier",
            "Section 3.3, Table 5b",
            panels=(
                PanelPlan(
                    "Parameters behind the layer before the last stage",
                    (
                        Column("replaced", everything, COMPRESSION, "count", "detail", "replaces_parameters"),
                        Column(
                            "of the classifier on all features",
                            everything,
                            COMPRESSION,
                            "count",
                            "detail",
                            "parameters",
                        ),
                        Column("as a share of those replaced", everything, COMPRESSION, "share", "share replaced"),
                        Column(
                            "of it on 20 directions",
                            "compression-{inside}-20",
                            COMPRESSION,
                            "count",
                            "detail",
                            "parameters",
                        ),
                        Column("accuracy on all features", everything, COMPRESSION),
                        CLEAN,
                    ),
                    _rows(C10_R18, {"2-LR": published.REPLACED}),
                ),
            ),
            statements=(
                '"a smaller linear model which has only 0.02 times the number of parameters", "at the cost of a very '
                'slight drop in accuracy (< 1%)"',
            ),
        ),
    ]


# -------------------------------------------------------------------------------------------------------------- tables


def _noise_panels() -> tuple[PanelPlan, ...]:
    """One for each reading of the noise in the suite."""
    rows = _all_rows(published.NOISE, "2-LR-strong")
    readings = dict.fromkeys(one.reading for one in PAPER if isinstance(one, PixelNoise))
    panels = []
    for reading in readings:
        noises = [_measurement(PixelNoise, probability=probability, reading=reading) for probability in NOISE]
        columns = tuple(Column(f"p = {one.probability:g}", one.key, one) for one in noises)
        panels.append(PanelPlan(f"N(0, 128/255) read as: {reading}", columns, rows))
    return tuple(panels)


def _minimum(least_likely: bool, black_box: bool = False) -> MinimumPerturbation:
    return _measurement(MinimumPerturbation, least_likely=least_likely, black_box=black_box)


def _rho_columns(black_box: bool) -> tuple[Column, ...]:
    deepfool = _measurement(DeepFool, black_box=black_box)
    iterated = [_minimum(least_likely, black_box) for least_likely in (True, False)]
    return (
        Column("DeepFool", f"{deepfool.key}-rho", deepfool, "number"),
        *(Column(one.name, f"{one.key}-rho", one, "number") for one in iterated),
    )


def _radius_columns(black_box: bool) -> tuple[Column, ...]:
    return tuple(
        Column(one.name, one.key, one, "number") for one in (_minimum(least, black_box) for least in (True, False))
    )


def _fooled_columns(layer: str, box: str) -> tuple[Column, ...]:
    fooled = [_measurement(FooledHybrid, attack=attack) for attack in UNTIL_FOOLED]
    return tuple(Column(one.attack, f"{one.key}-{{{layer}}}-{box}", one) for one in fooled)


def _tables() -> list[Entry]:
    white = _diagnosed(_all_rows(published.WHITE_BOX, "2-LR-strong"), published.BLACK_BOX)
    black = tuple(row for row in _all_rows(published.BLACK_BOX, "2-LR-strong") if row.condition != PLAIN)
    fine = _measurement(OtherLabels)
    return [
        Entry(
            "table-1",
            "Accuracy under PGD",
            "Table 1, Section 3.1",
            panels=_attack_panels(white, black),
            notes=(MASKING_NOTE, BLACK_BOX_NOTE, published.TABLE_1_NOTE),
        ),
        Entry(
            "table-2",
            "PGD against other ways of regularizing and compressing",
            "Table 2, Section 3.1",
            panels=_attack_panels(_rows(C10_R50, published.COMPARED, "2-LR", "Bottle-LR", "Bottle-2LR", "Matryoshka")),
            notes=(
                MASKING_NOTE,
                'The paper calls its own row "LR (Ours)": by its figures it is 1-LR of Table 1. The last '
                "column of its table, test accuracy, is empty. Bottle-LR and Matryoshka are ours.",
            ),
        ),
        Entry(
            "table-3",
            "Minimum perturbation rho for 99 % misclassification",
            "Table 3, Section 3.1",
            panels=(
                PanelPlan(
                    "White box",
                    _rho_columns(False),
                    _rows(C10_R18, published.RHO_WHITE_BOX, "2-LR-strong"),
                    masking="pixel",
                ),
                PanelPlan(
                    "Black box, crafted on N-LR",
                    _rho_columns(True),
                    _without_plain(_rows(C10_R18, published.RHO_BLACK_BOX)),
                ),
            ),
            notes=(
                "Iterated attacks step by 1/255 and stop at success; the smallest radius of a grid to 32/255 counts.",
                "DeepFool: mean rho of the images that were right and are fooled.",
            ),
        ),
        Entry(
            "table-4",
            "Accuracy under random pixel noise",
            "Table 4, Section 3.2",
            panels=_noise_panels(),
            notes=("The paper leaves open what N(0, 128/255) is: every reading has a panel.",),
        ),
        Entry(
            "table-5",
            "Accuracy of a linear classifier on few directions",
            "Table 5, Section 3.3",
            panels=(
                PanelPlan(
                    "(a) before the classifier",
                    _embedded("last", (None, 10, 5)),
                    (
                        *_rows(C100_R50, published.EMBEDDED_LAST, "1-LR-head", "2-LR", "Bottle-LR"),
                        *(Row(C10_R18, one) for one in (PLAIN, "1-LR", "2-LR", "2-LR-light", "2-LR-strong")),
                    ),
                ),
                PanelPlan(
                    "(b) before the last stage",
                    _embedded("inside", (None, 20, 10, 5)),
                    (
                        *_rows(C10_R18, published.EMBEDDED_INSIDE, "1-LR", "2-LR-light", "2-LR-strong"),
                        *(Row(C10_VIT, one) for one in (PLAIN, "2-LR")),
                    ),
                ),
            ),
            notes=(
                "Every feature is scaled, projected by PCA of the training images, and classified by a linear "
                "classifier with hinge loss (Appendix C).",
            ),
        ),
        Entry(
            "table-6",
            "Max-margin hybrids on images that fool their network",
            "Table 6, Section 3.3, Appendix D.5",
            panels=(
                PanelPlan(
                    "White box: before the classifier, images crafted on the network itself until it errs",
                    _fooled_columns("last", "white"),
                    _rows(C10_R18, published.HYBRID_WHITE_BOX, "2-LR-strong"),
                ),
                PanelPlan(
                    "Black box: before the classifier, images crafted on N-LR until the network errs",
                    _fooled_columns("last", "black"),
                    _without_plain(_rows(C10_R18, published.HYBRID_BLACK_BOX)),
                ),
                PanelPlan(
                    "White box: before the last stage",
                    _fooled_columns("inside", "white"),
                    tuple(Row(C10_R18, one) for one in (PLAIN, "1-LR", "2-LR", "2-LR-strong")),
                ),
                PanelPlan(
                    "Images of PGD-20 at 8/255 on the network, and on the hybrid itself",
                    (
                        Column("hybrid before the classifier", "hybrid-{last}-fooled", HYBRID),
                        Column("hybrid before the last stage", "hybrid-{inside}-fooled", HYBRID),
                        Column("the hybrid attacked itself", "hybrid-{last}-attacked", HYBRID),
                    ),
                    tuple(Row(C10_R18, one) for one in (PLAIN, "1-LR", "2-LR", "2-LR-strong")),
                ),
            ),
            notes=(
                "An image that stops where its network begins to err is at the boundary, where another classifier may "
                "still be right: the last panel has images that go on, and attacks the hybrid itself.",
                "The paper's row of N-LR is at the noise that fools 1-LR. A run is measured alone here, at its own; "
                "`timm-lowrank evaluate 1-LR-RUN --against N-LR-RUN --suite paper` has both.",
            ),
        ),
        Entry(
            "table-7",
            "Test accuracy on further networks, data and labels",
            "Table 7, Appendix C.1",
            panels=(
                PanelPlan("(a) VGG-19 on CIFAR-10", (CLEAN,), _rows(C10_VGG, published.VGG_CLEAN)),
                PanelPlan(
                    "(b) SVHN",
                    (CLEAN,),
                    (
                        *_rows(SVHN_R18, published.SVHN_RESNET_CLEAN),
                        *_rows(SVHN_VGG, published.SVHN_VGG_CLEAN),
                    ),
                ),
                PanelPlan(
                    "(c) trained on the coarse labels of CIFAR-100, a linear classifier for",
                    (
                        Column("coarse labels", "compression-{last}-all", COMPRESSION),
                        Column("fine labels", f"{fine.key}-{{last}}", fine),
                    ),
                    _rows(C100_R50, published.TRANSFERRED, "2-LR"),
                ),
            ),
            notes=(
                "The paper trained on SVHN with its extra images, without augmentation.",
                "Clean accuracy is that on all test images.",
            ),
        ),
        Entry(
            "table-8",
            "Linear classifiers on few directions of VGG-19",
            "Table 8, Appendix C.2",
            panels=(
                PanelPlan(
                    "Before the first fully connected layer",
                    _embedded("inside", (None, 20, 10)),
                    _rows(C10_VGG, published.EMBEDDED_VGG),
                ),
            ),
        ),
        Entry(
            "table-9",
            "Accuracy under PGD, fine labels of CIFAR-100",
            "Table 9, Appendix D.2",
            panels=_attack_panels(
                _rows(FINE_R50, published.FINE_WHITE_BOX), _without_plain(_rows(FINE_R50, published.FINE_BLACK_BOX))
            ),
            notes=(BLACK_BOX_NOTE,),
        ),
        Entry(
            "table-10",
            "L_inf radius for 99 % misclassification",
            "Table 10, Appendix D.3",
            panels=(
                PanelPlan("White box", _radius_columns(False), _rows(C10_R18, published.RADIUS_WHITE_BOX)),
                PanelPlan(
                    "Black box, crafted on N-LR",
                    _radius_columns(True),
                    _without_plain(_rows(C10_R18, published.RADIUS_BLACK_BOX)),
                ),
            ),
            notes=("The smallest radius of a grid of multiples of 1/255 up to 32/255 (0.125).",),
        ),
    ]


# ------------------------------------------------------------------------------------------------------------- figures


def _noise_curves(rows: tuple[Row, ...]) -> tuple[CurvePlan, ...]:
    """Accuracy against the noise of DeepFool, Iter-LL-FGSM, Iter-FGSM, and PGD."""
    deepfool, pgd = _measurement(DeepFool, black_box=False), _measurement(AccuracyByRadius)
    iterated = [_measurement(AccuracyByNoise, least_likely=least_likely) for least_likely in (True, False)]
    return (
        CurvePlan(f"{deepfool.key}-accuracy-by-noise", deepfool, rows),
        *(CurvePlan(one.key, one, rows) for one in iterated),
        CurvePlan(f"{pgd.key}-rho", pgd, rows),
    )


def _half_panel(rows: tuple[Row, ...]) -> PanelPlan:
    """The noise that halves the accuracy."""
    deepfool, pgd = _measurement(DeepFool, black_box=False), _measurement(AccuracyByRadius)
    iterated = [_measurement(AccuracyByNoise, least_likely=least_likely) for least_likely in (True, False)]
    columns = (
        Column("DeepFool", f"{deepfool.key}-half", deepfool, "number"),
        *(Column(one.name, f"{one.key}-half", one, "number") for one in iterated),
        Column("PGD", f"{pgd.key}-half", pgd, "number"),
    )
    return PanelPlan("rho at which half of the images are misclassified", columns, rows, masking="pixel")


def _figures() -> list[Entry]:
    three = (PLAIN, "1-LR", "2-LR")
    networks = tuple(Row(C10_R18, one) for one in (*three, "2-LR-strong"))
    with_bottleneck = (*networks, Row(C10_R18, "Bottle-LR"), Row(C10_R18, "Bottle-2LR"))
    svhn = tuple(Row(SVHN_R18, one) for one in three)
    vgg = tuple(Row(C10_VGG, one) for one in (PLAIN, "2-LR"))
    deepfool = _measurement(AdversarialStrip, attack="deepfool")
    coarse = tuple(Row(C100_R50, one) for one in (PLAIN, "1-LR"))
    steps = [_measurement(OverSteps, least_likely=least_likely) for least_likely in (True, False)]
    class_columns = tuple(
        Column(text, f"class-variance-{{{layer}}}", SPECTRUM)
        for layer, text in (("last", "before the classifier"), ("inside", "before the last stage"))
    )
    return [
        _spectrum_entry(
            2,
            "Figure 2, Section 3",
            "Variance ratio against directions, ResNet-18 on CIFAR-10",
            C10_R18,
            (*three, "2-LR-light", "2-LR-strong"),
            statements=(
                '"Note that even for NLR, the effective rank is as low as 10" (after the last block)',
                '"2-LR is the only model that shows a (reasonably) low-rank structure on that layer" (before it)',
            ),
        ),
        Entry(
            "figure-3",
            "Adversarial images of DeepFool",
            "Figure 3, Section 3.1",
            strips=((deepfool, "deepfool"),),
            shown=tuple(Row(C10_R18, one) for one in three),
        ),
        Entry(
            "figure-4",
            "Accuracy against the perturbation, stability, layer cushion",
            "Figure 4, Section 3.2",
            curves=(
                *_noise_curves(with_bottleneck),
                CurvePlan("stability-{last}", STABILITY, networks),
                CurvePlan("cushion-fc", CUSHION, networks),
                CurvePlan("cushion-layer3*", CUSHION, networks),
                CurvePlan("cushion-layer4*", CUSHION, networks),
            ),
            panels=(
                _half_panel(with_bottleneck),
                PanelPlan(
                    "Median shift of the representation over that of the image",
                    tuple(
                        Column(text, f"stability-{{{layer}}}", STABILITY, "number")
                        for layer, text in (("last", "before the classifier"), ("inside", "before the last stage"))
                    ),
                    networks,
                    masking="pixel",
                ),
            ),
            statements=(
                '"to reach an adversarial mis-classification rate of 50%, our models require about twice the noise as '
                'the N-LR or Bottle-LR"',
            ),
            notes=("The perturbations of the stability plots are those of PGD-20 at 8/255.",),
        ),
        _spectrum_entry(
            5,
            "Figure 5, Appendix C.1",
            "Variance ratio against directions, VGG-19 on CIFAR-10",
            C10_VGG,
            (PLAIN, "2-LR"),
        ),
        _spectrum_entry(
            6, "Figure 6, Appendix C.1", "Variance ratio against directions, ResNet-18 on SVHN", SVHN_R18, three
        ),
        Entry(
            "figure-7",
            "Variance of each class in its first direction",
            "Figure 7, Appendix C.3",
            panels=(PanelPlan("Median over the classes, not centred", class_columns, networks),),
            curves=tuple(CurvePlan(f"class-variance-{{{layer}}}", SPECTRUM, networks) for layer in ("last", "inside")),
        ),
        Entry(
            "figure-8",
            "The plane of largest variance before the classifier",
            "Figure 8, Appendix C.4",
            curves=(CurvePlan("plane", Plane(), coarse),),
        ),
        Entry(
            "figure-9",
            "Accuracy against the perturbation, VGG-19 and SVHN",
            "Figure 9, Appendix D.2",
            curves=(*_noise_curves(vgg), *_noise_curves(svhn)),
        ),
        Entry(
            "figure-10",
            "Adversarial images of DeepFool",
            "Figure 10, Appendix D.3",
            strips=((deepfool, "deepfool"),),
            shown=tuple(Row(C10_R18, one) for one in three),
        ),
        Entry(
            "figure-11",
            "Instantaneous and cumulative accuracy over the steps",
            "Figure 11, Appendix D.4",
            curves=tuple(CurvePlan(one.key, one, (Row(C10_R18, PLAIN), Row(C10_R18, "1-LR"))) for one in steps),
        ),
        *(_cushion_entry(11 + stage, stage, C10_R18, f"Figure {11 + stage}, Appendix E.1") for stage in (1, 2, 3, 4)),
        Entry(
            "figure-16",
            "Stability of representations on SVHN",
            "Figure 16, Appendix E.2",
            curves=(CurvePlan("stability-{last}", STABILITY, svhn),),
        ),
        *(_cushion_entry(16 + stage, stage, SVHN_R18, f"Figure {16 + stage}, Appendix E.2") for stage in (1, 2, 3, 4)),
    ]


def _compactness() -> Entry:
    conditions = (PLAIN, "1-LR", "2-LR", "2-LR-light", "2-LR-strong", "Bottle-LR", "Bottle-2LR", "Matryoshka")
    rows = (
        *(Row(C10_R18, one) for one in conditions),
        *(Row(C10_VIT, one) for one in (PLAIN, "2-LR")),
    )
    leading = tuple(Column(f"{size}", f"leading-features-{{last}}-{size}", LEADING) for size in EMBEDDINGS)
    projected = {
        layer: tuple(Column(f"{size}", f"compression-{{{layer}}}-{size}", COMPRESSION) for size in EMBEDDINGS)
        for layer in ("last", "inside")
    }
    where = {"last": "before the classifier", "inside": "before the last stage"}
    sizes = tuple(map(float, EMBEDDINGS))
    return Entry(
        "figure-compactness",
        "Accuracy of a linear classifier against numbers per image",
        "not in the paper",
        panels=(
            *(
                PanelPlan(f"{where[layer]}: leading directions of PCA", columns, rows, sizes)
                for layer, columns in projected.items()
            ),
            PanelPlan(
                "before the classifier: the classifiers on the first features that the network was trained with",
                tuple(Column(f"{size}", source="nested", detail=f"{size}") for size in EMBEDDINGS),
                (Row(C10_R18, "Matryoshka"),),
                sizes,
            ),
            PanelPlan(
                "before the classifier: the first features as they are",
                leading,
                tuple(Row(C10_R18, one) for one in (PLAIN, "Matryoshka")),
                sizes,
            ),
        ),
        notes=(
            "N-LR is what one has without any of this: the plain network and PCA.",
            "Matryoshka is trained for its first features; the plain network's first features stand beside them.",
        ),
    )


ENTRIES = {entry.name: entry for entry in (*_tables(), *_figures(), _compactness(), *_claims())}


def entry_of(name: str) -> Entry:
    """An entry by name. Raises an EvaluationError if there is none."""
    if name not in ENTRIES:
        raise EvaluationError(f"there is no {name!r} to reproduce. {nearest(name, ENTRIES)} --list names all")
    return ENTRIES[name]
