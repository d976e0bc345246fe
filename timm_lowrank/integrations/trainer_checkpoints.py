"""`CheckpointMixin`: what a Trainer with low-rank branches saves, loads and exports."""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel, Trainer

from ..checkpoint import LOWRANK_CONFIG, LOWRANK_WEIGHTS, CheckpointError, save_pretrained
from ..core.model import LowRankModel
from ..errors import LowRankWarning
from .trainer_files import has_branches, read_branches, read_network, write_branches
from .trainer_networks import is_timm

_Base = Trainer if TYPE_CHECKING else object


class CheckpointMixin(_Base):  # type: ignore[misc, valid-type]
    """The half of `LowRankMixin` that keeps files: the plain model as the Trainer saves it, the branches beside it."""

    lowrank: LowRankModel | None  # None until the first training batch
    _pending: str | None  # folder of branches that wait to be built
    _image_shape: tuple[int, ...] | None  # of the images that the branches were built for
    _misnamed: bool  # whether the last checkpoint holds the model's weights under other names

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        if not self.args.should_save:
            return
        if self._pending is not None:  # resumed, but no batch came: they are what they were
            for name in (LOWRANK_CONFIG, LOWRANK_WEIGHTS):
                with contextlib.suppress(shutil.SameFileError):
                    shutil.copyfile(Path(self._pending) / name, folder / name)
        elif self.lowrank is not None:
            write_branches(self.lowrank, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._misnamed = False
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._take_checkpoint(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._misnamed = False
        super()._load_best_model()
        self._take_checkpoint(self.state.best_model_checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """As of the Trainer; but weights that a checkpoint holds under older names are not missing.

        transformers saves some models, ViT among them, under the names of its earlier versions, and its Trainer then
        goes on with the weights that were there before, after a warning.
        """
        if isinstance(self.model, PreTrainedModel) and load_result.missing_keys and load_result.unexpected_keys:
            self._misnamed = True
        else:
            super()._issue_warnings_after_load(load_result)

    def _take_checkpoint(self, folder: str) -> None:
        if self._misnamed:
            read_network(self.model, folder)
        self._take_branches(folder)

    def _take_branches(self, folder: str) -> None:
        if not has_branches(folder):
            warnings.warn(f"{folder} holds no branches: they start anew", LowRankWarning, stacklevel=2)
        elif self.lowrank is not None:
            read_branches(self.lowrank, folder)
        else:
            self._pending = folder

    def export(
        self,
        folder: str | os.PathLike[str],
        *,
        label_names: list[str] | None = None,
        data_config: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write the timm network of a TimmWrapper as `timm_lowrank.save_pretrained` does, with the branches beside it.

        `timm.create_model("local-dir:FOLDER", pretrained=True)` loads it without this package. Only the process that
        saves checkpoints writes.

        Args:
            folder: is made if it does not exist.
            label_names: one per class; None takes those of the model's configuration.
            data_config: mean, std and so on of the images, over the network's `pretrained_cfg`. The input size is
                that of the images trained on unless it is given here.

        Returns:
            The folder.

        Raises:
            CheckpointError: the model holds no timm network, or nothing was trained yet.
        """
        lowrank = self.lowrank
        if lowrank is None:
            raise CheckpointError("there are no branches to export before the first training batch, or example_input")
        if not is_timm(lowrank.backbone):
            raise CheckpointError(
                f"{type(self.model).__name__} holds no timm network; save_model(folder) writes it for from_pretrained"
            )
        if label_names is None:
            names = list((getattr(self.model.config, "id2label", None) or {}).values())
            label_names = None if names == [f"LABEL_{index}" for index in range(len(names))] else names
        size = {} if self._image_shape is None else {"input_size": self._image_shape}
        if self.args.should_save:
            save_pretrained(lowrank, folder, label_names=label_names, data_config={**size, **(data_config or {})})
        return Path(folder)
