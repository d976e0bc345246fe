"""What a finished run says about itself: the spectra of its layers, its summary, a table and a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.capture import evaluating
from ..core.model import LowRankModel
from ..core.spectrum import Sketch, rank_of_ratios, singular_energies
from ..data import Data, StreamedData
from ..data.batches import TestBatches
from ..drawing import INK, LOWRANK, PLAIN, dress, new_figure, share_tick, write_png
from ..environment import device_name, versions
from ..errors import DivergedError
from ..text import columns, percent
from .loop import Tested
from .run import TWIN, BranchSummary, ComparatorSummary, DataSummary, EpochMetrics, Losses, Spectrum, Summary
from .state import TrainingState

DIRECTIONS = (1, 5, 10, 20, 50, 100, 500)
PACKAGES = ("timm_lowrank", "torch", "timm", "accelerate")
EFFECTIVE_SHARE = 0.99
KEPT_SHARES = 1000
SKETCH_SIZE = 1000  # twice the largest of DIRECTIONS
HELD_BYTES = 2**30  # of activations, all layers together
_SAMPLES = {"flatten": "", "token": " of each token", "pool": " of the mean token"}


# ------------------------------------------------------------------------------------------------------------- spectra


@dataclasses.dataclass(frozen=True)
class LayerSpectrum:
    """The spectrum of the centred activations of a layer on test images (paper, Section 3)."""

    shares: list[float]  # of the variance, in its first at most 1,000 directions, descending, with six digits
    variance_ratio: dict[int, float]  # for each of DIRECTIONS
    effective_rank: int


@torch.no_grad()
def layer_spectra(
    lowrank: LowRankModel,
    batches: TestBatches,
    limit: int | None,
    *,
    layers: Collection[str] | None = None,
    held_bytes: int = HELD_BYTES,
    sketch_size: int = SKETCH_SIZE,
) -> dict[str, LayerSpectrum]:
    """The spectrum of every regularized layer on test images, of activations in float32.

    Exact as long as all activations together take at most `held_bytes`. Beyond that, layers with more than
    2 * sketch_size samples are summarised by a `Sketch`, whose variance ratios are certified lower ends and whose
    effective rank is a certified upper end; where it certifies none, the layer is read again with a larger one.

    Args:
        lowrank: the wrapped network; switched on or off makes no difference.
        batches: of test images.
        limit: images to take; None takes all.
        layers: which ones; None are all.
        held_bytes: of activations, held at most before sketches are used.
        sketch_size: of a `Sketch`.

    Raises:
        DivergedError: for a layer whose activations are all equal.
    """
    views = {tap.layer: tap.view for tap in lowrank.taps if layers is None or tap.layer in layers}
    held: dict[str, list[Tensor] | Sketch] = {layer: [] for layer in views}
    taken = 0
    for images, _ in batches:
        images = images if limit is None else images[: limit - taken]
        with evaluating(lowrank), lowrank.capture() as activations:
            lowrank.backbone(images)  # not the wrapper: once compiled, it does not see hooks that come later
        for layer, view in views.items():  # the samples that the branch has seen
            kept, rows = held[layer], view.rows(activations[layer].float())
            kept.update(rows) if isinstance(kept, Sketch) else kept.append(rows)
        _sketch_the_largest(held, held_bytes, sketch_size)
        taken += len(images)
        if taken == limit:
            break
    spectra: dict[str, LayerSpectrum | None] = {}
    for layer in views:
        try:
            spectra[layer] = _spectrum(held.pop(layer))
        except ValueError as error:
            raise DivergedError(f"the spectrum of layer {layer!r} cannot be measured: {error}") from error
    certain = {layer: spectrum for layer, spectrum in spectra.items() if spectrum is not None}
    if uncertain := spectra.keys() - certain:
        certain |= layer_spectra(
            lowrank, batches, limit, layers=uncertain, held_bytes=held_bytes, sketch_size=2 * sketch_size
        )
    return {layer: certain[layer] for layer in views}


def _sketch_the_largest(held: dict[str, list[Tensor] | Sketch], most: int, size: int) -> None:
    """Replaces activations by sketches, the largest first, until what is held is at most `most` bytes."""
    in_full = {layer: kept for layer, kept in held.items() if isinstance(kept, list)}
    taken = {layer: sum(rows.nbytes for rows in kept) for layer, kept in in_full.items()}
    for layer, kept in sorted(in_full.items(), key=lambda item: -taken[item[0]]):
        if sum(taken.values()) <= most:
            break
        if sum(map(len, kept)) > 2 * size:  # a sketch of fewer samples would not be smaller than they are
            held[layer] = Sketch.of(kept, size)
            del taken[layer]


def _spectrum(kept: list[Tensor] | Sketch) -> LayerSpectrum | None:
    """None if it is a sketch too small to certify the effective rank."""
    if isinstance(kept, Sketch):
        energies = kept.energies().cpu()
        ratios = dict(zip(DIRECTIONS, (low for low, _ in kept.variance_ratio(DIRECTIONS)), strict=True))
        total = kept.total
        try:
            rank = kept.effective_rank(EFFECTIVE_SHARE)[1]
        except ValueError:
            return None
    else:
        energies = singular_energies(torch.cat(kept)).cpu()
        total = float(energies.sum())
        reached = energies.cumsum(0) / total
        ratios = {count: float(reached[min(count, len(reached)) - 1]) for count in DIRECTIONS}
        rank = rank_of_ratios(reached.tolist(), EFFECTIVE_SHARE)
    shares = [float(f"{share:.6g}") for share in (energies[:KEPT_SHARES] / total).tolist()]
    return LayerSpectrum(shares, ratios, rank)


# ------------------------------------------------------------------------------------------------------------- summary


def summarize(
    state: TrainingState,
    data: Data,
    spectra: Mapping[str, LayerSpectrum],
    test: Tested,
    last: EpochMetrics,
    comparator: ComparatorSummary | None = None,
    twin: Summary | None = None,
) -> Summary:
    """The summary of a run.

    Args:
        state: the run.
        data: what it was trained on.
        spectra: from `layer_spectra`.
        test: loss and accuracy on the test images, of the network that is exported.
        last: the last row of metrics.csv.
        comparator: what was trained in the place of the branches.
        twin: the summary of the plain twin.
    """
    recipe, progress = state.recipe, state.progress
    branches = {
        layer: BranchSummary(
            features=branch.num_features,
            target_rank=branch.rank if recipe.lowrank_enabled else None,
            effective_rank=spectra[layer].effective_rank,
            variance_ratio={count: round(ratio, 6) for count, ratio in spectra[layer].variance_ratio.items()},
            losses=last.branches.get(layer, {}),
            view=branch.view,
        )
        for layer, branch in state.lowrank.branches.items()
    }
    return Summary(
        name=recipe.name,
        model=recipe.model,
        lowrank=recipe.lowrank_enabled,
        comparator=comparator,
        weights="last" if state.ema is None else "averaged",
        clean_accuracy=round(test.accuracy, 6),
        losses=Losses(train=last.train_loss, test=round(test.loss, 6), penalty=last.penalty),
        train_accuracy=last.train_accuracy,
        branches=branches,
        epochs=progress.epoch,
        optimizer_steps=progress.step,
        seconds=round(progress.seconds, 2),
        images_per_second=round(progress.step * recipe.batch_size / progress.seconds, 1),
        device=device_name(state.accelerator.device),
        processes=state.accelerator.num_processes,
        precision=recipe.precision,
        seed=recipe.seed,
        data=DataSummary(
            source=data.name,
            fingerprint=data.fingerprint,
            train_images=data.counts[0],
            test_images=data.counts[1],
            streamed=isinstance(data, StreamedData),
            image_size=tuple(data.image_size),
            classes=len(data.class_names),
            origin=data.origin,
        ),
        versions=versions(PACKAGES),
        twin=twin,
        twin_folder=None if twin is None else TWIN if recipe.twin is True else str(recipe.twin),
        twin_alike=twin is not None,
    )


def table(runs: Mapping[str, Summary]) -> str:
    """Summaries side by side, title -> summary, for the terminal; the layers are those of the last one."""
    summaries = list(runs.values())
    rows = [
        ["", *runs],
        ["test accuracy", *(f"{percent(s.clean_accuracy)} %" for s in summaries)],
        ["seconds of training", *(f"{s.seconds:.0f}" for s in summaries)],
        ["images per second", *(f"{s.images_per_second:,.0f}" for s in summaries)],
    ]
    for layer, branch in summaries[-1].branches.items():
        rank = f", target rank {branch.target_rank}" if branch.target_rank else ""
        here = [s.branches.get(layer) for s in summaries]
        same = [b if b and b.view.agrees(branch.view) else None for b in here]
        rows += [[], [f"{layer}: {branch.features:,} features{_SAMPLES[branch.view.kind]}{rank}"]]
        rows.append(["  effective rank", *(str(b.effective_rank) if b else "-" for b in same)])
        for count in (5, 10, 20):
            cells = [f"{percent(b.variance_ratio[count])} %" if b else "-" for b in same]
            rows.append([f"  variance in {count} directions", *cells])
    return columns(rows, right=range(1, len(runs) + 1), gap=4)


# ------------------------------------------------------------------------------------------------------------- picture


def plot_spectrum(path: Path, runs: Mapping[str, Spectrum], branches: Mapping[str, BranchSummary]) -> None:
    """Draws a PNG of the variance ratio against the number of directions, a panel for each layer.

    Args:
        path: of the PNG; its folder is made.
        runs: title -> spectrum. The last run is the one that the picture is about; those before it are references.
        branches: the layers of that run.
    """
    width, height = 0.8 + 4.2 * len(branches), 3.6
    figure = new_figure(width, height)
    # In inches, which what is written here needs: a general layout measures every label, a third of the time.
    figure.subplots_adjust(
        left=0.75 / width, right=1 - 0.15 / width, bottom=0.5 / height, top=1 - 0.35 / height, wspace=0.06
    )
    panels = figure.subplots(1, len(branches), squeeze=False, sharey=True)[0]
    for panel, (layer, branch) in zip(panels, branches.items(), strict=True):
        _draw(panel, {title: run[layer] for title, run in runs.items() if layer in run}, branch.target_rank)
        panel.set_title(f"{layer}, {branch.features:,} features", fontsize=10, color=INK, loc="left")
    panels[0].set_ylabel("share of test variance", fontsize=9, color=INK)
    panels[0].legend(frameon=False, fontsize=9, labelcolor=INK, loc="lower right")
    write_png(figure, path, laid_out=True)


def _draw(panel: Any, runs: Mapping[str, Sequence[float]], rank: int | None) -> None:
    curves = {title: [min(held, 1.0) for held in accumulate(shares)] for title, shares in runs.items()}
    longest = max(len(curve) for curve in curves.values())
    for number, (title, curve) in enumerate(curves.items(), start=1):
        about = number == len(curves) and title != "plain"
        style = {"color": LOWRANK, "linewidth": 2.2} if about else {"color": PLAIN, "linewidth": 1.6, "linestyle": "--"}
        panel.plot(range(1, len(curve) + 1), curve, label=title, **style)
    if len(curves) == 2:
        one, two = curves.values()
        shared = min(len(one), len(two))
        panel.fill_between(range(1, shared + 1), one[:shared], two[:shared], color=LOWRANK, alpha=0.10, linewidth=0)
    if rank and rank <= longest:
        panel.axvline(rank, color=INK, linewidth=0.8, linestyle=":")
        panel.annotate(
            f"target rank {rank}", (rank, 0.03), rotation=90, fontsize=7.5,
            color=INK, ha="right", va="bottom", xytext=(-2, 0), textcoords="offset points",
        )  # fmt: skip
    panel.set_xscale("log")
    panel.set_xlim(1, max(longest, 2))
    if longest > 10:
        panel.minorticks_off()  # without a label they are invisible, and a third of the time
    panel.set_ylim(0, 1.02)
    panel.set_xlabel("directions", fontsize=9, color=INK)
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.yaxis.set_major_formatter(share_tick)
    dress(panel)
