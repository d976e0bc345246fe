"""Sections of the report that show pictures and evidence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .content import not_numbers, titles
from .markup import Markup, join, tag
from .pictures import inline_svg, thumbnails
from .plots import CLASSES, Panel, draw, has_classes, panels_of
from .tables import SHORT, evidence_table, key_of
from .wording import figure_text, protocol_phrases, tied

KINDS = {"line": "Line plot", "histogram": "Histogram", "scatter": "Scatter plot"}


def plots(evaluation: Mapping[str, Any]) -> Markup:
    """Every curve, a panel beside the other where there is room."""
    parts = [_plot(place, curve, evaluation) for place, curve in enumerate(evaluation["curves"])]
    return join(parts) if parts else tag("p", "No curves were measured.", class_="prose")


def strips(evaluation: Mapping[str, Any]) -> Markup:
    """Adversarial images beside the originals, every pixel of them to be seen."""
    parts = [_strip(strip, titles(evaluation)) for strip in evaluation["strips"] if strip["rows"] and strip["shape"][0]]
    if not parts:
        return tag("p", "No images were kept.", class_="prose")
    note = (
        "Below each image stands what the network takes it for. Rho is the length of the change over that of the image."
    )
    return join([tag("p", note, class_="prose"), *parts])


def evidence(evaluation: Mapping[str, Any]) -> Markup:
    """The verdict on every network with all checks that it rests on."""
    parts = []
    for title in titles(evaluation):
        verdict = evaluation["verdicts"].get(title)
        if verdict is None:
            parts.append(tag("section", tag("h3", title), tag("p", "Gradient masking was not looked for.")))
            continue
        checks = evidence_table(title, verdict) if verdict["checks"] else tag("p", "No check was made.")
        kind = "group short" if len(verdict["checks"]) <= SHORT else "group"
        parts.append(tag("section", verdict_block(title, verdict, titles(evaluation)), checks, class_=kind))
    return join(parts)


def warnings(evaluation: Mapping[str, Any]) -> Markup:
    """What the reader should know before believing a figure."""
    found = all_warnings(evaluation)
    return tag("ul", *(tag("li", text) for text in found), class_="warnings") if found else tag("p", "None.")


def all_warnings(evaluation: Mapping[str, Any]) -> list[str]:
    return [*map(str, evaluation["warnings"]), *not_numbers(evaluation)]


def verdict_block(title: str, verdict: Mapping[str, Any] | None, networks: Sequence[str], more: str = "") -> Markup:
    """A heading with the verdict in words, its one sentence, and what else there is to say."""
    words = verdict["verdict"] if verdict else "gradient masking was not looked for"
    kind = {"suspect": "suspect", "gradient masking": "masking"}.get(words, "neutral")
    shown = "suspected gradient masking" if kind == "suspect" else words
    texts = [verdict["summary"] if verdict else "", more]
    head = tag("h3", key_of(title, networks), ": ", tag("em", shown))
    return tag("div", head, *(tag("p", tied(text)) for text in texts if text), class_=f"verdict {kind}")


def _plot(place: int, curve: Mapping[str, Any], evaluation: Mapping[str, Any]) -> Markup:
    panels = panels_of(curve, evaluation)
    pictures = [
        inline_svg(draw([panel]), f"plot-{place}-{number}", _describe(panel)) for number, panel in enumerate(panels)
    ]
    said = ", ".join([curve["group"], *protocol_phrases(curve.get("protocol") or {})])
    if curve["kind"] == "scatter" and has_classes(curve["lines"]):
        repeated = len(evaluation["data"]["class_names"]) > len(CLASSES)
        said += f"; colours are classes{', and repeat' if repeated else ''}"
    return tag(
        "figure",
        tag("figcaption", tag("h3", curve["title"]), tag("p", said)),
        tag("div", *pictures, class_="panels") if pictures else tag("p", "Nothing was measured."),
        class_="plots" if len(panels) > 1 else "plots single",
    )


def _describe(panel: Panel) -> str:
    """What a plot shows, for those who cannot see it."""
    curve = panel.curve
    title = f"{curve['title']}, {panel.title}" if panel.title else curve["title"]
    about = f"{KINDS[curve['kind']]}: {title}; {curve['y_label']} against {curve['x_label']}."
    if curve["kind"] != "line":
        return f"{about} Networks: {', '.join(dict.fromkeys(line['network'] for line in panel.lines))}."
    unit = "share" if curve.get("y_share") else "number"
    ends = [
        f"{' '.join(filter(None, (line['network'], line.get('name'))))} from {figure_text(line['y'][0], unit)} "
        f"at {figure_text(line['x'][0], 'number')} to {figure_text(line['y'][-1], unit)} "
        f"at {figure_text(line['x'][-1], 'number')}"
        for line in panel.lines
    ]
    return f"{about} {'; '.join(ends)}."


def _strip(strip: Mapping[str, Any], networks: Sequence[str]) -> Markup:
    rows: dict[str, list[Markup]] = {}
    for row in strip["rows"]:
        label = tag("p", key_of(row["network"], networks), f", {row['name']}", class_="row")
        rows.setdefault(row["network"], []).extend([label, tag("ol", *_thumbs(row, strip["shape"]), class_="thumbs")])
    said = ", ".join(protocol_phrases(strip.get("protocol") or {}))
    caption = tag("figcaption", tag("h3", strip["title"]), tag("p", said) if said else "")
    columns = [tag("div", *one) for one in rows.values()]
    return tag("figure", caption, *columns, class_="strip", style=_columns(strip["shape"][0]))


def _columns(images: int) -> str:
    """As few rows as fit on a screen, all of the same length: CSS variables for wide and for narrow ones."""
    wide, narrow = (math.ceil(images / math.ceil(images / most)) for most in (8, 6))
    return f"--wide: {wide}; --narrow: {narrow}"


def _thumbs(row: Mapping[str, Any], shape: Sequence[int]) -> list[Markup]:
    notes = row.get("notes") or []
    found = []
    for place, (url, caption) in enumerate(zip(thumbnails(row["pixels"], shape), row["captions"], strict=True)):
        note = str(notes[place]) if place < len(notes) else ""
        words = [f"{row['name']}, image {place + 1} of {shape[0]}", str(caption), note]
        image = tag("img", src=url, alt="; ".join(filter(None, words)), width=str(shape[3]), height=str(shape[2]))
        found.append(tag("li", image, tag("span", str(caption)) if caption else "", tag("small", note) if note else ""))
    return found
