"""`lowrank.json` and `lowrank.safetensors`: the branches of a model in files. Nothing else writes or reads these two.

    {"format": 1, "config": {...}, "enabled": true,
     "layers": {"blocks.1": {"rank": 20, "num_features": 192, "view": "token", "channel_dim": -1}},
     "sha256": {"lowrank.safetensors": "...", "model.safetensors": "..."}}

lowrank.safetensors is the state dict of `LowRankModel.branches`: W, b and the counters of each. The same description,
without the files, stands in the checkpoints of `LowRankTask`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..core.branch import LowRankBranch
from ..core.capture import Tap
from ..core.config import PRE_LOGITS, BranchOptions, LowRankConfig
from ..core.model import BranchDict, LowRankModel
from ..core.views import FLATTEN, VIEWS, View
from ..errors import CheckpointError, nearest
from ..files import read_json, sha256_of
from ..layers import tap_on
from .files import LOWRANK_CONFIG, LOWRANK_WEIGHTS, NETWORK_WEIGHTS, check_safetensors, check_sha256, staged

FORMAT = 1  # raised only when an older version could not read the files any more


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerDescription:
    """The branch on one layer, without its W and b."""

    rank: int  # r, the target rank
    num_features: int  # m
    view: str | None = None  # kind of the view; None in files from before there were views
    channel_dim: int | None = None  # of the view
    item: int | None = None  # which tensor is meant where the layer gives several
    updates: int | None = None  # Update Steps so far; None in files from before they were noted
    feeds_classifier: bool | None = None  # whether it is what "pre_logits" names, by another name

    @classmethod
    def of(cls, branch: LowRankBranch, tap: Tap) -> LayerDescription:
        """Of a branch and where it reads its layer."""
        return cls(
            rank=branch.rank,
            num_features=branch.num_features,
            view=tap.view.kind,
            channel_dim=tap.view.channel_dim,
            item=tap.item,
            updates=branch.updates,
            feeds_classifier=tap.feeds_classifier or None,
        )

    @classmethod
    def from_dict(cls, values: object, options: BranchOptions, where: str) -> LayerDescription:
        """The inverse of `to_dict`.

        Args:
            values: an entry of "layers".
            options: what the configuration says of the layer; its view is that of the branch where `values` name none.
            where: file and layer, for the error.

        Raises:
            CheckpointError: rank and width are no integers, or there is no such view.
        """
        defaults = {"view": options.view, "channel_dim": options.channel_dim, "item": None, "feeds_classifier": None}
        defaults |= {"updates": None}
        known: dict[str, Any] = {**defaults, **values} if isinstance(values, Mapping) else {}
        if not _are_integers(known, "rank", "num_features"):
            raise CheckpointError(f"{where} must have rank and num_features, both integers")
        if known["view"] not in (None, *VIEWS) or not _are_integers(
            known, "channel_dim", "item", "updates", optional=True
        ):
            raise CheckpointError(f"{where} has a view that is none of {', '.join(VIEWS)}")
        if known["feeds_classifier"] not in (None, True, False):
            raise CheckpointError(f"{where}: feeds_classifier must be true or false")
        return cls(**{field.name: known[field.name] for field in dataclasses.fields(cls)})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without those that are not known."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    def viewed(self) -> View:
        """The view, which was the flattened one when there was no other."""
        return View(self.view or FLATTEN.kind, FLATTEN.channel_dim if self.channel_dim is None else self.channel_dim)

    def fits(self, own: LayerDescription) -> bool:
        """Whether W and b could be those of a model's `own` branch. A view that is not known could be any."""
        if (self.rank, self.num_features) != (own.rank, own.num_features):
            return False
        agrees = self.view == own.view if self.channel_dim is None else self.viewed().agrees(own.viewed())
        return self.view is None or agrees

    def __str__(self) -> str:
        view = "" if self.view in (None, FLATTEN.kind) else f", view {self.view}"
        along = f", channel_dim {self.channel_dim}" if view and self.channel_dim is not None else ""
        return f"rank {self.rank} of {self.num_features}{view}{along}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BranchDescription:
    """All branches of a model, without their W and b."""

    config: LowRankConfig
    layers: Mapping[str, LayerDescription]
    enabled: bool = True
    sha256: Mapping[str, str] = dataclasses.field(default_factory=dict)  # by file name; of older files: none

    @classmethod
    def of(cls, model: LowRankModel) -> BranchDescription:
        """Of a model."""
        layers = {tap.layer: LayerDescription.of(model.branches[tap.layer], tap) for tap in model.taps}
        return cls(config=model.lowrank_config, layers=layers, enabled=model.enabled)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> BranchDescription:
        """The inverse of `to_dict`. Keys that a newer version has added are left out with a warning.

        Args:
            where: the file, for errors and warnings.

        Raises:
            CheckpointError: a format of a newer version, or values that make no sense.
        """
        written = values.get("format")
        if not _are_integers(values, "format"):
            raise CheckpointError(f"{where} names no format, so it was not written by save_pretrained")
        if written > FORMAT:  # type: ignore[operator]
            raise CheckpointError(
                f"{where} has format {written}, and this version of timm_lowrank reads up to {FORMAT}: pip install -U "
                "timm_lowrank, or load the plain network with lowrank=False"
            )
        layers = values.get("layers")
        if not isinstance(values.get("config"), Mapping) or not isinstance(layers, Mapping) or not layers:
            raise CheckpointError(f"{where} must hold config and layers: it was damaged; fetch it again")
        try:
            config = LowRankConfig.from_dict(values["config"], strict=False)
        except (ValueError, TypeError) as error:
            raise CheckpointError(
                f"the branches of {where} cannot be restored: {error}. lowrank=False loads the plain network"
            ) from error
        known = {"format", *(field.name for field in dataclasses.fields(cls))}
        if unknown := sorted(values.keys() - known):
            warnings.warn(
                f"{where} has fields that this version does not know: {', '.join(unknown)}. Left out.", stacklevel=4
            )
        return cls(
            config=config,
            layers={
                layer: LayerDescription.from_dict(one, config.options(layer), f"{where}: layer {layer!r}")
                for layer, one in layers.items()
            },
            enabled=bool(values.get("enabled", True)),
            sha256=_digests(values, where),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return {
            "format": FORMAT,
            "config": self.config.to_dict(),
            "enabled": self.enabled,
            "layers": {layer: one.to_dict() for layer, one in self.layers.items()},
            **({"sha256": dict(self.sha256)} if self.sha256 else {}),
        }

    @property
    def never_had_weight(self) -> bool:
        """Whether the penalty had no weight in all of the training, as far as is known: it ended in the warm-up."""
        updates = [one.updates for one in self.layers.values()]
        return all(count is not None and not self.config.has_had_weight(count) for count in updates)

    @property
    def without_state(self) -> bool:
        """Whether W and b were left out on purpose: the digests of the checkpoint do not name their file."""
        return bool(self.sha256) and LOWRANK_WEIGHTS not in self.sha256

    def require_fit(self, model: LowRankModel, where: str) -> None:
        """Raises CheckpointError, with both, unless the model has branches of these sizes and views on these layers."""
        own = BranchDescription.of(model)
        if self.layers.keys() != own.layers.keys() or not all(
            one.fits(own.layers[layer]) for layer, one in self.layers.items()
        ):
            raise CheckpointError(
                f"the branches in {where} are {self}, and those of this model {own}: go on with the configuration and "
                "the image size that they were trained with, or start a new run"
            )

    def __str__(self) -> str:
        return ", ".join(f"{layer} ({one})" for layer, one in self.layers.items())


def _are_integers(values: Mapping[str, Any], *names: str, optional: bool = False) -> bool:
    kinds = (int, type(None)) if optional else (int,)
    return all(type(values.get(name)) in kinds for name in names)  # not isinstance: a bool is no integer here


def _digests(values: Mapping[str, Any], where: str) -> dict[str, str]:
    digests = values.get("sha256", {})
    if not isinstance(digests, Mapping) or not all(isinstance(digest, str) for digest in digests.values()):
        raise CheckpointError(f"{where}: sha256 must name a digest for each file")
    return dict(digests)


# ---------------------------------------------------------------------------------------------------------- reading


def has_branches(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds both files."""
    return all((Path(folder) / name).is_file() for name in (LOWRANK_CONFIG, LOWRANK_WEIGHTS))


def read_description(folder: str | os.PathLike[str]) -> BranchDescription | None:
    """What lowrank.json of a checkpoint says; None where there is none, as of a plain network.

    Raises:
        CheckpointError: it is damaged, of a newer version, or makes no sense.
    """
    path = Path(folder) / LOWRANK_CONFIG
    return BranchDescription.from_dict(read_json(path), str(path)) if path.is_file() else None


def recorded_sha256(folder: Path) -> dict[str, str]:
    """File name to sha256, as lowrank.json of whatever format records them; empty without it."""
    path = folder / LOWRANK_CONFIG
    return _digests(read_json(path), str(path)) if path.is_file() else {}


def load_branches(model: LowRankModel, folder: str | os.PathLike[str]) -> None:
    """Take over W, b, counters and the switch of every branch, bit for bit; the inverse of `write_branches`.

    Args:
        model: with branches on the same layers, of the same ranks, widths and views. Files from before views were
            written down fit any: they were trained with that of the model.
        folder: a checkpoint of this library, or of a `LowRankTrainer`.

    Raises:
        CheckpointError: nothing there, files that are damaged, or other branches.
    """
    folder = Path(folder)
    description = read_description(folder) if has_branches(folder) else None
    if description is None:
        raise CheckpointError(f"{folder} holds no {LOWRANK_CONFIG} and {LOWRANK_WEIGHTS}, so no branches")
    if digest := description.sha256.get(LOWRANK_WEIGHTS):
        check_sha256(folder / LOWRANK_WEIGHTS, digest)
    description.require_fit(model, str(folder))
    tensors = _read_tensors(folder, description)
    with _restoring(folder):
        model.follow_classifier()
        model.branches.load_state_dict(tensors)
    model.enable(description.enabled)


def restore_branches(network: nn.Module, description: BranchDescription, folder: Path) -> LowRankModel:
    """A timm network with the branches of a checkpoint; new ones, with a warning, where W and b were left out.

    Raises:
        CheckpointError: files that are damaged or do not fit each other or the network.
    """
    tensors = None if description.without_state else _read_tensors(folder, description)
    known = [name for name, _ in network.named_modules(remove_duplicate=False) if name]
    if wrong := [layer for layer in description.layers if layer not in (*known, PRE_LOGITS)]:
        raise CheckpointError(
            f"{folder / LOWRANK_CONFIG} has branches on layers that {type(network).__name__} does not have: "
            f"{', '.join(wrong)}. {nearest(wrong[0], known)} lowrank=False loads the plain network"
        )
    layers = description.layers.items()
    with _restoring(folder):
        taps = [
            dataclasses.replace(
                tap_on(network, layer), view=one.viewed(), item=one.item, feeds_classifier=bool(one.feeds_classifier)
            )
            for layer, one in layers
        ]
        widths = {layer: one.num_features for layer, one in layers}
        ranks = {layer: one.rank for layer, one in layers}
        classes = getattr(network, "num_classes", None)
        model = LowRankModel(network, description.config, taps, widths, ranks, classes)
        if tensors is not None:
            model.branches.load_state_dict(tensors)
    if tensors is None:
        warnings.warn(
            f"{folder} holds the configuration of its branches without their W and b: they begin anew, and are fitted "
            f"in the first {description.config.warmup_updates} updates. The network itself is as it was trained.",
            stacklevel=4,
        )
    return model.enable(description.enabled)


def _read_tensors(folder: Path, description: BranchDescription) -> dict[str, Tensor]:
    """The state dict of the branches, whose widths are checked before anything of that size is allocated."""
    path = folder / LOWRANK_WEIGHTS
    check_safetensors(path)
    tensors = load_file(path)
    for layer, one in description.layers.items():
        prefix = BranchDict.stored(layer)
        bias = tensors.get(f"{prefix}.bias")
        if bias is None or bias.shape != (one.num_features,):
            raise CheckpointError(f"{path} does not fit {LOWRANK_CONFIG} at layer {layer!r}: fetch both again")
        matrix = tensors.get(f"{prefix}.matrix")
        if description.config.storage == "dense" and (matrix is None or matrix.shape != (one.num_features,) * 2):
            raise CheckpointError(
                f"{path} holds no W of {one.num_features} x {one.num_features} numbers for layer {layer!r}, as "
                f'storage="dense" in {LOWRANK_CONFIG} says: fetch both again'
            )
    return tensors


@contextlib.contextmanager
def _restoring(folder: Path) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"the branches in {folder} cannot be restored: {error}. lowrank=False loads the plain network"
        ) from error


# ---------------------------------------------------------------------------------------------------------- writing


def write_branches(model: LowRankModel, folder: str | os.PathLike[str]) -> None:
    """Write both files, or leave what was there before; others in the folder are left alone.

    Args:
        folder: is made if it does not exist.

    Raises:
        CheckpointWriteError: (also an OSError) the disk is full or the folder cannot be written.
    """
    with staged(Path(folder), (LOWRANK_CONFIG, LOWRANK_WEIGHTS)) as staging:
        write_into(staging, model)


def write_into(folder: Path, model: LowRankModel, belong_to: Collection[str] = ()) -> None:
    """Write both files into a folder that nobody reads yet.

    Args:
        belong_to: files in it that the branches were trained with; their sha256 is recorded, too.
    """
    model.follow_classifier()
    tensors = {key: value.contiguous().cpu() for key, value in model.branches.state_dict().items()}
    save_file(tensors, folder / LOWRANK_WEIGHTS, metadata={"format": "pt"})
    digests = {name: sha256_of(folder / name) for name in (*belong_to, LOWRANK_WEIGHTS)}
    description = dataclasses.replace(BranchDescription.of(model), sha256=digests)
    (folder / LOWRANK_CONFIG).write_text(json.dumps(description.to_dict(), indent=2) + "\n")


def leave_out_state(folder: Path) -> None:
    """Takes W and b out of a checkpoint folder that nobody reads yet; loaded from it, the branches begin anew."""
    path = folder / LOWRANK_CONFIG
    content = read_json(path)
    content["sha256"] = {NETWORK_WEIGHTS: sha256_of(folder / NETWORK_WEIGHTS)}
    path.write_text(json.dumps(content, indent=2) + "\n")
    (folder / LOWRANK_WEIGHTS).unlink()
