"""The diagnosis of gradient masking as a measurement."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from ...errors import EvaluationError
from ...evaluation import masking
from ..context import Context
from .base import Columns, Findings, Measurement, chunk_of, column


@dataclasses.dataclass(frozen=True)
class Diagnosis(Measurement):
    """Whether the network only looks robust; see `timm_lowrank.evaluation.masking`.

    Args:
        eps: L_inf radius of the attacks that are compared.
        budget: "quick" or "full".
    """

    eps: float
    budget: str
    key = "diagnosis"

    def observe(self, context: Context, title: str, rows: range) -> Columns:
        images, labels = chunk_of(context, rows)
        other = context.other(title)
        seen = masking.observe(
            context.subjects[title].model, images, labels, eps=self.eps,
            seed=context.integer_seed("diagnosis", rows.start), source=other.model if other else None,
            budget=self.budget,
        )  # fmt: skip
        return {name: column(values) for name, values in seen.items()}

    def report(self, context: Context, observed: Mapping[str, Columns], findings: Findings) -> None:
        for title, columns in observed.items():
            try:
                diagnosis = masking.judge({name: torch.tensor(values) for name, values in columns.items()})
            except EvaluationError as error:  # too few images, or none that is right: what was measured still counts
                findings.warnings.append(f"{title}: there is no verdict on gradient masking: {error}")
            else:
                findings.verdicts[title] = dataclasses.asdict(diagnosis) | {
                    "checks": [dataclasses.asdict(check) for check in diagnosis.checks]
                }
