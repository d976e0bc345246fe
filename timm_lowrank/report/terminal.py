"""`text_table`: figures side by side, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .content import check_content, groups, titles
from .wording import difference, difference_text, figure_text, interval_text, plain

WIDTH = 100
LABEL, GAP = 24, 12  # columns for labels at the least, and for differences
TOGETHER = 4  # networks in one table
UNMEASURED = "-"


def text_table(evaluation: Mapping[str, Any]) -> str:
    """The verdicts and all figures, at most 100 columns wide: networks side by side, with intervals where they fit.

    Of two networks the difference is shown; `*` marks what its interval tells from zero.

    Raises:
        EvaluationError: the content is of another format or not complete.
    """
    check_content(evaluation)
    networks, verdicts = titles(evaluation), evaluation["verdicts"]
    lines = [_cut(f"{title}: {one['verdict']}. {one['summary']}", WIDTH) for title, one in verdicts.items()]
    for start in range(0, len(networks), TOGETHER):
        lines += _tables(evaluation, networks[start : start + TOGETHER])
    if any(line.endswith("*") for line in lines):
        lines += ["", f"* the {100 * evaluation['confidence']:g} % interval of the difference leaves out zero"]
    return "\n".join(lines).lstrip("\n")


def _tables(evaluation: Mapping[str, Any], networks: Sequence[str]) -> list[str]:
    compared = len(networks) == 2
    room = (WIDTH - LABEL - (GAP + 2 if compared else 0)) // len(networks) - 2
    tables = {name: [_row(one, networks, room) for one in figures] for name, figures in groups(evaluation).items()}
    rows = [row for table in tables.values() for row in table]
    heads = [*networks, "difference"] if compared else list(networks)
    limits = [*[room] * len(networks), GAP]
    widths = [
        min(limits[place], max([len(head), *(len(row[place + 1]) for row in rows)])) for place, head in enumerate(heads)
    ]
    left = WIDTH - sum(widths) - 2 * len(widths)
    labels = min(left, max([LABEL, *(len(row[0]) for row in rows), *map(len, tables)]))

    def line(label: str, *cells: str) -> str:
        shown = [_cut(text, width).rjust(width) for text, width in zip(cells, widths, strict=True)]
        return "  ".join([_cut(label, labels).ljust(labels), *shown]).rstrip()

    return [text for name, table in tables.items() for text in ("", line(name, *heads), *(line(*row) for row in table))]


def _row(figure: Mapping[str, Any], networks: Sequence[str], room: int) -> list[str]:
    """Label, a cell for each network and, of two networks, the difference."""
    values = [figure["values"].get(title) for title in networks]
    row = [figure["label"], *(_value(value, figure["unit"], room) for value in values)]
    if len(networks) == 2:
        gap = difference(*values)
        sign = "*" if gap and gap.distinguishable else " "
        row.append(plain(difference_text(gap, figure["unit"])) + sign if gap else "")
    return row


def _value(value: Mapping[str, Any] | None, unit: str, room: int) -> str:
    if value is None:
        return UNMEASURED
    text = plain(figure_text(value["value"], unit))
    interval = plain(interval_text(value, unit)).replace(" ", "")
    longer = f"{text} ({interval})"
    return longer if interval and len(longer) <= room else text


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 3]}..."
