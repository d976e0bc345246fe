"""`evaluate`: networks side by side, into evaluation.json, plots/*.png and report.html."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import math
import platform
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ..errors import EvaluationError, EvaluationWarning
from ..evaluation.checks import check_before_attack
from ..evaluation.results import evaluation_from_json
from ..files import disk_errors, read_json, write_whole
from ..report import write_plots, write_report
from .context import Context, build_context
from .inputs import Options, layers_of, load_data, load_other_labels, load_subjects, output_of
from .journal import ADVICE, Journal
from .measurements.base import Findings
from .plan import chosen_suites, measurements_of
from .runner import header, run

FORMAT = 1
PACKAGES = ("timm_lowrank", "torch", "timm", "pyautoattack", "scikit-learn")


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
    limit = max(suite.images for suite in suites) if options.limit is None else options.limit
    train_limit = max(s.train_images for s in suites) if options.train_limit is None else options.train_limit
    data, noted = load_data(options, subjects, train_limit, limit)
    context = build_context(
        subjects,
        data,
        layers_of(subjects),
        state.device,
        seed=options.seed,
        chunk=options.chunk,
        limit=limit,
        train_limit=train_limit,
        other_labels=load_other_labels(options, subjects),
    )
    folder = output_of(options)
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
        "suite": " + ".join(options.suites),
        "command": options.command,
        **_setting(context, state),
        "seconds": round(time.monotonic() - began, 1),
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
        evaluation = evaluation_from_json(content)
        write_plots(evaluation, folder / "plots")
        write_report(evaluation, folder)
        write_whole(folder / "evaluation.json", json.dumps(content, indent=1, allow_nan=False) + "\n")


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


def _finished(folder: Path, same: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """The evaluation that is there already, if it is the very one that is asked for."""
    path = folder / "evaluation.json"
    if not path.exists() or overwrite:
        return None
    content = read_json(path, EvaluationError)
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


def _setting(context: Context, state: PartialState) -> dict[str, Any]:
    """How and when it was measured."""
    return {
        "format": FORMAT,
        "seed": context.seed,
        "chunk": context.chunk,
        "confidence": context.confidence,
        "device": _device(state.device),
        "processes": state.num_processes,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": _versions(),
    }


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
