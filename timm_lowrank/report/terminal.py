"""`text_table`: figures side by side, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from ..evaluation.results import Evaluation, Figure, Unit, Value, difference, value_text
from ..text import columns, one_line, quantity

WIDTH = 100
LABEL, GAP = 24, 12  # columns for labels at the least, and for differences
TOGETHER = 4  # networks in one table
UNMEASURED = "-"


def text_table(evaluation: Evaluation) -> str:
    """The verdicts and all figures, at most 100 columns wide: networks side by side, with intervals where they fit.

    Of two networks the difference is shown; `*` marks what its interval tells from zero.
    """
    titles = evaluation.titles
    verdicts = [f"{title}: {one.verdict}. {one.summary}" for title, one in evaluation.verdicts.items()]
    lines = [_cut(one_line(verdict), WIDTH) for verdict in verdicts]
    lines += [
        _cut(one_line(f"{title}, radii in normalised units: {one.verdict}. {one.summary}"), WIDTH)
        for title, one in evaluation.normalized_verdicts.items()
    ]
    lines += [
        _table(evaluation, titles[start : start + TOGETHER], compared=len(titles) == 2)
        for start in range(0, len(titles), TOGETHER)
    ]
    table = "\n".join(lines).strip("\n")
    if "*\n" in f"{table}\n":
        table += f"\n\n* the {100 * evaluation.confidence:g} % interval of the difference leaves out zero"
    return table


def _table(evaluation: Evaluation, titles: Sequence[str], compared: bool) -> str:
    """A part for each group of figures, all with the same columns."""
    width = (WIDTH - LABEL - (GAP + 2 if compared else 0)) // len(titles) - 2
    rows: list[list[str]] = []
    for group, figures in evaluation.groups().items():
        heads = [_cut(one_line(title), width) for title in titles]
        rows += [[], [one_line(group).ljust(LABEL), *heads, *(["difference"] if compared else [])]]
        for figure in figures:
            values = [figure.values.get(title) for title in titles]
            rows.append([one_line(figure.label), *(_value(value, figure.unit, width) for value in values)])
            if compared:
                rows[-1].append(_difference(figure, *titles))
    taken = sum(max(len(row[column]) for row in rows if row) + 2 for column in range(1, len(rows[1]))) if rows else 0
    rows = [[_cut(row[0], WIDTH - taken), *row[1:]] if row else row for row in rows]
    return columns(rows, right=range(1, len(titles) + 2))


def _value(value: Value | None, unit: Unit, width: int) -> str:
    if value is None:
        return UNMEASURED
    text = value_text(value, unit)
    if value.at_most is not None:
        return _cut(f"{text} (at most {quantity(value.at_most, unit)})", width)
    ends = "-".join(quantity(end, unit, bare=True) for end in value.interval or ())
    longer = f"{text} ({ends})"
    return _cut(longer if ends and len(longer) <= width else text, width)


def _difference(figure: Figure, one: str, other: str) -> str:
    gap = difference(figure.values.get(one), figure.values.get(other))
    if gap is None:
        return ""
    return _cut(quantity(gap.value, figure.unit, bare=True, plus=True), GAP - 1) + ("*" if gap.distinguishable else " ")


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 3]}..."
