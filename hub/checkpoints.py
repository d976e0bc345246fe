"""The list of published checkpoints, hub/checkpoints.yaml: check it, add to it, show it.

    python hub/checkpoints.py check
    python hub/checkpoints.py row runs/cifar10-small resnet10-cifar10-2lr recipes/configs/cifar10-small.yaml
    python hub/checkpoints.py table                     # in Markdown
    python hub/checkpoints.py table --write README.md   # between the marks of its generated section "checkpoints"

`row` prints the row of a run with what it has measured, to be pasted under `checkpoints:`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from timm_lowrank import CheckpointError
from timm_lowrank.hub import load_manifest, manifest_row, manifest_table, read_run, write_table

HERE = Path(__file__).resolve().parent


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", type=Path, default=HERE / "checkpoints.yaml", metavar="FILE")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check", help="say what is wrong with the manifest")
    row = commands.add_parser("row", help="print the row of a run")
    row.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished run, inside the project")
    row.add_argument("name", metavar="NAME", help="of the repository: NAME or USER/NAME")
    row.add_argument("config", metavar="CONFIG", help="its recipe, such as recipes/configs/digits.yaml")
    table = commands.add_parser("table", help="print the table of all checkpoints, in Markdown")
    table.add_argument("--write", type=Path, metavar="FILE", help="put it into this file instead")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Does what is asked, and reports a mistake in one message instead of a traceback."""
    given = parse_arguments(arguments)
    try:
        manifest = load_manifest(given.manifest)
        if given.command == "row":
            print(manifest_row(read_run(given.run), given.name, given.config, manifest.root), end="")
        elif given.command == "check":
            print(f"{given.manifest} is sound: {len(manifest.rows)} checkpoints")
        elif given.write:
            write_table(manifest, given.write)
        else:
            print(manifest_table(manifest))
    except CheckpointError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
