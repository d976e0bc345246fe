"""Model cards: the template card.md.jinja filled with what is known of a checkpoint, and of the run that made it."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from huggingface_hub import EvalResult, ModelCardData

from .. import text
from ..checkpoint.loading import CheckpointInfo, read_info
from ..evaluation.noise import STANDARD_DEVIATION
from ..evaluation.results import SOUND, DataInfo, Difference, Figure, Kind, Protocol, Value, difference
from .paths import last_part, without_local_paths

if TYPE_CHECKING:
    from ..training.recipe import Recipe
    from ..training.run import DataSummary
    from .record import RunRecord  # which needs more than is installed with this package

HUB = "https://huggingface.co"
OURS = "timm_lowrank"  # the name of the source of our results in model-index
TAGS = ["image-classification", "timm", "transformers", OURS]
LOWRANK_TAG = "low-rank"  # of networks that were trained with branches
WEIGHTS = "sha256 of model.safetensors"  # the row of the training's table that says what the figures are of
HUB_LICENSES = (  # of those of timm's weights, what the Hub knows; others have to be called "other" there, with a name
    "apache-2.0", "apple-amlr", "apple-ascl", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "gemma", "mit",
)  # fmt: skip
DIRECTIONS = (5, 10)
RECIPE = (  # what the card quotes of it, where it is set
    "model", "model_args", "data_args", "comparator", "comparator_args", "init_from", "epochs", "pretrain_epochs",
    "ramp_epochs", "cooldown_epochs", "batch_size", "optimizer", "learning_rate", "momentum", "weight_decay",
    "nesterov", "schedule", "milestones", "gamma", "warmup_epochs", "augment", "image_size", "crop_scale", "crop_pct",
    "precision", "compile", "ema_decay", "gradient_accumulation", "clip_norm",
)  # fmt: skip
MEANINGFUL: Mapping[str, Callable[[Recipe], bool]] = {  # keys that say something in some recipes alone
    "optimizer": lambda recipe: recipe.optimizer != "sgd",
    "milestones": lambda recipe: recipe.schedule == "step",
    "gamma": lambda recipe: recipe.schedule == "step" and bool(recipe.milestones),
    "crop_scale": lambda recipe: recipe.image_size is not None and recipe.augment != "none",
    "crop_pct": lambda recipe: recipe.image_size is not None,
}


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set as a card names it."""

    kind: str  # an identifier, that of the Hub where it is there
    name: str
    on_hub: bool


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a checkpoint is, as its card says it: the sources that timm, transformers and `from_pretrained` take."""

    name: str
    timm: str
    transformers: str
    own: str
    url: str | None  # None where nobody can follow it
    revision: str | None = None  # beside `transformers` and `own`; None is the main branch

    @classmethod
    def on_hub(cls, repo_id: str, revision: str | None = None) -> Place:
        """A repository, and the branch of it that the card is for; None is the main one.

        The card of a pull request (refs/pr/N) is for the main branch, where it is when that is merged.
        """
        if revision == "main" or (revision or "").startswith("refs/pr/"):
            revision = None
        url = f"{HUB}/{repo_id}/tree/{revision or 'main'}"
        source = f"hf-hub:{repo_id}" + (f"@{revision}" if revision else "")
        return cls(repo_id.split("/")[-1], source, repo_id, repo_id, url, revision)

    @classmethod
    def in_clone(cls, name: str) -> Place:
        """A checkpoint of this project, loaded from the root of a clone."""
        folder = f"hub/checkpoints/{name}"
        return cls(name, f"local-dir:{folder}", folder, name, None)


def short_card(folder: Path, repo_id: str, revision: str | None = None) -> str:
    """README.md for a checkpoint whose owner writes none: what it is, how to load it, and that nothing was evaluated.

    Args:
        folder: as `save_pretrained` writes it.
        repo_id: USER/NAME.
        revision: the branch that the card is for; None is the main one.
    """
    network = read_info(folder)
    metadata = ModelCardData(library_name="timm", pipeline_tag="image-classification", tags=_tags(network))
    return _render(metadata=metadata.to_yaml(), place=Place.on_hub(repo_id, revision), network=network, record=None)


def _tags(network: CheckpointInfo) -> list[str]:
    return [*TAGS, *([LOWRANK_TAG] if network.branches else [])]


def run_card(
    record: RunRecord,
    place: Place,
    files: Mapping[str, str],
    *,
    license: str | None,
    dataset: str | None = None,
) -> str:
    """README.md for a run.

    Args:
        record: the run.
        place: where its checkpoint is.
        files: names of the files beside the card, and what each is.
        license: of the weights, an identifier of the Hub; None names none.
        dataset: the name on the Hub of the data set, if the run had a local copy of it.
    """
    origin = record.origin
    named = origin is not None and license == origin.license and license not in HUB_LICENSES
    data = dataset_of(record.run.summary.data, dataset)
    results = _results(record, place.url, dataset)
    metadata = ModelCardData(
        license="other" if named else license,
        license_name=license if named else None,
        base_model=origin.base_model if origin else None,
        library_name="timm",
        pipeline_tag="image-classification",
        tags=_tags(record.network),
        datasets=[data.kind] if data.on_hub else None,
        metrics=["accuracy"],
        model_name=place.name,
        eval_results=results,
    )
    evaluation = record.evaluation
    return _render(
        metadata=metadata.to_yaml(),
        place=place,
        network=record.network,
        record=record,
        data=data,
        tested=_tested(evaluation.data, record, dataset) if evaluation else None,
        license=license,
        origin=origin,
        files=files,
        attacked=[figure for figure in (evaluation.figures if evaluation else ()) if _shows_robustness(figure)],
        training=_training_facts(record, data),
    )


def dataset_of(data: DataSummary | DataInfo, given: str | None = None) -> Dataset:
    """The data set of a run or an evaluation.

    Args:
        data: as it was loaded. What is not known to be of the Hub is taken for a folder, of whose path only the last
            part is published.
        given: the name on the Hub, if it was loaded from a copy of that.
    """
    if given:
        return Dataset(given, given, True)
    if data.source == "digits":
        return Dataset("digits", "scikit-learn digits", False)
    if data.origin == "hub":
        return Dataset(data.source, data.source, True)
    name = last_part(data.source, "images")
    return Dataset(re.sub(r"[^\w.-]+", "-", name), name, False)


def _tested(data: DataInfo, record: RunRecord, given: str | None) -> Dataset:
    """The data set of an evaluation; the name that is given for that of the run is its name only if it is the same."""
    return dataset_of(data, given if record.same_data else None)


# ------------------------------------------------------------------------------------------------------- front matter


def _results(record: RunRecord, source: str | None, dataset: str | None) -> list[EvalResult]:
    """Clean accuracy, PGD-20 and AutoAttack at 8/255, as far as they were measured."""
    trained = record.run.summary.data
    clean = _result(dataset_of(trained, dataset), "test", "accuracy", record.clean, {}, source)
    if record.evaluation is None:
        return [clean]
    data = record.evaluation.data
    results = []
    for name, figure in record.headline()._asdict().items():
        value = record.own(figure)
        if figure is None or value is None:
            continue
        label = "accuracy" if name == "clean" else f"accuracy under {_METRICS[name]}"
        about = figure.protocol.entries()
        result = _result(_tested(data, record, dataset), data.split, label, value, about, source)
        if name == "clean" and record.same_data and (record.clean.of or 0) < (value.of or 0):
            clean = result  # on more images than the run itself was tested on
        elif name != "clean" or data.fingerprint != trained.fingerprint:
            results.append(result)
    return [clean, *results]


_METRICS = {"pgd": "PGD-20, L_inf 8/255", "autoattack": "AutoAttack standard, L_inf 8/255"}


def _result(
    data: Dataset,
    split: str,
    name: str,
    value: Value,
    protocol: Mapping[str, str | int | float | bool],
    source: str | None,
) -> EvalResult:
    interval = {"low": value.low, "high": value.high} if value.interval else {}
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
        metric_value=round(value.value, 6),
        metric_args={
            **protocol,
            "images": value.of,
            **{f"confidence_95_{end}": round(bound or 0.0, 6) for end, bound in interval.items()},
        },
        source_name=OURS if source else None,
        source_url=source,
    )


# ------------------------------------------------------------------------------------------------- what the card quotes


def _shows_robustness(figure: Figure) -> bool:
    """Clean accuracy, PGD-20 on the network itself and on another one, AutoAttack, and noise."""
    attack, noise = figure.protocol.attack, figure.protocol.noise
    if figure.kind is Kind.NOISE:
        return noise is not None and noise.reading == STANDARD_DEVIATION.name
    if figure.kind not in (Kind.ATTACK, Kind.TRANSFER):
        return figure.kind is Kind.CLEAN
    if attack is None or attack.targeted:
        return False
    madry = attack.setting in (None, "Madry") and bool(attack.random_start)
    return attack.name == "AutoAttack" or (attack.name == "PGD" and attack.steps == 20 and madry)


def _training_facts(record: RunRecord, data: Dataset) -> dict[str, Any]:
    """What the table about the training holds, by name; what is not known is None."""
    summary, recipe = record.run.summary, record.run.recipe
    branches = record.network.branches
    config = branches.config.to_dict() if branches else {}
    facts = {
        "data": f"{data.name}, {summary.data.train_images:,} training images",
        "data fingerprint": summary.data.fingerprint,
        "recipe": recipe.name,
        **{key: getattr(recipe, key) for key in RECIPE if _is_quoted(key, recipe)},
        **{f"lowrank.{key}": value for key, value in config.items()},
        "weights": "of the last step" if summary.weights == "last" else "averaged over the training",
        "seed": summary.seed,
        "took": f"{summary.seconds} seconds on {summary.device}",
        "versions": ", ".join(f"{name} {version}" for name, version in summary.versions.items()),
        WEIGHTS: record.sha256,
    }
    return {name: without_local_paths(value) for name, value in facts.items()}


def _is_quoted(key: str, recipe: Recipe) -> bool:
    """Whether a key of the recipe is set and says something about this training."""
    unset: tuple[object, ...] = (None, (), [], {}, False, 0)
    return getattr(recipe, key) not in unset and MEANINGFUL.get(key, lambda _: True)(recipe)


# ------------------------------------------------------------------------------------------------------------ template


def _render(**context: object) -> str:
    return _environment().get_template("card.md.jinja").render(context)


@functools.cache
def _environment() -> jinja2.Environment:
    """Markdown, not HTML: whatever comes from elsewhere goes through `escaped` or `code` in the template."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("timm_lowrank", "publish"),
        autoescape=False,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "code": code,
        "escaped": escaped,
        "gap": _gap,
        "joined": lambda paragraph: " ".join(paragraph.split()),
        "listing": text.listing,
        "plain": _plain,
        "protocol": _protocol,
        "share": share,
        "thousands": lambda number: f"{number:,}",
        "without_local_paths": without_local_paths,
    }
    environment.globals |= {"DIRECTIONS": DIRECTIONS, "Kind": Kind, "SOUND": SOUND, "difference": difference}
    return environment


def escaped(value: object) -> str:
    """Text that shows as it is, in a paragraph and in the cell of a table; on one line."""
    entities = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
    shown = "".join(entities.get(sign, sign) for sign in text.one_line(value))
    shown = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", shown)
    return re.sub(r"^(#{1,6}|[-+=]|\d+[.)])(?=\s|$)", r"\\\1", shown)  # what begins a heading or a list


def code(value: object) -> str:
    """Text as code, in a paragraph and in the cell of a table; on one line."""
    shown = text.one_line(value).replace("|", "\\|").replace("<!--", "<! --")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    space = " " if "`" in shown else ""
    return f"{fence}{space}{shown}{space}{fence}" if shown else ""


def share(value: Value | None) -> str:
    """A share with its interval, 96.1 % (93.6 to 97.7), or that it was not measured."""
    if value is None:
        return "not measured"
    ends = f" ({text.percent(value.interval[0])} to {text.percent(value.interval[1])})" if value.interval else ""
    return f"{text.percent(value.value)} %{ends}"


def _gap(gap: Difference | None) -> str:
    """A difference in percentage points; nothing where there is none."""
    if gap is None:
        return ""
    return f"{100 * gap.value:+.1f}" + (", within chance" if gap.distinguishable is False else "")


def _protocol(protocol: Protocol, value: Value) -> str:
    """PGD, L_inf, cross-entropy, last iterate; radius 8/255; 20 steps of 2/255; random start; 1 restart; ..."""
    entries = {key: entry for key, entry in protocol.entries().items() if key not in ("setting", "images", "seed")}
    words = [*text.phrases(entries), text.counted(value.of or protocol.images or 0, "image")]
    return "; ".join([*words, *([] if protocol.seed is None else [f"seed {protocol.seed}"])])


def _plain(value: object) -> str:
    """{layer3: 20, pre_logits: 10} for a mapping; everything else as it is."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_plain(entry)}' for key, entry in value.items())}}}"
    return f"[{', '.join(map(_plain, value))}]" if isinstance(value, list | tuple) else str(value)
