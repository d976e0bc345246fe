"""How little it takes to fool a network, what more does, and how it looks (paper, Tables 3, 9, 10; Fig. 3, 10, 11)."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ...evaluation import attacks, predictions
from ...evaluation.representations import rho
from ...evaluation.results import AttackProtocol, Curve, Figure, Kind, Series, Strip, StripRow, Value, radius_text
from ...evaluation.robustness import (
    SmallestRadii,
    deepfool_rho,
    minimum_perturbation,
    smallest_radii,
    step_accuracies,
    trajectory,
)
from .accuracy import radius_key
from .base import (
    LOSSES,
    AttackMeasurement,
    Columns,
    Context,
    Measurement,
    Results,
    column,
    noise_at_half,
    pgd_protocol,
    shares,
)

STRIP_IMAGES, STRIP_CLASSES, STRIP_PIXELS = 8, 100, 64


@dataclasses.dataclass(frozen=True)
class IteratedAttackMeasurement(AttackMeasurement):
    """One with Iter-FGSM or Iter-LL-FGSM (paper, Appendix D.1).

    Args:
        least_likely: towards the least likely class instead of away from the true one.
    """

    least_likely: bool

    @property
    def name(self) -> str:
        """Of the attack."""
        return "Iter-LL-FGSM" if self.least_likely else "Iter-FGSM"

    @property
    def attack(self) -> Callable[..., Tensor]:
        return attacks.iterative_least_likely if self.least_likely else attacks.iterative_fgsm

    def about(self, eps: float | None, steps: int, step_size: float = 1 / 255, stops: bool = False) -> AttackProtocol:
        return AttackProtocol(
            name=self.name, eps=eps, steps=steps, step_size=step_size, random_start=False, restarts=1,
            targeted=self.least_likely, stops_at_success=stops,
            notes=("cross-entropy of the least likely class" if self.least_likely else LOSSES["log_odds"],),
        )  # fmt: skip


class _Aim:
    """What Iter-LL-FGSM aimed at in the last step of each image: the class that was least likely before it (Eq. 6)."""

    def __init__(self) -> None:
        self.targets = self._logits = torch.empty(0)

    def __call__(self, step: int, images: Tensor, logits: Tensor) -> None:
        """As `on_step` of an attack, which gives images that have stopped the logits that they stopped with."""
        if not step:
            self.targets = logits.argmin(dim=1)
        else:
            moved = (logits != self._logits).any(dim=1)
            self.targets = torch.where(moved, self._logits.argmin(dim=1), self.targets)
        self._logits = logits.clone()


@dataclasses.dataclass(frozen=True)
class IteratedFGSM(IteratedAttackMeasurement):
    """Accuracy under Iter-FGSM or Iter-LL-FGSM, with a step of 1/255 and a fixed number of steps.

    Args:
        eps: radius in units of the pixel range.
        steps: of the attack.
        stop_at_success: leaves an image alone once it is misclassified (paper, Appendix D.4).
    """

    eps: float
    steps: int
    stop_at_success: bool = False

    @property
    def key(self) -> str:
        transfer, stop = "transfer-" * self.black_box, "-stop" * self.stop_at_success
        return f"{transfer}{self.name.lower()}{stop}-{self.steps}-{radius_key(self.eps)}"

    def observe(self, context: Context, title: str, rows: range) -> Columns:
        images, labels = context.chunk_of(rows)
        source = self.attacked(context, title)
        aim = _Aim()
        adversarial = self.attack(
            source, images, labels, eps=self.eps, steps=self.steps, stop_at_success=self.stop_at_success,
            on_step=aim if self.least_likely else None,
        )  # fmt: skip
        classes = predictions(context.networks[title].model, adversarial)
        sizes = rho(images, adversarial)
        if self.stop_at_success:  # what is wrong to begin with is not changed: its 0 says nothing of the attack
            sizes = sizes.masked_fill(predictions(context.networks[title].model, images) != labels, math.nan)
        columns = {"withstood": column(classes == labels), "rho": column(sizes)}
        if self.least_likely:
            columns["hit"] = column(classes == aim.targets)
        return columns

    def report(self, context: Context, observed: Mapping[str, Columns], results: Results) -> None:
        label = f"{self.name}, {self.steps} steps, {radius_text(self.eps)}{', stops at success' * self.stop_at_success}"
        about = self.about(self.eps, self.steps, stops=self.stop_at_success)
        accuracy = self.accuracy(context, observed, label, self.protocol(context, observed, about))
        sizes = {title: Value.median(columns["rho"], context.confidence) for title, columns in observed.items()}
        which = " of the images that were right" * self.stop_at_success
        results.figures += [
            accuracy,
            dataclasses.replace(
                accuracy, key=f"{self.key}-rho", kind=Kind.PERTURBATION, label=f"{label}: median rho{which}",
                values=sizes, unit="number", better=None,
            ),
        ]  # fmt: skip
        if self.least_likely:
            hits = dataclasses.replace(
                accuracy, key=f"{self.key}-hit", kind=Kind.TARGET_HIT, label=f"{label}: target hit",
                values=shares(context, observed, "hit"), better="lower",
            )  # fmt: skip
            results.figures.append(hits)


@dataclasses.dataclass(frozen=True)
class MinimumPerturbation(IteratedAttackMeasurement):
    """The smallest radius of a grid at which an attack that stops at success misclassifies 99 % (Tables 3, 10).

    As a black box the attack stops when this network is fooled, not the one that it follows.

    Args:
        radii: the grid, in ascending order.
    """

    radii: tuple[float, ...]
    share: float = 0.99

    @property
    def steps(self) -> int:
        """With a step of 1/255 they must reach the largest radius; some more, for steps back."""
        return math.ceil(255 * max(self.radii) - 1e-9) + 8

    @property
    def key(self) -> str:
        return f"minimum-{'transfer-' * self.black_box}{self.name.lower()}"

    def observe(self, context: Context, title: str, rows: range) -> Columns:
        images, labels = context.chunk_of(rows)
        model = context.networks[title].model
        if self.black_box:
            stopping = attacks.until_fooled(
                self.attacked(context, title), model, functools.partial(self.attack, steps=self.steps)
            )
        else:

            def stopping(clean: Tensor, wanted: Tensor, eps: float) -> Tensor:
                return self.attack(model, clean, wanted, eps=eps, steps=self.steps, stop_at_success=True)

        smallest = smallest_radii(model, images, labels, stopping, self.radii)
        return {"radius": column(smallest.radius), "rho": column(smallest.rho)}

    def report(self, context: Context, observed: Mapping[str, Columns], results: Results) -> None:
        radius, sizes = {}, {}
        for title, columns in observed.items():
            if not any(columns["radius"]):
                radius[title] = Value(math.nan, of=0)
                results.warnings.append(f"{title}: {self.key} has no images: none is classified right to begin with")
                continue
            smallest = minimum_perturbation(
                SmallestRadii(*(torch.tensor(columns[name], dtype=torch.float64) for name in ("radius", "rho"))),
                self.share,
            )
            beyond = max(self.radii) if smallest.eps is None else None
            radius[title] = Value(math.nan if smallest.eps is None else smallest.eps, of=smallest.of, beyond=beyond)
            if smallest.eps is not None:  # else there is no "there"
                sizes[title] = Value(math.nan if smallest.rho is None else smallest.rho, of=smallest.of)
        about = self.about(None, self.steps, stops=True)
        grid = ", ".join(radius_text(eps) for eps in self.radii)
        smallest_radius = Figure(
            key=self.key, kind=Kind.MINIMUM_RADIUS, group=self.group,
            label=f"{self.name}: smallest radius that misclassifies {self.share:.0%}", values=radius,
            protocol=self.protocol(context, observed, about, radii=grid), unit="number",
        )  # fmt: skip
        mean_rho = dataclasses.replace(
            smallest_radius, key=f"{self.key}-rho", kind=Kind.PERTURBATION, label=f"{self.name}: mean rho there",
            values=sizes,
        )  # fmt: skip
        results.figures += [smallest_radius, mean_rho]


@dataclasses.dataclass(frozen=True)
class OverSteps(IteratedAttackMeasurement):
    """Instantaneous and cumulative accuracy over the steps of an attack (paper, Appendix D.4, Fig. 11)."""

    eps: float
    step_size: float
    steps: int

    @property
    def key(self) -> str:
        return f"over-steps-{'transfer-' * self.black_box}{self.name.lower()}"

    def observe(self, context: Context, title: str, rows: range) -> Columns:
        images, labels = context.chunk_of(rows)
        attack = functools.partial(self.attack, eps=self.eps, steps=self.steps, step_size=self.step_size)
        source, judge = self.attacked(context, title), context.networks[title].model
        return {"classes": column(trajectory(source, images, labels, attack, judge=judge))}

    def report(self, context: Context, observed: Mapping[str, Columns], results: Results) -> None:
        lines = []
        for title, columns in observed.items():
            for name, accuracy in step_accuracies(torch.tensor(columns["classes"]))._asdict().items():
                lines.append(Series(network=title, name=name, x=tuple(range(len(accuracy))), y=tuple(accuracy)))
        results.curves.append(Curve(
            key=self.key, group=self.group, kind="line", title=f"{self.name}: predictions kept over its steps",
            x_label="number of attack steps", y_label="share of predictions kept", lines=tuple(lines), y_share=True,
            protocol=self.protocol(context, observed, self.about(self.eps, self.steps, self.step_size)),
        ))  # fmt: skip


@dataclasses.dataclass(frozen=True)
class AccuracyByNoise(IteratedAttackMeasurement):
    """Accuracy against the noise that an attack adds, step by step, and the noise that halves it (paper, Fig. 4a, 9).

    As in the paper, noise grows with the number of steps of one and the same attack (its footnote 5).

    Args:
        eps: radius; far enough that steps of 1/255 do not end at it.
        steps: of the attack.
    """

    eps: float
    steps: int

    @property
    def key(self) -> str:
        return f"accuracy-by-noise-{'transfer-' * self.black_box}{self.name.lower()}"

    def observe(self, context: Context, title: str, rows: range) -> Columns:
        images, labels = context.chunk_of(rows)
        source, judge = self.attacked(context, title), context.networks[title].model
        withstood, sizes = [], []

        def note(step: int, points: Tensor, logits: Tensor) -> None:
            classes = predictions(judge, points) if self.black_box else logits.argmax(dim=1)
            withstood.append(classes == labels)
            sizes.append(rho(images, points))

        self.attack(source, images, labels, eps=self.eps, steps=self.steps, on_step=note)
        return {"withstood": column(torch.stack(withstood, 1)), "rho": column(torch.stack(sizes, 1))}

    def report(self, context: Context, observed: Mapping[str, Columns], results: Results) -> None:
        protocol = self.protocol(context, observed, self.about(self.eps, self.steps))
        lines, halves = [], {}
        for title, columns in observed.items():
            accuracy = torch.tensor(columns["withstood"]).double().mean(0).tolist()
            sizes = torch.tensor(columns["rho"], dtype=torch.float64).nanmean(0).tolist()
            lines.append(Series(network=title, name=self.name, x=tuple(sizes), y=tuple(accuracy)))
            halves[title] = noise_at_half(accuracy, sizes, len(columns["rho"]))
        results.curves.append(Curve(
            key=self.key, group=self.group, kind="line", title=f"{self.name}: accuracy against the noise of its steps",
            x_label="mean relative length of the change, rho", y_label="accuracy on test images",
            lines=tuple(lines), y_share=True, protocol=protocol,
        ))  # fmt: skip
        results.figures.append(Figure(
            key=f"{self.key}-half", kind=Kind.PERTURBATION, group=self.group, protocol=protocol, values=halves,
            label=f"{self.name}: mean rho at which half of the images are misclassified", unit="number",
        ))  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DeepFool(AttackMeasurement):
    """The smallest L2 perturbation that DeepFool finds, of images that are classified right (paper, Table 3)."""

    steps: int = 50
    overshoot: float = 0.02

    @property
    def key(self) -> str:
        return f"deepfool{'-transfer' * self.black_box}"

    def observe(self, context: Context, title: str, rows: range) -> Columns:
        images, labels = context.chunk_of(rows)
        smallest = deepfool_rho(
            self.attacked(context, title), images, labels, judge=context.networks[title].model, steps=self.steps,
            overshoot=self.overshoot,
        )  # fmt: skip
        return {
            "withstood": column(smallest.radius == math.inf),
            "length": column(smallest.radius),
            "rho": column(smallest.rho),
        }

    def report(self, context: Context, observed: Mapping[str, Columns], results: Results) -> None:
        fooled = {
            title: [pair for pair in zip(columns["length"], columns["rho"], strict=True) if 0 < pair[0] < math.inf]
            for title, columns in observed.items()
        }
        lengths = {
            title: Value.median((length for length, _ in pairs), context.confidence) for title, pairs in fooled.items()
        }
        about = AttackProtocol(name="DeepFool", norm="l2", steps=self.steps)
        protocol = self.protocol(context, observed, about, overshoot=self.overshoot)
        accuracy = self.accuracy(context, observed, "DeepFool: accuracy", protocol)
        accuracy = dataclasses.replace(accuracy, key=f"{self.key}-accuracy")
        which = "of the images that were right and are fooled"
        median_length = dataclasses.replace(
            accuracy, key=f"{self.key}-length", kind=Kind.PERTURBATION, label=f"DeepFool: median L2 length {which}",
            values=lengths, unit="number",
        )  # fmt: skip
        mean_rho = dataclasses.replace(
            median_length, key=f"{self.key}-rho", label=f"DeepFool: mean rho {which}",
            values={title: Value.mean(size for _, size in pairs) for title, pairs in fooled.items()},
        )  # fmt: skip
        lines, halves = [], {}
        for title, columns in observed.items():
            right, sizes = _standing(columns["rho"], columns["withstood"])
            lines.append(Series(network=title, name="DeepFool", x=tuple(sizes), y=tuple(right)))
            halves[title] = noise_at_half(right, sizes, len(columns["rho"]))
        half = dataclasses.replace(
            median_length, key=f"{self.key}-half", values=halves,
            label="DeepFool: rho that is enough for half of the images to be misclassified",
        )  # fmt: skip
        results.figures += [accuracy, median_length, mean_rho, half]
        results.curves.append(Curve(
            key=f"{self.key}-accuracy-by-noise", group=self.group, kind="line",
            x_label="relative length of the change, rho", y_label="accuracy on test images",
            title="DeepFool: accuracy where each image may be changed by so much", lines=tuple(lines), y_share=True,
            protocol=protocol,
        ))  # fmt: skip


def _standing(sizes: list[float], withstood: list[bool]) -> tuple[list[float], list[float]]:
    """The share of images that take more than so much, and how much that is, at the sizes of those that are fooled.

    Size 0, which comes first, is the image itself. Images of which nothing is known stand.
    """
    fooled = sorted(size for size, stands in zip(sizes, withstood, strict=True) if not stands and not math.isnan(size))
    steps = {0.0: 0} | {size: number for number, size in enumerate(fooled, 1)}
    return [1 - number / len(sizes) for number in steps.values()], list(steps)


@dataclasses.dataclass(frozen=True)
class AdversarialStrip(Measurement):
    """The first image of every class beside its adversarial version (paper, Fig. 3, 10).

    Args:
        attack: "deepfool", or "pgd" at 8/255 with 20 steps.
    """

    attack: str
    chunked = False

    @property
    def key(self) -> str:
        return f"strip-{self.attack}"

    def observe(self, context: Context, title: str, rows: range) -> Columns:
        shown = _one_of_each_class(context.labels)
        images, labels = context.images[shown], context.labels[shown]
        model = context.networks[title].model
        if self.attack == "deepfool":
            adversarial = attacks.deepfool(model, images, labels)
        else:
            arguments = attacks.MADRY.arguments(8 / 255, 20)
            adversarial = attacks.pgd(model, images, labels, **arguments, generator=context.generator(self.key))
        return {
            "original": column(_small(images)),
            "adversarial": column(_small(adversarial)),
            "difference": column(_small((0.5 + 10 * (adversarial - images)).clamp(0, 1))),
            "label": column(labels),
            "before": column(predictions(model, images)),
            "after": column(predictions(model, adversarial)),
            "rho": column(rho(images, adversarial)),
        }

    def report(self, context: Context, observed: Mapping[str, Columns], results: Results) -> None:
        rows = []
        for title, columns in observed.items():
            before, after = ([context.class_names[label] for label in columns[name]] for name in ("before", "after"))
            sizes = [f"rho {value:.3f}" for value in columns["rho"]]
            for column_name, name, captions, notes in (
                ("original", "original", before, []),
                ("adversarial", "adversarial", after, sizes),
                ("difference", "difference x10", [""] * len(after), []),
            ):
                pixels = torch.tensor(columns[column_name], dtype=torch.uint8)
                count, channels, height, width = pixels.shape
                rows.append(
                    StripRow(
                        network=title, name=name, pixels=pixels.numpy().tobytes(), captions=tuple(captions),
                        notes=tuple(notes),
                    )
                )  # fmt: skip
        if self.attack == "deepfool":
            protocol = context.protocol(attack=AttackProtocol(name="DeepFool", norm="l2", steps=50), overshoot=0.02)
        else:
            protocol = context.protocol(attack=pgd_protocol(8 / 255, 20))
        results.strips.append(Strip(
            key=self.attack, title="DeepFool" if self.attack == "deepfool" else "PGD-20 at 8/255",
            shape=(count, channels, height, width), rows=tuple(rows),
            protocol=dataclasses.replace(protocol, images=count),
        ))  # fmt: skip


def _one_of_each_class(labels: Tensor) -> Tensor:
    """Rows of the first image of each class, up to STRIP_CLASSES, in the order of the classes; where these are fewer
    than STRIP_IMAGES, behind them the first of the other images."""
    first: dict[int, int] = {}
    rest: list[int] = []
    for row, label in enumerate(labels.tolist()):
        if first.setdefault(label, row) != row:
            rest.append(row)
    rows = [first[label] for label in sorted(first)][:STRIP_CLASSES]
    return torch.tensor([*rows, *rest[: max(0, STRIP_IMAGES - len(rows))]], device=labels.device)


def _small(images: Tensor) -> Tensor:
    """uint8 (n, c, h, w) of at most `STRIP_PIXELS` a side."""
    largest = max(images.shape[-2:])
    if largest > STRIP_PIXELS:
        images = torch.nn.functional.interpolate(images, scale_factor=STRIP_PIXELS / largest, mode="area")
    return (images * 255).round().to(torch.uint8)
