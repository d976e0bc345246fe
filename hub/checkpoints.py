"""The checkpoints of this project, hub/checkpoints and the list hub/checkpoints.yaml: show them, add to them.

    python hub/checkpoints.py add runs/cifar10-fast cifar10-resnet10-2lr --dataset uoft-cs/cifar10
    python hub/checkpoints.py table                     # check the list, and print it in Markdown
    python hub/checkpoints.py table --write docs/hub.md   # between the marks of its generated section "checkpoints"

`add` takes a finished, evaluated run. It counts the right answers on a sample of test images, and writes the folder
hub/checkpoints/NAME, the row of the list and the table of docs/hub.md; given such a folder it writes its card anew.
`timm-lowrank push --all --user USER` publishes them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from timm_lowrank import CheckpointError
from timm_lowrank.checkpoint.listed import read_checkpoints
from timm_lowrank.publish.checkpoints import SAMPLE, add_checkpoint, checkpoints_table, write_table

ROOT = Path(__file__).resolve().parent.parent


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("add", help="put an evaluated run into the clone")
    add.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished, evaluated run")
    add.add_argument("name", metavar="NAME", help="of the checkpoint")
    add.add_argument("--recipe", metavar="FILE", help="from the root of the project (default: the run's own by name)")
    add.add_argument("--sample", metavar="FOLDER", help=f'"digits" or a folder of parquet files (default: {SAMPLE})')
    add.add_argument("--dataset", metavar="NAME", help="the data set's name on the Hub, if the run had a copy of it")
    add.add_argument(
        "--license", metavar="ID",
        help="of the weights, as the Hub names it (default: that of the weights that the training began from, else "
        "apache-2.0)",
    )  # fmt: skip
    table = commands.add_parser("table", help="print the table of all checkpoints, in Markdown")
    table.add_argument("--list", type=Path, default=ROOT / "hub" / "checkpoints.yaml", metavar="FILE")
    table.add_argument("--write", type=Path, metavar="FILE", help="put it into this file instead")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Does what is asked, and reports a mistake in one message instead of a traceback."""
    given = parse_arguments(arguments)
    try:
        if given.command == "add":
            options = {name: getattr(given, name) for name in ("recipe", "sample", "dataset", "license")}
            print("\n".join(add_checkpoint(given.run, given.name, **options)))
        elif given.write:
            write_table(read_checkpoints(given.list), given.write)
        else:
            print(checkpoints_table(read_checkpoints(given.list)))
    except CheckpointError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted: the same command begins again", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
