"""One epoch of training and one of evaluation."""

from __future__ import annotations

import contextlib
import math
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

from .errors import DivergedError
from .loader import EvalBatches
from .schedule import learning_rate, penalty_weight
from .state import TrainingState

REPORT_EVERY = 10  # optimizer steps between two looks at the losses: each one waits for the device


class Means:
    """Means over the samples of an epoch, summed on the device in float32."""

    def __init__(self, device: torch.device) -> None:
        self._sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(2, device=device))  # (total, weight)

    def add(self, name: str, value: Tensor, weight: int) -> None:
        """Counts `value`, a scalar mean over `weight` samples."""
        total = value.detach().float() * weight
        self._sums[name] += torch.stack([total, torch.full_like(total, weight)])

    def __getitem__(self, name: str) -> float:
        """The mean so far, on this process."""
        total, weight = self._sums[name].tolist()
        return total / weight

    def __contains__(self, name: str) -> bool:
        return name in self._sums

    def over_processes(self, accelerator: Accelerator) -> dict[str, float]:
        """All means, over the samples of every process."""
        sums = {name: accelerator.reduce(value, "sum").tolist() for name, value in self._sums.items()}
        return {name: total / weight for name, (total, weight) in sums.items()}


def train_epoch(state: TrainingState, epoch: int) -> dict[str, Any]:
    """Trains for one epoch (numbered from 0) and returns its row of metrics.

    Raises:
        DivergedError: as soon as the loss is seen not to be finite.
    """
    recipe, accelerator, batches = state.recipe, state.accelerator, state.train_batches
    regularized = penalty_weight(recipe, epoch, 0, 1) > 0
    state.lowrank.enable(regularized)
    state.network.train()
    means = Means(accelerator.device)
    bar = _bar(state, epoch)
    began = time.perf_counter()
    for index, (images, labels) in enumerate(batches.epoch(epoch)):
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
            _check_finite(state, means, epoch)
            bar.set_postfix(_postfix(means, (index + 1) * len(images), time.perf_counter() - began), refresh=False)
        bar.update()
    bar.close()
    seconds = time.perf_counter() - began
    row = {"learning_rate": rate, "penalty_weight": weight, **means.over_processes(accelerator)}
    state.progress.epoch, state.progress.seconds = epoch + 1, state.progress.seconds + seconds
    return {**row, "images_per_second": batches.steps * batches.batch_size / seconds, "seconds": seconds}


def _train_step(
    state: TrainingState, images: Tensor, labels: Tensor, weight: float, means: Means, *, shares: bool
) -> None:
    """One forward and backward pass, and the optimizer's step if this is the last part of a batch."""
    accelerator, lowrank, optimizer = state.accelerator, state.lowrank, state.optimizer
    if state.recipe.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    with accelerator.accumulate(state.network):
        nothing: contextlib.AbstractContextManager[dict[str, Tensor]] = contextlib.nullcontext({})
        with lowrank.capture() if shares else nothing as activations:
            logits = state.network(images)
        task_loss = loss = functional.cross_entropy(logits.float(), labels)
        if weight:
            penalty = lowrank.penalty()  # the low-rank branch, first half: its loss joins the task's
            loss = task_loss + weight * penalty
            means.add("penalty", penalty, len(images))
        for layer, share in gradient_shares(task_loss, loss, activations).items():
            means.add(f"{layer}.gradient_share", share, len(images))
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
    means.add("train_loss", task_loss, len(images))
    means.add("train_accuracy", (logits.argmax(dim=1) == labels).float().mean(), len(images))
    if weight:
        for layer, parts in lowrank.losses().items():
            for part, value in parts.items():
                means.add(f"{layer}.{part}", value, len(images))


def gradient_shares(task_loss: Tensor, loss: Tensor, activations: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """How hard the branches pull at each layer: the norm of their gradient there over that of the task's."""
    shares = {}
    for layer, value in activations.items():
        (task,) = torch.autograd.grad(task_loss, value, retain_graph=True)
        (both,) = torch.autograd.grad(loss, value, retain_graph=True)
        shares[layer] = (both - task).float().norm() / task.float().norm().clamp_min(torch.finfo(torch.float32).tiny)
    return shares


@torch.no_grad()
def evaluate(accelerator: Accelerator, network: nn.Module, batches: EvalBatches) -> tuple[float, float]:
    """Mean cross-entropy and accuracy over the test images, both in [0, inf) and [0, 1].

    `network` is called as it is: pass the module that accelerate prepared, without its data-parallel shell,
    since the processes may hold different numbers of batches.
    """
    network.eval()
    means = Means(accelerator.device)
    for images, labels in batches:
        with accelerator.autocast():
            logits = network(images).float()
        means.add("loss", functional.cross_entropy(logits, labels), len(images))
        means.add("accuracy", (logits.argmax(dim=1) == labels).float().mean(), len(images))
    found = means.over_processes(accelerator)
    return found["loss"], found["accuracy"]


def check_not_at_chance(state: TrainingState, accuracy: float) -> None:
    """Compares the training accuracy of an epoch with the best before.

    Raises:
        DivergedError: if it is that of guessing the most frequent class, after it had clearly been above.
    """
    labels = state.train_batches.labels
    chance = labels.bincount().max().item() / len(labels)
    error = math.sqrt(chance * (1 - chance) / len(labels))
    best = state.progress.best_train_accuracy
    state.progress.best_train_accuracy = max(best, accuracy)
    if best > max(1.5 * chance, chance + 10 * error) and accuracy <= chance + 3 * error:
        raise DivergedError(
            f"epoch {state.progress.epoch}: the training accuracy fell to chance ({accuracy:.1%}) after {best:.1%}: "
            f"the network has collapsed. {_advice(state)}"
        )


def _check_finite(state: TrainingState, means: Means, epoch: int) -> None:
    for name in ("train_loss", "penalty"):
        if name in means and not math.isfinite(means[name]):
            raise DivergedError(
                f"epoch {epoch + 1}, after {state.progress.step} optimizer steps: {name} is {means[name]}, "
                f"not a finite number. {_advice(state)}"
            )


def _advice(state: TrainingState) -> str:
    advice = f"Lower learning_rate (now {state.recipe.learning_rate:g}) or set clip_norm"
    if state.recipe.lowrank_enabled and state.progress.epoch >= state.recipe.pretrain_epochs:
        weights = ", ".join(f"{b.reconstruction_weight:g}" for b in state.lowrank.branches.values())
        advice += f", lower lowrank.reconstruction_weight (now {weights}), or let it grow with ramp_epochs"
    return advice + "; then start a new run. The checkpoints of this one are kept."


def _bar(state: TrainingState, epoch: int) -> tqdm[Any]:
    """A bar on the main process of a terminal; elsewhere the line that is printed after each epoch must do."""
    title = f"epoch {epoch + 1}/{state.recipe.epochs}"
    hidden = None if state.accelerator.is_local_main_process else True
    return tqdm(total=len(state.train_batches), desc=title, disable=hidden, leave=False, dynamic_ncols=True)


def _postfix(means: Means, images: int, seconds: float) -> dict[str, str]:
    shown = {"loss": f"{means['train_loss']:.3f}", "accuracy": f"{means['train_accuracy']:.1%}"}
    if "penalty" in means:
        shown["penalty"] = f"{means['penalty']:.3f}"
    return {**shown, "images/s": f"{images / seconds:.0f}"}
