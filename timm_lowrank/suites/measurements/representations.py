"""How few directions representations take, how far attacks move them, the cushion (paper, Fig. 2, 4 to 8, 12 to 20).

And how sparse they are, and what low-rank pre-activations would make of them (paper, Appendix A)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch

from ...core.spectrum import rank_of_ratios, singular_energies
from ...errors import EvaluationError
from ...evaluation.cushion import histograms, layer_cushion
from ...evaluation.representations import (
    class_variance_ratio,
    cut_spectrum,
    fit_plane,
    preactivations,
    stability,
)
from ...evaluation.results import Curve, Figure, Kind, Protocol, Series, Value
from ..networks import random_twin
from .base import Columns, Context, Measurement, Results, column, pgd, pgd_protocol
from .passes import Reading

DIMENSION = "Dimension of the representations"
DIRECTIONS = (1, 5, 10, 20)
DENSE = 200  # points of a curve that are all drawn
SAMPLES = {"flatten": "activations", "token": "all tokens", "pool": "means over the tokens"}


@dataclasses.dataclass(frozen=True)
class Spectrum(Measurement):
    """Variance ratio and effective rank of every layer, and of each class alone (paper, Section 3, Fig. 2, 5, 6, 7).

    Args:
        uncentred: also the variance ratio of the activations as they are, which is the one that the paper prints.
    """

    uncentred: bool = False
    key = "spectrum"
    chunked = False
    readings = frozenset({Reading.ACTIVATIONS})

    def observe(self, context: Context, title: str, rows: range) -> Columns:
        columns: Columns = {}
        samples, labels = context.samples(title)
        for layer, values in samples.items():
            try:
                energies = singular_energies(values)
                raw = singular_energies(values, centred=False) if self.uncentred else None
            except ValueError as error:
                raise EvaluationError(f"layer {layer!r}: {error}") from error
            columns[f"{layer} shares"] = column(energies / energies.sum())
            if raw is not None:
                columns[f"{layer} raw shares"] = column((raw / raw.sum())[: max(DIRECTIONS)])
            columns[f"{layer} features"] = [values.shape[1]]
            columns[f"{layer} samples"] = [len(values)]
            owners = labels.repeat_interleave(len(values) // len(labels))  # of tokens, the image's label
            by_class = class_variance_ratio(values, owners, (1,), centred=False)
            columns[f"{layer} class names"] = [context.class_names[label] for label in sorted(by_class)]
            columns[f"{layer} classes"] = [by_class[label][0] for label in sorted(by_class)]
        columns["images"] = [len(labels)]
        return columns

    def report(self, context: Context, observed: Mapping[str, Columns], results: Results) -> None:
        for layer in context.layers:
            self._report_layer(context, layer, observed, results)

    def _report_layer(self, context: Context, layer: str, observed: Mapping[str, Columns], results: Results) -> None:
        first = next(iter(observed.values()))
        of = first["images"][0]
        widths = {title: columns[f"{layer} features"][0] for title, columns in observed.items()}
        cumulated = {title: _cumulated(columns[f"{layer} shares"]) for title, columns in observed.items()}
        kind = context.views[layer].kind if layer in context.views else "flatten"

        def protocol(representation: str) -> Protocol:
            features = {"features": first[f"{layer} features"][0]} if len(set(widths.values())) == 1 else {}
            made = context.protocol(**features, representation=representation)
            return dataclasses.replace(made, images=of)

        centred = protocol(f"{SAMPLES[kind]} of the test images, centred")
        shown = [("", "", cumulated, centred)]
        if self.uncentred:
            raw = {title: _cumulated(columns[f"{layer} raw shares"]) for title, columns in observed.items()}
            as_printed = protocol(f"{SAMPLES[kind]} of the test images as they are, the paper's formula")
            shown.append(("-uncentred", ", not centred", raw, as_printed))
        for ending, words, ratios_of, about in shown:
            for count in (count for count in DIRECTIONS if count < max(widths.values())):
                label = f"{layer}: variance in {count} direction{'s' * (count > 1)}{words}"
                values = {title: Value(own[min(count, len(own)) - 1], of=of) for title, own in ratios_of.items()}
                results.figures.append(Figure(
                    key=f"variance-{layer}-{count}{ending}", kind=Kind.VARIANCE if not ending else Kind.RAW_VARIANCE,
                    group=DIMENSION, layer=layer, directions=count, label=label, protocol=about,
                    values=values,
                ))  # fmt: skip
        most = {title: columns[f"{layer} samples"][0] - 1 for title, columns in observed.items()}
        bounds = {title: most[title] if most[title] < width else None for title, width in widths.items()}
        ranks = {
            title: Value(float(rank_of_ratios(held)), of=of, at_most=bounds[title]) for title, held in cumulated.items()
        }
        classes = {
            title: dataclasses.replace(Value.median(columns[f"{layer} classes"], context.confidence), of=of)
            for title, columns in observed.items()
        }
        of_classes = protocol("activations of one class, not centred; median over classes")
        results.figures += [
            Figure(
                key=f"effective-rank-{layer}", kind=Kind.EFFECTIVE_RANK, group=DIMENSION, layer=layer,
                label=f"{layer}: effective rank, 99 %", values=ranks, protocol=centred, unit="count", better="lower",
            ),
            Figure(
                key=f"class-variance-{layer}", kind=Kind.CLASS_VARIANCE, group=DIMENSION, layer=layer,
                label=f"{layer}: a class in its first direction", values=classes, protocol=of_classes,
            ),
        ]  # fmt: skip
        lines = []
        for title, held in cumulated.items():
            chosen = _thinned(len(held))
            y = tuple(held[number - 1] for number in chosen)
            lines.append(Series(network=title, name="all classes", x=tuple(map(float, chosen)), y=y))
        by_class = tuple(
            Series(
                network=title, name="a class", x=tuple(map(float, range(len(columns[f"{layer} classes"])))),
                y=tuple(columns[f"{layer} classes"]),
            )
            for title, columns in observed.items()
        )  # fmt: skip
        names = first[f"{layer} class names"]
        results.curves += [
            Curve(
                key=f"variance-{layer}", group=DIMENSION, kind="line", title=f"{layer}: variance ratio",
                x_label="number of leading directions", y_label="share of the test variance", lines=tuple(lines),
                x_log=True, y_share=True, protocol=centred,
            ),
            Curve(
                key=f"class-variance-{layer}", group=DIMENSION, kind="line", lines=by_class, y_share=True,
                title=f"{layer}: each class in its first direction",
                x_label=f"classes from 0 ({names[0]}) to {len(names) - 1} ({names[-1]})",
                y_label="share of the energy of the class", protocol=of_classes,
            ),
        ]  # fmt: skip


def _cumulated(shares: list[float]) -> list[float]:
    return torch.tensor(shares, dtype=torch.float64).cumsum(0).clamp(max=1).tolist()  # type: ignore[no-any-return]


def _thinned(count: int) -> list[int]:
    """1 ... count, beyond `DENSE` a few numbers to each doubling: what a logarithmic axis can show."""
    numbers = list(range(1, min(count, DENSE) + 1))
    while numbers[-1] < count:
        numbers.append(min(count, max(numbers[-1] + 1, round(numbers[-1] * 1.02))))
    return numbers


@dataclasses.dataclass(frozen=True)
class Plane(Measurement):
    """The test images in the plane of the two leading directions of the last layer (paper, Fig. 8)."""

    key = "plane"
    chunked = False
    readings = frozenset({Reading.ACTIVATIONS})

    def observe(self, context: Context, title: str, rows: range) -> Columns:
        values = context.representations(title, train=False)[context.layers[-1]]
        plane = fit_plane(values)
        return {"points": column(plane.project(values)), "shares": [list(plane.shares)]}

    def report(self, context: Context, observed: Mapping[str, Columns], results: Results) -> None:
        lines = []
        for title, columns in observed.items():
            x, y = zip(*columns["points"], strict=True)
            name = f"{sum(columns['shares'][0]):.0%} of the variance"
            lines.append(Series(network=title, name=name, x=x, y=y, labels=tuple(context.labels.tolist())))
        results.curves.append(Curve(
            key=self.key, group=DIMENSION, kind="scatter",
            title=f"{context.layers[-1]} in its two leading directions",
            x_label="coordinate in the first direction", y_label="coordinate in the second direction",
            lines=tuple(lines),
            protocol=context.protocol(representation="centred activations of the test images"),
        ))  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Stability(Measurement):
    """How far an adversarial perturbation moves the representations (paper, Fig. 4b, 16).

    Args:
        eps: of PGD that makes the perturbations.
        steps: of PGD.
    """

    eps: float
    steps: int
    key = "stability"
    readings = frozenset({Reading.ACTIVATIONS})

    def observe(self, context: Context, title: str, rows: range) -> Columns:
        images, _ = context.chunk_of(rows)
        model = context.networks[title].model
        adversarial = pgd(context, model, rows, self.eps, self.steps)
        clean = context.test_pass(title).activations(rows)
        shifts = stability(model, images, adversarial, list(context.layers), clean=clean)
        return {"input": column(shifts.inputs)} | {layer: column(value) for layer, value in shifts.layers.items()}

    def report(self, context: Context, observed: Mapping[str, Columns], results: Results) -> None:
        protocol = context.protocol(attack=pgd_protocol(self.eps, self.steps))
        for layer in context.layers:
            gains, clouds = {}, []
            for title, columns in observed.items():
                pairs = [(x, y) for x, y in zip(columns["input"], columns[layer], strict=True) if x > 0 and y == y]
                gains[title] = Value.median((y / x for x, y in pairs), context.confidence)
                xs, ys = tuple(x for x, _ in pairs), tuple(y for _, y in pairs)
                clouds.append(Series(network=title, name=title, x=xs, y=ys, labels=(0,) * len(pairs)))
            results.figures.append(Figure(
                key=f"stability-{layer}", kind=Kind.STABILITY, group="Stability", layer=layer,
                label=f"{layer}: median shift over that of the image", values=gains, protocol=protocol,
                unit="number", better="lower",
            ))  # fmt: skip
            results.curves.append(Curve(
                key=f"stability-{layer}", group="Stability", kind="scatter",
                title=f"{layer}: shift of the representation against that of the input",
                x_label="squared relative shift of the image", y_label="squared relative shift of the layer",
                lines=tuple(clouds), protocol=protocol,
            ))  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Cushion(Measurement):
    """The layer cushion of every convolution and linear layer (paper, Section 3.2, Fig. 4c, 12 to 20).

    Args:
        random_network: beside each network one of the same architecture that was never trained, as in the figures.
    """

    random_network: bool = False
    key = "cushion"
    readings = frozenset({Reading.CUSHIONS})

    def observe(self, context: Context, title: str, rows: range) -> Columns:
        images, _ = context.chunk_of(rows)
        own = context.test_pass(title).cushions(rows)
        columns = {f"trained {layer}": column(values) for layer, values in own.items()}
        if self.random_network:
            twin = random_twin(context.networks[title], context.integer_seed("random network"))
            others = layer_cushion(twin, images, batch_size=context.chunk)
            columns |= {f"random {layer}": column(values) for layer, values in others.items()}
        return columns

    def report(self, context: Context, observed: Mapping[str, Columns], results: Results) -> None:
        protocol = context.protocol(
            quantity="||W x|| / (||W||_F ||x||) of each test image, W the linear map, without bias"
        )
        # A layer that runs on one row for all images looks like one that runs on a chunk of one image.
        observed = {
            title: {name: values for name, values in columns.items() if len(values) == len(context.images)}
            for title, columns in observed.items()
        }
        names = dict.fromkeys(name for columns in observed.values() for name in columns)
        for layer in (name.removeprefix("trained ") for name in names if name.startswith("trained ")):
            drawn: dict[tuple[str, str], list[float]] = {}
            for kind, ending, words in (("trained", "", ""), ("random", "-random", ", randomly initialised")):
                ratios = {
                    t: columns[f"{kind} {layer}"] for t, columns in observed.items() if f"{kind} {layer}" in columns
                }
                if not ratios:
                    continue
                drawn |= {(title, layer + words): values for title, values in ratios.items()}
                median = Figure(
                    key=f"cushion-{layer}{ending}", kind=Kind.CUSHION, group="Layer cushion", layer=layer,
                    label=f"{layer}: median{words}", unit="number", protocol=protocol,
                    values={title: Value.median(values, context.confidence) for title, values in ratios.items()},
                )  # fmt: skip
                smallest = {title: _smallest(values) for title, values in ratios.items()}
                results.figures += [
                    median,
                    dataclasses.replace(
                        median, key=f"cushion-{layer}{ending}-mu", kind=Kind.CUSHION_MU, values=smallest,
                        label=f"{layer}: mu, the smallest of all images{words}",
                    ),
                ]  # fmt: skip
            if all(math.isnan(value) for values in drawn.values() for value in values):
                continue  # weights or inputs of zero: the figures above say that there is no number
            counted = histograms({str(key): torch.tensor(values) for key, values in drawn.items()})
            lines = tuple(
                Series(network=key[0], name=key[1], x=tuple(counted.edges), y=tuple(counted.counts[str(key)]))
                for key in drawn
            )
            results.curves.append(Curve(
                key=f"cushion-{layer}", group="Layer cushion", kind="histogram", title=f"Cushion of {layer}",
                x_label="cushion of the layer", y_label="number of test images", protocol=protocol, lines=lines,
            ))  # fmt: skip


def _smallest(values: list[float]) -> Value:
    """mu of the images at hand: Arora et al. (2018) take it over the training set."""
    defined = [value for value in values if value == value]
    return Value(min(defined, default=math.nan), of=len(defined))


@dataclasses.dataclass(frozen=True)
class Sparsity(Measurement):
    """The share of the activations of every layer that are zero (paper, Appendix A)."""

    key = "sparsity"
    readings = frozenset({Reading.ACTIVATIONS})

    def observe(self, context: Context, title: str, rows: range) -> Columns:
        values = context.test_pass(title).activations(rows)
        return {layer: column((value == 0).double().mean(dim=1)) for layer, value in values.items()}

    def report(self, context: Context, observed: Mapping[str, Columns], results: Results) -> None:
        results.figures += [
            Figure(
                key=f"{self.key}-{layer}", kind=Kind.SPARSITY, group=DIMENSION, layer=layer,
                label=f"{layer}: activations that are zero", protocol=context.protocol(), better=None,
                values={title: Value.mean(columns[layer]) for title, columns in observed.items()},
            )
            for layer in context.layers
        ]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class CutPreactivations(Measurement):
    """The rank of activations whose pre-activations were cut to `rank`, or to half of it where there are no more than
    that many images or features (paper, Appendix A). Of layers that end in an activation function."""

    rank: int = 100
    key = "cut-preactivations"
    chunked = False

    def observe(self, context: Context, title: str, rows: range) -> Columns:
        columns: Columns = {}
        model = context.networks[title].model
        for layer in context.layers:
            try:
                values, function = preactivations(model, context.images, layer, context.chunk)
            except EvaluationError:  # the input of a classifier, mostly, behind a pooling
                continue
            most = min(values.shape)
            rank = self.rank if self.rank < most else max(1, most // 2)
            spectrum = cut_spectrum(values.cpu(), function, rank)
            columns[f"{layer} numbers"] = [spectrum.cut, spectrum.rank, spectrum.share]
            columns[f"{layer} singular values"] = column(spectrum.singular_values)
        if not columns:
            raise EvaluationError("no layer ends in an elementwise activation function")
        return columns

    def report(self, context: Context, observed: Mapping[str, Columns], results: Results) -> None:
        for layer in context.layers:
            by_cut: dict[int, dict[str, Columns]] = {}  # narrow networks are cut to less: figures of their own
            for title, columns in observed.items():
                if f"{layer} numbers" in columns:
                    by_cut.setdefault(columns[f"{layer} numbers"][0], {})[title] = columns
            for number, (cut, found) in enumerate(by_cut.items()):
                self._report_cut(context, layer, cut, f"-cut-to-{cut}" if number else "", found, results)

    def _report_cut(
        self, context: Context, layer: str, cut: int, ending: str, found: Mapping[str, Columns], results: Results
    ) -> None:
        of_layer = {
            title: (columns[f"{layer} numbers"], columns[f"{layer} singular values"])
            for title, columns in found.items()
        }
        rank = Figure(
            key=f"{self.key}-{layer}-rank{ending}", kind=Kind.CUT_PREACTIVATIONS, group=DIMENSION, layer=layer,
            label=f"{layer}: rank behind pre-activations of rank {cut}", unit="count", better=None,
            protocol=context.protocol(cut_to=cut, representation="activations of the test images, not centred"),
            values={title: Value(float(numbers[1])) for title, (numbers, _) in of_layer.items()},
        )  # fmt: skip
        results.figures += [rank, dataclasses.replace(
            rank, key=f"{self.key}-{layer}-share{ending}", label=f"{layer}: share of their first {cut} singular values",
            unit="share", values={title: Value(numbers[2]) for title, (numbers, _) in of_layer.items()},
        )]  # fmt: skip
        for place, name in ((cut + 1, "next"), (10 * cut, "tenfold")):
            held = {title: Value(values[place - 1]) for title, (_, values) in of_layer.items() if place <= len(values)}
            if held:
                results.figures.append(dataclasses.replace(
                    rank, key=f"{self.key}-{layer}-{name}{ending}", unit="number", values=held,
                    label=f"{layer}: their singular value {place:,}{f', cut to {cut}' * bool(ending)}",
                ))  # fmt: skip
