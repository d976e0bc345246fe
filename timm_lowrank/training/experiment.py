"""`train`: a recipe from beginning to end, with its plain twin, into a run folder."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from ..checkpoint import save_pretrained
from ..data.sources import require
from ..data.streamed import StreamedData
from ..errors import RunError
from .batches import evaluation_batches
from .data import Data, load_data
from .disk import read_json
from .loop import check_not_at_chance, evaluate, train_epoch
from .plots import plot_spectrum
from .recipe import Recipe
from .report import layer_energies, read_plain_run, spectrum_content, summarize, table
from .run import RunFolder
from .state import Progress, TrainingState, build, seeded

BRANCH_PARTS = ("reconstruction", "norm", "activation_norm", "gradient_share")
Finished = tuple[dict[str, Any], dict[str, Any]]  # the contents of summary.json and spectrum.json


def train(recipe: Recipe, output: str | Path, *, resume: bool = False) -> dict[str, Any]:
    """Trains, measures and exports a network; under `accelerate launch` with all processes together.

    The folder `output` gets config.yaml, metrics.csv, checkpoints/, model/ (timm's Hub layout), spectrum.json,
    plots/spectrum.png and, last of all, summary.json; the plain twin, if the recipe asks for it, the same under
    twin/. Resuming takes up the newest complete checkpoint and gives the figures and weights of a run that was
    never interrupted.

    Args:
        recipe: what to do.
        output: an empty or new folder, or with `resume` that of an earlier part of the same run.
        resume: whether to continue what is there; nothing there is a new run.

    Returns:
        The content of summary.json.

    Raises:
        TrainingError: for a mistake in the recipe, data or output, all found before the output is touched, and
            for a run that diverged or could not be written.
        LowRankError: from a branch, if a regularized layer collapsed.
    """
    require("matplotlib", "matplotlib")  # now, not after hours of training
    folder = RunFolder(output, recipe, resume)
    twin_folder = RunFolder(folder.path / "twin", recipe.plain(), resume) if recipe.twin is True else None
    twin = read_plain_run(Path(recipe.twin)) if isinstance(recipe.twin, str) else None
    data = load_data(recipe)
    if twin is not None and twin[0]["data"]["fingerprint"] != data.fingerprint:
        raise RunError(f"twin={recipe.twin!r} was trained on other data (its fingerprint differs): use twin=true")
    if twin_folder is not None:
        twin = _run(recipe.plain(), data, twin_folder, within=folder)
    return _run(recipe, data, folder, twin=twin)[0]


def _run(
    recipe: Recipe, data: Data, folder: RunFolder, *, within: RunFolder | None = None, twin: Finished | None = None
) -> Finished:
    """One network. `within` is the folder that `folder` lies in, if that has to be made too."""
    done = folder.summary()
    if done is not None:
        print(f"{folder.path} is complete", flush=True)
        return done, read_json(folder.path / "spectrum.json")
    with seeded(recipe.seed):
        state = build(recipe, data, folder.path)
        accelerator = state.accelerator
        if accelerator.is_main_process:
            for new in (within, folder):
                if new is not None:
                    new.create()
        accelerator.wait_for_everyone()
        began = folder.load_newest(accelerator)
        if accelerator.is_main_process:
            folder.keep_metrics(began)
        accelerator.print(_introduction(recipe, data, folder, state.progress), flush=True)
        if recipe.trackers:
            accelerator.init_trackers("timm_lowrank", config={k: str(v) for k, v in recipe.to_dict().items()})
        for epoch in range(began, recipe.epochs):
            _epoch(state, folder, epoch)
        finished = _finish(state, data, folder, twin)
        accelerator.end_training()
        accelerator.free_memory()
    return finished


def _epoch(state: TrainingState, folder: RunFolder, epoch: int) -> None:
    """Trains, tests, writes a row and, if it is time, a checkpoint."""
    recipe, accelerator = state.recipe, state.accelerator
    measured = train_epoch(state, epoch, lambda epoch, step: folder.save(accelerator, epoch, step))
    measured["test_loss"], measured["test_accuracy"] = evaluate(accelerator, state.lowrank, state.test_batches)
    if state.ema is not None:
        _, measured["ema_test_accuracy"] = evaluate(accelerator, state.ema.module, state.test_batches)
    row = {"epoch": epoch + 1, **{name: measured.get(name) for name in _columns(state)}}
    if accelerator.is_main_process:
        # Before the checkpoint: a resumed run drops rows that are too many, but could not make up for one too few.
        folder.append_metrics({name: _cell(value) for name, value in row.items()})
    accelerator.print(_line(recipe, row), flush=True)
    accelerator.log({name: value for name, value in row.items() if value is not None}, step=epoch + 1)
    check_not_at_chance(state, measured["train_accuracy"], measured["chance"])
    if (epoch + 1) % recipe.save_every == 0 or epoch + 1 == recipe.epochs:
        folder.save(accelerator, epoch + 1)


def _columns(state: TrainingState) -> list[str]:
    """The columns of metrics.csv after "epoch": the same in every row, empty while the branches are off."""
    columns = ["learning_rate", "train_loss", "train_accuracy", "test_loss", "test_accuracy"]
    if state.ema is not None:
        columns.append("ema_test_accuracy")
    if state.recipe.lowrank_enabled:
        columns += ["penalty_weight", "penalty"]
        for layer in state.lowrank.branches:
            columns += [f"{layer}.{part}" for part in BRANCH_PARTS]
    return [*columns, "images_per_second", "seconds"]


def _cell(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def _introduction(recipe: Recipe, data: Data, folder: RunFolder, progress: Progress) -> str:
    step = f", step {progress.inside.step:,} of the next" if progress.inside.step else ""
    resumed = f", resumed after epoch {progress.epoch}{step}" if progress.step else ""
    streamed = ", streamed" if isinstance(data, StreamedData) else ""
    train, test = data.counts
    kind = "low rank" if recipe.lowrank_enabled else "plain"
    return (
        f"\n{recipe.model}, {kind}: {train:,} training and {test:,} test images of "
        f"{data.name}{streamed}, {recipe.epochs} epochs, into {folder.path}{resumed}"
    )


def _line(recipe: Recipe, row: dict[str, Any]) -> str:
    shown = f"epoch {row['epoch']:>{len(str(recipe.epochs))}}/{recipe.epochs}  loss {row['train_loss']:.4f}"
    if row.get("penalty") is not None:
        shown += f"  penalty {row['penalty']:.4f}"
    return (
        f"{shown}  train {row['train_accuracy']:6.1%}  test {row['test_accuracy']:6.1%}"
        f"  {row['images_per_second']:,.0f} images/s"
    )


def _finish(state: TrainingState, data: Data, folder: RunFolder, twin: Finished | None) -> Finished:
    """Measures and exports; summary.json comes last, so that a folder that has one is complete."""
    recipe, accelerator = state.recipe, state.accelerator
    if state.ema is not None:
        state.lowrank.backbone.load_state_dict(state.ema.module.state_dict())
    test = evaluate(accelerator, state.lowrank, state.test_batches)
    finished: list[Any] = [None]
    if accelerator.is_main_process:
        # From the first images, whatever share of them this process tested.
        images = evaluation_batches(recipe, data, accelerator.device)
        energies = layer_energies(state.lowrank, images, recipe.spectrum_images)
        summary = summarize(state, data, energies, test, _last_row(folder))
        spectrum = spectrum_content(energies)
        _export(state, data, folder)
        folder.write_json("spectrum.json", spectrum)
        title = "low rank" if recipe.lowrank_enabled else "plain"
        spectra = {**({"plain": twin[1]} if twin else {}), title: spectrum}
        with folder.writing("plots/spectrum.png"):
            plot_spectrum(folder.path / "plots" / "spectrum.png", spectra, summary["branches"])
        if twin is not None:
            summary["twin"] = {"folder": "twin" if recipe.twin is True else recipe.twin, **twin[0]}
        folder.write_json("summary.json", summary)
        print("\n" + table({**({"plain": twin[0]} if twin else {}), title: summary}), flush=True)
        finished = [(summary, spectrum)]
    broadcast_object_list(finished)
    result: Finished = finished[0]
    return result


def _export(state: TrainingState, data: Data, folder: RunFolder) -> None:
    """model/ in timm's Hub layout; a plain run has no branch to put beside it."""
    # safetensors takes no channels-last weights
    model = state.lowrank if state.recipe.lowrank_enabled else state.lowrank.unwrap()
    with folder.writing("model"):
        save_pretrained(model, folder.path / "model", label_names=list(data.class_names), data_config=data.data_config)


def _last_row(folder: RunFolder) -> dict[str, float | None]:
    """The last row of metrics.csv, read back: after a resume it may be from another process."""
    with (folder.path / "metrics.csv").open(newline="") as file:
        *_, row = csv.DictReader(file)
    return {name: float(value) if value else None for name, value in row.items()}
