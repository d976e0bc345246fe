"""How little it takes to fool a network, and what more of it does (paper, Tables 3, 10; Fig. 11)."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Mapping
from typing import Any

import torch

from ...evaluation import attacks
from ...evaluation.robustness import (
    SmallestRadii,
    deepfool_rho,
    minimum_perturbation,
    smallest_radii,
    step_accuracies,
    trajectory,
)
from ..context import Context
from .accuracy import BLACK, WHITE
from .base import (
    NO_OTHER,
    Columns,
    Findings,
    Measurement,
    chunk_of,
    column,
    crafted_on,
    median,
    number,
    protocol,
    radius_text,
    share,
)


@dataclasses.dataclass(frozen=True)
class DeepFool(Measurement):
    """The smallest L2 perturbation that DeepFool finds, of images that are classified right (paper, Table 3)."""

    steps: int = 50
    overshoot: float = 0.02
    black_box: bool = False

    @property
    def key(self) -> str:
        return "deepfool-transfer" if self.black_box else "deepfool"

    def unavailable(self, context: Context, title: str) -> str | None:
        return NO_OTHER if self.black_box and context.other(title) is None else None

    def observe(self, context: Context, title: str, rows: range) -> Columns:
        images, labels = chunk_of(context, rows)
        model = context.subjects[title].model
        source = context.other(title) if self.black_box else None
        found = deepfool_rho(
            source.model if source else model, images, labels, judge=model, steps=self.steps, overshoot=self.overshoot
        )
        return {"length": column(found.radius), "rho": column(found.rho)}

    def report(self, context: Context, observed: Mapping[str, Columns], findings: Findings) -> None:
        group = BLACK if self.black_box else WHITE
        about = protocol(context, attack="DeepFool, L2", steps=self.steps, overshoot=self.overshoot)
        if self.black_box:
            about["crafted_on"] = crafted_on(context, observed)
        withstood = {
            title: share((length == math.inf for length in columns["length"]), context.confidence)
            for title, columns in observed.items()
        }
        findings.figure(f"{self.key}-accuracy", group, "DeepFool: accuracy", withstood, about)
        fooled = {
            title: [pair for pair in zip(columns["length"], columns["rho"], strict=True) if 0 < pair[0] < math.inf]
            for title, columns in observed.items()
        }
        lengths = {
            title: median([length for length, _ in pairs], context.confidence) for title, pairs in fooled.items()
        }
        sizes = {title: _mean([size for _, size in pairs]) for title, pairs in fooled.items()}
        label = "of the images that were right and are fooled"
        findings.figure(
            f"{self.key}-length", group, f"DeepFool: median L2 length {label}", lengths, about, unit="number"
        )
        findings.figure(f"{self.key}-rho", group, f"DeepFool: mean rho {label}", sizes, about, unit="number")


@dataclasses.dataclass(frozen=True)
class MinimumPerturbation(Measurement):
    """The smallest radius of a grid at which an attack that stops at success misclassifies 99 % (Tables 3, 10).

    Args:
        least_likely: Iter-LL-FGSM instead of Iter-FGSM.
        radii: the grid; with a step of 1/255, `steps` must reach the largest.
        black_box: crafted on the other network; it stops when this one is fooled.
    """

    least_likely: bool
    radii: tuple[float, ...]
    steps: int = 40
    share: float = 0.99
    black_box: bool = False

    @property
    def key(self) -> str:
        return f"minimum-{'transfer-' if self.black_box else ''}iter-{'ll-' if self.least_likely else ''}fgsm"

    def unavailable(self, context: Context, title: str) -> str | None:
        return NO_OTHER if self.black_box and context.other(title) is None else None

    def observe(self, context: Context, title: str, rows: range) -> Columns:
        images, labels = chunk_of(context, rows)
        attack = attacks.iterative_least_likely if self.least_likely else attacks.iterative_fgsm
        model = context.subjects[title].model
        source = context.other(title) if self.black_box else None
        if source:
            crafted = attacks.until_fooled(source.model, model, functools.partial(attack, steps=self.steps))
        else:
            settled = functools.partial(attack, model, steps=self.steps, stop_at_success=True)
            crafted = lambda clean, wanted, eps: settled(clean, wanted, eps=eps)  # noqa: E731
        found = smallest_radii(model, images, labels, crafted, self.radii)
        return {"radius": column(found.radius), "rho": column(found.rho)}

    def report(self, context: Context, observed: Mapping[str, Columns], findings: Findings) -> None:
        name = "Iter-LL-FGSM" if self.least_likely else "Iter-FGSM"
        about = protocol(
            context, attack=f"{name}, stops at success", steps=self.steps, step_size="1/255",
            random_start=False, restarts=1, radii=", ".join(radius_text(eps) for eps in self.radii),
        )  # fmt: skip
        group = BLACK if self.black_box else WHITE
        if self.black_box:
            about["crafted_on"] = crafted_on(context, observed)
        radius, sizes = {}, {}
        for title, columns in observed.items():
            found = SmallestRadii(*(torch.tensor(columns[name], dtype=torch.float64) for name in ("radius", "rho")))
            smallest = minimum_perturbation(found, self.share)
            radius[title] = number(math.nan if smallest.eps is None else smallest.eps, smallest.of)
            sizes[title] = number(math.nan if smallest.rho is None else smallest.rho, smallest.of)
        label = f"{name}: smallest radius that misclassifies {self.share:.0%}"
        findings.figure(self.key, group, label, radius, about, unit="number")
        findings.figure(f"{self.key}-rho", group, f"{name}: mean rho there", sizes, about, unit="number")


@dataclasses.dataclass(frozen=True)
class OverSteps(Measurement):
    """Instantaneous and cumulative accuracy over the steps of an attack (paper, Appendix D.4, Fig. 11)."""

    least_likely: bool
    eps: float
    step_size: float
    steps: int

    @property
    def key(self) -> str:
        return f"over-steps-iter-{'ll-' if self.least_likely else ''}fgsm"

    def observe(self, context: Context, title: str, rows: range) -> Columns:
        images, labels = chunk_of(context, rows)
        attack = attacks.iterative_least_likely if self.least_likely else attacks.iterative_fgsm
        settled = functools.partial(attack, eps=self.eps, steps=self.steps, step_size=self.step_size)
        return {"classes": column(trajectory(context.subjects[title].model, images, labels, settled))}

    def report(self, context: Context, observed: Mapping[str, Columns], findings: Findings) -> None:
        name = "Iter-LL-FGSM" if self.least_likely else "Iter-FGSM"
        lines = []
        for title, columns in observed.items():
            curves = step_accuracies(torch.tensor(columns["classes"]))
            for kind, accuracy in curves._asdict().items():
                lines.append({"network": title, "name": kind, "x": list(range(len(accuracy))), "y": accuracy})
        about = protocol(
            context, attack=name, eps=f"{self.eps:g}", steps=self.steps, step_size=f"{self.step_size:g}",
            random_start=False, restarts=1,
        )  # fmt: skip
        findings.curves.append(
            {"key": self.key, "group": WHITE, "title": f"{name}: predictions kept over its steps", "kind": "line",
             "x_label": "steps", "y_label": "predictions as on the clean image", "x_log": False, "y_share": True,
             "protocol": about, "lines": lines}
        )  # fmt: skip


def _mean(values: list[float]) -> dict[str, Any]:
    defined = [value for value in values if not math.isnan(value)]
    return number(statistics.fmean(defined) if defined else math.nan, len(defined))
