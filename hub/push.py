"""Publish a trained run on the Hugging Face Hub: `timm-lowrank push` as a script.

python hub/push.py runs/digits USER/NAME --dry-run preview     # writes what would be pushed, and pushes nothing
python hub/push.py runs/digits USER/NAME
"""

from __future__ import annotations

import sys

from timm_lowrank import cli


def main(arguments: list[str] | None = None) -> None:
    """Runs the command and ends the process with its status."""
    sys.exit(cli.main(["push", *(sys.argv[1:] if arguments is None else arguments)]))


if __name__ == "__main__":
    main()
