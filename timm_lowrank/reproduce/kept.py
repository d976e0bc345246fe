"""`Kept`: what results/NAME.json already says of runs that are not at hand, so that making it again loses nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from ..errors import RecipeError
from ..evaluation.results import Curve, Series, Strip
from ..training import Recipe
from ..training.run import changed_settings, recipe_of
from .reproduction import RANDOM, Line, Reproduction, TrainedRun
from .setups import CONDITIONS

_Key = tuple[str, str, int]  # recipe, condition, seed
_ORDER = {name: number for number, name in enumerate(CONDITIONS)}


def _key(run: TrainedRun) -> _Key:
    return run.recipe, run.condition, run.seed


def trained_by(run: TrainedRun) -> Recipe | None:
    """The recipe of a run, as far as its settings say it; None if they do not, as files of earlier versions.

    Raises:
        RecipeError: this version does not know them all.
    """
    return recipe_of({"seed": run.seed, **run.settings}) if run.settings else None


def alike(run: TrainedRun, other: TrainedRun) -> bool:
    """Whether two runs of one recipe are the same training but for the seed and, of two conditions, what is compared.

    Runs that are not are of different recipes of this name: they are not averaged.
    """
    if (run.model, run.train_images, run.epochs) != (other.model, other.train_images, other.epochs):
        return False
    try:
        one, two = trained_by(run), trained_by(other)
    except RecipeError:  # of a version that has other keys
        return False
    if one is None or two is None:
        return True
    if run.condition != other.condition:
        one, two = one.plain(), two.plain()
    return not changed_settings(one, two)


def _beside(run: TrainedRun, at_hand: Sequence[TrainedRun]) -> list[TrainedRun]:
    """The runs that tell whether a run is kept: those that it would be averaged with, or else of its recipe."""
    of_recipe = [other for other in at_hand if other.recipe == run.recipe]
    return [other for other in of_recipe if other.condition == run.condition] or of_recipe


class Kept:
    """The lines, curves and strips of an earlier making whose runs are not among those at hand.

    A run that is at hand is read anew, whatever was said of it: it may have been trained again.

    Args:
        before: the earlier making, of the same entry and scale; None keeps nothing.
        at_hand: all runs of this making.

    Attributes:
        runs: that are kept, each with the time of the making that last saw it.
        dropped: that are not, because what is at hand of their recipe was trained differently.
    """

    def __init__(self, before: Reproduction | None, at_hand: Sequence[TrainedRun]) -> None:
        self._before = before
        known = {_key(run) for run in at_hand}
        gone = [run for run in before.runs if _key(run) not in known] if before else []
        self.dropped = [
            run for run in gone if (beside := _beside(run, at_hand)) and not any(alike(run, other) for other in beside)
        ]
        stamp = before.created if before else None
        self.runs = tuple(dataclasses.replace(run, as_of=run.as_of or stamp) for run in gone if run not in self.dropped)
        self._keys = {_key(run) for run in self.runs}

    def has(self, recipe: str, condition: str) -> bool:
        """Whether a run of these is kept, of any seed."""
        return any(key[:2] == (recipe, condition) for key in self._keys)

    def lines(self, panel: str, row: str, condition: str) -> Mapping[str, Line]:
        """By recipe, the lines of a panel with the seeds that are kept alone; cells by the columns of that time."""
        panels = self._before.panels if self._before else ()
        lines = [line for one in panels if one.title == panel for line in one.lines]
        kept: dict[str, Line] = {}
        for line in lines:
            if line.recipe is None or (line.row, line.condition) != (row, condition):
                continue
            seeds = tuple(seed for seed in line.seeds if (line.recipe, condition, seed) in self._keys)
            if seeds:
                cells = tuple(
                    dataclasses.replace(cell, values={s: v for s, v in cell.values.items() if s in seeds})
                    for cell in line.cells
                )
                masking = {seed: verdict for seed, verdict in line.masking.items() if seed in seeds}
                kept[line.recipe] = dataclasses.replace(line, seeds=seeds, cells=cells, masking=masking)
        return kept

    def with_curves(self, curves: Sequence[Curve]) -> tuple[Curve, ...]:
        """Curves of this making with the lines of the runs that are kept."""
        joined = {curve.key: curve for curve in curves}
        for old in self._before.curves if self._before else ():
            new = joined.get(old.key, dataclasses.replace(old, lines=()))
            there = {line.network for line in new.lines}
            seeds_side_by_side = old.kind == "line"  # of clouds and histograms one seed is shown, and one "not trained"
            lines = [
                line
                for line in old.lines
                if self._is_kept(old, line)
                and (line.network not in there or (seeds_side_by_side and line.network in CONDITIONS))
            ]
            if lines:
                lines = sorted([*new.lines, *lines], key=lambda line: _place(line.network))
                joined[old.key] = dataclasses.replace(new, lines=tuple(lines))
        return tuple(joined.values())

    def with_strips(self, strips: Sequence[Strip]) -> tuple[Strip, ...]:
        """Strips of this making with the images of the runs that are kept, where they are of as many and as large."""
        joined = {strip.key: strip for strip in strips}
        for old in self._before.strips if self._before else ():
            new = joined.get(old.key, dataclasses.replace(old, rows=()))
            there = {row.network for row in new.rows}
            conditions = {key[1] for key in self._keys if _belongs(old, key[0])} - there
            rows = [row for row in old.rows if row.network in conditions]
            if rows and new.shape == old.shape:
                rows = sorted([*new.rows, *rows], key=lambda row: _place(row.network))
                joined[old.key] = dataclasses.replace(new, rows=tuple(rows))
        return tuple(joined.values())

    def _is_kept(self, curve: Curve, line: Series) -> bool:
        """Whether a line is of a kept run: they end with their seed. An untrained network is of any condition."""
        return any(
            _belongs(curve, recipe) and line.name.endswith(f"seed {seed}") and line.network in (condition, RANDOM)
            for recipe, condition, seed in self._keys
        )


def _belongs(shown: Curve | Strip, recipe: str) -> bool:
    return shown.title.endswith(f"({recipe})")


def _place(network: str) -> float:
    """In the order of the conditions; an untrained network comes behind the plain one."""
    return _ORDER.get(network, 0.5)
