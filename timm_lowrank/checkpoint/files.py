"""The files of a checkpoint: their names, what may stand in them, and whether they are what they were."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import timm
from safetensors import SafetensorError, safe_open
from timm.models import is_model, model_entrypoint

from ..errors import CheckpointDamagedError, CheckpointError, CheckpointWriteError, nearest
from ..files import disk_errors, sha256_of

NETWORK_CONFIG, NETWORK_WEIGHTS = "config.json", "model.safetensors"
LOWRANK_CONFIG, LOWRANK_WEIGHTS = "lowrank.json", "lowrank.safetensors"
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
    """A folder to write files of a checkpoint into, which move to `folder`, each whole, when the block ends well.

    After an error `folder` is as it was; it is made if it does not exist.

    Args:
        names: the files that the block may write. Those that it leaves out are removed from `folder`: they belong to
            another model that was saved there before.

    Raises:
        CheckpointWriteError: (also an OSError) the disk is full or the folder cannot be written.
    """
    advice = "What was there is unchanged; free some space or choose another folder"
    with disk_errors(f"could not write the checkpoint to {folder}", advice, CheckpointWriteError):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-", ignore_cleanup_errors=True) as staging:
            yield Path(staging)
            written = set(os.listdir(staging))
            for name in names:
                if name in written:
                    os.replace(Path(staging, name), folder / name)
                else:
                    (folder / name).unlink(missing_ok=True)


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
