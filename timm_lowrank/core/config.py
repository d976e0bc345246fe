"""`LowRankConfig`: what is regularized, how strongly, and how W is kept at its rank."""

from __future__ import annotations

import dataclasses
import math
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import nearest
from .views import VIEWS

SCALES = ("reference", "unit", "batch", "paper")
STEP_RULES = ("normalized", "fixed")
PROJECTIONS = ("subspace", "nystrom", "exact")
STORAGES = ("factored", "dense")
PRESETS = ("1-LR", "2-LR")

PRE_LOGITS = "pre_logits"  # as a layer name: the input of the classifier


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """The weights of the losses of a branch."""

    reconstruction: float  # lambda_1, of L_c
    norm: float  # lambda_2, of L_n
    head: float  # of L_s

    def __mul__(self, factor: float) -> Weights:
        return Weights(**{name: factor * weight for name, weight in vars(self).items()})


# For each strength the weights of a layer inside the network and of the input of the classifier, where ten directions
# tell all that the network knows and a head would add nothing. docs/objective.md has the runs.
STRENGTHS = {
    "light": (Weights(reconstruction=1.0, norm=0.0, head=0.3), Weights(reconstruction=0.05, norm=0.0, head=0.0)),
    "standard": (Weights(reconstruction=1.0, norm=0.0, head=1.0), Weights(reconstruction=0.05, norm=0.0, head=0.0)),
    "strong": (Weights(reconstruction=3.0, norm=0.0, head=1.0), Weights(reconstruction=0.1, norm=0.0, head=0.0)),
}
PRINTED = Weights(reconstruction=0.003, norm=0.003, head=0.0)  # of scale="paper", whatever the strength is


@dataclasses.dataclass(frozen=True, kw_only=True)
class BranchOptions:
    """What `LowRankConfig.branches` says of one layer beside its rank; None where it says nothing."""

    reconstruction_weight: float | None = None
    norm_weight: float | None = None
    head_weight: float | None = None
    view: str | None = None
    channel_dim: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRankConfig:
    """Configuration of all low-rank branches of one model.

    Args:
        branches: where the branches sit. "1-LR" is the input of the classifier with target rank 100; "2-LR"
            adds the input of the last stage with target rank 500 (paper, Section 3). Or a mapping from layer
            name to target rank, or to a mapping with "rank" and, for that branch alone, "reconstruction_weight",
            "norm_weight", "head_weight", "view" ("flatten", "token" or "pool": what counts as one sample; by default
            what suits the layer's output, see `timm_lowrank.layers.natural_view`) or "channel_dim" (which dimension of
            the output holds the channels, where that is not plain from its shape).
        strength: how strongly the branches act on the network: "light", "standard", "strong", or a number by
            which the weights of "standard" are multiplied. It gives the weights that are None below, and
            `docs/objective.md` shows what each costs and brings. Those of `scale="paper"` do not depend on it.
        reconstruction_weight: lambda_1, the weight of L_c (Algorithm 2, line 6), and, but for `scale="paper"`, of L_o,
            which is zero unless the mean of a layer grows out of proportion (`docs/objective.md`). By strength 1, 1 or
            3 for a layer inside the network and 0.05, 0.05 or 0.1 for the input of the classifier, where the same
            weight pulls much harder; with `scale="paper"` 0.003.
        norm_weight: lambda_2, the weight of L_n (Algorithm 2, line 7). By strength it is 0, but with `scale="paper"`
            that of L_c.
        head_weight: the weight of L_s, the loss of a linear classifier that reads the layer through the leading
            directions of its branch and is dropped with it (`head.py`). It needs labels: `model.penalty(labels)`. By
            strength it is 0.3, 1 or 1 for a layer inside the network and 0 for the input of the classifier. 0 is the
            paper's loss, and what `scale="paper"` has.
        head_sizes: on how many leading directions that classifier is fitted, all at once; sizes above the target rank
            become it.
        scale: how the rows that L_c sees are scaled; `scaling.py` explains each.
            "reference": divided by the root mean square norm at switch-on, or by what it has grown to since. "unit":
            every centred activation vector divided by its own norm, so that L_c is the share of a sample's energy
            outside the subspace. "batch": divided by the root mean square norm of the batch. "paper": as printed, with
            both terms.
        step_size: lambda of the Update Step (Algorithm 2, line 12). With `step_rule="normalized"` it is in
            units of the largest step that is stable for the current batch, whatever the norm of its
            activations, and must lie in (0, 1].
        step_rule: "normalized", or "fixed" for gradient steps on W and b of exactly `step_size`, as printed.
        bias_momentum: with "normalized", the share by which b moves towards minus the batch mean at each update.
        warmup_updates: for so many updates after switch-on W and b are fitted to the layer while the penalty has
            no weight; over as many again the weight then rises linearly to its value. W begins at zero, where all
            activations lie outside the subspace: without a warm-up the first thing that L_c does is to shrink the
            whole layer. 0 is as printed.
        project_every: updates between two rank projections (paper: 10).
        projection: "subspace" (warm-started subspace iteration), "nystrom" (the paper's ensembled,
            column-sampled Nystrom method) or "exact" (truncated eigendecomposition).
        oversampling: random columns that widen the start of the subspace iteration.
        nystrom_columns: l, the columns sampled by one Nystrom run; None is 2 * rank, as in the paper.
        nystrom_runs: t, the Nystrom runs that are averaged.
        update_rows: at most this many rows of an update enter W, drawn evenly from all rows since the last
            update; None takes them all. The loss always sees every row.
        storage: "factored" (W = B^T M B, nothing of size m x m) or "dense" (the literal Algorithm 2, for tests
            and narrow layers).
        seed: of everything random in a branch.

    Raises:
        ValueError: with every field that is out of range named in one message.
    """

    branches: str | Mapping[str, int | Mapping[str, Any]] = "1-LR"
    strength: str | float = "standard"
    reconstruction_weight: float | None = None
    norm_weight: float | None = None
    head_weight: float | None = None
    head_sizes: tuple[int, ...] = (5, 10, 20)
    scale: str = "reference"
    step_size: float = 0.5
    step_rule: str = "normalized"
    bias_momentum: float = 0.1
    warmup_updates: int = 100
    project_every: int = 10
    projection: str = "subspace"
    oversampling: int = 10
    nystrom_columns: int | None = None
    nystrom_runs: int = 4
    update_rows: int | None = 64
    storage: str = "factored"
    seed: int = 0

    def __new__(cls, *values: Any, **options: Any) -> LowRankConfig:
        if values:
            raise TypeError(f"LowRankConfig takes keywords alone: LowRankConfig(branches={values[0]!r}), for example")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if isinstance(self.head_sizes, list):  # as JSON and YAML give it
            object.__setattr__(self, "head_sizes", tuple(self.head_sizes))
        problems = [*self._wrong_values(), *self._wrong_branches()]
        if problems:
            raise ValueError("LowRankConfig: " + "; ".join(problems))
        if isinstance(self.branches, Mapping):  # a copy: the caller may go on to write into what was given
            copied = {layer: dict(one) if isinstance(one, Mapping) else one for layer, one in self.branches.items()}
            object.__setattr__(self, "branches", copied)

    def _wrong_values(self) -> list[str]:
        top = 1.0 if self.step_rule == "normalized" else math.inf
        rules: dict[str, tuple[Callable[[Any], bool], str]] = {
            "reconstruction_weight": (lambda v: v is None or _is_weight(v), "must be a finite number >= 0"),
            "strength": (
                lambda v: v in STRENGTHS if isinstance(v, str) else _is_weight(v),
                f"must be one of {', '.join(STRENGTHS)}, or a finite number >= 0",
            ),
            "norm_weight": (lambda v: v is None or _is_weight(v), "must be a finite number >= 0"),
            "head_weight": (lambda v: v is None or _is_weight(v), "must be a finite number >= 0"),
            "head_sizes": (
                lambda v: isinstance(v, tuple) and len(v) > 0 and all(map(_is_count, v)),
                "must be a list of integers >= 1",
            ),
            "step_size": (
                lambda v: _is_number(v) and 0 < v <= top,
                f"must lie in (0, {top}] with step_rule={self.step_rule!r}",
            ),
            "bias_momentum": (lambda v: _is_number(v) and 0 <= v <= 1, "must lie in [0, 1]"),
            "project_every": (_is_count, "must be an integer >= 1"),
            "nystrom_runs": (_is_count, "must be an integer >= 1"),
            "nystrom_columns": (lambda v: v is None or _is_count(v), "must be an integer >= 1 or None"),
            "update_rows": (lambda v: v is None or _is_count(v), "must be an integer >= 1 or None"),
            "oversampling": (lambda v: _is_int(v) and v >= 0, "must be an integer >= 0"),
            "warmup_updates": (lambda v: _is_int(v) and v >= 0, "must be an integer >= 0"),
            "seed": (_is_int, "must be an integer"),
        }
        choices = {"scale": SCALES, "step_rule": STEP_RULES, "projection": PROJECTIONS, "storage": STORAGES}
        texts = {name: f"is not one of {', '.join(allowed)}" for name, allowed in choices.items()}
        rules = {**{name: (choices[name].__contains__, text) for name, text in texts.items()}, **rules}
        values = {name: getattr(self, name) for name in rules}
        return [f"{name}={values[name]!r} {text}" for name, (good, text) in rules.items() if not good(values[name])]

    def _wrong_branches(self) -> list[str]:
        if isinstance(self.branches, str):
            if self.branches in PRESETS:
                return []
            return [
                f"branches={self.branches!r} is neither of {', '.join(PRESETS)} nor a mapping of layer name to rank"
            ]
        if not isinstance(self.branches, Mapping) or not self.branches:
            return [
                f"branches={self.branches!r} must name at least one layer and its rank, such as {{'layer3': 500}}, or "
                f"be one of {', '.join(PRESETS)}"
            ]
        rules: dict[str, tuple[Callable[[Any], bool], str]] = {
            "rank": (_is_count, "an integer >= 1"),
            "reconstruction_weight": (_is_weight, "a finite number >= 0"),
            "norm_weight": (_is_weight, "a finite number >= 0"),
            "head_weight": (_is_weight, "a finite number >= 0"),
            "view": (lambda v: v is None or v in VIEWS, f"one of {', '.join(VIEWS)}"),
            "channel_dim": (lambda v: v is None or (_is_int(v) and v != 0), "an integer, not 0"),
        }
        problems = []
        for layer, spec in self.branches.items():
            if not isinstance(layer, str):
                problems.append(
                    f"the layer {layer!r} in branches is no name; names are strings, as in named_modules(): '{layer}'"
                )
            options = {"rank": None, **spec} if isinstance(spec, Mapping) else {"rank": spec}
            for key, value in options.items():
                if key not in rules:
                    problems.append(f"branches[{layer!r}] has no option {key!r}; {nearest(str(key), rules)}")
                elif not rules[key][0](value):
                    problems.append(f"the {key} of branch {layer!r} is {value!r}; it must be {rules[key][1]}")
        return problems

    def has_had_weight(self, updates: int) -> bool:
        """Whether a penalty before the last of so many updates had weight: the warm-up was over."""
        return updates - 1 > self.warmup_updates if self.warmup_updates else updates > 0

    def ranks(self) -> dict[str, int]:
        """The target rank of each layer that `branches` names; empty for a preset, which names none."""
        if isinstance(self.branches, str):
            return {}
        return {layer: spec["rank"] if isinstance(spec, Mapping) else spec for layer, spec in self.branches.items()}

    def options(self, layer: str) -> BranchOptions:
        """What `branches` says of one layer beside its rank."""
        spec = {} if isinstance(self.branches, str) else self.branches.get(layer)
        return BranchOptions(**{k: v for k, v in spec.items() if k != "rank"} if isinstance(spec, Mapping) else {})

    def for_branch(self, layer: str, *, feeds_classifier: bool = False) -> LowRankConfig:
        """This configuration for one branch: its own options in force, and no weight left to the strength."""
        options, weights = self.options(layer), self.weights(layer, feeds_classifier=feeds_classifier)
        return dataclasses.replace(
            self,
            branches=self.branches if options == BranchOptions() else {layer: self.ranks()[layer]},
            reconstruction_weight=weights.reconstruction,
            norm_weight=weights.norm,
            head_weight=weights.head,
        )

    def weights(self, layer: str, *, feeds_classifier: bool = False) -> Weights:
        """The weights of a branch: its own, else those of all branches, else those of the strength.

        Args:
            feeds_classifier: whether the layer gives the classifier its input, as "pre_logits" does.
        """
        own, number = self.options(layer), 1 if feeds_classifier or layer == PRE_LOGITS else 0
        if self.scale == "paper":
            by_strength = PRINTED
        elif isinstance(self.strength, str):
            by_strength = STRENGTHS[self.strength][number]
        else:
            by_strength = STRENGTHS["standard"][number] * self.strength

        def first(*values: float | None) -> float:
            return next(value for value in values if value is not None)

        reconstruction = first(own.reconstruction_weight, self.reconstruction_weight, by_strength.reconstruction)
        return Weights(
            reconstruction=reconstruction,
            norm=first(
                own.norm_weight, self.norm_weight, reconstruction if self.scale == "paper" else by_strength.norm
            ),
            head=first(own.head_weight, self.head_weight, by_strength.head),
        )

    def to_dict(self) -> dict[str, Any]:
        """A dictionary of plain values that JSON and YAML can hold."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if not isinstance(self.branches, str):
            values["branches"] = {k: dict(v) if isinstance(v, Mapping) else v for k, v in self.branches.items()}
        values["head_sizes"] = list(self.head_sizes)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, strict: bool = True) -> LowRankConfig:
        """The inverse of `to_dict`.

        Args:
            strict: whether an unknown key is an error. A checkpoint of a newer version may hold keys that this
                version does not know: with `strict=False` they are named in a warning and left out.

        Raises:
            ValueError: an unknown key (the nearest known ones are named) or a value out of range.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = [key for key in values if key not in known]
        if unknown:
            message = "; ".join(f"LowRankConfig has no field {key!r}. {nearest(key, known)}" for key in unknown)
            if strict:
                raise ValueError(message)
            warnings.warn(message + " Left out.", stacklevel=2)
        return cls(**{key: value for key, value in values.items() if key in known})


def _is_number(value: object) -> bool:
    # An integer may be too large for a float, which math.isfinite() takes.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_weight(value: Any) -> bool:
    return _is_number(value) and value >= 0


def _is_count(value: Any) -> bool:
    return _is_int(value) and value >= 1


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
