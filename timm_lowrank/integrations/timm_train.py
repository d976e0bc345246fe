"""`python -m timm_lowrank.integrations.timm_train PATH/train.py --lowrank CONFIG ...`: timm's train script, low rank.

The script is timm's own, unmodified, and takes all of its arguments: resume, EMA, accumulation, clipping, AMP, compile
and several processes work as they do without branches. It is found, checked before it runs and imported, and its task
class exchanged. What it saves is the plain network, with W and b beside it. After each epoch a line of its log and
columns of its summary.csv say how far the branches are.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import timm
import torch
import yaml  # timm needs it too
from timm.task import ClassificationTask, MultiLabelClassificationTask, TrainingTask
from torch import nn

from ..core.config import PRESETS, LowRankConfig
from ..core.model import LowRankModel
from ..errors import CaptureError, nearest
from ..files import parse_yaml
from ..wrapping import wrap
from .timm_task import LowRankMultiLabelTask, LowRankTask

_logger = logging.getLogger(__name__)

_PROG = "python -m timm_lowrank.integrations.timm_train"
_OWN = "--lowrank"  # no argument of timm's begins so
_MODULE = "timm_train_script"  # not the file's own name: "train" may be a module of the user's
_TASKS = {ClassificationTask: LowRankTask, MultiLabelClassificationTask: LowRankMultiLabelTask}
_ADVICE = f"take train.py from the source of timm {timm.__version__}, which is installed"


class ScriptError(ValueError):
    """The script, or what it was told to train, cannot have low-rank branches."""


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
        patch = ScriptPatch(config, options.lowrank_start_epoch)
        with loaded_script(Path(options.script), others) as script:
            if helps:
                parser.print_help()
                print("\nThe script's own arguments:\n")
            patch.install(script)
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


# ------------------------------------------------------------------------------------------------- the configuration


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
        return parse_yaml(text)
    except yaml.YAMLError as problem:
        raise ScriptError(f"{where} is not valid YAML: {problem}") from problem


# ------------------------------------------------------------------------------------------------------- the script


def check_script(path: Path) -> None:
    """See from its source that `path` is a train script of timm's that works through tasks; nothing of it runs.

    Raises:
        ScriptError: it is missing, no Python, no such script, or older than timm 1.0.27.
    """
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    except OSError as problem:
        hint = "; timm's train script is not part of its wheel" if path.name == "train.py" else ""
        raise ScriptError(f"{path} cannot be read ({problem.strerror}){hint}: {_ADVICE}") from problem
    except (SyntaxError, ValueError) as problem:
        raise ScriptError(f"{path} is no Python script: {problem}") from problem
    nodes = list(ast.walk(tree))
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0]
    tasks = {name.asname or name.name for node in imports if node.module == "timm.task" for name in node.names}
    uses_timm = any((node.module or "").split(".")[0] == "timm" for node in imports)
    main = any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)
    if not (uses_timm and main):
        raise ScriptError(f"{path} is not timm's train script: it has no main() or imports nothing of timm; {_ADVICE}")
    updates = any(isinstance(node, ast.Attribute) and node.attr == "update_ema" for node in nodes)
    if "ClassificationTask" not in tasks or not updates:
        missing = "timm.task.ClassificationTask" if "ClassificationTask" not in tasks else "task.update_ema()"
        raise ScriptError(
            f"{path} does not use {missing}: timm's train script does from 1.0.27 on, and validate.py and others "
            f"never do; {_ADVICE}"
        )


@contextlib.contextmanager
def loaded_script(path: Path, arguments: Sequence[str]) -> Iterator[ModuleType]:
    """The script as a module, as if `python PATH arguments` ran it but for its call of main().

    `sys.argv` and `sys.path` are the script's inside the block and what they were after it.

    Raises:
        ScriptError: see `check_script`.
    """
    check_script(path)
    argv, search = sys.argv, sys.path
    sys.argv, sys.path = [str(path), *arguments], [str(path.resolve().parent), *sys.path]
    spec = importlib.util.spec_from_file_location(_MODULE, path)
    assert spec is not None  # the file was read a moment ago
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[_MODULE] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.argv, sys.path = argv, search
        sys.modules.pop(_MODULE, None)


class ScriptPatch:
    """Puts low-rank branches into a loaded train script, by exchanging names of the script's module.

    Its `ClassificationTask` becomes a `LowRankTask`. Two further names give the task what it cannot see from inside:
    `resolve_data_config` the size of the images, on which the widths of the layers depend, and `create_optimizer_v2`
    the optimizer, so that steps which a gradient scaler skips do not count. A script without these gets the size of
    the network's `pretrained_cfg` and the Update Step in `update_ema`. What its `train_one_epoch` measured, which goes
    into its summary.csv, is joined by what `LowRankModel.report` says.

    Args:
        config: the branches.
        start_epoch: epochs of plain training; the script must then have `train_one_epoch(epoch, ...)`.
    """

    def __init__(self, config: LowRankConfig, start_epoch: int = 0):
        self.config, self.start_epoch = config, start_epoch
        self.input_size: tuple[int, ...] | None = None
        self.task: LowRankTask | None = None

    def install(self, script: ModuleType) -> None:
        """Exchange the names.

        Raises:
            ScriptError: `start_epoch` with a script that has no `train_one_epoch(epoch, ...)`.
        """
        names = vars(script)
        for name, value in list(names.items()):
            if isinstance(value, type) and issubclass(value, TrainingTask) and value is not TrainingTask:
                names[name] = self._task_class(value)
        for name, then in (("resolve_data_config", self._note_size), ("create_optimizer_v2", self._attach)):
            if name in names:
                names[name] = _followed_by(names[name], then)
        if self.start_epoch:
            names["train_one_epoch"] = self._sets_epoch(names.get("train_one_epoch"))
        if "train_one_epoch" in names:
            names["train_one_epoch"] = _followed_by(names["train_one_epoch"], self._report)

    def _task_class(self, kind: type[TrainingTask]) -> type[TrainingTask]:
        base = _TASKS.get(kind)
        if base is None:
            return type(kind.__name__, (kind,), {"__init__": _refuse})

        def init(task: LowRankTask, model: nn.Module, *args: Any, **kwargs: Any) -> None:
            base.__init__(task, self._wrapped(model), *args, start_epoch=self.start_epoch, **kwargs)
            self.task = task

        return type(base.__name__, (base,), {"__init__": init})

    def _wrapped(self, model: nn.Module) -> LowRankModel:
        if isinstance(model, torch.jit.ScriptModule):
            raise ScriptError("the layers of a scripted network cannot be read: leave out --torchscript")
        images = None if self.input_size is None else next(model.parameters()).new_zeros(1, *self.input_size)
        try:
            return wrap(model, self.config, example_input=images)
        except (ValueError, CaptureError) as problem:
            raise ScriptError(str(problem)) from problem

    def _note_size(self, data_config: Mapping[str, Any]) -> None:
        self.input_size = tuple(data_config["input_size"])

    def _attach(self, optimizer: torch.optim.Optimizer) -> None:
        if self.task is not None:
            self.task.attach(optimizer)

    def _report(self, measured: Any) -> None:
        """After an epoch. The columns are the same in every row, also before the branches are switched on."""
        if self.task is None:
            return
        found = self.task.lowrank.report()
        if isinstance(measured, MutableMapping):
            for layer, one in found.items():
                measured.update({f"{layer}.{name}": getattr(one, name) for name in ("penalty", "outside", "rank")})
        if self.task.verbose and self.task.lowrank.enabled:
            _logger.info("Branches: " + "; ".join(f"{layer}: {one}" for layer, one in found.items()))

    def _sets_epoch(self, train: Callable[..., Any] | None) -> Callable[..., Any]:
        signature = inspect.signature(train) if train is not None else None
        if train is None or signature is None or "epoch" not in signature.parameters:
            raise ScriptError("the script has no train_one_epoch(epoch, ...), so its epochs cannot be told apart")

        @functools.wraps(train)
        def exchanged(*args: Any, **kwargs: Any) -> Any:
            if self.task is not None:
                self.task.set_epoch(signature.bind(*args, **kwargs).arguments["epoch"])
            return train(*args, **kwargs)

        return exchanged


def _followed_by(function: Callable[..., Any], then: Callable[[Any], None]) -> Callable[..., Any]:
    @functools.wraps(function)
    def exchanged(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        then(result)
        return result

    return exchanged


def _refuse(task: TrainingTask, *args: Any, **kwargs: Any) -> None:
    raise ScriptError(
        f"the script chose timm's {type(task).__name__}, and low-rank branches go with ClassificationTask and "
        "MultiLabelClassificationTask alone: leave out --kd-model-name, or run the script without this launcher"
    )


if __name__ == "__main__":
    main()
