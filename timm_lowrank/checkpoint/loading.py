"""`from_pretrained`: from a folder, a finished run or a repository on the Hub to a model."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from timm.models import PretrainedCfg
from torch import nn
from torch.overrides import TorchFunctionMode

from ..core.model import LowRankModel
from ..errors import CheckpointDamagedError, CheckpointError
from ..files import RUN_CONFIG, RUN_MODEL, read_json
from .branches import BranchDescription, has_branches, read_description, recorded_sha256, restore_branches
from .files import (
    LOWRANK_CONFIG,
    LOWRANK_WEIGHTS,
    NETWORK_CONFIG,
    NETWORK_WEIGHTS,
    check_safetensors,
    check_sha256,
    checked_name,
    known_architecture,
    module_to_import,
    require_checkpoint,
)
from .listed import find_checkpoint, is_bare
from .remote import checked_repo_id, download, holds


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
        source: a folder; the folder of a finished run of `timm-lowrank train`; a repository on the Hub as
            "USER/NAME" or "hf-hub:USER/NAME"; or the bare name of a checkpoint of this project, such as
            "cifar10-resnet10-2lr": its copy on the Hub if it is published, with the sha256 of the list, otherwise,
            and with a warning where it cannot be fetched, that of the clone. A folder wins over a repository and a
            checkpoint of that name.
        revision: branch, tag or commit of the repository; None is its main branch.
        token: for a private repository; None takes HF_TOKEN or the one that `hf auth login` stored.
        cache_dir: where downloads are kept; None is huggingface_hub's cache.
        device: where to put the model; None is the CPU.
        lowrank: whether to put the branches on. A checkpoint without them gives the plain network and a warning;
            with `lowrank=False` any checkpoint gives the plain network.
        sha256: what model.safetensors must have, 64 hexadecimal digits. The sums that the checkpoint itself
            records are checked in any case.

    Returns:
        A `LowRankModel`, its network in the dtype that it was saved in; or the plain network as timm loads it. Where
        W and b were left out of a checkpoint, the branches begin anew, with a warning.

    Raises:
        CheckpointError: nothing there, no access, no connection, files that are damaged, pickled, of a newer
            format, or that do not fit each other; says what to do.
    """
    found = _find(source, revision)
    load = functools.partial(load_folder, lowrank=lowrank, sha256=sha256 or found.sha256)
    fetched: Path | None = None
    if found.folder is not None and not found.repo_id:
        model = load(found.folder)
    else:
        fetch = functools.partial(download, found.repo_id, revision=found.revision, token=token, cache_dir=cache_dir)
        try:
            folder = fetched = fetch()
        except CheckpointError as error:
            if found.folder is None:
                raise
            warnings.warn(f"{error}. Its copy in this clone was loaded, {found.folder}", stacklevel=2)
            folder = found.folder
        try:
            model = load(folder)
        except CheckpointDamagedError:  # on the way or in the cache: once more
            model = load(fetch(force=True))
    if lowrank and not isinstance(model, LowRankModel):
        where = f"{source} holds no {LOWRANK_CONFIG}"
        # What timm or transformers have fetched are the files of the network alone, and all that is there offline.
        if fetched and holds(found.repo_id, LOWRANK_CONFIG, revision=fetched.name, token=token) is None:
            where = f"the Hub cannot be asked whether {source} holds {LOWRANK_CONFIG}, and the cache does not"
        warnings.warn(
            f"{where}: loaded as a plain network, without branches. "
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
        within = path / RUN_MODEL
        if (path / NETWORK_CONFIG).exists() or not (path / RUN_CONFIG).exists():
            return path
        if not (within / NETWORK_CONFIG).exists():
            raise CheckpointError(
                f"the run in {path} has not come to its end, so it holds no model: continue it with --resume auto"
            )
        return within
    named = not isinstance(source, str) or text.startswith(("local-dir:", "/", "./", "../", "~")) or path.exists()
    if named or "\\" in text or text.count("/") > 1:
        reason = "is a file" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {reason}: give the folder of a checkpoint, or a repository as USER/NAME")
    return None


@dataclasses.dataclass(frozen=True)
class _Found:
    """Where a checkpoint is. With both a repository and a folder, the folder holds the same and stands in for it."""

    repo_id: str  # empty without one
    folder: Path | None
    revision: str | None = None
    sha256: str | None = None  # of model.safetensors, from the list of checkpoints


def _find(source: str | os.PathLike[str], revision: str | None) -> _Found:
    folder = local_folder(source)
    if folder is not None:
        if revision is not None:
            raise CheckpointError(f"{folder} is a folder: revision={revision!r} is for repositories on the Hub")
        return _Found("", folder)
    name, _, written = str(source).partition("@")
    if not is_bare(name):
        repo_id, revision = repository_and_revision(str(source), revision)
        return _Found(repo_id, None, revision)
    one, here = find_checkpoint(name)
    pinned = bool(revision is not None or written)
    if one.repo is not None:
        repo_id, revision = repository_and_revision(f"{one.repo}@{written}" if written else one.repo, revision)
        return _Found(repo_id, None, revision) if pinned else _Found(repo_id, here, None, one.sha256)
    if pinned:
        raise CheckpointError(f"{name} is not on the Hub yet, and its copy in the clone has no revisions")
    return _Found("", here, sha256=one.sha256)


def repository_and_revision(source: str, revision: str | None) -> tuple[str, str | None]:
    """Repository and revision of "[hf-hub:]USER/NAME[@REVISION]"; the last as timm writes it."""
    name, at, written = source.split(":", 1)[-1].partition("@")
    if at and revision is not None and written != revision:
        raise CheckpointError(f"two revisions: {written!r} in {source!r}, and revision={revision!r}; give one")
    return checked_repo_id(name, hint=f"there is no folder {name!r} either"), (written if at else revision)


def verify(folder: str | os.PathLike[str], *, sha256: str | None = None) -> None:
    """Checks the files of a checkpoint without building the network: complete, not pickled, undamaged.

    Args:
        folder: as `save_pretrained` writes it.
        sha256: what `model.safetensors` must have, 64 hexadecimal digits, from a list of published checkpoints
            for example; None checks what lowrank.json records.

    Raises:
        CheckpointDamagedError: a file whose sha256 is another one, or that is no whole safetensors file.
        CheckpointError: everything else that is wrong.
    """
    folder = Path(folder)
    require_checkpoint(folder)
    recorded = recorded_sha256(folder)
    if sha256 is not None:
        recorded = {**recorded, NETWORK_WEIGHTS: sha256.lower()}
    for name, digest in recorded.items():
        path = folder / checked_name(name)
        if not path.is_file():
            raise CheckpointError(f"{folder} is not complete: {name} is missing; fetch or copy it again")
        check_sha256(path, digest)
    for name in (NETWORK_WEIGHTS, LOWRANK_WEIGHTS):
        if (folder / name).exists():
            check_safetensors(folder / name)


def load_folder(folder: Path, *, lowrank: bool = True, sha256: str | None = None) -> LowRankModel | nn.Module:
    """The model of a checkpoint folder on the CPU, in eval mode; see `from_pretrained`."""
    verify(folder, sha256=sha256)
    config = read_json(folder / NETWORK_CONFIG)
    _refuse_transformers(folder, config)
    description = read_description(folder) if lowrank else None  # before the network is built
    if description is not None and not (has_branches(folder) or description.without_state):
        raise CheckpointError(
            f"{folder} is not complete: {LOWRANK_WEIGHTS} is missing; fetch it again, or load the plain network with "
            "lowrank=False"
        )
    network = _load_network(folder, config)
    if (folder / LOWRANK_CONFIG).is_file():
        _take_over_exactly(network, folder)
    return (network if description is None else restore_branches(network, description, folder)).eval()


def in_layout_of_transformers(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether a folder holds a model of transformers, whose weights do not stand under the names of timm's.

    Args:
        config: the content of config.json.
    """
    if "model_type" not in config:
        return False
    if not {"architecture", "pretrained_cfg"} <= config.keys() or not (folder / NETWORK_WEIGHTS).is_file():
        return True
    with safe_open(folder / NETWORK_WEIGHTS, framework="pt") as file:  # else timm and transformers read it alike
        return any(name.startswith("timm_model.") for name in file.keys())  # noqa: SIM118 - no mapping


def _refuse_transformers(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises CheckpointError for what is `in_layout_of_transformers`."""
    if not in_layout_of_transformers(folder, config):
        return
    kind = next(iter(config.get("architectures") or ()), config["model_type"])
    branches = (
        " Its branches: tlr.wrap(network, config, example_input=images), then timm_lowrank.checkpoint.load_branches("
        "model, folder); a LowRankTrainer takes them up with train(resume_from_checkpoint=folder)."
    )
    raise CheckpointError(
        f"{folder} is in the layout of transformers (a {kind}), as LowRankTrainer.save_model and the Trainer's "
        "checkpoints are, not in timm's: load the network with "
        f"transformers.AutoModelForImageClassification.from_pretrained.{branches * has_branches(folder)} In timm's "
        "layout, which from_pretrained reads, trainer.export(folder) writes the network of a TimmWrapper"
    )


# ------------------------------------------------------------------------------------------------------- the network


def _load_network(folder: Path, config: dict[str, Any]) -> nn.Module:
    architecture = known_architecture(config, folder)
    source = config.get("pretrained_cfg", {})
    known = {field.name for field in dataclasses.fields(PretrainedCfg)}
    unknown = sorted(source.keys() - known) if isinstance(source, dict) else []
    with tempfile.TemporaryDirectory() as without:
        if unknown:
            warnings.warn(
                f"{folder / NETWORK_CONFIG}: pretrained_cfg has fields that timm {timm.__version__} does not know: "
                f"{', '.join(unknown)}. Left out; pip install -U timm may know them.",
                stacklevel=4,
            )
            kept = {key: value for key, value in source.items() if key in known}
            Path(without, NETWORK_CONFIG).write_text(json.dumps({**config, "pretrained_cfg": kept}))
            shutil.copyfile(folder / NETWORK_WEIGHTS, Path(without, NETWORK_WEIGHTS))
        where = f"local-dir:{without if unknown else folder}"
        _require_size(where, folder)
        try:
            return timm.create_model(where, pretrained=True)
        except Exception as error:  # timm's constructors raise whatever a wrong argument leads to
            if isinstance(error, RuntimeError) and "state_dict" in str(error):
                raise _misfit(folder, error) from error
            raise CheckpointError(
                f"timm {timm.__version__} cannot build {architecture!r} as {folder / NETWORK_CONFIG} describes it "
                f"({type(error).__name__}: {error}). Was it written by a newer version? Then: pip install -U timm"
            ) from error


def _require_size(where: str, folder: Path) -> None:
    """Raises CheckpointError if config.json describes a network far larger than the weights, before it takes memory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"), _WithoutInitialValues():
                network = timm.create_model(where)
        except Exception:  # not every network can be built without memory, and what is wrong is said when it is built
            return
    described = sum(value.numel() for value in network.state_dict().values())
    with safe_open(folder / NETWORK_WEIGHTS, framework="pt") as file:
        held = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 - no mapping
    if described > 2 * held + (1 << 20):  # timm makes some weights fit others that are a little smaller
        raise CheckpointError(
            f"{folder / NETWORK_CONFIG} describes a network of {described:,} numbers, and {NETWORK_WEIGHTS} holds "
            f"{held:,}: the two files do not belong together; fetch both again"
        )


class _WithoutInitialValues(TorchFunctionMode):
    """Leaves out what draws or computes the values of a tensor without memory in place.

    There is nothing to fill, but each such operation goes through functions in Python: describing a small ViT takes six
    times as long with them.
    """

    _IN_PLACE = ("normal_", "uniform_", "fill_", "zero_", "erfinv_", "mul_", "add_", "clamp_")
    _INITIAL = ("kaiming_uniform_", "kaiming_normal_", "trunc_normal_", "normal_", "uniform_", "constant_")
    _LEFT_OUT = frozenset(
        [*(getattr(torch.Tensor, name) for name in _IN_PLACE), *(getattr(nn.init, name) for name in _INITIAL)]
    )

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in self._LEFT_OUT:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return function(*args, **kwargs)


def _misfit(folder: Path, error: RuntimeError) -> CheckpointError:
    lines = " ".join(line.strip() for line in str(error).splitlines()[:4])
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
        raise _misfit(folder, error) from error


# -------------------------------------------------------------------------------------------------- what a folder says


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """What config.json and lowrank.json say of a checkpoint."""

    architecture: str
    classes: int | None
    input_size: tuple[int, ...]  # (channels, height, width)
    mean: tuple[float, ...]  # of each channel, of pixels in [0, 1]
    std: tuple[float, ...]
    branches: BranchDescription | None  # None: a plain network

    @property
    def package(self) -> str | None:
        """What has to be imported before timm knows the architecture."""
        return module_to_import(self.architecture)


def read_info(folder: Path, *, branches: bool = True) -> CheckpointInfo:
    """Reads the descriptions in a checkpoint folder.

    Args:
        folder: as `save_pretrained` writes it.
        branches: whether to read lowrank.json, if there is one.

    Raises:
        CheckpointError: one of them cannot be read, or timm does not have the architecture.
    """
    config = read_json(folder / NETWORK_CONFIG)
    classes, cfg = config.get("num_classes"), config.get("pretrained_cfg")
    known = {key: value for key, value in cfg.items() if isinstance(value, list)} if isinstance(cfg, dict) else {}
    return CheckpointInfo(
        architecture=known_architecture(config, folder),
        classes=classes if isinstance(classes, int) else None,
        input_size=tuple(known.get("input_size", ())),
        mean=tuple(known.get("mean", ())),
        std=tuple(known.get("std", ())),
        branches=read_description(folder) if branches else None,
    )
