"""`plot_spectrum`: the variance ratio against the number of directions, a panel for each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from ..data.sources import require
from ..drawing import INK, LOWRANK, PLAIN, dress, new_figure, percent, write_png


def plot_spectrum(
    path: Path,
    runs: Mapping[str, Mapping[str, Sequence[float]]],
    branches: Mapping[str, Mapping[str, Any]],
) -> None:
    """Draws a PNG.

    Args:
        path: of the PNG; its folder is made.
        runs: title -> layer -> shares of the variance, descending (spectrum.json). The last run is the one
            that the picture is about; the runs before it are drawn as references.
        branches: layer -> "features" and "target_rank" (summary.json).
    """
    require("matplotlib", "matplotlib")
    layers = list(branches)
    figure = new_figure(0.8 + 4.2 * len(layers), 3.6)
    panels = figure.subplots(1, len(layers), squeeze=False, sharey=True)[0]
    for panel, layer in zip(panels, layers, strict=True):
        _draw(panel, {title: run[layer] for title, run in runs.items() if layer in run}, branches[layer])
        panel.set_title(f"{layer}, {branches[layer]['features']:,} features", fontsize=10, color=INK, loc="left")
    panels[0].set_ylabel("share of test variance", fontsize=9, color=INK)
    panels[0].legend(frameon=False, fontsize=9, labelcolor=INK, loc="lower right")
    write_png(figure, path)


def _draw(panel: Any, runs: Mapping[str, Sequence[float]], branch: Mapping[str, Any]) -> None:
    curves = {title: [min(held, 1.0) for held in accumulate(shares)] for title, shares in runs.items()}
    longest = max(len(curve) for curve in curves.values())
    for place, (title, curve) in enumerate(curves.items(), start=1):
        about = place == len(curves) and title != "plain"
        style = {"color": LOWRANK, "linewidth": 2.2} if about else {"color": PLAIN, "linewidth": 1.6, "linestyle": "--"}
        panel.plot(range(1, len(curve) + 1), curve, label=title, **style)
    if len(curves) == 2:
        one, two = curves.values()
        shared = min(len(one), len(two))
        panel.fill_between(range(1, shared + 1), one[:shared], two[:shared], color=LOWRANK, alpha=0.10, linewidth=0)
    if branch["target_rank"] and branch["target_rank"] <= longest:
        panel.axvline(branch["target_rank"], color=INK, linewidth=0.8, linestyle=":")
        panel.annotate(
            f"target rank {branch['target_rank']}", (branch["target_rank"], 0.03), rotation=90, fontsize=7.5,
            color=INK, ha="right", va="bottom", xytext=(-2, 0), textcoords="offset points",
        )  # fmt: skip
    panel.set_xscale("log")
    panel.set_xlim(1, max(longest, 2))
    panel.set_ylim(0, 1.02)
    panel.set_xlabel("directions", fontsize=9, color=INK)
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.yaxis.set_major_formatter(percent)
    dress(panel)
