"""How few directions the representations take (paper, Fig. 2, 5 to 8)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...core.spectrum import singular_energies
from ...errors import EvaluationError
from ...evaluation.representations import class_variance_ratio, fit_plane
from ..context import Context
from .base import Columns, Findings, Measurement, column, median, number, protocol

GROUP = "Dimension of the representations"
DIRECTIONS = (1, 5, 10, 20)
KEPT_ENERGIES = 1000
SAMPLES = {"flatten": "activations", "token": "all tokens", "pool": "means over the tokens"}


@dataclasses.dataclass(frozen=True)
class Spectrum(Measurement):
    """Variance ratio and effective rank of every layer, and of each class alone (paper, Section 3, Fig. 2, 7)."""

    key = "spectrum"
    chunked = False

    def observe(self, context: Context, title: str, rows: range) -> Columns:
        found: Columns = {}
        labels = context.labels.cpu()
        for layer, values in context.samples(title).items():
            try:
                energies = singular_energies(values)
            except ValueError as error:
                raise EvaluationError(f"layer {layer!r}: {error}") from error
            found[f"{layer} shares"] = column((energies / energies.sum())[:KEPT_ENERGIES])
            found[f"{layer} features"] = [values.shape[1]]
            owners = labels.repeat_interleave(len(values) // len(labels))  # of tokens, the image's label
            by_class = class_variance_ratio(values, owners, (1,), centred=False)
            found[f"{layer} classes"] = [by_class[label][0] for label in sorted(by_class)]
        return found

    def report(self, context: Context, observed: Mapping[str, Columns], findings: Findings) -> None:
        of = len(context.images)
        for layer in context.layers:
            held = {
                title: torch.tensor(columns[f"{layer} shares"], dtype=torch.float64).cumsum(0).clamp(max=1)
                for title, columns in observed.items()
            }
            width = next(iter(observed.values()))[f"{layer} features"][0]
            kind = context.views[layer].kind if layer in context.views else "flatten"
            about = protocol(context, features=width, representation=f"{SAMPLES[kind]} of the test images, centred")
            for count in (count for count in DIRECTIONS if count < width):
                values = {title: number(_at(shares, count), of) for title, shares in held.items()}
                label = f"{layer}: variance in {count} direction{'s' * (count > 1)}"
                findings.figure(f"variance-{layer}-{count}", GROUP, label, values, about)
            ranks = {title: number(1 + int((shares < 0.99 - 1e-12).sum()), of) for title, shares in held.items()}
            findings.figure(
                f"effective-rank-{layer}", GROUP, f"{layer}: effective rank, 99 %", ranks, about,
                unit="count", better="lower",
            )  # fmt: skip
            classes = {
                title: {**median(columns[f"{layer} classes"], context.confidence), "of": of}
                for title, columns in observed.items()
            }
            findings.figure(
                f"class-variance-{layer}", GROUP,
                f"{layer}: a class in its first direction", classes,
                {**about, "representation": "activations of one class, not centred; median over classes"},
            )  # fmt: skip
            findings.curves.append(
                {"key": f"variance-{layer}", "group": GROUP, "kind": "line", "title": f"{layer}: variance ratio",
                 "x_label": "directions", "y_label": "share of the test variance", "x_log": True, "y_share": True,
                 "protocol": about,
                 "lines": [
                     {"network": title, "name": "all classes", "x": list(range(1, len(shares) + 1)),
                      "y": shares.tolist()}
                     for title, shares in held.items()
                 ]}
            )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Plane(Measurement):
    """The test images in the plane of the two leading directions of the last layer (paper, Fig. 8)."""

    key = "plane"
    chunked = False

    def observe(self, context: Context, title: str, rows: range) -> Columns:
        values = context.representations(title, train=False)[context.layers[-1]]
        plane = fit_plane(values)
        return {"points": column(plane.project(values)), "shares": [list(plane.shares)]}

    def report(self, context: Context, observed: Mapping[str, Columns], findings: Findings) -> None:
        layer = context.layers[-1]
        labels = context.labels.tolist()
        lines: list[dict[str, Any]] = []
        for title, columns in observed.items():
            x, y = (list(values) for values in zip(*columns["points"], strict=True))
            held = sum(columns["shares"][0])
            lines.append({"network": title, "name": f"{held:.0%} of the variance", "x": x, "y": y, "label": labels})
        findings.curves.append(
            {"key": self.key, "group": GROUP, "kind": "scatter", "title": f"{layer} in its two leading directions",
             "x_label": "first direction", "y_label": "second direction", "x_log": False, "y_share": False,
             "protocol": protocol(context, representation="centred activations of the test images"),
             "lines": lines}
        )  # fmt: skip


def _at(shares: Sequence[float] | torch.Tensor, count: int) -> float:
    return float(shares[min(count, len(shares)) - 1])
