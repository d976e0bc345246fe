"""What noise does to the predictions, and attacks to the representations (paper, Table 4; Fig. 4b, 16)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from ...evaluation import attacks, pixel_noise, predictions
from ...evaluation.noise import NOISE_READINGS, STANDARD_DEVIATION
from ...evaluation.representations import stability
from ..context import Context
from .base import Columns, Findings, Measurement, chunk_of, column, median, protocol, radius_text, share

NOISE_GROUP, STABILITY_GROUP = "Random noise", "Stability"


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
        images, labels = chunk_of(context, rows)
        hit = pixel_noise(
            images, self.probability, **NOISE_READINGS[self.reading].arguments(),
            generator=context.generator(self.key, rows.start),
        )  # fmt: skip
        return {"correct": column(predictions(context.subjects[title].model, hit) == labels)}

    def report(self, context: Context, observed: Mapping[str, Columns], findings: Findings) -> None:
        values = {title: share(columns["correct"], context.confidence) for title, columns in observed.items()}
        about = protocol(
            context, noise=f"Gaussian, {self.reading}, clipped to [0, 1]",
            probability=self.probability,
        )  # fmt: skip
        label = f"Noise p={self.probability:g}, {self.reading}"
        findings.figure(self.key, NOISE_GROUP, label, values, about)


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

    def observe(self, context: Context, title: str, rows: range) -> Columns:
        images, labels = chunk_of(context, rows)
        model = context.subjects[title].model
        arguments = attacks.MADRY.arguments(self.eps, self.steps)
        found = attacks.pgd(model, images, labels, **arguments, generator=context.generator("pgd", rows.start))
        shifts = stability(model, images, found, list(context.layers))
        columns = {"input": column(shifts.inputs)}
        return columns | {layer: column(values) for layer, values in shifts.layers.items()}

    def report(self, context: Context, observed: Mapping[str, Columns], findings: Findings) -> None:
        about = protocol(
            context, attack="PGD, L_inf", setting="Madry", eps=radius_text(self.eps), steps=self.steps,
            step_size=radius_text(self.eps / 4), random_start=True, restarts=1,
        )  # fmt: skip
        for layer in context.layers:
            gains = {}
            lines = []
            for title, columns in observed.items():
                pairs = [(x, y) for x, y in zip(columns["input"], columns[layer], strict=True) if x > 0 and y == y]
                gains[title] = median([y / x for x, y in pairs], context.confidence)
                lines.append(
                    {"network": title, "name": title, "x": [x for x, _ in pairs], "y": [y for _, y in pairs],
                     "label": [0] * len(pairs)}
                )  # fmt: skip
            findings.figure(
                f"stability-{layer}", STABILITY_GROUP, f"{layer}: median shift over that of the image", gains, about,
                unit="number", better="lower",
            )  # fmt: skip
            findings.curves.append(
                {"key": f"stability-{layer}", "group": STABILITY_GROUP, "kind": "scatter",
                 "title": f"{layer}: shift of the representation against that of the input",
                 "x_label": "squared relative shift of the image", "y_label": "of the representation",
                 "x_log": False, "y_share": False, "protocol": about, "lines": lines}
            )  # fmt: skip
