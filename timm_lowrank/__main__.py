"""`python -m timm_lowrank layers NAME`: the layers of a timm network that a branch can sit on."""

from __future__ import annotations

import argparse
import json
import sys

from .layers import LayerInfo, list_layers


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m timm_lowrank", description="Tools for low-rank branches on timm networks."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    layers = commands.add_parser("layers", help="list the layers that a branch can sit on")
    layers.add_argument("model", help="a timm name, for example resnet18")
    layers.add_argument(
        "--depth", type=int, default=2, help="only names of at most this many parts (default 2; 0 for all)"
    )
    layers.add_argument(
        "--model-args",
        type=json.loads,
        default={},
        metavar="JSON",
        help="keywords for timm.create_model, for example '{\"img_size\": 32}'",
    )
    options = parser.parse_args(arguments)
    try:
        found = list_layers(options.model, **options.model_args)
    except (ValueError, TypeError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    print_layers([layer for layer in found if not options.depth or layer.name.count(".") < options.depth])
    return 0


def print_layers(layers: list[LayerInfo]) -> None:
    """A table of name, kind, shape, default view and width, on standard output."""
    rows = [("layer", "kind", "shape", "view", "width")]
    rows += [(x.name, x.kind, " x ".join(map(str, x.shape)), x.view, f"{x.width:,}") for x in layers]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for row in rows:
        left = [f"{cell:<{width}}" for cell, width in zip(row[:-1], widths, strict=False)]
        print("  ".join([*left, f"{row[-1]:>{widths[-1]}}"]))


if __name__ == "__main__":
    sys.exit(main())
