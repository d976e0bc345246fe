"""Compare evaluated runs, averaged over seeds: `timm-lowrank compare` as a script.

python recipes/compare.py runs/plain-seed* runs/2-LR-seed*
"""

from __future__ import annotations

import sys

from timm_lowrank import cli


def main(arguments: list[str] | None = None) -> None:
    """Runs the command and ends the process with its status."""
    sys.exit(cli.main(["compare", *(sys.argv[1:] if arguments is None else arguments)]))


if __name__ == "__main__":
    main()
