"""Train a network with low-rank branches, and its plain twin beside it: `timm-lowrank train` as a script.

    python recipes/train.py                                   # handwritten digits, one to two minutes
    accelerate launch recipes/train.py --config recipes/configs/cifar10-resnet18-fast.yaml --data PATH_OR_NAME

What is particular to low-rank training are three lines, the first in timm_lowrank/training/state.py, the others
in timm_lowrank/training/loop.py, where they stand in a plain accelerate loop:

    model = timm_lowrank.wrap("resnet18", config, num_classes=10)
    loss = criterion(model(images), labels) + model.penalty(labels)
    model.update()                                            # after optimizer.step()
"""

from __future__ import annotations

import sys

from timm_lowrank import cli


def main(arguments: list[str] | None = None) -> None:
    """Runs the command and ends the process with its status."""
    sys.exit(cli.main(["train", *(sys.argv[1:] if arguments is None else arguments)]))


if __name__ == "__main__":
    main()
