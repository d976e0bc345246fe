"""The front matter of a card: `ModelCardData` with its results, for the Hub's filters and tables."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from .figures import AUTOATTACK, CLEAN, PGD, Measured
from .merging import OURS
from .record import RunRecord

HUB = "https://huggingface.co"
TAGS = ["image-classification", "timm", "transformers", OURS]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set as a card names it."""

    kind: str  # an identifier, that of the Hub where it is there
    name: str
    on_hub: bool


def dataset_of(source: str, given: str | None = None) -> Dataset:
    """The data set of a run.

    Args:
        source: as the run names it: "digits", USER/NAME, or a folder, of which only the last part is published.
        given: the name on the Hub, if the source is a copy of that.
    """
    if given:
        return Dataset(given, given, True)
    if source == "digits":
        return Dataset("digits", "scikit-learn digits", False)
    if re.fullmatch(r"[\w.-]*\w[\w.-]*/[\w.-]+", source) and not source.startswith(".") and not Path(source).exists():
        return Dataset(source, source, True)
    name = re.split(r"[/\\]", source.rstrip("/\\"))[-1] or "images"
    return Dataset(re.sub(r"[^\w.-]+", "-", name), name, False)


def metadata(
    record: RunRecord, repo_id: str, *, license: str | None = None, dataset: str | None = None, revision: str = "main"
) -> dict[str, Any]:
    """The front matter of a run's card: keys as the Hub knows them, model-index among them."""
    data = dataset_of(record.summary["data"]["source"], dataset)
    card = ModelCardData(
        license=license,
        library_name="timm",
        pipeline_tag="image-classification",
        tags=[*TAGS, *(["low-rank"] if record.lowrank else [])],
        datasets=[data.kind] if data.on_hub else None,
        metrics=["accuracy"],
        model_name=repo_id.split("/")[-1],
        eval_results=_results(record, f"{HUB}/{repo_id}/tree/{revision}", dataset),
    )
    return dict(card.to_dict())


def _results(record: RunRecord, source: str, dataset: str | None) -> list[EvalResult]:
    """Clean accuracy, PGD-20 and AutoAttack at 8/255, as far as they were measured."""
    trained = dataset_of(record.summary["data"]["source"], dataset)
    clean = _result(trained, "test", "accuracy", record.clean, {}, source)
    found = []
    for key, name in (_NAMES if record.evaluation else {}).items():
        value, figure = record.own(key), record.figure(key)
        if value is None or figure is None or record.evaluation is None:
            continue
        data = record.evaluation["data"]
        result = _result(dataset_of(data["source"], dataset), data["split"], name, value, figure["protocol"], source)
        found.append(result)
        if key == CLEAN and (record.clean.of or 0) < (value.of or 0):
            clean = found.pop()  # on more images than the run itself was tested on
        elif key == CLEAN and data.get("fingerprint") == record.summary["data"].get("fingerprint"):
            found.pop()
    return [clean, *found]


_NAMES = {
    CLEAN: "accuracy",
    PGD: "accuracy under PGD-20, L_inf 8/255",
    AUTOATTACK: "accuracy under AutoAttack standard, L_inf 8/255",
}


def _result(
    data: Dataset, split: str, name: str, value: Measured, protocol: Mapping[str, Any], source: str
) -> EvalResult:
    interval = {"low": value.low, "high": value.high} if value.low is not None else {}
    # How it was measured goes with the metric: two results on one data set with different arguments of the data set
    # are taken for one, and the second is lost.
    return EvalResult(
        task_type="image-classification",
        task_name="Image Classification",
        dataset_type=data.kind,
        dataset_name=data.name,
        dataset_split=split,
        metric_type="accuracy",
        metric_name=name,
        metric_value=round(float(value.value), 6),
        metric_args={
            **{key: _plain(entry) for key, entry in protocol.items()},
            "images": value.of,
            **{f"confidence_95_{end}": round(float(bound or 0), 6) for end, bound in interval.items()},
        },
        source_name=OURS,
        source_url=source,
    )


def _plain(value: Any) -> Any:
    """As JSON has it: nothing that YAML would write with a tag of Python's."""
    return value if isinstance(value, str | int | float | bool | None) else str(value)
