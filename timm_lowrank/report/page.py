"""`write_report`: report.html, one file that needs nothing else; `text_table`: the same figures for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from ..training.disk import write_whole
from . import about, sections
from .content import check_content, headline, titles
from .markup import Markup, join, tag
from .tables import figure_table, figure_tables
from .terminal import text_table
from .wording import figure_text, known, listing

__all__ = ["text_table", "write_report"]


def write_report(evaluation: Mapping[str, Any], folder: Path) -> Path:
    """Writes `folder`/report.html, with styles, plots and images inside; the same content gives the same bytes.

    Args:
        evaluation: the content of evaluation.json.
        folder: of the evaluation; it is made.

    Returns:
        The file.

    Raises:
        EvaluationError: the content is of another format or not complete.
        ImportError: matplotlib is not installed.
    """
    check_content(evaluation)
    path = folder / "report.html"
    page = _page(evaluation)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, page)
    return path


def _page(evaluation: Mapping[str, Any]) -> str:
    name = listing(titles(evaluation))
    style = resources.files(__package__).joinpath("report.css").read_text(encoding="utf-8")
    parts = {
        "summary": ("In short", _summary(evaluation)),
        "figures": ("Figures", join([figure_tables(evaluation), about.differences_note(evaluation)])),
        "plots": ("Plots", sections.plots(evaluation)),
        "images": ("Adversarial images", sections.strips(evaluation)),
        "masking": ("Evidence on gradient masking", sections.evidence(evaluation)),
        "warnings": ("Warnings", sections.warnings(evaluation)),
        "measured": ("How it was measured", about.how_measured(evaluation)),
        "reading": ("How to read this", about.how_to_read(evaluation)),
    }
    links = [tag("li", tag("a", title, href=f"#{key}")) for key, (title, _) in parts.items() if key != "summary"]
    body = [
        _header(evaluation, name),
        *(tag("section", tag("h2", title), content, id=key) for key, (title, content) in parts.items()),
    ]
    body.insert(2, tag("nav", tag("ul", *links), aria_label="Contents"))
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"Evaluation: {name}"),
        tag("style", Markup(style)),
    ]
    page = tag("html", "\n", tag("head", *head), "\n", tag("body", tag("main", *body)), "\n", lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


def _header(evaluation: Mapping[str, Any], name: str) -> Markup:
    data = evaluation["data"]
    facts = [
        f"{data['source']}, {data['split']} split",
        f"{data['images']:,} images",
        f"suite {evaluation['suite']}",
        f"seed {evaluation['seed']}",
        about.day(evaluation["created"]),
    ]
    line = join([tag("span", fact) for fact in facts], " ")
    return tag("header", tag("p", "Evaluation", class_="kicker"), tag("h1", name), tag("p", line, class_="facts-line"))


def _summary(evaluation: Mapping[str, Any]) -> Markup:
    networks, verdicts = titles(evaluation), evaluation["verdicts"]
    found = headline(evaluation)
    lines = [
        sections.verdict_block(title, verdicts.get(title), networks, _sentence(title, found)) for title in networks
    ]
    figures = [figure for figure in found.values() if figure]
    parts = [tag("div", *lines, class_="verdicts")]
    if figures:
        parts += [figure_table(figures, evaluation, "Share of images recognised correctly.")]
    parts += [tag("p", text, class_="prose note") for text in _caveats(evaluation, found)]
    return join(parts)


def _sentence(title: str, found: Mapping[str, Mapping[str, Any] | None]) -> str:
    """Recognises 96.1 % of the images as they are, 41.1 % under PGD-20, 8/255."""
    words = []
    for key, figure in found.items():
        value = figure["values"].get(title) if figure else None
        if figure and known(value) is not None and value:
            where = "of the images as they are" if key == "clean" else f"under {_in_a_sentence(figure['label'])}"
            words.append(f"{figure_text(value['value'], 'share')} {where}")
    return f"Recognises {listing(words)}." if words else ""


def _in_a_sentence(label: str) -> str:
    """PGD-20 (8/255) instead of PGD-20, 8/255."""
    head, comma, rest = label.partition(", ")
    return f"{head} ({rest})" if comma and not any(sign in label for sign in "()") else label


def _caveats(evaluation: Mapping[str, Any], found: Mapping[str, Mapping[str, Any] | None]) -> list[str]:
    doubted = [
        title for title, one in evaluation["verdicts"].items() if one["verdict"] in ("suspect", "gradient masking")
    ]
    texts: list[str] = []
    if doubted:
        texts.append(
            f"Accuracy of {listing(doubted)} under PGD is no evidence of robustness: the attack may have failed."
        )
    if found["PGD"] and not found["AutoAttack"]:
        texts.append(
            "AutoAttack was not measured. What is left after PGD is an upper bound of robustness: a stronger attack "
            "finds more, often all of it."
        )
    number = len(sections.all_warnings(evaluation))
    if number:
        link = tag("a", "one warning" if number == 1 else f"{number} warnings", href="#warnings")
        texts.append(join(["There is " if number == 1 else "There are ", link, " below."]))
    return texts
