"""`publish_run`: a finished run as a repository on the Hub, with an honest card."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, ModelCard, get_token
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from ..checkpoint.files import CHECKPOINT_FILES
from ..checkpoint.remote import checked_repo_id, hub_errors
from ..errors import CheckpointError
from ..files import read_json
from ..text import one_line
from ..training.run import PUBLISHED_RECIPE
from .card import Place, run_card
from .front_matter import CARD, license_of
from .merging import merge, weights_of
from .paths import without_local_paths, without_paths_in_titles
from .push import Published, held_card, push_to_hub, stale_files
from .record import Origin, RunRecord, read_run

TIMEOUT = 10.0  # seconds for the Hub to say what a repository holds
FILE_DESCRIPTIONS = {
    "config.json": "the network, in timm's layout",
    "model.safetensors": "its weights",
    "lowrank.json": "the branches that it was trained with",
    "lowrank.safetensors": "their W and b",
    "recipe.yaml": "how it was trained: a recipe of `timm-lowrank train`",
    "summary.json": "what the training ended with",
    "evaluation.json": "every figure of its evaluation",
}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What was published, and what its owner should know."""

    published: Published
    deleted: tuple[str, ...]  # files of an earlier push that this run does not have
    notes: tuple[str, ...]

    def description(self) -> list[str]:
        """What was done, in lines for a terminal."""
        done = self.published
        lines = [f"note: {one_line(note)}" for note in self.notes]
        if done.folder is None:
            lines.append(f"published {done.repo_id}: {len(done.files)} files, {done.url}")
        else:
            lines.append(f"not published: {done.folder} holds what {done.repo_id} would get, {len(done.files)} files")
            lines += [f"  {(done.folder / name).stat().st_size:>12,} bytes  {name}" for name in done.files]
        deleted = "would be deleted" if done.folder else "deleted"
        return [*lines, *(f"  {deleted}, as of an earlier push: {one_line(name)}" for name in self.deleted)]


@dataclasses.dataclass(frozen=True)
class RepositoryState:
    """What a repository holds before the push."""

    commit: str | None = None
    files: frozenset[str] = frozenset()
    card: str | None = None
    public: bool = False
    notes: tuple[str, ...] = ()


def publish_run(
    run: Path | RunRecord,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    license: str | None = None,
    dataset: str | None = None,
    keep_card: bool = False,
    dry_run: Path | None = None,
) -> Outcome:
    """Publishes a run as one commit, or writes what that would hold to a folder.

    Args:
        run: the folder of a finished run of `timm-lowrank train`, or what `read_run` made of it.
        repo_id: USER/NAME.
        token, private, revision: as for `push_to_hub`.
        license: of the weights, an identifier of the Hub; None keeps what the card says; a new one takes that of the
            pretrained weights, and for a network trained from scratch Apache-2.0.
        dataset: the name on the Hub of the data set, if the run had a local copy of it.
        keep_card: leave the card of the repository as it is.
        dry_run: a new or empty folder. What the repository holds is asked for and taken into account, if the Hub
            can be reached.

    Raises:
        CheckpointError: everything that can be wrong; nothing is half published.
    """
    checked_repo_id(repo_id)
    record = run if isinstance(run, RunRecord) else read_run(run)
    held = _held(repo_id, revision, token, dry_run is not None)
    if private and held.public:
        raise CheckpointError(
            f"{repo_id} exists and is public, and private is for new repositories: make it private in its settings "
            "first, or choose another name. Nothing was published"
        )
    files = files_of(record, dataset)
    card, notes, where = held.card, held.notes, f"{CARD} of {repo_id}"
    if card is None or not keep_card:
        named = license or (record.license() if card is None else license_of(card, where))
        origin = record.origin
        if origin and origin.license and named != origin.license:
            notes = (*notes, f"the card names the licence {named}, and {origin.name} is under {origin.license}")
        place = Place.on_hub(repo_id, revision)
        new = run_card(record, place, described(record.run.model, files), license=named, dataset=dataset)
        if card is None:
            card = new
        else:
            merged = merge(card, new, where, license=license)
            card, notes = merged.text, (*notes, *merged.notes)
        try:
            notes = (*notes, *_notes_on_base(ModelCard(card), origin))
        except (ValueError, TypeError) as error:  # the latter for keys that are no strings, such as 1 and yes
            raise CheckpointError(f"{where} cannot be read as a model card: {error}") from error
    else:
        with contextlib.suppress(CheckpointError):  # a card with damaged marks, which is to be left alone
            if weights_of(card) not in (None, record.sha256):
                notes = (*notes, f"{where} was kept, and its figures are of other weights than these")
    stale = stale_files(held.card, held.files, files)
    published = push_to_hub(
        record.run.model, repo_id, token=token, private=private, revision=revision, card=card, files=files,
        delete=stale, parent_commit=held.commit, dry_run=dry_run,
        commit_message=f"Publish {one_line(without_local_paths(record.run.summary.name))} with timm_lowrank",
    )  # fmt: skip
    return Outcome(published, tuple(stale), notes)


def _notes_on_base(card: ModelCard, origin: Origin | None) -> tuple[str, ...]:
    """What to say of base_model in a card that was kept, if the training did not begin from those weights."""
    named = card.data.get("base_model") or []
    names = [str(name) for name in (named if isinstance(named, list) else [named])]
    began = None if origin is None else origin.base_model
    if not names or began in names or (origin is not None and began is None):  # None: it may well be those
        return ()
    truth = f"the training began from {began}" if began else "the network was trained from scratch"
    return (f"the card names the base_model {', '.join(names)}, and {truth}: correct it if it is of earlier weights",)


# --------------------------------------------------------------------------------------- what the Hub has already


def _held(repo_id: str, revision: str | None, token: str | None, dry: bool) -> RepositoryState:
    if not dry and not (token or get_token()):
        return RepositoryState()  # push_to_hub says what to do, and asks nobody
    try:
        with hub_errors("fetch" if dry else "publish", repo_id, revision):
            return _ask(HfApi(token=token, library_name="timm_lowrank"), repo_id, revision)
    except CheckpointError as error:
        if not dry:
            raise
        return RepositoryState(notes=(f"written as for a new repository: {error}",))


def _ask(api: HfApi, repo_id: str, revision: str | None) -> RepositoryState:
    try:
        try:
            info = api.model_info(repo_id, revision=revision, timeout=TIMEOUT)
        except RevisionNotFoundError:  # it will branch off the main one
            info = api.model_info(repo_id, timeout=TIMEOUT)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:  # or no access, which the push will tell
        return RepositoryState()
    files = frozenset(file.rfilename for file in info.siblings or ())
    return RepositoryState(info.sha, files, held_card(api, repo_id, info), public=info.private is False)


# ----------------------------------------------------------------------------------------------------- what is sent


def described(folder: Path, beside: Collection[str]) -> dict[str, str]:
    """What each file of the checkpoint in `folder` and of those `beside` it is, for the card."""
    names = (*(name for name in CHECKPOINT_FILES if (folder / name).is_file()), *beside)
    return {name: FILE_DESCRIPTIONS.get(name, "a picture of its training or evaluation") for name in names}


def files_of(record: RunRecord, dataset: str | None = None) -> dict[str, Path | bytes]:
    """What goes beside the checkpoint: name in the repository to a file or its content.

    Args:
        record: the run.
        dataset: the name on the Hub of the data set, which the recipe then reads instead of a copy on this machine.
    """
    run = record.run
    named = {"data": dataset} if dataset else {}
    files: dict[str, Path | bytes] = {
        PUBLISHED_RECIPE: _cleaned(
            run.config,
            lambda path: yaml.safe_load(path.read_text(encoding="utf-8")),
            lambda recipe: {**without_local_paths(recipe), **named},
        ),
        "summary.json": _cleaned(run.summary_json, read_json),
    }
    if record.evaluation is not None:
        twins = {network.title for network in record.evaluation.networks if network.twin}
        clean = functools.partial(_cleaned_evaluation, twins=twins)
        files["evaluation.json"] = _cleaned(run.evaluation_json, read_json, clean)
    return files | {f"plots/{name}": run.plots / name for name in record.plots}


def _cleaned_evaluation(evaluation: Mapping[str, Any], twins: Collection[str]) -> Any:
    """evaluation.json without paths, and with the twin named, whose folder is not published."""
    cleaned = without_paths_in_titles(evaluation)
    for network in cleaned["networks"]:
        if network["title"] in twins:
            network["twin"] = True
    return cleaned


def _cleaned(
    path: Path, read: Callable[[Path], Any], clean: Callable[[Any], Any] = without_local_paths
) -> Path | bytes:
    """A file of the run as it is, or without the paths of this machine if it holds any."""
    content = read(path)
    cleaned = clean(content)
    if cleaned == content:
        return path
    if path.suffix == ".yaml":
        return str(yaml.safe_dump(cleaned, sort_keys=False)).encode()
    return (json.dumps(cleaned, indent=1) + "\n").encode()
