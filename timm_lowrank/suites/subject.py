"""`Subject`: a network that is evaluated, from a run folder, a checkpoint or timm."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from ..core.views import View
from ..errors import EvaluationError
from ..evaluation import PixelModel
from ..files import read_json
from ..layers import create_backbone
from ..training import Recipe, load_recipe


@dataclasses.dataclass(frozen=True)
class Subject:
    """One network, in eval mode, and what is known of how it came about."""

    title: str
    path: str
    model: PixelModel
    architecture: str
    branches: dict[str, int]  # target rank of each regularized layer; empty for a plain network
    layers: tuple[str, ...]  # those that its run measured, regularized or not
    recipe: Recipe | None
    data_fingerprint: str | None
    weights: str  # SHA-256 of all parameters and buffers
    views: dict[str, View] = dataclasses.field(default_factory=dict)  # of the branches, where they are not flattened

    @property
    def network(self) -> nn.Module:
        return self.model.network

    def description(self) -> dict[str, Any]:
        """The entry in evaluation.json."""
        return {
            "title": self.title,
            "path": self.path,
            "model": self.architecture,
            "parameters": sum(parameter.numel() for parameter in self.network.parameters()),
            "branches": self.branches,
            "weights": self.weights,
        }


def load_subject(where: str, title: str | None = None) -> Subject:
    """Loads a network.

    Args:
        where: a run folder of recipes/train.py, a folder written by `save_pretrained`, a repository on the Hub
            ("hf-hub:USER/NAME"), or the name of a timm network with pretrained weights.
        title: what the report calls it; None is made of its branches: "1-LR", "2-LR", "low rank" or "plain".

    Raises:
        EvaluationError: there is nothing to load, or it cannot be loaded.
    """
    folder = Path(where)
    if folder.is_dir():
        return _from_folder(folder, title)
    if folder.exists() or where.startswith((".", "/")) or where.endswith("/"):
        raise EvaluationError(
            f"{where} is no run folder: give the folder that recipes/train.py wrote, a folder with config.json and "
            "model.safetensors, hf-hub:USER/NAME, or the name of a timm network"
        )
    try:
        network = create_backbone(where, pretrained=True)
    except (ValueError, OSError, RuntimeError) as error:
        raise EvaluationError(f"{where} is neither a folder here nor a network that can be loaded: {error}") from error
    return _subject(network, title, where, {}, None, None)


def _from_folder(folder: Path, title: str | None) -> Subject:
    run = (folder / "config.yaml").exists()
    checkpoint = folder / "model" if run else folder
    if run and not (folder / "summary.json").exists():
        raise EvaluationError(f"{folder} is a run that is not finished (no summary.json): resume it first")
    if not (checkpoint / "config.json").exists():
        raise EvaluationError(f"{folder} holds neither a finished run nor a checkpoint (no config.json)")
    try:
        network = timm.create_model(f"local-dir:{checkpoint}", pretrained=True)
    except Exception as error:  # timm passes on what json, safetensors, torch and its own registry raise
        raise EvaluationError(f"the checkpoint {checkpoint} cannot be loaded: {error}") from error
    description = checkpoint / "lowrank.json"
    branches = read_json(description)["layers"] if description.exists() else {}
    summary = read_json(folder / "summary.json") if run else None
    recipe = load_recipe(folder / "config.yaml") if run else None
    ranks = {layer: spec["rank"] for layer, spec in branches.items()}
    views = {layer: View(spec.get("view", "flatten"), spec.get("channel_dim", 1)) for layer, spec in branches.items()}
    subject = _subject(network, title, str(folder), ranks, summary, recipe)
    return dataclasses.replace(subject, views={name: view for name, view in views.items() if view.kind != "flatten"})


def _subject(
    network: nn.Module,
    title: str | None,
    path: str,
    branches: dict[str, int],
    summary: dict[str, Any] | None,
    recipe: Recipe | None,
) -> Subject:
    trained = summary is None or summary["lowrank"]
    branches = branches if trained else {}
    return Subject(
        title=title or _title(branches),
        path=path,
        model=PixelModel(network.eval()).eval(),
        architecture=str(dict(getattr(network, "pretrained_cfg", {})).get("architecture", type(network).__name__)),
        branches=branches,
        layers=tuple(summary["branches"] if summary else branches),
        recipe=recipe,
        data_fingerprint=summary["data"]["fingerprint"] if summary else None,
        weights=_weights(network),
    )


def _title(branches: dict[str, int]) -> str:
    if not branches:
        return "plain"
    if set(branches) == {"pre_logits"}:
        return "1-LR"
    return "2-LR" if len(branches) == 2 and "pre_logits" in branches else "low rank"


def _weights(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
