"""results/NAME.png: panels with the paper's figures beside ours, curves, and adversarial images."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..drawing import INK, LOWRANK, PLAIN, dress, new_figure, share_tick, write_png
from ..evaluation.results import Curve, Strip
from .reproduction import Line, Panel, Reproduction

COLOURS = {  # of a condition the same in every picture; the plain twin is grey
    "N-LR": PLAIN, "1-LR": "#8e4fa8", "2-LR": LOWRANK, "2-LR-light": "#7fb2e5", "2-LR-strong": "#0d2f66",
    "Bottle-LR": "#e0944a",
    "Bottle-2LR": "#b4581a", "SN": "#3f7d4e", "SRN": "#2a8c99", "SNIP": "#c23b5a", "Matryoshka": "#8a6d1f",
    "not trained": "#111111",
}  # fmt: skip
FURTHER = ("#6fa1e8", "#4b83d6", "#1a4a99", "#12366f", "#5b6b7a")
DASHES = ("-", "--", ":", "-.")
TITLE_LETTERS = 56
WIDTH, HEIGHT, ACROSS = 4.2, 3.0, 3
LOG_SPREAD = 50  # an axis of numbers whose ends are further apart than this factor is logarithmic


def draw(reproduction: Reproduction, path: Path) -> bool:
    """Draws everything of a reproduction that was measured, one below the other.

    Returns:
        Whether there was anything to draw.

    Raises:
        ImportError: matplotlib is not installed.
    """
    blocks = [block for panel in reproduction.panels for block in _blocks(panel)]
    curves = [curve for curve in reproduction.curves if any(line.x for line in curve.lines)]
    clouds = [(c, line) for c in curves if c.kind == "scatter" and _has_classes(c) for line in c.lines]
    whole = [curve for curve in curves if not (curve.kind == "scatter" and _has_classes(curve))]
    count = len(blocks) + len(clouds) + len(whole) + len(reproduction.strips)
    if not count:
        return False
    across = min(count, ACROSS if not reproduction.strips else 1)
    down = math.ceil(count / across)
    figure = new_figure(WIDTH * across * (2 if reproduction.strips else 1), HEIGHT * down + 0.5)
    cells = list(figure.subplots(down, across, squeeze=False).flatten())
    mark = "" if reproduction.scale == "paper" else f" [{reproduction.scale} scale]"
    figure.suptitle(f"{reproduction.name}: {reproduction.title}{mark}", fontsize=11, color=INK, x=0.01, ha="left")
    conditions = dict.fromkeys(line.condition for panel in reproduction.panels for line in panel.lines)
    conditions |= dict.fromkeys(line.network for curve in curves for line in curve.lines)
    colours = _colours(list(conditions))
    axes = iter(cells)
    for block in blocks:
        _draw_block(next(axes), block, colours)
    for curve in whole:
        _draw_curve(next(axes), curve, colours)
    for curve, line in clouds:
        _draw_cloud(next(axes), f"{curve.title}: {line.network}", line)
    for strip in reproduction.strips:
        _draw_strip(next(axes), strip)
    for rest in axes:
        rest.set_axis_off()
    write_png(figure, path)
    return True


def _colours(conditions: Sequence[str]) -> dict[str, str]:
    further = [one for one in conditions if one not in COLOURS]
    return COLOURS | {one: FURTHER[index % len(FURTHER)] for index, one in enumerate(further)}


@dataclasses.dataclass(frozen=True)
class _Block:
    """Columns of one unit, of the lines of a panel that belong to one row of the paper and one recipe of ours."""

    title: str
    columns: tuple[int, ...]  # their numbers in the panel
    panel: Panel
    lines: tuple[Line, ...]


def _blocks(panel: Panel) -> list[_Block]:
    """Those in which something was measured."""
    blocks = []
    for row, recipe in dict.fromkeys((line.row, line.recipe) for line in panel.lines if line.recipe):
        lines = tuple(line for line in panel.lines if (line.row, line.recipe) == (row, recipe))
        units = [cell.unit for cell in lines[0].cells]
        for unit in dict.fromkeys(units):
            columns = tuple(index for index, one in enumerate(units) if one == unit)
            shown = [line.cells[index] for line in lines for index in columns]
            if any(cell.shown is not None for cell in shown):
                blocks.append(_Block(f"{panel.title}\n{row}: {recipe}", columns, panel, lines))
    return blocks


def _draw_block(axes: Any, block: _Block, colours: Mapping[str, str]) -> None:
    """Ours as dots with the deviation over seeds, the paper's as hollow diamonds of the same colour."""
    positions = block.panel.positions
    xs = [positions[index] if positions else float(place) for place, index in enumerate(block.columns)]
    heights: list[float] = []
    for number, line in enumerate(block.lines):
        shift = 0.0 if positions else 0.1 * (number - (len(block.lines) - 1) / 2)
        cells = [(x + shift, line.cells[index]) for x, index in zip(xs, block.columns, strict=True)]
        own = [(x, cell.shown, cell.deviation or 0.0) for x, cell in cells if cell.shown is not None]
        printed = [(x, cell.printed) for x, cell in cells if cell.printed is not None]
        colour = colours[line.condition]
        if own:
            style = f"o{'-' if positions else ''}"
            axes.errorbar(
                *zip(*own, strict=True), fmt=style, color=colour, markersize=4, capsize=2, label=line.condition
            )
        if printed:
            axes.plot(*zip(*printed, strict=True), "D", color=colour, markerfacecolor="none", markersize=4.5)
        heights += [height for _, height, *_ in [*own, *printed]]
    if any(line.cells[index].printed is not None for line in block.lines for index in block.columns):
        axes.plot([], [], "D", color=INK, markerfacecolor="none", markersize=4.5, label="paper")
    if positions:
        axes.set_xscale("log", base=2)
        axes.set_xlabel("numbers per image", fontsize=8.5, color=INK)
    labels = [block.panel.columns[index] for index in block.columns]
    axes.set_xticks(xs, labels, rotation=0 if positions else 25, ha="center" if positions else "right")
    if not positions:
        axes.set_xlim(-0.6, len(xs) - 0.4)
    if min(heights) > 0 and max(heights) > LOG_SPREAD * min(heights):
        axes.set_yscale("log")
    if block.lines[0].cells[block.columns[0]].unit == "share":
        axes.yaxis.set_major_formatter(share_tick)
    axes.minorticks_off()
    _finish(axes, block.title)


def _draw_curve(axes: Any, curve: Curve, colours: Mapping[str, str]) -> None:
    kinds = list(dict.fromkeys(line.name.rpartition("seed ")[0] for line in curve.lines))
    labelled: set[str] = set()
    for line in curve.lines:
        kind = line.name.rpartition("seed ")[0]
        label = ", ".join(filter(None, (line.network, kind.rstrip(", "))))
        options = {"color": colours[line.network], "label": None if label in labelled else label}
        labelled.add(label)
        if curve.kind == "histogram":
            axes.stairs([count / (sum(line.y) or 1) for count in line.y], line.x, linewidth=1.2, **options)
        elif curve.kind == "scatter":
            axes.scatter(line.x, line.y, s=4, alpha=0.5, linewidths=0, rasterized=True, **options)
        else:
            axes.plot(line.x, line.y, DASHES[kinds.index(kind) % len(DASHES)], linewidth=1.4, **options)
    axes.set_xlabel(curve.x_label, fontsize=8.5, color=INK)
    axes.set_ylabel("share of images" if curve.kind == "histogram" else curve.y_label, fontsize=8.5, color=INK)
    if curve.x_log:
        axes.set_xscale("log")
    if curve.y_share and curve.kind == "line":
        axes.yaxis.set_major_formatter(share_tick)
    _finish(axes, curve.title)


def _draw_cloud(axes: Any, title: str, line: Any) -> None:
    """One network, its points coloured by class."""
    axes.scatter(line.x, line.y, c=line.labels, cmap="tab20", s=5, alpha=0.8, linewidths=0, rasterized=True)
    _finish(axes, title)


def _has_classes(curve: Curve) -> bool:
    return len({label for line in curve.lines for label in line.labels}) > 1


def _draw_strip(axes: Any, strip: Strip) -> None:
    """A row of images below the other, with the network and what they are at the left."""
    count, channels, height, width = strip.shape
    rows = [np.frombuffer(row.pixels, np.uint8).reshape(strip.shape).transpose(2, 0, 3, 1) for row in strip.rows]
    picture = np.concatenate([row.reshape(height, count * width, channels) for row in rows])
    axes.imshow(picture.squeeze(), cmap="gray" if channels == 1 else None, interpolation="nearest", vmin=0, vmax=255)
    places = [height * (index + 0.5) for index in range(len(rows))]
    axes.set_yticks(places, [f"{row.network}: {row.name}" for row in strip.rows], fontsize=7, color=INK)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(strip.title, fontsize=9, color=INK, loc="left")


def _finish(axes: Any, title: str) -> None:
    dress(axes)
    axes.tick_params(labelsize=7)
    lines = [part for line in title.splitlines() for part in textwrap.wrap(line, TITLE_LETTERS)]
    axes.set_title("\n".join(lines).replace("$", r"\$"), fontsize=7.5, color=INK, loc="left")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=7, labelcolor=INK)
