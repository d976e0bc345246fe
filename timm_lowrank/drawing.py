"""What all pictures of this package share: colours, axes, a canvas of their own. Needs matplotlib once one is drawn."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from .environment import require
from .files import write_whole

PLAIN, LOWRANK, INK = "#8a8f98", "#1f5fbf", "#30343b"
GRID, AXIS, PAPER = "#e3e6ea", "#c5cad1", "#ffffff"
NETWORKS = (LOWRANK, PLAIN, "#b4581a", "#3f7d4e")  # in the order of the networks; more of them begin again
DOTS_PER_INCH = 160


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib Figure of width x height inches: no display, no pyplot, no global state.

    It is to be laid out once it is complete, see `lay_out`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    module = require("matplotlib.figure", "matplotlib")
    return module.Figure(figsize=(width, height), dpi=DOTS_PER_INCH)


def lay_out(figure: Any) -> None:
    """Gives axes and legends their places. A layout engine of the figure itself would draw it twice to save it once."""
    require("matplotlib.layout_engine", "matplotlib").ConstrainedLayoutEngine().execute(figure)


def dress(panel: Any) -> None:
    """Gives axes the package's look: a pale grid behind the data, two thin spines, no tick marks."""
    panel.grid(color=GRID, linewidth=0.7)
    panel.set_axisbelow(True)
    panel.tick_params(which="both", labelsize=8, colors=INK, length=0)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(AXIS)


def share_tick(value: float, _: int | None = None) -> str:
    """A tick label for a share."""
    return f"{100 * value:.3g} %"


def write_png(figure: Any, path: Path, *, laid_out: bool = False) -> None:
    """Lays out a figure, unless it is `laid_out`, and draws it into a file; makes its folder."""
    if not laid_out:
        lay_out(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, buffer.getvalue())
