"""The runs behind a reproduction: found in a folder, trained where they are missing, measured where figures are."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..data import ImageData, load_images
from ..errors import RunError
from ..evaluation.results import (
    Curve,
    Evaluation,
    Figure,
    NetworkInfo,
    Protocol,
    Series,
    Strip,
    Value,
    read_evaluation,
)
from ..files import weights_sha256
from ..suites import Options, evaluate
from ..suites.measurements.base import Measurement
from ..training import Recipe, Run, train
from ..training.run import RunPaths
from .fixtures import write_fixture
from .setups import CONDITIONS, PLAIN, Base, Scale

CHUNK = 100  # images in a batch of an evaluation
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Seen:
    """A network in an evaluation.

    Attributes:
        own_layers: of its run, or of others by its recipe, from the input to the output; one alone says nothing.
        twin: hash of the weights of the plain run of its recipe and seed, if that is at hand.
    """

    evaluation: Evaluation
    network: NetworkInfo
    own_layers: tuple[str, ...] = ()
    twin: str | None = None

    @property
    def layers(self) -> dict[str, str]:
        """What {inside} and {last} are: the first and the last layer that was measured; one alone is the last.

        Layers that were measured for the sake of other networks beside it do not count.
        """
        settings = self.evaluation.settings
        known = [figure.layer for figure in self.evaluation.figures if figure.layer]
        layers = list(settings.layers) if settings else list(dict.fromkeys(known))
        own = [layer for layer in self.own_layers if layer in layers]
        layers = own if len(own) > 1 else layers
        inside = {"inside": layers[0]} if len(layers) > 1 else {}
        return {**inside, **({"last": layers[-1]} if layers else {})}

    def key(self, pattern: str) -> str | None:
        """`pattern` with the names of the layers; None if one was not measured."""
        try:
            return pattern.format(**self.layers)
        except KeyError:
            return None

    def figure(self, pattern: str) -> tuple[Figure, Value] | None:
        """A figure and its value for this network."""
        key = self.key(pattern)
        figure = self.evaluation.figure(key) if key else None
        value = figure.values.get(self.network.title) if figure else None
        return (figure, value) if figure and value and not self._is_crafted_elsewhere(figure.protocol) else None

    def _is_crafted_elsewhere(self, protocol: Protocol) -> bool:
        """Whether it is a black box whose images were not crafted on the plain twin of the run."""
        crafted_on = (protocol.attack.crafted_on if protocol.attack else None) or {}
        source = crafted_on.get(self.network.title)
        if source is None:
            return False
        known = {network.title: network for network in self.evaluation.networks}
        settings = self.evaluation.settings
        weights = settings.networks.get(f"source {source}") if settings else None
        if weights is None and source in known:
            weights = known[source].weights
        if self.twin is not None and weights is not None:
            return weights != self.twin
        return source in known and bool(known[source].branches or known[source].comparator)

    def curves(self, pattern: str) -> list[tuple[Curve, list[Series]]]:
        """The curves of a key, or those that begin with it if it ends in "*", with this network's lines in each."""
        key = self.key(pattern)
        if key is None:
            return []
        chosen = [c for c in self.evaluation.curves if c.key == key or (key[-1] == "*" and c.key.startswith(key[:-1]))]
        chosen = [curve for curve in chosen if not self._is_crafted_elsewhere(curve.protocol)]
        lines = {curve.key: [line for line in curve.lines if line.network == self.network.title] for curve in chosen}
        return [(curve, lines[curve.key]) for curve in chosen if lines[curve.key]]

    def strip(self, key: str) -> Strip | None:
        """A strip with the rows of this network alone."""
        for strip in self.evaluation.strips:
            rows = tuple(row for row in strip.rows if row.network == self.network.title)
            if strip.key == key and rows:
                return dataclasses.replace(strip, rows=rows)
        return None

    def verdict(self, radius_unit: str) -> str | None:
        """Of the diagnosis of gradient masking with radii in this unit, if it was made."""
        one = self.evaluation
        verdict = (one.verdicts if radius_unit == "pixel" else one.normalized_verdicts).get(self.network.title)
        return verdict.verdict if verdict else None

    def sizes(self, wanted: Sequence[int]) -> tuple[int, ...]:
        """Its numbers of test, training and, if three are wanted, spectrum images; zeros if it does not say."""
        settings = self.evaluation.settings
        if settings is None:
            return (0,) * len(wanted)
        return (settings.images, settings.train_images, settings.spectrum_images or settings.images)[: len(wanted)]

    def has(self, measurement: Measurement) -> bool:
        """Whether it was measured, or was tried: the very same measurement, with all its settings, and with the twin
        that it may need, if that is at hand."""
        settings = self.evaluation.settings
        if settings is None or repr(measurement) not in settings.measurements:
            return False
        return self.twin is None or self.twin in settings.networks.values()


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A run of a condition and a seed."""

    base: Base
    condition: str
    seed: int
    folder: Path


class Runs:
    """All runs of one scale in one folder.

    Args:
        folder: of the runs.
        scale: what stands for what.
        data: name of a data set ("cifar10", "cifar100", "svhn") -> where its images are; others are fixtures at the
            scales and setups that have them, and what the recipe says where not.
        seeds: to train; None are those of the scale.
        existing: whether to train and to measure nothing.
        say: is told what happens.

    `stored` are the files of `ImageData` that need not be read again, by `images_name`.
    """

    def __init__(
        self,
        folder: Path,
        scale: Scale,
        data: Mapping[str, str] | None = None,
        seeds: Sequence[int] | None = None,
        existing: bool = False,
        say: Say = print,
    ) -> None:
        self.folder, self.scale, self.existing, self.say = Path(folder), scale, existing, say
        self.data, self.seeds = dict(data or {}), tuple(scale.seeds if seeds is None else seeds)
        self._seen: dict[Path, list[Seen]] = {}
        self._evaluations: dict[Path, Evaluation] = {}
        self._weights: dict[Path, str] = {}
        self.stored: Mapping[str, Path] = {}
        self._images: dict[str, ImageData] = {}

    # ------------------------------------------------------------------------------------------------------- finding

    def path(self, base: Base, condition: str, seed: int) -> Path:
        """Where the run of a condition and a seed goes."""
        return self.folder / base.name / f"{condition}-seed{seed}"

    def finished(self, base: Base, condition: str) -> list[FinishedRun]:
        """The runs that came to their end, by seed. Of a comparator also those of a recipe of its own."""
        folders = [self.folder / base.name]
        folders += [self.folder / f"{base.name}-{ending}" for ending in CONDITIONS[condition].recipes]
        runs: dict[int, FinishedRun] = {}
        for folder in folders:
            for path in sorted(folder.glob(f"{condition}-seed*")):
                seed = re.fullmatch(re.escape(condition) + r"-seed(\d+)", path.name)
                if seed and RunPaths(path).is_finished():
                    runs.setdefault(int(seed[1]), FinishedRun(base, condition, int(seed[1]), path))
        return [runs[seed] for seed in sorted(runs)]

    def missing(self, base: Base, condition: str) -> list[int]:
        """The seeds to train."""
        there = {run.seed for run in self.finished(base, condition)}
        return [seed for seed in self.seeds if seed not in there]

    def seen(self, run: FinishedRun) -> list[Seen]:
        """Every evaluation of a run, on as many images as wanted first, then the largest; of other weights none."""
        if run.folder not in self._seen:
            files = [run.folder / "evaluation.json", *sorted(run.folder.glob("evaluations/*/evaluation.json"))]
            files += sorted(run.folder.parent.glob("*/evaluation.json"))
            evaluations = [self._evaluation(file) for file in dict.fromkeys(files) if file.is_file()]
            layers, plain = self._layers(run), self._twin(run)
            twin = None if plain is None else self._weights_of(plain.folder)
            seen = [
                Seen(evaluation, network, layers, twin)
                for evaluation in evaluations
                for network in evaluation.networks
                if network.weights == self._weights_of(run.folder)
            ]
            wanted = self._wanted(run)
            self._seen[run.folder] = sorted(
                seen, key=lambda one: (one.sizes(wanted) != wanted, *(-size for size in one.sizes(wanted)))
            )
        return self._seen[run.folder]

    def _layers(self, run: FinishedRun) -> tuple[str, ...]:
        """Those that the run was measured at; of one branch alone, those of the runs beside it that have more."""
        beside = [one for name in (PLAIN, "2-LR") for one in self.finished(run.base, name)]
        return max((tuple(self.describe(one).summary.branches) for one in (run, *beside)), key=len)

    def _twin(self, run: FinishedRun) -> FinishedRun | None:
        return next((one for one in self.finished(run.base, PLAIN) if one.seed == run.seed), None)

    def comparable(self, run: FinishedRun) -> list[Seen]:
        """Those of `seen` that are on as many images as wanted: figures on others are not comparable between runs."""
        wanted = self._wanted(run)
        return [one for one in self.seen(run) if one.sizes(wanted) == wanted]

    def _wanted(self, run: FinishedRun) -> tuple[int, ...]:
        """The numbers of images that this scale evaluates on, of those that the run has."""
        data, scale = self.describe(run).summary.data, self.scale
        spectrum = () if scale.spectrum_limit is None else (min(scale.spectrum_limit, data.test_images),)
        return (min(scale.images, data.test_images), min(scale.train_images, data.train_images), *spectrum)

    def _evaluation(self, file: Path) -> Evaluation:
        if file not in self._evaluations:
            self._evaluations[file] = read_evaluation(file)
        return self._evaluations[file]

    def _weights_of(self, folder: Path) -> str:
        if folder not in self._weights:
            path = RunPaths(folder).model / "model.safetensors"
            try:
                stored = load_file(path)
            except (OSError, SafetensorError) as error:
                raise RunError(f"the weights of the run in {folder} cannot be read: {error}") from error
            # A network that is evaluated has float32 weights, whatever they are stored as.
            wide = {name: value.float() if value.is_floating_point() else value for name, value in stored.items()}
            self._weights[folder] = weights_sha256(wide)
        return self._weights[folder]

    # -------------------------------------------------------------------------------------------- training, measuring

    def source(self, base: Base) -> str | None:
        """Where the images of a base are, if not where its recipe says."""
        if base.data in self.data:
            return self.data[base.data]
        if base.fixture in self.data and base.fixture == "svhn":
            return self.data[base.fixture]
        if base.fixture:
            return str(write_fixture(self.folder / "fixtures" / base.fixture, base.fixture))
        return None

    def recipe(self, base: Base, condition: str, seed: int) -> Recipe:
        """The recipe of a run."""
        return base.make_recipe(condition, seed, self.source(base))

    def train(self, base: Base, condition: str, seed: int) -> FinishedRun:
        """Trains a run, or goes on with it where it was interrupted.

        Raises:
            TrainingError: as `timm_lowrank.training.train`.
        """
        path = self.path(base, condition, seed)
        self.say(f"training {path}")
        recipe = self.recipe(base, condition, seed)
        if AcceleratorState._shared_state and AcceleratorState().mixed_precision != recipe.precision:
            AcceleratorState._reset_state()  # accelerate takes one precision a process unless it forgets the last one
        train(recipe, path, resume=True, data=self.images(recipe))
        return FinishedRun(base, condition, seed, path)

    def measure(self, run: FinishedRun, measurements: Sequence[Measurement], other_labels: str | None = None) -> None:
        """Evaluates a run on its own, into RUN/evaluations/, with black-box attacks crafted on its plain twin.

        Raises:
            EvaluationError: as `timm_lowrank.suites.evaluate`.
        """
        self.say(f"measuring {run.folder}: {len(measurements)} figures")
        twin = self._twin(run)
        settings = [*map(repr, measurements), str(self.scale.images), str(self.scale.train_images)]
        settings += [str(self.scale.spectrum_limit)] if self.scale.spectrum_limit else []
        settings += [self._weights_of(twin.folder)] if twin else []
        # What another torch left half done, or a run before it was trained again, is no part of this one.
        settings += [self._weights_of(run.folder), torch.__version__]
        digest = hashlib.sha256("\n".join(settings).encode()).hexdigest()[:12]
        options = Options(
            str(run.folder),
            against=("none",),
            suites=("paper",),
            measurements=tuple(measurements),
            source=None if twin is None or twin.folder == run.folder else str(twin.folder),
            data=self.source(run.base),
            limit=self.scale.images,
            train_limit=self.scale.train_images,
            spectrum_limit=self.scale.spectrum_limit,
            other_labels=other_labels,
            chunk=min(CHUNK, self.scale.images),
            output=run.folder / "evaluations" / digest,
            overwrite=True,
            pages=False,
        )
        evaluate(options, PartialState(), self.images(self.measured_recipe(run)))
        self.forget(run.folder)

    def measured_recipe(self, run: FinishedRun) -> Recipe:
        """The recipe of a run, with its images where they are here: it may have been trained on another machine."""
        recipe, source = self.describe(run).recipe, self.source(run.base)
        return recipe if source is None else dataclasses.replace(recipe, data=source)

    def forget(self, folder: Path) -> None:
        """Reads the evaluations of a run again when they are asked for: it was trained or measured."""
        for file in [path for path in self._evaluations if path.is_relative_to(folder)]:
            del self._evaluations[file]
        self._seen.pop(folder, None)
        self._weights.pop(folder, None)

    def images(self, recipe: Recipe) -> ImageData | None:
        """The images of a recipe, read once and one data set at a time; None where they are streamed."""
        name = self.images_name(recipe)
        if name is None:
            return None
        if name not in self._images:
            self._images.clear()
            options = {key: value for key, value in recipe.data_options().items() if key != "streaming"}
            stored = self.stored.get(name)
            images = load_images(recipe.data, **options) if stored is None else ImageData.stored(stored)
            self._images[name] = images
        return self._images[name]

    def images_name(self, recipe: Recipe) -> str | None:
        """Equal for recipes of the same images; None where they are streamed."""
        if recipe.image_size is not None or recipe.streaming is True:
            return None
        return repr((recipe.data, recipe.data_options()))

    def describe(self, run: FinishedRun) -> Run:
        """Recipe and summary of a run.

        Raises:
            RunError: its files are damaged.
        """
        return Run.open(run.folder)
