"""Compare trained runs by four figures, each beside the plain twin: what low rank bought, and what it cost.

    python recipes/compare.py runs/plain runs/1-LR runs/2-LR [--data PATH_OR_NAME] [--json FILE]

Clean accuracy; accuracy under random pixel noise; and, for each layer that any of the runs names, the share of the
test variance in the leading directions and the test accuracy of a linear classifier that sees only these. Runs
whose names differ in a trailing "-seedN" alone are averaged, with the standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections import defaultdict
from pathlib import Path

from timm_lowrank.training import TrainingError
from timm_lowrank.training.compare import Figures, layers_of, measure_run

DIRECTIONS = (5, 10, 20)


def row(name: str, runs: list[Figures]) -> list[str]:
    """One line of the table: means over runs, in per cent, with the standard deviation if there are several."""
    cells = [name]
    for key in runs[0]:
        values = [100 * run[key] for run in runs]
        spread = f" ±{statistics.stdev(values):.1f}" if len(values) > 1 else ""
        cells.append(f"{statistics.mean(values):.1f}{spread}")
    return cells


def main() -> None:
    """Measures each run and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders of recipes/train.py on the same data")
    parser.add_argument("--data", help="where the data are now, if not where they were when the runs were made")
    parser.add_argument("--noise", type=float, default=0.4, help="probability that a pixel is hit (default 0.4)")
    parser.add_argument(
        "--limit", type=int, default=5000, help="training and test images for the layers (default 5000)"
    )
    parser.add_argument("--json", type=Path, help="also write the figures of each run to this file")
    options = parser.parse_args()
    groups: dict[str, list[Figures]] = defaultdict(list)
    figures: dict[str, Figures] = {}
    try:
        layers = list(dict.fromkeys(layer for run in options.runs for layer in layers_of(run)))
        for run in options.runs:
            figures[str(run)] = measure_run(
                run, DIRECTIONS, options.noise, options.limit, layers=layers, data=options.data
            )
            groups[re.sub(r"-seed\d+$", "", run.name)].append(figures[str(run)])
    except TrainingError as error:
        sys.exit(f"error: {error}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    header = ["run", *next(iter(figures.values()))]
    rows = [header, *(row(name, runs) for name, runs in groups.items())]
    for column in zip(*rows, strict=True):  # one figure a line: runs side by side fit any terminal
        print("  ".join(f"{cell:<34}" if i == 0 else f"{cell:>14}" for i, cell in enumerate(column)))


if __name__ == "__main__":
    main()
