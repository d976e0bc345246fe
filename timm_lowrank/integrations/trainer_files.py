"""What a checkpoint of transformers.Trainer holds: the model, lowrank.json and lowrank.safetensors."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..checkpoint import FORMAT, LOWRANK_CONFIG, LOWRANK_WEIGHTS, CheckpointError, sha256_of
from ..core.model import LowRankModel


def has_branches(folder: str | os.PathLike[str]) -> bool:
    """Whether `write_branches` has written to this folder."""
    return all((Path(folder) / name).is_file() for name in (LOWRANK_CONFIG, LOWRANK_WEIGHTS))


def write_branches(lowrank: LowRankModel, folder: str | os.PathLike[str]) -> None:
    """W, b and the counters of every branch, and the configuration; the network's own files are left alone.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.contiguous().cpu() for key, value in lowrank.branches.state_dict().items()}
    staged = {name: folder / f".writing-{name}" for name in (LOWRANK_WEIGHTS, LOWRANK_CONFIG)}
    save_file(tensors, staged[LOWRANK_WEIGHTS], metadata={"format": "pt"})
    description = {
        "format": FORMAT,
        "config": lowrank.lowrank_config.to_dict(),
        "enabled": lowrank.enabled,
        "layers": _layers(lowrank),
        "sha256": {LOWRANK_WEIGHTS: sha256_of(staged[LOWRANK_WEIGHTS])},
    }
    staged[LOWRANK_CONFIG].write_text(json.dumps(description, indent=2) + "\n")
    for name, path in staged.items():
        os.replace(path, folder / name)


def read_branches(lowrank: LowRankModel, folder: str | os.PathLike[str]) -> None:
    """The inverse of `write_branches`, bit for bit, into branches on the same layers and of the same ranks.

    Raises:
        CheckpointError: nothing there, files that are damaged, or branches on other layers.
    """
    folder = Path(folder)
    if not has_branches(folder):
        raise CheckpointError(f"{folder} holds no {LOWRANK_CONFIG} and {LOWRANK_WEIGHTS}, so no branches")
    try:
        description = json.loads((folder / LOWRANK_CONFIG).read_text())
        layers, digest = description["layers"], description["sha256"][LOWRANK_WEIGHTS]
        if sha256_of(folder / LOWRANK_WEIGHTS) != digest:
            raise CheckpointError(f"{folder / LOWRANK_WEIGHTS} was damaged or exchanged: its sha256 is another one")
        if layers != _layers(lowrank):
            raise CheckpointError(
                f"the branches in {folder} are {_shown(layers)}, and those of this model {_shown(_layers(lowrank))}: "
                "go on with the configuration that they were trained with, or start a new run"
            )
        lowrank.branches.load_state_dict(load_file(folder / LOWRANK_WEIGHTS))
        lowrank.enable(bool(description["enabled"]))
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"the branches in {folder} cannot be read: {error}") from error


def read_network(model: Any, folder: str | os.PathLike[str]) -> None:
    """Load the weights of a `PreTrainedModel` as `from_pretrained` does, which knows the names of earlier versions."""
    with torch.random.fork_rng(devices=[]):
        saved = type(model).from_pretrained(folder, config=copy.deepcopy(model.config))
    model.load_state_dict(saved.state_dict())


def _layers(lowrank: LowRankModel) -> dict[str, dict[str, int]]:
    return {
        layer: {"rank": branch.rank, "num_features": branch.num_features} for layer, branch in lowrank.branches.items()
    }


def _shown(layers: dict[str, dict[str, int]]) -> str:
    return ", ".join(f"{layer} (rank {size['rank']} of {size['num_features']})" for layer, size in layers.items())
