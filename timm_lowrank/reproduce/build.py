"""`build`: an entry of the catalogue and the runs that are there, as a `Reproduction`."""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..environment import versions
from ..errors import RecipeError
from ..evaluation.results import Curve, Detail, Figure, Series, Strip, Value
from ..suites.measurements.base import Measurement
from ..training import Recipe
from ..training.run import Summary, changed_settings, settings
from .catalogue import DIAGNOSES, Column, CurvePlan, Entry, PanelPlan, Row, quickened
from .kept import Kept, alike, trained_by
from .published import Printed
from .reproduction import IMAGES, RANDOM, Cell, Line, Panel, Reproduction, TrainedRun
from .runs import FinishedRun, Runs, Seen
from .setups import PLAIN, Base, scale_of

PACKAGES = ("timm_lowrank", "torch", "timm", "pyautoattack", "scikit-learn")


def build(entry: Entry, runs: Runs, before: Reproduction | None = None) -> Reproduction:
    """Lays out what was measured; nothing is trained or measured here.

    Args:
        before: what was made of the entry at this scale before; what it says of runs that are not at hand is kept.

    Raises:
        RunError, EvaluationError: the files of a run are damaged.
    """
    missing: list[str] = []
    trained = tuple(_trained(entry, runs))
    kept = Kept(before, trained)
    apart = _apart((*trained, *kept.runs))
    panels = tuple(_panel(plan, runs, kept, apart, missing) for plan in entry.panels)
    if entry.compute:
        panels = (*panels, *entry.compute())
    curves = [curve for plan in entry.curves for curve in _curves(plan, runs, kept, missing)]
    strips = list(_strips(entry, runs, kept, missing))
    missing += [f"{run.folder}: its plain twin was trained differently, so there is no gain over it" for run in apart]
    missing += [f"{run.folder} was trained differently and is not at hand: left out" for run in kept.dropped]
    return Reproduction(
        name=entry.name,
        title=entry.title,
        source=entry.source,
        scale=runs.scale.name,
        notice=runs.scale.notice,
        command=_command(entry, runs),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions=versions(PACKAGES),
        panels=panels,
        curves=kept.with_curves(curves),
        strips=kept.with_strips(strips),
        runs=(*trained, *(_judged_anew(run, runs) for run in kept.runs)),
        statements=entry.statements,
        notes=entry.notes,
        missing=tuple(dict.fromkeys(missing)),
    )


def _command(entry: Entry, runs: Runs) -> str:
    """How to make it again, without the folders and data of whoever made it."""
    kind, _, name = entry.name.partition("-")
    scale, usual = runs.scale, scale_of(runs.scale.name)
    given = [f"--{kind} {name}", f"--scale {scale.name}"]
    given += [f"--images {scale.images}"] if scale.images != usual.images else []
    given += [f"--train-images {scale.train_images}"] if scale.train_images != usual.train_images else []
    given += [f"--spectrum-limit {scale.spectrum_limit}"] if scale.spectrum_limit else []
    bases, of_scale = (
        dict.fromkeys(base.name for row in entry.rows for base in one.bases.get(row.setup, ()))
        for one in (scale, usual)
    )
    given += [f"--recipes {' '.join(bases)}"] if bases and bases != of_scale else []
    given += ["--existing"] if runs.existing else []
    others = runs.seeds != usual.seeds and not runs.existing
    given += [f"--seeds {' '.join(map(str, runs.seeds))}"] if runs.seeds and others else []
    return " ".join(["timm-lowrank reproduce", *given])


def _bases(row: Row, runs: Runs) -> tuple[Base, ...]:
    return runs.scale.bases.get(row.setup, ())


# -------------------------------------------------------------------------------------------------------------- panels


def _apart(runs: Sequence[TrainedRun]) -> list[TrainedRun]:
    """The runs that are not the same training as the plain one of their recipe and seed, which is no twin of theirs."""
    plain = {(run.recipe, run.seed): run for run in runs if run.condition == PLAIN}
    return [run for run in runs if not alike(run, plain.get((run.recipe, run.seed), run))]


def _panel(plan: PanelPlan, runs: Runs, kept: Kept, apart: Sequence[TrainedRun], missing: list[str]) -> Panel:
    lines = [line for row in plan.rows for line in _lines(plan, row, runs, kept, missing)]
    twins = {(line.row, line.recipe): line for line in lines if line.condition == PLAIN}
    return Panel(
        title=plan.title,
        columns=tuple(column.label for column in plan.columns),
        lines=tuple(_over(line, twins.get((line.row, line.recipe)), apart) for line in lines),
        positions=plan.positions,
    )


def _over(line: Line, twin: Line | None, apart: Sequence[TrainedRun]) -> Line:
    """A line with its gains over its plain twin, of the seeds that are not `apart`."""
    if twin is None or twin is line:
        return line
    others = {run.seed for run in apart if (run.recipe, run.condition) == (line.recipe, line.condition)}
    cells = tuple(own.over(other, others) for own, other in zip(line.cells, twin.cells, strict=True))
    return dataclasses.replace(line, cells=cells)


def _lines(plan: PanelPlan, row: Row, runs: Runs, kept: Kept, missing: list[str]) -> Iterable[Line]:
    """One for each base that stands for the row; without any one that says so, if the paper prints something."""
    bases, before = _bases(row, runs), dict(kept.lines(plan.title, row.setup, row.condition))
    if not bases and not before and row.printed:
        missing.append(f"{row.setup}, {row.condition}: this scale has no network in its place")
        cells = tuple(_cell(column, row, index, []) for index, column in enumerate(plan.columns))
        yield Line(
            row=row.setup, condition=row.condition, recipe=None, network=None, seeds=(), cells=cells,
            printed_masking=row.verdict,
        )  # fmt: skip
    for base in bases:
        finished = runs.finished(base, row.condition)
        seen = {run.seed: runs.seen(run) for run in finished}
        name, old = f"{base.name}, {row.condition}", before.pop(base.name, None)
        if not finished and not old:
            missing.append(f"{name}: there is no finished run")
        summaries = {run.seed: runs.describe(run).summary for run in finished}
        values = [_values(column, seen) if column.measurement else _said(column, summaries) for column in plan.columns]
        values = [[*own, *_kept(column, old)] for column, own in zip(plan.columns, values, strict=True)]
        seeds = tuple(sorted({*seen, *(old.seeds if old else ())}))
        cells = tuple(_cell(column, row, i, values[i], seeds) for i, column in enumerate(plan.columns))
        unknown = [cell.column for cell in cells if (finished or old) and cell.mean is None and cell.beyond is None]
        missing += [f"{name}, {plan.title}: {', '.join(unknown)}"] if unknown else []
        masking = _verdicts(seen, plan.masking) if plan.masking else {}
        yield Line(
            row=row.setup,
            condition=row.condition,
            recipe=base.name,
            network=summaries[finished[0].seed].model if finished else old.network if old else None,
            seeds=seeds,
            cells=cells,
            masking={**masking, **(old.masking if old else {})},
            printed_masking=row.verdict,
        )
    for recipe, old in before.items():  # of recipes that were not asked for this time
        cells = tuple(_cell(column, row, i, _kept(column, old), old.seeds) for i, column in enumerate(plan.columns))
        yield dataclasses.replace(old, recipe=recipe, cells=cells, printed_masking=row.verdict)


@dataclasses.dataclass(frozen=True)
class _Measured:
    seed: int
    value: float  # NaN: larger than all that was tried
    how: Mapping[str, Detail]
    figure: str | None = None  # its key
    beyond: float | None = None
    at_most: float | None = None


def _kept(column: Column, line: Line | None) -> list[_Measured]:
    """What an earlier making says of a column, in a line with the seeds that are kept."""
    if line is None:
        return []
    cell = next((cell for cell in line.cells if (cell.column, cell.unit) == (column.label, column.unit)), None)
    if cell is None:  # that version did not have it
        return []
    beyond = (
        [] if cell.beyond is None else [seed for seed in line.seeds if seed not in (*cell.values, *cell.unmeasured)]
    )
    return [
        _Measured(
            seed,
            cell.values.get(seed, math.nan),
            {**cell.how, **cell.images.get(seed, {})},
            cell.figure,
            beyond=None if seed in cell.values else cell.beyond,
            at_most=cell.at_most,
        )
        for seed in sorted([*cell.values, *beyond])
    ]


def _said(column: Column, summaries: Mapping[int, Summary]) -> list[_Measured]:
    """What the summaries of the runs say."""
    measured = []
    for seed, summary in summaries.items():
        value, layers = None, list(summary.branches)
        if column.source == "clean":
            value = summary.clean_accuracy
        elif column.source == "target" and len(layers) > (column.detail == "inside"):
            value = summary.branches[layers[0 if column.detail == "inside" else -1]].target_rank
        elif column.source == "nested" and summary.comparator:
            value = summary.comparator.figures.get(f"accuracy_of_first_{column.detail}")
        if value is not None:
            how = {"images": summary.data.test_images} if column.unit == "share" else {}
            measured.append(_Measured(seed, float(value), how))
    return measured


def _values(column: Column, seen: Mapping[int, Sequence[Seen]]) -> list[_Measured]:
    measured = []
    for seed, evaluations in seen.items():
        for one in evaluations:
            pair = one.figure(column.key)
            value = None if pair is None else _value(column, *pair)
            if pair is not None and value is not None:
                plain = column.source == "figure"
                beyond, at_most = (pair[1].beyond, pair[1].at_most) if plain else (None, None)
                how = pair[0].protocol.entries()
                measured.append(_Measured(seed, value, how, pair[0].key, beyond, at_most))
                break
    return measured


def _value(column: Column, figure: Figure, value: Value) -> float | None:
    """What the column shows; None if it is not known."""
    if column.source == "share replaced":
        of, replaced = (figure.protocol.details.get(name) for name in ("parameters", "replaces_parameters"))
        return of / replaced if isinstance(of, int) and isinstance(replaced, int) and replaced else None
    if column.source == "detail":
        detail = figure.protocol.details.get(column.detail)
        return float(detail) if isinstance(detail, int | float) else None
    return value.value if value.known or value.beyond is not None else None


def _cell(column: Column, row: Row, index: int, measured: Sequence[_Measured], seeds: Sequence[int] = ()) -> Cell:
    """The figures of a column in a line with these seeds."""
    printed = row.printed[index] if index < len(row.printed) else None
    cell = Cell.of(
        column.label,
        column.unit,
        {one.seed: one.value for one in measured},
        printed.value if isinstance(printed, Printed) else printed,
        printed.text if isinstance(printed, Printed) else None,
        _how(measured),
        measured[0].figure if measured else None,
    )
    beyond = max((one.beyond for one in measured if one.beyond is not None), default=None)
    at_most = max((one.at_most for one in measured if one.at_most is not None), default=None)
    known = {one.seed for one in measured}
    unmeasured = () if beyond is None else tuple(seed for seed in seeds if seed not in known)
    images = {one.seed: {name: one.how[name] for name in IMAGES if name in one.how} for one in measured}
    if all(own == next(iter(images.values())) for own in images.values()):
        images = {}
    return dataclasses.replace(cell, beyond=beyond, at_most=at_most, unmeasured=unmeasured, images=images)


def _how(measured: Sequence[_Measured]) -> Mapping[str, Detail]:
    """How the first seed was measured, with the numbers of images of all."""
    how = dict(measured[0].how) if measured else {}
    for name in IMAGES:
        numbers = {one.how.get(name) for one in measured}
        if len(numbers) > 1:
            how[name] = " or ".join(sorted(map(str, numbers), key=lambda text: (len(text), text)))
    return how


def _verdicts(seen: Mapping[int, Sequence[Seen]], radius_unit: str) -> dict[int, str]:
    verdicts: dict[int, str] = {}
    for seed, evaluations in seen.items():
        for one in evaluations:
            if verdict := one.verdict(radius_unit):
                verdicts.setdefault(seed, verdict)
    return verdicts


# -------------------------------------------------------------------------------------------------- curves, pictures


def _curves(plan: CurvePlan, runs: Runs, kept: Kept, missing: list[str]) -> Iterable[Curve]:
    """The curves of each base, of all conditions and, of lines, all seeds; of clouds and histograms the first seed."""
    bases = dict.fromkeys(base for row in plan.rows for base in _bases(row, runs))
    for base in bases:
        joined: dict[str, Curve] = {}
        for condition in dict.fromkeys(row.condition for row in plan.rows if base in _bases(row, runs)):
            lines = 0
            for run in runs.finished(base, condition):
                for curve, own in next(filter(None, (one.curves(plan.key) for one in runs.seen(run))), []):
                    before = joined.setdefault(curve.key, dataclasses.replace(curve, lines=()))
                    if curve.kind != "line" and any(line.network == condition for line in before.lines):
                        continue
                    named = [_renamed(line, condition, run.seed, curve.kind) for line in own]
                    if any(line.network == RANDOM for line in before.lines):  # of the first condition; they are alike
                        named = [line for line in named if line.network != RANDOM]
                    joined[curve.key] = dataclasses.replace(before, lines=(*before.lines, *named))
                    lines += len(named)
            if not lines and not kept.has(base.name, condition):
                what = "was not measured" if runs.finished(base, condition) else "has no finished run"
                missing.append(f"{base.name}, {condition}: the curve {plan.key} {what}")
        for curve in joined.values():
            title = f"{curve.title} ({base.name})"
            yield dataclasses.replace(curve, key=f"{base.name}-{curve.key}", title=title)


def _renamed(line: Series, condition: str, seed: int, kind: str) -> Series:
    kept = len(set(line.labels)) > 1 or line.name in ("instantaneous", "cumulative")
    names = [line.name if kept else "", f"seed {seed}"]
    network = RANDOM if "randomly initialised" in line.name else condition
    return dataclasses.replace(line, network=network, name=", ".join(filter(None, names)))


def _strips(entry: Entry, runs: Runs, kept: Kept, missing: list[str]) -> Iterable[Strip]:
    """Of each base the images of all conditions, of the first seed."""
    for _, key in entry.strips:
        for base in dict.fromkeys(base for row in entry.shown for base in _bases(row, runs)):
            strips: list[Strip] = []
            for row in entry.shown:
                found = runs.finished(base, row.condition)[:1] if base in _bases(row, runs) else []
                own = [one.strip(key) for run in found for one in runs.seen(run)]
                strip = next((strip for strip in own if strip is not None), None)
                if strip is None:
                    if not kept.has(base.name, row.condition):
                        missing.append(f"{base.name}, {row.condition}: there are no pictures")
                    continue
                rows = tuple(dataclasses.replace(one, network=row.condition) for one in strip.rows)
                strips.append(dataclasses.replace(strip, key=f"{base.name}-{key}", rows=rows))
            shapes = {strip.shape for strip in strips}
            if len(shapes) == 1:
                title = f"{strips[0].title} ({base.name})"
                rows = tuple(row for strip in strips for row in strip.rows)
                yield dataclasses.replace(strips[0], title=title, rows=rows)


# ---------------------------------------------------------------------------------------------------------------- runs


def needed(entry: Entry, runs: Runs) -> list[tuple[Base, str]]:
    """The bases and conditions whose runs an entry shows at a scale, each once, in its order."""
    return list(dict.fromkeys((base, row.condition) for row in entry.rows for base in _bases(row, runs)))


def lacking(entry: Entry, runs: Runs, run: FinishedRun) -> list[Measurement]:
    """What has to be measured of a run for an entry: what no evaluation on these numbers of images has, or tried."""
    seen = runs.comparable(run)
    setups = [setup for setup, bases in runs.scale.bases.items() if run.base in bases]
    lacks: list[Measurement] = []

    def there(rows: Sequence[Row]) -> bool:
        return any(row.setup in setups and row.condition == run.condition for row in rows)

    for panel in entry.panels:
        if there(panel.rows):
            lacks += [
                column.measurement
                for column in panel.columns
                if column.measurement and not any(one.figure(column.key) for one in seen)
            ]
            if panel.masking and not any(one.verdict(panel.masking) for one in seen):
                lacks.append(DIAGNOSES[panel.masking])
    for plan in entry.curves:
        if there(plan.rows) and not any(one.curves(plan.key) for one in seen):
            lacks.append(plan.measurement)
    for measurement, key in entry.strips:
        if there(entry.shown) and not any(one.strip(key) for one in seen):
            lacks.append(measurement)
    cut = [quickened(one) for one in lacks] if runs.scale.quick else lacks
    return [one for one in dict.fromkeys(cut) if one is not None and not any(s.has(one) for s in seen)]


def _data(base: Base, source: str) -> str:
    """A data set by name: a folder of somebody's machine by its last part."""
    folder = Path(source)
    name = folder.name if folder.is_absolute() or folder.exists() else source
    return f"fixture: digits in the layout of {base.fixture}" if base.fixture and "fixtures" in folder.parts else name


def _trained(entry: Entry, runs: Runs) -> Iterable[TrainedRun]:
    for base, condition in needed(entry, runs):
        for run in runs.finished(base, condition):
            described = runs.describe(run)
            summary = described.summary
            yield TrainedRun(
                folder=str(run.folder.relative_to(runs.folder)),
                recipe=base.name,
                condition=condition,
                seed=run.seed,
                model=summary.model,
                data=_data(base, summary.data.source),
                train_images=summary.data.train_images,
                epochs=summary.epochs,
                clean_accuracy=summary.clean_accuracy,
                seconds=summary.seconds,
                device=summary.device,
                versions=summary.versions,
                settings=settings(described.recipe) | _seed_of_its_own(described.recipe, run.seed),
                unlike=_unlike(described.recipe, base, condition, run.seed),
            )


def _seed_of_its_own(recipe: Recipe, seed: int) -> dict[str, int]:
    """The seed of a run whose folder says another one: it was copied, or trained by hand."""
    return {} if recipe.seed == seed else {"seed": recipe.seed}


def _unlike(recipe: Recipe, base: Base, condition: str, seed: int) -> tuple[str, ...]:
    """What this version would train otherwise than a run; that it cannot train it, if so."""
    own = tuple(f"seed was {other} and is {seed}" for other in _seed_of_its_own(recipe, seed).values())
    try:
        return (*own, *changed_settings(recipe, base.make_recipe(condition, seed)))
    except RecipeError as error:  # somebody trained it for themselves, or an earlier version had the recipe
        return (*own, str(error).splitlines()[0])


def _judged_anew(run: TrainedRun, runs: Runs) -> TrainedRun:
    """A run that is not at hand, with what the recipe of this version would train otherwise, as far as that is known:
    the one of the making that had the run may have been another."""
    every = (base for one in (runs.scale, scale_of(runs.scale.name)) for bases in one.bases.values() for base in bases)
    base = next((base for base in every if base.name == run.recipe), None)
    try:
        recipe = trained_by(run)
    except RecipeError:  # of a version that has other keys
        return run
    if base is None or recipe is None:
        return run
    return dataclasses.replace(run, unlike=_unlike(recipe, base, run.condition, run.seed))
