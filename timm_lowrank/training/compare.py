"""`compare_runs`: the figures of several runs side by side, averaged over seeds, from their evaluation files."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import RecipeError, RunError
from ..evaluation.results import Evaluation, Figure, Kind, headline, read_evaluation
from ..text import columns, numbered, one_line, percent
from .recipe import Recipe, read_recipe
from .run import ASIDE_OF_TRAINING, FREE, OF_BRANCHES, Run, RunPaths

RADII = {
    "pixel": "Radii are parts of the pixel range.",
    "normalized": "Those called normalised are parts of the standard deviation of each channel.",
}
KINDS = (Kind.NOISE, Kind.VARIANCE, Kind.COMPRESSION, Kind.EFFECTIVE_RANK)  # beside the headline
# What may differ between the recipes of two runs whose plain networks are the same experiment.
NOT_OF_PLAIN = (*FREE, *OF_BRANCHES, *ASIDE_OF_TRAINING, "seed")
Parts = tuple[str, ...]  # of a path
Member = tuple[str, Evaluation, str]  # the folder of a run or a title, the evaluation and the title there


@dataclasses.dataclass(frozen=True)
class ComparedFigure:
    """One row of the table."""

    key: str
    label: str
    unit: str  # "share", "number" or "count"
    radius_unit: str | None  # of an attack: "pixel", "normalized"
    values: dict[str, list[float]]  # group -> of each run, without groups that it was not measured on
    # Where the figure is not on as many images everywhere, as spectra may be: group -> the numbers of images.
    images: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    # Where the number of images bounds the figure of a run, as that of a rank: group -> the bounds.
    at_most: dict[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)

    def average(self, group: str) -> tuple[float, float | None]:
        """Mean and standard deviation over the runs of a group; there is no deviation of a single one."""
        values = self.values[group]
        return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None

    def cell(self, group: str) -> str:
        """Mean and standard deviation, shares in per cent: 63.4 ± 1.2."""
        if group not in self.values:
            return "-"
        mean, deviation = self.average(group)
        if self.unit == "share":
            spread = "" if deviation is None else f" ± {100 * deviation:.1f}"
            return percent(mean) + spread
        decimals = max(0, 2 - math.floor(math.log10(abs(mean)))) if mean else 2  # three digits of the mean
        if self.unit == "count":
            decimals = 0 if deviation is None else min(decimals, 1)
        spread = "" if deviation is None else f" ± {deviation:,.{decimals}f}"
        return f"{mean:,.{decimals}f}{spread}"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Runs side by side."""

    groups: dict[str, tuple[str, ...]]  # name -> the folders or titles of its runs
    figures: tuple[ComparedFigure, ...]

    def table(self) -> str:
        """For a terminal, a figure a line; shares in per cent, with the standard deviation over runs."""
        names = {group: one_line(group) for group in self.groups}
        counts = {group: f" ({len(runs)})" if len(runs) > 1 else "" for group, runs in self.groups.items()}
        heading = ["", *(names[group] + counts[group] for group in self.groups)]
        rows = [
            [one_line(figure.label), *(self._cell(figure, group) for group in self.groups)] for figure in self.figures
        ]
        table = columns([heading, *rows], right=range(1, len(heading)))
        units = {figure.radius_unit for figure in self.figures}
        notes = [RADII[unit] for unit in RADII if unit in units]
        return "\n\n".join([table, " ".join(notes)]) if notes else table

    def _cell(self, figure: ComparedFigure, group: str) -> str:
        """With the number of runs that the figure is of, where it is not of all, and of images, where they differ, and
        with what the images allow at most, where more of them might give more."""
        measured, runs = len(figure.values.get(group, ())), len(self.groups[group])
        fewer = f" [{measured} of {runs}]" if 0 < measured < runs else ""
        on = " or ".join(f"{images:,}" for images in figure.images.get(group, ()))
        bound = " or ".join(f"{most:,.0f}" for most in figure.at_most.get(group, ()))
        bounded = f" [at most {bound}]" if bound else ""
        return figure.cell(group) + fewer + (f" [on {on} images]" if on else "") + bounded

    def to_dict(self) -> dict[str, Any]:
        """The groups, and for each figure and group the values of the runs, their mean and deviation."""
        figures: dict[str, Any] = {}
        for figure in self.figures:
            groups = {
                group: dict(zip(("mean", "deviation"), figure.average(group), strict=True), values=values)
                for group, values in figure.values.items()
            }
            figures[figure.key] = {"label": figure.label, "unit": figure.unit, "groups": groups}
            if figure.radius_unit:
                figures[figure.key]["radius_unit"] = figure.radius_unit
            if figure.images:
                figures[figure.key]["images"] = {group: list(numbers) for group, numbers in figure.images.items()}
            if figure.at_most:
                figures[figure.key]["at_most"] = {group: list(bounds) for group, bounds in figure.at_most.items()}
        return {"groups": {group: list(runs) for group, runs in self.groups.items()}, "figures": figures}


def compare_runs(folders: Sequence[str | Path]) -> Comparison:
    """Compares runs by their evaluation.json: nothing is measured again.

    Runs in one folder whose names differ in a trailing "-seedN" alone are one group and are averaged. Networks that
    were evaluated beside a run, such as its plain twin, have groups of their own, named by their titles there: one for
    those beside the runs of a group, and of all groups whose recipes differ in seed and branches alone. Each network
    counts once. A name that several groups have is preceded by the folder. The figures are clean accuracy, PGD (where
    it was measured, in both units of its radius), AutoAttack, noise, and for each layer its effective rank, the
    variance in its leading directions and the accuracy of max-margin classifiers on these. Where one of them was not
    measured on as many images everywhere, it says on how many; where their number bounds it, by what.

    Raises:
        RunError: a folder is no finished run, was not evaluated, or was evaluated on other images than the others.
        EvaluationError: an evaluation.json is damaged.
    """
    evaluations = _read([RunPaths(folder) for folder in folders])
    # By what tells a group from the others, the path of its runs or experiment and title: its place and its networks.
    found: dict[Any, tuple[Parts, list[Member]]] = {}
    experiments: dict[Parts, Any] = {}  # of the plain twins of a group
    seen: set[str] = set()
    own = [(run, run, evaluation, evaluation.titles[0]) for run, evaluation in evaluations.items()]
    beside = [(run, title, evaluation, title) for run, _, evaluation, _ in own for title in evaluation.titles[1:]]
    for number, (run, name, evaluation, title) in enumerate([*own, *beside]):
        weights = evaluation.networks[evaluation.titles.index(title)].weights
        if weights is None or weights not in seen:
            place = key = _parts(run)
            if number >= len(own):
                experiment = experiments.setdefault(place, _plain_experiment(run) or place)
                place, key = (*place, _without_seed(title)), (experiment, _without_seed(title))
            found.setdefault(key, (place, []))[1].append((name, evaluation, title))
        seen |= {weights} if weights else set()
    names = _shortest([place for place, _ in found.values()])
    groups = {name: members for name, (_, members) in zip(names, found.values(), strict=True)}
    named = {group: tuple(name for name, _, _ in members) for group, members in groups.items()}
    return Comparison(named, tuple(_compared(groups)))


def _without_seed(name: str) -> str:
    return re.sub(r"(?<=.)-seed\d+$", "", name)


def _parts(run: str) -> Parts:
    """The path of a run without its seed."""
    folder = Path(os.path.abspath(run))
    return (*folder.parent.resolve().parts, _without_seed(folder.name))


def _plain_experiment(run: str) -> str | None:
    """What the plain twin of a run is trained with, apart from the seed; None if there is no recipe to read."""
    try:
        recipe = Recipe.from_dict(read_recipe(RunPaths(run).config))
    except RecipeError:
        return None
    plain = {key: value for key, value in recipe.plain().to_dict().items() if key not in NOT_OF_PLAIN}
    return json.dumps(plain, sort_keys=True, default=str)


def _shortest(places: Sequence[Parts]) -> list[str]:
    """Of each path the last part, or as many as tell it from the others."""
    names = []
    for place in places:
        lengths = range(1, len(place) + 1)
        apart = (n for n in lengths if sum(other[-n:] == place[-n:] for other in places) == 1)
        names.append("/".join(place[-next(apart, len(place)) :]))
    return numbered(names)


def _read(runs: Sequence[RunPaths]) -> dict[str, Evaluation]:
    missing = [run.folder for run in runs if not run.evaluation_json.is_file()]
    for folder in missing:
        Run.open(folder)  # says what it is, if it is no finished run
    if missing:
        raise RunError(
            f"not evaluated yet: {', '.join(map(str, missing))} (no evaluation.json). Evaluate each with: "
            f"timm-lowrank evaluate {missing[0]}"
        )
    evaluations = {str(run.folder): read_evaluation(run.evaluation_json) for run in runs}
    (first, reference), *others = evaluations.items()
    for other, evaluation in others:
        for name in ("fingerprint", "images", "train_images"):  # of different ones an average would mean nothing
            one, two = getattr(reference.data, name), getattr(evaluation.data, name)
            if one != two:
                raise RunError(
                    f"{first} and {other} were evaluated on different images ({name} {one} and {two}): "
                    "evaluate them again on the same, with --overwrite"
                )
    return evaluations


def _compared(groups: dict[str, list[Member]]) -> list[ComparedFigure]:
    """The figures in the order of the first evaluation that has them."""
    figures: dict[str, Figure] = {}
    for runs in groups.values():
        for _, evaluation, _ in runs:
            wanted = [*headline(evaluation), *_normalized(evaluation), *evaluation.by_kind(*KINDS)]
            figures |= {figure.key: figure for figure in wanted if figure is not None and figure.key not in figures}
    compared = []
    for key, figure in figures.items():
        values: dict[str, list[float]] = {}
        images: dict[str, set[int]] = {}
        bounds: dict[str, set[float]] = {}
        for group, runs in groups.items():
            for _, evaluation, title in runs:
                other = evaluation.figure(key)
                if other is not None and title in other.values and other.values[title].known:
                    value = other.values[title]
                    values.setdefault(group, []).append(value.value)
                    if value.at_most is not None:
                        bounds.setdefault(group, set()).add(value.at_most)
                    if other.protocol.images is not None:
                        images.setdefault(group, set()).add(other.protocol.images)
        if values:
            attack = figure.protocol.attack
            differ = len(set().union(*images.values())) > 1
            compared.append(
                ComparedFigure(
                    key,
                    figure.label,
                    figure.unit,
                    attack.radius_unit if attack else None,
                    values,
                    {group: tuple(sorted(numbers)) for group, numbers in images.items()} if differ else {},
                    {group: tuple(sorted(numbers)) for group, numbers in bounds.items()},
                )
            )
    return compared


def _normalized(evaluation: Evaluation) -> list[Figure]:
    """The PGD of the headline with its radius in normalised units."""
    pgd = headline(evaluation).pgd
    if pgd is None or pgd.protocol.attack is None:
        return []
    twin = dataclasses.replace(pgd.protocol.attack, radius_unit="normalized")
    return [figure for figure in evaluation.by_kind(Kind.ATTACK) if figure.protocol.attack == twin]
