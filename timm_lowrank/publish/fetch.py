"""`pull`: a published checkpoint, fetched whole and compared byte for byte with what the Hub says it holds."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.utils.sha import git_hash

from ..checkpoint import download, read_description, verify
from ..checkpoint.files import DESCRIPTIONS, NETWORK_WEIGHTS, PICKLES
from ..checkpoint.listed import ListedCheckpoint, find_checkpoint, is_bare
from ..checkpoint.loading import read_info
from ..checkpoint.remote import hub_errors
from ..errors import CheckpointDamagedError, CheckpointError, CheckpointWriteError
from ..evaluation.results import Value
from ..files import disk_errors, is_new, new_folder, sha256_of
from ..text import listing, one_line
from .card import OURS, share
from .merging import weights_of


@dataclasses.dataclass(frozen=True)
class Pulled:
    """A checkpoint that was fetched."""

    repo_id: str  # or the name of a checkpoint of this project that was taken from the clone
    folder: Path  # where it is now
    commit: str | None  # None of the clone
    files: tuple[str, ...]  # sorted
    sha256: str  # of model.safetensors
    compared: bool  # whether the Hub was there to be asked for the sums of all files
    kept: bool  # in a folder of its own, not in the cache

    def description(self) -> list[str]:
        """What it is and how to load it, in a few lines; nothing in it can move the cursor of a terminal.

        Raises:
            CheckpointError: its architecture is not there: says what to import or upgrade.
        """
        network = read_info(self.folder, branches=False)
        size = f", images of {' x '.join(map(str, network.input_size))}" if network.input_size else ""
        what = f"{self.repo_id}: {network.architecture}, {network.classes} classes{size}"
        lines = [one_line(line) for line in (what, _branches(self.folder), _accuracy(self.folder, self.sha256)) if line]
        lines += [
            f"{len(self.files)} files in {self.folder}",
            f"model.safetensors has the sha256 {self.sha256}"
            + ("; all files are what the Hub lists" if self.compared else "; " + self._not_compared()),
            "",
            "load it:",
        ]
        where = f"local-dir:{self.folder.resolve()}" if self.kept else f"hf-hub:{self.repo_id}@{self.commit}"
        source = str(self.folder.resolve()) if self.kept else self.repo_id
        lines += [f"    import timm{', ' + network.package if network.package else ''}"]
        lines += [f'    network = timm.create_model("{where}", pretrained=True).eval()', "or, to train on:"]
        pinned = "" if self.kept else f', revision="{self.commit}"'
        return [*lines, "    import timm_lowrank", f'    model = timm_lowrank.from_pretrained("{source}"{pinned})']

    def _not_compared(self) -> str:
        if self.commit is None:
            return "it is not on the Hub yet, and was taken from this clone"
        return "the Hub could not be asked for the sums"


def pull(
    repo_id: str,
    folder: Path | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    sha256: str | None = None,
) -> Pulled:
    """Fetches everything of a repository but pickles, and verifies it.

    Args:
        repo_id: USER/NAME; or the bare name of a checkpoint of this project, whose copy in the clone is taken, and
            verified, as long as it is not published. Published ones must have the sha256 of the list.
        folder: a new or empty folder that gets the files when all of them are there and verified; None leaves them
            in huggingface_hub's cache.
        revision: branch, tag or commit; None is the main branch.
        token: for a private repository; None takes HF_TOKEN or the one that `hf auth login` stored.
        sha256: what model.safetensors must have; None takes what the Hub and lowrank.json say.

    Raises:
        CheckpointError: no such repository, access, connection or checkpoint, or the folder holds something.
        CheckpointDamagedError: a file that is not what the Hub lists, also after it was fetched a second time.
        CheckpointWriteError: the disk is full or not writable.
    """
    if folder is not None and not is_new(folder):
        raise CheckpointError(f"{folder} exists and is not empty: choose a new folder")
    if is_bare(repo_id):
        one, here = find_checkpoint(repo_id)
        if one.repo is None and here is not None:
            return _from_clone(one, here, folder, revision, sha256)
        repo_id = str(one.repo)
        sha256 = sha256 or (one.sha256 if revision is None else None)
    fetched = download(repo_id, revision=revision, token=token, names=None)
    commit = fetched.name  # of the snapshot: the branch may move on meanwhile
    sums = _sums(repo_id, commit, token)
    if damaged := _damaged(fetched, sums):  # on the way or in the cache: once more
        download(repo_id, revision=commit, token=token, names=damaged, force=True)
    _check(fetched, sums, sha256)
    names = _names(fetched)
    if folder is not None:
        _copy(fetched, folder, names, sums, sha256)
    where = folder or fetched
    return Pulled(repo_id, where, commit, names, sha256_of(where / NETWORK_WEIGHTS), bool(sums), folder is not None)


def _from_clone(
    one: ListedCheckpoint, here: Path, folder: Path | None, revision: str | None, sha256: str | None
) -> Pulled:
    if revision is not None:
        raise CheckpointError(
            f"{one.name} is not on the Hub yet, and its copy in the clone has no revisions: leave it out"
        )
    verify(here, sha256=sha256 or one.sha256)
    names = _names(here)
    if folder is not None:
        _copy(here, folder, names, {}, sha256 or one.sha256)
    return Pulled(one.name, folder or here, None, names, one.sha256, compared=False, kept=True)


def _names(folder: Path) -> tuple[str, ...]:
    """All files but pickles, which other programs may have fetched into the same folder of the cache."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix.lower() not in PICKLES)
    return tuple(sorted(path.relative_to(folder).as_posix() for path in files))


def _sums(repo_id: str, commit: str, token: str | None) -> dict[str, str]:
    """Name to sha256 of large files and to git's own sum of the others; empty without a connection."""
    try:
        with hub_errors("fetch", repo_id, commit):
            info = HfApi(token=token).model_info(repo_id, revision=commit, files_metadata=True)
    except CheckpointError:
        return {}  # what is in the cache was taken
    sums = {file.rfilename: (file.lfs.sha256 if file.lfs else file.blob_id) for file in info.siblings or ()}
    return {name: digest for name, digest in sums.items() if digest}


def _damaged(folder: Path, sums: Mapping[str, str]) -> list[str]:
    """The files that are not what the Hub lists."""
    there = [name for name in sums if (folder / name).is_file()]
    return [name for name in there if sums[name] != _sum_like(sums[name], folder / name)]


def _check(folder: Path, sums: Mapping[str, str], sha256: str | None) -> None:
    if damaged := _damaged(folder, sums):
        raise CheckpointDamagedError(f"{folder / damaged[0]} is not what the Hub lists for it: fetch it again")
    verify(folder, sha256=sha256)


def _sum_like(digest: str, path: Path) -> str:
    """The sha256 of a file, or git's own sum of it, whichever `digest` is."""
    return sha256_of(path) if len(digest) == 64 else git_hash(path.read_bytes())


def _copy(fetched: Path, folder: Path, names: tuple[str, ...], sums: Mapping[str, str], sha256: str | None) -> None:
    """Copies to a new or empty folder, where everything comes to lie once all of it is checked."""
    advice = "What was fetched is kept in the cache; free some space or choose another folder, and run it again"
    errors = disk_errors(f"could not write {folder}", advice, CheckpointWriteError)
    with errors, new_folder(folder, last=DESCRIPTIONS) as new:
        for name in names:
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(fetched / name, new / name)
        _check(new, sums, sha256)


# ------------------------------------------------------------------------------------------------------ what it is


def _branches(folder: Path) -> str:
    try:
        description = read_description(folder)
    except CheckpointError as error:
        return f"its low-rank branches cannot be loaded: {error}"
    if description is None:
        return "trained without low-rank branches, or they were not published"
    ranks = [f"{layer} (rank {branch.rank})" for layer, branch in description.layers.items()]
    return f"trained with low-rank branches on {listing(ranks)}"


def _accuracy(folder: Path, sha256: str) -> str:
    """What its card claims, if it is one of ours, can be read, and speaks of the weights with this sum."""
    try:
        card = (folder / "README.md").read_text(encoding="utf-8")
        if weights_of(card) != sha256:
            return ""
        data = cast(ModelCardData, ModelCard(card).data)
        results = (result for result in data.eval_results or () if result.source_name == OURS)
        clean = next(result for result in results if result.metric_name == "accuracy")
        images = (clean.metric_args or {})["images"]
        accuracy = Value.share(round(clean.metric_value * images), images)
        return f"clean accuracy {share(accuracy)} of {images:,} test images ({clean.dataset_name})"
    except (CheckpointError, OSError, ValueError, KeyError, TypeError, StopIteration):
        return ""
