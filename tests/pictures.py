"""Pictures at which no test looks: composed like any other, and not drawn, which takes most of their time."""

from pathlib import Path
from typing import Any

# The modules whose pictures a test may leave undrawn.
RUNS = "timm_lowrank.training.report.write_png"
REPRODUCTIONS = "timm_lowrank.reproduce.pictures.write_png"


def undrawn(figure: Any, path: Path, *, laid_out: bool = False) -> None:
    """In the place of `drawing.write_png`: the file is there, and empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
