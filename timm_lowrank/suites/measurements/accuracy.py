"""Accuracy on clean, noisy and attacked images, and whether it can be believed (paper, Tables 1, 4, 9; Fig. 4a, 9)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ...errors import EvaluationError
from ...evaluation import PixelModel, attacks, masking, pixel_noise, predictions
from ...evaluation.attacks.auto import ITERATIONS, QUERIES, VERSIONS
from ...evaluation.noise import NOISE_READINGS, STANDARD_DEVIATION
from ...evaluation.representations import rho
from ...evaluation.results import (
    AttackProtocol,
    Curve,
    Figure,
    Kind,
    NoiseProtocol,
    Series,
    radius_text,
)
from .base import (
    AttackMeasurement,
    Columns,
    Context,
    Measurement,
    Results,
    column,
    noise_at_half,
    pgd,
    pgd_protocol,
    share,
    shares,
)
from .passes import Reading


def radius_key(eps: float) -> str:
    """A radius in the key of a measurement: 8-255."""
    return radius_text(eps).replace("/", "-")


def unit_key(radius_unit: str) -> str:
    """The unit of a radius in the key of a measurement: nothing for the pixel range."""
    return "" if radius_unit == "pixel" else f"-{radius_unit}"


def radius_label(eps: float, radius_unit: str) -> str:
    """A radius in the label of a figure: 8/255, 8/255 normalised."""
    return radius_text(eps) + " normalised" * (radius_unit == "normalized")


@dataclasses.dataclass(frozen=True)
class Clean(Measurement):
    """Accuracy on the test images as they are."""

    key = "clean"
    readings = frozenset({Reading.CLASSES})

    def observe(self, context: Context, title: str, rows: range) -> Columns:
        _, labels = context.chunk_of(rows)
        return {"correct": column(context.test_pass(title).classes(rows) == labels)}

    def report(self, context: Context, observed: Mapping[str, Columns], results: Results) -> None:
        results.figures.append(Figure(
            key=self.key, kind=Kind.CLEAN, group="Accuracy", label="Clean test images",
            values=shares(context, observed, "correct"), protocol=context.protocol(),
        ))  # fmt: skip


@dataclasses.dataclass(frozen=True)
class PixelNoise(Measurement):
    """Accuracy with Gaussian noise on a share of the pixels (paper, Table 4).

    Args:
        probability: that a pixel is hit.
        reading: of N(0, 128/255), a name in `timm_lowrank.evaluation.noise.NOISE_READINGS`.
    """

    probability: float
    reading: str = STANDARD_DEVIATION.name

    @property
    def key(self) -> str:
        return f"noise-{re.sub(r'[^a-z]+', '-', self.reading).strip('-')}-{self.probability:g}"

    def observe(self, context: Context, title: str, rows: range) -> Columns:
        images, labels = context.chunk_of(rows)
        reading, generator = NOISE_READINGS[self.reading], context.generator(self.key, rows.start)
        model = context.networks[title].model
        noisy = pixel_noise(
            images, self.probability, sigma=reading.sigma, per_channel=reading.per_channel,
            std=model.std if reading.unit == "normalized" else None, generator=generator,
        )  # fmt: skip
        return {"correct": column(predictions(model, noisy) == labels)}

    def report(self, context: Context, observed: Mapping[str, Columns], results: Results) -> None:
        reading = NOISE_READINGS[self.reading]  # what tells the readings apart comes first: long labels are cut
        which = " normalised" * (reading.unit == "normalized") + " together" * (not reading.per_channel)
        results.figures.append(Figure(
            key=self.key, kind=Kind.NOISE, group="Random noise",
            label=f"Noise p={self.probability:g}{which}, {self.reading.split(',')[0]}",
            values=shares(context, observed, "correct"),
            protocol=context.protocol(noise=NoiseProtocol(self.probability, self.reading)),
        ))  # fmt: skip


@dataclasses.dataclass(frozen=True)
class PGD(AttackMeasurement):
    """Accuracy under projected gradient descent in the L_inf ball.

    Args:
        setting: "madry", "fixed" or "paper", see `timm_lowrank.evaluation.attacks`.
        eps: radius.
        steps: of the attack.
        restarts: how often it begins anew; an image must withstand all of them.
        radius_unit: of eps and of the step, "pixel" or "normalized".
    """

    setting: str
    eps: float
    steps: int
    restarts: int = 1
    radius_unit: str = "pixel"

    @property
    def key(self) -> str:
        kind = "transfer" if self.black_box else "pgd"
        more = f"-x{self.restarts}" if self.restarts > 1 else ""
        return f"{kind}-{self.setting}{unit_key(self.radius_unit)}-{self.steps}{more}-{radius_key(self.eps)}"

    def observe(self, context: Context, title: str, rows: range) -> Columns:
        source = self.attacked(context, title)
        adversarial = pgd(
            context, source, rows, self.eps, self.steps, self.setting, self.restarts, radius_unit=self.radius_unit
        )
        _, labels = context.chunk_of(rows)
        return {"withstood": column(predictions(context.networks[title].model, adversarial) == labels)}

    def report(self, context: Context, observed: Mapping[str, Columns], results: Results) -> None:
        about = pgd_protocol(self.eps, self.steps, self.setting, self.restarts, self.radius_unit)
        label = f"PGD-{self.steps}, {radius_label(self.eps, self.radius_unit)} ({about.setting})"
        label += f", {self.restarts} restarts" if self.restarts > 1 else ""
        results.figures.append(self.accuracy(context, observed, label, self.protocol(context, observed, about)))


@dataclasses.dataclass(frozen=True)
class PGDSteps(Measurement):
    """All that one PGD attack tells: accuracy after several numbers of steps, as a white and as a black box (Table 1).

    The figures are those of several `PGD`, for the price of the longest: seven steps are the beginning of twenty, and
    what is crafted on one network as its white box is the black box of those that it is the other network of.

    Args:
        setting, eps, radius_unit: as of `PGD`.
        steps: after which it is looked at.
        images: how many of the test images, as many of each class; None are all.
    """

    setting: str
    eps: float
    steps: tuple[int, ...]
    radius_unit: str = "pixel"
    images: int | None = None

    @property
    def key(self) -> str:
        steps = "+".join(map(str, self.steps))
        return f"pgd-{self.setting}{unit_key(self.radius_unit)}-{steps}-{radius_key(self.eps)}"

    def part(self, steps: int, *, black_box: bool) -> PGD:
        """The measurement that would give one of the figures alone."""
        return PGD(self.setting, self.eps, steps, radius_unit=self.radius_unit, black_box=black_box)

    def covers(self, other: Measurement) -> bool:
        return any(self.part(steps, black_box=box).key == other.key for steps in self.steps for box in (False, True))

    def observe(self, context: Context, title: str, rows: range) -> Columns:
        chosen = context.subset(rows, self.images)
        if not len(chosen):
            return {}
        labels, columns = context.chunk_of(rows)[1][chosen], Columns()
        model, other = context.networks[title].model, context.other(title)

        def follow(source: PixelModel, judges: Mapping[str, PixelModel], own: bool) -> None:
            def note(step: int, points: Tensor, logits: Tensor) -> None:
                if step in self.steps:
                    if own:
                        columns[f"white {step}"] = column(logits.argmax(dim=1) == labels)
                    for name, judge in judges.items():
                        columns[f"black {step} {name}"] = column(predictions(judge, points) == labels)

            pgd(
                context, source, rows, self.eps, max(self.steps), self.setting,
                radius_unit=self.radius_unit, chosen=chosen, on_step=note,
            )  # fmt: skip

        judges = {
            name: network.model for name, network in context.networks.items() if self._source(context, name) == title
        }
        follow(model, judges, own=True)
        if other is not None and self._source(context, title) is None:  # one that is not measured itself
            follow(other.model, {title: model}, own=False)
        return columns

    def _source(self, context: Context, title: str) -> str | None:
        """The network among those measured that black-box attacks on `title` are crafted on."""
        other = context.other(title)
        return next((name for name, network in context.networks.items() if network is other), None)

    def report(self, context: Context, observed: Mapping[str, Columns], results: Results) -> None:
        for steps in self.steps:
            for black_box in (False, True):
                flags = {}
                for title in context.networks:
                    source = (self._source(context, title) or title) if black_box else title
                    name = f"black {steps} {title}" if black_box else f"white {steps}"
                    if name in observed.get(source, {}):
                        flags[title] = {"withstood": observed[source][name]}
                if flags:
                    one = Results()
                    self.part(steps, black_box=black_box).report(context, flags, one)
                    images = len(next(iter(flags.values()))["withstood"])
                    results.figures += [
                        dataclasses.replace(figure, protocol=dataclasses.replace(figure.protocol, images=images))
                        for figure in one.figures
                    ]
        if all(context.other(title) is None for title in context.networks):
            results.warnings += [
                f"{title}: {self.key} was not measured as a black box: it needs a second network: --against"
                for title in context.networks
            ]


@dataclasses.dataclass(frozen=True)
class AutoAttack(AttackMeasurement):
    """Accuracy under AutoAttack, and which of its attacks broke what.

    As a black box, images of the other network that AutoAttack could not break stay as they are.

    Args:
        norm: "linf" or "l2".
        eps: radius.
        version: "standard", "plus" or "rand".
    """

    norm: str
    eps: float
    version: str = "standard"

    @property
    def key(self) -> str:
        kind = f"{'transfer-' * self.black_box}autoattack"
        version = "" if self.version == "standard" else f"-{self.version}"
        return f"{kind}{version}-{self.norm}-{radius_key(self.eps)}"

    @property
    def group(self) -> str:
        return super().group if self.black_box else "AutoAttack"

    def observe(self, context: Context, title: str, rows: range) -> Columns:
        images, labels = context.chunk_of(rows)
        result = attacks.run_autoattack(
            self.attacked(context, title), images, labels, eps=self.eps, norm=self.norm, version=self.version,
            seed=context.integer_seed("autoattack", rows.start), batch_size=len(images),
        )  # fmt: skip
        if self.black_box:
            withstood = predictions(context.networks[title].model, result.images) == labels
            return {"withstood": column(withstood)}
        return {
            "withstood": [by is None for by in result.broken_by],
            "broken_by": list(result.broken_by),
            "flags": [list(result.flags)] + [[]] * (len(images) - 1),
        }

    def report(self, context: Context, observed: Mapping[str, Columns], results: Results) -> None:
        standard, parts = self.version == "standard", VERSIONS[self.version]
        about = AttackProtocol(
            name="AutoAttack", version=self.version, norm=self.norm, eps=self.eps, steps=ITERATIONS,
            restarts=5 if self.version == "plus" else 1,
        )  # fmt: skip
        queries = {"square_queries": QUERIES} if "square" in parts else {}
        protocol = self.protocol(
            context, observed, about, attacks=", ".join(parts), **queries, batch=context.chunk
        )  # fmt: skip
        name = "AutoAttack" if standard else f"AutoAttack {self.version}"
        label = f"{name}, {'L_inf' if self.norm == 'linf' else 'L2'} {radius_text(self.eps)}"
        results.figures.append(self.accuracy(context, observed, label, protocol))
        broken_by = {title: columns["broken_by"] for title, columns in observed.items() if "broken_by" in columns}
        for part in dict.fromkeys(by for parts in broken_by.values() for by in parts if by not in (None, "clean")):
            broke = {title: share(context, (by == part for by in parts)) for title, parts in broken_by.items()}
            results.figures.append(Figure(
                key=f"{self.key}-{part}", kind=Kind.BROKEN_BY, group=self.group, label=f"{label}: broken by {part}",
                values=broke, protocol=protocol, better=None,
            ))  # fmt: skip
        for title, columns in observed.items():
            flags = dict.fromkeys(flag for flags in columns.get("flags", []) for flag in flags)
            results.warnings += [f"{title}, {label}: {flag}" for flag in flags]


@dataclasses.dataclass(frozen=True)
class AccuracyByRadius(AttackMeasurement):
    """Accuracy against the radius of PGD, and against the perturbation rho that was made (paper, Fig. 4a, 9)."""

    radii: tuple[float, ...]
    steps: int

    @property
    def key(self) -> str:
        return f"accuracy-by-radius{'-transfer' * self.black_box}"

    def observe(self, context: Context, title: str, rows: range) -> Columns:
        images, labels = context.chunk_of(rows)
        model = context.networks[title].model
        withstood, sizes = [], []
        for eps in self.radii:
            adversarial = pgd(context, self.attacked(context, title), rows, eps, self.steps)
            withstood.append(predictions(model, adversarial) == labels)
            sizes.append(rho(images, adversarial))
        right = column(predictions(model, images) == labels)
        return {"right": right, "withstood": column(torch.stack(withstood, 1)), "rho": column(torch.stack(sizes, 1))}

    def report(self, context: Context, observed: Mapping[str, Columns], results: Results) -> None:
        protocol = self.protocol(context, observed, pgd_protocol(None, self.steps), step_size="eps/4")
        by_radius, by_rho, halves = [], [], {}
        for title, columns in observed.items():
            accuracy = torch.tensor(columns["withstood"]).double().mean(0).tolist()
            sizes = torch.tensor(columns["rho"], dtype=torch.float64).nanmean(0).tolist()
            line = Series(
                network=title, name=f"PGD-{self.steps}", x=tuple(eps * 255 for eps in self.radii), y=tuple(accuracy)
            )
            by_radius.append(line)
            clean = sum(columns["right"]) / len(columns["right"])
            halves[title] = noise_at_half([clean, *accuracy], [0.0, *sizes], len(columns["right"]))
            by_rho.append(dataclasses.replace(line, x=tuple(sizes)))
        against_radius = Curve(
            key=self.key, group=self.group, kind="line", title="Accuracy against the radius",
            x_label="L_inf radius in levels of 255", y_label="accuracy on test images", lines=tuple(by_radius),
            y_share=True, protocol=protocol,
        )  # fmt: skip
        against_rho = dataclasses.replace(
            against_radius, key=f"{self.key}-rho", title="Accuracy against the perturbation", lines=tuple(by_rho),
            x_label="mean relative length of the change, rho",
        )  # fmt: skip
        results.curves += [against_radius, against_rho]
        results.figures.append(Figure(
            key=f"{self.key}-half", kind=Kind.PERTURBATION, group=self.group, protocol=protocol, values=halves,
            label=f"PGD-{self.steps}: mean rho at which half of the images are misclassified", unit="number",
        ))  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Diagnosis(Measurement):
    """Whether the network only looks robust; see `timm_lowrank.evaluation.masking`.

    AutoAttack in the same radius is taken in where it was measured, too.

    Args:
        eps: L_inf radius of the attacks that are compared.
        budget: "quick" or "full".
        radius_unit: of eps, "pixel" or "normalized".
    """

    eps: float
    budget: str
    radius_unit: str = "pixel"

    @property
    def key(self) -> str:
        return f"diagnosis{unit_key(self.radius_unit)}"

    def observe(self, context: Context, title: str, rows: range) -> Columns:
        images, labels = context.chunk_of(rows)
        other = context.other(title)
        observations = masking.observe(
            context.networks[title].model, images, labels, eps=self.eps,
            seed=context.integer_seed("diagnosis", rows.start), source=other.model if other else None,
            budget=self.budget, radius_unit=self.radius_unit,
        )  # fmt: skip
        return {name: column(values) for name, values in observations.items()}

    def report(self, context: Context, observed: Mapping[str, Columns], results: Results) -> None:
        in_pixels = self.radius_unit == "pixel"
        verdicts = results.verdicts if in_pixels else results.normalized_verdicts
        autoattack = results.observed.get(AutoAttack("linf", self.eps).key, {}) if in_pixels else {}
        for title, columns in observed.items():
            try:
                observations = {name: torch.tensor(values) for name, values in columns.items()}
                if "withstood" in autoattack.get(title, {}):
                    observations["autoattack"] = observations["clean"] & torch.tensor(autoattack[title]["withstood"])
                verdicts[title] = masking.judge(observations)
            except EvaluationError as error:  # too few images, or none that is right: what was measured still counts
                results.warnings.append(f"{title}: {self.key} gives no verdict on gradient masking: {error}")
