"""Networks that other programs trained, as these leave them: timm's train.py and the Trainer of transformers."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.data import resolve_data_config
from timm.data.loader import adapt_to_chs
from timm.models import clean_state_dict
from torch import nn

from ..checkpoint.branches import BranchDescription, read_description
from ..checkpoint.loading import in_layout_of_transformers
from ..environment import require
from ..errors import CheckpointError, EvaluationError
from ..files import parse_yaml, read_json
from ..layers import create_backbone

ARGUMENTS = "args.yaml"  # timm's train.py writes it beside its checkpoints
BEST, LAST = "model_best.pth.tar", "last.pth.tar"
PICKLED = (".pth.tar", ".pth", ".pt")


@dataclasses.dataclass(frozen=True)
class Resizing:
    """How images are brought to the size that a network takes: see `load_data`."""

    image_size: int
    crop_pct: float = 1.0

    @classmethod
    def of(cls, size: Sequence[int], crop_pct: float, where: str) -> Resizing:
        """Of (height, width). Raises EvaluationError unless they are equal."""
        height, width = size
        if height != width:
            raise EvaluationError(f"{where} takes images of {height} x {width} pixels: only square ones are made here")
        return cls(int(height), float(crop_pct))


@dataclasses.dataclass(frozen=True)
class ForeignNetwork:
    """A network in eval mode, and what its files say of the images that it takes."""

    network: nn.Module
    mean: tuple[float, ...]  # of each channel, of pixels in [0, 1]
    std: tuple[float, ...]
    resizing: Resizing | None  # None: images stay as they are
    untrained: Callable[[], nn.Module]  # the same architecture with random weights
    branches: BranchDescription | None = None


def load_foreign(path: Path) -> ForeignNetwork | None:
    """The network of a checkpoint of timm's train.py, or of a model that transformers saved; None of anything else.

    Args:
        path: a folder with args.yaml and model_best.pth.tar or last.pth.tar (the best is taken where there are both),
            one checkpoint file of it, or what `save_pretrained` of an image classifier of transformers wrote.

    Raises:
        EvaluationError: it cannot be loaded, or something is missing beside it.
    """
    if path.is_file():
        return _of_timm(path) if path.name.endswith(PICKLED) else None
    there = [path / name for name in (BEST, LAST) if (path / name).is_file()]
    if (path / "config.json").is_file():
        try:
            config = read_json(path / "config.json")
        except CheckpointError as error:
            raise EvaluationError(str(error)) from error
        return _of_transformers(path) if in_layout_of_transformers(path, config) else None
    if there:
        return _of_timm(there[0])
    if (path / ARGUMENTS).is_file():
        raise EvaluationError(
            f"{path} holds {ARGUMENTS} of timm's train.py, but neither {BEST} nor {LAST}: name the checkpoint itself"
        )
    return None


# ----------------------------------------------------------------------------------------------------- timm's train.py


def _of_timm(path: Path) -> ForeignNetwork:
    """Averaged weights where there are some, as timm's own validate.py --use-ema: the best epoch was chosen by them."""
    checkpoint = _unpickled(path)
    arguments = _arguments(path, checkpoint)
    channels = arguments.get("in_chans") or (arguments.get("input_size") or [3])[0]
    extra = arguments.get("model_kwargs") or {}
    create = functools.partial(
        create_backbone, str(arguments["model"]), pretrained=False, in_chans=channels,
        num_classes=arguments.get("num_classes"), global_pool=arguments.get("gp"), bn_eps=arguments.get("bn_eps"),
        bn_momentum=arguments.get("bn_momentum"), **extra,
    )  # fmt: skip
    state = checkpoint.get("state_dict_ema") or checkpoint.get("state_dict")
    if not isinstance(state, Mapping):
        raise EvaluationError(f"{path} holds no state_dict, so it is no checkpoint of timm's train.py")
    try:
        network = create()
        network.load_state_dict(clean_state_dict(dict(state)))
        data = resolve_data_config(arguments, model=network)
    except Exception as error:  # timm's constructors raise whatever a wrong argument leads to
        reason = " ".join(str(error).split())[:400]
        raise EvaluationError(
            f"the {arguments['model']} that {path.parent / ARGUMENTS} describes cannot be loaded from {path.name}: "
            f"{reason}"
        ) from error
    mean, std = (adapt_to_chs(tuple(data[name]), channels) for name in ("mean", "std"))  # as its loader does
    return ForeignNetwork(
        network=network.eval(),
        mean=tuple(mean),
        std=tuple(std),
        resizing=Resizing.of(data["input_size"][1:], data["crop_pct"], str(path)),
        untrained=create,
        branches=_described(checkpoint.get("task_state"), path),
    )


def _unpickled(path: Path) -> dict[str, Any]:
    """Tensors and plain values; whatever else a pickle asks for is refused before it can run."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the arguments of train.py
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise EvaluationError(
            f"{path} holds more than tensors and plain values, and pickles can run any code, so it was not loaded. If "
            "you trust its author, load it with timm yourself and write the network with timm_lowrank.save_pretrained"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise EvaluationError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}: copy it again") from error
    if not isinstance(checkpoint, dict):
        raise EvaluationError(f"{path} holds a {type(checkpoint).__name__}: it is no checkpoint of timm's train.py")
    return checkpoint


def _arguments(path: Path, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Those of train.py, from args.yaml, else from the checkpoint itself."""
    written = path.parent / ARGUMENTS
    inside = checkpoint.get("args")
    arguments: Any = dict(vars(inside)) if isinstance(inside, argparse.Namespace) else None
    if written.is_file():
        try:
            arguments = parse_yaml(written.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise EvaluationError(f"{written} cannot be read: {error}") from error
    if not isinstance(arguments, dict) or not isinstance(arguments.get("model"), str):
        raise EvaluationError(
            f"{path} does not say which network it is of: put the {ARGUMENTS} beside it that timm's train.py wrote"
        )
    return arguments


def _described(state: Any, path: Path) -> BranchDescription | None:
    """What a `LowRankTask` left there of its branches."""
    if not isinstance(state, Mapping) or "config" not in state:
        return None
    from ..integrations.timm_task import described

    try:
        return described(state, str(path))
    except CheckpointError as error:
        raise EvaluationError(str(error)) from error


# -------------------------------------------------------------------------------------------------------- transformers


def _of_transformers(folder: Path) -> ForeignNetwork:
    """The network inside a TimmWrapper, whose layers go by their names in timm, or the model itself."""
    transformers = require("transformers", "transformers")
    automatic = transformers.AutoModelForImageClassification
    try:
        model = automatic.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        described = read_description(folder)
    except Exception as error:  # transformers passes on what json, safetensors and torch raise
        reason = " ".join(str(error).split())[:400]
        raise EvaluationError(
            f"transformers cannot load the model in {folder}: {type(error).__name__}: {reason}"
        ) from error
    processing = _processing(transformers, folder)
    inner = getattr(model, "timm_model", None)
    network = inner if isinstance(inner, nn.Module) else model
    if processing is None:
        config = dict(getattr(inner, "pretrained_cfg", None) or {})
        if not {"mean", "std", "input_size"} <= config.keys():
            raise EvaluationError(
                f"{folder} does not say how its images are normalised: save the image processor there, too "
                "(processor.save_pretrained(folder), which gives preprocessor_config.json)"
            )
        mean, std = config["mean"], config["std"]
        resizing: Resizing | None = Resizing.of(config["input_size"][1:], config.get("crop_pct", 1.0), str(folder))
    else:
        mean, std, resizing = processing

    def untrained() -> nn.Module:
        built = automatic.from_config(model.config)
        return built if network is model else built.timm_model  # type: ignore[no-any-return]

    return ForeignNetwork(network.eval(), tuple(mean), tuple(std), resizing, untrained, described)


def _processing(transformers: Any, folder: Path) -> tuple[tuple[float, ...], tuple[float, ...], Resizing | None] | None:
    """Mean, std and resizing of the image processor that lies beside a model; None if there is none."""
    if not (folder / "preprocessor_config.json").is_file():
        return None
    try:
        said = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True).to_dict()
    except Exception as error:  # as of the model
        raise EvaluationError(f"transformers cannot read the image processor in {folder}: {error}") from error
    if "data_config" in said:  # of a TimmWrapper
        data = said["data_config"]
        return (
            tuple(data["mean"]),
            tuple(data["std"]),
            Resizing.of(data["input_size"][1:], data["crop_pct"], str(folder)),
        )
    if not said.get("do_rescale", True) or not math.isclose(said.get("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-3):
        raise EvaluationError(f"the image processor in {folder} does not divide pixels by 255: that is not known here")
    if said.get("do_normalize", True):
        mean, std = said.get("image_mean"), said.get("image_std")
    else:
        mean, std = (0.0,) * 3, (1.0,) * 3
    if mean is None or std is None:
        raise EvaluationError(f"the image processor in {folder} has no image_mean and image_std")
    return tuple(mean), tuple(std), _resizing(said, str(folder))


def _resizing(said: Mapping[str, Any], where: str) -> Resizing | None:
    """The shorter side, and what is cut out of it; a size of two sides is stretched there and cut out here."""
    size = dict(said.get("size") or {})
    shorter = size.get("shortest_edge") or min(size.get("height") or 0, size.get("width") or 0)
    if not said.get("do_resize", True) or not shorter:
        return None
    crop = said.get("crop_size") if said.get("do_center_crop") else None
    if isinstance(crop, Mapping):
        height, width = crop["height"], crop["width"]
        return Resizing.of((height, width), height / shorter, where)
    if size.get("height"):
        return Resizing.of((size["height"], size["width"]), 1.0, where)
    return Resizing(int(shorter), float(said.get("crop_pct") or 1.0))
