"""`python -m timm_lowrank.integrations.timm_train PATH/train.py --lowrank CONFIG ...`: timm's train script, low rank.

The script is timm's own, unmodified, and takes all of its arguments: resume, EMA, accumulation, clipping, AMP, compile
and several processes work as they do without branches. What it saves is the plain network, with W and b beside it.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml  # timm needs it too

from ..core.config import PRESETS, LowRankConfig
from ..errors import nearest
from .timm_script import Joint, ScriptError, loaded_script

_PROG = "python -m timm_lowrank.integrations.timm_train"
_OWN = "--lowrank"  # no argument of timm's begins so


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; None is `sys.argv`. What is wrong with it, or with the script, ends in exit status 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    if not arguments or arguments[0].startswith("-"):
        if {"-h", "--help"} & set(arguments):
            parser.print_help()
            return
        parser.error("the first argument must be the path of timm's train script")
    own, others = split_arguments(arguments[1:])
    helps = bool({"-h", "--help"} & set(others))
    options = parser.parse_args([arguments[0], *own])
    try:
        if options.lowrank is None and not helps:
            raise ScriptError(f"--lowrank is missing: {', '.join(PRESETS)}, or a YAML file with LowRankConfig's fields")
        config = read_config(options.lowrank or PRESETS[0], options.lowrank_set)
        joint = Joint(config, options.lowrank_start_epoch)
        with loaded_script(Path(options.script), others) as script:
            if helps:
                parser.print_help()
                print("\nThe script's own arguments:\n")
            joint.install(script)
            script.main()
    except ScriptError as problem:
        parser.exit(2, f"{_PROG}: error: {problem}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROG,
        usage=f"{_PROG} PATH/train.py --lowrank CONFIG [--lowrank-set KEY=VALUE] [--lowrank-start-epoch N] ...",
        description="Run timm's unmodified train script with low-rank branches on its network.",
        epilog="All other arguments go to the script.",
        allow_abbrev=False,
    )
    parser.add_argument("script", metavar="PATH/train.py", help="timm's train script, 1.0.27 or newer")
    parser.add_argument(
        "--lowrank", metavar="CONFIG", help=f"{', '.join(PRESETS)}, or a YAML or JSON file with LowRankConfig's fields"
    )
    parser.add_argument(
        "--lowrank-set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="set one field, such as step_size=0.3, or one branch, such as branches.layer3=20; may be repeated",
    )
    parser.add_argument(
        "--lowrank-start-epoch",
        metavar="N",
        type=_epochs,
        default=0,
        help="epochs of plain training before the branches are switched on (default 0; paper: 50)",
    )
    return parser


def _epochs(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of epochs")
    return int(text)


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """This launcher's arguments and the script's, each in their order: each of the former takes one value.

    Not argparse's `parse_known_args`, which cannot know which of the script's options take values.
    """
    own: list[str] = []
    others: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        if argument != _OWN and not argument.startswith((_OWN + "-", _OWN + "=")):
            others.append(argument)
            continue
        own.append(argument)
        if "=" not in argument:
            own += [value for value in [next(waiting, None)] if value is not None]
    return own, others


def read_config(source: str, overrides: Sequence[str] = ()) -> LowRankConfig:
    """The configuration of a preset or a file, with `overrides` of the form KEY=VALUE, the value in YAML.

    branches.LAYER=RANK adds a branch to those of a file, and takes the place of a preset.

    Raises:
        ScriptError: the file cannot be read, or a field or value is wrong; it says which.
    """
    values: dict[str, Any] = {"branches": source} if source in PRESETS else _read_file(Path(source))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not (equals and key):
            raise ScriptError(f"--lowrank-set {override}: write it as KEY=VALUE, such as reconstruction_weight=1.0")
        value = _parse_yaml(text, f"--lowrank-set {override}")
        field, dot, layer = key.strip().partition(".")  # the name of a layer may hold further dots
        if dot and field == "branches":
            branches = values.get(field)
            values[field] = {**(branches if isinstance(branches, dict) else {}), layer: value}
        else:
            values[key.strip()] = value
    try:
        return LowRankConfig.from_dict(values)
    except (ValueError, TypeError) as problem:
        raise ScriptError(f"--lowrank {source}: {problem}") from problem


def _read_file(path: Path) -> dict[str, Any]:
    try:
        values = _parse_yaml(path.read_text(encoding="utf-8"), f"--lowrank {path}")
    except (OSError, UnicodeDecodeError) as problem:
        known = [*PRESETS, *sorted(other.name for other in path.parent.glob("*.yaml"))]
        why = getattr(problem, "strerror", None) or problem
        raise ScriptError(f"--lowrank {path} cannot be read ({why}). {nearest(path.name, known)}") from problem
    if not isinstance(values, dict):
        raise ScriptError(f"--lowrank {path} holds no mapping of LowRankConfig's fields, such as {{branches: 2-LR}}")
    return values


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as problem:
        raise ScriptError(f"{where} is not valid YAML: {problem}") from problem


class _Loader(yaml.SafeLoader):
    """In which 5e-4 is a number; YAML 1.1 takes it for a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


if __name__ == "__main__":
    main()
