"""The files of a checkpoint: their names, what may stand in them, and whether they are what they were."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import timm
from safetensors import SafetensorError, safe_open
from timm.models import is_model, model_entrypoint

from ..errors import CheckpointDamagedError, CheckpointError, nearest

NETWORK_CONFIG, NETWORK_WEIGHTS = "config.json", "model.safetensors"
LOWRANK_CONFIG, LOWRANK_WEIGHTS = "lowrank.json", "lowrank.safetensors"
CHECKPOINT_FILES = (NETWORK_CONFIG, NETWORK_WEIGHTS, LOWRANK_CONFIG, LOWRANK_WEIGHTS)
FORMAT = 1  # of lowrank.json: raised only when an older version could not read it any more

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


def sha256_of(path: str | os.PathLike[str]) -> str:
    """The sha256 of a file, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(folder: str | os.PathLike[str], *, sha256: str | None = None) -> None:
    """Checks the files of a checkpoint without building the network: complete, not pickled, undamaged.

    Args:
        folder: as `save_pretrained` writes it.
        sha256: what `model.safetensors` must have, 64 hexadecimal digits, from a list of published checkpoints
            for example; None checks what lowrank.json records.

    Raises:
        CheckpointDamagedError: a file whose sha256 is another one, or that is no whole safetensors file.
        CheckpointError: everything else that is wrong.
    """
    folder = Path(folder)
    require_checkpoint(folder)
    recorded = recorded_sha256(folder)
    if sha256 is not None:
        recorded = {**recorded, NETWORK_WEIGHTS: sha256.lower()}
    for name, digest in recorded.items():
        path = folder / checked_name(name)
        if not path.is_file():
            raise CheckpointError(f"{folder} is not complete: {name} is missing; fetch or copy it again")
        found = sha256_of(path)
        if found != digest:
            raise CheckpointDamagedError(
                f"{path} was damaged or exchanged: its sha256 is {found}, and it should be {digest}. Fetch it "
                f"again; if the change is wanted, delete {LOWRANK_CONFIG} and {LOWRANK_WEIGHTS}, which belong to "
                "other weights, or write the checkpoint anew with save_pretrained"
            )
    for name in (NETWORK_WEIGHTS, LOWRANK_WEIGHTS):
        if (folder / name).exists():
            check_safetensors(folder / name)


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


def check_safetensors(path: Path) -> None:
    """Raises CheckpointError unless `path` is a whole safetensors file. The tensors are not read."""
    try:
        with safe_open(path, framework="pt") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        raise CheckpointDamagedError(
            f"{path} cannot be read as safetensors ({error}): it was cut off or damaged; delete it and fetch it again"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises CheckpointError if it does not."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointDamagedError(f"{path} is not valid JSON ({error}): it was damaged; fetch it again") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def recorded_sha256(folder: Path) -> dict[str, str]:
    """File name to sha256, as lowrank.json records them; empty without it."""
    path = folder / LOWRANK_CONFIG
    recorded = read_json(path).get("sha256", {}) if path.is_file() else {}
    if not isinstance(recorded, Mapping) or not all(isinstance(digest, str) for digest in recorded.values()):
        raise CheckpointError(f"{path}: sha256 must name a digest for each file")
    return dict(recorded)


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
