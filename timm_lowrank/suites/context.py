"""`Context`: what every measurement may use: networks, images, seeds, and activations kept for reuse."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..core.views import View
from ..data.images import balanced_rows
from ..errors import EvaluationError
from ..evaluation.representations import activations
from ..training import ImageData
from .subject import Subject

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, eq=False)
class Context:
    """Networks and images of one evaluation, the same on every process."""

    subjects: dict[str, Subject]  # title -> network; the one that the report is about comes first
    images: Tensor  # (n, channels, height, width) float32 in [0, 1], on the device
    labels: Tensor  # (n,) int64, on the device
    train_images: Tensor  # (k, channels, height, width) uint8, on the CPU: what classifiers and PCA are fitted on
    train_labels: Tensor  # (k,) int64, on the CPU
    class_names: tuple[str, ...]
    layers: tuple[str, ...]  # whose representations are measured, from the input to the output
    seed: int
    chunk: int  # images in one unit, and in one batch of an attack
    other_labels: tuple[Tensor, Tensor] | None = None  # of the training and the test images, (k,) and (n,), on the CPU
    confidence: float = 0.95

    @property
    def classes(self) -> int:
        return len(self.class_names)

    def generator(self, *parts: str | int) -> torch.Generator:
        """A random stream of its own for `parts`, the same for all networks: figures are paired image by image."""
        text = "/".join(map(str, (self.seed, *parts)))
        return torch.Generator(device=self.images.device).manual_seed(zlib.crc32(text.encode()))

    def integer_seed(self, *parts: str | int) -> int:
        """The same for what takes a number."""
        return zlib.crc32("/".join(map(str, (self.seed, *parts))).encode()) % 2**31

    def other(self, title: str) -> Subject | None:
        """The network that black-box attacks on `title` are crafted on: the plain one if there is another, as in the
        paper, else the first other one."""
        others = [subject for name, subject in self.subjects.items() if name != title]
        return next((subject for subject in others if not subject.branches), others[0] if others else None)

    @functools.cached_property
    def _kept(self) -> dict[tuple[str, bool], dict[str, Tensor]]:
        return {}

    @functools.cached_property
    def _fitted(self) -> dict[Hashable, Any]:
        return {}

    def keep(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives, made once on each process."""
        if key not in self._fitted:
            self._fitted[key] = make()
        found: T = self._fitted[key]
        return found

    def representations(self, title: str, *, train: bool) -> dict[str, Tensor]:
        """Activations (images, features) float32 of every layer, on the CPU; computed once on each process.

        Those of one network at a time are kept: the widest layers fill memory.
        """
        if (title, train) not in self._kept:
            for key in [key for key in self._kept if key[0] != title]:
                del self._kept[key]
            model = self.subjects[title].model
            images = self.train_images.float() / 255 if train else self.images
            found = activations(model, images.to(self.images.device), list(self.layers), batch_size=self.chunk)
            self._kept[title, train] = {layer: value.cpu() for layer, value in found.items()}
        return self._kept[title, train]

    @property
    def views(self) -> dict[str, View]:
        """Of the layers whose samples are not whole images for the branches of any of the networks."""
        return {layer: view for subject in self.subjects.values() for layer, view in subject.views.items()}

    def samples(self, title: str) -> dict[str, Tensor]:
        """Activations (samples, features) of the test images: what the branch on each layer counts as a sample."""
        whole = self.representations(title, train=False)
        views = {layer: view for layer, view in self.views.items() if layer in whole}
        if not views:
            return whole
        model = self.subjects[title].model
        found = activations(model, self.images, list(views), batch_size=self.chunk, views=views)
        return {**whole, **{layer: value.cpu() for layer, value in found.items()}}

    def describe_data(self, data: ImageData) -> dict[str, object]:
        """The entry "data" in evaluation.json."""
        return {
            "source": data.name,
            "split": "test",
            "images": len(self.images),
            "train_images": len(self.train_images),
            "image_size": list(data.image_size),
            "class_names": list(self.class_names),
            "fingerprint": data.fingerprint,
        }


def build_context(
    subjects: Sequence[Subject],
    data: ImageData,
    layers: Sequence[str],
    device: torch.device,
    *,
    seed: int,
    chunk: int,
    limit: int,
    train_limit: int,
    other_labels: ImageData | None = None,
) -> Context:
    """Takes `limit` test and `train_limit` training images, as many of each class as there are.

    Raises:
        EvaluationError: networks and data do not fit each other.
    """
    classes = len(data.class_names)
    for subject in subjects:
        have = getattr(subject.network, "num_classes", classes)
        if have != classes:
            raise EvaluationError(
                f"{subject.path} tells {have} classes apart, and {data.name} has {classes}: give its own data"
            )
        channels = len(subject.model.mean.flatten())
        if channels != data.image_size[0]:
            raise EvaluationError(
                f"{subject.path} takes images of {channels} channels, and those of {data.name} have "
                f"{data.image_size[0]}: give its own data"
            )
        subject.model.to(device)
    test = _balanced(data.test_labels, limit, classes)
    train = _balanced(data.train_labels, train_limit, classes)
    return Context(
        subjects={subject.title: subject for subject in subjects},
        images=(data.test_images[test].float() / 255).to(device),
        labels=data.test_labels[test].to(device),
        train_images=data.train_images[train],
        train_labels=data.train_labels[train],
        class_names=data.class_names,
        layers=tuple(layers),
        seed=seed,
        chunk=chunk,
        other_labels=None
        if other_labels is None
        else (other_labels.train_labels[train], other_labels.test_labels[test]),
    )


def _balanced(labels: Tensor, limit: int, classes: int) -> Tensor:
    if limit < 1:
        raise EvaluationError(f"--limit and --train-limit must be at least 1, not {limit}")
    array: np.ndarray = labels.numpy()
    return torch.from_numpy(balanced_rows(array, min(limit, len(array)), classes))
