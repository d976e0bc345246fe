"""Evaluate a trained network beside its plain twin: `timm-lowrank evaluate` as a script.

python recipes/evaluate.py runs/digits                        # beside runs/digits/twin, about two minutes
torchrun --nproc_per_node 4 recipes/evaluate.py RUN --suite autoattack --limit 1000
"""

from __future__ import annotations

import sys

from timm_lowrank import cli


def main(arguments: list[str] | None = None) -> None:
    """Runs the command and ends the process with its status."""
    sys.exit(cli.main(["evaluate", *(sys.argv[1:] if arguments is None else arguments)]))


if __name__ == "__main__":
    main()
