"""Fetch a published checkpoint and verify it: `timm-lowrank pull` as a script.

python hub/pull.py USER/NAME my-model         # into a new folder; without one into the cache
"""

from __future__ import annotations

import sys

from timm_lowrank import cli


def main(arguments: list[str] | None = None) -> None:
    """Runs the command and ends the process with its status."""
    sys.exit(cli.main(["pull", *(sys.argv[1:] if arguments is None else arguments)]))


if __name__ == "__main__":
    main()
