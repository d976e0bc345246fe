"""The folder of a run: its files, the one who writes them and the one who reads them.

`RunPaths` names the files, `RunFolder` writes them so that a kill loses what came after the last checkpoint, and
`Run` reads the folder of a finished run, summary.json as a `Summary`.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import yaml
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError

from ..checkpoint.files import remove_abandoned
from ..core.config import PRE_LOGITS
from ..core.views import FLATTEN, View
from ..data.sources import DataOrigin
from ..environment import together
from ..errors import RecipeError, RunError
from ..evaluation.results import Value
from ..files import RUN_CONFIG, RUN_MODEL, disk_errors, exclusive, read_json, sync, write_whole
from ..records import decode, encode
from ..wrapping import PRE_LOGITS_RANK
from .checkpoints import check_random_states, damage, listed, name_of, remove_leftovers, seal
from .recipe import Recipe, read_recipe

if TYPE_CHECKING:
    from accelerate import Accelerator

# What decides how images reach the network, not which: their fingerprint is compared instead.
FREE = ("data", "streaming", "workers")
# What a plain network does not have, and what decides nothing about its weights or the figures beside it.
OF_BRANCHES = ("lowrank", "pretrain_epochs", "ramp_epochs", "cooldown_epochs")
ASIDE_OF_TRAINING = (
    "name", "twin", "trackers", "save_every", "save_every_steps", "keep_checkpoints", "eval_batch_size",
)  # fmt: skip
# What tells the runs of one recipe apart, and what changes the speed, or the rounding of a sum, alone.
ASIDE_OF_SETTINGS = (
    *FREE, *ASIDE_OF_TRAINING, "seed", "spectrum_images", "shuffle_buffer", "channels_last", "compile",
    "gradient_accumulation",
)  # fmt: skip
PUBLISHED_RECIPE = "recipe.yaml"
TWIN = "twin"
GO_ON = "continue with the same command and --resume auto"

Spectrum = dict[str, list[float]]  # for each layer the largest shares of its variance, descending


def unlike_twin(recipe: Recipe, plain: Recipe) -> list[str]:
    """What keeps a plain run from being the twin of a run, which is the same training without branches.

    Args:
        recipe: of the run.
        plain: of the other one.

    Returns:
        Of each key that differs what it was there and is here; nothing for a twin.
    """
    enabled = ["lowrank.enabled was true and is false"] if plain.lowrank_enabled else []
    aside = (*FREE, *OF_BRANCHES, *ASIDE_OF_TRAINING)
    return [*enabled, *_changes(plain.to_dict(), recipe.plain().to_dict(), aside)]


def settings(recipe: Recipe) -> dict[str, Any]:
    """The keys of a recipe that decide what is trained and how, as far as they are not at their default.

    Of the weights that the training starts from the name alone: where they lay is somebody's machine.
    """
    defaults = {field.name: field.default for field in recipe.describe_fields()}
    values = recipe.to_dict() | {"init_from": _name_of(recipe.init_from)}
    return {
        key: value for key, value in values.items() if key not in ASIDE_OF_SETTINGS and value != encode(defaults[key])
    }


def recipe_of(settings: Mapping[str, Any]) -> Recipe:
    """A recipe with these `settings`, which trains alike on the same images.

    Raises:
        RecipeError: this version does not know them all.
    """
    return Recipe.from_dict({"data": "", **settings})  # not the default, which does not go with every key


def changed_settings(before: Recipe, now: Recipe) -> list[str]:
    """Of each of `settings` that differs what it was and is; of networks without branches without those of branches.

    Recipes that say the same in two ways do not differ: with an option at its default, or without.
    """
    off = not (before.lowrank_enabled or now.lowrank_enabled)
    one, two = _deciding(before, off), _deciding(now, off)
    return _changes(dict.fromkeys(two) | one, dict.fromkeys(one) | two, ASIDE_OF_SETTINGS)


def _deciding(recipe: Recipe, off: bool) -> dict[str, Any]:
    """All keys of a recipe, those inside of others by themselves, with what they mean where nothing is said.

    Args:
        off: without those of the branches.
    """
    values = recipe.to_dict()
    lowrank, compared = recipe.lowrank_config().to_dict(), encode(vars(recipe.compared()))
    if compared.get("branches", ...) is None:  # bottlenecks, which sit in their places
        compared["branches"] = lowrank["branches"]
    inner = {f"comparator_args.{key}": _ranks_alone(value) for key, value in compared.items()}
    if not off:
        seed = None if lowrank["seed"] == recipe.seed else lowrank["seed"]
        inner |= {"lowrank.enabled": recipe.lowrank_enabled}
        inner |= {f"lowrank.{key}": _ranks_alone(value) for key, value in (lowrank | {"seed": seed}).items()}
    begin = None if recipe.init_from is None else re.sub(r"-seed\d+$", "", str(_name_of(recipe.init_from)))
    aside = (*OF_BRANCHES, "comparator_args") if off else ("lowrank", "comparator_args")
    return {**{key: value for key, value in values.items() if key not in aside}, "init_from": begin, **inner}


def _ranks_alone(value: Any) -> Any:
    """Branches with the rank of a layer as a number where nothing else is said of it; other values as they are.

    "2-LR" stays, too: which layer it means is the network's.
    """
    if value == "1-LR":
        return {PRE_LOGITS: PRE_LOGITS_RANK}
    if not isinstance(value, Mapping):
        return value
    specs = {layer: spec if isinstance(spec, Mapping) else {"rank": spec} for layer, spec in value.items()}
    said = {layer: {key: one for key, one in spec.items() if one is not None} for layer, spec in specs.items()}
    return {layer: spec["rank"] if spec.keys() == {"rank"} else spec for layer, spec in said.items()}


def _name_of(path: str | None) -> str | None:
    """The last part of a path, of whatever machine."""
    return None if path is None else Path(path).name


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], aside: Collection[str]) -> list[str]:
    """What each key of a recipe was and is, of those that differ and are not `aside`."""
    differ = [key for key in now if key not in aside and before[key] != now[key]]
    return [f"{key} was {before[key]!r} and is {now[key]!r}" for key in differ]


class RunPaths:
    """Where the files of a run are, or of a run that was published: then all lie in one folder, beside recipe.yaml."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = folder = Path(folder)
        published = (folder / PUBLISHED_RECIPE).is_file() and not (folder / RUN_CONFIG).is_file()
        self.config = folder / (PUBLISHED_RECIPE if published else RUN_CONFIG)  # the recipe
        self.metrics_csv = folder / "metrics.csv"  # a row an epoch
        self.summary_json = folder / "summary.json"  # written last of all: a run that has it is finished
        self.spectrum_json = folder / "spectrum.json"
        self.evaluation_json = folder / "evaluation.json"
        self.model = (
            folder if published else folder / RUN_MODEL
        )  # what `save_pretrained` writes, and `from_pretrained` and timm read
        self.checkpoint_folder = folder / "checkpoints"  # accelerate's, to resume from
        self.plots = folder / "plots"
        self.twin = folder / TWIN  # the run of the plain twin

    def is_run(self) -> bool:
        """Whether a run was begun here."""
        return self.config.is_file()

    def is_finished(self) -> bool:
        """Whether a run was begun here and came to its end."""
        return self.is_run() and self.summary_json.is_file()


# ------------------------------------------------------------------------------------------------------------- metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpochMetrics:
    """One row of metrics.csv. Losses are means over the images of the epoch, accuracies shares in [0, 1]."""

    epoch: int  # from 1
    learning_rate: float  # of the last step
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    ema_test_accuracy: float | None = None  # None without an averaged network
    penalty_weight: float | None = None  # None in a plain run
    penalty: float | None = None  # None while the branches are off
    # Layer -> parts of its penalty, "outside" and "rank" as in `BranchReport`, "gradient_share"; None while it is off.
    branches: dict[str, dict[str, float | None]] = dataclasses.field(default_factory=dict)
    images_per_second: float
    seconds: float  # of training

    def to_row(self) -> dict[str, float | None]:
        """The cells by column: the same columns in every row of a run."""
        row: dict[str, float | None] = {}
        for name, value in vars(self).items():
            if name == "branches":
                row |= {f"{layer}.{part}": loss for layer, parts in value.items() for part, loss in parts.items()}
            elif value is not None or (name == "penalty" and self.penalty_weight is not None):
                row[name] = value
        return row

    @classmethod
    def from_row(cls, row: Mapping[str, str]) -> EpochMetrics:
        """The inverse of `to_row`, from the text of the cells. Raises KeyError, TypeError or ValueError if damaged."""
        cells: dict[str, Any] = {name: float(cell) if cell else None for name, cell in row.items()}
        branches: dict[str, dict[str, float | None]] = {}
        for column in [name for name in cells if "." in name]:
            layer, _, part = column.rpartition(".")
            branches.setdefault(layer, {})[part] = cells.pop(column)
        return cls(**{**cells, "epoch": int(cells["epoch"]), "branches": branches})


# ------------------------------------------------------------------------------------------------------------- summary


@dataclasses.dataclass(frozen=True, kw_only=True)
class Losses:
    """Mean losses: the task's on training images (last epoch) and test images, and the penalty (last epoch)."""

    train: float
    test: float
    penalty: float | None = None  # None while the branches were off


@dataclasses.dataclass(frozen=True, kw_only=True)
class BranchSummary:
    """One regularized layer. Spectra are of its centred activations on test images (paper, Section 3)."""

    features: int
    target_rank: int | None  # None in a plain run
    effective_rank: int  # directions that hold 99 % of the variance
    variance_ratio: dict[int, float]  # number of leading directions, 1 to 500 -> share of the variance
    losses: dict[str, float | None] = dataclasses.field(default_factory=dict)  # its columns of metrics.csv, last epoch
    view: View = FLATTEN  # what one sample is, of the spectra too


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparatorSummary:
    """What was trained in the place of the branches, see `timm_lowrank.comparators`."""

    name: str
    title: str  # in tables and pictures
    args: dict[str, Any]
    figures: dict[str, float]  # what `Comparator.finish` found


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSummary:
    """The images of a run."""

    source: str
    fingerprint: str
    train_images: int
    test_images: int
    streamed: bool = False
    image_size: tuple[int, ...]  # (channels, height, width)
    classes: int
    origin: DataOrigin | None = None  # of `source`; None: a run of an earlier version, or data that a program made


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """What a finished run says of itself: the content of summary.json."""

    name: str
    model: str
    lowrank: bool  # False for a plain network
    comparator: ComparatorSummary | None = None
    weights: str  # "last", or "averaged" by an exponential moving average
    clean_accuracy: float  # on all test images, in [0, 1]
    losses: Losses
    train_accuracy: float
    branches: dict[str, BranchSummary]
    epochs: int
    optimizer_steps: int
    seconds: float  # of training, evaluation not counted
    images_per_second: float
    device: str
    processes: int
    precision: str
    seed: int
    data: DataSummary
    versions: dict[str, str]
    twin: Summary | None = None
    twin_folder: str | None = None  # relative to that of this run, or what the recipe says
    twin_alike: bool = False  # whether its recipe was compared; earlier versions took any plain run that was named

    def to_dict(self) -> dict[str, Any]:
        """As summary.json has it; `Run.open` reads it."""
        content = dataclasses.asdict(dataclasses.replace(self, twin=None))
        del content["twin"], content["twin_folder"], content["twin_alike"]
        if self.comparator is None:
            del content["comparator"]
        content["data"]["image_size"] = list(self.data.image_size)
        for branch in content["branches"].values():
            branch["variance_ratio"] = {str(count): ratio for count, ratio in branch["variance_ratio"].items()}
        if self.twin is not None:
            alike = {"alike": True} if self.twin_alike else {}
            content["twin"] = {"folder": self.twin_folder, **alike, **self.twin.to_dict()}
        return content

    @property
    def has_twin(self) -> bool:
        """Whether `twin` is known to have been trained alike: with this run, or by a recipe that was compared."""
        return self.twin is not None and (self.twin_alike or self.twin_folder == TWIN)

    @property
    def clean(self) -> Value:
        """Accuracy on all test images with its interval; it was written down rounded."""
        return Value.share(round(self.clean_accuracy * self.data.test_images), self.data.test_images)

    @property
    def kind(self) -> str:
        """What this run is in tables and pictures: "low rank", "plain" or the title of its comparator."""
        if self.comparator is not None:
            return self.comparator.title
        return "low rank" if self.lowrank else "plain"


# ------------------------------------------------------------------------------------------------------------- reading


class Run(RunPaths):
    """A finished run, read; see `Run.open`."""

    def __init__(self, folder: str | Path, recipe: Recipe, summary: Summary) -> None:
        super().__init__(folder)
        self.recipe, self.summary = recipe, summary

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """Reads a run.

        Raises:
            RunError: there is no run, it is not finished, or its files are damaged.
        """
        paths = RunPaths(folder)
        _require_finished(paths)
        try:
            recipe = Recipe.from_dict(read_recipe(paths.config))
        except RecipeError as error:
            raise RunError(f"the recipe of the run in {folder} cannot be read: {error}") from error
        content = read_json(paths.summary_json, RunError)
        if isinstance(twin := content.get("twin"), dict):
            content |= {"twin_folder": twin.get("folder"), "twin_alike": twin.get("alike", False)}
        return cls(paths.folder, recipe, _decoded(Summary, content, paths.summary_json))

    def spectrum(self) -> Spectrum:
        """The content of spectrum.json.

        Raises:
            RunError: it is not there or damaged.
        """
        shares = _decoded(dict[str, tuple[float, ...]], read_json(self.spectrum_json, RunError), self.spectrum_json)
        return {layer: list(of_layer) for layer, of_layer in shares.items()}

    def metrics(self) -> list[EpochMetrics]:
        """The rows of metrics.csv, an epoch each.

        Raises:
            RunError: it is not there or damaged.
        """
        return _read_metrics(self.metrics_csv)


def _require_finished(paths: RunPaths) -> None:
    folder = paths.folder
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise RunError(f"{folder} {what}: give the folder of a finished run of `timm-lowrank train`")
    if not paths.is_run():
        checkpoint = (folder / "config.json").exists()
        hint = " It is a checkpoint: timm_lowrank.push_to_hub publishes it." if checkpoint else ""
        raise RunError(
            f"{folder} holds no {RUN_CONFIG}, so it is no run: give the folder that `timm-lowrank train` wrote.{hint}"
        )
    if not paths.is_finished():
        raise RunError(
            f"the run in {folder} has not come to its end (there is no summary.json): continue it with "
            "`timm-lowrank train --resume auto`"
        )
    if not (paths.model / "config.json").is_file():
        raise RunError(f"{folder} holds no {RUN_MODEL}/config.json: the network of this run is gone; train it again")


def _decoded(kind: Any, content: Mapping[str, Any], path: Path) -> Any:
    problems: list[str] = []
    decoded = decode(kind, content, path.name, problems)
    if problems:
        raise RunError(f"the run in {path.parent} is damaged: {'; '.join(problems)}: run the training again")
    return decoded


def _read_metrics(path: Path) -> list[EpochMetrics]:
    try:
        with disk_errors(f"cannot read {path}"), path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return [EpochMetrics.from_row(row) for row in rows]
    except (KeyError, TypeError, ValueError, csv.Error) as error:  # ValueError: bytes that are no text, too
        raise RunError(f"{path} is damaged: {error}") from error


# ------------------------------------------------------------------------------------------------------------- writing


class RunFolder(RunPaths):
    """The folder of a run that is being trained: config.yaml comes first, summary.json last.

    Args:
        folder: the folder.
        recipe: the recipe that it belongs to.
        resume: whether it may hold an earlier part of the same run.

    Raises:
        RunError: if the folder holds something already and `resume` is not set, or holds another run.
    """

    def __init__(self, folder: str | Path, recipe: Recipe, resume: bool = False) -> None:
        super().__init__(folder)
        self.recipe = recipe
        self._resume = resume
        self._counted_on = False  # whether a checkpoint was, in the place of initial weights
        if self.folder.exists() and not self.folder.is_dir():
            raise RunError(f"the output {self.folder} is a file: choose a folder with --output")
        self._check()

    def _check(self) -> None:
        """That the folder may be used. Hidden files, such as .DS_Store, are nobody's run."""
        with disk_errors(f"cannot read the output folder {self.folder}"):
            entries = self.folder.iterdir() if self.folder.exists() else ()
            held = sorted(entry.name for entry in entries if not entry.name.startswith("."))
        if not held:
            return
        if not self._resume:
            raise RunError(
                f"the output folder {self.folder} exists and is not empty: continue that run with --resume auto, "
                "choose another folder with --output, or delete it"
            )
        own = {RUN_CONFIG, self.checkpoint_folder.name}
        if RUN_CONFIG not in held and not (own.issuperset(held) and self._nothing_done()):
            raise RunError(
                f"{self.folder} holds no {RUN_CONFIG}, so it is not a run that could be resumed: choose another folder"
            )
        if not self._nothing_done():
            self._check_same_recipe()

    def _nothing_done(self) -> bool:
        """Whether a run was killed before anything was worth keeping, its recipe included."""
        results = (self.metrics_csv, self.summary_json, self.twin)
        return not listed(self.checkpoint_folder) and not any(path.exists() for path in results)

    def _check_same_recipe(self) -> None:
        """Compares with config.yaml, all but the keys in FREE."""
        try:
            # A run that is older than a key was made with its default.
            before, now = Recipe.from_dict(read_recipe(self.config)).to_dict(), self.recipe.to_dict()
        except RecipeError as error:
            raise RunError(
                f"{self.folder} cannot be resumed, since its recipe cannot be read: {error}. Put the recipe that it "
                f"was started with at {self.config}, or choose another folder with --output"
            ) from error
        if changes := _changes(before, now, FREE):
            raise RunError(
                f"{self.folder} was started with another recipe ({'; '.join(changes)}). Resume it with its own "
                f"(--config {self.config}), or choose another folder with --output."
            )

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """`create`, and until the block ends no other process may train into the folder.

        Raises:
            RunError: one does.
        """
        with disk_errors(f"cannot write to the output folder {self.folder}"):
            self.folder.mkdir(parents=True, exist_ok=True)
            locked = contextlib.ExitStack()
            locked.enter_context(exclusive(self.folder, RunError(
                f"another process is training into {self.folder}: wait for it, stop it, or choose another folder with "
                "--output"
            )))  # fmt: skip
        with locked:
            self._check()  # a run may have begun there in the meantime
            self.create()
            self._resume = True  # what lies there from here on is this run's
            yield

    def create(self) -> None:
        """Makes the folder and writes config.yaml; removes what a killed process left half written."""
        with disk_errors(f"cannot write to the output folder {self.folder}"):
            self.folder.mkdir(parents=True, exist_ok=True)
            for folder in (self.folder, self.model):
                remove_abandoned(folder, alone=True)
            if self._nothing_done() or not self.config.exists():
                write_whole(self.config, yaml.safe_dump(self.recipe.to_dict(), sort_keys=False))
            self.checkpoint_folder.mkdir(exist_ok=True)
            remove_leftovers(self.checkpoint_folder)

    # ------------------------------------------------------------------------------------------------ checkpoints

    def checkpoints(self) -> list[tuple[int, Path]]:
        """(epochs completed, folder) of every checkpoint, oldest first."""
        return listed(self.checkpoint_folder)

    def save(self, accelerator: Accelerator, epoch: int, step: int = 0) -> None:
        """Writes a checkpoint of all processes after `epoch` epochs and `step` steps, then removes the oldest ones.

        It holds metrics.csv as it is then. The name appears with one rename once everything is on the disk.

        Raises:
            RunError: if the disk is full or not writable, or another process has ended; the older checkpoints are then
                untouched.
        """
        final = self.checkpoint_folder / name_of(epoch, step)
        partial = final.with_name(f".{final.name}.partial")
        when = f"epoch {epoch}, step {step}" if step else f"epoch {epoch}"
        what = f"could not write the checkpoint of {when} to {self.checkpoint_folder}"
        try:
            kept = f"Free some space and continue with --resume auto; {self._kept()}."
            with disk_errors(what, kept), together("training", GO_ON):
                accelerator.save_state(str(partial))
                accelerator.wait_for_everyone()
                if accelerator.is_main_process:
                    if self.metrics_csv.exists():
                        shutil.copyfile(self.metrics_csv, partial / self.metrics_csv.name)
                    seal(partial)
                    os.replace(partial, final)
                    sync(self.checkpoint_folder)
        finally:
            if accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
        if accelerator.is_main_process:
            self._remove_oldest()
        accelerator.wait_for_everyone()

    def _kept(self) -> str:
        complete = self.checkpoints()
        return f"the checkpoint of epoch {complete[-1][0]} is untouched" if complete else "there is no older checkpoint"

    def _remove_oldest(self) -> None:
        for _, path in self.checkpoints()[: -self.recipe.keep_checkpoints]:
            self._remove(path)

    def _remove(self, checkpoint: Path) -> None:
        # Out of sight first: a kill between two deletions must not leave half of one under its name.
        hidden = checkpoint.with_name(f".{checkpoint.name}.old")
        os.replace(checkpoint, hidden)
        shutil.rmtree(hidden, ignore_errors=True)

    def load_newest(self, accelerator: Accelerator) -> int:
        """Takes what `accelerator` prepared, and metrics.csv, to the newest checkpoint that is whole.

        Newer ones, which are damaged, are removed, with a line that says why.

        Returns:
            The epochs completed; 0 without a checkpoint.

        Raises:
            RunError: there are checkpoints, but none of them is whole; the newest whole one is of other data or does
                not fit.
        """
        damaged: list[tuple[Path, str]] = []
        chosen: list[Any] = [None]
        if accelerator.is_main_process:
            chosen[0], damaged = self._newest()
            if chosen[0] is None and not damaged and self._counted_on:
                chosen[0] = RunError(f"the checkpoints in {self.checkpoint_folder} went away: use the command again")
            if damaged and chosen[0] is None:
                reasons = "; ".join(f"{path.name}: {wrong}" for path, wrong in damaged)
                chosen[0] = RunError(
                    f"none of the checkpoints in {self.checkpoint_folder} can be resumed from ({reasons}): delete that "
                    "folder and resume, which begins anew, or choose another one with --output"
                )
        broadcast_object_list(chosen)
        if isinstance(chosen[0], RunError):
            raise chosen[0]
        newest: tuple[int, Path] | None = chosen[0]
        if newest is not None:
            self._load(accelerator, newest[1])
        if accelerator.is_main_process:
            for broken, wrong in damaged:
                print(f"{broken} is left out and removed: {wrong}", flush=True)
                self._remove(broken)
            self._remove_oldest()  # a kill may have come between a new checkpoint and this
            self._restore_metrics(None if newest is None else newest[1])
        return 0 if newest is None else newest[0]

    def has_whole_checkpoint(self) -> bool:
        """Whether there is something to resume from; all processes ask together, and get the same answer."""
        found = [PartialState().is_main_process and self._newest()[0] is not None]
        broadcast_object_list(found)
        self._counted_on = found[0]
        return found[0]

    def _newest(self) -> tuple[tuple[int, Path] | None, list[tuple[Path, str]]]:
        """(epochs completed, folder) of the newest checkpoint that is whole, and what is wrong with the newer ones."""
        damaged: list[tuple[Path, str]] = []
        for epoch, path in reversed(self.checkpoints()):
            if (wrong := damage(path)) is None:
                return (epoch, path), damaged
            damaged.append((path, wrong))
        return None, damaged

    @staticmethod
    def _load(accelerator: Accelerator, checkpoint: Path) -> None:
        try:
            check_random_states(checkpoint, accelerator.process_index)
            accelerator.load_state(str(checkpoint))
        except RunError:
            raise
        except (OSError, RuntimeError, SafetensorError, LookupError, TypeError, ValueError, UnpicklingError) as error:
            reason = str(error).partition("\n")[0]
            raise RunError(
                f"the checkpoint {checkpoint} cannot be loaded ({reason}): delete it to resume from an older one"
            ) from error

    def _restore_metrics(self, checkpoint: Path | None) -> None:
        """metrics.csv as it was at a checkpoint, or at the beginning."""
        saved = None if checkpoint is None else checkpoint / self.metrics_csv.name
        with disk_errors(f"cannot rewrite {self.metrics_csv}"):
            if saved is not None and saved.exists():
                write_whole(self.metrics_csv, saved.read_bytes())
            else:
                self.metrics_csv.unlink(missing_ok=True)

    # ---------------------------------------------------------------------------------------------------- metrics

    def append_metrics(self, metrics: EpochMetrics) -> None:
        """Adds one epoch to metrics.csv, numbers with six digits; the first row names the columns."""
        path, row = self.metrics_csv, metrics.to_row()
        cells = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
        with disk_errors(
            f"could not write {path}", f"Free some space and continue with --resume auto; {self._kept()}."
        ):
            begin = not path.exists() or path.stat().st_size == 0
            with path.open("a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(row), lineterminator="\n")
                if begin:
                    writer.writeheader()
                writer.writerow(cells)

    def last_metrics(self) -> EpochMetrics:
        """The last row of metrics.csv, read back: after a resume it may be from another process."""
        return _read_metrics(self.metrics_csv)[-1]

    # ---------------------------------------------------------------------------------------------------- results

    def writing(self, path: Path) -> AbstractContextManager[None]:
        """A block that writes `path`; what a full disk raises inside comes out as a RunError."""
        return disk_errors(f"could not write {path}", "Free some space and continue with --resume auto.")

    def write_results(self, spectrum: Spectrum, summary: Summary) -> None:
        """Writes spectrum.json and then summary.json, each whole or not at all: the run is finished."""
        for path in filter(Path.exists, (self.metrics_csv, *self.plots.glob("*"))):  # nobody writes them again
            with self.writing(path):
                sync(path)
        for path, content in ((self.spectrum_json, spectrum), (self.summary_json, summary.to_dict())):
            with self.writing(path):
                write_whole(path, json.dumps(content, indent=2) + "\n")
