"""`Measurement`: one thing that a suite measures on each network; `Context`: what every one of them may use."""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...core.views import FLATTEN, View
from ...data.images import balanced_rows
from ...evaluation import PixelModel, attacks
from ...evaluation.attacks.gradient import OnStep
from ...evaluation.maxmargin import MaxMarginClassifier, max_margin_classifiers
from ...evaluation.representations import activation_batches, activations
from ...evaluation.results import (
    AttackProtocol,
    Curve,
    DataInfo,
    Figure,
    Kind,
    NoiseProtocol,
    Protocol,
    Strip,
    Value,
    Verdict,
)
from ...evaluation.robustness import noise_at
from ..networks import EvaluatedNetwork
from .passes import Reading, TestPass

Columns = dict[str, list[Any]]  # name -> entries, of most one an image; JSON takes it as it is


@dataclasses.dataclass(frozen=True, eq=False)
class SpectrumImages:
    """Test images that spectra are taken of, on the CPU."""

    images: Tensor  # (k, channels, height, width) uint8
    labels: Tensor  # (k,) int64
    rows: Tensor  # (k,) int64: where each is among the images that all else is measured on; -1 where it is not


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
    source: EvaluatedNetwork | None = None  # that black-box attacks are crafted on; it is not measured
    spectrum: SpectrumImages | None = None  # None: spectra are taken of the images above
    expected: Mapping[tuple[str, int], frozenset[Reading]] = dataclasses.field(default_factory=dict)
    """What this process will read off a pass of each network and chunk."""

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.data.class_names

    def chunk_of(self, rows: range) -> tuple[Tensor, Tensor]:
        """Test images and labels of the rows."""
        return self.images[rows.start : rows.stop], self.labels[rows.start : rows.stop]

    def subset(self, rows: range, images: int | None) -> Tensor:
        """Which of the rows are among `images` test images, as many of each class, counted from rows.start; (k,) int64.

        All of them for None.
        """
        if images is None or images >= len(self.labels):
            return torch.arange(len(rows), device=self.labels.device)
        if images not in self._subsets:
            chosen = torch.zeros(len(self.labels), dtype=torch.bool)
            chosen[torch.from_numpy(balanced_rows(self.labels.cpu().numpy(), images, len(self.class_names)))] = True
            self._subsets[images] = chosen
        return self._subsets[images][rows.start : rows.stop].nonzero()[:, 0].to(self.labels.device)

    @functools.cached_property
    def _subsets(self) -> dict[int, Tensor]:
        return {}

    def generator(self, *parts: str | int) -> torch.Generator:
        """A random stream of its own for `parts`, the same for all networks: figures are paired image by image."""
        return torch.Generator(device=self.images.device).manual_seed(self._checksum(parts))

    def integer_seed(self, *parts: str | int) -> int:
        """The same for what takes a number."""
        return self._checksum(parts) % 2**31

    def _checksum(self, parts: Sequence[str | int]) -> int:
        return zlib.crc32("/".join(map(str, (self.seed, *parts))).encode())

    def other(self, title: str) -> EvaluatedNetwork | None:
        """The network that black-box attacks on `title` are crafted on: `source` if there is one, else the plain one if
        there is another, as in the paper, else one without branches, else the first other one."""
        if self.source is not None:
            return self.source
        others = [network for name, network in self.networks.items() if name != title]
        by_choice = sorted(others, key=lambda network: (bool(network.branches), network.comparator is not None))
        return by_choice[0] if by_choice else None

    def protocol(
        self,
        *,
        attack: AttackProtocol | None = None,
        noise: NoiseProtocol | None = None,
        **details: str | float,
    ) -> Protocol:
        """How a figure was measured: what stands beside every one."""
        return Protocol(images=len(self.images), seed=self.seed, attack=attack, noise=noise, details=details)

    def test_pass(self, title: str) -> TestPass:
        """What the test images leave in a network, each run through it once on each process.

        That of one network at a time is kept: the widest layers fill memory.
        """
        if title not in self._passes:
            self._passes.clear()
            expected = {chunk: readings for (name, chunk), readings in self.expected.items() if name == title}
            self._passes[title] = TestPass(self.networks[title].model, self.images, self.layers, self.chunk, expected)
        return self._passes[title]

    @functools.cached_property
    def _passes(self) -> dict[str, TestPass]:
        return {}

    def representations(self, title: str, *, train: bool) -> dict[str, Tensor]:
        """Activations (images, features) float32 of every layer, on the CPU; computed once on each process.

        Those of one network at a time are kept.
        """
        if not train:
            return self.test_pass(title).activations(range(len(self.images)))
        if title not in self._of_training:
            self._of_training.clear()
            parts: dict[str, list[Tensor]] = {layer: [] for layer in self.layers}
            pixels = (self.train_images.float() / 255).to(self.images.device)
            for batch in activation_batches(self.networks[title].model, pixels, list(self.layers), self.chunk):
                for layer, value in batch.items():
                    parts[layer].append(value.cpu())
            self._of_training[title] = {layer: torch.cat(values) for layer, values in parts.items()}
        return self._of_training[title]

    @functools.cached_property
    def _of_training(self) -> dict[str, dict[str, Tensor]]:
        return {}

    def max_margin(self, title: str, layer: str) -> MaxMarginClassifier:
        """Fitted on all features of the training images at a layer, once on each process."""
        if (title, layer) not in self._classifiers:
            # All layers together: the training images are run through the network once.
            for each, train in self.representations(title, train=True).items():
                (classifier,) = max_margin_classifiers(
                    train, self.train_labels, seed=self.integer_seed("max-margin", each),
                    classes=len(self.class_names),
                )  # fmt: skip
                self._classifiers[title, each] = classifier
        return self._classifiers[title, layer]

    @functools.cached_property
    def _classifiers(self) -> dict[tuple[str, str], MaxMarginClassifier]:
        return {}

    @property
    def views(self) -> dict[str, View]:
        """Of the layers whose samples are not whole images, one for all networks: that of the first one with a branch
        there, else of any that says one."""
        networks = list(self.networks.values())
        of_branches = [(layer, one.views.get(layer, FLATTEN)) for one in networks for layer in one.branches]
        said = dict(reversed([*of_branches, *(item for one in networks for item in one.views.items())]))
        return {layer: view for layer, view in said.items() if view.kind != "flatten"}

    def samples(self, title: str) -> tuple[dict[str, Tensor], Tensor]:
        """Activations (samples, features) of each layer, and the labels of the images, both on the CPU.

        A sample is what the branch on the layer counts as one. The images are those that spectra are taken of: more
        than are attacked, as wide layers need. Those among the test images are not run through the network again.
        """
        views = {layer: view for layer, view in self.views.items() if layer in self.layers}
        of_test = self.test_pass(title).activations(range(len(self.images)), views)
        if self.spectrum is None:
            return of_test, self.labels.cpu()
        known = self.spectrum.rows >= 0
        count, found = len(known), {}
        for layer, values in of_test.items():  # (images, samples of each, features) until all are there
            by_image = values.view(len(self.images), -1, values.shape[1])
            found[layer] = by_image.new_empty(count, *by_image.shape[1:])
            found[layer][known] = by_image[self.spectrum.rows[known]]
        device = self.images.device
        for rows in (~known).nonzero()[:, 0].split(self.chunk) if not known.all() else ():
            pixels = (self.spectrum.images[rows].float() / 255).to(device)
            seen = activations(self.networks[title].model, pixels, list(self.layers), self.chunk, views)
            for layer, values in seen.items():
                found[layer][rows] = values.cpu().view(len(rows), *found[layer].shape[1:])
        return {layer: values.flatten(0, 1) for layer, values in found.items()}, self.spectrum.labels


@dataclasses.dataclass
class Results:
    """What measurements contribute to an `Evaluation`."""

    figures: list[Figure] = dataclasses.field(default_factory=list)
    curves: list[Curve] = dataclasses.field(default_factory=list)
    strips: list[Strip] = dataclasses.field(default_factory=list)
    verdicts: dict[str, Verdict] = dataclasses.field(default_factory=dict)
    normalized_verdicts: dict[str, Verdict] = dataclasses.field(default_factory=dict)
    observed: dict[str, dict[str, Columns]] = dataclasses.field(default_factory=dict)
    """What all measurements observed, by their keys and the titles of networks: for a report that takes in another."""
    warnings: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Measurement(abc.ABC):
    """One thing to measure. A subclass is a frozen dataclass: its fields are the settings, all of them in its `repr`.

    `observe` sees one network and one chunk of the test images, on whichever process; `report` sees the columns
    of all chunks, joined in order, and makes figures of them. Nothing else may pass between the two, which is what
    makes an evaluation resumable and independent of the number of processes.
    """

    chunked: ClassVar[bool] = True  # False: one unit with all images, for what is no sum over images
    readings: ClassVar[frozenset[Reading]] = frozenset()  # what it takes of `Context.test_pass`

    @property
    @abc.abstractmethod
    def key(self) -> str:
        """Names the measurement; no other one of an evaluation has the same."""

    def unavailable(self, context: Context, title: str) -> str | None:
        """Why it cannot be measured on this network; None if it can."""
        return None

    def covers(self, other: Measurement) -> bool:
        """Whether its figures are among those of this one, so that `other` need not be measured."""
        return False

    @abc.abstractmethod
    def observe(self, context: Context, title: str, rows: range) -> Columns:
        """Measures the network `title` on the test images `rows`.

        Raises:
            EvaluationError: it cannot be measured on this network; the evaluation goes on without it, and says so.
        """

    @abc.abstractmethod
    def report(self, context: Context, observed: Mapping[str, Columns], results: Results) -> None:
        """Adds figures, curves or pictures of all networks: title -> columns of all test images."""


@dataclasses.dataclass(frozen=True)
class AttackMeasurement(Measurement):
    """One that attacks each network.

    Args:
        black_box: the images are crafted on the other network of the evaluation instead.
    """

    black_box: bool = dataclasses.field(default=False, kw_only=True)

    def unavailable(self, context: Context, title: str) -> str | None:
        return "it needs a second network: --against" if self.black_box and context.other(title) is None else None

    def attacked(self, context: Context, title: str) -> PixelModel:
        """The network that the images for `title` are crafted on."""
        other = context.other(title) if self.black_box else None
        return (other or context.networks[title]).model

    @property
    def kind(self) -> Kind:
        """Of a figure that is the accuracy under the attack."""
        return Kind.TRANSFER if self.black_box else Kind.ATTACK

    @property
    def group(self) -> str:
        return "Black box" if self.black_box else "White box"

    def protocol(
        self, context: Context, observed: Mapping[str, Columns], attack: AttackProtocol, **details: str | float
    ) -> Protocol:
        """How it was measured."""
        if self.black_box:
            sources = {title: context.other(title) for title in observed}
            crafted_on = {title: source.title for title, source in sources.items() if source}
            attack = dataclasses.replace(attack, crafted_on=crafted_on)
        return dataclasses.replace(context.protocol(attack=attack), details=details)

    def accuracy(self, context: Context, observed: Mapping[str, Columns], label: str, protocol: Protocol) -> Figure:
        """The figure of the column "withstood": the accuracy under the attack."""
        return Figure(
            key=self.key, kind=self.kind, group=self.group, label=label, protocol=protocol,
            values=shares(context, observed, "withstood"),
        )  # fmt: skip


def column(values: Tensor) -> list[Any]:
    """A tensor (n, ...) of any dtype as a column. float32 goes through JSON and back without a change."""
    return list(values.detach().cpu().tolist())


def share(context: Context, flags: Iterable[bool]) -> Value:
    """The share of images whose flag is set, with its interval."""
    flags = list(flags)
    return Value.share(sum(flags), len(flags), context.confidence)


def shares(context: Context, observed: Mapping[str, Columns], name: str) -> dict[str, Value]:
    """The share of a column of flags, of each network."""
    return {title: share(context, columns[name]) for title, columns in observed.items()}


def noise_at_half(accuracies: Sequence[float], sizes: Sequence[float], of: int) -> Value:
    """The mean rho at which half of the images are misclassified; of what withstands all of it, how much that is."""
    size = noise_at(accuracies, sizes)
    return Value(size, of=of, beyond=None if math.isfinite(size) else max(sizes))


LOSSES = {"cross_entropy": "cross-entropy", "log_odds": "cross-entropy by its log-odds", "margin": "margin"}
PGD_SETTINGS = {setting.name.lower(): setting for setting in (attacks.MADRY, attacks.FIXED, attacks.PAPER)}


def pgd(
    context: Context,
    model: nn.Module,  # takes pixels in [0, 1]
    rows: range,
    eps: float,
    steps: int,
    setting: str = "madry",
    restarts: int = 1,
    radius_unit: str = "pixel",
    chosen: Tensor | None = None,
    on_step: OnStep | None = None,
    loss: str | None = None,
) -> Tensor:
    """Adversarial images for the test images `rows`, or those of them that are `chosen`.

    Each image has the same random start, in parts of the radius, at every radius and for all networks.

    Args:
        loss: as of `attacks.pgd`; None is that of the setting.
    """
    images, labels = context.chunk_of(rows)
    if chosen is not None:
        images, labels = images[chosen], labels[chosen]
    arguments = PGD_SETTINGS[setting].arguments(eps, steps)
    arguments["loss"] = loss or arguments["loss"]
    return attacks.pgd(
        model, images, labels, **arguments, restarts=restarts, radius_unit=radius_unit,
        generator=context.generator("pgd", rows.start), on_step=on_step,
    )  # fmt: skip


def pgd_protocol(
    eps: float | None,
    steps: int,
    setting: str = "madry",
    restarts: int = 1,
    radius_unit: str = "pixel",
    loss: str | None = None,
) -> AttackProtocol:
    """How the images of `pgd` are made; `eps` is None for several radii."""
    chosen = PGD_SETTINGS[setting]
    return AttackProtocol(
        name="PGD", eps=eps, steps=steps, step_size=None if eps is None else chosen.arguments(eps, steps)["step_size"],
        random_start=chosen.random_start, restarts=restarts, setting=chosen.name, radius_unit=radius_unit,
        notes=(LOSSES[loss or chosen.loss], "last iterate"),
    )  # fmt: skip
