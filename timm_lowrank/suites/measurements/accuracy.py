"""Accuracy on clean images and under gradient attacks, white and black box (paper, Tables 1, 9; Fig. 4a, 9)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from ...evaluation import attacks, predictions
from ...evaluation.representations import rho
from ..context import Context
from .base import (
    NO_OTHER,
    Columns,
    Findings,
    Measurement,
    chunk_of,
    column,
    crafted_on,
    median,
    protocol,
    radius_text,
    share,
)

SETTINGS = {setting.name.lower(): setting for setting in (attacks.MADRY, attacks.PAPER)}
CLEAN, WHITE, BLACK = "Accuracy", "White box", "Black box"


@dataclasses.dataclass(frozen=True)
class Clean(Measurement):
    """Accuracy on the test images as they are."""

    key = "clean"

    def observe(self, context: Context, title: str, rows: range) -> Columns:
        images, labels = chunk_of(context, rows)
        return {"correct": column(predictions(context.subjects[title].model, images) == labels)}

    def report(self, context: Context, observed: Mapping[str, Columns], findings: Findings) -> None:
        values = {title: share(columns["correct"], context.confidence) for title, columns in observed.items()}
        findings.figure(self.key, CLEAN, "Clean test images", values, protocol(context))


@dataclasses.dataclass(frozen=True)
class PGD(Measurement):
    """Accuracy under projected gradient descent in the L_inf ball.

    Args:
        setting: "madry" or "paper", see `timm_lowrank.evaluation.attacks`.
        eps: radius in units of the pixel range.
        steps: of the attack.
        restarts: how often it begins anew; an image must withstand all of them.
        black_box: crafted on the other network of the evaluation instead.
    """

    setting: str
    eps: float
    steps: int
    restarts: int = 1
    black_box: bool = False

    @property
    def key(self) -> str:
        kind = "transfer" if self.black_box else "pgd"
        more = f"-x{self.restarts}" if self.restarts > 1 else ""
        return f"{kind}-{self.setting}-{self.steps}{more}-{radius_text(self.eps).replace('/', '-')}"

    def unavailable(self, context: Context, title: str) -> str | None:
        return NO_OTHER if self.black_box and context.other(title) is None else None

    def observe(self, context: Context, title: str, rows: range) -> Columns:
        images, labels = chunk_of(context, rows)
        model = context.subjects[title].model
        source = context.other(title) if self.black_box else None
        found = attacks.pgd(
            source.model if source else model,
            images,
            labels,
            **SETTINGS[self.setting].arguments(self.eps, self.steps),
            restarts=self.restarts,
            generator=context.generator("pgd", rows.start),  # the same start at every radius, and for both networks
        )
        return {"withstood": column(predictions(model, found) == labels), "rho": column(rho(images, found))}

    def report(self, context: Context, observed: Mapping[str, Columns], findings: Findings) -> None:
        values = {title: share(columns["withstood"], context.confidence) for title, columns in observed.items()}
        arguments = SETTINGS[self.setting].arguments(self.eps, self.steps)
        more = {
            "attack": "PGD, L_inf, cross-entropy, last iterate",
            "setting": SETTINGS[self.setting].name,
            "eps": radius_text(self.eps),
            "steps": self.steps,
            "step_size": radius_text(arguments["step_size"]),
            "random_start": arguments["random_start"],
            "restarts": self.restarts,
        }
        if self.black_box:
            more["crafted_on"] = crafted_on(context, observed)
        label = f"PGD-{self.steps}, {radius_text(self.eps)} ({SETTINGS[self.setting].name})"
        label += f", {self.restarts} restarts" if self.restarts > 1 else ""
        findings.figure(self.key, BLACK if self.black_box else WHITE, label, values, protocol(context, **more))


@dataclasses.dataclass(frozen=True)
class IteratedFGSM(Measurement):
    """Accuracy under Iter-FGSM or Iter-LL-FGSM (paper, Appendix D.1), step 1/255 and a fixed number of steps.

    Args:
        least_likely: towards the least likely class instead of away from the true one.
        eps: radius in units of the pixel range.
        steps: of the attack.
        stop_at_success: leaves an image alone once it is misclassified (paper, Appendix D.4).
        black_box: crafted on the other network of the evaluation instead.
    """

    least_likely: bool
    eps: float
    steps: int
    stop_at_success: bool = False
    black_box: bool = False

    @property
    def key(self) -> str:
        kind = "iter-ll-fgsm" if self.least_likely else "iter-fgsm"
        kind = f"transfer-{kind}" if self.black_box else kind
        stop = "-stop" if self.stop_at_success else ""
        return f"{kind}{stop}-{self.steps}-{radius_text(self.eps).replace('/', '-')}"

    def unavailable(self, context: Context, title: str) -> str | None:
        return NO_OTHER if self.black_box and context.other(title) is None else None

    def observe(self, context: Context, title: str, rows: range) -> Columns:
        images, labels = chunk_of(context, rows)
        model = context.subjects[title].model
        attack = attacks.iterative_least_likely if self.least_likely else attacks.iterative_fgsm
        source = context.other(title) if self.black_box else None
        crafted = source.model if source else model
        found = attack(crafted, images, labels, eps=self.eps, steps=self.steps, stop_at_success=self.stop_at_success)
        classes = predictions(model, found)
        columns = {"withstood": column(classes == labels), "rho": column(rho(images, found))}
        if self.least_likely:
            columns["hit"] = column(classes == attacks.least_likely(crafted, images))
        return columns

    def report(self, context: Context, observed: Mapping[str, Columns], findings: Findings) -> None:
        values = {title: share(columns["withstood"], context.confidence) for title, columns in observed.items()}
        name = "Iter-LL-FGSM" if self.least_likely else "Iter-FGSM"
        about = protocol(
            context, attack=name, eps=radius_text(self.eps), steps=self.steps, step_size="1/255",
            random_start=False, restarts=1, stops_at_success=self.stop_at_success,
        )  # fmt: skip
        group = BLACK if self.black_box else WHITE
        if self.black_box:
            about["crafted_on"] = crafted_on(context, observed)
        label = f"{name}, {self.steps} steps, {radius_text(self.eps)}"
        label += ", stops at success" if self.stop_at_success else ""
        findings.figure(self.key, group, label, values, about)
        sizes = {title: median(columns["rho"], context.confidence) for title, columns in observed.items()}
        findings.figure(f"{self.key}-rho", group, f"{label}: median rho", sizes, about, unit="number", better=None)
        if self.least_likely:
            hits = {title: share(columns["hit"], context.confidence) for title, columns in observed.items()}
            findings.figure(f"{self.key}-hit", group, f"{label}: target hit", hits, about, better="lower")


@dataclasses.dataclass(frozen=True)
class AccuracyByRadius(Measurement):
    """Accuracy against the radius of PGD, and against the perturbation rho that was made (paper, Fig. 4a, 9)."""

    radii: tuple[float, ...]
    steps: int
    key = "accuracy-by-radius"

    def observe(self, context: Context, title: str, rows: range) -> Columns:
        images, labels = chunk_of(context, rows)
        model = context.subjects[title].model
        withstood, sizes = [], []
        for eps in self.radii:
            arguments = attacks.MADRY.arguments(eps, self.steps)
            found = attacks.pgd(model, images, labels, **arguments, generator=context.generator("pgd", rows.start))
            withstood.append(predictions(model, found) == labels)
            sizes.append(rho(images, found))
        return {"withstood": column(torch.stack(withstood, 1)), "rho": column(torch.stack(sizes, 1))}

    def report(self, context: Context, observed: Mapping[str, Columns], findings: Findings) -> None:
        about = protocol(
            context, attack="PGD, L_inf", setting="Madry", steps=self.steps, step_size="eps/4",
            random_start=True, restarts=1,
        )  # fmt: skip
        by_radius, by_rho = [], []
        for title, columns in observed.items():
            accuracy = torch.tensor(columns["withstood"]).double().mean(0).tolist()
            sizes = torch.tensor(columns["rho"], dtype=torch.float64).nanmean(0).tolist()
            line = {"network": title, "name": f"PGD-{self.steps}", "y": accuracy}
            by_radius.append({**line, "x": [eps * 255 for eps in self.radii]})
            by_rho.append({**line, "x": sizes})
        shared: dict[str, Any] = {"group": WHITE, "kind": "line", "y_share": True, "x_log": False, "protocol": about}
        findings.curves += [
            {"key": self.key, "title": "Accuracy against the radius", "x_label": "L_inf radius, grey levels of 255",
             "y_label": "accuracy", "lines": by_radius, **shared},
            {"key": f"{self.key}-rho", "title": "Accuracy against the perturbation", "x_label": "mean rho",
             "y_label": "accuracy", "lines": by_rho, **shared},
        ]  # fmt: skip
