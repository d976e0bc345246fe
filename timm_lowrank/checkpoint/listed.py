"""The checkpoints of this project, found by bare name: the list hub/checkpoints.yaml and the folders of a clone.

- name: cifar10-resnet10-2lr
  repo: null                                      # USER/NAME on the Hub, once it is there
  recipe: recipes/configs/cifar10-small.yaml      # from the root of the project
  sha256: a0384bc35bb0...                         # of model.safetensors
  figures: {clean: {...}, pgd: {...}, autoattack: {...}, effective_rank: {layer3: {value: 382, plain: 726}}}
  sample: {source: tests/data/cifar10-sample, images: 200, right: 143}

The wheel has the list, not the weights: they lie in hub/checkpoints/NAME of a clone, and on the Hub once published.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, nearest
from ..files import parse_yaml
from ..records import default_of
from .remote import checked_repo_id

CLONE = Path(__file__).resolve().parents[2]  # of the project, if it is one


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
class Sample:
    """A few test images that come with the clone, and how many of them the network tells right, in float32."""

    source: str  # "digits", or a folder of parquet files from the root of the project
    images: int
    right: int

    def __post_init__(self) -> None:
        if not all(isinstance(count, int) for count in (self.images, self.right)) or not 0 <= self.right <= self.images:
            raise ValueError("right must lie between 0 and images")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListedCheckpoint:
    """A row of the list."""

    name: str
    repo: str | None  # USER/NAME on the Hub; None while it is not there
    recipe: str  # from the root of the project
    sha256: str  # of model.safetensors
    figures: Figures
    dataset: str | None = None  # the name on the Hub of the data set, if the run had a copy of it in a folder
    sample: Sample | None = None  # None without weights in the clone

    def __post_init__(self) -> None:
        checked_repo_id(f"user/{self.name}")
        checked_repo_id(str(self.repo or f"user/{self.name}"))
        if not re.fullmatch("[0-9a-f]{64}", str(self.sha256)):
            raise ValueError(f"sha256 must be 64 hexadecimal digits in lower case, not {self.sha256!r}")


def read_checkpoints(path: Path) -> tuple[ListedCheckpoint, ...]:
    """Reads the list.

    Raises:
        CheckpointError: unknown or missing keys, names twice, sums and figures that cannot be.
    """
    import yaml

    try:
        rows = parse_yaml(path.read_text(encoding="utf-8"))
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
    if not isinstance(ranks, dict):
        raise ValueError("effective_rank must be a mapping")
    known = {
        key: Accuracy(**_fields(Accuracy, value, key)) for key, value in figures.items() if key != "effective_rank"
    }
    ranks = {layer: Rank(**_fields(Rank, rank, f"the rank of {layer}")) for layer, rank in ranks.items()}
    sample = fields.get("sample")
    return ListedCheckpoint(
        **{
            **fields,
            "figures": Figures(**known, effective_rank=ranks),
            "sample": None if sample is None else Sample(**_fields(Sample, sample, "sample")),
        }
    )


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


# ---------------------------------------------------------------------------------------------------------- by name


def list_of_checkpoints() -> Path:
    """The list: hub/checkpoints.yaml of a clone, which an installed wheel has beside this module."""
    installed = Path(__file__).with_name("checkpoints.yaml")
    return installed if installed.is_file() else CLONE / "hub" / "checkpoints.yaml"


def folder_of(name: str) -> Path:
    """Where a clone has the checkpoint of this name; it need not be there."""
    return CLONE / "hub" / "checkpoints" / name


def is_bare(source: str) -> bool:
    """Whether `source` can be the name of a checkpoint of this project: neither a path nor USER/NAME."""
    return bool(re.fullmatch(r"[\w.-]*\w[\w.-]*", source))


def _listed() -> Sequence[ListedCheckpoint]:
    path = list_of_checkpoints()
    return read_checkpoints(path) if path.is_file() else ()


def names_of_checkpoints() -> list[str]:
    """What checkpoints of this project there are."""
    return [one.name for one in _listed()]


def find_checkpoint(name: str) -> tuple[ListedCheckpoint, Path | None]:
    """The checkpoint of a bare name, and its folder if this is a clone that holds it.

    Raises:
        CheckpointError: there is none of this name, with those that there are; or it is neither published nor here,
            with where to get it.
    """
    one = next((one for one in _listed() if one.name == name), None)
    if one is None:
        names = names_of_checkpoints()
        raise CheckpointError(
            f"{name!r} is no repository: the name of a repository has the form USER/NAME; there is no folder {name!r} "
            f"either, and no checkpoint of this project has that name. There are: {', '.join(names) or 'none'}"
        )
    folder = folder_of(name)
    here = folder if folder.is_dir() else None
    if one.repo is None and here is None:
        raise CheckpointError(
            f"{name} is not on the Hub yet, and its weights are not part of the installed package: clone the project "
            f"and give the folder hub/checkpoints/{name} of the clone, or train it with its recipe, "
            f"`timm-lowrank train {Path(one.recipe).stem}`"
        )
    return one, here
