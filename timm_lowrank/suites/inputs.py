"""`Options` of an evaluation, and the networks and images that they mean."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

from ..data.drawn import drawn_images
from ..data.streamed import StreamedData
from ..errors import EvaluationError
from ..training import ImageData, load_images
from ..training.data import load_data as find_data
from .subject import Subject, load_subject

NO_TWIN = "none"


@dataclasses.dataclass(frozen=True)
class Options:
    """What to evaluate and how.

    Args:
        network: a run folder, a checkpoint folder, hf-hub:USER/NAME or a timm name.
        against: the networks beside it; without any the twin in the run folder if there is one, ("none",) nothing.
        suites: of "quick", "paper" and "autoattack".
        data: where the images are; None is where the run's recipe says.
        limit, train_limit: test images, and training images that classifiers and PCA are fitted on, as many of
            each class as there are; None are those of the suite.
        other_labels: a column of other labels, for the transfer of the representation to them.
        seed: of everything random.
        chunk: images in a batch and in a piece of work. AutoAttack's random numbers depend on it.
        output: where evaluation.json, plots/ and report.html go; None is the run folder.
        overwrite: whether a finished evaluation that was another one may be replaced.
        command: how to repeat it, for the report.
    """

    network: str
    against: tuple[str, ...] = ()
    suites: tuple[str, ...] = ("quick",)
    data: str | None = None
    limit: int | None = None
    train_limit: int | None = None
    other_labels: str | None = None
    seed: int = 0
    chunk: int = 100
    output: Path | None = None
    overwrite: bool = False
    command: str | None = None


def load_subjects(options: Options) -> list[Subject]:
    """The network and those beside it, with different titles.

    Raises:
        EvaluationError: one cannot be loaded, or two are the same.
    """
    twin = Path(options.network) / "twin"
    against = options.against or ((str(twin),) if (twin / "summary.json").exists() else ())
    subjects = [load_subject(where) for where in (options.network, *against) if where != NO_TWIN]
    for one, other in itertools.combinations(subjects, 2):
        if one.weights == other.weights:
            raise EvaluationError(f"{one.path} and {other.path} hold the same weights: there is nothing to compare")
    for titles in (
        [subject.title for subject in subjects],
        [Path(subject.path).name for subject in subjects],
        [subject.path for subject in subjects],
    ):
        if len(set(titles)) == len(titles):
            break
    return [dataclasses.replace(subject, title=title) for subject, title in zip(subjects, titles, strict=True)]


def load_data(
    options: Options, subjects: Sequence[Subject], train_limit: int, limit: int
) -> tuple[ImageData, list[str]]:
    """The images, and a warning for each network that was trained on others.

    Of a data set that the recipe streams, `train_limit` training and `limit` test images, as many of each class; of
    others all.

    Raises:
        EvaluationError: nothing says where they are.
        DataError: they cannot be read.
    """
    recipe = next((subject.recipe for subject in subjects if subject.recipe), None)
    if recipe is None and options.data is None:
        raise EvaluationError(
            f"{options.network} does not say what it was trained on: give --data, a folder of parquet files, "
            'the name of a data set on the Hub, or "digits"'
        )
    if recipe is None:
        data = load_images(str(options.data), progress=True)
    else:
        found = find_data(dataclasses.replace(recipe, data=options.data or recipe.data))
        if isinstance(found, StreamedData) and options.other_labels is not None:
            raise EvaluationError("--other-labels needs images that fit into memory, and these are streamed")
        data = drawn_images(found, train_limit, limit, progress=True) if isinstance(found, StreamedData) else found
    noted = [
        f"{subject.title} was trained on other images than these (their fingerprints differ)"
        for subject in subjects
        if subject.data_fingerprint not in (None, data.fingerprint)
    ]
    return data, noted


def load_other_labels(options: Options, subjects: Sequence[Subject]) -> ImageData | None:
    """The same images with the labels of another column, if one is named."""
    if options.other_labels is None:
        return None
    recipe = next((subject.recipe for subject in subjects if subject.recipe), None)
    arguments = {**(recipe.data_args if recipe else {}), "label_column": options.other_labels}
    return load_images(options.data or recipe.data, **arguments)  # type: ignore[union-attr]


def layers_of(subjects: Sequence[Subject]) -> list[str]:
    """The layers that any of the networks was measured at when it was trained; without any the last one."""
    layers = list(dict.fromkeys(layer for subject in subjects for layer in subject.layers))
    return layers or ["pre_logits"]


def output_of(options: Options) -> Path:
    """Where the report goes."""
    if options.output is not None:
        return options.output
    folder = Path(options.network)
    return folder if folder.is_dir() else Path("evaluations") / options.network.replace("/", "_").replace(":", "_")
