"""What a reproduction is: the paper's figures and ours as types, and their JSON.

    reproduction = read_reproduction("results/table-5.json")
    for panel in reproduction.panels:
        for line in panel.lines:
            line.condition, line.recipe, line.seeds, [(cell.mean, cell.printed, cell.difference) for cell in line.cells]

A figure that was not measured has no values and a mean of None: it is never made up.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..errors import EvaluationError
from ..evaluation.results import Curve, Detail, Strip, Unit
from ..files import read_json, write_whole
from ..records import decode_fields, encode

FORMAT = 1
RANDOM = "not trained"  # the network of a curve that stands for no run
IMAGES = ("images", "train_images")  # in `Cell.how`: figures with other numbers of them are not compared


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One figure of one network of ours beside what the paper prints.

    Attributes:
        column: of the panel.
        values: seed -> measured; without a seed where it could not be computed.
        mean, deviation: over the seeds; the deviation is None of fewer than two.
        printed: the paper's figure.
        printed_text: how the paper qualifies it.
        difference: mean - printed.
        gain: over the plain twin of the same recipe, the mean over the seeds that both have; None without a twin that
            was measured on as many images.
        gain_deviation: of it, over these seeds.
        printed_gain: the same of the paper's figures.
        beyond: where nothing is known but that it is larger than all that was tried, for at least one seed: the largest
            of these.
        at_most: the largest value that the number of images allows, where it bounds the figure.
        unmeasured: where `beyond` is known, the seeds without any figure: the others without a value are beyond.
        how: how it was measured, of the first seed, as names and values to print; where the seeds differ in their
            numbers of images, all of these.
        images: then those of each seed, by the names in `IMAGES`.
        figure: its key in evaluation.json.
    """

    column: str
    unit: Unit
    values: Mapping[int, float] = dataclasses.field(default_factory=dict)
    mean: float | None = None
    deviation: float | None = None
    printed: float | None = None
    printed_text: str | None = None
    difference: float | None = None
    gain: float | None = None
    gain_deviation: float | None = None
    printed_gain: float | None = None
    beyond: float | None = None
    at_most: float | None = None
    unmeasured: tuple[int, ...] = ()
    how: Mapping[str, Detail] = dataclasses.field(default_factory=dict)
    images: Mapping[int, Mapping[str, Detail]] = dataclasses.field(default_factory=dict)
    figure: str | None = None

    @property
    def shown(self) -> float | None:
        """The mean, where it is one of all seeds: without those that are beyond all that was tried it is too small."""
        return None if self.beyond is not None else self.mean

    @classmethod
    def of(
        cls,
        column: str,
        unit: Unit,
        values: Mapping[int, float],
        printed: float | None = None,
        printed_text: str | None = None,
        how: Mapping[str, Detail] | None = None,
        figure: str | None = None,
    ) -> Cell:
        """A cell with mean, deviation and difference of the values that are known."""
        known = {seed: value for seed, value in values.items() if math.isfinite(value)}
        mean = statistics.fmean(known.values()) if known else None
        return cls(
            column=column,
            unit=unit,
            values=known,
            mean=mean,
            deviation=statistics.stdev(known.values()) if len(known) > 1 else None,
            printed=printed,
            printed_text=printed_text,
            difference=None if mean is None or printed is None else mean - printed,
            how=how or {},
            figure=figure if known else None,
        )

    def images_of(self, seed: int) -> dict[str, Detail | None]:
        """The numbers of images of a seed, by the names in `IMAGES`."""
        return {name: self.images.get(seed, self.how).get(name) for name in IMAGES}

    def over(self, twin: Cell, apart: Collection[int] = ()) -> Cell:
        """This cell with its gain over that of the plain twin, of the seeds of which both are on as many images.

        Without the seeds in `apart`, whose plain run is another training. No gain where one of them is beyond what was
        tried for a seed: that of the others would be another one.
        """
        bounded = self.beyond is not None or twin.beyond is not None
        gains = [
            value - twin.values[seed]
            for seed, value in self.values.items()
            if not bounded
            and seed in twin.values
            and seed not in apart
            and self.images_of(seed) == twin.images_of(seed)
        ]
        printed = None if self.printed is None or twin.printed is None else self.printed - twin.printed
        return dataclasses.replace(
            self,
            gain=statistics.fmean(gains) if gains else None,
            gain_deviation=statistics.stdev(gains) if len(gains) > 1 else None,
            printed_gain=printed,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One network of ours, over its seeds, beside a row of the paper.

    Attributes:
        row: the paper's: "CIFAR-10, ResNet-18".
        condition: "N-LR", the plain twin, "1-LR", "2-LR", "Bottle-LR", ...
        recipe: what ours was trained by; None: this scale has none for the row.
        network: the architecture of ours.
        masking: seed -> the verdict of the diagnosis of gradient masking, where it was asked for.
        printed_masking: what the paper's printed figures alone say of it.
    """

    row: str
    condition: str
    recipe: str | None
    network: str | None
    seeds: tuple[int, ...]
    cells: tuple[Cell, ...]
    masking: Mapping[int, str] = dataclasses.field(default_factory=dict)
    printed_masking: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """A table with the same columns for all of its lines.

    Attributes:
        positions: what the columns stand at, where they are numbers: the axis of the picture.
    """

    title: str
    columns: tuple[str, ...]
    lines: tuple[Line, ...]
    positions: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """A run that figures come from.

    Attributes:
        settings: the keys of its recipe that decide the training and are not at their default, and its seed if that is
            not the one of its folder; empty: not known.
        unlike: of each of them that the recipe of this making has differently, what it was and is; why there is no such
            recipe, if it has none.
        as_of: if it was no longer at hand, when its figures were taken; None: they are of this making.
    """

    folder: str  # below the folder of runs
    recipe: str
    condition: str
    seed: int
    model: str
    data: str
    train_images: int
    epochs: int
    clean_accuracy: float  # on all test images
    seconds: float
    device: str
    versions: Mapping[str, str]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    unlike: tuple[str, ...] = ()
    as_of: str | None = None  # ISO 8601


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reproduction:
    """One table, figure or claim of the paper beside ours: the content of results/NAME.json.

    Attributes:
        name: "table-5", "figure-2", "claim-sparsity".
        source: where it stands in the paper.
        scale: "smoke", "fast" or "paper".
        notice: what a reader must know of the scale first.
        statements: what the paper says about it in words.
        notes: deviations from the paper, and what is read differently.
        missing: what was not measured, in words.
        command: that gives this again.
        versions: of packages and, where it ran from a clone, the commit.
    """

    name: str
    title: str
    source: str
    scale: str
    notice: str
    command: str
    created: str  # ISO 8601
    versions: Mapping[str, str]
    panels: tuple[Panel, ...]
    curves: tuple[Curve, ...] = ()
    strips: tuple[Strip, ...] = ()
    runs: tuple[TrainedRun, ...] = ()
    statements: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


def read_reproduction(path: str | Path) -> Reproduction:
    """Reads results/NAME.json.

    Raises:
        EvaluationError: it cannot be read, is of another format, or is not complete.
    """
    content = read_json(Path(path), EvaluationError)
    if content.get("format") != FORMAT:
        raise EvaluationError(
            f"{path} is of format {content.get('format')!r}, not {FORMAT}: delete it and make it again with "
            "`timm-lowrank reproduce`"
        )
    problems: list[str] = []
    fields = decode_fields(Reproduction, content, problems, nulls=True)
    if problems:
        raise EvaluationError(f"{path} is damaged: {'; '.join(problems[:8])}: delete it and make it again")
    return Reproduction(**fields)


def write_reproduction(reproduction: Reproduction, path: Path) -> None:
    """Writes it whole or not at all; numbers that are not known are null."""
    write_whole(path, json.dumps({"format": FORMAT, **encode(reproduction)}, indent=1, allow_nan=False) + "\n")
