"""What is in evaluation.json: checked once, so that tables and pictures need not; and which figures come first."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

from ..errors import EvaluationError

FORMAT = 1
KEYS = {
    "evaluation": (
        "suite", "seed", "chunk", "device", "seconds", "created", "confidence", "versions", "data", "networks",
        "figures", "curves", "strips", "verdicts", "warnings",
    ),
    "data": ("source", "split", "images", "image_size", "class_names"),
    "network": ("title",),
    "figure": ("key", "group", "label", "unit", "better", "protocol", "values"),
    "curve": ("key", "group", "title", "kind", "x_label", "y_label", "lines"),
    "strip": ("key", "title", "shape", "rows"),
    "row": ("network", "name", "pixels", "captions"),
    "verdict": ("verdict", "summary", "checks"),
    "check": ("name", "passed", "says"),
}  # fmt: skip
UNITS = ("share", "number", "count")
BETTER = ("higher", "lower", None)
LINES = {"line": ("x", "y"), "scatter": ("x", "y", "label"), "histogram": ("edges", "counts")}
VERDICTS = ("no sign of gradient masking", "suspect", "gradient masking")


def check_content(evaluation: Mapping[str, Any]) -> None:
    """Reads all of it before anything is drawn.

    Raises:
        EvaluationError: another format, or what is missing or contradicts itself: all of it in one message.
    """
    found = evaluation.get("format") if isinstance(evaluation, Mapping) else None
    if found != FORMAT:
        raise EvaluationError(
            f"this version reads evaluation.json of format {FORMAT}, not {found!r}: evaluate again with "
            "recipes/evaluate.py, or make the report with the version that wrote the file"
        )
    problems = list(_missing(evaluation, "evaluation", "evaluation.json")) or list(_problems(evaluation))
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise EvaluationError(
            f"evaluation.json is not complete: {'; '.join(problems[:8])}{more}. Evaluate again with recipes/evaluate.py"
        )


def titles(evaluation: Mapping[str, Any]) -> list[str]:
    """Of the networks, in order; the first is the one that the report is about."""
    return [network["title"] for network in evaluation["networks"]]


def groups(evaluation: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """Figures by group, groups and figures in the order of the file; figures measured nowhere are left out."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for figure in evaluation["figures"]:
        if figure["values"]:
            found.setdefault(figure["group"], []).append(figure)
    return found


def headline(evaluation: Mapping[str, Any]) -> dict[str, Mapping[str, Any] | None]:
    """The figures that a reader wants first: "clean", "PGD" and "AutoAttack"; None for what was not measured.

    PGD is the untargeted white-box one with most steps among those measured on most networks, 20 if there are 20, at
    the largest radius up to 8/255. AutoAttack is the L_inf one at that radius, otherwise the nearest to it.
    """
    shares = [figure for figure in evaluation["figures"] if figure["unit"] == "share" and figure["values"]]
    clean = next((figure for figure in shares if _is_clean(figure)), None)
    accuracies = [figure for figure in shares if figure["better"] == "higher"]  # not: which part broke how many
    attacks = [figure for figure in accuracies if _radius(figure) is not None and _white_box(figure)]
    pgd = min((figure for figure in attacks if _attack(figure).startswith("pgd")), key=_pgd_order, default=None)
    reference = (_radius(pgd) if pgd else None) or Fraction(8, 255)
    auto = [figure for figure in attacks if _attack(figure).startswith("autoattack")]
    nearest = min(auto, key=lambda figure: abs((_radius(figure) or 0) - reference), default=None)
    return {"clean": clean, "PGD": pgd, "AutoAttack": nearest}


def not_numbers(evaluation: Mapping[str, Any]) -> list[str]:
    """A warning for every figure that is NaN."""
    return [
        f"{figure['label']} of {title} is not a number: it could not be computed, and says nothing."
        for figure in evaluation["figures"]
        for title, value in figure["values"].items()
        if isinstance(value["value"], float) and math.isnan(value["value"])
    ]


def _missing(part: Any, kind: str, where: str) -> Iterator[str]:
    if not isinstance(part, Mapping):
        yield f"{where} is no object"
        return
    absent = [key for key in KEYS[kind] if key not in part]
    if absent:
        yield f"{where} lacks {', '.join(absent)}"


def _problems(evaluation: Mapping[str, Any]) -> Iterator[str]:
    yield from _missing(evaluation["data"], "data", "data")
    names = [network.get("title") for network in evaluation["networks"]]
    if not names or len(set(names)) < len(names) or not all(isinstance(name, str) and name for name in names):
        yield f"networks need titles, each another one, not {names}"
    for place, figure in enumerate(evaluation["figures"]):
        yield from _figure_problems(figure, f"figures[{place}]", names)
    for place, curve in enumerate(evaluation["curves"]):
        yield from _curve_problems(curve, f"curves[{place}]", names)
    for place, strip in enumerate(evaluation["strips"]):
        yield from _strip_problems(strip, f"strips[{place}]", names)
    for title, verdict in evaluation["verdicts"].items():
        yield from _unknown([title], names, "verdicts")
        yield from _verdict_problems(verdict, f"verdicts[{title!r}]")


def _unknown(found: Sequence[str], names: Sequence[str], where: str) -> Iterator[str]:
    for title in found:
        if title not in names:
            yield f"{where} speaks of the network {title!r}, which is not among {', '.join(map(repr, names))}"


def _figure_problems(figure: Any, where: str, names: Sequence[str]) -> Iterator[str]:
    missing = list(_missing(figure, "figure", where))
    yield from missing
    if missing:
        return
    where = f"figure {figure['key']!r}"
    if figure["unit"] not in UNITS or figure["better"] not in BETTER:
        yield f"{where} has the unit {figure['unit']!r} and is better {figure['better']!r}, neither of which is known"
    yield from _unknown(list(figure["values"]), names, where)
    for title, value in figure["values"].items():
        if not isinstance(value, Mapping) or not isinstance(value.get("value"), int | float | None):
            yield f"{where} has no number as the value of {title!r}"


def _curve_problems(curve: Any, where: str, names: Sequence[str]) -> Iterator[str]:
    missing = list(_missing(curve, "curve", where))
    yield from missing
    if missing:
        return
    where = f"curve {curve['key']!r}"
    if curve["kind"] not in LINES:
        yield f"{where} is of the kind {curve['kind']!r}, not one of {', '.join(LINES)}"
        return
    for line in curve["lines"]:
        columns = [line.get(column) for column in LINES[curve["kind"]]]
        extra = 1 if curve["kind"] == "histogram" else 0
        if None in columns or any(len(column) != len(columns[0]) - extra for column in columns[1:]):
            yield f"{where} needs {', '.join(LINES[curve['kind']])} of fitting lengths"
        yield from _unknown([line.get("network")], names, where)


def _strip_problems(strip: Any, where: str, names: Sequence[str]) -> Iterator[str]:
    missing = list(_missing(strip, "strip", where))
    yield from missing
    if missing:
        return
    where = f"strip {strip['key']!r}"
    for row in strip["rows"]:
        missing = list(_missing(row, "row", f"a row of {where}"))
        yield from missing
        if missing:
            continue
        yield from _unknown([row["network"]], names, where)
        try:
            pixels = len(base64.b64decode(row["pixels"], validate=True))
        except (binascii.Error, ValueError):
            pixels = -1
        if len(strip["shape"]) != 4 or pixels != math.prod(strip["shape"]):
            yield f"the row {row['name']!r} of {where} does not hold images of the shape {strip['shape']}"
        elif len(row["captions"]) != strip["shape"][0]:
            yield f"the row {row['name']!r} of {where} needs a caption for each of its {strip['shape'][0]} images"


def _verdict_problems(verdict: Any, where: str) -> Iterator[str]:
    missing = list(_missing(verdict, "verdict", where))
    yield from missing
    if missing:
        return
    if verdict["verdict"] not in VERDICTS:
        yield f"{where} is {verdict['verdict']!r}, not one of {', '.join(VERDICTS)}"
    for place, check in enumerate(verdict["checks"]):
        yield from _missing(check, "check", f"{where}, check {place}")


def _attack(figure: Mapping[str, Any]) -> str:
    return str(figure["protocol"].get("attack") or "").casefold()


def _is_clean(figure: Mapping[str, Any]) -> bool:
    return figure["key"].casefold().startswith("clean") or figure["label"].casefold().startswith("clean")


def _white_box(figure: Mapping[str, Any]) -> bool:
    """Not transferred from another network, aimed at a class, or on a hybrid; and in L_inf."""
    words = " ".join(str(figure[key]).casefold() for key in ("key", "group", "label")).replace("untargeted", "")
    attack = f"{_attack(figure)} {figure['protocol'].get('norm', '')}".casefold().replace(" ", "")
    others = ("black", "transfer", "hybrid", "max-margin", "targeted", "noise")
    return not any(word in words for word in others) and not any(norm in attack for norm in ("l2", "l_2", "l1", "l_1"))


def _radius(figure: Mapping[str, Any]) -> Fraction | None:
    eps = figure["protocol"].get("eps")
    try:
        return None if eps is None else Fraction(str(eps))
    except (ValueError, ZeroDivisionError):
        return None


def _pgd_order(figure: Mapping[str, Any]) -> tuple[Any, ...]:
    radius, limit = _radius(figure) or Fraction(0), Fraction(8, 255)
    steps = figure["protocol"].get("steps")
    near = steps if isinstance(steps, int | float) else 0
    small = radius <= limit + Fraction(1, 10**6)  # the radius may have been written as 0.0314
    measured = sum(value["value"] is not None for value in figure["values"].values())
    return (-measured, not small, -radius if small else radius, near != 20, -near)
