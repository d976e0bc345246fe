"""Evaluate a trained network beside its plain twin: accuracy, attacks, noise, representations, gradient masking.

    python recipes/evaluate.py runs/digits                        # beside runs/digits/twin, about two minutes
    python recipes/evaluate.py runs/1-LR --against runs/plain --suite paper autoattack
    torchrun --nproc_per_node 4 recipes/evaluate.py RUN --suite autoattack --limit 1000
    python recipes/evaluate.py hf-hub:USER/NAME --data uoft-cs/cifar10

Suites: quick (PGD, transfer, noise, spectrum, compression, diagnosis), paper (every attack and measurement of the
paper), autoattack (AutoAttack standard, L_inf 2/255 and 8/255, L2 0.5). Several may be given together.

The run folder gets evaluation.json, plots/*.png and report.html, one file to read in any browser. A killed
evaluation is taken up again by the same command, from evaluation.json.partial.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from timm_lowrank.errors import EvaluationError, LowRankError
from timm_lowrank.report import text_table
from timm_lowrank.suites import Options, evaluate, join_processes
from timm_lowrank.training import TrainingError


def parse_arguments(arguments: list[str] | None = None) -> Options:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "network", metavar="RUN_OR_MODEL",
        help="a run folder, a folder with config.json and model.safetensors, hf-hub:USER/NAME, or a timm name",
    )  # fmt: skip
    parser.add_argument(
        "--against", nargs="+", default=[], metavar="RUN_OR_MODEL",
        help="the networks beside it (default: the twin in the run folder, if there is one; none: no other)",
    )  # fmt: skip
    parser.add_argument(
        "--suite", nargs="+", choices=["quick", "paper", "autoattack"], default=["quick"], help="default: quick"
    )
    parser.add_argument("--data", metavar="PATH_OR_NAME", help="where the images are, if not where the run says")
    parser.add_argument("--limit", type=int, metavar="N", help="test images (default: 500 for quick, else 1000)")
    parser.add_argument(
        "--train-limit", type=int, metavar="N",
        help="training images that PCA and linear classifiers are fitted on (default: 2000, for paper 5000)",
    )  # fmt: skip
    parser.add_argument(
        "--other-labels", metavar="COLUMN",
        help="a column of other labels: how well a linear classifier tells them from the representation",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default 0)")
    parser.add_argument("--batch-size", type=int, default=100, metavar="N", help="images in a batch (default 100)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where the report goes (default: the run folder)")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished evaluation that was another one")
    given = parser.parse_args(arguments)
    return Options(
        network=given.network, against=tuple(given.against), suites=tuple(dict.fromkeys(given.suite)), data=given.data,
        limit=given.limit, train_limit=given.train_limit, other_labels=given.other_labels, seed=given.seed,
        chunk=given.batch_size, output=given.output, overwrite=given.overwrite,
        command=shlex.join(["python", "recipes/evaluate.py", *(sys.argv[1:] if arguments is None else arguments)]),
    )  # fmt: skip


def main() -> None:
    """Evaluates, prints the main figures, and reports a mistake in one message instead of a traceback."""
    options = parse_arguments()
    try:
        state = join_processes()
        evaluation = evaluate(options, state)
    except (EvaluationError, TrainingError, LowRankError, ImportError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command continues")
    if evaluation is not None:
        print(text_table(evaluation))
    if state.num_processes > 1:
        state.destroy_process_group()


if __name__ == "__main__":
    main()
