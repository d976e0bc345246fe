"""`from_pretrained`: from a folder, a finished run or a repository on the Hub to a model."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.models import PretrainedCfg
from torch import nn

from ..core.config import LowRankConfig
from ..core.model import LowRankModel
from ..core.views import FLATTEN, VIEWS, View
from ..errors import CheckpointDamagedError, CheckpointError, nearest
from ..layers import tap_on
from .files import (
    FORMAT,
    LOWRANK_CONFIG,
    LOWRANK_WEIGHTS,
    NETWORK_CONFIG,
    NETWORK_WEIGHTS,
    check_safetensors,
    known_architecture,
    read_json,
    verify,
)
from .remote import checked_repo_id, download

_DESCRIBED = ("format", "config", "enabled", "layers", "sha256")  # the keys of lowrank.json


def from_pretrained(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
    lowrank: bool = True,
    sha256: str | None = None,
) -> LowRankModel | nn.Module:
    """Load what `save_pretrained` wrote or `push_to_hub` published, in eval mode.

    The branches come back bit for bit, so training goes on from `model.train()` as if it had never stopped; the
    optimizer's state is the business of the training run. Only safetensors are read, never a pickle.

    Args:
        source: a folder; the folder of a finished run of recipes/train.py; or a repository on the Hub as
            "USER/NAME" or "hf-hub:USER/NAME". A folder wins over a repository of that name.
        revision: branch, tag or commit of the repository; None is its main branch.
        token: for a private repository; None takes HF_TOKEN or the one that `hf auth login` stored.
        cache_dir: where downloads are kept; None is huggingface_hub's cache.
        device: where to put the model; None is the CPU.
        lowrank: whether to put the branches on. A checkpoint without them gives the plain network and a warning;
            with `lowrank=False` any checkpoint gives the plain network.
        sha256: what model.safetensors must have, 64 hexadecimal digits. The sums that the checkpoint itself
            records are checked in any case.

    Returns:
        A `LowRankModel`, its network in the dtype that it was saved in; or the plain network as timm loads it.

    Raises:
        CheckpointError: nothing there, no access, no connection, files that are damaged, pickled, of a newer
            format, or that do not fit each other; says what to do.
    """
    folder = local_folder(source)
    if folder is None:
        repo_id, revision = _repository(str(source), revision)
        wanted: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
        folder = download(repo_id, **wanted)
        try:
            verify(folder, sha256=sha256)
        except CheckpointDamagedError:  # on the way or in the cache: once more
            folder = download(repo_id, **wanted, force=True)
    elif revision is not None:
        raise CheckpointError(f"{folder} is a folder: revision={revision!r} is for repositories on the Hub")
    model = load_folder(folder, lowrank=lowrank, sha256=sha256)
    if lowrank and not isinstance(model, LowRankModel):
        warnings.warn(
            f"{source} holds no {LOWRANK_CONFIG}: loaded as a plain network, without branches. "
            "timm_lowrank.wrap(network, config) puts new ones on it; lowrank=False loads it without this warning.",
            stacklevel=2,
        )
    return model if device is None else model.to(device)


def local_folder(source: str | os.PathLike[str]) -> Path | None:
    """The checkpoint folder that `source` means, or None if it means a repository."""
    text = os.fspath(source)
    if text.lower().startswith(("hf-hub:", "hf_hub:")):
        return None
    path = Path(text.removeprefix("local-dir:")).expanduser()
    if path.is_dir():
        within = path / "model"  # of a run folder
        if (path / NETWORK_CONFIG).exists() or not (path / "config.yaml").exists():
            return path
        if not (within / NETWORK_CONFIG).exists():
            raise CheckpointError(
                f"the run in {path} has not come to its end, so it holds no model: continue it with --resume auto"
            )
        return within
    named = not isinstance(source, str) or text.startswith(("local-dir:", "/", "./", "../", "~")) or path.exists()
    if named or "\\" in text or text.count("/") > 1:
        what = "is a file" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {what}: give the folder of a checkpoint, or a repository as USER/NAME")
    return None


def _repository(source: str, revision: str | None) -> tuple[str, str | None]:
    """Repository and revision of "[hf-hub:]USER/NAME[@REVISION]"; the last as timm writes it."""
    name, at, written = source.split(":", 1)[-1].partition("@")
    if at and revision is not None and written != revision:
        raise CheckpointError(f"two revisions: {written!r} in {source!r}, and revision={revision!r}; give one")
    return checked_repo_id(name, hint=f"there is no folder {name!r} either"), (written if at else revision)


def load_folder(folder: Path, *, lowrank: bool = True, sha256: str | None = None) -> LowRankModel | nn.Module:
    """The model of a checkpoint folder on the CPU, in eval mode; see `from_pretrained`."""
    verify(folder, sha256=sha256)
    config = read_json(folder / NETWORK_CONFIG)
    description = read_json(folder / LOWRANK_CONFIG) if (folder / LOWRANK_CONFIG).is_file() else None
    if lowrank and description is not None:
        _check_description(description, folder)  # before the network is built
    network = _load_network(folder, config)
    if description is not None:
        _take_over_exactly(network, folder)
    if not lowrank or description is None:
        return network.eval()
    return _with_branches(network, description, folder).eval()


# ------------------------------------------------------------------------------------------------------- the network


def _load_network(folder: Path, config: dict[str, Any]) -> nn.Module:
    architecture = known_architecture(config, folder)
    source = config.get("pretrained_cfg", {})
    known = {field.name for field in dataclasses.fields(PretrainedCfg)}
    unknown = sorted(source.keys() - known) if isinstance(source, dict) and "pretrained_cfg" in config else []
    if not unknown:
        return _create(folder, folder, architecture)
    warnings.warn(
        f"{folder / NETWORK_CONFIG}: pretrained_cfg has fields that timm {timm.__version__} does not know: "
        f"{', '.join(unknown)}. Left out; pip install -U timm may know them.",
        stacklevel=4,
    )
    kept = {key: value for key, value in source.items() if key in known}
    with tempfile.TemporaryDirectory() as without:
        (Path(without) / NETWORK_CONFIG).write_text(json.dumps({**config, "pretrained_cfg": kept}))
        shutil.copyfile(folder / NETWORK_WEIGHTS, Path(without) / NETWORK_WEIGHTS)
        return _create(Path(without), folder, architecture)


def _create(folder: Path, shown: Path, architecture: str) -> nn.Module:
    try:
        return timm.create_model(f"local-dir:{folder}", pretrained=True)
    except Exception as error:  # timm's constructors raise whatever a wrong argument leads to
        if isinstance(error, RuntimeError) and "state_dict" in str(error):
            raise _misfit(shown, str(error)) from error
        raise CheckpointError(
            f"timm {timm.__version__} cannot build {architecture!r} as {shown / NETWORK_CONFIG} describes it "
            f"({type(error).__name__}: {error}). Was it written by a newer version? Then: pip install -U timm"
        ) from error


def _misfit(folder: Path, details: str) -> CheckpointError:
    lines = " ".join(line.strip() for line in details.splitlines()[:4])
    return CheckpointError(
        f"the weights in {folder / NETWORK_WEIGHTS} do not fit the network that {NETWORK_CONFIG} describes: the two "
        "files do not belong together, or the network was changed after timm had built it, in a way that no argument "
        f"of its constructor says. ({lines})"
    )


def _take_over_exactly(network: nn.Module, folder: Path) -> None:
    """The tensors of the file, in their own dtype. timm casts them to float32 and resamples some that do not fit."""
    tensors = load_file(folder / NETWORK_WEIGHTS)
    kinds = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if len(kinds) == 1:
        network.to(dtype=kinds.pop())
    for name, value in [*network.named_parameters(), *network.named_buffers()]:
        if name in tensors:
            value.data = value.data.to(tensors[name].dtype)
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise _misfit(folder, str(error)) from error


# ------------------------------------------------------------------------------------------------------ the branches


def _check_description(description: Mapping[str, Any], folder: Path) -> None:
    """Raises CheckpointError for a lowrank.json that this version cannot make sense of; warns of unknown keys."""
    path = folder / LOWRANK_CONFIG
    written = description.get("format")
    if not isinstance(written, int) or isinstance(written, bool):
        raise CheckpointError(f"{path} names no format, so it was not written by save_pretrained")
    if written > FORMAT:
        raise CheckpointError(
            f"{path} has format {written}, and this version of timm_lowrank reads up to {FORMAT}: pip install -U "
            "timm_lowrank, or load the plain network with lowrank=False"
        )
    layers = description.get("layers")
    if not isinstance(description.get("config"), Mapping) or not isinstance(layers, Mapping) or not layers:
        raise CheckpointError(f"{path} must hold config and layers: it was damaged; fetch it again")
    for layer, size in layers.items():
        numbers = [size.get(key) for key in ("rank", "num_features")] if isinstance(size, Mapping) else [None]
        if not all(isinstance(number, int) for number in numbers):
            raise CheckpointError(f"{path}: layer {layer!r} must have rank and num_features, both integers")
        if _view(size).kind not in VIEWS or not isinstance(_view(size).channel_dim, int):
            raise CheckpointError(f"{path}: layer {layer!r} has a view that is none of {', '.join(VIEWS)}")
    if not (folder / LOWRANK_WEIGHTS).is_file():
        raise CheckpointError(
            f"{folder} is not complete: {LOWRANK_WEIGHTS} is missing; fetch it again, or load the plain network with "
            "lowrank=False"
        )
    if unknown := sorted(description.keys() - set(_DESCRIBED)):
        warnings.warn(
            f"{path} has fields that this version does not know: {', '.join(unknown)}. Left out.", stacklevel=4
        )


def _view(description: Mapping[str, Any]) -> View:
    return View(description.get("view", FLATTEN.kind), description.get("channel_dim", FLATTEN.channel_dim))


def _with_branches(network: nn.Module, description: Mapping[str, Any], folder: Path) -> LowRankModel:
    layers = description["layers"]
    path = folder / LOWRANK_WEIGHTS
    check_safetensors(path)
    tensors = load_file(path)
    for layer, size in layers.items():
        # Before anything of that size is allocated.
        bias = tensors.get(layer.replace(".", "/") + ".bias")
        if bias is None or bias.shape != (size["num_features"],):
            raise CheckpointError(f"{path} does not fit {LOWRANK_CONFIG} at layer {layer!r}: fetch both again")
    try:
        config = LowRankConfig.from_dict(description["config"], strict=False)
        model = LowRankModel(
            network,
            config,
            [dataclasses.replace(tap_on(network, layer), view=_view(size)) for layer, size in layers.items()],
            {layer: size["num_features"] for layer, size in layers.items()},
            {layer: size["rank"] for layer, size in layers.items()},
        )
        model.branches.load_state_dict(tensors)
    except AttributeError as error:  # of get_submodule
        known = [name for name, _ in network.named_modules() if name]
        wrong = [layer for layer in layers if layer not in (*known, "pre_logits")]
        raise CheckpointError(
            f"{folder / LOWRANK_CONFIG} has branches on layers that {type(network).__name__} does not have: "
            f"{', '.join(wrong)}. {nearest(wrong[0], known)} lowrank=False loads the plain network"
        ) from error
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"the branches in {folder} cannot be restored: {error}. lowrank=False loads the plain network"
        ) from error
    return model.enable(bool(description.get("enabled", True)))
