"""What is done with the manifest: rows are made of runs, published all at once, and shown as a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.utils import yaml_dump

from ..checkpoint import CheckpointError
from ..checkpoint.remote import checked_repo_id
from .figures import CLEAN, HEADLINE, Measured
from .manifest import EFFECTIVE_RANK, Manifest
from .markup import code, escaped, percent, table
from .merging import replaced
from .metadata import HUB
from .publishing import Outcome, publish_run
from .record import RunRecord, read_run


def publish_all(
    manifest: Manifest, *, user: str | None = None, dry_run: Path | None = None, **options: Any
) -> Iterator[Outcome]:
    """Publishes every checkpoint of a manifest, one after the other, as soon as the next is asked for.

    All runs are read and compared with their rows before the first one is published.

    Args:
        manifest: from `load_manifest`.
        user: the account for rows that name none; None is that of the manifest.
        dry_run: a folder that gets a folder for each.
        options: of `publish_run`.

    Raises:
        CheckpointError: no rows, a run that is not there or not finished, other weights or figures than the row's, and
            all that `publish_run` raises; what was published before stays.
    """
    if not manifest.rows:
        raise CheckpointError(f"{manifest.path} lists no checkpoint: add a row with hub/checkpoints.py row")
    records = []
    for row in manifest.rows:
        repo_id = checked_repo_id(row.repo_id(user or manifest.user))
        record = read_run(manifest.root / row.run, sha256=row.sha256)
        found = headline(record)
        wrong = sorted(key for key in row.figures.keys() | found.keys() if row.figures.get(key) != found.get(key))
        if wrong:
            raise CheckpointError(
                f"{manifest.path}: the figures of {row.name} are not those that {row.run} has measured "
                f"({', '.join(wrong)}): make the row anew with hub/checkpoints.py row {row.run} {row.name}"
            )
        records.append((record, repo_id))
    for done, (record, repo_id) in enumerate(records):
        folder = None if dry_run is None else dry_run / repo_id.split("/")[-1]
        try:
            yield publish_run(record, repo_id, dry_run=folder, **options)
        except CheckpointError as error:
            before = ", ".join(other for _, other in records[:done]) or "nothing"
            raise type(error)(f"{error}. Published before it: {before}; run it again to go on") from error


def headline(record: RunRecord) -> dict[str, Any]:
    """What a row says about a run: the figures of its model-index, and the effective rank of each layer."""
    figures: dict[str, Any] = {}
    for key in HEADLINE:
        own, plain = (record.clean, record.plain_clean) if key == CLEAN else (record.own(key), record.plain(key))
        if own is not None:
            figures[key] = {**_rounded(own), **({"plain": round(plain.value, 6)} if plain else {})}
    ranks = {layer: record.effective_rank(layer) for layer in record.summary["branches"]}
    known = {
        layer: {"value": own, **({} if plain is None else {"plain": plain})}
        for layer, (own, plain) in ranks.items()
        if own is not None
    }
    return figures | ({EFFECTIVE_RANK: known} if known else {})


def manifest_row(record: RunRecord, name: str, config: str, root: Path) -> str:
    """The row of a run in YAML, to be put under `checkpoints:`.

    Args:
        record: the run.
        name: of the repository, USER/NAME or NAME.
        config: the recipe, from the root of the project.
        root: of the project.

    Raises:
        CheckpointError: the config is not there, or the run is outside of the project.
    """
    if not (root / config).is_file():
        raise CheckpointError(f"there is no recipe {config} in {root}: give one of recipes/configs")
    if not record.folder.resolve().is_relative_to(root.resolve()):
        raise CheckpointError(f"{record.folder} is not in {root}: move the run into its runs/ first")
    run = record.folder.resolve().relative_to(root.resolve()).as_posix()
    row = {"name": name, "config": config, "run": run, "sha256": record.sha256, "figures": headline(record)}
    return str(yaml_dump([row], sort_keys=False))


def manifest_table(manifest: Manifest) -> str:
    """The checkpoints as a table in Markdown, for README.md."""
    if not manifest.rows:
        return "No checkpoint has been published yet."
    rows = []
    for row in manifest.rows:
        at_home = "/" in row.name or manifest.user
        name = escaped(row.name.split("/")[-1])
        linked = f"[{name}]({HUB}/{row.repo_id(manifest.user)})" if at_home else name
        cells = [_cell(row.figures.get(key)) for key in HEADLINE]
        ranks = [
            f"{code(layer)} {value['value']}" + (f" (plain {value['plain']})" if "plain" in value else "")
            for layer, value in row.figures.get(EFFECTIVE_RANK, {}).items()
        ]
        recipe = row.config.rsplit("/", 1)[-1].removesuffix(".yaml")
        rows.append([linked, f"[{escaped(recipe)}]({row.config})", *cells, ", ".join(ranks) or "not measured"])
    header = ["checkpoint", "recipe", *HEADLINE.values(), "effective rank"]
    return table(header, rows, right=range(2, 2 + len(HEADLINE)))


def write_table(manifest: Manifest, path: Path) -> None:
    """Puts the table into a file, between the marks of its generated section "checkpoints".

    Raises:
        CheckpointError: the file is not there or has no such marks.
    """
    try:
        text = path.read_bytes().decode("utf-8")
        found = replaced(text, "checkpoints", manifest_table(manifest), str(path))
        if found is None:
            raise CheckpointError(
                f"{path} has no place for the table: put the lines <!-- generated: checkpoints --> and "
                "<!-- end of generated: checkpoints --> where it shall stand"
            )
        path.write_bytes(found.encode("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot write the table to {path}: {error}") from error


def _cell(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return "not measured"
    plain = f"; plain {percent(figure['plain'])} %" if "plain" in figure else ""
    value = Measured(figure["value"], figure.get("low"), figure.get("high"), figure.get("images"))
    return f"{value.shown} of {figure['images']:,}{plain}"


def _rounded(value: Measured) -> dict[str, Any]:
    ends = {} if value.low is None or value.high is None else {"low": round(value.low, 6), "high": round(value.high, 6)}
    return {"value": round(value.value, 6), **ends, "images": value.of}
