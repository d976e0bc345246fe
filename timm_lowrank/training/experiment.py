"""`train`: a recipe from beginning to end, with its plain twin, into a run folder."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env

from ..checkpoint import save_pretrained
from ..data import Data, StreamedData, load_data
from ..data.batches import TestBatches, evaluation_batches
from ..environment import fast_precision, require, together
from ..errors import DataError, RecipeError, RunError
from .checkpoints import Progress
from .loop import Tested, TrainedEpoch, check_alive, evaluate, train_epoch
from .recipe import LEAST_TESTED, Recipe, read_recipe
from .report import layer_spectra, plot_spectrum, summarize, table
from .run import GO_ON, ComparatorSummary, EpochMetrics, Run, RunFolder, RunPaths, Spectrum, Summary, unlike_twin
from .state import TrainingState, build, seeded

BRANCH_PARTS = ("reconstruction", "norm", "head", "outside", "activation_norm", "gradient_share")
Finished = tuple[Summary, Spectrum]


def train(recipe: Recipe, output: str | Path, *, resume: bool = False, data: Data | None = None) -> Summary:
    """Trains, measures and exports a network; under `accelerate launch` with all processes together.

    The folder `output` gets config.yaml, metrics.csv, checkpoints/, model/ (timm's Hub layout), spectrum.json,
    plots/spectrum.png and, last of all, summary.json; the plain twin, if the recipe asks for it, the same under
    twin/. Resuming takes up the newest complete checkpoint and gives the figures and weights of a run that was
    never interrupted.

    Args:
        recipe: what to do.
        output: an empty or new folder, or with `resume` that of an earlier part of the same run.
        resume: whether to continue what is there; nothing there is a new run.
        data: the images, where a program has loaded what the recipe means already; None loads them.

    Returns:
        What summary.json says.

    Raises:
        TrainingError: for a mistake in the recipe, data or output, all found before the output is touched, and
            for a run that diverged or could not be written, or whose other processes have ended.
        LowRankError: from a branch, if a regularized layer collapsed.
    """
    require("matplotlib", "matplotlib")  # now, not after hours of training
    with together("training", GO_ON):
        return _train(recipe, output, resume, data)


def _train(recipe: Recipe, output: str | Path, resume: bool, data: Data | None) -> Summary:
    recipe = _with_precision(recipe, Path(output), resume)
    folder = RunFolder(output, recipe, resume)
    twin_folder = RunFolder(folder.twin, recipe.plain(), resume) if recipe.twin is True else None
    twin = _plain_run(recipe, recipe.twin) if isinstance(recipe.twin, str) else None
    if data is None:
        data = load_data(recipe.data, **recipe.data_options(), progress=True)
    if twin is not None and twin[0].data.fingerprint != data.fingerprint:
        raise RunError(f"twin={recipe.twin!r} was trained on other data (its fingerprint differs): use twin=true")
    if not folder.is_finished():
        _require_weight(recipe, data.counts[0] // recipe.batch_size)
        if data.counts[1] < LEAST_TESTED:
            raise DataError(
                f"the test split of {data.name} has a single image, of which no spectrum can be measured: "
                f"give at least {LEAST_TESTED}"
            )
    if twin_folder is not None:
        twin = _run(recipe.plain(), data, twin_folder, within=folder)
    return _run(recipe, data, folder, twin=twin)[0]


def _require_weight(recipe: Recipe, steps: int) -> None:
    """Raises RecipeError if the training would end before the penalty of the branches has weight.

    Args:
        steps: optimizer steps of an epoch; 0 of a batch that is too large, which is another mistake.
    """
    updates = steps * (recipe.epochs - recipe.pretrain_epochs)
    config = recipe.lowrank_config()
    if recipe.lowrank_enabled and updates and not config.has_had_weight(updates):
        raise RecipeError(
            f"lowrank.warmup_updates={config.warmup_updates} is too long for the {updates} optimizer steps of the "
            "training with branches: their penalty would never have weight. Lower it, or raise epochs"
        )


def _with_precision(recipe: Recipe, output: Path, resume: bool) -> Recipe:
    """The recipe with what precision=auto means: what an earlier part of the run took, else what is faster here."""
    if recipe.precision != "auto":
        return recipe
    config, taken = RunPaths(output).config, [""]
    if resume and config.is_file():
        with contextlib.suppress(RecipeError):  # a damaged one is reported by whoever needs it
            taken = [read_recipe(config).get("precision", "no")]
        if taken[0] == "auto":  # somebody put the recipe there in the place of a damaged one
            raise RunError(
                f"{config} says precision=auto, and not which the run took: write there the one that it printed when "
                "it began, bf16 or no (float32)"
            )
    else:
        state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))  # which it does not look at by itself
        taken = [fast_precision(state.device)]
        broadcast_object_list(taken)  # processes on different machines must agree
        if state.is_main_process:
            print(f"precision=auto: {'bf16' if taken[0] == 'bf16' else 'float32'} is the faster one here", flush=True)
    return dataclasses.replace(recipe, precision=taken[0] or "no")


def _plain_run(recipe: Recipe, folder: str) -> Finished:
    """Summary and spectrum of a finished plain run. Raises a RunError if it is none, or was not trained alike."""
    try:
        run = Run.open(Path(folder).expanduser())
    except RunError as error:
        raise RunError(f"twin={folder!r} holds no finished run: {error}; or set twin=true") from error
    if run.summary.kind != "plain":
        raise RunError(f"twin={folder!r} is not a plain run: train one with --set lowrank.enabled=false")
    if changes := unlike_twin(recipe, run.recipe):
        raise RunError(
            f"twin={folder!r} was not trained alike, so it is no twin ({'; '.join(changes)}): set twin=true, which "
            "trains one, or twin=false and evaluate beside it with --against, which takes any network"
        )
    return run.summary, run.spectrum()


def _run(
    recipe: Recipe, data: Data, folder: RunFolder, *, within: RunFolder | None = None, twin: Finished | None = None
) -> Finished:
    """One network. `within` is the folder that `folder` lies in, if that has to be made too."""
    if folder.is_finished():
        print(f"{folder.folder} is complete", flush=True)
        run = Run.open(folder.folder)
        return run.summary, run.spectrum()
    with seeded(recipe.seed), contextlib.ExitStack() as ours:
        state = build(recipe, data, folder.folder, resumed=folder.has_whole_checkpoint)
        accelerator = state.accelerator
        if accelerator.is_main_process:
            for new in (within, folder):
                if new is not None:
                    ours.enter_context(new.exclusive())
        accelerator.wait_for_everyone()
        began = folder.load_newest(accelerator)
        notes = [f"note: {text}" for text in recipe.without_effect()]
        accelerator.print("\n".join([_introduction(recipe, data, folder, state.progress), *notes]), flush=True)
        if recipe.trackers:
            accelerator.init_trackers("timm_lowrank", config={k: str(v) for k, v in recipe.to_dict().items()})
        for epoch in range(began, recipe.epochs):
            _epoch(state, folder, epoch)
        finished = _finish(state, data, folder, twin)
        for tracker in accelerator.trackers:  # not `end_training`, after which the processes could not train together
            tracker.finish()  # once more, as a run does after its twin
        accelerator.free_memory()
    return finished


def _epoch(state: TrainingState, folder: RunFolder, epoch: int) -> None:
    """Trains, tests, writes a row and, if it is time, a checkpoint."""
    recipe, accelerator = state.recipe, state.accelerator
    trained = train_epoch(state, epoch, lambda epoch, step: folder.save(accelerator, epoch, step))
    test = evaluate(accelerator, state.lowrank, state.test_batches)
    averaged = None
    if state.ema is not None:
        state.comparator.settle(state.ema.module)
        averaged = evaluate(accelerator, state.ema.module, state.test_batches)
    metrics = _metrics(state, epoch, trained, test, averaged)
    if accelerator.is_main_process:
        # Before the checkpoint: a resumed run drops rows that are too many, but could not make up for one too few.
        folder.append_metrics(metrics)
    accelerator.print(_line(state, metrics), flush=True)
    accelerator.log({name: value for name, value in metrics.to_row().items() if value is not None}, step=epoch + 1)
    check_alive(state, trained, test)
    if (epoch + 1) % recipe.save_every == 0 or epoch + 1 == recipe.epochs:
        folder.save(accelerator, epoch + 1)


def _metrics(
    state: TrainingState, epoch: int, trained: TrainedEpoch, test: Tested, averaged: Tested | None
) -> EpochMetrics:
    means, regularized = trained.means, state.recipe.lowrank_enabled
    layers = dict(state.lowrank.branches.items()) if regularized else {}
    return EpochMetrics(
        epoch=epoch + 1,
        learning_rate=trained.learning_rate,
        train_loss=means["train_loss"],
        train_accuracy=means["train_accuracy"],
        test_loss=test.loss,
        test_accuracy=test.accuracy,
        ema_test_accuracy=averaged.accuracy if averaged else None,
        penalty_weight=trained.penalty_weight if regularized else None,
        penalty=means.get("penalty"),
        branches={
            layer: {
                **{part: means.get(f"{layer}.{part}") for part in BRANCH_PARTS if part != "head" or branch.head},
                "rank": trained.ranks.get(layer),
            }
            for layer, branch in layers.items()
        },
        images_per_second=trained.images_per_second,
        seconds=trained.seconds,
    )


def _introduction(recipe: Recipe, data: Data, folder: RunFolder, progress: Progress) -> str:
    step = f", step {progress.inside.step:,} of the next" if progress.inside.step else ""
    resumed = f", resumed after epoch {progress.epoch}{step}" if progress.step else ""
    streamed = ", streamed" if isinstance(data, StreamedData) else ""
    train, test = data.counts
    kind = "low rank" if recipe.lowrank_enabled else recipe.comparator or "plain"
    return (
        f"\n{recipe.model}, {kind}: {train:,} training and {test:,} test images of "
        f"{data.name}{streamed}, {recipe.epochs} epochs, into {folder.folder}{resumed}"
    )


def _line(state: TrainingState, metrics: EpochMetrics) -> str:
    epochs = state.recipe.epochs
    shown = f"epoch {metrics.epoch:>{len(str(epochs))}}/{epochs}  loss {metrics.train_loss:.4f}"
    if metrics.penalty is not None:
        shown += f"  penalty {metrics.penalty:.4f}"
    left = [
        f"{layer} {parts['outside']:.1%} (rank {parts['rank']:g}, target {state.lowrank.branches[layer].rank})"
        for layer, parts in metrics.branches.items()
        if parts["outside"] is not None and parts["rank"] is not None
    ]
    return (
        f"{shown}  train {metrics.train_accuracy:6.1%}  test {metrics.test_accuracy:6.1%}"
        f"  {metrics.images_per_second:,.0f} images/s" + (f"  outside W: {', '.join(left)}" if left else "")
    )


def _finish(state: TrainingState, data: Data, folder: RunFolder, twin: Finished | None) -> Finished:
    """Measures and exports; summary.json comes last, so that a folder that has one is complete."""
    recipe, accelerator = state.recipe, state.accelerator
    if state.ema is not None:
        state.lowrank.backbone.load_state_dict(state.ema.module.state_dict())
    comparator = _finished_comparator(state, data)
    test = evaluate(accelerator, state.lowrank, state.test_batches)
    finished: list[Any] = [None]
    if accelerator.is_main_process:
        model = state.lowrank if recipe.lowrank_enabled else state.lowrank.backbone  # a plain run has no branches
        with folder.writing(folder.model):  # before anything is measured, which may fail
            save_pretrained(model, folder.model, label_names=list(data.class_names), data_config=data.data_config)
        # From as many images of each class, whatever share of them this process tested.
        spectra = layer_spectra(state.lowrank, _test_batches(state, data, recipe.spectrum_images), None)
        summary = summarize(state, data, spectra, test, folder.last_metrics(), comparator, twin[0] if twin else None)
        spectrum = {layer: measured.shares for layer, measured in spectra.items()}
        picture = folder.plots / "spectrum.png"
        with folder.writing(picture):
            plot_spectrum(picture, {**({"plain": twin[1]} if twin else {}), summary.kind: spectrum}, summary.branches)
        folder.write_results(spectrum, summary)
        print("\n" + table({**({"plain": twin[0]} if twin else {}), summary.kind: summary}), flush=True)
        finished = [(summary, spectrum)]
    broadcast_object_list(finished)
    result: Finished = finished[0]
    return result


def _test_batches(state: TrainingState, data: Data, limit: int | None = None) -> TestBatches:
    """All test images, or `limit` of them in equal shares of the classes, whatever share this process tests."""
    recipe, device = state.recipe, state.accelerator.device
    return evaluation_batches(data, device, batch_size=recipe.eval_batch_size, workers=recipe.workers, limit=limit)


def _finished_comparator(state: TrainingState, data: Data) -> ComparatorSummary | None:
    """Measures what only the network in training shows, and leaves the one that is tested and exported."""
    recipe, comparator, backbone = state.recipe, state.comparator, state.lowrank.backbone
    if recipe.comparator is None:
        return None
    # On every process: all test the network that is left.
    figures = comparator.finish(backbone, _test_batches(state, data))
    rounded = {name: round(value, 6) for name, value in figures.items()}
    return ComparatorSummary(
        name=recipe.comparator, title=comparator.title, args=recipe.comparator_args, figures=rounded
    )
