"""Accuracy under AutoAttack."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ...evaluation import attacks
from ..context import Context
from .base import Columns, Findings, Measurement, chunk_of, protocol, radius_text, share

GROUP = "AutoAttack"


@dataclasses.dataclass(frozen=True)
class AutoAttack(Measurement):
    """Accuracy under AutoAttack, and which of its attacks broke what.

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
        version = "" if self.version == "standard" else f"-{self.version}"
        return f"autoattack{version}-{self.norm}-{radius_text(self.eps).replace('/', '-')}"

    def observe(self, context: Context, title: str, rows: range) -> Columns:
        images, labels = chunk_of(context, rows)
        result = attacks.run_autoattack(
            context.subjects[title].model, images, labels, eps=self.eps, norm=self.norm, version=self.version,
            seed=context.integer_seed("autoattack", rows.start), batch_size=len(images),
        )  # fmt: skip
        return {"broken_by": list(result.broken_by), "flags": [list(result.flags)] + [[]] * (len(images) - 1)}

    def report(self, context: Context, observed: Mapping[str, Columns], findings: Findings) -> None:
        withstood = {title: [by is None for by in columns["broken_by"]] for title, columns in observed.items()}
        values = {title: share(hits, context.confidence) for title, hits in withstood.items()}
        radius = radius_text(self.eps)
        norm = {"linf": "L_inf", "l2": "L2"}[self.norm]
        about = protocol(
            context, attack=f"AutoAttack {self.version}, {norm}", eps=radius, norm=norm,
            attacks="apgd-ce, apgd-t, fab-t, square" if self.version == "standard" else self.version,
            steps=100, square_queries=5000, restarts=1 if self.version == "standard" else 5,
            batch=context.chunk,
        )  # fmt: skip
        label = f"AutoAttack{'' if self.version == 'standard' else ' ' + self.version}, {norm} {radius}"
        findings.figure(self.key, GROUP, label, values, about)
        for attack in dict.fromkeys(
            by for columns in observed.values() for by in columns["broken_by"] if by not in (None, "clean")
        ):
            broke = {
                title: share((by == attack for by in columns["broken_by"]), context.confidence)
                for title, columns in observed.items()
            }
            findings.figure(f"{self.key}-{attack}", GROUP, f"{label}: broken by {attack}", broke, about, better=None)
        for title, columns in observed.items():
            said = dict.fromkeys(flag for flags in columns["flags"] for flag in flags)
            findings.warnings += [f"{title}, {label}: {flag}" for flag in said]
