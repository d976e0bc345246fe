"""What is done, and what must be true after a fault and after the same command was given again."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from evaluations import DATA
from loopback_hub import LoopbackHub
from loopback_hub.clients import pointed_at
from publishable import evaluation, make_run
from runs import assert_same_run
from scripts import script

import timm_lowrank as tlr
from timm_lowrank.checkpoint import listed as checkpoint_list
from timm_lowrank.checkpoint import verify
from timm_lowrank.checkpoint.listed import read_checkpoints
from timm_lowrank.cli import main
from timm_lowrank.errors import CheckpointError
from timm_lowrank.evaluation.results import write_evaluation
from timm_lowrank.publish.record import read_run
from timm_lowrank.training.checkpoints import listed
from timm_lowrank.training.run import Run

from .faults import PATIENCE, WAIT
from .faults import run as run_apart

RECIPE: dict[str, Any] = {
    "name": "small",
    "model": "resnet10_cifar",
    "model_args": {"channels": [8, 8, 8, 16], "drop_rate": 0.1},
    "data": "digits",
    "data_args": {"train_limit": 160, "test_limit": 40},
    "lowrank": {"branches": {"layer3": 6, "pre_logits": 4}, "warmup_updates": 2, "project_every": 3},
    "epochs": 2,
    "pretrain_epochs": 1,
    "batch_size": 32,
    "learning_rate": 0.05,
    "augment": "crop",
    "ema_decay": 0.9,
    "save_every_steps": 2,
    "keep_checkpoints": 3,
    "workers": 0,
    "spectrum_images": 40,
    "streaming": False,
}
EVALUATED = ["--limit", "20", "--train-limit", "40"]
ROOT = Path(__file__).parents[2]


class Scenario:
    """Something that the package writes below a folder.

    Attributes:
        name: on the command line.
        faults: that it is tried with.
        processes: that do it together.
        says_all: whether all that is said comes from the package, so that a traceback is a failure.
    """

    name: str
    faults: tuple[str, ...] = ("kill", "terminate", "interrupt", "power", "full")
    processes: int = 1
    says_all: bool = True

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        scratch.mkdir(parents=True, exist_ok=True)

    def prepare(self, folder: Path) -> None:
        """What is there before."""
        folder.mkdir(parents=True)

    def act(self, folder: Path) -> int:
        """Does it, in a process of its own, and gives the exit code."""
        raise NotImplementedError

    def met(self, folder: Path) -> bool:
        """Whether several processes have found each other."""
        return True

    def after_fault(self, folder: Path) -> None:
        """Raises an AssertionError if what is there after a fault may not be."""

    def check(self, folder: Path, whole: Path) -> None:
        """Raises an AssertionError if `folder`, where it was done again after a fault, is not as `whole`."""
        raise NotImplementedError

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        """What has to be there while the scenario is tried."""
        yield


def no_leftovers(folder: Path) -> None:
    """Nothing half written lies about."""
    left = [path for path in folder.rglob("*") if ".partial" in path.name or path.name.startswith(".writing-")]
    assert not left, f"left over: {[str(path.relative_to(folder)) for path in left]}"


def _done(arguments: list[str], folder: Path) -> None:
    """One command, in a process of its own: what it leaves behind in memory must not be there when others fork."""
    outcome = run_apart(lambda: main(arguments), folder)
    assert outcome.code == 0, outcome.said


class Training(Scenario):
    """A run with checkpoints between and inside epochs, dropout and an average of the weights."""

    name = "training"
    changes: dict[str, Any] = {}

    def __init__(self, scratch: Path) -> None:
        super().__init__(scratch)
        self.config = scratch / "recipe.yaml"
        self.config.write_text(yaml.safe_dump({**RECIPE, **self.changes}))

    def act(self, folder: Path) -> int:
        return main(["train", "--config", str(self.config), "--output", str(folder / "run"), "--resume", "auto"])

    def check(self, folder: Path, whole: Path) -> None:
        assert_same_run(folder / "run", whole / "run")
        assert (folder / "run" / "summary.json").is_file()
        names = [[path.name for _, path in listed(one / "run" / "checkpoints")] for one in (folder, whole)]
        assert names[0] == names[1], f"checkpoints {names[0]}, and {names[1]} undisturbed"
        no_leftovers(folder)


class Streamed(Training):
    """The same from files that are streamed."""

    name = "streamed"

    def __init__(self, scratch: Path) -> None:
        from parquet_images import write_shards

        scratch.mkdir(parents=True, exist_ok=True)
        data = write_shards(scratch / "data", test="validation")
        self.changes = {
            "data": str(data), "data_args": {"test_split": "validation", "mean": [0.3], "std": [0.37]},
            "streaming": True, "shuffle_buffer": 40, "ema_decay": None,
        }  # fmt: skip
        super().__init__(scratch)


class Together(Training):
    """The same by two processes; one of them is struck, and both."""

    name = "processes"
    processes = 2

    def met(self, folder: Path) -> bool:
        return (folder / "run").exists()


class Launched(Training):
    """The same by two processes of `accelerate launch`, where the launcher is struck."""

    name = "launched"
    faults = ("kill", "terminate", "interrupt")
    says_all = False

    def act(self, folder: Path) -> int:
        launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
        train = ["-m", "timm_lowrank", "train", "--config", str(self.config), "--output", str(folder / "run")]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(Path(tlr.__file__).parents[1])}
        os.execve(sys.executable, [sys.executable, *launch, *train, "--resume", "auto"], environment)

    def after_fault(self, folder: Path) -> None:
        """A launcher that was killed leaves its processes to themselves; they come to an end.

        Unless they have not met: then each waits for the others as long as torch does, which is half an hour.
        """
        began = time.monotonic()
        while left := _processes_that_name(folder):
            waited = time.monotonic() - began
            assert waited < PATIENCE, f"still running: {left}"
            if waited > WAIT and not (folder / "run").exists():
                for process in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process, signal.SIGTERM)
            time.sleep(0.1)


def _processes_that_name(folder: Path) -> list[int]:
    """Those in whose command line the folder is."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if os.fsencode(f"{folder}{os.sep}") in path.read_bytes():
                found.append(int(path.parent.name))
    return found


class Saving(Scenario):
    """`save_pretrained` over an older checkpoint: the old one or the new one is there, and never a mixture."""

    name = "saving"
    faults = ("kill", "terminate", "interrupt", "power", "full")

    def __init__(self, scratch: Path) -> None:
        super().__init__(scratch)
        self._old, self._new = (self._model(seed) for seed in (0, 1))

    @staticmethod
    def _model(seed: int) -> tlr.LowRankModel:
        torch.manual_seed(seed)
        images = torch.randn(4, 3, 32, 32)
        config = tlr.LowRankConfig(branches={"pre_logits": 4 + seed}, warmup_updates=0, project_every=2)
        model = tlr.wrap("test_resnet", config, num_classes=3, example_input=images).train()
        for _ in range(2):
            model(images)
            model.penalty()
            model.update()
        return model.eval()

    def _save(self, model: tlr.LowRankModel, seed: int, folder: Path) -> None:
        tlr.save_pretrained(model, folder / "checkpoint", label_names=[f"{seed}-{label}" for label in "abc"])

    def prepare(self, folder: Path) -> None:
        super().prepare(folder)
        self._save(self._old, 0, folder)
        (folder / "checkpoint" / "README.md").write_text("by hand")

    def act(self, folder: Path) -> int:
        try:
            self._save(self._new, 1, folder)
        except CheckpointError as error:
            print(error)
            return 1
        except KeyboardInterrupt:
            return 130
        return 0

    def after_fault(self, folder: Path) -> None:
        loaded = tlr.from_pretrained(folder / "checkpoint")
        same = [self._is(loaded, folder, model, seed) for seed, model in enumerate((self._old, self._new))]
        assert any(same), "it is neither the old checkpoint nor the new one"

    @staticmethod
    def _is(loaded: tlr.LowRankModel, folder: Path, model: tlr.LowRankModel, seed: int) -> bool:
        one, two = loaded.state_dict(), model.state_dict()
        labels = json.loads((folder / "checkpoint" / "config.json").read_text())["label_names"]
        return (
            labels == [f"{seed}-{label}" for label in "abc"]
            and one.keys() == two.keys()
            and all(torch.equal(value, two[name]) for name, value in one.items())
        )

    def check(self, folder: Path, whole: Path) -> None:
        assert self._is(tlr.from_pretrained(folder / "checkpoint"), folder, self._new, 1)
        assert (folder / "checkpoint" / "README.md").read_text() == "by hand"
        no_leftovers(folder)


class Evaluating(Scenario):
    """`evaluate` into the folder of a run."""

    name = "evaluation"

    def __init__(self, scratch: Path) -> None:
        super().__init__(scratch)
        self._run = scratch / "trained"
        config = scratch / "recipe.yaml"
        config.write_text(yaml.safe_dump({**RECIPE, "save_every_steps": None}))
        self._config = config

    def prepare(self, folder: Path) -> None:
        if not self._run.exists():
            _done(["train", "--config", str(self._config), "--output", str(self._run)], self._run)
        shutil.copytree(self._run, folder / "run")

    def act(self, folder: Path) -> int:
        return main(["evaluate", str(folder / "run"), "--against", "none", *EVALUATED])

    def check(self, folder: Path, whole: Path) -> None:
        one, two = (json.loads((each / "run" / "evaluation.json").read_text()) for each in (folder, whole))
        for content in (one, two):
            for name in ("created", "seconds", "command"):
                del content[name]
            for network in content["networks"]:
                del network["path"]
        differing = [name for name in one if one[name] != two.get(name)]
        assert one == two, f"{differing} differ: {[(one[name], two.get(name)) for name in differing]}"
        no_leftovers(folder)


class Pushing(Scenario):
    """`push` over an older commit: the repository has the old commit or the new one, whole."""

    name = "push"
    faults = ("kill", "terminate", "interrupt")

    def __init__(self, scratch: Path) -> None:
        super().__init__(scratch)
        self._run = scratch / "published"
        make_run(self._run)
        self._hub: LoopbackHub | None = None

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        with LoopbackHub() as hub, pointed_at(hub, self.scratch / "home"):
            self._hub = hub
            yield

    @staticmethod
    def _repo(folder: Path) -> str:
        return f"alice/{folder.name}"

    def prepare(self, folder: Path) -> None:
        assert self._hub is not None
        shutil.copytree(self._run, folder)
        self._hub.seed(self._repo(folder), {"README.md": b"older", "model.safetensors": b"older"})

    def act(self, folder: Path) -> int:
        return main(["push", str(folder), self._repo(folder)])

    def _files(self, folder: Path) -> dict[str, bytes]:
        assert self._hub is not None
        return {name: data for name, data in self._hub.repo(self._repo(folder)).files().items() if name[0] != "."}

    def after_fault(self, folder: Path) -> None:
        files = self._files(folder)
        old = files.get("model.safetensors") == b"older"
        assert old == (len(files) == 2), f"half of a commit: {sorted(files)}"

    def check(self, folder: Path, whole: Path) -> None:
        one, two = self._files(folder), self._files(whole)
        assert one.keys() == two.keys()
        for name in one:
            if name != "README.md":  # which names the repository
                assert one[name] == two[name], name


class Adding(Scenario):
    """Adding a run to the checkpoints of a clone in the place of an older one, which is there or the new one is."""

    name = "adding"

    def __init__(self, scratch: Path) -> None:
        super().__init__(scratch)
        self._clone, self._runs = scratch / "clone", [scratch / f"run-{seed}" for seed in (0, 1)]
        for folder in ("hub", "docs"):
            (self._clone / folder).mkdir(parents=True)
        shutil.copytree(ROOT / "recipes" / "configs", self._clone / "recipes" / "configs")
        (self._clone / "hub" / "checkpoints.yaml").write_text("[]")
        marks = "<!-- generated: checkpoints -->\n<!-- end of generated: checkpoints -->\n"
        (self._clone / "docs" / "hub.md").write_text(marks)
        short = {**RECIPE, "name": "digits", "epochs": 1, "pretrain_epochs": 0, "save_every_steps": None, "twin": False}
        for seed, run in enumerate(self._runs):
            config = scratch / "recipe.yaml"
            config.write_text(yaml.safe_dump({**short, "seed": seed}))
            _done(["train", "--config", str(config), "--output", str(run)], run)
            data = dataclasses.replace(DATA, images=200, fingerprint=Run.open(run).summary.data.fingerprint)
            write_evaluation(evaluation(run / "model", run / "model", data=data), run / "evaluation.json")
        outcome = run_apart(lambda: self._add(self._clone, 0), self._clone)
        assert outcome.code == 0, outcome.said
        self._sha256 = [read_run(run).sha256 for run in self._runs]

    def _add(self, clone: Path, seed: int) -> int:
        checkpoint_list.CLONE = clone  # of this process, which is one of its own
        try:
            script("checkpoints")(["add", str(self._runs[seed]), "one", "--sample", "digits"])
        except SystemExit as error:
            if isinstance(error.code, str):
                print(error.code)
            return error.code if isinstance(error.code, int) else 1
        return 0

    def prepare(self, folder: Path) -> None:
        shutil.copytree(self._clone, folder)

    def act(self, folder: Path) -> int:
        return self._add(folder, 1)

    def after_fault(self, folder: Path) -> None:
        there = folder / "hub" / "checkpoints" / "one"
        record = read_run(there)
        assert record.sha256 in self._sha256, "it is neither the old checkpoint nor the new one"
        verify(there, sha256=record.sha256)
        read_checkpoints(folder / "hub" / "checkpoints.yaml")

    def check(self, folder: Path, whole: Path) -> None:
        one, two = (
            {str(path.relative_to(each)): path.read_bytes() for path in sorted(each.rglob("*")) if path.is_file()}
            for each in (folder, whole)
        )
        assert one.keys() == two.keys(), one.keys() ^ two.keys()
        assert one == two, [name for name in one if one[name] != two[name]]


SCENARIOS: dict[str, type[Scenario]] = {
    one.name: one for one in (Training, Streamed, Together, Launched, Saving, Adding, Evaluating, Pushing)
}


# -------------------------------------------------------------------------------------------------- damaged files


@dataclasses.dataclass(frozen=True)
class Damage:
    """One file of a run, and what became of it."""

    path: str
    how: str  # "emptied", "halved", "garbled", "deleted"

    def __str__(self) -> str:
        return f"{self.path} {self.how}"

    def do(self, folder: Path) -> None:
        path = folder / self.path
        if self.how == "deleted":
            path.unlink()
        elif self.how == "garbled":
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 0x55
            path.write_bytes(bytes(content))
        else:
            os.truncate(path, 0 if self.how == "emptied" else path.stat().st_size // 2)


def damages(run: Path) -> list[Damage]:
    """Every file of the newest checkpoint and those beside it, in four ways."""
    newest = listed(run / "checkpoints")[-1][1]
    files = [*sorted(path for path in newest.rglob("*") if path.is_file()), run / "metrics.csv", run / "config.yaml"]
    names = [str(path.relative_to(run)) for path in files]
    return [Damage(name, how) for name in names for how in ("emptied", "halved", "garbled", "deleted")]
