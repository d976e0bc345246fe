"""`load_manifest`: the list of published checkpoints, in which nothing is typed that a run has not measured."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from ..checkpoint import CheckpointError
from ..checkpoint.remote import checked_repo_id
from ..errors import nearest
from .figures import HEADLINE

FORMAT = 1
_TOP = ("format", "user", "checkpoints")
_ROW = {"name": str, "config": str, "run": str, "sha256": str, "figures": dict}
EFFECTIVE_RANK = "effective_rank"


@dataclasses.dataclass(frozen=True)
class Row:
    """A published checkpoint."""

    name: str  # of the repository, USER/NAME or NAME alone
    config: str  # the recipe, from the root of the project
    run: str  # the folder of the run, from the root of the project; it is not part of the project
    sha256: str  # of model.safetensors
    figures: Mapping[str, Any]  # as `headline` gives them

    def repo_id(self, user: str | None) -> str:
        """USER/NAME. Raises CheckpointError where nobody says whose it is."""
        if "/" not in self.name and user is None:
            raise CheckpointError(
                f"the manifest does not say under whose account {self.name} is published: give --user USER, or set "
                "user: in it"
            )
        return self.name if "/" in self.name else f"{user}/{self.name}"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """hub/checkpoints.yaml."""

    path: Path
    user: str | None
    rows: tuple[Row, ...]

    @property
    def root(self) -> Path:
        """Of the project: config and run are meant from there."""
        return self.path.resolve().parent.parent


def load_manifest(path: Path) -> Manifest:
    """Reads and checks a manifest.

    Raises:
        CheckpointError: with every problem found: unknown or missing keys, names twice, configs that do not exist,
            sums and figures that cannot be.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CheckpointError(f"cannot read the manifest {path}: {' '.join(str(error).split())}") from error
    manifest = Manifest(path, None, ())
    problems = list(_problems(content, manifest.root))
    if problems:
        shown = problems[0] if len(problems) == 1 else "\n" + "\n".join(f"- {problem}" for problem in problems)
        raise CheckpointError(f"{path}: {shown}")
    rows = tuple(Row(**row) for row in content["checkpoints"])
    return dataclasses.replace(manifest, user=content.get("user"), rows=rows)


# --------------------------------------------------------------------------------------------------------- checking


def _problems(content: Any, root: Path) -> Iterable[str]:
    if not isinstance(content, dict):
        yield "it must hold a mapping with format and checkpoints"
        return
    yield from (f"there is no key {key!r}. {nearest(str(key), _TOP)}" for key in content if key not in _TOP)
    if content.get("format") != FORMAT:
        yield f"format must be {FORMAT}, not {content.get('format')!r}"
    if not isinstance(content.get("user"), str | None):
        yield f"user must be a name, not {content['user']!r}"
    rows = content.get("checkpoints")
    if not isinstance(rows, list):
        yield "checkpoints must be a list of rows, [] for none"
        return
    names: list[str] = []
    for place, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            yield f"row {place} must be a mapping"
            continue
        where = f"row {place} ({row.get('name', 'without a name')})"
        problems = list(_row_problems(row, root))
        yield from (f"{where}: {problem}" for problem in problems)
        name = str(row.get("name")).split("/")[-1].lower()
        if name in names and "name" in row:
            yield f"{where}: row {names.index(name) + 1} has this name already"
        names.append(name)


def _row_problems(row: Mapping[str, Any], root: Path) -> Iterable[str]:
    yield from (f"there is no key {key!r}. {nearest(str(key), _ROW)}" for key in row if key not in _ROW)
    for key, kind in _ROW.items():
        if key not in row:
            yield f"the key {key!r} is missing"
        elif not isinstance(row[key], kind):
            yield f"{key} must be {'a mapping' if kind is dict else 'a string, in quotes'}, not {row[key]!r}"
    name, config, run, sha256 = (row.get(key) for key in ("name", "config", "run", "sha256"))
    if isinstance(name, str):
        try:
            checked_repo_id(name if "/" in name else f"user/{name}")
        except CheckpointError as error:
            yield str(error)
    if isinstance(config, str) and not (_inside(config) and (root / config).is_file()):
        near = sorted(path.relative_to(root).as_posix() for path in root.glob("recipes/configs/*.yaml"))
        yield f"there is no config {config}. {nearest(config, near)}"
    if isinstance(run, str) and not _inside(run):
        yield f"run must be a folder inside the project, such as runs/digits, not {run!r}"
    if isinstance(sha256, str) and not re.fullmatch("[0-9a-f]{64}", sha256):
        yield f"sha256 must be 64 hexadecimal digits in lower case, not {sha256!r}"
    if isinstance(row.get("figures"), dict):
        yield from _figure_problems(row["figures"])


def _inside(path: str) -> bool:
    return bool(path) and not Path(path).is_absolute() and ".." not in Path(path).parts


def _figure_problems(figures: Mapping[str, Any]) -> Iterable[str]:
    known = (*HEADLINE, EFFECTIVE_RANK)
    for key, figure in figures.items():
        if key not in known:
            yield f"there is no figure {key!r}. {nearest(str(key), known)}"
        elif key == EFFECTIVE_RANK:
            layers = figure if isinstance(figure, dict) else {"": figure}
            yield from (
                f"{key} of {layer!r} must have value and may have plain, both integers"
                for layer, rank in layers.items()
                if not _is_figure(rank, {"value"}, {"plain"}, _is_count)
            )
        elif not _is_figure(figure, {"value", "images"}, {"low", "high", "plain"}, _is_share):
            yield f"{key} must have value and images, and may have low, high and plain; shares lie between 0 and 1"


def _is_figure(figure: Any, needed: set[str], possible: set[str], fits: Callable[[Any], bool]) -> bool:
    return (
        isinstance(figure, dict)
        and needed <= figure.keys() <= needed | possible
        and all((_is_count if key == "images" else fits)(value) for key, value in figure.items())
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
