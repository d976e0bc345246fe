"""The files of a checkpoint: their names, what may stand in them, and whether they are what they were."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import timm
from safetensors import SafetensorError, safe_open
from timm.models import is_model, model_entrypoint

from ..errors import CheckpointDamagedError, CheckpointError, CheckpointWriteError, nearest
from ..files import ASIDE, disk_errors, is_abandoned, sha256_of, sync, taken

NETWORK_CONFIG, NETWORK_WEIGHTS = "config.json", "model.safetensors"
LOWRANK_CONFIG, LOWRANK_WEIGHTS = "lowrank.json", "lowrank.safetensors"
DESCRIPTIONS = (NETWORK_CONFIG, LOWRANK_CONFIG)  # without which nobody loads the weights
CHECKPOINT_FILES = (NETWORK_CONFIG, NETWORK_WEIGHTS, LOWRANK_CONFIG, LOWRANK_WEIGHTS)

# Formats that run code when they are opened, or may.
PICKLES = (".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth", ".tar")


def checked_name(name: str) -> str:
    """`name`, if it names a file inside a folder or repository, written with forward slashes.

    Raises:
        CheckpointError: an absolute name, one that climbs out ("../x"), or one that git keeps for itself.
    """
    parts = name.split("/") if isinstance(name, str) else []
    wrong = not parts or any(part in ("", ".", "..", ".git") for part in parts)
    if wrong or any(sign in name for sign in ("\\", ":", "\0", "\n")) or PurePosixPath(name).is_absolute():
        raise CheckpointError(
            f"{name!r} is no name of a file inside a repository: use a relative one such as plots/spectrum.png"
        )
    return name


def require_checkpoint(folder: Path) -> None:
    """Raises CheckpointError, with what to do, unless timm's two files are there."""
    if not (folder / NETWORK_CONFIG).is_file():
        raise CheckpointError(
            f"{folder} holds no {NETWORK_CONFIG}, so it is no checkpoint: give the folder that save_pretrained wrote, "
            "that of a run that came to its end, or a repository on the Hub as USER/NAME"
        )
    if not (folder / NETWORK_WEIGHTS).is_file():
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        raise CheckpointError(no_weights(str(folder), pickled))


def no_weights(where: str, pickled: list[str]) -> str:
    """The message about a checkpoint without model.safetensors."""
    if not pickled:
        return f"{where} holds no {NETWORK_WEIGHTS}: the checkpoint is not complete, or not in timm's layout"
    return (
        f"{where} holds no {NETWORK_WEIGHTS}, only {', '.join(pickled)}: pickled weights can run any code when they "
        "are opened, so they are not loaded. Ask the author for safetensors; or, if you trust the author, load them "
        "with timm yourself and write them with save_pretrained"
    )


def check_sha256(path: Path, digest: str) -> None:
    """Raises CheckpointDamagedError unless the sha256 of a file is `digest`."""
    actual = sha256_of(path)
    if actual != digest:
        raise CheckpointDamagedError(
            f"{path} was damaged or exchanged: its sha256 is {actual}, and it should be {digest}. Fetch it "
            f"again; if the change is wanted, delete {LOWRANK_CONFIG} and {LOWRANK_WEIGHTS}, which belong to "
            "other weights, or write the checkpoint anew with save_pretrained"
        )


def check_safetensors(path: Path) -> None:
    """Raises CheckpointError unless `path` is a whole safetensors file. The tensors are not read."""
    try:
        with safe_open(path, framework="pt") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        raise CheckpointDamagedError(
            f"{path} cannot be read as safetensors ({error}): it was cut off or damaged; delete it and fetch it again"
        ) from error


@contextlib.contextmanager
def staged(folder: Path, names: Collection[str]) -> Iterator[Path]:
    """A folder to write files of a checkpoint into, which move to `folder` all at one moment, when the block ends well.

    After an error or a kill, whenever it comes, `folder` holds what it held before or all that is new, never some of
    each; it is made if it does not exist.

    Args:
        names: the files that the block may write. Those that it leaves out are removed from `folder`: they belong to
            another model that was saved there before.

    Raises:
        CheckpointWriteError: (also an OSError) the disk is full or the folder cannot be written.
    """
    advice = "What was there is unchanged; free some space or choose another folder"
    with disk_errors(f"could not write the checkpoint to {folder}", advice, CheckpointWriteError):
        folder.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=folder, prefix=ASIDE))
        with taken(aside):
            try:
                new = aside / "new"
                new.mkdir()
                yield new
                _exchange(folder, aside, names)
            finally:
                if aside not in _pointed_to(folder, names):
                    shutil.rmtree(aside, ignore_errors=True)
        remove_abandoned(folder, names)


def _exchange(folder: Path, aside: Path, names: Collection[str]) -> None:
    """Puts the files of aside/new into the place of those in `folder` that have one of `names`.

    A file system can exchange one name at once. So the files become links that lead through one other, aside/current,
    first to their own old content; to point that one to the new content is the moment of the exchange; and then the
    links become files again. A kill leaves links, which whoever reads them does not see, and the next save removes.
    """
    old, new, current = aside / "old", aside / "new", aside / "current"
    written = [name for name in names if (new / name).exists()]
    for name in written:
        sync(new / name)
    old.mkdir()
    before = [name for name in names if (folder / name).exists()]
    for name in before:
        _link_or_copy((folder / name).resolve(), old / name)
    shown = [name for name in names if name in before or name in written or (folder / name).is_symlink()]
    try:
        os.symlink(old.name, current)
    except (OSError, NotImplementedError):  # Windows and some network drives have no links
        _replace_one_by_one(folder, new, names)
        return
    try:
        for name in shown:
            os.symlink(Path(aside.name, current.name, name), aside / f"{name}.link")
            os.replace(aside / f"{name}.link", folder / name)
        os.symlink(new.name, aside / "next")
        sync(aside)
        os.replace(aside / "next", current)
    except OSError:
        _unlinked(folder, old, shown)
        raise
    sync(aside)
    _unlinked(folder, new, shown)
    sync(folder)


def _unlinked(folder: Path, source: Path, names: Collection[str]) -> None:
    """The files of `source` themselves in the place of links to them; where there is none, the link goes."""
    for name in names:
        if (source / name).exists():
            os.replace(source / name, folder / name)
        elif (folder / name).is_symlink():
            (folder / name).unlink()


def _replace_one_by_one(folder: Path, new: Path, names: Collection[str]) -> None:
    """Without the description of the network, which comes last, nobody loads what is mixed."""
    for name in DESCRIPTIONS:
        if name in names:
            (folder / name).unlink(missing_ok=True)
    for name in sorted(names, key=lambda name: name in DESCRIPTIONS):
        if (new / name).exists():
            os.replace(new / name, folder / name)
        else:
            (folder / name).unlink(missing_ok=True)


def _pointed_to(folder: Path, names: Collection[str]) -> set[Path]:
    """The folders of saves that links in the place of files lead through."""
    found = set()
    for name in names:
        with contextlib.suppress(OSError):
            first = Path(os.readlink(folder / name)).parts[0]
            found |= {folder / first} if first.startswith(ASIDE) else set()
    return found


def remove_abandoned(folder: Path, names: Collection[str] = CHECKPOINT_FILES, *, alone: bool = False) -> None:
    """Removes what killed saves left aside, unless links lead through it.

    Args:
        alone: that nobody else is at work on the folder, so that a platform without locks need not be asked.
    """
    for left in set(folder.glob(f"{ASIDE}*")) - _pointed_to(folder, names):
        if alone or is_abandoned(left):
            shutil.rmtree(left, ignore_errors=True)


def _link_or_copy(path: Path, copy: Path) -> None:
    try:
        os.link(path, copy)
    except OSError:
        shutil.copyfile(path, copy)


def known_architecture(config: Mapping[str, Any], where: Path) -> str:
    """The name of the architecture that config.json names.

    Raises:
        CheckpointError: it names none, or none that timm has now: says what to import or upgrade.
    """
    name = config.get("architecture")
    if not isinstance(name, str):
        raise CheckpointError(f"{where / NETWORK_CONFIG} names no architecture, so it is not in timm's layout")
    if not is_model(name):
        raise CheckpointError(
            f"there is no architecture {name!r} in timm {timm.__version__}. If timm has it in a newer version: pip "
            "install -U timm. If another package registers it with timm, import that package first (import "
            f"timm_lowrank for the *_cifar networks). {nearest(name, timm.list_models())}"
        )
    return name


def module_to_import(architecture: str) -> str | None:
    """The package to import before timm knows an architecture; None for timm's own.

    >>> module_to_import("resnet18") is None, module_to_import("resnet18_cifar")
    (True, 'timm_lowrank')
    """
    package = model_entrypoint(architecture).__module__.partition(".")[0]
    return None if package == "timm" else package
