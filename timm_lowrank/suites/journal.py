"""`Journal`: the finished units of an evaluation on disk, so that a kill at any moment loses one unit at most."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import EvaluationError
from ..files import disk_errors, write_whole

Unit = tuple[str, str, int]  # key of the measurement, title of the network, number of the chunk
ADVICE = "Free some space and give the same command again: it goes on with what is there."


class Journal:
    """A file of JSON lines: first what is evaluated and how, then one unit a line; process k > 0 has a file of its own.

    Args:
        path: evaluation.json.partial.
        header: what makes two evaluations the same; compared with what an interrupted one left.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        self.header = json.loads(json.dumps(header))  # as it will be read back: tuples are lists then

    def recover(self) -> None:
        """Brings what an interrupted evaluation left into one sound file. For one process, before any reads or writes.

        A line that the kill cut off is dropped, and so is every file of another number of processes.

        Raises:
            EvaluationError: what is there belongs to another evaluation.
            RunError: the disk is full or not writable.
        """
        found = self._files()
        units: dict[Unit, Any] = {}
        for file in found:
            units |= self._read(file)
        lines = [json.dumps(self.header), *(json.dumps([*unit, columns]) for unit, columns in units.items())]
        with disk_errors(f"could not write {self.path}"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, "".join(line + "\n" for line in lines))
            for file in found:
                if file != self.path:
                    file.unlink()

    def units(self) -> dict[Unit, Any]:
        """Everything that is finished, of all processes on this machine."""
        return {unit: columns for file in self._files() for unit, columns in self._read(file).items()}

    def append(self, process: int, unit: Unit, columns: Mapping[str, Any]) -> None:
        """Adds a finished unit and waits until it is on the disk.

        Raises:
            RunError: the disk is full or not writable; the units from before are untouched.
        """
        path = self.path if process == 0 else self.path.with_name(f"{self.path.name}.{process}")
        begin = not path.exists()
        with disk_errors(f"could not write {path}", ADVICE), path.open("a") as file:
            if begin:
                file.write(json.dumps(self.header) + "\n")
            file.write(json.dumps([*unit, columns]) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Takes the files away: the evaluation is complete and written elsewhere."""
        for file in self._files():
            file.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        return sorted(self.path.parent.glob(self.path.name + "*"))

    def _read(self, file: Path) -> dict[Unit, Any]:
        lines = file.read_text(errors="replace").split("\n")[:-1]  # what comes behind the last newline was cut off
        parsed = [value for value in map(_parsed, lines) if value is not None]
        if not parsed or not isinstance(parsed[0], dict):
            return {}
        if parsed[0] != self.header:
            raise EvaluationError(
                f"{file} holds another evaluation that was interrupted ({_difference(parsed[0], self.header)}). "
                "Finish it with its own command, delete the file, or choose another folder with --output."
            )
        return {(row[0], row[1], row[2]): row[3] for row in parsed[1:] if isinstance(row, list) and len(row) == 4}


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return "; ".join(f"{key} was {_short(before.get(key))} and is {_short(now.get(key))}" for key in keys)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
