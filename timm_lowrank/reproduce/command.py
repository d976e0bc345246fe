"""`reproduce`: finds, trains and measures what the wanted entries need, and writes them down."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from ..errors import EvaluationError, RecipeError, nearest
from ..files import disk_errors, write_whole
from ..suites.measurements.base import Measurement
from ..suites.measurements.classifiers import OtherLabels
from ..text import columns, counted
from .build import build, lacking, needed
from .catalogue import ENTRIES, Entry, entry_of
from .jobs import Measuring, Training, Workers
from .reproduction import Reproduction, read_reproduction
from .runs import FinishedRun, Runs
from .setups import PLAIN, Base, Scale, scale_of
from .write import fill, index, write


@dataclasses.dataclass(frozen=True)
class Options:
    """What to reproduce and how.

    Args:
        names: of entries, such as "table-5", "figure-2", "claim-sparsity"; none are all.
        scale: "smoke", "fast" or "paper".
        runs: the folder of runs; new ones go there.
        output: where NAME.md, NAME.json and NAME.png go.
        data: name of a data set ("cifar10", "cifar100", "svhn") -> a folder or a name on the Hub.
        seeds: to train; None are those of the scale. All that are finished count.
        existing: whether to train and measure nothing, and show what is there.
        images, train_images: to evaluate on, and to fit linear classifiers and PCA on; None are those of the scale.
        spectrum_limit: test images for the spectrum; None as `timm_lowrank.suites.Options`.
        jobs: runs that are trained and measured at a time, each in a process of its own.
        recipes: of the scale, whose runs alone count; none are all.
        measure: whether to measure what the runs lack, once they are trained.
    """

    names: tuple[str, ...] = ()
    scale: str = "smoke"
    runs: Path = Path("runs")
    output: Path = Path("results")
    data: Mapping[str, str] = dataclasses.field(default_factory=dict)
    seeds: tuple[int, ...] | None = None
    existing: bool = False
    images: int | None = None
    train_images: int | None = None
    spectrum_limit: int | None = None
    jobs: int = 1
    recipes: tuple[str, ...] = ()
    measure: bool = True

    @property
    def entries(self) -> list[Entry]:
        """Those that are wanted. Raises an EvaluationError for an unknown name."""
        return [entry_of(name) for name in self.names] or list(ENTRIES.values())

    def folder(self, say: Callable[[str], None] = print) -> Runs:
        """The runs of the scale. Raises an EvaluationError for an unknown data set or a number of images below 1."""
        if unknown := self.data.keys() - {"cifar10", "cifar100", "svhn"}:
            raise EvaluationError(f"--data takes cifar10=, cifar100= and svhn=, not {', '.join(sorted(unknown))}=")
        scale = scale_of(self.scale)
        images = scale.images if self.images is None else self.images
        train_images = scale.train_images if self.train_images is None else self.train_images
        if min(images, train_images, self.jobs) < 1:
            raise EvaluationError("--images, --train-images and --jobs must be at least 1")
        scale = dataclasses.replace(
            scale,
            bases=_chosen(scale, self.recipes),
            images=images,
            train_images=train_images,
            spectrum_limit=self.spectrum_limit,
        )
        return Runs(self.runs, scale, self.data, self.seeds, self.existing, say)


def reproduce(options: Options, say: Callable[[str], None] = print) -> list[Reproduction]:
    """Makes every wanted entry from the runs that are there and those that it trains, and writes it.

    A run is trained once and a figure measured once, whatever number of entries show it. The command goes on where it
    was interrupted. What the output says already of runs that are not at hand now is kept, so that results may be
    gathered from several machines.

    Raises:
        EvaluationError: an unknown name, scale or data set; a network that cannot be measured; results of another scale
            in the output, or damaged ones.
        TrainingError: a run that cannot be trained, a disk that is full.
    """
    entries, runs = options.entries, options.folder(say)
    for entry in entries:
        _before(options, entry)  # now: what cannot be written in the end is not worth hours of training
    if not options.existing:
        with Workers(runs, options.jobs) as workers:
            workers.do(_trainings(entries, runs))
            if options.measure:
                workers.do(_measurings(entries, runs))
    made = []
    for entry in entries:
        made.append(build(entry, runs, _before(options, entry)))  # again: another command may have written since
        paths = write(made[-1], options.output)
        say(f"{entry.name}: {', '.join(map(str, paths))}")
    with disk_errors(f"could not write to {options.output}"):
        write_whole(options.output / "README.md", index(_written(options.output)))
    return made


def _before(options: Options, entry: Entry) -> Reproduction | None:
    """What the output says of an entry already."""
    path = options.output / f"{entry.name}.json"
    if not path.is_file():
        return None
    before = read_reproduction(path)
    if before.runs and before.scale != options.scale:
        raise EvaluationError(
            f"{path} holds the scale {before.scale}, which {options.scale} would replace: give another folder with "
            "--output, or delete it"
        )
    return before


def fill_page(page: Path, folder: Path) -> None:
    """Brings the tables that a Markdown page quotes up to the JSON in a folder of results.

    Raises:
        EvaluationError: the page or a quoted result cannot be read.
        RunError: the page cannot be written.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise EvaluationError(f"cannot read the page {page}: {reason}") from error
    with disk_errors(f"could not write {page}"):
        write_whole(page, fill(text, folder))


def _chosen(scale: Scale, recipes: tuple[str, ...]) -> dict[str, tuple[Base, ...]]:
    """The bases of these recipes."""
    known = dict.fromkeys(base.name for bases in scale.bases.values() for base in bases)
    for name in recipes:
        if name not in known:
            raise EvaluationError(f"the scale {scale.name} has no recipe {name!r}. {nearest(name, known)}")
    return {
        setup: tuple(base for base in bases if not recipes or base.name in recipes)
        for setup, bases in scale.bases.items()
    }


def _trainings(entries: list[Entry], runs: Runs) -> list[Training]:
    """The seeds that are missing; a recipe that is not there is said and left out."""
    jobs: list[Training] = []
    for base, condition in dict.fromkeys(pair for entry in entries for pair in _with_twins(needed(entry, runs))):
        missing = runs.missing(base, condition)
        try:
            for seed in missing:
                runs.recipe(base, condition, seed)
        except RecipeError as error:
            runs.say(f"{base.name}/{condition} cannot be trained: {error}")
        else:
            jobs += [Training(base, condition, seed) for seed in missing]
    return jobs


def _written(folder: Path) -> list[Reproduction]:
    """All that lie in a folder, in the order of the catalogue."""
    paths = [folder / f"{name}.json" for name in ENTRIES]
    return [read_reproduction(path) for path in paths if path.is_file()]


def _with_twins(pairs: list[tuple[Base, str]]) -> list[tuple[Base, str]]:
    """Every base's plain network first: the others are compared with it, and attacked by it."""
    return list(dict.fromkeys([*((base, PLAIN) for base, _ in pairs), *pairs]))


def _measurings(entries: list[Entry], runs: Runs) -> list[Measuring]:
    """Everything that all entries lack of a run, in one evaluation."""
    jobs: list[Measuring] = []
    for base, condition in dict.fromkeys(pair for entry in entries for pair in needed(entry, runs)):
        for run in runs.finished(base, condition):
            lacks = list(dict.fromkeys(one for entry in entries for one in lacking(entry, runs, run)))
            if lacks:
                jobs.append(Measuring(run, tuple(lacks), _other_labels(run, lacks)))
    return jobs


def _other_labels(run: FinishedRun, measurements: list[Measurement]) -> str | None:
    """The column of CIFAR-100's fine labels, where they are asked for."""
    wanted = any(isinstance(one, OtherLabels) for one in measurements)
    return "fine_label" if wanted and "coarse" in run.base.name else None


# ------------------------------------------------------------------------------------------------------------ overview


def overview(options: Options) -> str:
    """Every entry, the runs that it needs at a scale, and which of them are there."""
    runs = options.folder()
    rows = [["entry", "in the paper", "what it shows", "runs there"]]
    details: list[str] = []
    for entry in options.entries:
        pairs = needed(entry, runs)
        seeds = {pair: [run.seed for run in runs.finished(*pair)] for pair in pairs}
        there = sum(bool(found) for found in seeds.values())
        rows.append([entry.name, entry.source, entry.title, f"{there} of {len(pairs)}" if pairs else "needs none"])
        if options.names:
            details += [f"\n{entry.name} needs:"]
            details += [f"  {_state(runs, base, condition, seeds[base, condition])}" for base, condition in pairs]
    return "\n".join([columns(rows), *details])


def _state(runs: Runs, base: Base, condition: str, seeds: list[int]) -> str:
    where = f"{base.name}/{condition}"
    if seeds:
        return f"{where}: {counted(len(seeds), 'seed')} there ({', '.join(map(str, seeds))})"
    try:
        base.make_recipe(condition, 0)
    except RecipeError as error:
        return f"{where}: not there, and cannot be trained: {str(error).splitlines()[0]}"
    return f"{where}: not there"
