"""`Context`: what every measurement may use: networks, images, seeds, and activations kept for reuse."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.views import View
from ..data.images import ImageData, balanced_rows
from ..errors import EvaluationError
from ..evaluation.maxmargin import MaxMarginClassifier, max_margin_classifiers
from ..evaluation.representations import activations
from ..evaluation.results import AttackProtocol, DataInfo, NoiseProtocol, Protocol
from .networks import EvaluatedNetwork


@dataclasses.dataclass(frozen=True, eq=False)
class Context:
    """Networks and images of one evaluation, the same on every process."""

    networks: dict[str, EvaluatedNetwork]  # by title; the one that the report is about comes first
    images: Tensor  # (n, channels, height, width) float32 in [0, 1], on the device
    labels: Tensor  # (n,) int64, on the device
    train_images: Tensor  # (k, channels, height, width) uint8, on the CPU: what classifiers and PCA are fitted on
    train_labels: Tensor  # (k,) int64, on the CPU
    data: DataInfo
    layers: tuple[str, ...]  # whose representations are measured, from the input to the output
    seed: int
    chunk: int  # images in one unit, and in one batch of an attack
    other_labels: tuple[Tensor, Tensor] | None = None  # of the training and the test images, (k,) and (n,), on the CPU
    confidence: float = 0.95

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.data.class_names

    def chunk_of(self, rows: range) -> tuple[Tensor, Tensor]:
        """Test images and labels of the rows."""
        return self.images[rows.start : rows.stop], self.labels[rows.start : rows.stop]

    def generator(self, *parts: str | int) -> torch.Generator:
        """A random stream of its own for `parts`, the same for all networks: figures are paired image by image."""
        return torch.Generator(device=self.images.device).manual_seed(self._checksum(parts))

    def integer_seed(self, *parts: str | int) -> int:
        """The same for what takes a number."""
        return self._checksum(parts) % 2**31

    def _checksum(self, parts: Sequence[str | int]) -> int:
        return zlib.crc32("/".join(map(str, (self.seed, *parts))).encode())

    def other(self, title: str) -> EvaluatedNetwork | None:
        """The network that black-box attacks on `title` are crafted on: the plain one if there is another, as in the
        paper, else the first other one."""
        others = [network for name, network in self.networks.items() if name != title]
        return next((network for network in others if not network.branches), others[0] if others else None)

    def protocol(
        self,
        *,
        attack: AttackProtocol | None = None,
        noise: NoiseProtocol | None = None,
        **details: str | float,
    ) -> Protocol:
        """How a figure was measured: what stands beside every one."""
        return Protocol(images=len(self.images), seed=self.seed, attack=attack, noise=noise, details=details)

    def representations(self, title: str, *, train: bool) -> dict[str, Tensor]:
        """Activations (images, features) float32 of every layer, on the CPU; computed once on each process.

        Those of one network at a time are kept: the widest layers fill memory.
        """
        if (title, train) not in self._activations:
            for key in [key for key in self._activations if key[0] != title]:
                del self._activations[key]
            model = self.networks[title].model
            images = self.train_images.float() / 255 if train else self.images
            values = activations(model, images.to(self.images.device), list(self.layers), batch_size=self.chunk)
            self._activations[title, train] = {layer: value.cpu() for layer, value in values.items()}
        return self._activations[title, train]

    @functools.cached_property
    def _activations(self) -> dict[tuple[str, bool], dict[str, Tensor]]:
        return {}

    def max_margin(self, title: str, layer: str) -> MaxMarginClassifier:
        """Fitted on all features of the training images at a layer, once on each process."""
        if (title, layer) not in self._classifiers:
            train = self.representations(title, train=True)[layer]
            (classifier,) = max_margin_classifiers(
                train, self.train_labels, seed=self.integer_seed("max-margin", layer)
            )
            self._classifiers[title, layer] = classifier
        return self._classifiers[title, layer]

    @functools.cached_property
    def _classifiers(self) -> dict[tuple[str, str], MaxMarginClassifier]:
        return {}

    @property
    def views(self) -> dict[str, View]:
        """Of the layers whose samples are not whole images for the branches of any of the networks."""
        return {layer: view for network in self.networks.values() for layer, view in network.views.items()}

    def samples(self, title: str) -> dict[str, Tensor]:
        """Activations (samples, features) of the test images: what the branch on each layer counts as a sample."""
        whole = self.representations(title, train=False)
        views = {layer: view for layer, view in self.views.items() if layer in whole}
        if not views:
            return whole
        model = self.networks[title].model
        values = activations(model, self.images, list(views), batch_size=self.chunk, views=views)
        return {**whole, **{layer: value.cpu() for layer, value in values.items()}}


def build_context(
    networks: Sequence[EvaluatedNetwork],
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
    for network in networks:
        have = getattr(network.model.network, "num_classes", classes)
        if have != classes:
            raise EvaluationError(
                f"{network.path} tells {have} classes apart, and {data.name} has {classes}: give its own data"
            )
        channels = len(network.model.mean.flatten())
        if channels != data.image_size[0]:
            raise EvaluationError(
                f"{network.path} takes images of {channels} channels, and those of {data.name} have "
                f"{data.image_size[0]}: give its own data"
            )
        network.model.to(device)
    test = _balanced(data.test_labels, limit, classes)
    train = _balanced(data.train_labels, train_limit, classes)
    return Context(
        networks={network.title: network for network in networks},
        images=(data.test_images[test].float() / 255).to(device),
        labels=data.test_labels[test].to(device),
        train_images=data.train_images[train],
        train_labels=data.train_labels[train],
        data=DataInfo(
            source=data.name, split="test", images=len(test), train_images=len(train), image_size=data.image_size,
            class_names=data.class_names, fingerprint=data.fingerprint,
        ),
        layers=tuple(layers),
        seed=seed,
        chunk=chunk,
        other_labels=(other_labels.train_labels[train], other_labels.test_labels[test]) if other_labels else None,
    )  # fmt: skip


def _balanced(labels: Tensor, limit: int, classes: int) -> Tensor:
    if limit < 1:
        raise EvaluationError(f"--limit and --train-limit must be at least 1, not {limit}")
    return torch.from_numpy(balanced_rows(labels.numpy(), min(limit, len(labels)), classes))
