"""Compare evaluated runs: what low rank bought beside the plain twin, and what it cost, averaged over seeds.

    python recipes/compare.py runs/N-LR-seed* runs/1-LR-seed* runs/2-LR-seed* [--json FILE]

Reads the evaluation.json of each run, which recipes/evaluate.py makes, and prints clean and robust accuracy, accuracy
under noise, and for each layer the effective rank, the share of the test variance in its leading directions and the
test accuracy of a max-margin classifier that sees only these. Runs whose names differ in a trailing "-seedN" alone are
averaged, with the standard deviation over seeds; networks that were evaluated beside them, such as plain twins, too.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from timm_lowrank.errors import EvaluationError, TrainingError
from timm_lowrank.training.compare import compare_runs


def main() -> None:
    """Prints the table, and reports a mistake in one message instead of a traceback."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders that recipes/evaluate.py has evaluated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures of each run to this file")
    options = parser.parse_args()
    try:
        comparison = compare_runs(options.runs)
    except (TrainingError, EvaluationError) as error:
        sys.exit(f"error: {error}")
    print(comparison.table())
    if options.json:
        options.json.write_text(json.dumps(comparison.to_dict(), indent=2) + "\n")


if __name__ == "__main__":
    main()
