"""`Measurement`: one thing that a suite measures on each network, in pieces that any process can take."""

from __future__ import annotations

import abc
import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from ...evaluation.intervals import wilson
from ..context import Context

Columns = dict[str, list[Any]]  # name -> one entry an image; JSON takes it as it is
Protocol = dict[str, Any]  # how a figure was measured: attack, steps, radius, restarts, images, seed


@dataclasses.dataclass
class Findings:
    """What measurements contribute to evaluation.json, in its format."""

    figures: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    curves: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    strips: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    verdicts: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    warnings: list[str] = dataclasses.field(default_factory=list)

    def figure(
        self,
        key: str,
        group: str,
        label: str,
        values: Mapping[str, Mapping[str, Any]],
        protocol: Protocol,
        *,
        unit: str = "share",
        better: str | None = "higher",
    ) -> None:
        """Adds one figure of every network in `values` (from `share` or `number`)."""
        self.figures.append(
            {"key": key, "group": group, "label": label, "unit": unit, "better": better, "protocol": protocol,
             "values": {title: dict(value) for title, value in values.items()}}
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Measurement(abc.ABC):
    """One thing to measure. A subclass is a frozen dataclass: its fields are the settings.

    `observe` sees one network and one chunk of the test images, on whichever process; `report` sees the columns
    of all chunks, joined in order, and makes figures of them. Nothing else may pass between the two, which is what
    makes an evaluation resumable and independent of the number of processes.
    """

    chunked: ClassVar[bool] = True  # False: one unit with all images, for what is no sum over images

    @property
    @abc.abstractmethod
    def key(self) -> str:
        """Names the measurement; no other one of an evaluation has the same."""

    def unavailable(self, context: Context, title: str) -> str | None:
        """Why it cannot be measured on this network; None if it can."""
        return None

    @abc.abstractmethod
    def observe(self, context: Context, title: str, rows: range) -> Columns:
        """Measures the network `title` on the test images `rows`.

        Raises:
            EvaluationError: it cannot be measured on this network; the evaluation goes on without it, and says so.
        """

    @abc.abstractmethod
    def report(self, context: Context, observed: Mapping[str, Columns], findings: Findings) -> None:
        """Adds figures, curves or pictures of all networks: title -> columns of all test images."""

    def settings(self) -> dict[str, Any]:
        """The fields, for comparing an interrupted evaluation with the one that would continue it."""
        return {"class": type(self).__name__, **dataclasses.asdict(self)}


def column(values: Tensor) -> list[Any]:
    """A tensor (n, ...) of any dtype as a column. float32 goes through JSON and back without a change."""
    return list(values.detach().cpu().tolist())


def share(hits: Iterable[bool], confidence: float = 0.95) -> dict[str, Any]:
    """A share of images with its Wilson interval; NaN of no images."""
    flags = [bool(hit) for hit in hits]
    if not flags:
        return {"value": math.nan, "hits": 0, "of": 0}
    low, high = wilson(sum(flags), len(flags), confidence)
    return {"value": sum(flags) / len(flags), "low": low, "high": high, "hits": sum(flags), "of": len(flags)}


def number(value: float, of: int) -> dict[str, Any]:
    """A figure that is no share, with the number of images it was measured on."""
    return {"value": float(value), "of": of}


def median(values: Sequence[float], confidence: float = 0.95) -> dict[str, Any]:
    """A median with the interval of order statistics, which assumes nothing about the distribution."""
    ordered = sorted(value for value in values if not math.isnan(value))
    if not ordered:
        return {"value": math.nan, "of": 0}
    count = len(ordered)
    # The number of values below the true median is binomial(n, 1/2): its quantiles, by the normal approximation.
    reach = statistics.NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt(count) / 2
    low, high = max(0, math.floor(count / 2 - reach)), min(count - 1, math.ceil(count / 2 + reach))
    return {"value": statistics.median(ordered), "low": ordered[low], "high": ordered[high], "of": count}


def chunk_of(context: Context, rows: range) -> tuple[Tensor, Tensor]:
    """Images and labels of the rows."""
    return context.images[rows.start : rows.stop], context.labels[rows.start : rows.stop]


def protocol(context: Context, **more: Any) -> Protocol:
    """How a figure was measured: what stands beside every one."""
    return {**more, "images": len(context.images), "seed": context.seed}


def crafted_on(context: Context, titles: Iterable[str]) -> str:
    """Which network the images were crafted on for which one, in words."""
    pairs = ((context.other(title), title) for title in titles)
    return "; ".join(f"{other.title} for {title}" for other, title in pairs if other)


NO_OTHER = "it needs a second network: --against"


def radius_text(eps: float) -> str:
    """A radius as the literature writes it: 8/255, but 0.5 where that is short or it is no half grey level."""
    short, halves = f"{eps:g}", eps * 510
    if len(short) <= 4 or halves < 0.5 or abs(halves - round(halves)) > 1e-6:
        return short
    return f"{round(halves) / 2:g}/255"
