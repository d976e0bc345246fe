"""Train a timm network with low-rank branches on images, and its plain twin beside it.

    python recipes/train.py                                   # handwritten digits, about two minutes on two cores
    accelerate launch recipes/train.py --config recipes/configs/cifar10-resnet18.yaml --data PATH_OR_NAME
    python recipes/train.py --config recipes/configs/digits.yaml --set lowrank.branches=1-LR --set seed=1

What is particular to low-rank training are three lines, the first in timm_lowrank/training/state.py, the others
in timm_lowrank/training/loop.py, where they stand in a plain accelerate loop:

    model = timm_lowrank.wrap("resnet18", config, num_classes=10)
    loss = criterion(model(images), labels) + model.penalty()
    model.update()                                            # after optimizer.step()

The output folder gets config.yaml, metrics.csv, checkpoints/, model/ (loadable by timm), plots/spectrum.png and
summary.json; twin/ holds the same of the plain network.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from timm_lowrank.errors import LowRankError
from timm_lowrank.training import TrainingError, load_recipe, train

CONFIGS = Path(__file__).resolve().parent / "configs"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    known = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml")))
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"Recipes in recipes/configs: {known}. Their keys: timm_lowrank.training.Recipe.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", type=Path, default=CONFIGS / "digits.yaml", metavar="FILE",
        help="the recipe in YAML (default: recipes/configs/digits.yaml)",
    )  # fmt: skip
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
        help="change a key of the recipe; dots reach inside: lowrank.reconstruction_weight=0.3",
    )  # fmt: skip
    parser.add_argument(
        "--data", metavar="PATH_OR_NAME",
        help='a folder of parquet files, a data set on the Hub such as uoft-cs/cifar10, or "digits"',
    )  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where the run goes (default: runs/RECIPE)")
    parser.add_argument(
        "--resume", choices=["auto"],
        help="continue from the newest complete checkpoint in the output folder, if there is one",
    )  # fmt: skip
    return parser.parse_args(arguments)


def main() -> None:
    """Reads the recipe, trains, and reports a mistake in one message instead of a traceback."""
    arguments = parse_arguments()
    try:
        recipe = load_recipe(arguments.config, arguments.overrides, data=arguments.data)
        output = arguments.output or Path("runs") / recipe.name
        train(recipe, output, resume=arguments.resume is not None)
    except (TrainingError, LowRankError, ImportError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: continue with the same command and --resume auto")


if __name__ == "__main__":
    main()
