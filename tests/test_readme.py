"""The README and its pages: every Python program of the README runs as written, and every link leads somewhere."""

import json
import re
import runpy
import statistics
import sys
from pathlib import Path

import pytest

from timm_lowrank.evaluation.results import read_evaluation
from timm_lowrank.reproduce import read_reproduction

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(text, language):
    """The contents of the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_the_programs_of_the_readme_run_in_the_order_of_the_page(tmp_path, monkeypatch):
    import torch

    monkeypatch.chdir(tmp_path)
    programs = blocks(README, "python")
    assert len(programs) >= 3
    names = {}
    for number, program in enumerate(programs):
        exec(compile(program, f"README program {number + 1}", "exec"), names)
    plain, pixels = names["network"], names["pixels"]
    weights = names["model"].unwrap().state_dict()  # read back by from_pretrained
    assert all(torch.equal(value, weights[name]) for name, value in plain.state_dict().items())
    assert float((names["adversarial"] - names["pictures"]).abs().max()) <= 8 / 255 + 1e-7
    assert pixels(names["pictures"]).shape == (8, 10)


def anchors(page):
    """The ids that a page's headings have on a code host."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_to_a_file_and_a_heading(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    for target in targets:
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(path), f"{page.name} links to {target}"


def test_the_commands_of_the_pages_exist():
    """Each `timm-lowrank COMMAND` and each script named on a page; arguments are the command line's own tests."""
    from timm_lowrank.cli import COMMANDS

    text = "\n".join(page.read_text() for page in PAGES)
    named = set(re.findall(r"^(?:\$ )?timm-lowrank ([a-z]+)", text, re.MULTILINE))
    assert named
    assert named <= COMMANDS.keys()
    scripts = set(re.findall(r"(?:recipes|hub|benchmarks)/\w+\.py", text))
    assert scripts
    assert not [script for script in scripts if not (ROOT / script).is_file()]


def test_the_readme_stays_a_page():
    assert len(README.splitlines()) <= 160


THREE_SEEDS = "| | plain (N-LR) | 2-LR |\n| --- | ---: | ---: |\n"


TWO_NETWORKS = "| | ResNet-18, plain | 2-LR | ResNet-10, plain | 2-LR |\n| --- | ---: | ---: | ---: | ---: |\n"


def cells_of(page, head, columns, least):
    table = (ROOT / page).read_text().split(head)[1].split("\n\n")[0]
    rows = [tuple(cell.strip() for cell in row.split("|")[columns]) for row in table.splitlines() if "rank" not in row]
    assert len(rows) >= least
    return set(rows)


def test_the_table_of_the_small_network_is_what_was_measured():
    figures = json.loads((ROOT / "docs" / "cifar10-small.json").read_text())["figures"].values()
    shares = [one["groups"] for one in figures if one["unit"] == "share"]
    measured = {
        tuple(f"{100 * groups[name]['mean']:.1f} ± {100 * groups[name]['deviation']:.1f}" for name in ("N-LR", "2-LR"))
        for groups in shares
    }
    assert cells_of("docs/measurements.md", THREE_SEEDS, slice(2, 4), 8) <= measured


def test_the_table_of_the_readme_is_what_was_measured():
    rows = json.loads((ROOT / "docs" / "objective-final.json").read_text())

    def numbers(row):
        layers = row["layers"].values()
        linear = [layer["linear"][count] for layer in layers for count in ("5", "10", "20")]
        return [row["clean"], row["noise"], *linear, *(layer["variance"]["10"] for layer in layers)]

    columns = []
    for form in ("N-LR", "2-LR standard today"):
        values = zip(*(numbers(row) for row in rows if row["form"] == form), strict=True)
        columns.append([f"{100 * statistics.mean(v):.1f} ± {100 * statistics.stdev(v):.1f}" for v in values])
    assert cells_of("README.md", TWO_NETWORKS, slice(4, 6), 6) <= set(zip(*columns, strict=True))


def test_resnet_18_in_the_table_of_the_readme_is_what_was_measured():
    conditions, measured = ("N-LR", "2-LR"), set()

    def over_seeds(values):
        return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"

    for name in ("table-5", "figure-2"):
        made = read_reproduction(ROOT / "results" / f"{name}.json")
        runs = [run for run in made.runs if run.recipe == "cifar10-resnet18-fast"]
        clean = [[run.clean_accuracy for run in runs if run.condition == condition] for condition in conditions]
        measured.add(tuple(map(over_seeds, clean)))
        for panel in made.panels:
            lines = {line.condition: line.cells for line in panel.lines if line.recipe == "cifar10-resnet18-fast"}
            cells = zip(*(lines[condition] for condition in conditions if condition in lines), strict=True)
            measured |= {tuple(over_seeds(cell.values.values()) for cell in both if cell.values) for both in cells}
    assert cells_of("README.md", TWO_NETWORKS, slice(2, 4), 6) <= measured


@pytest.mark.parametrize(
    "name",
    [
        "objective-final",
        "objective-full",
        "objective-small",
        "objective-coarse",
        "objective-coarse-final",
        "objective-digits",
        "objective-vit",
    ],
)
def test_the_tables_of_the_objective_are_what_was_measured(name, monkeypatch, capsys):
    script = str(ROOT / "benchmarks" / "objective.py")
    output = str(ROOT / "docs" / f"{name}.json")
    monkeypatch.setattr(sys, "argv", [script, "full", "--markdown", "--output", output])
    runpy.run_path(script, run_name="__main__")
    table = capsys.readouterr().out.strip()
    assert table.startswith("|")
    assert table in (ROOT / "docs" / "objective.md").read_text()


def test_autoattack_leaves_nothing_of_resnet_18_as_the_readme_says():
    made = read_evaluation(ROOT / "docs" / "autoattack-resnet18.json")
    runs = read_reproduction(ROOT / "results" / "table-5.json").runs
    clean = {r.condition: r.clean_accuracy for r in runs if (r.recipe, r.seed) == ("cifar10-resnet18-fast", 0)}
    attacked = {network.title.replace("plain", "N-LR"): network.clean.value for network in made.networks}
    assert attacked == {condition: clean[condition] for condition in ("N-LR", "1-LR", "2-LR")}
    for key in ("autoattack-linf-8-255", "autoattack-l2-0.5"):
        figure = made.figure(key)
        assert {title: value.value for title, value in figure.values.items()} == {
            "2-LR": 0.0,
            "1-LR": 0.0,
            "plain": 0.0,
        }
        assert (figure.protocol.images, figure.protocol.seed) == (1000, 0)


def test_autoattack_leaves_nothing_of_the_checkpoints_as_the_readme_says():
    made = read_evaluation(ROOT / "docs" / "autoattack.json")
    known = {"plain": "cifar10-resnet10-nlr", "2-LR": "cifar10-resnet10-2lr"}
    for network in made.networks:
        stored = read_evaluation(ROOT / "hub" / "checkpoints" / known[network.title] / "evaluation.json")
        assert network.weights in {one.weights for one in stored.networks}
    for key in ("autoattack-linf-8-255", "autoattack-l2-0.5"):
        figure = made.figure(key)
        assert {title: value.value for title, value in figure.values.items()} == {"2-LR": 0.0, "plain": 0.0}
        assert (figure.protocol.images, figure.protocol.seed) == (1000, 0)
