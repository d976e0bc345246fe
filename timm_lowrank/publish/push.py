"""`push_to_hub`: a checkpoint, its card and the files beside it, as one commit."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, ModelInfo, get_token
from huggingface_hub.errors import HfHubHTTPError
from torch import nn

from ..checkpoint import save_pretrained
from ..checkpoint.files import (
    CHECKPOINT_FILES,
    DESCRIPTIONS,
    LOWRANK_CONFIG,
    LOWRANK_WEIGHTS,
    NETWORK_CONFIG,
    NETWORK_WEIGHTS,
    PICKLES,
    checked_name,
    require_checkpoint,
)
from ..checkpoint.loading import load_folder, local_folder
from ..checkpoint.remote import checked_repo_id, hub_errors
from ..core.model import LowRankModel
from ..errors import CheckpointError, CheckpointWriteError
from ..files import is_new, new_folder, read_json, sha256_of
from .card import short_card
from .front_matter import CARD
from .merging import has_marks, merge, section, weights_of
from .paths import without_local_paths

_GENERATED = re.compile(r"(recipe\.yaml|summary\.json|evaluation\.json|plots/[^/]+)")
Source = str | os.PathLike[str] | bytes


@dataclasses.dataclass(frozen=True)
class Published:
    """What `push_to_hub` did."""

    repo_id: str
    files: tuple[str, ...]  # the names of all files of the commit, sorted; those that had not changed were not sent
    commit: str | None  # its hash on the Hub; None for a dry run
    url: str | None  # of the commit, or of the pull request; None for a dry run
    folder: Path | None  # of a dry run


def push_to_hub(
    model: LowRankModel | nn.Module | str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload a checkpoint of timm_lowrank",
    revision: str | None = None,
    card: str | ModelCard | None = None,
    files: Mapping[str, Source] | None = None,
    delete: Collection[str] = (),
    create_pr: bool = False,
    exist_ok: bool = True,
    parent_commit: str | None = None,
    dry_run: str | os.PathLike[str] | None = None,
    label_names: Sequence[str] | None = None,
    data_config: Mapping[str, Any] | None = None,
) -> Published:
    """Publish a model on the Hugging Face Hub, so that timm, transformers and `from_pretrained` load it by name.

    Everything is written to a folder and loaded back once before the Hub is asked for anything; then it is sent as
    one commit, so that a repository never holds half a checkpoint.

    Args:
        model: a `LowRankModel`, a timm network, or the folder of a checkpoint or of a finished run, which is
            published as it is.
        repo_id: USER/NAME. It is made if there is none.
        private: for a new repository; None is the account's own default.
        token: None takes HF_TOKEN or the one that `hf auth login` stored.
        revision: the branch; it is made if there is none. None is the main branch.
        card: README.md. None gives a new repository a short card that says how to load it, and leaves the one that a
            repository has; but if that was generated for other weights, these sections and results are written anew,
            without figures, and files that were published with them, such as evaluation.json, are deleted.
        files: name in the repository to a local file, a folder (all files in it) or bytes, such as
            {"evaluation.json": path, "plots": path}.
        delete: names of other files to delete in the same commit, where the repository has them.
        create_pr: open a pull request instead; the repository must exist.
        exist_ok: whether the repository may exist already.
        parent_commit: refuse if the branch has moved on from this commit. In any case a change between reading the
            repository and the commit is refused and not overwritten.
        dry_run: a new or empty folder that gets exactly what would be pushed to a new repository; the Hub is not asked.
        label_names, data_config: as for `save_pretrained`; for a folder they stand in it already.

    Returns:
        What was published and where.

    Raises:
        CheckpointError: everything that can be wrong with the model, the files and names, the token, its permissions
            and the connection; says what to do.
        CheckpointWriteError: (also an OSError) the disk is full or not writable.
    """
    checked_repo_id(repo_id)
    removed = {checked_name(name) for name in delete}
    if dry_run is None and not (token or get_token()):
        raise CheckpointError(
            f"cannot publish {repo_id}: there is no token. Log in with `hf auth login`, set HF_TOKEN, or pass token="
        )
    with _staging(dry_run) as folder:
        _write_checkpoint(model, folder, label_names, data_config)
        _write_files(files or {}, folder)
        text = short_card(folder, repo_id, revision) if card is None else str(card)
        (folder / CARD).write_text(text, encoding="utf-8")
        if dry_run is not None:
            return Published(repo_id, _names(folder), None, None, Path(dry_run))
        api = HfApi(token=token, library_name="timm_lowrank")
        with hub_errors("publish", repo_id, revision):
            if not create_pr:  # a pull request is for what is there
                _prepare_repository(api, repo_id, private=private, revision=revision, exist_ok=exist_ok)
            info = api.model_info(repo_id, revision=revision, files_metadata=True)
            held = {file.rfilename for file in info.siblings or ()}
            before = held_card(api, repo_id, info) if card is None else None
            renewed = None if before is None else _renewed(before, text, folder, info, f"{CARD} of {repo_id}")
            if renewed is not None:
                removed |= set(stale_files(before, held, ()))
                (folder / CARD).write_bytes(renewed.encode())
            kept = {CARD} if before is not None and renewed in (None, before) else set()
            names = tuple(name for name in _names(folder) if name not in kept)
            stale = ({LOWRANK_CONFIG, LOWRANK_WEIGHTS} | removed) & held - set(names)
            commit = api.create_commit(
                repo_id,
                [CommitOperationAdd(name, folder / name) for name in names]
                + [CommitOperationDelete(name) for name in sorted(stale)],
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
                parent_commit=parent_commit or info.sha,
            )
    return Published(repo_id, names, commit.oid, commit.pr_url or str(commit.commit_url), None)


def held_card(api: HfApi, repo_id: str, info: ModelInfo) -> str | None:
    """README.md of a repository at the commit of `info`; None if it has none.

    Raises:
        CheckpointError: it is not UTF-8 text.
    """
    if CARD not in {file.rfilename for file in info.siblings or ()}:
        return None
    data = Path(api.hf_hub_download(repo_id, CARD, revision=info.sha)).read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{CARD} of {repo_id} is not UTF-8 text: repair it first") from error


def stale_files(card: str | None, held: Collection[str], names: Collection[str]) -> list[str]:
    """Files of an earlier push, as its card lists them, that are no more; the owner's own are not among them.

    Args:
        card: of the repository.
        held: names of all files that it has.
        names: of those that are pushed now.
    """
    try:
        listed = section(card, "files") if card else None
    except CheckpointError:  # a card with damaged marks, which is to be left alone
        listed = None
    earlier = set(re.findall(r"^\| `([^`]+)`", listed or "", re.MULTILINE))
    if card and has_marks(card):  # else no earlier push is known of, and it may be of another program
        earlier.add("evaluation.json")
    return sorted(name for name in earlier & set(held) if _GENERATED.fullmatch(name) and name not in names)


def _renewed(card: str, new: str, folder: Path, info: ModelInfo, where: str) -> str | None:
    """The card of a repository without what it says of other weights than those in `folder`; None if it is of these."""
    there = {file.rfilename: file.lfs.sha256 for file in info.siblings or () if file.lfs}
    if (weights_of(card, where) or there.get(NETWORK_WEIGHTS)) == sha256_of(folder / NETWORK_WEIGHTS):
        return None
    return merge(card, new, where, complete=False).text


@contextlib.contextmanager
def _staging(dry_run: str | os.PathLike[str] | None) -> Iterator[Path]:
    """A folder to write into; what a dry run writes is in the named one when it is whole."""
    try:
        if dry_run is None:
            with tempfile.TemporaryDirectory(prefix=".publishing-") as folder:
                yield Path(folder)
            return
        if not is_new(Path(dry_run)):
            raise CheckpointError(f"the folder of a dry run must be new or empty: {os.fspath(dry_run)} is not")
        with new_folder(Path(dry_run), last=DESCRIPTIONS) as new:
            yield new
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        where = "set TMPDIR to a folder with more" if dry_run is None else "choose another folder"
        raise CheckpointWriteError(
            f"could not write {error.filename or 'a file'} before publishing: {error.strerror or error}. Nothing was "
            f"published; free some space, or {where}"
        ) from error


def _write_checkpoint(
    model: LowRankModel | nn.Module | str | os.PathLike[str],
    folder: Path,
    label_names: Sequence[str] | None,
    data_config: Mapping[str, Any] | None,
) -> None:
    if isinstance(model, str | os.PathLike):
        if label_names is not None or data_config is not None:
            raise CheckpointError("label_names and data_config stand in the config.json of a folder: leave them out")
        source = local_folder(model)
        if source is None:
            raise CheckpointError(f"there is no folder {os.fspath(model)!r} to publish")
        require_checkpoint(source)
        for name in CHECKPOINT_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    else:
        save_pretrained(model, folder, label_names=label_names, data_config=data_config)
    _clean_config(folder)
    load_folder(folder)  # what cannot be loaded is not published


def _clean_config(folder: Path) -> None:
    """Takes paths of this machine out of config.json, which an argument of the network may have brought in."""
    path = folder / NETWORK_CONFIG
    config = read_json(path)
    cleaned = without_local_paths(config)
    if cleaned != config:
        path.write_text(json.dumps(cleaned, indent=2) + "\n", encoding="utf-8")


def _write_files(files: Mapping[str, Source], folder: Path) -> None:
    for name, source in files.items():
        checked_name(name)
        if isinstance(source, bytes):
            _add(name, source, folder)
            continue
        path = Path(source)
        if not path.exists():
            raise CheckpointError(f"there is no file {path} to publish as {name}")
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            root = path if path.is_dir() else path.parent
            if not file.resolve().is_relative_to(root.resolve()):
                raise CheckpointError(
                    f"{file} is a link that leads out of {root}: give the file itself, if it is meant"
                )
            if file.is_file():
                inside = f"{name}/{file.relative_to(path).as_posix()}" if path.is_dir() else name
                _add(inside, file, folder)


def _add(name: str, source: Path | bytes, folder: Path) -> None:
    if name in (*CHECKPOINT_FILES, CARD):
        raise CheckpointError(f"{name} is written from the model or the card: it cannot be one of files=")
    if name.lower().endswith(PICKLES):
        raise CheckpointError(f"{name} may be a pickle, which runs code when it is opened: publish safetensors or JSON")
    target = folder / checked_name(name)
    if target.exists():
        raise CheckpointError(f"two of the files are to be published as {name}")
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(source, bytes):
        target.write_bytes(source)
    else:
        shutil.copyfile(source, target)


def _names(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()))


def _prepare_repository(
    api: HfApi, repo_id: str, *, private: bool | None, revision: str | None, exist_ok: bool
) -> None:
    try:
        api.create_repo(repo_id, private=private, exist_ok=exist_ok)
    except HfHubHTTPError as error:
        if error.response.status_code == 409 and not exist_ok:
            raise CheckpointError(
                f"{repo_id} exists already: choose another name, or let it be updated with exist_ok=True"
            ) from error
        raise
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
