"""`evaluate`: networks side by side, into evaluation.json, plots/*.png and report.html."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import itertools
import json
import math
import platform
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ..evaluation.checks import check_before_attack
from ..evaluation.errors import EvaluationError, EvaluationWarning
from ..report import write_plots, write_report
from ..training import ImageData, load_images
from ..training.disk import disk_errors, read_json, write_whole
from .context import Context, build_context
from .journal import ADVICE, Journal
from .measurements.base import Findings
from .plan import chosen_suites, measurements_of
from .runner import header, run
from .subject import Subject, load_subject

FORMAT = 1
PACKAGES = ("timm_lowrank", "torch", "timm", "pyautoattack", "scikit-learn")
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


def evaluate(options: Options, state: PartialState) -> dict[str, Any]:
    """Evaluates, on all processes of `state` together, and writes the files on the main process.

    Returns:
        The content of evaluation.json; on other processes {}.

    Raises:
        EvaluationError: for a mistake in the options, networks or data, before anything is written.
        TrainingError: data that cannot be read, a disk that cannot be written; what is finished is kept.
    """
    began = time.monotonic()
    suites = chosen_suites(options.suites)
    measurements = measurements_of(suites)
    if options.chunk < 1:
        raise EvaluationError(f"--batch-size must be at least 1, not {options.chunk}")
    subjects = load_subjects(options)
    data, noted = load_data(options, subjects)
    context = build_context(
        subjects,
        data,
        _layers(subjects),
        state.device,
        seed=options.seed,
        chunk=options.chunk,
        limit=max(suite.images for suite in suites) if options.limit is None else options.limit,
        train_limit=max(s.train_images for s in suites) if options.train_limit is None else options.train_limit,
        other_labels=_other_labels(options, subjects),
    )
    folder = _output(options)
    same = header(context, measurements, data.fingerprint)
    finished = _finished(folder, same, options.overwrite)
    if finished is not None:
        return finished if state.is_main_process else {}
    said = _sane(context)
    journal = Journal(folder / "evaluation.json.partial", same)
    findings = run(context, measurements, journal, state)
    if not state.is_main_process:
        return {}
    findings.warnings = [*noted, *said, *findings.warnings]
    content = {
        "format": FORMAT,
        "suite": " + ".join(options.suites),
        "command": options.command,
        "seed": options.seed,
        "chunk": options.chunk,
        "confidence": context.confidence,
        "device": _device(state.device),
        "processes": state.num_processes,
        "seconds": round(time.monotonic() - began, 1),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": _versions(),
        "data": context.describe_data(data),
        "networks": [subject.description() for subject in subjects],
        **_content(findings),
        "settings": same,
    }
    write_evaluation(content, folder)
    journal.remove()
    return content


def write_evaluation(content: dict[str, Any], folder: Path) -> None:
    """Writes plots/*.png, report.html and last evaluation.json.

    Raises:
        RunError: the disk is full or not writable.
    """
    with disk_errors(f"could not write to {folder}", ADVICE):
        folder.mkdir(parents=True, exist_ok=True)
        write_plots(content, folder / "plots")
        write_report(content, folder)
        write_whole(folder / "evaluation.json", json.dumps(content, indent=1, allow_nan=False) + "\n")


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


def load_data(options: Options, subjects: Sequence[Subject]) -> tuple[ImageData, list[str]]:
    """The images, and a warning for each network that was trained on others.

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
    source = options.data or recipe.data  # type: ignore[union-attr]
    data = load_images(source, progress=True, **(recipe.data_args if recipe else {}))
    noted = [
        f"{subject.title} was trained on other images than these (their fingerprints differ)"
        for subject in subjects
        if subject.data_fingerprint not in (None, data.fingerprint)
    ]
    return data, noted


def _sane(context: Context) -> list[str]:
    """What is odd about networks and images, before hours are spent on them."""
    first = slice(0, context.chunk)
    said = []
    for title, subject in context.subjects.items():
        with warnings.catch_warnings():  # they go into the report
            warnings.simplefilter("ignore", EvaluationWarning)
            found = check_before_attack(
                subject.model, context.images[first], context.labels[first], classes=context.classes
            )
        said += [f"{title}: {text}" for text in found]
    return said


def _other_labels(options: Options, subjects: Sequence[Subject]) -> ImageData | None:
    if options.other_labels is None:
        return None
    recipe = next((subject.recipe for subject in subjects if subject.recipe), None)
    arguments = {**(recipe.data_args if recipe else {}), "label_column": options.other_labels}
    return load_images(options.data or recipe.data, **arguments)  # type: ignore[union-attr]


def _layers(subjects: Sequence[Subject]) -> list[str]:
    layers = list(dict.fromkeys(layer for subject in subjects for layer in subject.layers))
    return layers or ["pre_logits"]


def _output(options: Options) -> Path:
    if options.output is not None:
        return options.output
    folder = Path(options.network)
    return folder if folder.is_dir() else Path("evaluations") / options.network.replace("/", "_").replace(":", "_")


def _finished(folder: Path, same: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """The evaluation that is there already, if it is the very one that is asked for."""
    path = folder / "evaluation.json"
    if not path.exists() or overwrite:
        return None
    content = read_json(path)
    if content.get("settings") == same:
        print(f"{path} is complete", flush=True)
        return content
    raise EvaluationError(
        f"{path} holds another evaluation (suite {content.get('suite')!r}): replace it with --overwrite, or choose "
        "another folder with --output"
    )


def _content(findings: Findings) -> dict[str, Any]:
    """Findings as JSON has them: what is not a finite number is null, and a warning says so."""
    content = dataclasses.asdict(findings)
    for figure in content["figures"]:
        for title, value in figure["values"].items():
            if not math.isfinite(value["value"]):
                findings.warnings.append(f"{title}, {figure['label']}: not a number (of {value['of']} images)")
    content["warnings"] = findings.warnings
    return _finite(content)  # type: ignore[no-any-return]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)
