"""Numbers, lists and tables in words, for terminals, pages and cards alike."""

from __future__ import annotations

from collections.abc import Sequence


def percent(share: float, decimals: int = 1) -> str:
    """A share as per cent without the sign: 96.1.

    With more decimals, up to 4, where rounding would turn a share into none or all of the images, which it is not.

    >>> percent(0.961), percent(0.0004), percent(0.99999), percent(1.0)
    ('96.1', '0.04', '99.999', '100.0')
    """
    number = 100 * share
    for places in range(decimals, 5):
        text = f"{number:.{places}f}"
        if abs(float(text)) not in (0, 100) or abs(float(text) - number) < 1e-12:
            break
    return text.removeprefix("-") if float(text) == 0 else text


def listing(words: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def counted(number: int, one: str, many: str | None = None) -> str:
    """1 image, 2,000 images."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def duration(seconds: float) -> str:
    """93 seconds, 12 minutes, 3 h 20 min."""
    if seconds < 120:
        return counted(round(seconds), "second")
    minutes = round(seconds / 60)
    return f"{minutes} minutes" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def columns(rows: Sequence[Sequence[str]], *, right: Sequence[int] = (), gap: int = 2) -> str:
    """Rows of cells as a table of aligned columns; rows may be shorter than others.

    Args:
        right: numbers of the columns that are aligned to the right.
        gap: spaces between two columns.
    """
    count = max(map(len, rows), default=0)
    widths = [max((len(row[column]) for row in rows if column < len(row)), default=0) for column in range(count)]
    lines = []
    for row in rows:
        cells = [cell.rjust(widths[i]) if i in right else cell.ljust(widths[i]) for i, cell in enumerate(row)]
        lines.append((" " * gap).join(cells).rstrip())
    return "\n".join(lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> str:
    """A table of cells that are Markdown already; columns in `right` are aligned to the right."""
    rule = ["---:" if place in right else "---" for place in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))
