"""Markdown whose cells, code and marks no text from elsewhere can break."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_SIGNS = re.compile(r"([\\`*_\[\]|~$])")
_LINE_START = re.compile(r"^(#{1,6}|[-+=]|\d+[.)])(?=\s|$)")


def escaped(value: Any) -> str:
    """Text that shows as it is, in a paragraph and in the cell of a table; on one line."""
    text = one_line(value)
    text = "".join(_ENTITIES.get(sign, sign) for sign in text)
    return _LINE_START.sub(lambda found: "\\" + found[0], _SIGNS.sub(r"\\\1", text))


def code(value: Any) -> str:
    """Text as code, in a paragraph and in the cell of a table; on one line."""
    text = one_line(value).replace("|", "\\|").replace("<!--", "<! --")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if "`" in text else ""
    return f"{fence}{space}{text}{space}{fence}" if text else ""


def one_line(value: Any) -> str:
    """Text without line breaks and control characters, which a terminal would obey."""
    printable = "".join(sign if sign.isprintable() else " " for sign in str(value))
    return " ".join(printable.split())


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[int] = ()) -> str:
    """A table of cells that are Markdown already; columns in `right` are aligned to the right."""
    rule = ["---:" if place in set(right) else "---" for place in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def percent(share: float) -> str:
    """96.1; with more decimals where one would turn a share into none or all, which it is not."""
    for decimals in (1, 2, 3, 4):
        text = f"{100 * share:.{decimals}f}"
        if float(text) not in (0, 100) or math.isclose(float(text), 100 * share, abs_tol=1e-12):
            break
    return text


def listing(words: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
