"""`read_run`: everything that is known of a finished run of recipes/train.py, checked before anything is sent."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from ..checkpoint import LOWRANK_CONFIG, NETWORK_CONFIG, NETWORK_WEIGHTS, CheckpointError, sha256_of, verify
from ..checkpoint.files import known_architecture, read_json
from ..checkpoint.loading import load_folder
from .figures import CLEAN, Measured, check_evaluation, measured, share_of

PICTURES = (".png", ".svg", ".jpg", ".webp")
_SUMMARY = {"name": str, "model": str, "lowrank": bool, "clean_accuracy": float, "branches": dict, "data": dict}


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """A finished run: its files as they were read, and its place in its evaluation."""

    folder: Path
    recipe: Mapping[str, Any]
    summary: Mapping[str, Any]
    network: Mapping[str, Any]  # config.json
    lowrank: Mapping[str, Any] | None  # lowrank.json; None for a plain run
    sha256: str  # of model.safetensors
    evaluation: Mapping[str, Any] | None  # evaluation.json
    title: str | None  # of this network in it
    plain_title: str | None  # of its plain twin there, if that was evaluated too
    plots: tuple[str, ...]  # names in plots/, sorted

    @property
    def checkpoint(self) -> Path:
        """The folder of the network itself."""
        return self.folder / "model"

    @property
    def architecture(self) -> str:
        """timm's name of the network."""
        return str(self.network["architecture"])

    @property
    def twin(self) -> Mapping[str, Any] | None:
        """The summary of the plain twin, if one was trained beside it."""
        twin = self.summary.get("twin")
        return twin if isinstance(twin, Mapping) and "branches" in twin else None

    @property
    def clean(self) -> Measured:
        """Accuracy on all test images of the run."""
        return _clean(self.summary)

    @property
    def plain_clean(self) -> Measured | None:
        return _clean(self.twin) if self.twin else self.plain(CLEAN)

    def figure(self, key: str) -> Mapping[str, Any] | None:
        """A figure of evaluation.json by its key."""
        figures = self.evaluation["figures"] if self.evaluation else ()
        return next((figure for figure in figures if figure["key"] == key), None)

    def own(self, key: str) -> Measured | None:
        """The value of this network; None where it was not measured."""
        return measured(self.figure(key), self.title)

    def plain(self, key: str) -> Measured | None:
        """The value of the plain twin; None where it was not measured."""
        return measured(self.figure(key), self.plain_title)

    def effective_rank(self, layer: str) -> tuple[int | None, int | None]:
        """Directions that hold 99 % of the variance of a layer's test activations, here and in the plain twin."""
        ours = self.summary["branches"].get(layer) or {}
        theirs = (self.twin or {"branches": {}})["branches"].get(layer) or {}
        own, plain = self.own(f"effective-rank-{layer}"), self.plain(f"effective-rank-{layer}")
        return (
            int(own.value) if own else ours.get("effective_rank"),
            int(plain.value) if plain else theirs.get("effective_rank"),
        )


def read_run(folder: Path, *, sha256: str | None = None) -> RunRecord:
    """Reads and checks a run.

    Args:
        folder: as recipes/train.py wrote it, with evaluation.json if it was evaluated.
        sha256: what model.safetensors must have; None takes any.

    Raises:
        CheckpointError: no run, not finished, damaged, other weights than expected, or an evaluation of others.
    """
    _require_finished(folder)
    verify(folder / "model", sha256=sha256)
    summary = read_json(folder / "summary.json")
    wrong = [key for key, kind in _SUMMARY.items() if not isinstance(summary.get(key), kind)]
    if wrong or not {"source", "test_images", "train_images"} <= summary["data"].keys():
        raise CheckpointError(f"{folder / 'summary.json'} lacks {', '.join(wrong or ['data'])}: run the training again")
    network = read_json(folder / "model" / NETWORK_CONFIG)
    known_architecture(network, folder / "model")
    lowrank = folder / "model" / LOWRANK_CONFIG
    evaluation, title, plain = _read_evaluation(folder)
    return RunRecord(
        folder=folder,
        recipe=_read_recipe(folder / "config.yaml"),
        summary=summary,
        network=network,
        lowrank=read_json(lowrank) if lowrank.is_file() and summary["lowrank"] else None,
        sha256=sha256_of(folder / "model" / NETWORK_WEIGHTS),
        evaluation=evaluation,
        title=title,
        plain_title=plain,
        plots=tuple(sorted(p.name for p in folder.glob("plots/*") if p.is_file() and p.suffix.lower() in PICTURES)),
    )


def weights_digest(network: nn.Module) -> str:
    """The sha256 by which evaluation.json names a network: of names, shapes, dtypes and bytes of its state."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.float().state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _require_finished(folder: Path) -> None:
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(f"{folder} {what}: give the folder of a finished run of recipes/train.py")
    if not (folder / "config.yaml").is_file():
        hint = (
            " It is a checkpoint: timm_lowrank.push_to_hub publishes it." if (folder / NETWORK_CONFIG).exists() else ""
        )
        raise CheckpointError(
            f"{folder} holds no config.yaml, so it is no run: give the folder that recipes/train.py wrote.{hint}"
        )
    if not (folder / "summary.json").is_file():
        raise CheckpointError(
            f"the run in {folder} has not come to its end (there is no summary.json): continue it with "
            "recipes/train.py --resume auto"
        )
    if not (folder / "model" / NETWORK_CONFIG).is_file():
        raise CheckpointError(
            f"{folder} holds no model/{NETWORK_CONFIG}: the network of this run is gone; train it again"
        )


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CheckpointError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise CheckpointError(f"{path} must hold the keys of a recipe")
    return recipe


def _read_evaluation(folder: Path) -> tuple[dict[str, Any] | None, str | None, str | None]:
    """evaluation.json, and the titles of this network and of its plain twin in it."""
    path = folder / "evaluation.json"
    if not path.is_file():
        return None, None, None
    evaluation = read_json(path)
    check_evaluation(evaluation, path)
    digest = weights_digest(load_folder(folder / "model", lowrank=False))
    networks = evaluation["networks"]
    own = next((network["title"] for network in networks if network.get("weights") == digest), None)
    if own is None:
        raise CheckpointError(
            f"{path} is not about the weights in {folder / 'model'}: the network was trained again since, or the file "
            "is another run's. Evaluate again with recipes/evaluate.py --overwrite, or delete it to publish without"
        )
    plain = (network["title"] for network in networks if network["title"] != own and not network.get("branches"))
    return evaluation, own, next(plain, None)


def _clean(summary: Mapping[str, Any]) -> Measured:
    return share_of(summary["clean_accuracy"], summary["data"]["test_images"])
