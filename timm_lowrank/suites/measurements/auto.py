"""Accuracy under AutoAttack."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ...evaluation import attacks, predictions
from ..context import Context
from .accuracy import BLACK
from .base import NO_OTHER, Columns, Findings, Measurement, chunk_of, column, crafted_on, protocol, radius_text, share

GROUP = "AutoAttack"


@dataclasses.dataclass(frozen=True)
class AutoAttack(Measurement):
    """Accuracy under AutoAttack, and which of its attacks broke what.

    Args:
        norm: "linf" or "l2".
        eps: radius.
        version: "standard", "plus" or "rand".
        black_box: crafted on the other network of the evaluation instead; its images that AutoAttack could not break
            stay as they are.
    """

    norm: str
    eps: float
    version: str = "standard"
    black_box: bool = False

    @property
    def key(self) -> str:
        kind = "transfer-autoattack" if self.black_box else "autoattack"
        version = "" if self.version == "standard" else f"-{self.version}"
        return f"{kind}{version}-{self.norm}-{radius_text(self.eps).replace('/', '-')}"

    def unavailable(self, context: Context, title: str) -> str | None:
        return NO_OTHER if self.black_box and context.other(title) is None else None

    def observe(self, context: Context, title: str, rows: range) -> Columns:
        images, labels = chunk_of(context, rows)
        model = context.subjects[title].model
        source = context.other(title) if self.black_box else None
        result = attacks.run_autoattack(
            source.model if source else model, images, labels, eps=self.eps, norm=self.norm, version=self.version,
            seed=context.integer_seed("autoattack", rows.start), batch_size=len(images),
        )  # fmt: skip
        if self.black_box:
            return {"withstood": column(predictions(model, result.images) == labels)}
        return {"broken_by": list(result.broken_by), "flags": [list(result.flags)] + [[]] * (len(images) - 1)}

    def report(self, context: Context, observed: Mapping[str, Columns], findings: Findings) -> None:
        values = {title: share(_withstood(columns), context.confidence) for title, columns in observed.items()}
        radius = radius_text(self.eps)
        norm = {"linf": "L_inf", "l2": "L2"}[self.norm]
        about = protocol(
            context, attack=f"AutoAttack {self.version}, {norm}", eps=radius, norm=norm,
            attacks="apgd-ce, apgd-t, fab-t, square" if self.version == "standard" else self.version,
            steps=100, square_queries=5000, restarts=1 if self.version == "standard" else 5,
            batch=context.chunk,
        )  # fmt: skip
        label = f"AutoAttack{'' if self.version == 'standard' else ' ' + self.version}, {norm} {radius}"
        if self.black_box:
            about["crafted_on"] = crafted_on(context, observed)
            findings.figure(self.key, BLACK, label, values, about)
            return
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


def _withstood(columns: Columns) -> list[bool]:
    return columns["withstood"] if "withstood" in columns else [by is None for by in columns["broken_by"]]
