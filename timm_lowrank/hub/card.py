"""`card_of`: the model card of a run, new or written into the card that is there."""

from __future__ import annotations

from collections.abc import Mapping

from huggingface_hub import ModelCard

from ..checkpoint import CheckpointError
from .merging import Merged, front_matter, merge
from .metadata import metadata
from .record import RunRecord
from .sections import sections_of


def card_of(
    record: RunRecord,
    repo_id: str,
    before: str,
    files: Mapping[str, str],
    *,
    license: str | None = None,
    dataset: str | None = None,
    revision: str | None = None,
    where: str = "README.md",
) -> Merged:
    """The card of a run.

    Args:
        record: the run.
        repo_id: USER/NAME.
        before: the card that the repository has, or the template for a new one. What stands outside of its
            generated sections is kept; see `merge`.
        files: names of the files beside the card, and what each is.
        license: of the weights; None takes what `before` says.
        dataset: the name on the Hub of the data set, if the run had a local copy of it.
        revision: the branch that it is for; None is the main one.
        where: how messages name `before`.

    Raises:
        CheckpointError: the front matter of `before` is no YAML mapping, or a mark of a section is missing.
    """
    named = license or _as_text(front_matter(before, where).get("license"))
    merged = merge(
        before,
        metadata(record, repo_id, license=named, dataset=dataset, revision=revision or "main"),
        sections_of(record, repo_id, files, license=named, dataset=dataset),
        where,
        overruled={"license": license} if license else {},
    )
    try:
        ModelCard(merged.text)
    except ValueError as error:
        raise CheckpointError(f"{where} cannot be read as a model card: {error}") from error
    return merged


def _as_text(license: object) -> str | None:
    named = license if isinstance(license, list) else [license]
    return ", ".join(str(name) for name in named if name) or None
