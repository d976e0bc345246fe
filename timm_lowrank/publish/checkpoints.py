"""The list of published checkpoints, hub/checkpoints.yaml, in which nothing is typed that a run has not measured.

- name: cifar10-resnet10-2lr
  repo: null                                      # USER/NAME on the Hub, once it is there
  recipe: recipes/configs/cifar10-small.yaml      # from the root of the project
  sha256: a0384bc35bb0...                         # of model.safetensors
  figures: {clean: {...}, pgd: {...}, autoattack: {...}, effective_rank: {layer3: {value: 382, plain: 726}}}
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub.utils import yaml_dump

from ..checkpoint.remote import checked_repo_id
from ..errors import CheckpointError, nearest
from ..evaluation.results import Value
from ..records import default_of, encode
from ..text import markdown_table, percent
from .card import HUB, code, escaped, share
from .merging import replaced

if TYPE_CHECKING:
    from .record import RunRecord


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accuracy:
    """An accuracy in [0, 1] with its 95 % interval."""

    value: float
    low: float
    high: float
    images: int
    plain: float | None = None  # of the plain twin

    def __post_init__(self) -> None:
        shares = (self.value, self.low, self.high, 0.0 if self.plain is None else self.plain)
        if not all(isinstance(value, int | float) and 0 <= value <= 1 for value in shares):
            raise ValueError("shares lie between 0 and 1")
        if not isinstance(self.images, int) or self.images < 1:
            raise ValueError("images must be a positive integer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rank:
    """An effective rank: directions that hold 99 % of the variance of a layer."""

    value: int
    plain: int | None = None  # of the plain twin

    def __post_init__(self) -> None:
        if not all(isinstance(rank, int) and rank > 0 for rank in (self.value, self.plain or 1)):
            raise ValueError("effective ranks are positive integers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
    """What a run has measured; None for what it has not."""

    clean: Accuracy | None = None
    pgd: Accuracy | None = None  # PGD-20, L_inf 8/255
    autoattack: Accuracy | None = None  # AutoAttack standard, L_inf 8/255
    effective_rank: Mapping[str, Rank] = dataclasses.field(default_factory=dict)  # by layer


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListedCheckpoint:
    """A row of the list."""

    name: str
    repo: str | None  # USER/NAME on the Hub; None while it is not there
    recipe: str  # from the root of the project
    sha256: str  # of model.safetensors
    figures: Figures

    def __post_init__(self) -> None:
        checked_repo_id(self.repo or f"user/{self.name}")
        if not re.fullmatch("[0-9a-f]{64}", str(self.sha256)):
            raise ValueError(f"sha256 must be 64 hexadecimal digits in lower case, not {self.sha256!r}")


def read_checkpoints(path: Path) -> tuple[ListedCheckpoint, ...]:
    """Reads the list.

    Raises:
        CheckpointError: unknown or missing keys, names twice, sums and figures that cannot be.
    """
    try:
        rows = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CheckpointError(f"cannot read the list {path}: {' '.join(str(error).split())}") from error
    if not isinstance(rows, list):
        raise CheckpointError(f"{path} must hold a list of checkpoints, [] for none")
    listed: list[ListedCheckpoint] = []
    for number, row in enumerate(rows, start=1):
        try:
            listed.append(_row(row))
            if listed[-1].name in [other.name for other in listed[:-1]]:
                raise ValueError("there is a row of this name already")
        except ValueError as error:
            name = row.get("name", "without a name") if isinstance(row, Mapping) else "without a name"
            raise CheckpointError(f"{path}: row {number} ({name}): {error}") from error
    return tuple(listed)


def _row(row: object) -> ListedCheckpoint:
    fields = _fields(ListedCheckpoint, row, "row")
    figures = _fields(Figures, fields["figures"], "figures")
    ranks = figures.get("effective_rank", {})
    known = {
        key: Accuracy(**_fields(Accuracy, value, key)) for key, value in figures.items() if key != "effective_rank"
    }
    ranks = {layer: Rank(**_fields(Rank, rank, f"the rank of {layer}")) for layer, rank in ranks.items()}
    return ListedCheckpoint(**{**fields, "figures": Figures(**known, effective_rank=ranks)})


def _fields(kind: type[Any], values: object, what: str) -> dict[str, Any]:
    """The arguments of a dataclass. Raises ValueError unless they are all there and no others."""
    if not isinstance(values, dict):
        raise ValueError(f"{what} must be a mapping")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in values:
        if key not in fields:
            raise ValueError(f"{what}: there is no key {key!r}. {nearest(str(key), fields)}")
    for name, field in fields.items():
        if name not in values and default_of(field) is dataclasses.MISSING:
            raise ValueError(f"{what}: the key {name!r} is missing")
    return values


# ---------------------------------------------------------------------------------------------------- rows and table


def figures_of(record: RunRecord) -> Figures:
    """What the list says about a run: the figures of its model-index, and the effective rank of each layer."""
    headline = record.headline()
    ranks = {layer: record.effective_rank(layer) for layer in record.run.summary.branches}
    return Figures(
        clean=_accuracy(record.clean, record.plain_clean),
        pgd=_accuracy(record.own(headline.pgd), record.plain(headline.pgd)),
        autoattack=_accuracy(record.own(headline.autoattack), record.plain(headline.autoattack)),
        effective_rank={layer: Rank(value=rank.own, plain=rank.plain) for layer, rank in ranks.items()},
    )


def _accuracy(own: Value | None, plain: Value | None) -> Accuracy | None:
    if own is None or own.interval is None or own.of is None:
        return None
    low, high = (round(end, 6) for end in own.interval)
    twin = None if plain is None else round(plain.value, 6)
    return Accuracy(value=round(own.value, 6), low=low, high=high, images=own.of, plain=twin)


def row_of(record: RunRecord, name: str, recipe: str, repo: str | None = None) -> str:
    """The row of a run in YAML, to be put into the list.

    Args:
        record: the run.
        name: of the checkpoint.
        recipe: from the root of the project.
        repo: USER/NAME on the Hub, if it is there.
    """
    row = ListedCheckpoint(name=name, repo=repo, recipe=recipe, sha256=record.sha256, figures=figures_of(record))
    return str(yaml_dump([encode(row)], sort_keys=False))


def checkpoints_table(checkpoints: Sequence[ListedCheckpoint]) -> str:
    """The checkpoints as a table in Markdown, for README.md."""
    if not checkpoints:
        return "No checkpoint has been published yet."
    rows = []
    for one in checkpoints:
        name = f"[{escaped(one.name)}]({HUB}/{one.repo})" if one.repo else escaped(one.name)
        recipe = code(Path(one.recipe).stem)  # a name that `timm-lowrank train` takes
        ranks = [
            f"{code(layer)} {rank.value}" + (f" (plain {rank.plain})" if rank.plain else "")
            for layer, rank in one.figures.effective_rank.items()
        ]
        accuracies = [_cell(accuracy) for accuracy in (one.figures.clean, one.figures.pgd, one.figures.autoattack)]
        rows.append([name, recipe, *accuracies, ", ".join(ranks) or "not measured"])
    header = ["checkpoint", "recipe", "clean accuracy", "PGD-20, 8/255", "AutoAttack, 8/255", "effective rank"]
    return markdown_table(header, rows, right=(2, 3, 4))


def _cell(accuracy: Accuracy | None) -> str:
    if accuracy is None:
        return "not measured"
    plain = "" if accuracy.plain is None else f"; plain {percent(accuracy.plain)} %"
    return f"{share(Value(accuracy.value, accuracy.low, accuracy.high))} of {accuracy.images:,}{plain}"


def write_table(checkpoints: Sequence[ListedCheckpoint], path: Path) -> None:
    """Puts the table into a file, between the marks of its generated section "checkpoints".

    Raises:
        CheckpointError: the file is not there or has no such marks.
    """
    try:
        text = replaced(path.read_bytes().decode("utf-8"), "checkpoints", checkpoints_table(checkpoints), str(path))
        if text is None:
            raise CheckpointError(
                f"{path} has no place for the table: put the lines <!-- generated: checkpoints --> and "
                "<!-- end of generated: checkpoints --> where it shall stand"
            )
        path.write_bytes(text.encode("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot write the table to {path}: {error}") from error
