"""results/NAME.md, NAME.json and NAME.png of a reproduction."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..errors import EvaluationError
from ..evaluation.results import Detail, Unit, radius_text
from ..files import disk_errors, write_whole
from ..text import counted, duration, listing, markdown_table, number, percent, phrases
from .pictures import draw
from .reproduction import IMAGES, Cell, Line, Panel, Reproduction, TrainedRun, read_reproduction, write_reproduction

CODE = ("timm_lowrank", "commit", "torch")  # what a run says of the code that trained it
NOT_MEASURED, NOTHING = "not measured", "-"


def write(reproduction: Reproduction, folder: Path) -> list[Path]:
    """Writes the three files; the picture is left out where there is nothing to draw.

    Raises:
        RunError: the disk is full or not writable.
        ImportError: matplotlib is not installed.
    """
    path = folder / reproduction.name
    paths = [path.with_name(f"{path.name}.md"), path.with_name(f"{path.name}.json")]
    with disk_errors(f"could not write to {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        write_reproduction(reproduction, paths[1])
        if draw(reproduction, picture := path.with_name(f"{path.name}.png")):
            paths.append(picture)
        write_whole(paths[0], markdown(reproduction, paths[-1].name if len(paths) > 2 else None))
    return paths


def markdown(reproduction: Reproduction, picture: str | None = None) -> str:
    """The page of a reproduction; everything in it is in its JSON."""
    one = reproduction
    parts = [f"# {heading(one)}", f"> {one.notice}"]
    parts += [f"Paper: {one.source}. Ours: scale `{one.scale}`, `{one.command}`."]
    if one.statements:
        parts.append("The paper says:\n\n" + "\n".join(f"- {text}" for text in one.statements))
    if one.panels:
        parts.append(
            "Of each network first what the paper prints, then ours: mean and standard deviation over the seeds, "
            "and in brackets ours minus the paper's. Below stands the gain over the plain twin of the same recipe and "
            "seeds, and in brackets the paper's gain. Shares are in per cent, differences in points. Lines of ours "
            "without a counterpart in the paper stand among the others."
        )
    for panel in one.panels:
        parts += [f"## {panel.title}", table(panel)]
        if how := _how(panel):
            parts.append(how)
    if picture:
        parts.append(f"![{one.title}]({picture})")
    if one.notes:
        parts.append("## Read with care\n\n" + "\n".join(f"- {text}" for text in one.notes))
    if one.missing:
        parts.append("## Not measured\n\n" + "\n".join(f"- {text}" for text in one.missing))
    if one.runs:
        parts.append("## Runs\n\n" + _runs(one))
    versions = ", ".join(f"{name} {version}" for name, version in one.versions.items())
    parts.append(f"Made {one.created} by {versions}.")
    return "\n\n".join(parts) + "\n"


def heading(reproduction: Reproduction) -> str:
    """Table 5: what it shows (smoke)."""
    name = reproduction.name.replace("-", " ").capitalize()
    mark = "" if reproduction.scale == "paper" else f" ({reproduction.scale} scale)"
    return f"{name}: {reproduction.title}{mark}"


def table(panel: Panel) -> str:
    """A panel as Markdown."""
    masked = any(line.masking or line.printed_masking for line in panel.lines)
    header = ["network", "", "seeds", *panel.columns, *(["gradient masking"] if masked else [])]
    usual = _first_how(panel)
    rows: list[list[str]] = []
    for row, condition in dict.fromkeys((line.row, line.condition) for line in panel.lines):
        lines = [line for line in panel.lines if (line.row, line.condition) == (row, condition)]
        printed = [paper_text(cell) for cell in lines[0].cells]
        name, measured = ", ".join(filter(None, (row, condition))), [line for line in lines if line.seeds]
        if any(text != NOTHING for text in printed):
            verdict = [lines[0].printed_masking or ""] if masked else []
            rows.append([name, "paper", "", *printed, *verdict])
            name = ""
            if not measured:
                rows.append(["", "ours", "", *[NOT_MEASURED] * len(printed), *([""] if masked else [])])
        for line in measured:
            own = [_of_images(_of_seeds(own_text(cell), cell, line), cell, usual) for cell in line.cells]
            where, seeds = f"ours: {line.network} (`{line.recipe}`)", ", ".join(map(str, line.seeds))
            if line.network is None:  # nothing was trained for it
                where, seeds = f"ours: {line.recipe}", ""
            verdict = [_masking(line)] if masked else []
            rows.append([name, where, seeds, *own, *verdict])
            name = ""
            if any(cell.gain is not None for cell in line.cells):
                rows.append(["", "over its twin N-LR", "", *map(gain_text, line.cells), *([""] if masked else [])])
    return markdown_table(header, rows, right=range(3, 3 + len(panel.columns)))


def _of_seeds(text: str, cell: Cell, line: Line) -> str:
    """Says of how many seeds a figure is, if it is not of all."""
    fewer = 0 < len(cell.values) < len(line.seeds) and cell.beyond is None
    return f"{text} [{len(cell.values)} of {len(line.seeds)} seeds]" if fewer else text


def _of_images(text: str, cell: Cell, usual: Mapping[str, Mapping[str, Detail]]) -> str:
    """Says on how many images a figure is, if that is not what stands below the table."""
    words = {"images": "images", "train_images": "training images"}
    own = {name: cell.how[name] for name in IMAGES if name in cell.how}
    other = [f"{_count(n)} {words[name]}" for name, n in own.items() if usual[cell.column].get(name) != n]
    return f"{text} [{', '.join(other)}]" if other else text


def _count(value: Detail) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _masking(line: Line) -> str:
    verdicts = list(line.masking.values())
    named = dict.fromkeys(verdicts)
    text = "; ".join(f"{text} ({verdicts.count(text)})" if len(named) > 1 else text for text in named)
    fewer = 0 < len(verdicts) < len(line.seeds)
    return f"{text} [{len(verdicts)} of {len(line.seeds)} seeds]" if fewer else text or NOT_MEASURED


def paper_text(cell: Cell) -> str:
    """What the paper prints: 31.0, or more than 1,000; "-" for nothing."""
    if cell.printed is None:
        return NOTHING
    return cell.printed_text or _quantity(cell.printed, cell.unit)


def own_text(cell: Cell) -> str:
    """What was measured: 31.2 ± 0.4 (+4.5)."""
    if cell.shown is None:
        return NOT_MEASURED if cell.beyond is None else f"> {radius_text(cell.beyond)}"
    text = _quantity(cell.shown, cell.unit)
    if cell.at_most is not None:
        text += f" (of {number(cell.at_most)} possible)"
    if cell.deviation is not None:
        text += f" ± {_quantity(cell.deviation, cell.unit, cell.mean)}"
    if cell.difference is not None and cell.printed_text is None:
        text += f" ({_signed(cell.difference, cell)})"
    return text


def gain_text(cell: Cell) -> str:
    """How much more than the plain twin: +13.3 ± 0.4 (paper +14.3)."""
    if cell.gain is None:
        return NOTHING
    text = _signed(cell.gain, cell)
    if cell.gain_deviation is not None:
        text += f" ± {_quantity(cell.gain_deviation, cell.unit, cell.gain)}"
    return text if cell.printed_gain is None else f"{text} (paper {_signed(cell.printed_gain, cell)})"


def _signed(value: float, cell: Cell) -> str:
    return f"{'-' if value < 0 else '+'}{_quantity(abs(value), cell.unit, cell.mean)}"


def _quantity(value: float, unit: Unit, beside: float | None = None) -> str:
    """Shares in per cent with one decimal; numbers with three digits, deviations and differences as exact as what they
    stand beside."""
    if unit == "share":
        return f"{100 * value:.1f}" if beside is not None else percent(value)
    if unit == "count" and beside is None:
        return number(round(value, 1))
    return number(value)


def _first_how(panel: Panel) -> dict[str, Mapping[str, Detail]]:
    """Column -> how the first line that was measured was."""
    entries: dict[str, Mapping[str, Detail]] = {}
    for cell in (cell for line in panel.lines for cell in line.cells if cell.how):
        entries.setdefault(cell.column, cell.how)
    return entries


def _how(panel: Panel) -> str:
    """How each column was measured; what is the same for all of them is said once."""
    entries = _first_how(panel)
    if not entries:
        return ""
    crafted = "crafted_on"  # differs from line to line
    first = next(iter(entries.values()))
    shared = {
        key: value
        for key, value in first.items()
        if key != crafted and all(one.get(key, ...) == value for one in entries.values())
    }
    own = {
        column: {key: value for key, value in one.items() if key not in shared and key != crafted}
        for column, one in entries.items()
    }
    texts = [f"All columns: {'; '.join(phrases(shared))}."] if shared else []  # type: ignore[arg-type]
    texts += [f"{column}: {'; '.join(phrases(one))}." for column, one in own.items() if one]  # type: ignore[arg-type]
    return "\n".join(f"- {text}" for text in texts)


def _runs(reproduction: Reproduction) -> str:
    header = ["run", "network", "data", "images", "epochs", "clean", "training", "on", "versions"]
    rows = [
        [
            f"`{run.folder}`", run.model, run.data, f"{run.train_images:,}", str(run.epochs),
            percent(run.clean_accuracy), duration(run.seconds), run.device,
            ", ".join(f"{name} {run.versions[name]}" for name in CODE if name in run.versions),
        ]
        for run in reproduction.runs
    ]  # fmt: skip
    table = markdown_table(header, rows, right=(3, 4, 5))
    makings = sorted({run.as_of for run in reproduction.runs if run.as_of})
    kept = {making: [f"`{run.folder}`" for run in reproduction.runs if run.as_of == making] for making in makings}
    said = [
        f"Not at hand in this making, as the one of {making} had them: {', '.join(kept[making])}." for making in kept
    ]
    return "\n\n".join([table, *_unlike(reproduction.runs), *said])


def _unlike(runs: Sequence[TrainedRun]) -> list[str]:
    """A sentence for the runs that the recipe of their name, as this version has it, would train otherwise."""
    changed: dict[tuple[str, ...], list[str]] = {}
    for run in runs:
        if run.unlike:
            changed.setdefault(run.unlike, []).append(f"`{run.folder}`")
    return [
        f"Trained otherwise than the recipe of this version would: {', '.join(folders)} ({'; '.join(keys)})."
        for keys, folders in changed.items()
    ]


BEGIN, END = r"<!-- (?P<name>[\w-]+), panel (?P<panel>\d+) -->", "<!-- end -->"
QUOTE = re.compile(rf"{BEGIN}(?P<table>.*?){END}", re.DOTALL)


def fill(page: str, folder: Path) -> str:
    """A page of Markdown with its quoted tables as the JSON in `folder` has them.

    A quote stands between `<!-- table-5, panel 2 -->` and `<!-- end -->`; panels are counted from 1.

    Raises:
        EvaluationError: there is no such JSON, or no such panel; a quote has no end.
    """

    def quoted(match: re.Match[str]) -> str:
        panels = read_reproduction(folder / f"{match['name']}.json").panels
        number = int(match["panel"])
        if not 1 <= number <= len(panels):
            raise EvaluationError(f"{match['name']} has {counted(len(panels), 'panel')}, none of them is {number}")
        return f"<!-- {match['name']}, panel {number} -->\n\n{table(panels[number - 1])}\n\n{END}"

    if len(re.findall(BEGIN, page)) != len(QUOTE.findall(page)):  # else it would reach to the end of the next one
        raise EvaluationError(f"a quoted table has no {END} of its own: add it")
    return QUOTE.sub(quoted, page)


def index(reproductions: Sequence[Reproduction]) -> str:
    """README.md of the results: every entry with its page and how much of it was measured."""
    rows = []
    for one in reproductions:
        cells = [cell for panel in one.panels for line in panel.lines for cell in line.cells if line.recipe]
        known = sum(cell.mean is not None or cell.beyond is not None for cell in cells)
        what = [f"{known} of {counted(len(cells), 'figure')}"] if cells else []
        what += [counted(len(one.curves), "curve")] if one.curves else []
        what += [counted(len(one.strips), "strip")] if one.strips else []
        rows.append([f"[{one.name}]({one.name}.md)", one.title, one.source, one.scale, listing(what) or NOT_MEASURED])
    header = ["", "what it shows", "in the paper", "scale", "measured"]
    notices = dict.fromkeys(one.notice for one in reproductions)
    return "\n\n".join(["# The paper, reproduced", *_quoted(notices), markdown_table(header, rows)]) + "\n"


def _quoted(texts: Iterable[str]) -> list[str]:
    return [f"> {text}" for text in texts]
