"""One checkpoint of a training: named in order, sealed with the sums of its files, and read without running code.

accelerate writes the network, the optimizer and the random states. Of these it opens pickles with nothing but tensors
and numbers allowed; what `register_for_checkpointing` is given it would open with everything allowed, so what is ours
is JSON and safetensors, see `OwnState`.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import load
from safetensors.torch import load_file, save_file
from torch import nn

from ..data.stream import FINGERPRINT
from ..errors import RunError
from ..files import read_json, sha256_of, sync, write_whole
from ..records import decode

if TYPE_CHECKING:
    from accelerate import Accelerator

SEAL = "checkpoint.json"  # {"format": 1, "sha256": {file: digits}}, written last
FORMAT = 1
PROGRESS, AVERAGE = "progress.json", "average.safetensors"
# epoch_0003 < epoch_0003_step_00000500 < epoch_0004; more than 9,999 epochs still come in order.
_NAME = re.compile(r"epoch_(\d{4,})(?:_step_(\d{8,}))?")


# ------------------------------------------------------------------------------------------------------ whole or not


def name_of(epoch: int, step: int = 0) -> str:
    """What the checkpoint after `epoch` epochs and `step` steps is called."""
    return f"epoch_{epoch:04d}" + (f"_step_{step:08d}" if step else "")


def listed(folder: Path) -> list[tuple[int, Path]]:
    """(epochs completed, folder) of every checkpoint in `folder`, oldest first; other things there are left out."""
    found = [(match, path) for path in folder.glob("epoch_*") if (match := _NAME.fullmatch(path.name))]
    ordered = sorted((int(match[1]), int(match[2] or 0), path) for match, path in found if path.is_dir())
    return [(epoch, path) for epoch, _, path in ordered]


def remove_leftovers(folder: Path) -> None:
    """Removes what a killed process left half written or half deleted in the folder of the checkpoints."""
    for path in folder.glob(".epoch_*"):
        shutil.rmtree(path, ignore_errors=True)


def seal(checkpoint: Path) -> None:
    """Writes down the sums of all files, once everything is on the disk, whatever happens to the power later."""
    files = _files(checkpoint)
    for path in files:
        sync(path)
    sums = {path.relative_to(checkpoint).as_posix(): sha256_of(path) for path in files}
    write_whole(checkpoint / SEAL, json.dumps({"format": FORMAT, "sha256": sums}, indent=1) + "\n")


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, for a message; None if all its files are what was written."""
    if not (checkpoint / SEAL).is_file():
        return f"it has no {SEAL}: it was cut off, or written by an older version"
    try:
        content = read_json(checkpoint / SEAL, RunError)
        sums = content.get("sha256")
        if content.get("format") != FORMAT or not isinstance(sums, dict):
            return f"its {SEAL} is not of format {FORMAT}"
        there = {path.relative_to(checkpoint).as_posix(): path for path in _files(checkpoint)}
        for name, digits in sums.items():
            if name not in there:
                return f"its {name} is missing"
            if sha256_of(there[name]) != digits:
                return f"its {name} was cut off or changed"
    except (RunError, OSError) as error:
        return f"its files cannot be read ({error})"
    return None


def _files(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != SEAL)


def check_random_states(checkpoint: Path, process: int) -> None:
    """Reads the random states of a process, where there are any; accelerate passes over what it cannot read.

    Raises:
        Exception: whatever is wrong with them.
    """
    path = checkpoint / f"random_states_{process}.pkl"
    if path.is_file():  # a run that goes on with more processes has none for the new ones
        load(path)


# ----------------------------------------------------------------------------------------------------- what is ours


@dataclasses.dataclass
class EpochPosition:
    """How far a run is in an epoch; all zero at its beginning."""

    step: int = 0  # optimizer steps taken
    seconds: float = 0.0
    sums: tuple[dict[str, Any], ...] = ()  # `Means.state_dict()` of each process


@dataclasses.dataclass
class Progress:
    """How far a run is; saved with every checkpoint."""

    fingerprint: str  # of the data, so that a run is not resumed on other images
    epoch: int = 0  # epochs completed
    step: int = 0  # optimizer steps taken
    seconds: float = 0.0  # spent training, evaluation not counted
    best_train_accuracy: float = 0.0
    inside: EpochPosition = dataclasses.field(default_factory=EpochPosition)  # the epoch that is being trained

    def take(self, saved: Progress) -> None:
        """Goes on from there.

        Raises:
            RunError: it is that of other data.
        """
        if saved.fingerprint != self.fingerprint:
            was, now = (held.startswith(FINGERPRINT) for held in (saved.fingerprint, self.fingerprint))
            raise RunError(
                "the data is not what this run was started with (its fingerprint differs): "
                + (
                    "give the same data, or start a new run in another folder"
                    if was == now
                    else f"that {'was' if was else 'was not'} streamed, so set streaming={str(was).lower()}"
                )
            )
        vars(self).update(vars(saved))


@dataclasses.dataclass(frozen=True)
class OwnState:
    """What a checkpoint holds beside accelerate's: how far the run is, and the average of the weights.

    Args:
        progress: is saved, and changed by loading.
        average: the same, of a run that keeps one.
    """

    progress: Progress
    average: nn.Module | None

    def travel_with(self, accelerator: Accelerator) -> None:
        """From here on it is saved and loaded with every state of `accelerator`."""
        accelerator.register_save_state_pre_hook(
            lambda _models, _weights, folder: self.save(Path(folder)) if accelerator.is_main_process else None
        )
        accelerator.register_load_state_pre_hook(lambda _models, folder: self.load(Path(folder)))

    def save(self, folder: Path) -> None:
        """Writes both files."""
        write_whole(folder / PROGRESS, json.dumps(dataclasses.asdict(self.progress)) + "\n")
        if self.average is not None:
            # Cloned: tied weights are one piece of memory, which safetensors refuses to write twice.
            tensors = {name: value.detach().cpu().clone() for name, value in self.average.state_dict().items()}
            save_file({name: value.contiguous() for name, value in tensors.items()}, folder / AVERAGE)

    def load(self, folder: Path) -> None:
        """Takes over both.

        Raises:
            RunError: they are not what a run writes, or are those of other data.
        """
        problems: list[str] = []
        saved = decode(Progress, read_json(folder / PROGRESS, RunError), PROGRESS, problems)
        if problems:
            raise RunError(f"{folder / PROGRESS} makes no sense: {'; '.join(problems)}")
        self.progress.take(saved)
        if self.average is not None:
            self.average.load_state_dict(load_file(folder / AVERAGE))
