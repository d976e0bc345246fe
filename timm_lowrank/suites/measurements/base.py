"""`Measurement`: one thing that a suite measures on each network, in pieces that any process can take."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from ...evaluation import PixelModel, attacks
from ...evaluation.results import AttackProtocol, Curve, Figure, Kind, Protocol, Strip, Value, Verdict
from ..context import Context

Columns = dict[str, list[Any]]  # name -> entries, of most one an image; JSON takes it as it is


@dataclasses.dataclass
class Results:
    """What measurements contribute to an `Evaluation`."""

    figures: list[Figure] = dataclasses.field(default_factory=list)
    curves: list[Curve] = dataclasses.field(default_factory=list)
    strips: list[Strip] = dataclasses.field(default_factory=list)
    verdicts: dict[str, Verdict] = dataclasses.field(default_factory=dict)
    warnings: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Measurement(abc.ABC):
    """One thing to measure. A subclass is a frozen dataclass: its fields are the settings, all of them in its `repr`.

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
    def report(self, context: Context, observed: Mapping[str, Columns], results: Results) -> None:
        """Adds figures, curves or pictures of all networks: title -> columns of all test images."""


@dataclasses.dataclass(frozen=True)
class AttackMeasurement(Measurement):
    """One that attacks each network.

    Args:
        black_box: the images are crafted on the other network of the evaluation instead.
    """

    black_box: bool = dataclasses.field(default=False, kw_only=True)

    def unavailable(self, context: Context, title: str) -> str | None:
        return "it needs a second network: --against" if self.black_box and context.other(title) is None else None

    def attacked(self, context: Context, title: str) -> PixelModel:
        """The network that the images for `title` are crafted on."""
        other = context.other(title) if self.black_box else None
        return (other or context.networks[title]).model

    @property
    def kind(self) -> Kind:
        """Of a figure that is the accuracy under the attack."""
        return Kind.TRANSFER if self.black_box else Kind.ATTACK

    @property
    def group(self) -> str:
        return "Black box" if self.black_box else "White box"

    def protocol(
        self, context: Context, observed: Mapping[str, Columns], attack: AttackProtocol, **details: str | float
    ) -> Protocol:
        """How it was measured."""
        if self.black_box:
            sources = {title: context.other(title) for title in observed}
            crafted_on = {title: source.title for title, source in sources.items() if source}
            attack = dataclasses.replace(attack, crafted_on=crafted_on)
        return dataclasses.replace(context.protocol(attack=attack), details=details)


def column(values: Tensor) -> list[Any]:
    """A tensor (n, ...) of any dtype as a column. float32 goes through JSON and back without a change."""
    return list(values.detach().cpu().tolist())


def share(context: Context, flags: Iterable[bool]) -> Value:
    """The share of images whose flag is set, with its interval."""
    flags = list(flags)
    return Value.share(sum(flags), len(flags), context.confidence)


def shares(context: Context, observed: Mapping[str, Columns], name: str) -> dict[str, Value]:
    """The share of a column of flags, of each network."""
    return {title: share(context, columns[name]) for title, columns in observed.items()}


PGD_SETTINGS = {setting.name.lower(): setting for setting in (attacks.MADRY, attacks.PAPER)}


def pgd(
    context: Context,
    model: nn.Module,  # takes pixels in [0, 1]
    rows: range,
    eps: float,
    steps: int,
    setting: str = "madry",
    restarts: int = 1,
) -> Tensor:
    """Adversarial images for the test images `rows`: the same random start at every radius and for all networks."""
    images, labels = context.chunk_of(rows)
    return attacks.pgd(
        model, images, labels, **PGD_SETTINGS[setting].arguments(eps, steps), restarts=restarts,
        generator=context.generator("pgd", rows.start),
    )  # fmt: skip


def pgd_protocol(eps: float | None, steps: int, setting: str = "madry", restarts: int = 1) -> AttackProtocol:
    """How the images of `pgd` are made; `eps` is None for several radii."""
    chosen = PGD_SETTINGS[setting]
    return AttackProtocol(
        name="PGD", eps=eps, steps=steps, step_size=None if eps is None else chosen.arguments(eps, steps)["step_size"],
        random_start=chosen.random_start, restarts=restarts, setting=chosen.name,
        notes=("cross-entropy", "last iterate"),
    )  # fmt: skip
