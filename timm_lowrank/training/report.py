"""What a finished run says about itself: measurements, summary.json, spectrum.json and the table on the terminal."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.model import LowRankModel
from ..core.spectrum import singular_energies
from ..data.streamed import StreamedData
from ..errors import DivergedError, RunError
from .batches import TestBatches
from .data import Data
from .disk import read_json
from .state import TrainingState

DIRECTIONS = (1, 5, 10, 20, 50, 100, 500)
PACKAGES = ("timm_lowrank", "torch", "timm", "accelerate")
EFFECTIVE_SHARE = 0.99
KEPT_ENERGIES = 1000


@torch.no_grad()
def layer_energies(lowrank: LowRankModel, batches: TestBatches, limit: int | None) -> dict[str, Tensor]:
    """The squared singular values of every regularized layer's centred activations on test images, in float32.

    Args:
        lowrank: the wrapped network; switched on or off makes no difference.
        batches: of test images.
        limit: images to take; None takes all. Exact: all activations of these are held at once, in float32.

    Returns:
        For each layer its energies, (min(samples, features),), float64, descending.

    Raises:
        DivergedError: for a layer whose activations are all equal.
    """
    lowrank.eval()
    views = {tap.layer: tap.view for tap in lowrank.taps}  # the samples that the branch has seen
    kept: dict[str, list[Tensor]] = {}
    taken = 0
    for images, _ in batches:
        images = images if limit is None else images[: limit - taken]
        with lowrank.capture() as activations:
            lowrank.unwrap()(images)  # not the wrapper: once compiled, it does not see hooks that come later
        for layer, value in activations.items():
            kept.setdefault(layer, []).append(views[layer].rows(value.float()))
        taken += len(images)
        if taken == limit:
            break
    energies = {}
    for layer in list(kept):
        try:
            energies[layer] = singular_energies(torch.cat(kept.pop(layer))).cpu()
        except ValueError as error:
            raise DivergedError(f"the spectrum of layer {layer!r} cannot be measured: {error}") from error
    return energies


def layer_summary(energies: Tensor) -> dict[str, Any]:
    """Effective rank and variance ratios (paper, Section 3) from the energies of a layer, (n,), descending."""
    held = energies.cumsum(0) / energies.sum()
    ratios = {str(count): round(float(held[min(count, len(held)) - 1]), 6) for count in DIRECTIONS}
    return {"effective_rank": 1 + int((held < EFFECTIVE_SHARE - 1e-12).sum()), "variance_ratio": ratios}


def summarize(
    state: TrainingState,
    data: Data,
    energies: Mapping[str, Tensor],
    test: tuple[float, float],
    last: Mapping[str, float | None],
) -> dict[str, Any]:
    """The content of summary.json.

    Args:
        state: the run.
        data: what it was trained on.
        energies: from `layer_energies`.
        test: loss and accuracy on the test images.
        last: the last row of metrics.csv.
    """
    recipe, progress = state.recipe, state.progress
    branches = {}
    for layer, branch in state.lowrank.branches.items():
        branches[layer] = {
            "features": branch.num_features,
            "target_rank": branch.rank if recipe.lowrank_enabled else None,
            **layer_summary(energies[layer]),
            "losses": {key.removeprefix(f"{layer}."): value for key, value in last.items() if _is_part(key, layer)},
        }
    return {
        "name": recipe.name,
        "model": recipe.model,
        "lowrank": recipe.lowrank_enabled,
        "weights": "last" if state.ema is None else "averaged",
        "clean_accuracy": round(test[1], 6),
        "losses": {"train": last["train_loss"], "test": round(test[0], 6), "penalty": last.get("penalty")},
        "train_accuracy": last["train_accuracy"],
        "branches": branches,
        "epochs": progress.epoch,
        "optimizer_steps": progress.step,
        "seconds": round(progress.seconds, 2),
        "images_per_second": round(progress.step * recipe.batch_size / progress.seconds, 1),
        "device": _device(state.accelerator.device),
        "processes": state.accelerator.num_processes,
        "precision": recipe.precision,
        "seed": recipe.seed,
        "data": _data_summary(data),
        "versions": {
            "python": platform.python_version(),
            **{name: str(importlib.import_module(name).__version__) for name in PACKAGES},
        },
    }


def _is_part(key: str, layer: str) -> bool:
    return key.rpartition(".")[0] == layer


def _data_summary(data: Data) -> dict[str, Any]:
    return {
        "source": data.name,
        "fingerprint": data.fingerprint,
        "train_images": data.counts[0],
        "test_images": data.counts[1],
        "streamed": isinstance(data, StreamedData),
        "image_size": list(data.image_size),
        "classes": len(data.class_names),
    }


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)


def spectrum_content(energies: Mapping[str, Tensor]) -> dict[str, Any]:
    """The content of spectrum.json: of each layer the largest shares of the variance, descending."""
    shares = {layer: (values / values.sum())[:KEPT_ENERGIES] for layer, values in energies.items()}
    return {layer: [float(f"{share:.6g}") for share in values.tolist()] for layer, values in shares.items()}


def read_plain_run(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """summary.json and spectrum.json of a finished plain run.

    Raises:
        RunError: if they are not there, or the run was not a plain one.
    """
    if not (folder / "summary.json").exists():
        raise RunError(f"twin={str(folder)!r} holds no finished run (no summary.json): give another, or twin=true")
    summary = read_json(folder / "summary.json")
    if summary.get("lowrank") is not False:
        raise RunError(f"twin={str(folder)!r} is not a plain run: train one with --set lowrank.enabled=false")
    return summary, read_json(folder / "spectrum.json")


def table(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """Summaries side by side, for the terminal.

    Args:
        runs: title of a column -> content of summary.json.
    """
    summaries = list(runs.values())
    rows: list[tuple[str, Sequence[str]]] = [
        ("test accuracy", [_percent(s["clean_accuracy"]) for s in summaries]),
        ("seconds of training", [f"{s['seconds']:.0f}" for s in summaries]),
        ("images per second", [f"{s['images_per_second']:,.0f}" for s in summaries]),
    ]
    for layer, branch in summaries[-1]["branches"].items():
        rank = f", target rank {branch['target_rank']}" if branch["target_rank"] else ""
        rows += [("", []), (f"{layer}: {branch['features']:,} features{rank}", [])]
        columns = [s["branches"].get(layer) for s in summaries]
        rows.append(("  effective rank", [str(c["effective_rank"]) if c else "-" for c in columns]))
        for count in ("5", "10", "20"):
            cells = [_percent(c["variance_ratio"][count]) if c else "-" for c in columns]
            rows.append((f"  variance in {count} directions", cells))
    wide = max(len(name) for name, _ in rows) + 2
    lines = [" " * wide + "".join(f"{title:>12}" for title in runs)]
    lines += [f"{name:<{wide}}" + "".join(f"{cell:>12}" for cell in cells) for name, cells in rows]
    return "\n".join(line.rstrip() for line in lines)


def _percent(share: float) -> str:
    return f"{share:.1%}".replace("%", " %")
