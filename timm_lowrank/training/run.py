"""`RunFolder`: what a run leaves on disk, written so that a kill loses what came after the last checkpoint."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from safetensors import SafetensorError

from ..errors import RunError
from .disk import disk_errors, read_json, write_whole
from .recipe import Recipe, parse_yaml

# What decides how images reach the network, not which: their fingerprint is compared instead.
FREE = ("data", "streaming", "workers")


class RunFolder:
    """A folder with config.yaml, metrics.csv, checkpoints/, and in the end summary.json.

    Args:
        path: the folder.
        recipe: the recipe that it belongs to.
        resume: whether it may hold an earlier part of the same run.

    Raises:
        RunError: if the folder holds something already and `resume` is not set, or holds another run.
    """

    def __init__(self, path: str | Path, recipe: Recipe, resume: bool = False) -> None:
        self.path, self.recipe = Path(path), recipe
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"the output {self.path} is a file: choose a folder with --output")
        with disk_errors(f"cannot read the output folder {self.path}"):
            held = sorted(entry.name for entry in self.path.iterdir()) if self.path.exists() else []
        if not held:
            return
        if not resume:
            raise RunError(
                f"the output folder {self.path} exists and is not empty: continue that run with --resume auto, "
                "choose another folder with --output, or delete it"
            )
        if "config.yaml" not in held:
            raise RunError(
                f"{self.path} holds no config.yaml, so it is not a run that could be resumed: choose another folder"
            )
        self._check_same_recipe()

    def _check_same_recipe(self) -> None:
        """Compares with config.yaml, all but the keys in FREE."""
        with disk_errors(f"cannot read {self.path / 'config.yaml'}"):
            before = parse_yaml((self.path / "config.yaml").read_text())
        now = self.recipe.to_dict()
        # A run that is older than a key was made with its default.
        before = {**{field.name: field.default for field in dataclasses.fields(Recipe)}, **before}
        keys = [key for key in {**before, **now} if key not in FREE and before.get(key) != now.get(key)]
        if keys:
            changes = "; ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in keys)
            raise RunError(
                f"{self.path} was started with another recipe ({changes}). Resume it with its own "
                f"(--config {self.path / 'config.yaml'}), or choose another folder with --output."
            )

    def create(self) -> None:
        """Makes the folder and writes config.yaml; removes what a killed process left half written."""
        with disk_errors(f"cannot write to the output folder {self.path}"):
            self._checkpoints.mkdir(parents=True, exist_ok=True)
            for leftover in self._checkpoints.glob(".*"):
                shutil.rmtree(leftover)
            if not (self.path / "config.yaml").exists():
                text = yaml.safe_dump(self.recipe.to_dict(), sort_keys=False)
                write_whole(self.path / "config.yaml", text)

    @property
    def _checkpoints(self) -> Path:
        return self.path / "checkpoints"

    # ------------------------------------------------------------------------------------------------ checkpoints

    def checkpoints(self) -> list[tuple[int, Path]]:
        """(epochs completed, folder) of every complete checkpoint, oldest first."""
        # epoch_0003 < epoch_0003_step_00000500 < epoch_0004; more than 9,999 epochs still come in order.
        found = [(int(path.name.split("_")[1]), path) for path in self._checkpoints.glob("epoch_*")]
        return sorted(found, key=lambda one: (one[0], one[1].name))

    def save(self, accelerator: Accelerator, epoch: int, step: int = 0) -> None:
        """Writes a checkpoint of all processes after `epoch` epochs and `step` steps, then removes the oldest ones.

        The name appears with one rename once everything is written: a checkpoint with that name is complete.

        Raises:
            RunError: if the disk is full or not writable; the older checkpoints are then untouched.
        """
        final = self._checkpoints / (f"epoch_{epoch:04d}" + (f"_step_{step:08d}" if step else ""))
        partial = self._checkpoints / f".{final.name}.partial"
        place = f"epoch {epoch}, step {step}" if step else f"epoch {epoch}"
        what = f"could not write the checkpoint of {place} to {self._checkpoints}"
        try:
            with disk_errors(what, f"Free some space and continue with --resume auto; {self._kept()}."):
                accelerator.save_state(str(partial))
                accelerator.wait_for_everyone()
                if accelerator.is_main_process:
                    os.replace(partial, final)
        finally:
            if accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
        if accelerator.is_main_process:
            self._thin()
        accelerator.wait_for_everyone()

    def _kept(self) -> str:
        found = self.checkpoints()
        return f"the checkpoint of epoch {found[-1][0]} is untouched" if found else "there is no older checkpoint"

    def _thin(self) -> None:
        for _, path in self.checkpoints()[: -self.recipe.keep_checkpoints]:
            # Out of sight first: a kill between two deletions must not leave half of one under its name.
            hidden = path.with_name(f".{path.name}.old")
            os.replace(path, hidden)
            shutil.rmtree(hidden, ignore_errors=True)

    def load_newest(self, accelerator: Accelerator) -> int:
        """Loads the newest complete checkpoint into what `accelerator` prepared; epochs completed, 0 without one."""
        found = self.checkpoints()
        if not found:
            return 0
        epoch, path = found[-1]
        try:
            accelerator.load_state(str(path))
        except (OSError, RuntimeError, SafetensorError, KeyError) as error:
            if isinstance(error, RunError):
                raise
            raise RunError(
                f"the checkpoint {path} cannot be loaded ({error}): delete it to resume from an older one"
            ) from error
        return epoch

    # ---------------------------------------------------------------------------------------------------- metrics

    def keep_metrics(self, epochs: int) -> None:
        """Drops the rows of metrics.csv after `epochs` epochs, and a last one that was cut off."""
        path = self.path / "metrics.csv"
        if not path.exists():
            return
        with disk_errors(f"cannot rewrite {path}"):
            header, *rows = path.read_text().splitlines(keepends=True) or [""]
            kept = [row for row in rows if row.endswith("\n") and int(row.split(",")[0]) <= epochs]
            write_whole(path, "".join([header, *kept] if header.endswith("\n") and kept else []))

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Adds one epoch to metrics.csv; the first row names the columns."""
        path = self.path / "metrics.csv"
        with disk_errors(
            f"could not write {path}", f"Free some space and continue with --resume auto; {self._kept()}."
        ):
            begin = not path.exists() or path.stat().st_size == 0
            with path.open("a", newline="") as file:
                writer = csv.DictWriter(file, list(row), lineterminator="\n")
                if begin:
                    writer.writeheader()
                writer.writerow(row)

    # ---------------------------------------------------------------------------------------------------- summary

    def writing(self, name: str) -> AbstractContextManager[None]:
        """A block that writes `name`; what a full disk raises inside comes out as a RunError."""
        return disk_errors(f"could not write {self.path / name}", "Free some space and continue with --resume auto.")

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Writes a JSON file that is there whole or not at all."""
        with self.writing(name):
            write_whole(self.path / name, json.dumps(content, indent=2) + "\n")

    def summary(self) -> dict[str, Any] | None:
        """summary.json, or None while the run is not complete."""
        return read_json(self.path / "summary.json") if (self.path / "summary.json").exists() else None
