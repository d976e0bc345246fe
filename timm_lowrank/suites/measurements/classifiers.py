"""Max-margin classifiers on the representations: compression, hybrids, other labels (paper, Tables 5 to 8)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

from torch import Tensor

from ...errors import EvaluationError
from ...evaluation import PixelModel, attacks
from ...evaluation.maxmargin import (
    HybridModel,
    judge_hybrid,
    max_margin_classifiers,
    parameters_behind,
)
from ...evaluation.pixels import classified_right
from ...evaluation.results import AttackProtocol, Figure, Kind
from .base import Columns, Context, Measurement, Results, column, pgd, pgd_protocol, shares
from .passes import Reading

LINEAR = "scaled, linear, hinge loss, L2 0.01, SGD"


@dataclasses.dataclass(frozen=True)
class Compression(Measurement):
    """PCA to a few dimensions and a linear max-margin classifier on them (paper, Section 3.3, Tables 5, 8).

    This is what "accuracy on d directions" means everywhere in this package.
    """

    dimensions: tuple[int, ...]
    key = "compression"
    chunked = False
    readings = frozenset({Reading.ACTIVATIONS})

    def observe(self, context: Context, title: str, rows: range) -> Columns:
        columns: Columns = {}
        train = context.representations(title, train=True)
        test = context.representations(title, train=False)
        labels = context.labels.cpu()
        for layer in context.layers:
            fitting = [dimension for dimension in self.dimensions if dimension < min(train[layer].shape)]
            classifiers = max_margin_classifiers(
                train[layer], context.train_labels, [*fitting, None], seed=context.integer_seed("max-margin", layer),
                classes=len(context.class_names),
            )  # fmt: skip
            for classifier in classifiers:
                name = f"{layer} {classifier.dimensions}"
                columns[name] = column(classifier.predict(test[layer]) == labels)
                columns[f"{name} parameters"] = [classifier.parameters]
            replaced = parameters_behind(context.networks[title].model, layer, context.images[:1])
            columns[f"{layer} replaced"] = [replaced]
            columns[f"{layer} features"] = [train[layer].shape[1]]
        return columns

    def report(self, context: Context, observed: Mapping[str, Columns], results: Results) -> None:
        for layer in context.layers:
            for dimension in (*self.dimensions, None):
                name = f"{layer} {dimension}"
                found = {title: columns for title, columns in observed.items() if name in columns}
                if not found:
                    continue
                sizes = {
                    "dimensions": {columns[f"{layer} features"][0] if dimension is None else dimension
                                   for columns in found.values()},
                    "parameters": {columns[f"{name} parameters"][0] for columns in found.values()},
                    "replaces_parameters": {columns[f"{layer} replaced"][0] for columns in found.values()},
                }  # fmt: skip
                # A layer of this name may be as wide as it likes in each network: what differs is said of none.
                alike = {detail: values.pop() for detail, values in sizes.items() if len(values) == 1}
                count = f"{dimension} dimensions" if dimension else "all features"
                if dimension is None and "dimensions" in alike:
                    count = f"all {alike['dimensions']:,} features"
                protocol = context.protocol(
                    classifier="scaled, PCA, linear, hinge loss, L2 0.01, SGD",
                    train_images=len(context.train_images), **alike,
                )  # fmt: skip
                results.figures.append(Figure(
                    key=f"compression-{layer}-{dimension or 'all'}", kind=Kind.COMPRESSION, group="Compression",
                    label=f"{layer}: max-margin on {count}", layer=layer, directions=dimension,
                    values=shares(context, found, name), protocol=protocol,
                ))  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LeadingFeatures(Measurement):
    """A linear max-margin classifier on the first features of the last layer as they are, without PCA.

    What a network that was trained for short embeddings is made for, and no other.
    """

    dimensions: tuple[int, ...]
    key = "leading-features"
    chunked = False
    readings = frozenset({Reading.ACTIVATIONS})

    def observe(self, context: Context, title: str, rows: range) -> Columns:
        layer, labels, columns = context.layers[-1], context.labels.cpu(), Columns()
        train = context.representations(title, train=True)[layer]
        test = context.representations(title, train=False)[layer]
        for count in (count for count in self.dimensions if count < train.shape[1]):
            (classifier,) = max_margin_classifiers(
                train[:, :count], context.train_labels, seed=context.integer_seed("max-margin", layer),
                classes=len(context.class_names),
            )  # fmt: skip
            columns[str(count)] = column(classifier.predict(test[:, :count]) == labels)
        return columns

    def report(self, context: Context, observed: Mapping[str, Columns], results: Results) -> None:
        layer = context.layers[-1]
        for count in self.dimensions:
            found = {title: columns for title, columns in observed.items() if str(count) in columns}
            if not found:
                continue
            results.figures.append(Figure(
                key=f"{self.key}-{layer}-{count}", kind=Kind.LEADING_FEATURES, group="Compression", layer=layer,
                label=f"{layer}: max-margin on the first {count} features", directions=count,
                values=shares(context, found, str(count)),
                protocol=context.protocol(
                    classifier=LINEAR, train_images=len(context.train_images), dimensions=count
                ),
            ))  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Hybrid(Measurement):
    """Max-margin classifiers on the representations under attack (paper, Table 6).

    Three figures for each layer: clean, on the images that fool the network which it is made of (the paper's), and
    under PGD on the hybrid itself, which the paper did not try. That attack climbs the margin: the scores of a
    max-margin classifier are no log-odds, and where they are large the softmax of a cross-entropy is saturated, so that
    its gradient vanishes and the hybrid seems to withstand what it was not attacked with.

    Args:
        eps: radius of PGD.
        steps: of PGD.
    """

    eps: float
    steps: int
    key = "hybrid"

    def observe(self, context: Context, title: str, rows: range) -> Columns:
        images, labels = context.chunk_of(rows)
        model = context.networks[title].model
        crafted = pgd(context, model, rows, self.eps, self.steps)
        columns: Columns = {}
        for layer in context.layers:
            hybrid = HybridModel(model, layer, context.max_margin(title, layer), context.images[:1])
            attacked = pgd(context, hybrid, rows, self.eps, self.steps, loss="margin")
            judged = judge_hybrid(model, hybrid, images, crafted, labels, batch_size=context.chunk)
            columns[f"{layer} clean"] = column(classified_right(hybrid, images, labels))
            columns[f"{layer} fooled"] = column(judged.right[judged.counted])
            columns[f"{layer} attacked"] = column(classified_right(hybrid, attacked, labels))
        return columns

    def report(self, context: Context, observed: Mapping[str, Columns], results: Results) -> None:
        on_network, on_hybrid = (pgd_protocol(self.eps, self.steps, loss=loss) for loss in ("cross_entropy", "margin"))
        shown = {
            "clean": ("clean images", None),
            "fooled": ("images that fool the network it is made of", on_network),
            "attacked": ("attacked itself", on_hybrid),
        }
        for layer in context.layers:
            for which, (label, attack) in shown.items():
                protocol = context.protocol(attack=attack, classifier=LINEAR, train_images=len(context.train_images))
                results.figures.append(Figure(
                    key=f"hybrid-{layer}-{which}", kind=Kind.HYBRID, group="Max-margin hybrids",
                    label=f"{layer} hybrid, {label}", layer=layer, protocol=protocol,
                    values=shares(context, observed, f"{layer} {which}"),
                ))  # fmt: skip


UNTIL_FOOLED: dict[str, Callable[..., Tensor]] = {
    "DeepFool": attacks.deepfool,
    "Iter-LL-FGSM": attacks.iterative_least_likely,
    "Iter-FGSM": attacks.iterative_fgsm,
}


@dataclasses.dataclass(frozen=True)
class FooledHybrid(Measurement):
    """Hybrids on images that were changed until their network erred, and no further (paper, Table 6, Appendix D.5).

    Three figures for each layer. White box: the images are crafted on the network that the hybrid is made of. Black
    box: they are crafted on the other network, until this one errs. And the hybrid of that other network on these,
    which is the paper's comparison at equal noise: for N-LR it stops when 1-LR is fooled. Images count that the network
    is right on and that fool it in the end.

    DeepFool cannot be steered by another network: as a black box its images are those that it makes for the other
    network, of which few fool this one.

    Args:
        attack: a key of `UNTIL_FOOLED`.
        eps: radius of the two that have one, with steps of 1/255.
        steps: at most so many.
    """

    attack: str
    eps: float = 32 / 255
    steps: int = 40

    @property
    def key(self) -> str:
        return f"hybrid-{self.attack.lower()}"

    def observe(self, context: Context, title: str, rows: range) -> Columns:
        images, labels = context.chunk_of(rows)
        model, other = context.networks[title].model, context.other(title)
        crafted = {"white": self._crafted(model, model, images, labels)}
        if other is not None:
            crafted["black"] = self._crafted(other.model, model, images, labels)
        columns: Columns = {}
        for layer in context.layers:
            own = HybridModel(model, layer, context.max_margin(title, layer), images[:1])
            judges = {"white": ("white", own), "black": ("black", own)}
            if other is not None and any(other is network for network in context.networks.values()):
                theirs = HybridModel(other.model, layer, context.max_margin(other.title, layer), images[:1])
                judges["equal"] = ("black", theirs)
            for name, (source, hybrid) in judges.items():
                if source in crafted:
                    verdict = judge_hybrid(model, hybrid, images, crafted[source], labels, batch_size=context.chunk)
                    columns[f"{layer} {name}"] = column(verdict.right[verdict.counted])
        return columns

    def _crafted(self, source: PixelModel, judge: PixelModel, images: Tensor, labels: Tensor) -> Tensor:
        """Images crafted on `source` until they fool `judge`."""
        if self.attack == "DeepFool":
            return attacks.deepfool(source, images, labels, steps=self.steps)
        attack = functools.partial(UNTIL_FOOLED[self.attack], steps=self.steps)
        if source is judge:
            return attack(source, images, labels, eps=self.eps, stop_at_success=True)
        return attacks.until_fooled(source, judge, attack)(images, labels, self.eps)

    def report(self, context: Context, observed: Mapping[str, Columns], results: Results) -> None:
        iterated = self.attack != "DeepFool"
        attack = AttackProtocol(
            name=self.attack, norm="linf" if iterated else "l2", eps=self.eps if iterated else None, steps=self.steps,
            step_size=1 / 255 if iterated else None, random_start=False, stops_at_success=True,
        )  # fmt: skip
        sources = {title: source.title for title in observed if (source := context.other(title))}
        labels = {
            "white": "its own images", "black": "images of the other network",
            "equal": "the other network's hybrid on these, at the noise that fools this network",
        }  # fmt: skip
        for layer in context.layers:
            for which, label in labels.items():
                found = {title: c for title, c in observed.items() if f"{layer} {which}" in c}
                if not found:
                    continue
                about = attack if which == "white" else dataclasses.replace(attack, crafted_on=sources)
                results.figures.append(Figure(
                    key=f"{self.key}-{layer}-{which}", kind=Kind.HYBRID, group="Max-margin hybrids, until fooled",
                    label=f"{layer} hybrid, {self.attack} until fooled, {label}", layer=layer,
                    values=shares(context, found, f"{layer} {which}"),
                    protocol=context.protocol(
                        attack=about, classifier=LINEAR, train_images=len(context.train_images),
                        counted="images that the network is right on and that fool it",
                    ),
                ))  # fmt: skip


@dataclasses.dataclass(frozen=True)
class OtherLabels(Measurement):
    """A max-margin classifier for labels that the network was not trained on (paper, Table 7c)."""

    key = "other-labels"
    chunked = False
    readings = frozenset({Reading.ACTIVATIONS})

    def unavailable(self, context: Context, title: str) -> str | None:
        return "it needs other labels: --other-labels COLUMN" if context.other_labels is None else None

    def observe(self, context: Context, title: str, rows: range) -> Columns:
        if context.other_labels is None:
            raise EvaluationError("there are no other labels: name their column")
        train = context.representations(title, train=True)
        test = context.representations(title, train=False)
        seen, new = context.other_labels
        columns: Columns = {}
        for layer in context.layers:
            seed = context.integer_seed("other", layer)
            (classifier,) = max_margin_classifiers(
                train[layer], seen, seed=seed, classes=int(max(seen.max(), new.max())) + 1
            )
            columns[layer] = column(classifier.predict(test[layer]) == new)
        return columns

    def report(self, context: Context, observed: Mapping[str, Columns], results: Results) -> None:
        protocol = context.protocol(classifier=LINEAR, train_images=len(context.train_images))
        results.figures += [
            Figure(
                key=f"other-labels-{layer}", kind=Kind.OTHER_LABELS, group="Other labels",
                label=f"{layer}: the other labels", layer=layer, values=shares(context, observed, layer),
                protocol=protocol,
            )
            for layer in context.layers
        ]  # fmt: skip
