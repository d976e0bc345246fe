"""`write_report`: report.html, one file that needs nothing else, made from the template report.html.jinja."""

from __future__ import annotations

import base64
import functools
import io
import math
import re
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from .. import text
from ..evaluation.results import (
    SOUND,
    Curve,
    Detail,
    Evaluation,
    Figure,
    Headline,
    Kind,
    Value,
    difference,
    headline,
    value_text,
)
from ..files import write_whole
from .plots import CLASSES, colour_index, draw, has_classes, inline_svg, panels_of

THIN, MINUS, DASH = "\u202f", "\u2212", "\u2013"  # a narrow space at which no line is broken, and printers' signs
ENLARGED = 96  # pixels of an image's longer side that are not exceeded
DIRECTIONS = 10  # in which the summary says how much variance there is
SHORT = 8  # rows of a table that is kept on one page
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip


def write_report(evaluation: Evaluation, folder: Path) -> Path:
    """Writes `folder`/report.html, with styles, plots and images inside; the same evaluation gives the same bytes.

    Args:
        evaluation: what evaluation.json holds.
        folder: of the evaluation; it is made.

    Returns:
        The file.

    Raises:
        ImportError: matplotlib is not installed.
    """
    page = _environment().get_template("report.html.jinja").render(_content(evaluation))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.html"
    write_whole(path, page)
    return path


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("timm_lowrank", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    functions = (
        counts, date, has_classes, interval, on_scale, row_length, shared_entries, short_number, text.duration,
        text.listing, thumbnails, typographic, usual_direction, value_text,
    )  # fmt: skip
    environment.filters |= {
        **{function.__name__: function for function in functions},
        "phrases": lambda entries: [typographic(phrase) for phrase in text.phrases(entries)],
        "quantity": lambda *args, **options: typographic(text.quantity(*args, **options)),
    }
    return environment


def _content(evaluation: Evaluation) -> dict[str, Any]:
    """What the template speaks of beside the evaluation itself."""
    titles, first_figures = evaluation.titles, headline(evaluation)
    gaps = [
        difference(figure.values.get(titles[0]), figure.values.get(other))
        for figure in evaluation.figures
        for other in titles[1:]
    ]
    return {
        "CLASSES": CLASSES,
        "SHORT": SHORT,
        "colour": lambda title: f"network-{colour_index(title, titles)}",
        "command": evaluation.command or _command(evaluation),
        "confidence": typographic(f"{100 * evaluation.confidence:g} %"),
        "difference": difference,
        "doubted": [title for title, verdict in evaluation.verdicts.items() if verdict.verdict != SOUND],
        "evaluation": evaluation,
        "headline": first_figures,
        "ranks": [f for f in evaluation.figures if f.kind is Kind.EFFECTIVE_RANK and f.values],
        "pictures": functools.partial(_pictures, evaluation),
        "variances": _leading_variances(evaluation),
        "sentence": functools.partial(_sentence, first_figures),
        "tested": sum(gap is not None and gap.low is not None for gap in gaps),
        "titles": titles,
    }


def _leading_variances(evaluation: Evaluation) -> list[Figure]:
    """Of each layer the share of its variance in the number of directions that is nearest to DIRECTIONS."""
    layers: dict[str | None, Figure] = {}
    for figure in evaluation.by_kind(Kind.VARIANCE):
        known = layers.get(figure.layer)
        if known is None or _far(figure) < _far(known):
            layers[figure.layer] = figure
    return [figure for figure in layers.values() if figure.values]


def _far(figure: Figure) -> float:
    return math.inf if figure.directions is None else abs(figure.directions - DIRECTIONS)


def _pictures(evaluation: Evaluation, curve: Curve, number: int) -> list[str]:
    """The panels of a curve, which is the `number`-th of the page, as <svg> elements."""
    return [
        inline_svg(draw([panel]), f"plot-{number}-{index}", typographic(panel.description()))
        for index, panel in enumerate(panels_of(curve, evaluation))
    ]


def _sentence(figures: Headline, title: str) -> str:
    """Recognises 96.1 % of the images as they are and 41.1 % under PGD-20 (8/255)."""
    words = []
    for figure in figures:
        value = figure.values.get(title) if figure else None
        if figure and value and value.known:
            head, comma, rest = figure.label.partition(", ")
            label = f"{head} ({rest})" if comma and not any(sign in figure.label for sign in "()") else figure.label
            where = "of the images as they are" if figure is figures.clean else f"under {label}"
            words.append(f"{text.quantity(value.value, 'share')} {where}")
    return f"Recognises {text.listing(words)}." if words else ""


def _command(evaluation: Evaluation) -> str | None:
    """What gives the same figures again; None where paths are not known or there are more than two networks."""
    paths = [network.path for network in evaluation.networks if network.path]
    if len(paths) != len(evaluation.networks) or len(paths) > 2:
        return None
    words = ["timm-lowrank", "evaluate", paths[0], *(["--against", paths[1]] if paths[1:] else [])]
    return shlex.join([*words, "--suite", evaluation.suite, "--limit", str(evaluation.data.images)])


# ------------------------------------------------------------------------------------------------ filters of the page


def typographic(words: str) -> str:
    """The same with printers' signs, and with no line break between a number and its sign of per cent."""
    words = re.sub(rf"(?<=\d) (?=[%{text.TIMES}])|(?<={text.TIMES}) (?=\d)", THIN, words)
    return re.sub(r"(?<!\S)-(?=\d)", MINUS, words).replace("L_inf", "L∞")


def short_number(value: float) -> str:
    """A number without trailing zeros."""
    number = text.number(value)
    return typographic(number.rstrip("0").rstrip(".") if "." in number and number[-1].isdecimal() else number)


def interval(value: Value, unit: str) -> str:
    """36.1 - 46.2 without the sign of per cent, or nothing."""
    ends = [text.quantity(end, unit, bare=True) for end in value.interval or ()]
    return typographic(f"{THIN}{DASH}{THIN}".join(ends))


def counts(value: Value) -> str:
    """148 of 360, 360 images, which allow 359 at most, or nothing."""
    if value.of is None:
        return ""
    bound = "" if value.at_most is None else f", which allow {value.at_most:,.0f} at most"
    return text.counted(value.of, "image") + bound if value.hits is None else f"{value.hits:,} of {value.of:,}"


def on_scale(figure: Figure, titles: Sequence[str]) -> list[str]:
    """The networks whose value of this figure has a place between 0 and 100 %."""
    if figure.unit != "share":
        return []
    return [title for title in titles if title in figure.values and 0 <= figure.values[title].value <= 1]


def usual_direction(figures: Sequence[Figure]) -> str | None:
    """What is better in most rows of a table, so that only exceptions have to say so."""
    directions = [figure.better for figure in figures]
    return "higher" if "higher" in directions else "lower" if "lower" in directions else None


def shared_entries(figures: Sequence[Figure]) -> dict[str, Detail]:
    """What is the same in the protocols of at least two figures, so that it has to be said once."""
    if len(figures) < 2:
        return {}
    first, *others = (figure.protocol.entries() for figure in figures)
    return {name: value for name, value in first.items() if all(other.get(name) == value for other in others)}


def row_length(images: int, most: int) -> int:
    """Columns that put images into as few rows as `most` of them allow, all rows of the same length."""
    return math.ceil(images / math.ceil(images / most))


def thumbnails(pixels: bytes, shape: Sequence[int]) -> list[str]:
    """A data URL with a PNG for each image; small ones are enlarged, for on paper they would be smoothed.

    Args:
        pixels: uint8, (n, channels, height, width) in row-major order.
        shape: (n, channels, height, width); with other than 1 or 3 channels, their mean is shown.
    """
    images = np.frombuffer(pixels, np.uint8).reshape(shape)
    if shape[1] not in (1, 3):
        images = images.mean(axis=1, keepdims=True).astype(np.uint8)
    times = max(1, ENLARGED // max(shape[2:]))
    urls = []
    for image in images:
        picture = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
        buffer = io.BytesIO()
        size = times * picture.width, times * picture.height
        picture.resize(size, Image.Resampling.NEAREST).save(buffer, "PNG", optimize=True)
        urls.append("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode())
    return urls


def date(created: str, *, clock: bool = False) -> str:
    """22 November 2026, or with `clock` 22 November 2026, 17:00 UTC, whatever the language of the machine.

    A time that cannot be read stays as it is.
    """
    try:
        time = datetime.fromisoformat(created)
    except ValueError:
        return created
    day = f"{time.day} {MONTHS[time.month - 1]} {time.year}"
    if not clock:
        return day
    return f"{day}, {time.astimezone(UTC):%H:%M} UTC" if time.tzinfo else f"{day}, {time:%H:%M}"
