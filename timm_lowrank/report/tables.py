"""Tables of the report: figures side by side with their differences, and the evidence for a verdict."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from .content import groups, titles
from .markup import Markup, join, tag
from .pictures import track
from .plots import network_place
from .wording import (
    DASH,
    MINUS,
    UNMEASURED,
    counts_text,
    difference,
    difference_interval_text,
    difference_text,
    figure_text,
    interval_text,
    protocol_phrases,
    shared_protocol,
    short_number,
    tied,
)

SHORT = 8  # rows of a table that is kept on one page
OUTCOMES = {True: ("✓", "passed", "passed"), False: ("✕", "failed", "failed"), None: (DASH, "not checked", "unchecked")}


def figure_tables(evaluation: Mapping[str, Any]) -> Markup:
    """A section with a table for each group of figures."""
    parts = [_group(name, figures, evaluation) for name, figures in groups(evaluation).items()]
    return join(parts) if parts else tag("p", "No figures were measured.", class_="prose")


def figure_table(
    figures: Sequence[Mapping[str, Any]], evaluation: Mapping[str, Any], caption: str, *, said: Collection[str] = ()
) -> Markup:
    """Rows are figures; columns networks, then the first network minus each of the others.

    Args:
        said: keys of the protocol that the caption holds already.
    """
    networks = titles(evaluation)
    shares = any(figure["unit"] == "share" for figure in figures)
    usual = usual_direction(figures)
    heads = [tag("th", "Figure", scope="col", role="columnheader", class_="figure")]
    if shares:
        scale = join([tag("span", "0"), tag("span", "100 %")])
        heads.append(tag("th", scale, scope="col", role="columnheader", class_="scale"))
    heads += [
        tag("th", key_of(title, networks), scope="col", role="columnheader", class_="value") for title in networks
    ]
    heads += [
        tag("th", gap_name(networks[0], other), scope="col", role="columnheader", class_="value gap")
        for other in networks[1:]
    ]
    rows = [_row(figure, networks, shares, usual, said) for figure in figures]
    return tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", *heads, role="row"), role="rowgroup"),
        tag("tbody", *rows, role="rowgroup"),
        class_=f"figures networks-{min(len(networks), 4)}",
        role="table",
    )


def evidence_table(title: str, verdict: Mapping[str, Any]) -> Markup:
    """Every check of the diagnosis: whether it passed, in words, and on what numbers."""
    columns = ("Check", "Result", "What was seen", "Value", "Limit")
    heads = [
        tag("th", name, scope="col", role="columnheader", class_="value" if name in ("Value", "Limit") else None)
        for name in columns
    ]
    return tag(
        "table",
        tag("caption", f"Checks for {title}", class_="hidden"),
        tag("thead", tag("tr", *heads, role="row"), role="rowgroup"),
        tag("tbody", *map(_check, verdict["checks"]), role="rowgroup"),
        class_="evidence",
        role="table",
    )


def key_of(title: str, networks: Sequence[str]) -> Markup:
    """A network's name with the colour that it has in the plots."""
    return join([tag("i", class_=f"key {network_class(title, networks)}", aria_hidden="true"), tag("span", title)])


def gap_name(one: str, other: str) -> str:
    """What a difference is one of."""
    return f"{one} {MINUS} {other}" if len(one) + len(other) <= 24 else f"difference to {other}"


def network_class(title: str, networks: Sequence[str]) -> str:
    """The CSS class that gives a network its colour."""
    return f"network-{network_place(title, networks)}"


def usual_direction(figures: Sequence[Mapping[str, Any]]) -> str | None:
    """What is better in most tables, so that only exceptions have to say so."""
    found = [figure["better"] for figure in figures]
    return "higher" if "higher" in found else "lower" if "lower" in found else None


def _group(name: str, figures: Sequence[Mapping[str, Any]], evaluation: Mapping[str, Any]) -> Markup:
    shared = shared_protocol([figure["protocol"] for figure in figures])
    phrases = protocol_phrases(shared)
    notes = [f"In every row: {', '.join(phrases)}."] if phrases else []
    usual = usual_direction(figures)
    if usual:
        exceptions = any(figure["better"] != usual for figure in figures)
        notes.append(f"{usual.capitalize()} is better{' unless the row says otherwise' if exceptions else ''}.")
    return tag(
        "section",
        tag("h3", name),
        figure_table(figures, evaluation, " ".join(notes), said=shared),
        class_="group short" if len(figures) <= SHORT else "group",
    )


def _row(
    figure: Mapping[str, Any], networks: Sequence[str], shares: bool, usual: str | None, said: Collection[str]
) -> Markup:
    unit, values = figure["unit"], figure["values"]
    phrases = protocol_phrases(figure["protocol"], list(said))
    if usual and figure["better"] != usual:
        phrases.append(f"{figure['better']} is better" if figure["better"] else "neither is better")
    label = join([figure["label"], tag("small", " · ".join(phrases))] if phrases else [figure["label"]])
    cells = [tag("th", label, scope="row", role="rowheader", class_="figure")]
    if shares:
        lines = [(network_class(title, networks), values[title]) for title in networks if title in values]
        cells.append(tag("td", track(lines) if unit == "share" else "", role="cell", class_="scale"))
    cells += [_value(figure, title, networks) for title in networks]
    cells += [_gap(figure, networks[0], other) for other in networks[1:]]
    return tag("tr", *cells, role="row")


def _value(figure: Mapping[str, Any], title: str, networks: Sequence[str]) -> Markup:
    value = figure["values"].get(title)
    name = tag("b", key_of(title, networks), class_="name", aria_hidden="true")  # where the table is restacked
    if value is None:
        return tag("td", name, tag("span", UNMEASURED, class_="none"), role="cell", class_="value")
    lines = [interval_text(value, figure["unit"]), counts_text(value)]
    return tag(
        "td",
        name,
        tag("strong", figure_text(value["value"], figure["unit"])),
        *(tag("small", line) for line in lines if line),
        role="cell",
        class_="value",
    )


def _gap(figure: Mapping[str, Any], one: str, other: str) -> Markup:
    gap = difference(figure["values"].get(one), figure["values"].get(other))
    name = tag("b", gap_name(one, other), class_="name", aria_hidden="true")
    if gap is None:
        return tag("td", name, tag("span", DASH, class_="none"), role="cell", class_="value gap")
    sign, words = {True: ("≠", "beyond chance"), False: ("≈", "within chance"), None: ("", "")}[gap.distinguishable]
    sure = "sure" if gap.distinguishable else None
    return tag(
        "td",
        name,
        tag("span", tag("span", sign, class_="sign", aria_hidden="true") if sign else "",
            difference_text(gap, figure["unit"]), class_=sure),
        tag("small", difference_interval_text(gap, figure["unit"])) if sign else "",
        tag("small", words, class_="words") if words else "",
        role="cell",
        class_="value gap",
    )  # fmt: skip


def _check(check: Mapping[str, Any]) -> Markup:
    sign, words, kind = OUTCOMES[check["passed"]]
    value, limit = (
        tag("td", tag("b", name, class_="name", aria_hidden="true"),
            DASH if check.get(key) is None else _plain_number(check[key]),
            role="cell", class_="value" if check.get(key) is not None else "value none")
        for key, name in (("value", "Value"), ("limit", "Limit"))
    )  # fmt: skip
    return tag(
        "tr",
        tag("th", check["name"], scope="row", role="rowheader"),
        tag("td", tag("span", sign, aria_hidden="true"), f" {words}", role="cell", class_=f"outcome {kind}"),
        tag("td", tied(check["says"]), role="cell", class_="says"),
        value,
        limit,
        role="row",
    )


def _plain_number(value: Any) -> str:
    return short_number(value) if isinstance(value, int | float) else str(value)
