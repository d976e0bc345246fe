"""One epoch of training and one of evaluation."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

from ..data.batches import TestBatches
from ..errors import DataError, DivergedError, RecipeError
from .checkpoints import EpochPosition
from .recipe import learning_rate, penalty_weight
from .state import TrainingState

PATIENCE = (3, 50)  # epochs after the warm-up, and optimizer steps, after which a network has learned something
MOST_LOSS = 1e4  # of a network that can still be measured; e^-10000 is no probability in any precision
REPORT_EVERY = 10  # optimizer steps between two looks at the losses: each one waits for the device


class Tested(NamedTuple):
    """What a network is on some images."""

    loss: float  # mean cross-entropy
    accuracy: float  # in [0, 1]


class Means:
    """Means over the samples of an epoch, summed on the device in float32, and how often each label was seen.

    Numbers that are added together stay together: one small tensor, and three kernels on a GPU, for all of them.
    """

    def __init__(self, device: torch.device, classes: int = 0) -> None:
        self._device = device
        self._labels = torch.zeros(classes, dtype=torch.int64, device=device)
        self._totals: dict[tuple[str, ...], Tensor] = {}
        self._weights: dict[tuple[str, ...], list[float]] = {}
        self._earlier: dict[str, tuple[float, float]] = {}  # of a `state_dict`, until their names are added again

    def add(self, values: Mapping[str, Tensor], weight: int) -> None:
        """Counts scalar means over `weight` samples; a name is always added with the same other ones."""
        names = tuple(values)
        if not names:
            return
        if names not in self._totals:
            earlier = [self._earlier.pop(name, (0.0, 0.0)) for name in names]
            self._totals[names] = torch.tensor([total for total, _ in earlier], device=self._device)
            self._weights[names] = [before for _, before in earlier]
        self._totals[names] += torch.stack([value.detach().float() for value in values.values()]) * weight
        self._weights[names] = [before + weight for before in self._weights[names]]

    def count(self, labels: Tensor) -> None:
        """Counts `labels`, (n,), int64, below the number of classes."""
        self._labels.index_add_(0, labels, torch.ones_like(labels))

    def guessing(self, accelerator: Accelerator) -> Tested:
        """Loss and accuracy of who knows how frequent each label is, and nothing else; over all processes."""
        counts = accelerator.reduce(self._labels, "sum").double()
        return Tested(float(torch.distributions.Categorical(counts).entropy()), float(counts.max() / counts.sum()))

    def now(self, *names: str) -> dict[str, float]:
        """The means so far of those of these numbers that were added, on this process."""
        means = {}
        for group, totals in self._totals.items():
            if not set(group).isdisjoint(names):
                sums = zip(group, totals.tolist(), self._weights[group], strict=True)
                means.update({name: total / weight for name, total, weight in sums if name in names})
        return means

    def _sums(self) -> dict[str, tuple[float, float]]:
        """(total, weight) of every number, on this process."""
        sums = dict(self._earlier)
        for names, totals in self._totals.items():
            sums.update(zip(names, zip(totals.tolist(), self._weights[names], strict=True), strict=True))
        return sums

    def state_dict(self) -> dict[str, Any]:
        """The sums so far, on this process, as plain numbers."""
        return {"sums": {name: list(sums) for name, sums in self._sums().items()}, "labels": self._labels.tolist()}

    def add_state_dict(self, state: Mapping[str, Any], *, names_alone: bool = False) -> None:
        """Adds the sums of a `state_dict`, before anything else is added.

        With `names_alone` zeros: every process must have the same names, and one of them counts the sums.
        """
        for name, (total, weight) in state["sums"].items():
            total_before, weight_before = self._earlier.setdefault(name, (0.0, 0.0))
            if not names_alone:
                both = torch.tensor(total_before + total, dtype=torch.float32)  # rounded as the device does it
                self._earlier[name] = (both.item(), weight_before + weight)
        if not names_alone:
            self._labels += torch.tensor(state["labels"], device=self._device)

    def over_processes(self, accelerator: Accelerator) -> dict[str, float]:
        """All means, over the samples of every process."""
        sums = dict(sorted(self._sums().items()))  # in one order on all of them, whatever each of them began with
        reduced = accelerator.reduce(torch.tensor(list(sums.values()), device=self._device), "sum").tolist()
        return {name: total / weight for name, (total, weight) in zip(sums, reduced, strict=True)}


@dataclasses.dataclass(frozen=True)
class TrainedEpoch:
    """What was seen in an epoch of training, over all processes."""

    learning_rate: float  # of the last step
    penalty_weight: float  # of the last step
    means: dict[str, float]  # "train_loss", "train_accuracy", "penalty" and "LAYER.PART" of the branches
    guessing: Tested  # what training would give that learns nothing but how frequent each label is
    seconds: float
    images_per_second: float
    # Of W of each branch, after the last step; empty while the branches are off.
    ranks: dict[str, int] = dataclasses.field(default_factory=dict)


def train_epoch(state: TrainingState, epoch: int, save: Callable[[int, int], None]) -> TrainedEpoch:
    """Trains for one epoch (numbered from 0), or for the rest of it.

    Args:
        state: the run; where `state.progress` says that steps of this epoch were taken before, they are not repeated.
        epoch: its number.
        save: called as save(epoch, step) every `save_every_steps` steps, to write a checkpoint.

    Raises:
        DivergedError: as soon as the loss is seen not to be finite.
        DataError: from streamed data, for what is damaged.
    """
    recipe, accelerator, batches = state.recipe, state.accelerator, state.train_batches
    regularized = penalty_weight(recipe, epoch, 0, 1) > 0
    state.lowrank.enable(regularized)
    state.network.train()
    means = Means(accelerator.device, state.classes)
    first = _resume(state, means) * batches.parts
    bar = _bar(state, epoch, first)
    began = time.perf_counter() - state.progress.inside.seconds
    for index, (images, labels) in enumerate(batches.epoch(epoch, first), start=first):
        step = index // batches.parts
        rate = learning_rate(recipe, epoch, step, batches.steps)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        weight = penalty_weight(recipe, epoch, step, batches.steps)
        # Looked at once an epoch: it costs a backward pass more. A compiled network does not see hooks that come later.
        shares = index == 0 and weight > 0 and not recipe.compile
        _train_step(state, images, labels, weight, means, shares=shares)
        last = index + 1 == len(batches)
        if accelerator.sync_gradients and ((step + 1) % REPORT_EVERY == 0 or last):
            outside = [f"{layer}.outside" for layer in state.lowrank.branches]
            now = means.now("train_loss", "train_accuracy", "penalty", *outside)
            _check_finite(state, now, epoch)
            bar.set_postfix(_postfix(now, (index + 1) * len(images), time.perf_counter() - began), refresh=False)
        bar.update()
        due = recipe.save_every_steps and (step + 1) % recipe.save_every_steps == 0
        if due and accelerator.sync_gradients and not last:  # after the last step comes the checkpoint of the epoch
            stopped = time.perf_counter()
            sums = tuple(gather_object([means.state_dict()]))
            state.progress.inside = EpochPosition(step + 1, stopped - began, sums)
            save(epoch, step + 1)
            began += time.perf_counter() - stopped
    bar.close()
    seconds = time.perf_counter() - began
    state.progress.epoch, state.progress.seconds = epoch + 1, state.progress.seconds + seconds
    state.progress.inside = EpochPosition()
    images_per_second = batches.steps * batches.batch_size / seconds
    over_all, guessing = means.over_processes(accelerator), means.guessing(accelerator)
    ranks = {layer: one.rank for layer, one in state.lowrank.report().items()} if weight else {}
    return TrainedEpoch(rate, weight, over_all, guessing, seconds, images_per_second, ranks)


def _resume(state: TrainingState, means: Means) -> int:
    """Gives `means` what was summed before the run was interrupted in this epoch; the steps that were taken then."""
    accelerator, inside = state.accelerator, state.progress.inside
    same = len(inside.sums) == accelerator.num_processes
    for process, sums in enumerate(inside.sums):
        counted = (process if same else 0) == accelerator.process_index  # what counts is the sum over processes
        means.add_state_dict(sums, names_alone=not counted)
    return inside.step


def _train_step(
    state: TrainingState, images: Tensor, labels: Tensor, weight: float, means: Means, *, shares: bool
) -> None:
    """One forward and backward pass, and the optimizer's step if this is the last part of a batch."""
    accelerator, lowrank, optimizer = state.accelerator, state.lowrank, state.optimizer
    if state.recipe.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    with accelerator.accumulate(state.network):
        nothing: contextlib.AbstractContextManager[dict[str, Tensor]] = contextlib.nullcontext({})
        with lowrank.capture() if shares else nothing as activations, _batches_of_one(len(images)):
            logits = state.network(images)
        task_loss = loss = functional.cross_entropy(logits.float(), labels)
        if (extra := state.comparator.extra_loss(lowrank.backbone, labels)) is not None:
            loss = task_loss + extra
        if weight:
            penalty = lowrank.penalty(labels)  # the low-rank branch, first half: its loss joins the task's
            loss = task_loss + weight * penalty
        pulled = gradient_shares(task_loss, loss, activations)
        means.add({f"{layer}.gradient_share": share for layer, share in pulled.items()}, len(images))
        accelerator.backward(loss)
        if accelerator.sync_gradients and state.recipe.clip_norm is not None:
            accelerator.clip_grad_norm_(lowrank.backbone.parameters(), state.recipe.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
        if weight:
            lowrank.update()  # second half: W and b follow the network
        state.progress.step += 1
        if state.ema is not None:
            state.ema.update(lowrank.backbone, step=state.progress.step)
    means.count(labels)
    accuracy = (logits.argmax(dim=1) == labels).float().mean()
    means.add({"train_loss": task_loss, "train_accuracy": accuracy}, len(images))
    if weight:
        parts = {f"{layer}.{part}": value for layer, own in lowrank.losses().items() for part, value in own.items()}
        means.add({"penalty": penalty, **parts}, len(images))


@contextlib.contextmanager
def _batches_of_one(images: int) -> Iterator[None]:
    """Says what to do where BatchNorm finds a single number for each channel."""
    try:
        yield
    except ValueError as error:
        if images > 1 or "more than 1 value per channel" not in str(error):
            raise
        raise RecipeError(
            "BatchNorm cannot train on a single image at a time: raise batch_size, or lower gradient_accumulation and "
            "the number of processes, among which it is divided"
        ) from error


def gradient_shares(task_loss: Tensor, loss: Tensor, activations: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """How hard the branches pull at each layer: the norm of their gradient there over that of the task's."""
    shares = {}
    for layer, value in activations.items():
        (task,) = torch.autograd.grad(task_loss, value, retain_graph=True)
        (both,) = torch.autograd.grad(loss, value, retain_graph=True)
        shares[layer] = (both - task).float().norm() / task.float().norm().clamp_min(torch.finfo(torch.float32).tiny)
    return shares


@torch.no_grad()
def evaluate(accelerator: Accelerator, network: nn.Module, batches: TestBatches) -> Tested:
    """Loss and accuracy over the test images of all processes.

    `network` is called as it is: pass the module that accelerate prepared, without its data-parallel shell,
    since the processes may hold different numbers of batches. All test the network of the main process, which is the
    one that is saved: without its shell, the statistics of BatchNorm are still those of each process's last batches.
    """
    for buffer in network.buffers():
        broadcast(buffer)  # in place
    network.eval()
    means = Means(accelerator.device)
    nothing = torch.zeros((), device=accelerator.device)
    means.add({"loss": nothing, "accuracy": nothing}, 0)  # a process without images has its part in the sums, too
    for images, labels in batches:
        with accelerator.autocast():
            logits = network(images).float()
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        means.add({"loss": functional.cross_entropy(logits, labels), "accuracy": accuracy}, len(images))
    over_all = means.over_processes(accelerator)
    return Tested(over_all["loss"], over_all["accuracy"])


def check_alive(state: TrainingState, trained: TrainedEpoch, test: Tested) -> None:
    """Compares an epoch with guessing.

    Raises:
        DataError: all its images were of one class.
        DivergedError: nothing was learned so far, what had been was lost, or the test loss is no loss any more.
    """
    accuracy, guessing = trained.means["train_accuracy"], trained.guessing
    if guessing.accuracy == 1:
        raise DataError("all training images of the epoch are of one class: there is nothing to learn")
    if not test.loss < MOST_LOSS:
        taken = state.progress.step
        few = (
            f" They begin far from what they settle to, and {taken} optimizer steps are few: take more images, or a "
            "smaller batch_size."
            if taken < PATIENCE[1]
            else ""
        )
        raise DivergedError(
            f"epoch {state.progress.epoch}: the test loss is {test.loss:.3g}, though the training loss is "
            f"{trained.means['train_loss']:.3g}: what the network gives in eval mode has blown up, as when the running "
            f"statistics of BatchNorm do not follow.{few} {_advice(state)}"
        )
    check_not_at_chance(state, accuracy, guessing.accuracy)
    progress, (epochs, steps) = state.progress, PATIENCE
    learned = progress.best_train_accuracy > guessing.accuracy + 3 * _error(state, guessing.accuracy)
    tried = progress.epoch >= state.recipe.warmup_epochs + epochs and progress.step >= steps
    if tried and not learned and trained.means["train_loss"] > 0.99 * guessing.loss:
        raise DivergedError(
            f"epoch {progress.epoch}: nothing was learned in {progress.step} optimizer steps. The training accuracy "
            f"({accuracy:.1%}) and loss ({trained.means['train_loss']:.3g}) are those of guessing "
            f"({guessing.accuracy:.1%}, {guessing.loss:.3g}). {_advice(state)}"
        )


def _error(state: TrainingState, share: float) -> float:
    """The standard error of a share of the images of an epoch."""
    return math.sqrt(share * (1 - share) / (state.train_batches.steps * state.train_batches.batch_size))


def check_not_at_chance(state: TrainingState, accuracy: float, chance: float) -> None:
    """Compares the training accuracy of an epoch with the best before, and with the share of the largest class.

    Raises:
        DivergedError: if it is that of guessing the most frequent class, after it had clearly been above.
    """
    error = _error(state, chance)
    best = state.progress.best_train_accuracy
    state.progress.best_train_accuracy = max(best, accuracy)
    if best > max(1.5 * chance, chance + 10 * error) and accuracy <= chance + 3 * error:
        raise DivergedError(
            f"epoch {state.progress.epoch}: the training accuracy fell to chance ({accuracy:.1%}) after {best:.1%}: "
            f"the network has collapsed. {_advice(state)}"
        )


def _check_finite(state: TrainingState, means: Mapping[str, float], epoch: int) -> None:
    for name, mean in means.items():
        if not math.isfinite(mean):
            raise DivergedError(
                f"epoch {epoch + 1}, after {state.progress.step} optimizer steps: {name} is {mean}, "
                f"not a finite number. {_advice(state)}"
            )


def _advice(state: TrainingState) -> str:
    advice = f"Lower learning_rate (now {state.recipe.learning_rate:g}) or set clip_norm"
    if state.recipe.lowrank_enabled and state.lowrank.enabled:  # in the epoch that failed
        weights = ", ".join(f"{b.loss_weights.reconstruction:g}" for b in state.lowrank.branches.values())
        advice += f", lower lowrank.strength or lowrank.reconstruction_weight (now {weights}), or set ramp_epochs"
    return advice + "; then start a new run. The checkpoints of this one are kept."


def _bar(state: TrainingState, epoch: int, first: int) -> tqdm[Any]:
    """A bar on the main process of a terminal; elsewhere the line that is printed after each epoch must do."""
    title = f"epoch {epoch + 1}/{state.recipe.epochs}"
    hidden = None if state.accelerator.is_local_main_process else True
    total = len(state.train_batches)
    return tqdm(total=total, initial=first, desc=title, disable=hidden, leave=False, dynamic_ncols=True)


def _postfix(means: Mapping[str, float], images: int, seconds: float) -> dict[str, str]:
    shown = {"loss": f"{means['train_loss']:.3f}", "accuracy": f"{means['train_accuracy']:.1%}"}
    if "penalty" in means:
        shown["penalty"] = f"{means['penalty']:.3f}" if means["penalty"] else "warming up"
    outside = {name.removesuffix(".outside"): mean for name, mean in means.items() if name.endswith(".outside")}
    if outside:
        shown["outside"] = ", ".join(f"{layer} {mean:.0%}" for layer, mean in outside.items())
    return {**shown, "images/s": f"{images / seconds:.0f}"}
