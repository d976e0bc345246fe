"""Plots of an evaluation: a PNG for each curve, and the same panels one by one for the report."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..drawing import INK, NETWORKS, PAPER, PLAIN, dress, new_figure, percent, write_png
from .content import check_content, titles

DASHES = ("-", "--", ":", "-.")
WIDTH, HEIGHT = 3.5, 2.6  # of one panel, inches: as wide as a phone, so that its letters stay legible there
CLASSES = ("blue", "orange", "green", "red", "purple", "brown", "pink", "gray", "olive", "cyan")  # Tableau's
NAMED_CLASSES = 20
LEGEND_LETTERS = 34
FEW = 7  # values on an axis that can all be written there


@dataclasses.dataclass(frozen=True)
class Panel:
    """One set of axes: what is drawn in it, and what is said above it where a curve has several."""

    title: str
    curve: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]
    networks: Sequence[str]
    class_names: Sequence[str]
    limits: tuple[tuple[float, float], tuple[float, float]] | None = None  # of x and y; None: as the data have them


def write_plots(evaluation: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draws every curve that has any data.

    Args:
        evaluation: the content of evaluation.json.
        folder: of the pictures; it is made, and gets a file KEY.png for each curve.

    Returns:
        The files, in the order of the curves.

    Raises:
        EvaluationError: the content is of another format or not complete.
        ImportError: matplotlib is not installed.
    """
    check_content(evaluation)
    paths = []
    for curve in evaluation["curves"]:
        panels = panels_of(curve, evaluation)
        if not panels:
            continue
        path = folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', curve['key'])}.png"
        write_png(draw(panels), path)
        paths.append(path)
    return paths


def panels_of(curve: Mapping[str, Any], evaluation: Mapping[str, Any]) -> list[Panel]:
    """Small multiples instead of crowded axes: clouds get a panel for each network, histograms one for each name."""
    lines = [line for line in curve["lines"] if len(line["edges" if curve["kind"] == "histogram" else "x"])]
    networks, limits = titles(evaluation), None
    names = list(dict.fromkeys(line.get("name") or "" for line in lines))
    if curve["kind"] == "scatter":
        lines.sort(key=lambda line: networks.index(line["network"]))
        named = len(names) > 1 and any(line.get("name") != line["network"] for line in lines)
        parts = {" · ".join([line["network"], *([line.get("name") or ""] if named else [])]): [line] for line in lines}
        limits = None if has_classes(lines) else _common_limits(lines)
    elif len(names) > (1 if curve["kind"] == "histogram" else len(DASHES)):
        parts = {name: [line for line in lines if (line.get("name") or "") == name] for name in names}
    else:
        parts = {"": lines} if lines else {}
    names_of_classes = evaluation["data"]["class_names"]
    return [Panel(title, curve, part, networks, names_of_classes, limits) for title, part in parts.items()]


def draw(panels: Sequence[Panel]) -> Any:
    """A matplotlib Figure with the panels side by side, three in a row."""
    across = min(len(panels), 3)
    down = math.ceil(len(panels) / across)
    figure = new_figure(WIDTH * across, HEIGHT * down)
    cells = figure.subplots(down, across, squeeze=False).flatten()
    for place, (axes, panel) in enumerate(zip(cells, panels, strict=False)):
        {"line": _draw_lines, "histogram": _draw_histograms, "scatter": _draw_cloud}[panel.curve["kind"]](axes, panel)
        _label(axes, panel, y_label=place % across == 0)
    for axes in cells[len(panels) :]:
        axes.set_axis_off()
    handles: dict[str, Any] = {}
    for axes in cells[: len(panels)]:
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if handles:
        columns = 1 if max(map(len, handles)) > 20 and across == 1 else min(len(handles), 2 * across)
        figure.legend(
            list(handles.values()), list(handles), loc="outside upper left", ncols=columns, frameon=False, fontsize=8,
            labelcolor=INK, handlelength=1.6, columnspacing=1.4, borderpad=0.2, labelspacing=0.25,
        )  # fmt: skip
    return figure


def network_place(title: str, networks: Sequence[str]) -> int:
    """Where in `drawing.NETWORKS` the colour of a network stands: in order, but "plain" is grey in every report."""
    grey = NETWORKS.index(PLAIN)
    if title == "plain":
        return grey
    places = [place for place in range(len(NETWORKS)) if place != grey or "plain" not in networks]
    return places[[name for name in networks if name != "plain"].index(title) % len(places)]


def has_classes(lines: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the points of a cloud are told apart by class."""
    return len({label for line in lines for label in line["label"]}) > 1


def _common_limits(lines: Sequence[Mapping[str, Any]]) -> tuple[tuple[float, float], tuple[float, float]] | None:
    """Axes on which clouds of the same two quantities can be compared between networks, with some air around them."""
    ends = []
    for column in ("x", "y"):
        numbers = [value for line in lines for value in _numbers(line[column]) if math.isfinite(value)]
        if not numbers or min(numbers) == max(numbers):
            return None
        air = 0.04 * (max(numbers) - min(numbers))
        ends.append((min(numbers) - air, max(numbers) + air))
    return ends[0], ends[1]


def _label(axes: Any, panel: Panel, y_label: bool) -> None:
    curve = panel.curve
    dress(axes)
    axes.set_xlabel(curve["x_label"], fontsize=8.5, color=INK)
    if y_label:
        axes.set_ylabel(curve["y_label"], fontsize=8.5, color=INK)
    if panel.title:
        axes.set_title(_short(panel.title), fontsize=9, color=INK, loc="left")
    if curve.get("x_log") and any(x is not None and x > 0 for line in panel.lines for x in line.get("x", [])):
        axes.set_xscale("log")
        places = sorted({x for line in panel.lines for x in line["x"] if x is not None and x > 0})
        if len(places) <= FEW:
            axes.set_xticks(places)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(lambda *_: "")
    if curve.get("y_share"):
        axes.yaxis.set_major_formatter(percent)
        if curve["kind"] == "line":
            axes.set_ylim(-0.02, 1.02)
            axes.set_yticks([0, 0.25, 0.5, 0.75, 1])


def _draw_lines(axes: Any, panel: Panel) -> None:
    names = list(dict.fromkeys(line.get("name") or "" for line in panel.lines))
    for place, line in enumerate(panel.lines):
        named = line.get("name") if len(names) > 1 else ""
        dashes = DASHES[names.index(line.get("name") or "")]
        axes.plot(
            _numbers(line["x"]), _numbers(line["y"]), label=_short(", ".join(filter(None, (line["network"], named)))),
            color=NETWORKS[network_place(line["network"], panel.networks)], linestyle=dashes,
            linewidth=1.7, marker="o" if len(line["x"]) <= 2 * FEW else None, markersize=3.2,
            zorder=3 - place / len(panel.lines),  # the network that the report is about lies on top
        )  # fmt: skip


def _draw_histograms(axes: Any, panel: Panel) -> None:
    for line in panel.lines:
        counts = _numbers(line["counts"])
        whole = sum(counts) if panel.curve.get("y_share") else 1
        colour = NETWORKS[network_place(line["network"], panel.networks)]
        shares = [count / (whole or 1) for count in counts]
        axes.stairs(shares, line["edges"], fill=True, color=colour, alpha=0.18, linewidth=0)
        axes.stairs(shares, line["edges"], color=colour, linewidth=1.4, label=_short(line["network"]))
    axes.set_ylim(bottom=0)


def _draw_cloud(axes: Any, panel: Panel) -> None:
    """Points of one network by class; each class is named at its median, as long as that can be read."""
    line = panel.lines[0]
    xs, ys, labels = _numbers(line["x"]), _numbers(line["y"]), [int(label) for label in line["label"]]
    told = has_classes(panel.lines)
    own = NETWORKS[network_place(line["network"], panel.networks)]
    colours = [f"tab:{CLASSES[label % len(CLASSES)]}" if told else own for label in labels]
    axes.scatter(xs, ys, c=colours, s=5, alpha=0.75, linewidths=0, rasterized=True)
    if panel.limits:
        axes.set_xlim(panel.limits[0])
        axes.set_ylim(panel.limits[1])
    classes = sorted(set(labels))
    for label in classes if told and len(classes) <= NAMED_CLASSES else ():
        rows = [row for row, one in enumerate(labels) if one == label]
        middle = sorted(xs[row] for row in rows)[len(rows) // 2], sorted(ys[row] for row in rows)[len(rows) // 2]
        name = panel.class_names[label] if 0 <= label < len(panel.class_names) else str(label)
        axes.annotate(
            _short(name, 12), middle, ha="center", va="center", fontsize=7.5, color=INK,
            bbox={"boxstyle": "round,pad=0.15", "facecolor": PAPER, "edgecolor": "none", "alpha": 0.72},
        )  # fmt: skip


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else float(value) for value in values]


def _short(text: str, letters: int = LEGEND_LETTERS) -> str:
    """Cut in the middle: titles often differ at their ends. Dollar signs are no formulas here."""
    if len(text) > letters:
        text = f"{text[: letters // 2]}…{text[-(letters - letters // 2 - 1) :]}"
    return text.replace("$", r"\$")
