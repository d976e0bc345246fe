"""`save_pretrained`: from a model to a folder, whole or not at all."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm.models
import torch
from torch import nn

from ..comparators import unfolded
from ..core.capture import evaluating
from ..core.model import LowRankModel
from ..errors import CheckpointError
from .branches import write_into
from .files import CHECKPOINT_FILES, NETWORK_CONFIG, NETWORK_WEIGHTS, staged
from .loading import _take_over_exactly, load_folder


def save_pretrained(
    model: LowRankModel | nn.Module,
    folder: str | os.PathLike[str],
    *,
    label_names: Sequence[str] | None = None,
    data_config: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model as `timm.create_model("local-dir:FOLDER", pretrained=True)` loads it, logits and all.

    Everything is written beside the folder first and moved in when it is whole: files that are there from before
    stay as they were if anything fails. `from_pretrained` is the inverse.

    Args:
        model: a `LowRankModel`, or a plain timm network (then only timm's two files are written), compiled or not.
        folder: is made if it does not exist; other files in it are left alone. "~" is the home folder, as for
            `from_pretrained`.
        label_names: one per class, in the order of the logits; None takes those that the network was loaded with.
        data_config: input_size, mean, std and so on of the images that the model was trained on, over the
            network's `pretrained_cfg`.

    Returns:
        The folder.

    Raises:
        CheckpointError: the network was not made by timm, or was changed since, so that what timm builds has other
            parameters or gives other logits (it is built and compared); it was made with features_only=True, or with
            classes or functions as arguments; it is one of `timm_lowrank.comparators` that was not folded; it is on
            the meta device; or there is not one label, a string, for each of its classes.
        CheckpointWriteError: (also an OSError) the disk is full or the folder cannot be written.
    """
    model = _uncompiled(model)
    backbone = _uncompiled(model.backbone) if isinstance(model, LowRankModel) else model
    if not getattr(backbone, "pretrained_cfg", None):
        raise CheckpointError(
            f"{type(backbone).__name__} is no timm network: it has no architecture name to be loaded by; "
            "save its state_dict() with safetensors instead"
        )
    if not hasattr(backbone, "num_classes"):
        raise CheckpointError(
            f"{type(backbone).__name__} has no num_classes, as what features_only=True makes of a network, and timm "
            "writes no config.json for it: save the network itself, and load that with features_only=True"
        )
    if layers := unfolded(backbone):
        raise CheckpointError(
            f"{layers[0]} has normalised or pruned weights, or nested classifiers, which timm could not load: "
            "timm_lowrank.comparators.fold(network) leaves plain weights with the same logits"
        )
    if label_names is not None:
        _check_labels(label_names, backbone.num_classes)
    made_with(backbone)  # raises before anything is written
    if any(tensor.is_meta for tensor in backbone.state_dict().values()):
        raise CheckpointError(
            f"{type(backbone).__name__} has tensors on the meta device, which hold no numbers that could be saved: "
            "load weights into it first"
        )
    folder = Path(folder).expanduser()
    if isinstance(model, LowRankModel):
        model.warn_of_no_weight()
    with staged(folder, CHECKPOINT_FILES) as staging:
        _write_backbone(backbone, staging, label_names, data_config)
        _check_rebuilt(backbone, staging)
        if isinstance(model, LowRankModel):
            write_into(staging, model, belong_to=[NETWORK_WEIGHTS])
    return folder


def made_with(network: nn.Module) -> dict[str, Any]:
    """The arguments that a network was given through timm, as far as timm keeps them: what config.json says of it.

    Raises:
        CheckpointError: JSON cannot hold one of them, so that the network could not be made again.
    """
    arguments = dict(getattr(network, "_model_args", None) or {})
    if unsayable := [name for name, value in arguments.items() if not _is_plain(value)]:
        raise CheckpointError(
            f"{type(network).__name__} was made with {', '.join(unsayable)} as Python objects, which config.json "
            'cannot hold: make it with their names in timm instead, such as act_layer="silu", and load this '
            "state_dict() into it"
        )
    return arguments


def _is_plain(value: object) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _check_labels(names: Sequence[str], classes: Any) -> None:
    """Raises CheckpointError unless there is one name, a string, for each class."""
    if isinstance(names, str | Mapping) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(
            f"label_names must be a list of strings, one per class in the order of the logits, not {names!r}"[:300]
        )
    if len(names) != classes:
        raise CheckpointError(f"{len(names)} label names for {classes} classes")


def _write_backbone(
    backbone: nn.Module, folder: Path, label_names: Sequence[str] | None, data_config: Mapping[str, Any] | None
) -> None:
    if label_names is None:  # at the root of config.json, where transformers looks for them
        known = dict(backbone.pretrained_cfg).get("label_names")  # type: ignore[arg-type]
        label_names = known if known and len(known) == backbone.num_classes else None
    backbone = _storable(backbone)
    # timm leaves them out, as the business of a training; but training goes on from these files.
    kinds = ("drop_rate", "drop_path_rate", "drop_block_rate")
    rates = {name: value for name, value in made_with(backbone).items() if name.endswith(kinds)}
    timm.models.save_for_hf(
        backbone,
        str(folder),
        model_config={"label_names": list(label_names)} if label_names is not None else None,
        model_args=rates or None,
        safe_serialization=True,
        data_config=dict(data_config) if data_config is not None else None,
    )
    path = folder / NETWORK_CONFIG
    config = json.loads(path.read_text())
    # The number of classes stands at the root; in model_args as well, transformers would pass it twice and fail.
    config.get("model_args", {}).pop("num_classes", None)
    if "label_names" in config:  # and not twice: those that the network was loaded with may be older
        config["pretrained_cfg"].pop("label_names", None)
    path.write_text(json.dumps(config, indent=2) + "\n")


def _storable(network: nn.Module) -> nn.Module:
    """The network, or a copy of it whose tensors share no memory and are contiguous, which safetensors insists on."""
    tensors = list(network.state_dict(keep_vars=True).values())
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}
    apart = len(storages) == sum(tensor.numel() > 0 for tensor in tensors)
    if apart and all(tensor.is_contiguous() for tensor in tensors):
        return network
    network = copy.deepcopy(network)
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(_separate(parameter), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _separate(buffer)
    return network


def _separate(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _uncompiled(model: nn.Module) -> nn.Module:
    """The module inside what `torch.compile` puts around it; a `LowRankModel` stays, whatever is compiled in it."""
    while isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
        model = inner
    return model


_WAY_OUT = (
    "Save its state_dict() with safetensors instead, or write the change as an architecture of its own and register it "
    "with timm (timm.models.register_model)"
)


def _check_rebuilt(backbone: nn.Module, folder: Path) -> None:
    """Raises CheckpointError unless what timm builds from the files is the network, as far as its logits tell."""
    name = type(backbone).__name__
    try:
        with torch.random.fork_rng(devices=[]):  # timm draws weights before it loads them
            rebuilt = load_folder(folder, lowrank=False)
            _take_over_exactly(rebuilt, folder)
    except CheckpointError as error:
        reason = str(error).replace(str(folder), "the checkpoint")
        raise CheckpointError(f"timm could not load this {name} again: {reason} {_WAY_OUT}") from error
    parameter = next(backbone.parameters(), None)
    size = dict(backbone.pretrained_cfg).get("input_size")  # type: ignore[arg-type]
    if parameter is None or size is None or parameter.is_meta:
        return
    channels = getattr(backbone, "in_chans", None) or size[0]
    images = torch.rand(1, channels, *size[1:], generator=torch.Generator().manual_seed(0)).to(parameter)
    with torch.random.fork_rng(devices=[]), evaluating(backbone):
        try:
            logits, again = backbone(images), backbone(images)
        except (RuntimeError, AssertionError):  # it takes images of another size: the parameters must do
            return
        other = rebuilt.to(parameter.device)(images)
    if not all(isinstance(one, torch.Tensor) for one in (logits, again, other)) or not torch.equal(logits, again):
        return
    close = 1e-2 * float(logits.abs().max())
    if logits.shape != other.shape or not torch.allclose(logits, other, rtol=0, atol=close):
        raise CheckpointError(
            f"timm would build this {name} with other logits: it was changed after timm had built it, in a way that "
            f"leaves no trace in its weights (an activation, a pooling or a stride, for example). {_WAY_OUT}"
        )
