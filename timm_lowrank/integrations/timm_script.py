"""timm's train script, unmodified: found, checked before it runs, imported, and its task class exchanged."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import timm
import torch
from timm.task import ClassificationTask, MultiLabelClassificationTask, TrainingTask
from torch import nn

from ..core.config import LowRankConfig
from ..core.model import LowRankModel
from ..errors import CaptureError
from ..wrapping import wrap
from .timm_task import LowRankMultiLabelTask, LowRankTask

_MODULE = "timm_train_script"  # not the file's own name: "train" may be a module of the user's
_ADVICE = f"take train.py from the source of timm {timm.__version__}, which is installed"


class ScriptError(ValueError):
    """The script, or what it was told to train, cannot have low-rank branches."""


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


class Joint:
    """What joins a loaded train script to low-rank branches, by exchanging names of the script's module.

    Its `ClassificationTask` becomes a `LowRankTask`. Two further names tell the task what it cannot see from inside:
    `resolve_data_config` the size of the images, on which the widths of the layers depend, and `create_optimizer_v2`
    the optimizer, so that steps which a gradient scaler skips do not count. A script without these gets the size of
    the network's `pretrained_cfg` and the Update Step in `update_ema`.

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
        for name, told in (
            ("resolve_data_config", self._tells_size),
            ("create_optimizer_v2", self._tells_optimizer),
        ):
            if name in names:
                names[name] = told(names[name])
        if self.start_epoch:
            names["train_one_epoch"] = self._tells_epoch(names.get("train_one_epoch"))

    def _task_class(self, kind: type[TrainingTask]) -> type[TrainingTask]:
        if kind is ClassificationTask:
            base = LowRankTask
        elif kind is MultiLabelClassificationTask:
            base = LowRankMultiLabelTask
        else:
            return type(kind.__name__, (kind,), {"__init__": _refuse})

        def init(task: LowRankTask, model: nn.Module, *args: Any, **kwargs: Any) -> None:
            base.__init__(task, self._wrapped(model), *args, start_epoch=self.start_epoch, **kwargs)
            self.task = task

        return type(base.__name__, (base,), {"__init__": init})

    def _wrapped(self, model: nn.Module) -> LowRankModel:
        if isinstance(model, torch.jit.ScriptModule):
            raise ScriptError("the layers of a scripted network cannot be read: leave out --torchscript")
        place = next(model.parameters())
        images = None if self.input_size is None else place.new_zeros(1, *self.input_size)
        try:
            return wrap(model, self.config, example_input=images)
        except (ValueError, CaptureError) as problem:
            raise ScriptError(str(problem)) from problem

    def _tells_size(self, resolve: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        @functools.wraps(resolve)
        def told(*args: Any, **kwargs: Any) -> dict[str, Any]:
            data_config = resolve(*args, **kwargs)
            self.input_size = tuple(data_config["input_size"])
            return data_config

        return told

    def _tells_optimizer(self, create: Callable[..., torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
        @functools.wraps(create)
        def told(*args: Any, **kwargs: Any) -> torch.optim.Optimizer:
            optimizer = create(*args, **kwargs)
            if self.task is not None:
                self.task.attach(optimizer)
            return optimizer

        return told

    def _tells_epoch(self, train: Callable[..., Any] | None) -> Callable[..., Any]:
        signature = inspect.signature(train) if train is not None else None
        if train is None or signature is None or "epoch" not in signature.parameters:
            raise ScriptError("the script has no train_one_epoch(epoch, ...), so its epochs cannot be told apart")

        @functools.wraps(train)
        def told(*args: Any, **kwargs: Any) -> Any:
            if self.task is not None:
                self.task.set_epoch(signature.bind(*args, **kwargs).arguments["epoch"])
            return train(*args, **kwargs)

        return told


def _refuse(task: TrainingTask, *args: Any, **kwargs: Any) -> None:
    raise ScriptError(
        f"the script chose timm's {type(task).__name__}, and low-rank branches go with ClassificationTask and "
        "MultiLabelClassificationTask alone: leave out --kd-model-name, or run the script without this launcher"
    )
