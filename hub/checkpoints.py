"""The list of checkpoints, hub/checkpoints.yaml: show it, add to it.

    python hub/checkpoints.py table                     # check it, and print it in Markdown
    python hub/checkpoints.py table --write docs/hub.md   # between the marks of its generated section "checkpoints"
    python hub/checkpoints.py row runs/cifar10-small resnet10-cifar10-2lr recipes/configs/cifar10-small.yaml

`row` prints the row of a run with what it has measured, to be pasted into the list.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from timm_lowrank import CheckpointError
from timm_lowrank.publish.checkpoints import checkpoints_table, read_checkpoints, row_of, write_table
from timm_lowrank.publish.record import read_run

ROOT = Path(__file__).resolve().parent.parent


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    row = commands.add_parser("row", help="print the row of a run")
    row.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished run")
    row.add_argument("name", metavar="NAME", help="of the checkpoint")
    row.add_argument("recipe", metavar="RECIPE", help="from the root of the project: recipes/configs/digits.yaml")
    row.add_argument("--repo", metavar="USER/NAME", help="on the Hub, if it is there")
    table = commands.add_parser("table", help="print the table of all checkpoints, in Markdown")
    table.add_argument("--list", type=Path, default=ROOT / "hub" / "checkpoints.yaml", metavar="FILE")
    table.add_argument("--write", type=Path, metavar="FILE", help="put it into this file instead")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Does what is asked, and reports a mistake in one message instead of a traceback."""
    given = parse_arguments(arguments)
    try:
        if given.command == "row":
            if not (ROOT / given.recipe).is_file():
                raise CheckpointError(f"there is no recipe {given.recipe} in {ROOT}: give one of recipes/configs")
            print(row_of(read_run(given.run), given.name, given.recipe, given.repo), end="")
        elif given.write:
            write_table(read_checkpoints(given.list), given.write)
        else:
            print(checkpoints_table(read_checkpoints(given.list)))
    except CheckpointError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
