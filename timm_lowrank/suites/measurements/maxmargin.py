"""Max-margin classifiers on the representations: compression, hybrids, other labels (paper, Tables 5 to 8)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ...errors import EvaluationError
from ...evaluation import attacks
from ...evaluation.maxmargin import (
    HybridModel,
    MaxMarginClassifier,
    judge_hybrid,
    label_transfer,
    max_margin_classifiers,
    parameters_behind,
)
from ...evaluation.pixels import classified_right
from ..context import Context
from .base import Columns, Findings, Measurement, chunk_of, column, protocol, radius_text, share

COMPRESSION, HYBRIDS, TRANSFER = "Compression", "Max-margin hybrids", "Other labels"


@dataclasses.dataclass(frozen=True)
class Compression(Measurement):
    """PCA to a few dimensions and a linear max-margin classifier on them (paper, Section 3.3, Tables 5, 8)."""

    dimensions: tuple[int, ...]
    key = "compression"
    chunked = False

    def observe(self, context: Context, title: str, rows: range) -> Columns:
        found: Columns = {}
        train = context.representations(title, train=True)
        test = context.representations(title, train=False)
        labels = context.labels.cpu()
        for layer in context.layers:
            fitting = [dimension for dimension in self.dimensions if dimension < min(train[layer].shape)]
            classifiers = max_margin_classifiers(
                train[layer], context.train_labels, [*fitting, None], seed=context.integer_seed("max-margin", layer)
            )
            for classifier in classifiers:
                name = f"{layer} {classifier.dimensions}"
                found[name] = column(classifier.predict(test[layer]) == labels)
                found[f"{name} parameters"] = [classifier.parameters]
            found[f"{layer} replaced"] = [parameters_behind(context.subjects[title].model, layer, context.images[:1])]
            found[f"{layer} features"] = [train[layer].shape[1]]
        return found

    def report(self, context: Context, observed: Mapping[str, Columns], findings: Findings) -> None:
        first = next(iter(observed.values()))
        for layer in context.layers:
            width = first[f"{layer} features"][0]
            for dimension in (*self.dimensions, None):
                if f"{layer} {dimension}" not in first:
                    continue
                values = {
                    title: share(columns[f"{layer} {dimension}"], context.confidence)
                    for title, columns in observed.items()
                }
                about = protocol(
                    context, classifier="scaled, PCA, linear, hinge loss, L2 0.01, SGD",
                    train_images=len(context.train_images), dimensions=dimension or width,
                    parameters=first[f"{layer} {dimension} parameters"][0],
                    replaces_parameters=first[f"{layer} replaced"][0],
                )  # fmt: skip
                count = f"{dimension} dimensions" if dimension else f"all {width:,} features"
                findings.figure(
                    f"compression-{layer}-{dimension or 'all'}", COMPRESSION, f"{layer}: max-margin on {count}",
                    values, about,
                )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Hybrid(Measurement):
    """Max-margin classifiers on the representations under attack (paper, Table 6).

    Three figures for each layer: clean, on the images that fool the network which it is made of (the paper's), and
    under PGD on the hybrid itself, which the paper did not try.

    Args:
        eps: radius of PGD.
        steps: of PGD.
    """

    eps: float
    steps: int
    key = "hybrid"

    def observe(self, context: Context, title: str, rows: range) -> Columns:
        images, labels = chunk_of(context, rows)
        model = context.subjects[title].model
        arguments = attacks.MADRY.arguments(self.eps, self.steps)
        crafted = attacks.pgd(model, images, labels, **arguments, generator=context.generator("pgd", rows.start))
        found: Columns = {}
        for layer in context.layers:
            hybrid = HybridModel(model, layer, _max_margin(context, title, layer), context.images[:1])
            attacked = attacks.pgd(hybrid, images, labels, **arguments, generator=context.generator("pgd", rows.start))
            judged = judge_hybrid(model, hybrid, images, crafted, labels, batch_size=context.chunk)
            found[f"{layer} clean"] = column(classified_right(hybrid, images, labels))
            found[f"{layer} fooled"] = column(judged.right)
            found[f"{layer} counted"] = column(judged.counted)
            found[f"{layer} attacked"] = column(classified_right(hybrid, attacked, labels))
        return found

    def report(self, context: Context, observed: Mapping[str, Columns], findings: Findings) -> None:
        about = protocol(
            context, attack="PGD, L_inf", setting="Madry", eps=radius_text(self.eps), steps=self.steps,
            step_size=radius_text(self.eps / 4), random_start=True, restarts=1,
            classifier="scaled, linear, hinge loss, L2 0.01, SGD", train_images=len(context.train_images),
        )  # fmt: skip
        for layer in context.layers:
            kinds = {
                "clean": "clean images",
                "fooled": "images that fool the network it is made of",
                "attacked": "attacked itself",
            }
            for kind, label in kinds.items():
                values = {
                    title: share(_counted(columns, layer, kind), context.confidence)
                    for title, columns in observed.items()
                }
                findings.figure(f"hybrid-{layer}-{kind}", HYBRIDS, f"{layer} hybrid, {label}", values, about)


@dataclasses.dataclass(frozen=True)
class OtherLabels(Measurement):
    """A max-margin classifier for labels that the network was not trained on (paper, Table 7c)."""

    key = "other-labels"
    chunked = False

    def unavailable(self, context: Context, title: str) -> str | None:
        return "it needs other labels: --other-labels COLUMN" if context.other_labels is None else None

    def observe(self, context: Context, title: str, rows: range) -> Columns:
        if context.other_labels is None:
            raise EvaluationError("there are no other labels: name their column")
        train = context.representations(title, train=True)
        test = context.representations(title, train=False)
        found: Columns = {}
        for layer in context.layers:
            labels = {"other": context.other_labels}
            seed = context.integer_seed("other", layer)
            found[layer] = column(label_transfer(train[layer], test[layer], labels, seed=seed)["other"])
        return found

    def report(self, context: Context, observed: Mapping[str, Columns], findings: Findings) -> None:
        about = protocol(
            context, classifier="scaled, linear, hinge loss, L2 0.01, SGD",
            train_images=len(context.train_images),
        )  # fmt: skip
        for layer in context.layers:
            values = {title: share(columns[layer], context.confidence) for title, columns in observed.items()}
            findings.figure(f"other-labels-{layer}", TRANSFER, f"{layer}: the other labels", values, about)


def _max_margin(context: Context, title: str, layer: str) -> MaxMarginClassifier:
    """Fitted on all features of the training images; kept, since every chunk of a hybrid needs the same one."""

    def fit() -> MaxMarginClassifier:
        train = context.representations(title, train=True)[layer]
        return max_margin_classifiers(train, context.train_labels, seed=context.integer_seed("max-margin", layer))[0]

    return context.keep(("max-margin", title, layer), fit)


def _counted(columns: Columns, layer: str, kind: str) -> list[bool]:
    """Of the images that fool the network those that did not before; of the others all."""
    flags: list[bool] = columns[f"{layer} {kind}"]
    if kind != "fooled":
        return flags
    return [flag for flag, counted in zip(flags, columns[f"{layer} counted"], strict=True) if counted]
