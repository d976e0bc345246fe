"""The results of an evaluation, as types: the one meaning, reader and writer of evaluation.json.

`timm-lowrank evaluate` makes an `Evaluation`, and the report, cards, tables and comparisons are made of it:

    evaluation = read_evaluation(run / "evaluation.json")   # every problem of the file in one EvaluationError
    clean, pgd, autoattack = headline(evaluation)           # the Figures that a reader wants first, or None
    own, plain = (pgd.values.get(title) for title in evaluation.titles)
    gap = difference(own, plain)                            # with Newcombe's interval; gap.distinguishable
    for figure in evaluation.by_kind(Kind.COMPRESSION, layer="layer3", directions=5): ...
    evaluation.figure("autoattack-linf-8-255")              # by its key, or None
    figure.protocol.entries()                               # how it was measured, as names and plain values to print
    write_evaluation(evaluation, run / "evaluation.json")

A `Figure` is one quantity of all networks: `values` maps titles to `Value`s. What it is stands in `kind`, `layer`,
`directions` and `protocol` (with `protocol.attack` and `protocol.noise`); `key` and `label` are names for people, in
which nobody searches for words. `Curve` holds a plot, `Strip` pictures, `Verdict` the diagnosis of gradient masking.

Everything is frozen and checked when it is made: an `Evaluation` that exists does not contradict itself. Numbers that
could not be computed are NaN here and null in JSON; `Value.known` tells them apart.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from .. import text
from ..errors import EvaluationError
from ..files import read_json, write_whole
from ..records import decode_fields, encode

FORMAT = 2
MOST_BYTES = 256 << 20  # of evaluation.json, which holds pictures
EPS = 8 / 255  # the radius in L_inf that the literature quotes for 32 x 32 images, of pixels in [0, 1]
NORMS = {"linf": "L_inf", "l2": "L2", "l1": "L1"}

Detail = str | int | float | bool
Unit = Literal["share", "number", "count"]
Better = Literal["higher", "lower"]


class Kind(enum.StrEnum):
    """What a figure is. Accuracies are shares of the test images, and of these alone there is a headline."""

    CLEAN = "clean"  # accuracy on the images as they are
    ATTACK = "attack"  # accuracy under an attack on the network itself
    TRANSFER = "transfer"  # accuracy on adversarial images crafted on another network (black box)
    BROKEN_BY = "broken by"  # share of the images that one part of AutoAttack broke
    TARGET_HIT = "target hit"  # share of the images that a targeted attack brought to its target
    PERTURBATION = "perturbation"  # how large the perturbations of an attack are: length or rho
    MINIMUM_RADIUS = "minimum radius"  # smallest radius at which an attack fools nearly all
    NOISE = "noise"  # accuracy under random noise
    VARIANCE = "variance"  # share of a layer's variance in its `directions` leading directions
    RAW_VARIANCE = "raw variance"  # the same of activations that are not centred
    CLASS_VARIANCE = "class variance"  # of one class in its first direction, median over the classes
    EFFECTIVE_RANK = "effective rank"  # directions that hold 99 % of a layer's variance
    COMPRESSION = "compression"  # max-margin accuracy on `directions` leading directions of a layer; None: all features
    LEADING_FEATURES = "leading features"  # the same on the first `directions` features as they are, without PCA
    HYBRID = "hybrid"  # accuracy of a network that ends in a max-margin classifier behind a layer
    OTHER_LABELS = "other labels"  # max-margin accuracy for labels that the network was not trained on
    STABILITY = "stability"  # shift of a layer's representation over that of the attacked image
    CUSHION = "cushion"  # layer cushion, median over the images
    CUSHION_MU = "cushion mu"  # layer cushion, the smallest of all images
    SPARSITY = "sparsity"  # share of a layer's activations that are zero
    CUT_PREACTIVATIONS = "cut pre-activations"  # of activations whose pre-activations were cut to a rank
    OTHER = "other"


# ------------------------------------------------------------------------------------------------------------- figures


@dataclasses.dataclass(frozen=True)
class Value:
    """A figure of one network.

    Attributes:
        value: NaN if it could not be computed (infinite counts as that).
        low, high: ends of its confidence interval, if it has one.
        hits: of a share, how many images were counted.
        of: how many images there were.
        at_most: the largest value that so many images allow, where more images would allow a larger one: n images have
            n - 1 directions. None: their number sets no bound.
        beyond: of a value that is NaN, because it is larger than all that were tried: the largest of these.
    """

    value: float
    low: float | None = None
    high: float | None = None
    hits: int | None = None
    of: int | None = None
    at_most: float | None = None
    beyond: float | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            object.__setattr__(self, "value", math.nan)
        for end in ("low", "high"):
            number = getattr(self, end)
            if number is not None and not math.isfinite(number):
                object.__setattr__(self, end, None)

    def __eq__(self, other: object) -> bool:
        """Unknown is equal to unknown. Python 3.13 compares field by field, by which NaN differs from itself."""
        if not isinstance(other, Value):
            return NotImplemented
        return dataclasses.astuple(self) == dataclasses.astuple(other)  # which compare math.nan as the object it is

    @property
    def known(self) -> bool:
        return math.isfinite(self.value)

    @property
    def interval(self) -> tuple[float, float] | None:
        """(low, high) of a known value that has both."""
        return (self.low, self.high) if self.known and self.low is not None and self.high is not None else None

    @classmethod
    def share(cls, hits: int, of: int, confidence: float = 0.95) -> Value:
        """`hits` of `of` images with Wilson's interval; NaN of no images."""
        if of == 0:
            return cls(math.nan, hits=0, of=0)
        return cls(hits / of, *wilson(hits, of, confidence), hits=hits, of=of)

    @classmethod
    def mean(cls, values: Iterable[float]) -> Value:
        """The mean of those that are not NaN; NaN of none."""
        defined = [value for value in values if not math.isnan(value)]
        return cls(statistics.fmean(defined) if defined else math.nan, of=len(defined))

    @classmethod
    def median(cls, values: Iterable[float], confidence: float = 0.95) -> Value:
        """A median of those that are not NaN, with the interval of order statistics, which assumes no distribution.

        Without an interval where even the smallest and the largest value do not enclose it with such confidence.
        """
        ordered = sorted(value for value in values if not math.isnan(value))
        if not ordered:
            return cls(math.nan, of=0)
        count = len(ordered)
        if 2 * 0.5**count > 1 - confidence:  # the probability that all lie on one side of the true median
            return cls(statistics.median(ordered), of=count)
        # The number of values below the true median is binomial(n, 1/2): its quantiles, by the normal approximation.
        reach = statistics.NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt(count) / 2
        low, high = max(0, math.floor(count / 2 - reach)), min(count - 1, math.ceil(count / 2 + reach))
        return cls(statistics.median(ordered), low=ordered[low], high=ordered[high], of=count)


@dataclasses.dataclass(frozen=True)
class Difference:
    """How much higher a figure is for one network than for another."""

    value: float
    low: float | None = None  # Newcombe's interval of the difference; None where the figures have no intervals
    high: float | None = None

    @property
    def distinguishable(self) -> bool | None:
        """Whether the interval leaves out zero; None without an interval."""
        if self.low is None or self.high is None:
            return None
        return not self.low <= 0 <= self.high


def difference(one: Value | None, other: Value | None) -> Difference | None:
    """one - other, of figures measured independently of each other; None unless both are known.

    Its interval is Newcombe's (1998), method 10: the distances between the figures and the ends of their own intervals,
    squared and added. He gives it for shares with Wilson's intervals; the same recipe holds for other figures.
    """
    if one is None or other is None or not (one.known and other.known):
        return None
    gap = one.value - other.value
    if one.interval is None or other.interval is None:
        return Difference(gap)
    (low, high), (other_low, other_high) = one.interval, other.interval
    below = math.hypot(one.value - low, other_high - other.value)
    return Difference(gap, gap - below, gap + math.hypot(high - one.value, other.value - other_low))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttackProtocol:
    """How adversarial images were made."""

    name: str  # "PGD", "Iter-FGSM", "Iter-LL-FGSM", "DeepFool", "AutoAttack"
    norm: str = "linf"  # a key of NORMS
    eps: float | None = None  # radius, in `radius_unit`; None: the attack looks for the smallest
    steps: int | None = None
    step_size: float | None = None  # in `radius_unit`
    radius_unit: str = "pixel"  # the pixel range; or "normalized", the standard deviation of each channel
    random_start: bool | None = None
    restarts: int | None = None
    setting: str | None = None  # where steps and starts are from: "Madry", "paper"
    version: str | None = None  # of AutoAttack: "standard", "plus", "rand"
    targeted: bool = False
    stops_at_success: bool | None = None
    notes: tuple[str, ...] = ()  # "cross-entropy", "last iterate"
    crafted_on: Mapping[str, str] | None = None  # title of a network -> of the one that its images were crafted on

    @property
    def text(self) -> str:
        """PGD, L_inf, cross-entropy, last iterate."""
        name = f"{self.name} {self.version}" if self.version else self.name
        return ", ".join([name, NORMS.get(self.norm, self.norm), *self.notes])


@dataclasses.dataclass(frozen=True)
class NoiseProtocol:
    """Gaussian noise on pixels."""

    probability: float  # that a pixel is hit
    reading: str  # of N(0, 128/255), a name in `timm_lowrank.evaluation.NOISE_READINGS`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
    """How something was measured."""

    images: int | None = None
    seed: int | None = None
    attack: AttackProtocol | None = None
    noise: NoiseProtocol | None = None
    details: Mapping[str, Detail] = dataclasses.field(default_factory=dict)  # whatever else a reader should know

    def entries(self) -> dict[str, Detail]:
        """All of it flat, in the order of a page: {"attack": "PGD, L_inf", "eps": "8/255", "steps": 20, ...}.

        What is not known is left out. For showing alone: programs read the fields.
        """
        shown: dict[str, Detail | None] = {}
        if self.attack:
            attack, on = self.attack, self.attack.crafted_on
            shown = {
                "attack": attack.text, "setting": attack.setting, "eps": _radius(attack.eps),
                "radius_unit": None if attack.eps is attack.step_size is None else attack.radius_unit,
                "steps": attack.steps,
                "step_size": _radius(attack.step_size), "random_start": attack.random_start,
                "restarts": attack.restarts, "targeted": attack.targeted or None,
                "stops_at_success": attack.stops_at_success,
                "crafted_on": "; ".join(f"{source} for {title}" for title, source in on.items()) if on else None,
            }  # fmt: skip
        if self.noise:
            shown["noise"] = f"Gaussian, {self.noise.reading}, clipped to [0, 1]"
            shown["probability"] = self.noise.probability
        shown |= {**self.details, "images": self.images, "seed": self.seed}
        return {name: value for name, value in shown.items() if value is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """One quantity, of every network that it was measured on."""

    key: str  # no other figure of the evaluation has the same
    kind: Kind
    group: str  # heading under which it is shown
    label: str
    values: Mapping[str, Value]  # title of the network -> its value; empty: measured nowhere
    protocol: Protocol
    unit: Unit = "share"
    better: Better | None = "higher"
    layer: str | None = None
    directions: int | None = None


# ----------------------------------------------------------------------------------------------------------- intervals


def wilson(hits: int, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (low, high) of the share hits / count.

    Both ends solve |hits / count - p| = z sqrt(p (1 - p) / count), z the quantile of the normal distribution that
    leaves (1 - confidence) / 2 above it. Unlike the textbook interval it stays in [0, 1] and does not
    shrink to a point at 0 or at `count` hits.

    Raises:
        EvaluationError: no trials, hits outside 0 ... count, or a confidence outside (0, 1).
    """
    if count < 1 or not 0 <= hits <= count:
        raise EvaluationError(f"hits must lie between 0 and a count of at least 1, not {hits} of {count}")
    if not 0 < confidence < 1:
        raise EvaluationError(f"confidence must lie between 0 and 1, for example 0.95, not {confidence}")
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    share, spread = hits / count, z * z / count
    centre = (share + spread / 2) / (1 + spread)
    half = (spread * (share * (1 - share) + spread / 4)) ** 0.5 / (1 + spread)
    # The ends at no and at all hits are 0 and 1 exactly; round-off would leave 1e-17 of them.
    return (0.0 if hits == 0 else centre - half), (1.0 if hits == count else centre + half)


# ------------------------------------------------------------------------------------------------- curves and pictures


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """A line, a cloud or a histogram of one network."""

    network: str
    name: str = ""  # what tells it from others of the same network
    x: tuple[float, ...]  # of a histogram the edges, one more than bins
    y: tuple[float, ...]  # of a histogram the counts
    labels: tuple[int, ...] = ()  # of a scatter plot, the class of each point

    def __post_init__(self) -> None:
        for name in ("x", "y"):
            values = tuple(value if math.isfinite(value) else math.nan for value in getattr(self, name))
            object.__setattr__(self, name, values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """One plot."""

    key: str
    group: str
    title: str
    kind: Literal["line", "scatter", "histogram"]
    x_label: str
    y_label: str
    lines: tuple[Series, ...]
    x_log: bool = False
    y_share: bool = False  # y is a share of images, shown in per cent
    protocol: Protocol = Protocol()


@dataclasses.dataclass(frozen=True, kw_only=True)
class StripRow:
    """Small images of one network side by side."""

    network: str
    name: str  # "original", "adversarial", "difference x10"
    pixels: bytes  # uint8 of the shape of the strip; base64 in JSON
    captions: tuple[str, ...]  # one an image, may be empty strings
    notes: tuple[str, ...] = ()  # one an image, or none


@dataclasses.dataclass(frozen=True, kw_only=True)
class Strip:
    """Adversarial images beside the originals."""

    key: str
    title: str
    shape: tuple[int, int, int, int]  # (images, channels, height, width), of every row
    rows: tuple[StripRow, ...]
    protocol: Protocol = Protocol()


# ------------------------------------------------------------------------------------------- gradient masking, settings

SOUND, SUSPECT, MASKED = "no sign of gradient masking", "suspect", "gradient masking"
VERDICTS = (SOUND, SUSPECT, MASKED)


@dataclasses.dataclass(frozen=True)
class Check:
    """One check for gradient masking.

    Attributes:
        passed: False if the value lies beyond the limit by more than chance. None if the check could not be made; then
            there is no value. None also, with a value, if it lies beyond the limit but the images are too few to tell.
        limit: the largest value that passes.
        says: a sentence with the numbers.
        decisive: whether failing it shows that the gradient misleads attacks, rather than that it may.
    """

    name: str
    passed: bool | None
    value: float | None
    limit: float | None
    says: str
    decisive: bool = True

    @property
    def undecided(self) -> bool:
        return self.passed is None and self.value is not None


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a network only looks robust, with the evidence.

    Attributes:
        verdict: one of VERDICTS.
        summary: the strongest reason, what failed, and how small a difference the images can show.
        checks: every check, with its numbers.
    """

    verdict: str
    summary: str
    checks: tuple[Check, ...] = ()

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the checks that failed."""
        return tuple(check.name for check in self.checks if check.passed is False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkInfo:
    """A network that was evaluated."""

    title: str
    path: str | None = None
    model: str | None = None  # architecture
    parameters: int | None = None
    branches: Mapping[str, int] = dataclasses.field(default_factory=dict)  # layer -> target rank; empty for a plain one
    comparator: str | None = None  # what was trained in the place of branches, such as "Bottle-LR"
    weights: str | None = None  # `timm_lowrank.files.weights_sha256` of its state dict
    clean: Value | None = None  # accuracy on all test images that its run wrote down, if it is of one
    twin: bool | None = None  # whether it was trained as the first network was, but plainly; None: not known


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataInfo:
    """The images that it was evaluated on."""

    source: str
    split: str
    images: int
    image_size: tuple[int, ...]  # (channels, height, width)
    class_names: tuple[str, ...]
    train_images: int | None = None  # that PCA and linear classifiers were fitted on
    fingerprint: str | None = None
    origin: Literal["hub", "folder", "built-in"] | None = None  # of `source`; None: not known


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What must be the same for two evaluations to be one and the same: for one that was interrupted to be continued,
    and for one that is complete to be left as it is."""

    seed: int
    chunk: int
    images: int
    train_images: int
    data: str  # fingerprint
    networks: Mapping[str, str]  # title -> hash of the weights
    layers: tuple[str, ...]
    torch: str
    measurements: tuple[str, ...]  # each with all its settings
    spectrum_images: int | None = None
    format: int = FORMAT
    inputs: Mapping[str, str] | None = None  # title -> normalisation, and the size it names; None: not written down
    other_labels: str | None = None  # hash of the labels of the other column; None: there are none


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All of evaluation.json. `networks[0]` is the one that the evaluation is about.

    Raises:
        EvaluationError: parts contradict each other; all of it in one message.
    """

    suite: str
    seed: int
    chunk: int
    confidence: float
    device: str
    created: str  # ISO 8601
    seconds: float
    versions: Mapping[str, str]
    data: DataInfo
    networks: tuple[NetworkInfo, ...]
    figures: tuple[Figure, ...]
    curves: tuple[Curve, ...]
    strips: tuple[Strip, ...]
    verdicts: Mapping[str, Verdict]  # title -> verdict, of attacks with radii in units of the pixel range
    warnings: tuple[str, ...]
    normalized_verdicts: Mapping[str, Verdict] = dataclasses.field(
        default_factory=dict
    )  # the same, in normalised units
    processes: int = 1
    command: str | None = None  # that gives the same again
    settings: Settings | None = None  # None: it was not made by `timm-lowrank evaluate`

    def __post_init__(self) -> None:
        verdicts = (self.verdicts, self.normalized_verdicts)
        _refuse(_contradictions(self.networks, self.figures, self.curves, self.strips, *verdicts))

    @property
    def titles(self) -> tuple[str, ...]:
        """Of the networks, in order."""
        return tuple(network.title for network in self.networks)

    def figure(self, key: str) -> Figure | None:
        """The figure with this key; None if there is none."""
        return next((figure for figure in self.figures if figure.key == key), None)

    def by_kind(self, *kinds: Kind, layer: str | None = None, directions: int | None = None) -> tuple[Figure, ...]:
        """The figures of these kinds, in order; of one layer or number of directions if they are given."""
        return tuple(
            figure
            for figure in self.figures
            if figure.kind in kinds and layer in (None, figure.layer) and directions in (None, figure.directions)
        )

    def groups(self) -> dict[str, list[Figure]]:
        """Figures by group, groups and figures in the order of the file; those measured nowhere are left out."""
        groups: dict[str, list[Figure]] = {}
        for figure in self.figures:
            if figure.values:
                groups.setdefault(figure.group, []).append(figure)
        return groups

    def all_warnings(self) -> tuple[str, ...]:
        """`warnings`, and one for every value that could not be computed or that the number of images bounds."""
        unknown = (
            f"{title}, {figure.label}: {'not a number' if value.beyond is None else f'> {_beyond_text(value.beyond)}'}"
            f"{'' if value.of is None else f' (of {value.of} images)'}"
            for figure in self.figures
            for title, value in figure.values.items()
            if not value.known
        )
        bounded = (
            f"{title}, {figure.label}: {value.of or 'so many'} images allow {value.at_most:,.0f} at most, that of "
            "more images may be larger"
            for figure in self.figures
            for title, value in figure.values.items()
            if value.at_most is not None
        )
        return tuple(dict.fromkeys([*self.warnings, *unknown, *bounded]))


class Headline(NamedTuple):
    """The figures that a reader wants first; None for what was not measured."""

    clean: Figure | None
    pgd: Figure | None
    autoattack: Figure | None


def headline(evaluation: Evaluation, *, reference: bool = False) -> Headline:
    """Clean accuracy, PGD and AutoAttack, with radii in units of the pixel range alone.

    PGD is the untargeted white-box one in L_inf with most steps among those measured on most networks, 20 if there are
    20, at the largest radius up to 8/255. AutoAttack is the L_inf one at that radius, otherwise the nearest to it.

    Args:
        reference: only what can be set beside figures from elsewhere, as cards do: PGD-20 from one random start, and
            standard AutoAttack, both at 8/255.
    """
    clean = next((figure for figure in evaluation.by_kind(Kind.CLEAN) if figure.values), None)
    in_linf = [
        (figure, attack, attack.eps)
        for figure in evaluation.by_kind(Kind.ATTACK)
        if figure.values and (attack := figure.protocol.attack)
        if attack.eps is not None and attack.norm == "linf" and not attack.targeted and attack.radius_unit == "pixel"
    ]
    if reference:
        in_linf = [one for one in in_linf if abs(one[2] - EPS) < 1e-6 and _is_reference(one[1])]

    def order(candidate: tuple[Figure, AttackProtocol, float]) -> tuple[float, ...]:
        figure, attack, eps = candidate
        measured = sum(value.known for value in figure.values.values())
        small = eps <= EPS + 1e-6
        return (-measured, not small, -eps if small else eps, attack.steps != 20, -(attack.steps or 0))

    pgd = min((candidate for candidate in in_linf if candidate[1].name == "PGD"), key=order, default=None)
    radius = pgd[2] if pgd else EPS
    auto = [candidate for candidate in in_linf if candidate[1].name == "AutoAttack"]
    nearest = min(auto, key=lambda candidate: abs(candidate[2] - radius), default=None)
    return Headline(clean, pgd and pgd[0], nearest and nearest[0])


def _is_reference(attack: AttackProtocol) -> bool:
    """Whether it is run as others run it."""
    if attack.name == "PGD":
        return attack.steps == 20 and attack.random_start is True and attack.restarts == 1
    return attack.name == "AutoAttack" and attack.version == "standard"


def value_text(value: Value, unit: Unit) -> str:
    """A value in words: 41.1 %, 0.23, > 32/255, not a number."""
    if not value.known and value.beyond is not None:
        return f"> {_beyond_text(value.beyond)}"
    return text.quantity(value.value, unit)


def _beyond_text(largest: float) -> str:
    radius = radius_text(largest)
    return radius if "/" in radius else text.number(largest)


def radius_text(eps: float) -> str:
    """A radius as the literature writes it: 8/255, but 0.5 where that is short or it is no half grey level."""
    short, halves = f"{eps:g}", eps * 510
    if len(short) <= 4 or halves < 0.5 or abs(halves - round(halves)) > 1e-6:
        return short
    return f"{round(halves) / 2:g}/255"


def _radius(eps: float | None) -> str | None:
    return None if eps is None else radius_text(eps)


# ----------------------------------------------------------------------------------------------------- files and checks


def read_evaluation(path: Path) -> Evaluation:
    """Reads evaluation.json.

    Raises:
        EvaluationError: it cannot be read, is of another format, or is not complete: every problem in one message.
    """
    return evaluation_from_json(read_json(path, EvaluationError, limit=MOST_BYTES))


def write_evaluation(evaluation: Evaluation, path: Path) -> None:
    """Writes evaluation.json, whole or not at all; the same evaluation gives the same bytes."""
    write_whole(path, evaluation_to_json(evaluation))


def evaluation_to_json(evaluation: Evaluation) -> str:
    """The text of evaluation.json: `format` and the fields, without those that have their default; NaN is null."""
    content = {"format": FORMAT, **encode(evaluation)}
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def evaluation_from_json(content: Mapping[str, Any]) -> Evaluation:
    """An evaluation from the parsed content of evaluation.json.

    Raises:
        EvaluationError: as `read_evaluation`.
    """
    if (version := content.get("format")) != FORMAT:
        raise EvaluationError(
            f"this version reads evaluation.json of format {FORMAT}, not {version!r}: evaluate again with "
            "`timm-lowrank evaluate --overwrite`, or make the report with the version that wrote the file"
        )
    problems: list[str] = []
    fields = decode_fields(Evaluation, content, problems, nulls=True)
    parts = [fields.get(name) for name in ("networks", "figures", "curves", "strips", "verdicts")]
    if problems and None not in parts:
        parts.append(fields.get("normalized_verdicts") or {})
        problems += _contradictions(*parts)  # type: ignore[arg-type]
    _refuse(problems)
    return Evaluation(**fields)


def _refuse(problems: Iterable[str]) -> None:
    problems = list(problems)
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise EvaluationError(
            f"evaluation.json is not complete: {'; '.join(problems[:8])}{more}. "
            "Evaluate again with `timm-lowrank evaluate`"
        )


def _contradictions(
    networks: Sequence[NetworkInfo],
    figures: Sequence[Figure],
    curves: Sequence[Curve],
    strips: Sequence[Strip],
    verdicts: Mapping[str, Verdict],
    normalized_verdicts: Mapping[str, Verdict],
) -> Iterator[str]:
    titles = [network.title for network in networks]
    if not titles or len(set(titles)) < len(titles) or not all(titles):
        yield f"networks need titles, each another one, not {titles}"
    keys = [figure.key for figure in figures]
    yield from (f"there are two figures {key!r}" for key in dict.fromkeys(keys) if keys.count(key) > 1)

    def unknown(names: Iterable[str], where: str) -> Iterator[str]:
        for name in names:
            if name not in titles:
                yield f"{where} speaks of the network {name!r}, which is not among {', '.join(map(repr, titles))}"

    for figure in figures:
        yield from unknown(figure.values, f"figure {figure.key!r}")
    for curve in curves:
        where, more = f"curve {curve.key!r}", 1 if curve.kind == "histogram" else 0
        for line in curve.lines:
            labels = len(line.labels) != len(line.x) if curve.kind == "scatter" else bool(line.labels)
            if len(line.x) != len(line.y) + more or labels:
                columns = {"line": "x, y", "scatter": "x, y, labels", "histogram": "x (edges), y (counts)"}[curve.kind]
                yield f"{where} needs {columns} of fitting lengths"
        yield from unknown((line.network for line in curve.lines), where)
    for strip in strips:
        where = f"strip {strip.key!r}"
        for row in strip.rows:
            yield from unknown([row.network], where)
            if len(row.pixels) != math.prod(strip.shape):
                yield f"the row {row.name!r} of {where} does not hold images of the shape {list(strip.shape)}"
            elif len(row.captions) != strip.shape[0]:
                yield f"the row {row.name!r} of {where} needs a caption for each of its {strip.shape[0]} images"
    for name, given in (("verdicts", verdicts), ("normalized_verdicts", normalized_verdicts)):
        yield from unknown(given, name)
        for title, verdict in given.items():
            if verdict.verdict not in VERDICTS:
                yield f"{name}[{title!r}] is {verdict.verdict!r}, not one of {', '.join(VERDICTS)}"
