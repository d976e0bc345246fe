"""Parts of `LowRankTask`: wrapping once, finding the optimizer that takes hooks, the branches' part of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.config import LowRankConfig
from ..core.model import LowRankModel
from ..wrapping import wrap


def wrapped_once(model: nn.Module, config: LowRankConfig | None, example_input: Tensor | None) -> LowRankModel:
    """`model` itself if it is a `LowRankModel`, else wrapped; see `LowRankTask` for what it raises."""
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("the layers of a scripted network cannot be read: train without torchscript")
    if not isinstance(model, LowRankModel):
        return wrap(model, config, example_input=example_input)
    if config is not None or example_input is not None:
        raise TypeError("the network is wrapped already: leave out lowrank and example_input, or pass model.unwrap()")
    return model


def saved_branches(model: LowRankModel) -> dict[str, Any]:
    """W, b, counters and configuration of all branches, in tensors and plain values."""
    return {
        "branches": dict(model.branches.state_dict()),
        "sizes": _sizes(model),
        "config": model.lowrank_config.to_dict(),
    }


def load_branches(model: LowRankModel, saved: Mapping[str, Any], strict: bool = True) -> None:
    """The inverse of `saved_branches`, for a model with branches of the same sizes on the same layers.

    Raises:
        ValueError: the saved branches sit on other layers, or have other widths or ranks.
    """
    found = {layer: list(sizes) for layer, sizes in saved["sizes"].items()}
    if found != _sizes(model):
        raise ValueError(
            f"the checkpoint's branches are {_listed(found)}, those of this task {described(model)}; "
            "resume with the branches and the image size that it was trained with"
        )
    model.branches.load_state_dict(saved["branches"], strict=strict)


def described(model: LowRankModel) -> str:
    """The branches in words, for logs and errors."""
    return _listed(_sizes(model))


def _sizes(model: LowRankModel) -> dict[str, list[int]]:
    """Layer to [features, rank]."""
    return {layer: [branch.num_features, branch.rank] for layer, branch in model.branches.items()}


def _listed(sizes: Mapping[str, list[int]]) -> str:
    return ", ".join(f"{layer} (rank {rank} of {width})" for layer, (width, rank) in sizes.items())
