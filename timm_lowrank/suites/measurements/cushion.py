"""The layer cushion (paper, Section 3.2, Fig. 4c, 12 to 20)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from ...evaluation.cushion import histograms, layer_cushion
from ..context import Context
from .base import Columns, Findings, Measurement, chunk_of, column, median, protocol

GROUP = "Layer cushion"


@dataclasses.dataclass(frozen=True)
class Cushion(Measurement):
    """The layer cushion of every convolution and linear layer (paper, Section 3.2, Fig. 4c, 12 to 20)."""

    key = "cushion"

    def observe(self, context: Context, title: str, rows: range) -> Columns:
        images, _ = chunk_of(context, rows)
        found = layer_cushion(context.subjects[title].model, images, batch_size=context.chunk)
        return {layer: column(values) for layer, values in found.items()}

    def report(self, context: Context, observed: Mapping[str, Columns], findings: Findings) -> None:
        about = protocol(
            context, quantity="||W x|| / (||W||_F ||x||) of each test image, W the linear map, without bias"
        )
        layers = dict.fromkeys(layer for columns in observed.values() for layer in columns)
        for layer in layers:
            samples = {title: columns[layer] for title, columns in observed.items() if layer in columns}
            values = {title: median(ratios, context.confidence) for title, ratios in samples.items()}
            findings.figure(f"cushion-{layer}", GROUP, f"{layer}: median", values, about, unit="number")
            drawn = histograms({title: torch.tensor(ratios) for title, ratios in samples.items()})
            findings.curves.append(
                {"key": f"cushion-{layer}", "group": GROUP, "kind": "histogram", "title": f"Cushion of {layer}",
                 "x_label": "layer cushion", "y_label": "test images", "x_log": False, "y_share": False,
                 "protocol": about,
                 "lines": [
                     {"network": title, "name": layer, "edges": drawn.edges, "counts": counts}
                     for title, counts in drawn.counts.items()
                 ]}
            )  # fmt: skip
