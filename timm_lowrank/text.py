"""Numbers, lists and tables in words, for terminals, pages and cards alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

TIMES = "\u00d7"
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
NOT_A_NUMBER = "not a number"
RADIUS_UNITS = {"pixel": "of the pixel range", "normalized": "in normalised units"}
COUNTED = {"restarts": ("restart", "restarts"), "images": ("image", "images"), "queries": ("query", "queries")}


def percent(share: float, decimals: int = 1) -> str:
    """A share as per cent without the sign: 96.1.

    With more decimals where rounding would turn a share into none or all of the images, which it is not.

    >>> percent(0.961), percent(0.0004), percent(0.99999), percent(1.0)
    ('96.1', '0.04', '99.999', '100.0')
    """
    value = 100 * share
    for places in range(decimals, 5):
        text = f"{value:.{places}f}"
        if abs(float(text)) not in (0, 100) or abs(float(text) - value) < 1e-12:
            return text.removeprefix("-") if float(text) == 0 else text
    return number(value) if abs(value) < 1 else f"{value:.10g}"


def number(value: float) -> str:
    """A number with its leading digits, however small or large it is: powers of ten beyond 0.001 and a million.

    >>> number(0.0523), number(20.0), number(12345.6), number(math.nan)
    ('0.0523', '20', '12,346', 'not a number')
    """
    if not math.isfinite(value):
        return NOT_A_NUMBER
    if isinstance(value, int) or (value == int(value) and abs(value) < 1e7):
        return f"{int(value):,}"
    if 1e-3 <= abs(value) < 1e6:
        return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa} {TIMES} 10{str(int(exponent)).translate(SUPERSCRIPTS)}"


def quantity(value: float, unit: str, *, bare: bool = False, plus: bool = False) -> str:
    """A share in per cent, 41.1 %, anything else as a number.

    Args:
        unit: "share", or another one.
        bare: without the sign of per cent, as in an interval or a difference in percentage points.
        plus: with a sign before positive ones.
    """
    if not math.isfinite(value):
        return NOT_A_NUMBER
    text = percent(value) if unit == "share" else number(value)
    sign = "+" if plus and value > 0 and text != "0.0" else ""
    return f"{sign}{text}{' %' if unit == 'share' and not bare else ''}"


def phrases(entries: Mapping[str, str | int | float | bool]) -> list[str]:
    """How something was measured, from names and values.

    >>> phrases({"attack": "PGD, L_inf", "eps": "8/255", "steps": 20, "step_size": "2/255", "random_start": False})
    ['PGD, L_inf', 'radius 8/255', '20 steps of 2/255', 'no random start']
    >>> phrases({"eps": "8/255", "radius_unit": "normalized", "steps": 7})
    ['radius 8/255 in normalised units', '7 steps']
    """
    left = dict(entries)
    words = [str(left.pop("attack"))] if "attack" in left else []
    unit = left.pop("radius_unit", None)
    units = "" if unit is None else f" {RADIUS_UNITS.get(str(unit), unit)}"
    if "eps" in left:
        words.append(f"radius {left.pop('eps')}{units}")
    elif unit is not None:
        words.append("radii in parts of the pixel range" if unit == "pixel" else f"radii{units}")
    if "steps" in left:
        steps = left.pop("steps")
        step = f" of {left.pop('step_size')}" if "step_size" in left else ""
        words.append((counted(steps, "step") if isinstance(steps, int) else f"{steps} steps") + step)
    for key, value in left.items():
        name = key.replace("_", " ")
        if isinstance(value, bool):
            words.append(name if value else f"no {name}")
        elif key in COUNTED and isinstance(value, int):
            words.append(counted(value, *COUNTED[key]))
        else:
            words.append(f"{name} {value}")
    return words


def one_line(value: object) -> str:
    """Text without line breaks and control characters, which a terminal would obey."""
    printable = "".join(sign if sign.isprintable() else " " for sign in str(value))
    return " ".join(printable.split())


def numbered(names: Sequence[str]) -> list[str]:
    """The same names, those that came before with a number.

    >>> numbered(["twin", "plain", "twin"])
    ['twin', 'plain', 'twin (2)']
    """
    given: list[str] = []
    for name in names:
        new, number = name, 1
        while new in given or (number > 1 and new in names):
            number += 1
            new = f"{name} ({number})"
        given.append(new)
    return given


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
    rule = ["---:" if column in right else "---" for column in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))
