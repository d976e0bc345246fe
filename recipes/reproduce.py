"""Make a table, figure or claim of the paper beside ours: `timm-lowrank reproduce` as a script.

python recipes/reproduce.py --list
python recipes/reproduce.py --table 5 --scale smoke
"""

from __future__ import annotations

import sys

from timm_lowrank import cli


def main(arguments: list[str] | None = None) -> None:
    """Runs the command and ends the process with its status."""
    sys.exit(cli.main(["reproduce", *(sys.argv[1:] if arguments is None else arguments)]))


if __name__ == "__main__":
    main()
