"""Files that are there whole or not at all, and one clear error where the disk does not play along."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..errors import RunError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a run.

    Raises:
        RunError: if it is not there or not JSON.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {path}: {error}") from error


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is there whole or not at all, even after a loss of power."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def disk_errors(what: str, advice: str = "Choose another folder with --output.") -> Iterator[None]:
    """Turns what a full or unwritable disk raises into one error. torch and safetensors have types of their own."""
    try:
        yield
    except RunError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        raise RunError(f"{what}: {reason}. {advice}") from error
