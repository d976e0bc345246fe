"""`load_networks`: the networks that are evaluated side by side, from run folders, checkpoints or timm."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import timm
import torch
from torch import nn

from ..checkpoint.branches import BranchDescription, read_description
from ..checkpoint.files import LOWRANK_CONFIG
from ..checkpoint.listed import find_checkpoint, is_bare, names_of_checkpoints
from ..checkpoint.loading import repository_and_revision
from ..checkpoint.remote import download
from ..comparators import BottleLR, architecture_of, is_bottlenecked
from ..core.views import View
from ..errors import CheckpointError, EvaluationError
from ..evaluation import PixelModel
from ..evaluation.pixels import random_state_kept
from ..evaluation.results import NetworkInfo, Value
from ..files import read_json, weights_sha256
from ..layers import create_backbone
from ..text import numbered, one_line
from ..training import Recipe, Run
from ..training.run import RunPaths, unlike_twin
from .foreign import ForeignNetwork, Resizing, load_foreign

NO_TWIN = "none"


@dataclasses.dataclass(frozen=True)
class EvaluatedNetwork:
    """One network, in eval mode, and what is known of how it came about."""

    title: str
    path: str
    model: PixelModel
    weights: str  # SHA-256 of all parameters and buffers
    branches: Mapping[str, int]  # target rank of each regularized layer; empty for a plain network
    comparator: str | None  # title of the comparator that was trained in their place
    layers: tuple[str, ...]  # those that its run measured, regularized or not
    views: Mapping[str, View] = dataclasses.field(default_factory=dict)  # where samples are not whole images
    recipe: Recipe | None = None
    clean: Value | None = None  # accuracy on all test images that its run wrote down
    data_fingerprint: str | None = None
    resizing: Resizing | None = None  # how its images are made, where no recipe says it
    untrained: Callable[[], nn.Module] | None = None  # the architecture with random weights, where timm cannot read it

    @property
    def classes(self) -> int | None:
        """How many the network tells apart, if it says so."""
        network = self.model.network
        said = getattr(network, "num_classes", None)
        return getattr(getattr(network, "config", None), "num_labels", None) if said is None else said

    @property
    def info(self) -> NetworkInfo:
        """What evaluation.json says of it."""
        network = self.model.network
        return NetworkInfo(
            title=self.title,
            path=self.path,
            model=str(architecture_of(network) or type(network).__name__),
            parameters=sum(parameter.numel() for parameter in network.parameters()),
            branches=self.branches,
            comparator=self.comparator,
            weights=self.weights,
            clean=self.clean,
        )


def load_networks(network: str, against: Sequence[str] = ()) -> list[EvaluatedNetwork]:
    """A network and those beside it, with different titles.

    Args:
        network: as of `load_network`.
        against: the same; without any the twin in the run folder if there is one, ("none",) nothing.

    Raises:
        EvaluationError: one cannot be loaded, or two are the same.
    """
    twin = RunPaths(network).twin
    against = against or ((str(twin),) if RunPaths(twin).is_finished() else ())
    networks = [load_network(where) for where in (network, *against) if where != NO_TWIN]
    for one, other in itertools.combinations(networks, 2):
        if one.weights == other.weights:
            raise EvaluationError(f"{one.path} and {other.path} hold the same weights: there is nothing to compare")
    for titles in (
        [network.title for network in networks],
        numbered([_folder_name(network.path) for network in networks]),
    ):
        if len(set(titles)) == len(titles):
            break
    return [dataclasses.replace(network, title=title) for network, title in zip(networks, titles, strict=True)]


def infos_of(networks: Sequence[EvaluatedNetwork]) -> tuple[NetworkInfo, ...]:
    """What evaluation.json says of networks side by side, whether the others are twins of the first among it."""
    return tuple(
        dataclasses.replace(network.info, twin=_is_twin(networks[0], network) if number else None)
        for number, network in enumerate(networks)
    )


def _is_twin(network: EvaluatedNetwork, other: EvaluatedNetwork) -> bool | None:
    """Whether `other` was trained as `network` was, but plainly; None where their recipes are not known."""
    if network.recipe is None or other.recipe is None:
        return None
    same_data = network.data_fingerprint == other.data_fingerprint
    plain = not other.branches and other.comparator is None
    return plain and same_data and not unlike_twin(network.recipe, other.recipe)


def _folder_name(path: str) -> str:
    """What a folder or repository is called: never its path, which may hold the name of its owner."""
    folder = Path(path)
    return one_line((folder.resolve() if folder.is_dir() else folder).name) or "network"


def load_network(where: str, title: str | None = None) -> EvaluatedNetwork:
    """Loads a network.

    Args:
        where: a run folder of `timm-lowrank train`, a folder written by `save_pretrained`, what timm's train.py or a
            Trainer of transformers left (see `load_foreign`), a repository on the Hub ("hf-hub:USER/NAME"), the name
            of a checkpoint of this project, as `from_pretrained` takes it, or that of a timm network with pretrained
            weights.
        title: what the report calls it; None is made of its branches: "1-LR", "2-LR", "low rank" or "plain", or is the
            title of its comparator, such as "Bottle-LR".

    Raises:
        EvaluationError: there is nothing to load, or it cannot be loaded.
    """
    folder = Path(where)
    run = RunPaths(folder).is_run() if folder.is_dir() else False
    if folder.exists() and not run and (foreign := load_foreign(folder)) is not None:
        return _evaluated(foreign.network, title, where, foreign.branches, foreign=foreign)
    if folder.is_dir():
        return _from_folder(folder, title)
    if folder.exists() or where.startswith((".", "/")) or where.endswith("/"):
        raise EvaluationError(
            f"{where} is no run folder: give the folder that `timm-lowrank train` wrote, a folder with config.json and "
            "model.safetensors, a checkpoint of timm's train.py, hf-hub:USER/NAME, or the name of a timm network"
        )
    if is_bare(where) and where in names_of_checkpoints():
        try:
            one, here = find_checkpoint(where)
        except CheckpointError as error:
            raise EvaluationError(str(error)) from error
        if here is not None:  # said by its name, wherever the clone is
            return dataclasses.replace(_from_folder(here, title), path=where)
        where = f"hf-hub:{one.repo}"
    try:
        network = create_backbone(where, pretrained=True)
    except (ValueError, OSError, RuntimeError) as error:
        raise EvaluationError(f"{where} is neither a folder here nor a network that can be loaded: {error}") from error
    return _evaluated(network, title, where, _description_on_hub(where))


def _description_on_hub(where: str) -> BranchDescription | None:
    """The branches that a repository on the Hub describes, as a checkpoint folder does; None of any other network."""
    if not where.lower().startswith(("hf-hub:", "hf_hub:")):
        return None
    try:
        repo_id, revision = repository_and_revision(where, None)
        return read_description(download(repo_id, revision=revision, names=(LOWRANK_CONFIG,)))
    except CheckpointError as error:
        raise EvaluationError(f"the branches that {where} was trained with cannot be read: {error}") from error


def random_twin(network: EvaluatedNetwork, seed: int = 0) -> PixelModel:
    """A network of the same architecture with random weights, in eval mode; it leaves the random generators alone.

    Raises:
        EvaluationError: the architecture cannot be built again.
    """
    create = network.untrained or functools.partial(timm.create_model, _known_to_timm(network.path), pretrained=False)
    with random_state_kept():
        torch.manual_seed(seed)
        try:
            twin = create()
        except Exception as error:  # timm passes on what json and its own registry raise
            raise EvaluationError(f"{network.path} cannot be built again with random weights: {error}") from error
    mean, std = (tuple(values.flatten().tolist()) for values in (network.model.mean, network.model.std))
    return PixelModel(twin.eval(), mean, std).eval().to(network.model.mean.device)


def _known_to_timm(path: str) -> str:
    paths = RunPaths(path)
    folder = paths.model if paths.is_run() else Path(path)
    return f"local-dir:{folder}" if folder.is_dir() else path


def _from_folder(folder: Path, title: str | None) -> EvaluatedNetwork:
    paths = RunPaths(folder)
    checkpoint = paths.model if paths.is_run() else folder
    if paths.is_run() and not paths.is_finished():
        raise EvaluationError(f"{folder} is a run that is not finished (no summary.json): resume it first")
    if not (checkpoint / "config.json").exists():
        raise EvaluationError(
            f"{folder} holds neither a finished run nor a checkpoint (no config.json, no model_best.pth.tar)"
        )
    if "architecture" not in read_json(checkpoint / "config.json", EvaluationError):
        raise EvaluationError(
            f"{checkpoint / 'config.json'} names no architecture: it is not the checkpoint of a network"
        )
    try:
        network = timm.create_model(f"local-dir:{checkpoint}", pretrained=True)
        description = read_description(checkpoint)
    except Exception as error:  # timm passes on what json, safetensors, torch and its own registry raise
        raise EvaluationError(f"the checkpoint {checkpoint} cannot be loaded: {error}") from error
    run = Run.open(folder) if paths.is_run() else None
    if run and not run.summary.lowrank:
        description = None
    return _evaluated(network, title, str(folder), description, run)


def _evaluated(
    network: nn.Module,
    title: str | None,
    path: str,
    description: BranchDescription | None = None,
    run: Run | None = None,
    foreign: ForeignNetwork | None = None,
) -> EvaluatedNetwork:
    layers = description.layers if description else {}
    branches = {layer: one.rank for layer, one in layers.items()}
    views = {layer: one.view for layer, one in run.summary.branches.items()} if run else {}
    views |= {layer: one.viewed() for layer, one in layers.items()}  # earlier summaries have none
    comparator = run.summary.comparator.title if run and run.summary.comparator else None
    if is_bottlenecked(network):  # of which its checkpoint knows, without a run
        comparator = BottleLR.title
    return EvaluatedNetwork(
        title=title or comparator or _title(branches),
        path=path,
        model=PixelModel(network.float().eval(), *((foreign.mean, foreign.std) if foreign else ())).eval(),
        weights=weights_sha256(network.state_dict()),
        branches=branches,
        comparator=comparator,
        layers=tuple(run.summary.branches if run else branches),
        views={layer: view for layer, view in views.items() if view.kind != "flatten"},
        recipe=run.recipe if run else None,
        clean=run.summary.clean if run else None,
        data_fingerprint=run.summary.data.fingerprint if run else None,
        resizing=foreign.resizing if foreign else None,
        untrained=foreign.untrained if foreign else None,
    )


def _title(branches: Mapping[str, int]) -> str:
    if not branches:
        return "plain"
    if set(branches) == {"pre_logits"}:
        return "1-LR"
    return "2-LR" if len(branches) == 2 and "pre_logits" in branches else "low rank"
