"""Pictures of adversarial images (paper, Fig. 3, 10)."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from ...evaluation import attacks, predictions
from ...evaluation.representations import rho
from ..context import Context
from .base import Columns, Findings, Measurement, chunk_of, column, protocol

STRIP_IMAGES, STRIP_PIXELS = 8, 64


@dataclasses.dataclass(frozen=True)
class Strip(Measurement):
    """The first images beside their adversarial versions (paper, Fig. 3, 10).

    Args:
        attack: "deepfool", or "pgd" at 8/255 with 20 steps.
    """

    attack: str

    chunked = False

    @property
    def key(self) -> str:
        return f"strip-{self.attack}"

    def observe(self, context: Context, title: str, rows: range) -> Columns:
        images, labels = chunk_of(context, _first_of_each_class(context))
        images, labels = images[_first_places(labels)], labels[_first_places(labels)]
        model = context.subjects[title].model
        if self.attack == "deepfool":
            found = attacks.deepfool(model, images, labels)
        else:
            found = attacks.pgd(
                model, images, labels, **attacks.MADRY.arguments(8 / 255, 20), generator=context.generator(self.key)
            )
        return {
            "original": column(_small(images)),
            "adversarial": column(_small(found)),
            "difference": column(_small((0.5 + 10 * (found - images)).clamp(0, 1))),
            "label": column(labels),
            "before": column(predictions(model, images)),
            "after": column(predictions(model, found)),
            "rho": column(rho(images, found)),
        }

    def report(self, context: Context, observed: Mapping[str, Columns], findings: Findings) -> None:
        rows, shape = [], []
        for title, columns in observed.items():
            for name in ("original", "adversarial", "difference"):
                pixels = torch.tensor(columns[name], dtype=torch.uint8)
                shape = list(pixels.shape)
                classes = [context.class_names[index] for index in columns["before" if name == "original" else "after"]]
                sizes = [f"rho {value:.3f}" for value in columns["rho"]]
                rows.append(
                    {
                        "network": title,
                        "name": "difference x10" if name == "difference" else name,
                        "pixels": base64.b64encode(pixels.numpy().tobytes()).decode(),
                        "captions": [""] * len(classes) if name == "difference" else classes,
                        "notes": sizes if name == "adversarial" else [],
                    }
                )
        about = (
            protocol(context, attack="DeepFool, L2", steps=50, overshoot=0.02)
            if self.attack == "deepfool"
            else protocol(
                context, attack="PGD, L_inf", setting="Madry", eps="8/255", steps=20, step_size="2/255",
                random_start=True, restarts=1,
            )
        )  # fmt: skip
        title = "DeepFool" if self.attack == "deepfool" else "PGD-20 at 8/255"
        about["images"] = shape[0]
        findings.strips.append({"key": self.attack, "title": title, "protocol": about, "shape": shape, "rows": rows})


def _first_of_each_class(context: Context) -> range:
    return range(min(len(context.images), 10 * STRIP_IMAGES))


def _first_places(labels: Tensor) -> Tensor:
    """Rows of the first image of each class, then of the others, as many as a strip has."""
    seen: set[int] = set()
    first: list[int] = []
    rest: list[int] = []
    for place, label in enumerate(labels.tolist()):
        (rest if label in seen else first).append(place)
        seen.add(label)
    return torch.tensor(sorted([*first, *rest][:STRIP_IMAGES]), device=labels.device)


def _small(images: Tensor) -> Tensor:
    """uint8 (n, c, h, w) of at most `STRIP_PIXELS` a side."""
    largest = max(images.shape[-2:])
    if largest > STRIP_PIXELS:
        scale = STRIP_PIXELS / largest
        images = torch.nn.functional.interpolate(images, scale_factor=scale, mode="area")
    return (images * 255).round().to(torch.uint8)
