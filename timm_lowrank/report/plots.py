"""Plots of an evaluation: a PNG for each curve, and the same panels one by one as SVG for the report."""

from __future__ import annotations

import dataclasses
import importlib
import io
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .. import text
from ..drawing import AXIS, GRID, INK, NETWORKS, PAPER, PLAIN, dress, lay_out, new_figure, share_tick, write_png
from ..evaluation.results import Curve, Evaluation, Series

DASHES = ("-", "--", ":", "-.")
WIDTH, HEIGHT = 3.5, 2.6  # of one panel, inches: as wide as a phone, so that its letters stay legible there
CLASSES = ("blue", "orange", "green", "red", "purple", "brown", "pink", "gray", "olive", "cyan")  # Tableau's
NAMED_CLASSES = 20
LEGEND_LETTERS = 34
FEW = 7  # values on an axis that can all be written there
KINDS = {"line": "Line plot", "histogram": "Histogram", "scatter": "Scatter plot"}
ROLES = {  # colours of the drawings -> CSS variables of the page
    INK: "--ink",
    AXIS: "--axis",
    GRID: "--grid",
    PAPER: "--paper",
    **{colour: f"--network-{index}" for index, colour in enumerate(NETWORKS)},
}
REFERENCE = re.compile(r"#([A-Za-z_][\w.-]*)")


@dataclasses.dataclass(frozen=True)
class Panel:
    """One set of axes: what is drawn in it, and what is said above it where a curve has several."""

    title: str
    curve: Curve
    lines: Sequence[Series]
    titles: Sequence[str]  # of all networks
    class_names: Sequence[str]
    limits: tuple[tuple[float, float], tuple[float, float]] | None = None  # of x and y; None: as the data have them

    def colour(self, line: Series) -> str:
        return NETWORKS[colour_index(line.network, self.titles)]

    def description(self) -> str:
        """What the plot shows, for those who cannot see it."""
        title = f"{self.curve.title}, {self.title}" if self.title else self.curve.title
        about = f"{KINDS[self.curve.kind]}: {title}; {self.curve.y_label} against {self.curve.x_label}."
        if self.curve.kind != "line":
            return f"{about} Networks: {', '.join(dict.fromkeys(line.network for line in self.lines))}."
        unit = "share" if self.curve.y_share else "number"
        ends = [
            f"{' '.join(filter(None, (line.network, line.name)))} from {text.quantity(line.y[0], unit)} at "
            f"{text.number(line.x[0])} to {text.quantity(line.y[-1], unit)} at {text.number(line.x[-1])}"
            for line in self.lines
        ]
        return f"{about} {'; '.join(ends)}."


def write_plots(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Draws every curve that has any data.

    Args:
        evaluation: what evaluation.json holds.
        folder: of the pictures; it is made, and gets a file KEY.png for each curve.

    Returns:
        The files, in the order of the curves.

    Raises:
        ImportError: matplotlib is not installed.
    """
    paths = []
    for curve in evaluation.curves:
        panels = panels_of(curve, evaluation)
        if panels:
            path = folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', curve.key)}.png"
            write_png(draw(panels), path)
            paths.append(path)
    return paths


def panels_of(curve: Curve, evaluation: Evaluation) -> list[Panel]:
    """Small multiples instead of crowded axes: clouds get a panel for each network, histograms one for each name."""
    lines, titles, limits = [line for line in curve.lines if line.x], evaluation.titles, None
    names = list(dict.fromkeys(line.name for line in lines))
    if curve.kind == "scatter":
        lines.sort(key=lambda line: titles.index(line.network))
        named = len(names) > 1 and any(line.name != line.network for line in lines)
        parts = {" · ".join([line.network, *([line.name] if named else [])]): [line] for line in lines}
        limits = None if has_classes(lines) else _common_limits(lines)
    elif len(names) > (1 if curve.kind == "histogram" else len(DASHES)):
        parts = {name: [line for line in lines if line.name == name] for name in names}
    else:
        parts = {"": lines} if lines else {}
    return [Panel(title, curve, part, titles, evaluation.data.class_names, limits) for title, part in parts.items()]


def draw(panels: Sequence[Panel]) -> Any:
    """A matplotlib Figure with the panels side by side, three in a row."""
    across = min(len(panels), 3)
    down = math.ceil(len(panels) / across)
    figure = new_figure(WIDTH * across, HEIGHT * down)
    cells = figure.subplots(down, across, squeeze=False).flatten()
    handles: dict[str, Any] = {}
    for index, (axes, panel) in enumerate(zip(cells, panels, strict=False)):
        drawer = {"line": _draw_lines, "histogram": _draw_histograms, "scatter": _draw_cloud}[panel.curve.kind]
        handles |= drawer(axes, panel)
        _label(axes, panel, y_label=index % across == 0)
    for axes in cells[len(panels) :]:
        axes.set_axis_off()
    if handles:
        labels = [_short(label) for label in handles]
        columns = 1 if max(map(len, labels)) > 20 and across == 1 else min(len(labels), 2 * across)
        figure.legend(
            list(handles.values()), labels, loc="outside upper left", ncols=columns, frameon=False, fontsize=8,
            labelcolor=INK, handlelength=1.6, columnspacing=1.4, borderpad=0.2, labelspacing=0.25,
        )  # fmt: skip
    return figure


def inline_svg(figure: Any, prefix: str, description: str) -> str:
    """A matplotlib Figure as an <svg> element that belongs to the page.

    Colours of `drawing` become CSS variables, so that the plot follows light and dark; letters stay letters, in the
    page's font; ids get `prefix`, for there are several plots in a page. The same figure gives the same text.

    Args:
        figure: drawn with the colours of `drawing`.
        prefix: another one for each plot of the page; letters, digits and hyphens.
        description: what a screen reader says.
    """
    lay_out(figure)
    buffer = io.BytesIO()
    matplotlib = importlib.import_module("matplotlib")  # reads these two from its global settings alone
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(buffer.getvalue())
    ids = {element.attrib["id"] for element in root.iter() if "id" in element.attrib}
    values = [value for element in root.iter() for value in element.attrib.values()]
    used = ids & {name for value in values for name in REFERENCE.findall(value)}  # the rest are colours
    for element in root.iter():
        element.tag = _local(element.tag)
        element.attrib = {
            _local(key): _adapted(value, used, prefix) if _local(key) != "id" else f"{prefix}-{value}"
            for key, value in element.attrib.items()
            if _local(key) != "id" or value in used
        }
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": description, "class": "plot"}
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag in ("metadata", "style")]:  # a style would be the page's
            parent.remove(child)
    return ElementTree.tostring(root, encoding="unicode")


def colour_index(title: str, titles: Sequence[str]) -> int:
    """Where in `drawing.NETWORKS` the colour of a network stands: in order, but "plain" is grey in every report."""
    grey = NETWORKS.index(PLAIN)
    if title == "plain":
        return grey
    free = [index for index in range(len(NETWORKS)) if index != grey or "plain" not in titles]
    return free[[name for name in titles if name != "plain"].index(title) % len(free)]


def has_classes(lines: Iterable[Series]) -> bool:
    """Whether the points of clouds are told apart by class."""
    return len({label for line in lines for label in line.labels}) > 1


def _common_limits(lines: Sequence[Series]) -> tuple[tuple[float, float], tuple[float, float]] | None:
    """Axes on which clouds of the same two quantities can be compared between networks, with some air around them."""
    ends = []
    for numbers in ([x for line in lines for x in line.x], [y for line in lines for y in line.y]):
        finite = [number for number in numbers if math.isfinite(number)]
        if not finite or min(finite) == max(finite):
            return None
        air = 0.04 * (max(finite) - min(finite))
        ends.append((min(finite) - air, max(finite) + air))
    return ends[0], ends[1]


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _adapted(value: str, used: set[str], prefix: str) -> str:
    value = REFERENCE.sub(lambda match: f"#{prefix}-{match[1]}" if match[1] in used else match[0], value)
    for colour, role in ROLES.items():
        value = value.replace(colour, f"var({role})")
    # the page's own font; sizes stay
    value = re.sub(r"font-family: [^;]*", "font-family: inherit", value)
    return re.sub(r"font: ([\d.]+px)[^;]*", r"font-size: \1; font-family: inherit", value)


def _label(axes: Any, panel: Panel, y_label: bool) -> None:
    curve = panel.curve
    dress(axes)
    axes.set_xlabel(curve.x_label, fontsize=8.5, color=INK)
    if y_label:
        axes.set_ylabel(curve.y_label, fontsize=8.5, color=INK)
    if panel.title:
        axes.set_title(_short(panel.title), fontsize=9, color=INK, loc="left")
    positions = sorted({x for line in panel.lines for x in line.x if x > 0})
    if curve.x_log and positions:
        axes.set_xscale("log")
        if len(positions) <= FEW:
            axes.set_xticks(positions)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(lambda *_: "")
    if curve.y_share:
        axes.yaxis.set_major_formatter(share_tick)
        if curve.kind == "line":
            axes.set_ylim(-0.02, 1.02)
            axes.set_yticks([0, 0.25, 0.5, 0.75, 1])


# The drawers return what stands in the legend: label -> handle.


def _draw_lines(axes: Any, panel: Panel) -> dict[str, Any]:
    names, handles = list(dict.fromkeys(line.name for line in panel.lines)), {}
    for index, line in enumerate(panel.lines):
        label = ", ".join(filter(None, (line.network, line.name if len(names) > 1 else "")))
        (handles[label],) = axes.plot(
            line.x, line.y, color=panel.colour(line), linestyle=DASHES[names.index(line.name)],
            linewidth=1.7, marker="o" if len(line.x) <= 2 * FEW else None, markersize=3.2,
            zorder=3 - index / len(panel.lines),  # the network that the report is about lies on top
        )  # fmt: skip
    return handles


def _draw_histograms(axes: Any, panel: Panel) -> dict[str, Any]:
    handles = {}
    for line in panel.lines:
        whole = sum(line.y) if panel.curve.y_share else 1
        shares = [count / (whole or 1) for count in line.y]
        axes.stairs(shares, line.x, fill=True, color=panel.colour(line), alpha=0.18, linewidth=0)
        handles[line.network] = axes.stairs(shares, line.x, color=panel.colour(line), linewidth=1.4)
    axes.set_ylim(bottom=0)
    return handles


def _draw_cloud(axes: Any, panel: Panel) -> dict[str, Any]:
    """Points of one network by class; each class is named at its median, as long as that can be read: no legend."""
    line = panel.lines[0]
    by_class = has_classes(panel.lines)
    colours = [f"tab:{CLASSES[label % len(CLASSES)]}" if by_class else panel.colour(line) for label in line.labels]
    axes.scatter(line.x, line.y, c=colours, s=5, alpha=0.75, linewidths=0, rasterized=True)
    if panel.limits:
        axes.set_xlim(panel.limits[0])
        axes.set_ylim(panel.limits[1])
    classes = sorted(set(line.labels))
    for label in classes if by_class and len(classes) <= NAMED_CLASSES else ():
        rows = [row for row, one in enumerate(line.labels) if one == label]
        middle = [sorted(axis[row] for row in rows)[len(rows) // 2] for axis in (line.x, line.y)]
        name = panel.class_names[label] if 0 <= label < len(panel.class_names) else str(label)
        axes.annotate(
            _short(name, 12), middle, ha="center", va="center", fontsize=7.5, color=INK,
            bbox={"boxstyle": "round,pad=0.15", "facecolor": PAPER, "edgecolor": "none", "alpha": 0.72},
        )  # fmt: skip
    return {}


def _short(title: str, letters: int = LEGEND_LETTERS) -> str:
    """Cut in the middle: titles often differ at their ends. A dollar sign is no formula here, and a leading underscore
    (of which matplotlib makes no legend) a letter like others."""
    if len(title) > letters:
        title = f"{title[: letters // 2]}…{title[-(letters - letters // 2 - 1) :]}"
    return ("\u200b" if title.startswith("_") else "") + title.replace("$", r"\$")
