"""The paper's tables, figures and claims beside ours: what is printed, what is found, trained, measured and written."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import statistics
import subprocess
from pathlib import Path

import pytest
import yaml
from pictures import REPRODUCTIONS, RUNS, undrawn
from safetensors.torch import load_file, save_file
from test_training_compare import figure
from torch.utils.data import DataLoader

from timm_lowrank.cli import main
from timm_lowrank.data import load_images
from timm_lowrank.errors import EvaluationError, RecipeError
from timm_lowrank.evaluation import results
from timm_lowrank.evaluation.results import Kind, read_evaluation, write_evaluation
from timm_lowrank.reproduce import ENTRIES, Options, overview, read_reproduction, reproduce
from timm_lowrank.reproduce import build as build_module
from timm_lowrank.reproduce import command as command_module
from timm_lowrank.reproduce import setups as setups_module
from timm_lowrank.reproduce.build import build, lacking, needed
from timm_lowrank.reproduce.catalogue import COMPRESSION, DIAGNOSES, Column, Row, quickened
from timm_lowrank.reproduce.fixtures import LAYOUTS, write_fixture
from timm_lowrank.reproduce.jobs import Measuring, Workers
from timm_lowrank.reproduce.kept import Kept
from timm_lowrank.reproduce.reproduction import Cell, Line, Panel, Reproduction, TrainedRun, write_reproduction
from timm_lowrank.reproduce.runs import Runs, Seen
from timm_lowrank.reproduce.setups import C10_R18, C10_R50, CONDITIONS, SCALES, Base
from timm_lowrank.reproduce.write import fill, gain_text, index, markdown, own_text, paper_text, table
from timm_lowrank.suites.plan import SUITES, measurements_of

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


# ------------------------------------------------------------------------------------------------------- the catalogue


def test_every_table_figure_and_claim_is_there():
    numbered = [f"table-{number}" for number in range(1, 11)] + [f"figure-{number}" for number in range(2, 21)]
    assert set(numbered) <= ENTRIES.keys()
    claims = (
        "sparsity",
        "low-rank-preactivations",
        "relu-counter-example",
        "directions",
        "target-rank",
        "parameters",
        "noise",
    )
    assert {f"claim-{claim}" for claim in claims} | {"figure-compactness"} == ENTRIES.keys() - set(numbered)


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_entries_fit_what_is_measured_and_run(entry):
    suite = {one.key for one in measurements_of([SUITES["paper"], SUITES["autoattack"]])}
    measurements = [one.measurement for panel in entry.panels for one in panel.columns if one.measurement]
    measurements += [plan.measurement for plan in entry.curves] + [measurement for measurement, _ in entry.strips]
    missing = {one.key for one in measurements} - suite
    assert not missing  # one evaluation with the suites "paper" and "autoattack" is enough for every entry
    for panel in entry.panels:
        assert len({column.label for column in panel.columns}) == len(panel.columns)
        assert not panel.positions or len(panel.positions) == len(panel.columns)
        for row in panel.rows:
            assert len(row.printed) <= len(panel.columns)
            assert row.condition in CONDITIONS
            assert row.setup in setups_module.SETUPS
    assert entry.compute or entry.rows
    assert {one.key for one in DIAGNOSES.values()} < suite


@pytest.mark.parametrize(
    ("name", "panel", "row", "column", "printed"),
    [
        ("table-1", 0, (C10_R50, "1-LR"), "8/255, 20 steps", 0.785),
        ("table-1", 0, (C10_R18, "2-LR"), "20/255, 20 steps", 0.236),
        ("table-1", -2, (C10_R50, "1-LR"), "8/255, 20 steps", 0.568),
        ("table-2", 0, (C10_R50, "SNIP"), "16/255, 7 steps", 0.185),
        ("table-3", 1, (C10_R18, "2-LR"), "Iter-LL-FGSM", 0.2),
        ("table-4", 0, (C10_R18, "N-LR"), "p = 0.4", 0.577),
        ("table-5", 1, (C10_R18, "2-LR"), "10 directions", 0.75),
        ("table-10", 0, (C10_R18, "1-LR"), "Iter-LL-FGSM", 0.06),
    ],
)
def test_printed_figures_are_those_of_the_paper(name, panel, row, column, printed):
    plan = ENTRIES[name].panels[panel]
    (line,) = [one for one in plan.rows if (one.setup, one.condition) == row]
    assert line.printed[[one.label for one in plan.columns].index(column)] == pytest.approx(printed)


@pytest.mark.parametrize("name", ["fast", "paper"])
def test_every_recipe_of_a_scale_is_there(name):
    for bases in SCALES[name].bases.values():
        for base in bases:
            recipe = base.make_recipe("1-LR", 1)
            assert recipe.lowrank_enabled
            assert (recipe.seed, recipe.name) == (1, base.name)
    (deep,) = SCALES["paper"].bases[C10_R50]
    for condition in ("2-LR", "2-LR-ranks-x2", "Bottle-2LR"):
        with pytest.raises(RecipeError, match=f"has one branch, as the paper has it, so there is no {condition} of it"):
            deep.make_recipe(condition, 0)
    (*_, fast) = SCALES["fast"].bases[C10_R18]
    assert fast.make_recipe("SRN", 0).comparator_args == {"share": 0.3}  # as its own recipe says
    assert fast.make_recipe("Bottle-LR", 0).comparator_args == {"branches": {"pre_logits": 50}}
    assert 512 not in fast.make_recipe("Matryoshka", 0).comparator_args["sizes"]


@pytest.mark.parametrize("condition", CONDITIONS)
def test_every_condition_makes_a_recipe_of_every_small_base(condition):
    recipes = {
        base.name: base.make_recipe(condition, 3, "somewhere")
        for bases in SCALES["smoke"].bases.values()
        for base in bases
    }
    for name, recipe in recipes.items():
        assert (recipe.name, recipe.seed, recipe.data, recipe.twin) == (name, 3, "somewhere", False)
        assert recipe.lowrank_enabled == condition.startswith(("1-LR", "2-LR"))
    ranks = recipes["smoke-cifar10-resnet18"].lowrank["branches"]
    expected = {
        "2-LR-light": ranks,
        "2-LR-strong": ranks,
        "1-LR": {"pre_logits": 4},
        "2-LR-ranks-x0.5": {"layer3": 3, "pre_logits": 2},
    }
    assert ranks == expected.get(condition, ranks)
    if condition == "2-LR-strong":
        plain, strong = (
            recipe.lowrank_config().for_branch("layer3").reconstruction_weight
            for recipe in (SCALES["smoke"].bases[C10_R18][0].make_recipe("2-LR", 3), recipes["smoke-cifar10-resnet18"])
        )
        assert strong >= 3 * plain


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fixtures_are_read_like_what_they_stand_for(layout, tmp_path):
    folder = write_fixture(tmp_path / layout, layout)
    before = {path: path.read_bytes() for path in folder.rglob("*.parquet")}
    options = {"config": "cropped_digits", "extra": True} if layout == "svhn" else {}
    columns = ["coarse_label", "fine_label"] if layout == "cifar100" else ["label"]
    coarse, *fine = (load_images(str(folder), label_column=column, **options) for column in columns)
    assert coarse.image_size == (3, 32, 32)
    splits = LAYOUTS[layout].splits
    assert coarse.counts == (splits["train"] + splits.get("extra", 0), splits["test"])
    assert len(coarse.class_names) == 10
    for finer in fine:
        assert len(finer.class_names) == 20
        assert (finer.test_labels // 2 == coarse.test_labels).all()
    shutil.rmtree(folder)
    write_fixture(folder, layout)
    assert {path: path.read_bytes() for path in folder.rglob("*.parquet")} == before


def test_the_papers_own_figures_go_through_the_diagnosis():
    verdicts = {(row.setup, row.condition): row.verdict for row in ENTRIES["table-1"].panels[0].rows}
    assert verdicts[C10_R50, "1-LR"] == results.MASKED
    assert verdicts[C10_R18, "N-LR"] != results.MASKED
    assert verdicts[C10_R18, "2-LR-strong"] is None  # not the paper's


# ------------------------------------------------------------------------------------------------------------- figures


def test_cells_hold_mean_spread_and_difference():
    cell = Cell.of("x", "share", {0: 0.5, 1: 0.7, 2: math.nan}, printed=0.65, how={"steps": 20}, figure="key")
    assert cell.values == {0: 0.5, 1: 0.7}
    assert cell.mean == pytest.approx(0.6)
    assert cell.deviation == pytest.approx(statistics.stdev([0.5, 0.7]))
    assert cell.difference == pytest.approx(-0.05)
    assert own_text(cell) == "60.0 ± 14.1 (-5.0)"
    assert paper_text(cell) == "65.0"
    nothing = Cell.of("x", "number", {0: math.nan}, printed=0.018, figure="key")
    assert (nothing.values, nothing.mean, nothing.difference, nothing.figure) == ({}, None, None, None)
    assert own_text(nothing) == "not measured"
    assert paper_text(nothing) == "0.0180"
    larger = dataclasses.replace(Cell.of("x", "number", {0: 0.01, 1: math.nan}), beyond=32 / 255)
    assert (own_text(larger), larger.shown) == ("> 32/255", None), "of one of two seeds: pictures show none, either"
    bounded = dataclasses.replace(Cell.of("x", "count", {0: 900.0}), at_most=999.0)
    assert own_text(bounded) == "900 (of 999 possible)"
    qualified = Cell.of("x", "count", {0: 1200.0}, 1000, "more than 1,000")
    assert (own_text(qualified), paper_text(qualified)) == ("1,200", "more than 1,000")


def test_gains_are_paired_by_seed():
    twin = Cell.of("x", "share", {0: 0.5, 1: 0.6, 5: 0.9}, printed=0.4)
    cell = Cell.of("x", "share", {0: 0.7, 1: 0.7, 2: 0.1}, printed=0.65).over(twin)
    assert (cell.gain, cell.gain_deviation) == pytest.approx((0.15, statistics.stdev([0.2, 0.1])))
    assert cell.printed_gain == pytest.approx(0.25)
    assert gain_text(cell) == "+15.0 ± 7.1 (paper +25.0)"
    alone = Cell.of("x", "share", {3: 0.7}).over(twin)
    assert (alone.gain, gain_text(alone)) == (None, "-")
    bounded = dataclasses.replace(Cell.of("x", "number", {0: 0.05, 1: math.nan}), beyond=32 / 255)
    others = Cell.of("x", "number", {0: 0.06, 1: 0.04})
    assert (bounded.over(others).gain, others.over(bounded).gain) == (None, None), "the seed beyond has the largest"
    fewer = Cell.of("x", "share", {0: 0.7}, how={"images": 200})
    assert fewer.over(Cell.of("x", "share", {0: 0.5}, how={"images": 1000})).gain is None
    assert fewer.over(Cell.of("x", "share", {0: 0.5}, how={"images": 200})).gain == pytest.approx(0.2)


def test_a_table_says_which_figures_are_of_other_images():
    def line(condition, **how):
        cells = (Cell.of("acc", "share", {0: 0.5}, how=how),)
        return Line(row="R18", condition=condition, recipe="a", network="resnet10", seeds=(0,), cells=cells)

    images = {"N-LR": 1000, "1-LR": 1000, "2-LR": "200 or 1000", "SN": 1000}
    lines = tuple(line(one, images=images[one], train_images=2000 if one == "SN" else 50) for one in images)
    rows = [row.strip("| ").split(" | ") for row in table(Panel(title="t", columns=("acc",), lines=lines)).splitlines()]
    assert [row[-1] for row in rows[2:]] == [
        "50.0", "50.0", "50.0 [200 or 1000 images]", "50.0 [2,000 training images]",
    ]  # fmt: skip


def test_the_index_counts_what_is_larger_than_all_that_was_tried():
    bounded = dataclasses.replace(Cell.of("radius", "number", {0: math.nan}), beyond=0.125)
    cells = (Cell.of("accuracy", "share", {0: 0.5}), bounded, Cell.of("noise", "share", {}))
    line = Line(row="R18", condition="N-LR", recipe="a", network="resnet10", seeds=(0,), cells=cells)
    panel = Panel(title="White box", columns=tuple(cell.column for cell in cells), lines=(line,))
    words = dict.fromkeys(("name", "title", "source", "scale", "notice", "command", "created"), "-")
    assert "2 of 3 figures" in index([Reproduction(**words, versions={}, panels=(panel,))])


def test_the_command_names_what_it_was_given(tmp_path):
    """But for seeds where it trains none, and recipes that are all that it shows."""
    small = "smoke-cifar10-resnet18"
    for number, options, expected in (
        (5, {"existing": True}, " --existing"),
        (5, {"images": 7, "seeds": (3,), "existing": True}, " --images 7 --existing"),
        (5, {}, ""), (5, {"seeds": (0, 1)}, " --seeds 0 1"),
        (5, {"recipes": (small,)}, f" --recipes {small}"), (10, {"recipes": (small,)}, ""),
    ):  # fmt: skip
        name = f"table-{number}"
        runs = Options(names=(name,), scale="smoke", runs=tmp_path, **options).folder()
        expected = f"timm-lowrank reproduce --table {number} --scale smoke{expected}"
        assert build(ENTRIES[name], runs).command == expected


def test_a_table_shows_every_network_of_ours_beside_the_papers_row():
    def line(condition, recipe, values, printed=0.5, gain=None, **options):
        cells = (dataclasses.replace(Cell.of("acc", "share", values, printed), gain=gain),)
        named = {"row": "R18", "condition": condition, "recipe": recipe, "network": "resnet10"}
        return Line(**named, seeds=tuple(values), cells=cells, **options)

    lines = (
        line("N-LR", "a", {0: 0.25}, printed_masking="suspect"),
        line("N-LR", "b", {0: 0.5, 1: 0.6}, masking={0: "suspect", 1: "suspect"}), line("N-LR", "c", {}),
        dataclasses.replace(line("N-LR", "d", {0: 0.5}, masking={0: "suspect"}), seeds=(0, 1)),
        line("2-LR", None, {}), line("1-LR", "a", {0: 0.3}, printed=None, gain=0.05), line("SN", "a", {}, printed=None),
    )  # fmt: skip
    rows = [row.strip("| ").split(" | ") for row in table(Panel(title="t", columns=("acc",), lines=lines)).splitlines()]
    assert rows[2:] == [
        ["R18, N-LR", "paper", "", "50.0", "suspect"],
        ["ours: resnet10 (`a`)", "0", "25.0 (-25.0)", "not measured"],
        ["ours: resnet10 (`b`)", "0, 1", "55.0 ± 7.1 (+5.0)", "suspect"],
        ["ours: resnet10 (`d`)", "0, 1", "50.0 (+0.0) [1 of 2 seeds]", "suspect [1 of 2 seeds]"],
        ["R18, 2-LR", "paper", "", "50.0"],
        ["ours", "", "not measured"],
        ["R18, 1-LR", "ours: resnet10 (`a`)", "0", "30.0", "not measured"],
        ["over its twin N-LR", "", "+5.0"],
    ]


# ------------------------------------------------------------------------------------- runs that are there, and others


@pytest.fixture(scope="module")
def tiny():
    """A scale of one setup, for a second of training a run."""
    scale = SCALES["smoke"]
    (base,) = scale.bases[C10_R18]
    changes = {**base.changes, "epochs": 3, "pretrain_epochs": 1, "data_args": {"test_limit": 40, "train_limit": 200}}
    small = dataclasses.replace(base, changes=changes)
    return dataclasses.replace(scale, name="tiny", bases={C10_R18: (small,)}, images=20, train_images=100)


@pytest.fixture(autouse=True)
def with_tiny(tiny, monkeypatch):
    """Pictures, at which most tests do not look, are not drawn; those of `made` are, but for its runs' own."""
    monkeypatch.setitem(SCALES, "tiny", tiny)
    for pictures in (RUNS, REPRODUCTIONS):
        monkeypatch.setattr(pictures, undrawn)


NAMES = ("table-5", "figure-2", "claim-relu-counter-example")


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """Three entries from nothing, with their runs."""
    folder = tmp_path_factory.mktemp("made")
    options = Options(names=NAMES, scale="tiny", runs=folder / "runs", output=folder / "results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SCALES, "tiny", tiny)
        patch.setattr(RUNS, undrawn)
        said = []
        return options, reproduce(options, said.append), said


def test_what_is_missing_is_trained_and_measured_once(made, tmp_path):
    options, reproductions, said = made
    trained = [text for text in said if text.startswith("training")]
    conditions = ["N-LR", "1-LR", "2-LR", "2-LR-light", "2-LR-strong"]
    assert [text.rpartition("/")[2] for text in trained] == [f"{one}-seed0" for one in conditions]
    assert sum(text.startswith("measuring") for text in said) == 5  # of both entries together
    table_5, figure_2, _ = reproductions
    runs = [(run.condition, run.seed, run.model, run.data) for run in table_5.runs]
    assert runs == [(one, 0, "resnet10_cifar", "digits") for one in conditions]
    evaluations = {
        path.parts[-4]: read_evaluation(path) for path in options.runs.glob("*/*/evaluations/*/evaluation.json")
    }
    for line in [line for line in table_5.panels[1].lines if line.recipe]:
        (title,) = evaluations[f"{line.condition}-seed0"].titles
        for cell in line.cells:
            measured = evaluations[f"{line.condition}-seed0"].figure(cell.figure)
            assert cell.values == {0: measured.values[title].value}
            assert cell.difference == (None if cell.printed is None else cell.mean - cell.printed)
            assert (cell.how["images"], cell.how["train_images"]) == (20, 100)
    assert [line.network for line in figure_2.curves[0].lines] == conditions
    again: list[str] = []
    repeated = reproduce(dataclasses.replace(options, output=tmp_path), again.append)
    assert [one.panels for one in repeated] == [one.panels for one in reproductions]
    assert not any(text.startswith(("training", "measuring")) for text in again)


def test_what_needs_no_network_names_none(made):
    page = (made[0].output / "claim-relu-counter-example.md").read_text()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    assert lines[-2:] == [["A = [[1, -1, 1], [-1, 1, -1]]", "paper", "", "1", "2"],
                          ["", "ours: computed", "", "1 (+0)", "2 (+0)"]]  # fmt: skip


def test_jobs_side_by_side_make_the_same(made, tmp_path):
    options, reproductions, _ = made
    said: list[str] = []
    jobs = dataclasses.replace(
        options, names=("figure-2",), runs=tmp_path / "runs", output=tmp_path / "results", jobs=2
    )
    assert [one.panels for one in reproduce(jobs, said.append)] == [reproductions[1].panels]
    assert sum(text.startswith("done") for text in said) == 10  # trained and measured
    logs = {path.name: path.read_text() for path in tmp_path.glob("runs/*/*.log")}
    assert logs.keys() == {f"{one}-seed0.log" for one in ("N-LR", "1-LR", "2-LR", "2-LR-light", "2-LR-strong")}
    assert all("epoch 3/3" in text and "measuring" in text for text in logs.values())


def test_a_run_is_measured_on_the_images_that_are_here(made, tiny):
    """Which it was trained on, perhaps on another machine, under another name."""
    options, _, _ = made
    (base,) = tiny.bases[C10_R18]
    runs = Runs(options.runs, tiny, {base.data: "/here"})
    (run,) = runs.finished(base, "N-LR")
    assert Measuring(run, ()).recipe(runs).data == "/here"


def test_runs_of_some_recipes_are_trained_alone(tiny, tmp_path, monkeypatch):
    (small,) = tiny.bases[C10_R18]
    other = dataclasses.replace(small, name="other")
    monkeypatch.setitem(SCALES, "tiny", dataclasses.replace(tiny, bases={C10_R18: (small, other)}))
    options = Options(("claim-sparsity",), "tiny", tmp_path / "runs", tmp_path / "out", recipes=("other",))
    with pytest.raises(EvaluationError, match=r"has no recipe .othr.\. Did you mean: other"):
        reproduce(dataclasses.replace(options, recipes=("othr",)))
    said: list[str] = []
    (made,) = reproduce(dataclasses.replace(options, measure=False), said.append)
    assert [path.name for path in options.runs.iterdir()] == ["other"]
    assert {run.condition for run in made.runs} > {"N-LR", "2-LR"}
    assert not any(text.startswith("measuring") for text in said)


@dataclasses.dataclass(frozen=True)
class Sham:
    """A job that does what its seed says."""

    seed: int

    def recipe(self, runs):
        return setups_module.SCALES["smoke"].bases[C10_R18][0].make_recipe("N-LR", self.seed)

    def folder(self, runs):
        return runs.folder / f"sham-seed{self.seed}"

    def do(self, runs):
        if self.seed == 0:
            os._exit(7)
        if self.seed == 1:
            raise EvaluationError("no\nmore")
        print(len(runs.images(self.recipe(runs)).train_images))


@dataclasses.dataclass(frozen=True)
class Reading(Sham):
    """One that reads with a process of its own, as the training of a streamed recipe does."""

    def do(self, runs):
        print(*DataLoader(range(self.seed), batch_size=None, num_workers=1))


def test_jobs_may_have_processes_that_read(tiny, tmp_path):
    with Workers(Runs(tmp_path, tiny, say=lambda text: None), 2) as workers:
        workers.do([Reading(2), Reading(3)])
    assert (tmp_path / "sham-seed3.log").read_text() == "0 1 2\n"


def test_a_job_that_fails_or_dies_does_not_stop_the_others(tiny, tmp_path):
    said: list[str] = []
    runs = Runs(tmp_path, tiny, say=said.append)
    with Workers(runs, 2) as workers, pytest.raises(EvaluationError, match="2 of 4 jobs failed") as error:
        workers.do([Sham(seed) for seed in range(4)])
    message = str(error.value)
    assert "sham-seed0: its process ended (7); if memory ran out, take fewer --jobs" in message
    assert f"sham-seed1: EvaluationError: no ({tmp_path / 'sham-seed1.log'})" in message
    assert sorted(text for text in said if text.startswith("done")) == ["done: sham-seed2", "done: sham-seed3"]
    images = len(load_images("digits").train_images)
    assert (tmp_path / "sham-seed3.log").read_text().split() == [f"{images}"]


def test_fewer_images_where_the_scale_has_too_many(made, tmp_path, tiny):
    options, _, _ = made
    base = tiny.bases[C10_R18][0].name
    copied = shutil.copytree(options.runs / base / "N-LR-seed0", tmp_path / base / "N-LR-seed0")
    shutil.rmtree(copied / "evaluations")
    few = dataclasses.replace(
        options, names=("table-5", "figure-2"), runs=tmp_path, output=tmp_path / "out", seeds=(),
        images=15, train_images=50, spectrum_limit=30,
    )  # fmt: skip
    table, spectrum = reproduce(few, lambda text: None)
    (own,) = [line for line in spectrum.panels[0].lines if line.condition == "N-LR"]
    assert {cell.how["images"] for cell in own.cells if cell.values} == {30}
    (own,) = [line for line in table.panels[1].lines if line.condition == "N-LR" and line.seeds]
    assert [(cell.how["images"], cell.how["train_images"]) for cell in own.cells] == [(15, 50)] * 4
    assert (
        table.command
        == "timm-lowrank reproduce --table 5 --scale tiny --images 15 --train-images 50 --spectrum-limit 30"
    )


def test_what_was_measured_on_other_images_is_measured_again(made, tmp_path, tiny):
    options, _, _ = made
    base = tiny.bases[C10_R18][0].name
    shutil.copytree(options.runs / base / "N-LR-seed0", tmp_path / base / "N-LR-seed0")
    asked = {"names": ("table-5",), "runs": tmp_path, "output": tmp_path / "out", "seeds": ()}
    shown = []
    for images in (20, 15, 30, 20, 99):  # of 40 that the run has
        said: list[str] = []
        (table,) = reproduce(dataclasses.replace(options, **asked, images=images), said.append)
        (own,) = [line for line in table.panels[1].lines if line.condition == "N-LR" and line.seeds]
        shown.append((own.cells[0].how["images"], sum(text.startswith("measuring") for text in said)))
    assert shown == [(20, 0), (15, 1), (30, 1), (20, 0), (40, 1)]


def test_three_files_of_each_entry_say_the_same(made):
    options, reproductions, _ = made
    for one in reproductions:
        path = options.output / f"{one.name}.json"
        assert read_reproduction(path) == one
        assert path.with_suffix(".md").read_text() == markdown(one, f"{one.name}.png")
        assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        assert one.scale == "tiny"
        assert str(options.runs) not in path.read_text() + path.with_suffix(".md").read_text()
    page = (options.output / "table-5.md").read_text()
    assert "says nothing about the paper" in page
    assert "| CIFAR-10, ResNet-18, 2-LR | paper |  | 91.1 | 88.5 | 75.0 | - |" in page
    readme = (options.output / "README.md").read_text()
    assert all(f"[{name}]({name}.md)" in readme for name in NAMES)
    claim = reproductions[-1].panels[0].lines[0]
    assert [(cell.mean, cell.printed) for cell in claim.cells] == [(1.0, 1), (2.0, 2)]


def test_what_a_run_says_of_itself_needs_no_evaluation(made, tmp_path, tiny):
    options, _, _ = made
    base = tiny.bases[C10_R18][0].name
    copied = shutil.copytree(options.runs / base / "2-LR-seed0", tmp_path / base / "Matryoshka-seed0")
    shutil.rmtree(copied / "evaluations")
    summary = json.loads((copied / "summary.json").read_text())
    figures = {"accuracy_of_first_5": 0.4, "accuracy_of_first_7": 0.1}
    summary["comparator"] = {"name": "matryoshka", "title": "Matryoshka", "args": {}, "figures": figures}
    (copied / "summary.json").write_text(json.dumps(summary))
    shutil.copytree(options.runs / base / "2-LR-seed0", tmp_path / base / "2-LR-seed0")
    names = ("figure-compactness", "claim-target-rank")
    changed = dataclasses.replace(options, names=names, runs=tmp_path, output=tmp_path / "out", existing=True)
    compactness, ranks = reproduce(changed, lambda text: None)
    (nested,) = compactness.panels[2].lines
    assert {cell.column: cell.mean for cell in nested.cells if cell.mean is not None} == {"5": 0.4}
    (own,) = [line for line in ranks.panels[0].lines if line.condition == "2-LR"]
    cells = {cell.column: cell for cell in own.cells}
    assert cells["clean"].values == {0: summary["clean_accuracy"]}
    assert cells["clean"].how == {"images": 40}
    target = {"inside": 6.0, "before the classifier": 4.0}
    assert {where: cells[f"target rank {where}"].mean for where in target} == target


def test_the_list_says_which_runs_are_there(made):
    options, _, _ = made
    lines = overview(dataclasses.replace(options, names=())).splitlines()
    there = {line.split()[0]: line for line in lines}
    assert there["figure-2"].endswith("5 of 5")
    assert there["figure-11"].endswith("2 of 2")
    assert there["claim-relu-counter-example"].endswith("needs none")
    assert set(ENTRIES) < there.keys()
    before = set(options.runs.rglob("*"))
    details = overview(dataclasses.replace(options, names=("claim-target-rank",)))
    overview(Options(names=("figure-6",), runs=options.runs))  # of a fixture, which is not written
    assert set(options.runs.rglob("*")) == before
    assert "smoke-cifar10-resnet18/2-LR: 1 seed there (0)" in details
    assert "smoke-cifar10-resnet18/2-LR-ranks-x4: not there" in details


def test_without_training_what_is_not_there_is_not_measured(tmp_path):
    options = Options(names=("table-5",), scale="tiny", runs=tmp_path / "none", output=tmp_path / "out", existing=True)
    (made,) = reproduce(options, lambda text: None)
    assert not (tmp_path / "none").exists()
    assert [cell.mean for panel in made.panels for line in panel.lines for cell in line.cells if cell.mean] == []
    assert "smoke-cifar10-resnet18, 2-LR: there is no finished run" in made.missing
    assert "CIFAR-100 coarse, ResNet-50, 1-LR: this scale has no network in its place" in made.missing
    assert not (tmp_path / "out" / "table-5.png").exists()
    assert made.command.endswith("--table 5 --scale tiny --existing")


def evaluation_of(run, own, **others):
    """A whole evaluation, as `evaluate` would leave it, of a run and its weights."""
    value = {"2-LR": own}
    settings = dataclasses.replace(
        read_evaluation(next(run.glob("evaluations/*/evaluation.json"))).settings, layers=("layer3", "pre_logits")
    )
    weights = others.pop("weights", settings.networks["2-LR"])
    key = "compression-layer3-10"
    return results.Evaluation(
        suite="paper", seed=0, chunk=100, confidence=0.95, device="cpu", created="2026-01-01T00:00:00+00:00",
        seconds=1.0, versions={}, curves=(), strips=(), verdicts={}, warnings=(), settings=settings,
        figures=(figure(key, Kind.COMPRESSION, value, layer="layer3", directions=10),),
        data=results.DataInfo(source="digits", split="test", images=9, image_size=(1, 8, 8), class_names=("a",)),
        networks=(results.NetworkInfo(title="2-LR", weights=weights),),
    )  # fmt: skip


def test_every_finished_seed_counts_and_evaluations_of_other_weights_do_not(made, tmp_path, tiny):
    options, _, _ = made
    base = options.runs / "smoke-cifar10-resnet18"
    run = base / "2-LR-seed0"
    for seed, own in ((0, 0.5), (7, 0.7)):
        copied = shutil.copytree(run, tmp_path / base.name / f"2-LR-seed{seed}")
        write_evaluation(evaluation_of(copied, own), copied / "evaluation.json")
    stale = shutil.copytree(run, tmp_path / base.name / "2-LR-strong-seed0")
    write_evaluation(evaluation_of(stale, 0.9, weights="other"), stale / "evaluation.json")
    shutil.rmtree(stale / "evaluations")
    (tmp_path / base.name / "2-LR-seed8").mkdir()  # not finished
    (made_now,) = reproduce(
        dataclasses.replace(options, names=("table-5",), runs=tmp_path, output=tmp_path / "out", existing=True),
        lambda text: None,
    )
    lines = {line.condition: line for line in made_now.panels[1].lines}
    column = made_now.panels[1].columns.index("10 directions")
    cell = lines["2-LR"].cells[column]
    assert cell.values == {0: 0.5, 7: 0.7}  # the run's own evaluation comes before what was measured for a table
    assert (cell.mean, cell.difference) == pytest.approx((0.6, 0.6 - 0.75))
    runs = Runs(tmp_path, tiny)
    (strong,) = runs.finished(tiny.bases[C10_R18][0], "2-LR-strong")
    assert {seen.network.weights for seen in runs.seen(strong)} == {runs._weights_of(strong.folder)}


def test_weights_may_be_stored_in_half_precision(made, tmp_path, tiny):
    options, _, _ = made
    (base,) = tiny.bases[C10_R18]
    copied = shutil.copytree(options.runs / base.name / "N-LR-seed0", tmp_path / base.name / "N-LR-seed0")
    shutil.rmtree(copied / "evaluations")
    path = copied / "model" / "model.safetensors"
    halves = {name: value.half() if value.is_floating_point() else value for name, value in load_file(path).items()}
    save_file(halves, path)
    runs = Runs(tmp_path, tiny, say=lambda text: None)
    (run,) = runs.finished(base, "N-LR")
    runs.measure(run, [COMPRESSION])
    assert [seen.figure("compression-{last}-all") is not None for seen in runs.seen(run)] == [True]


def test_a_comparator_is_found_in_the_folder_of_its_own_recipe(made, tmp_path, tiny):
    options, _, _ = made
    run = options.runs / "smoke-cifar10-resnet18" / "N-LR-seed0"
    shutil.copytree(run, tmp_path / "smoke-cifar10-resnet18-snip" / "SNIP-seed2")
    (base,) = tiny.bases[C10_R18]
    (found,) = Runs(tmp_path, tiny).finished(base, "SNIP")
    assert (found.seed, found.folder.parent.name) == (2, "smoke-cifar10-resnet18-snip")


def test_only_what_no_evaluation_has_is_measured(made, tiny):
    options, _, _ = made
    runs = Runs(options.runs, tiny)
    (base,) = tiny.bases[C10_R18]
    (run,) = runs.finished(base, "N-LR")
    assert lacking(ENTRIES["table-5"], runs, run) == []
    wanted = lacking(ENTRIES["figure-compactness"], runs, run)
    assert COMPRESSION not in wanted
    assert [one.key for one in wanted] == ["leading-features"]
    assert (base, "Matryoshka") in needed(ENTRIES["figure-compactness"], runs)


def test_runs_and_results_name_the_commit_of_the_clone(made):
    _, (table_5, *_), _ = made
    done = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], cwd=Path(__file__).parent, capture_output=True)
    commit = done.stdout.decode().strip()
    for versions in (table_5.versions, *(run.versions for run in table_5.runs)):
        assert versions.get("commit", "").removesuffix("+") == commit  # empty where this is no clone


# --------------------------------------------------------------------------- what was written of runs that are not here


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "results").glob("*.json")), ids=lambda p: p.stem)
def test_results_made_again_without_their_runs_stay_what_they_are(path, tmp_path):
    before = read_reproduction(path)
    again = build(ENTRIES[before.name], Runs(tmp_path, SCALES[before.scale], existing=True), before)
    stamped = [dataclasses.replace(run, as_of=run.as_of or before.created) for run in before.runs]
    assert list(again.runs) == stamped
    for part in ("panels", "curves", "strips", "missing"):
        assert getattr(again, part) == getattr(before, part), part


def moved(made, tmp_path, **names):
    """A copy of these entries and of some of their runs, under other names, as on another machine.

    A run that goes by the name of another condition and seed gets their recipe, too.
    """
    options, _, _ = made
    shutil.copytree(options.output, tmp_path / "results")
    for old, new in names.items():
        copy = tmp_path / "runs" / BASE / new
        shutil.copytree(options.runs / BASE / f"{old}-seed0".replace("_", "-"), copy)
        condition, _, seed = new.rpartition("-seed")
        shutil.copy(options.runs / BASE / f"{condition}-seed0" / "config.yaml", copy)
        changed_config(copy, seed=int(seed))
    return dataclasses.replace(options, runs=tmp_path / "runs", output=tmp_path / "results", existing=True)


BASE = "smoke-cifar10-resnet18"


def test_results_are_gathered_from_several_machines(made, tmp_path):
    _, (table_5, figure_2, _), _ = made
    options = moved(made, tmp_path, **{"1_LR": "N-LR-seed4", "2_LR": "2-LR-seed4"})
    table, spectrum, _ = reproduce(options, lambda text: None)
    for old, new in zip(table_5.panels[1].lines, table.panels[1].lines, strict=True):
        seeds = {"N-LR": (0, 4), "2-LR": (0, 4)}.get(old.condition, old.seeds) if old.seeds else ()
        assert new.seeds == seeds
        for before, cell in zip(old.cells, new.cells, strict=True):
            assert cell.values.items() >= before.values.items()
            if len(seeds) < 2:
                assert cell == before
    lines = {line.condition: line.cells[0] for line in table.panels[1].lines if line.seeds}
    first = {line.condition: line.cells[0].values[0] for line in table_5.panels[1].lines if line.seeds}
    assert lines["2-LR"].values == {0: first["2-LR"], 4: first["2-LR"]}
    gains = [first["2-LR"] - first["N-LR"], first["2-LR"] - first["1-LR"]]  # seed 4 of N-LR is the run of 1-LR
    assert lines["2-LR"].gain == pytest.approx(statistics.fmean(gains))
    shown = [(line.network, line.name) for line in spectrum.curves[0].lines]
    assert shown[:2] == [("N-LR", "seed 4"), ("N-LR", "seed 0")]
    assert len(shown) == len(figure_2.curves[0].lines) + 2
    assert {run.folder: run.as_of for run in table.runs} == {
        f"{BASE}/{run}": None if run.endswith("4") else table_5.created
        for run in ("N-LR-seed4", "2-LR-seed4", *(f"{one.condition}-seed0" for one in table_5.runs))
    }
    page = (options.output / "table-5.md").read_text()
    assert f"Not at hand in this making, as the one of {table_5.created} had them: `{BASE}/N-LR-seed0`, " in page
    (later, *_) = reproduce(options, lambda text: None)  # and once more, with the time that last saw them
    assert (later.panels, later.runs) == (table.panels, table.runs)


def test_a_run_at_hand_is_read_anew_and_other_trainings_are_not_averaged(made, tmp_path):
    options = moved(made, tmp_path, **{"2_LR": "N-LR-seed0"})
    (table, *_) = reproduce(options, lambda text: None)
    _, (table_5, *_), _ = made
    lines, before = ({line.condition: line for line in one.panels[1].lines if line.seeds} for one in (table, table_5))
    assert [cell.values for cell in lines["N-LR"].cells] == [cell.values for cell in before["2-LR"].cells]
    assert [cell.gain for cell in lines["2-LR"].cells] == [0.0] * 4  # over the twin that is here now
    path = options.runs / BASE / "N-LR-seed0" / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"epochs": 99}))
    (table, *_) = reproduce(options, lambda text: None)
    assert [line.condition for line in table.panels[1].lines if line.seeds] == ["N-LR"]
    assert f"{BASE}/2-LR-seed0 was trained differently and is not at hand: left out" in table.missing


def test_runs_that_the_recipe_would_train_otherwise_are_named_and_not_averaged_with_others(made, tmp_path):
    _, (table_5, *_), _ = made
    assert all(run.settings["epochs"] == run.epochs and not run.unlike for run in table_5.runs)
    assert "Trained otherwise" not in markdown(table_5)
    options = moved(made, tmp_path, **{"2_LR": "2-LR-seed0"})
    path = options.runs / BASE / "2-LR-seed0" / "config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"learning_rate": 0.2, "workers": 3}))
    (table, *_) = reproduce(options, lambda text: None)
    (run,) = table.runs
    assert run.unlike == ("learning_rate was 0.2 and is 0.1",)
    assert run.settings["learning_rate"] == 0.2
    assert (
        f"Trained otherwise than the recipe of this version would: `{BASE}/2-LR-seed0` (learning_rate was"
        in (options.output / "table-5.md").read_text()
    )
    assert [line.condition for line in table.panels[1].lines if line.seeds] == ["2-LR"]  # its twin has another rate
    assert f"{BASE}/N-LR-seed0 was trained differently and is not at hand: left out" in table.missing
    # What an earlier version wrote does not say how its runs were trained: they stay.
    unknown = [dataclasses.replace(run, settings={}) for run in table_5.runs]
    write_reproduction(dataclasses.replace(table_5, runs=tuple(unknown)), options.output / "table-5.json")
    (table, *_) = reproduce(options, lambda text: None)
    assert {line.condition for line in table.panels[1].lines if line.seeds} >= {"N-LR", "2-LR"}


def changed_config(run, **changes):
    """Writes keys into the recipe of a run."""
    path = run / "config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))


def test_runs_of_one_condition_with_other_branches_are_not_averaged(made, tmp_path):
    options = moved(made, tmp_path, N_LR="N-LR-seed4", **{"2_LR": "2-LR-seed4"})
    _, (table_5, *_), _ = made
    lowrank = next(run for run in table_5.runs if run.condition == "2-LR").settings["lowrank"]
    changed_config(options.runs / BASE / "2-LR-seed4", lowrank={**lowrank, "strength": "strong"})
    (table, *_) = reproduce(options, lambda text: None)
    seeds = {line.condition: line.seeds for line in table.panels[1].lines if line.seeds}
    assert seeds == {"N-LR": (0, 4), "1-LR": (0,), "2-LR": (4,), "2-LR-light": (0,), "2-LR-strong": (0,)}
    assert f"{BASE}/2-LR-seed0 was trained differently and is not at hand: left out" in table.missing
    (run,) = [run for run in table.runs if run.condition == "2-LR"]
    assert run.unlike == ("lowrank.strength was 'strong' and is 'standard'",)
    # One that says what is the default says the same as one that does not.
    branches = {layer: {"rank": rank} for layer, rank in lowrank["branches"].items()}
    changed_config(
        options.runs / BASE / "2-LR-seed4", lowrank={**lowrank, "strength": "standard", "branches": branches}
    )
    write_reproduction(table_5, options.output / "table-5.json")
    (table, *_) = reproduce(options, lambda text: None)
    assert {line.condition: line.seeds for line in table.panels[1].lines if line.seeds}["2-LR"] == (0, 4)
    assert not any(run.unlike for run in table.runs)


def test_a_plain_run_that_was_trained_otherwise_is_no_twin(made, tmp_path):
    options = moved(made, tmp_path, N_LR="N-LR-seed0", **{"1_LR": "1-LR-seed0", "2_LR": "2-LR-seed0"})
    options = dataclasses.replace(options, output=tmp_path / "new")
    changed_config(options.runs / BASE / "1-LR-seed0", learning_rate=0.3)
    (table, *_) = reproduce(options, lambda text: None)
    cells = {line.condition: line.cells[0] for line in table.panels[1].lines if line.seeds}
    assert cells["1-LR"].values
    assert (cells["1-LR"].gain, cells["2-LR"].gain is None) == (None, False)
    assert f"{BASE}/1-LR-seed0: its plain twin was trained differently, so there is no gain over it" in table.missing


def test_runs_that_are_not_at_hand_are_judged_by_the_recipe_of_this_version(made, tmp_path, tiny, monkeypatch):
    options = moved(made, tmp_path)
    (base,) = tiny.bases[C10_R18]
    changed = dataclasses.replace(base, changes={**base.changes, "weight_decay": 1e-3})
    monkeypatch.setitem(SCALES, "tiny", dataclasses.replace(tiny, bases={C10_R18: (changed,)}))
    (table, *_) = reproduce(options, lambda text: None)
    assert len(table.runs) == 5
    assert {run.unlike for run in table.runs} == {("weight_decay was 0.0005 and is 0.001",)}
    monkeypatch.setitem(SCALES, "tiny", tiny)
    (table, *_) = reproduce(options, lambda text: None)
    assert {run.unlike for run in table.runs} == {()}


def test_a_run_that_no_recipe_of_this_version_trains_is_shown(made, tmp_path, tiny, monkeypatch):
    options = moved(made, tmp_path, **{"2_LR": "2-LR-seed0"})
    (base,) = tiny.bases[C10_R18]
    for changed, reason in (
        (dataclasses.replace(base, recipe="no-such-recipe"), "there is no recipe 'no-such-recipe'"),
        (
            dataclasses.replace(base, changes={**base.changes, "lowrank": {"branches": {"pre_logits": 4}}}),
            "digits has one branch, as the paper has it, so there is no 2-LR of it",
        ),
    ):
        monkeypatch.setitem(SCALES, "tiny", dataclasses.replace(tiny, bases={C10_R18: (changed,)}))
        (table, *_) = reproduce(options, lambda text: None)
        (run,) = [run for run in table.runs if run.condition == "2-LR"]
        assert run.unlike[0].startswith(reason)
        assert any(line.condition == "2-LR" and line.seeds == (0,) for line in table.panels[1].lines)


def test_a_run_that_was_copied_to_the_folder_of_another_seed_is_named(made, tmp_path):
    options = moved(made, tmp_path, **{"2_LR": "2-LR-seed4"})
    changed_config(options.runs / BASE / "2-LR-seed4", seed=0)
    for _ in range(2):  # at hand, and kept
        (table, *_) = reproduce(options, lambda text: None)
        unlike = {run.seed: run.unlike for run in table.runs if run.condition == "2-LR"}
        assert unlike == {0: (), 4: ("seed was 0 and is 4",)}
        shutil.rmtree(options.runs, ignore_errors=True)


def test_an_evaluation_that_another_torch_left_half_done_is_no_hindrance(made, tmp_path, monkeypatch):
    options = dataclasses.replace(moved(made, tmp_path, N_LR="N-LR-seed0"), seeds=(), existing=False)
    (run,) = options.runs.glob("*/*")
    for folder in (run / "evaluations").iterdir():
        (folder / "evaluation.json").rename(folder / "gone")
    monkeypatch.setattr("torch.__version__", "0.0.1")
    with monkeypatch.context() as patch:
        patch.setattr("timm_lowrank.suites.runner.PartialResults.append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            reproduce(options, lambda text: None)
    assert list(run.glob("evaluations/*/evaluation.json.partial"))
    monkeypatch.setattr("torch.__version__", "0.0.2")
    (table, *_) = reproduce(options, lambda text: None)
    (plain,) = [line for line in table.panels[1].lines if line.condition == "N-LR" and line.seeds]
    assert all(cell.values for cell in plain.cells)


def interrupted(*arguments):
    raise KeyboardInterrupt


def test_where_a_training_began_tells_no_path_and_no_seed(made, tmp_path):
    options = moved(made, tmp_path, **{"2_LR": "2-LR-seed4"})
    changed_config(options.runs / BASE / "2-LR-seed4", init_from="/home/somebody/runs/N-LR-seed4")
    (table, *_) = reproduce(dataclasses.replace(options, output=tmp_path / "one"), lambda text: None)
    assert [run.settings["init_from"] for run in table.runs] == ["N-LR-seed4"]
    assert table.runs[0].unlike == ("init_from was 'N-LR' and is None",)
    shutil.move(options.runs / BASE / "2-LR-seed4", options.runs / BASE / "2-LR-seed5")
    changed_config(options.runs / BASE / "2-LR-seed5", init_from="runs/N-LR-seed5")
    (table, *_) = reproduce(dataclasses.replace(options, output=tmp_path / "one"), lambda text: None)
    assert sorted(run.seed for run in table.runs) == [4, 5]
    assert "somebody" not in (tmp_path / "one" / "table-5.json").read_text()


def test_figures_that_are_larger_than_all_that_was_tried_are_kept(made, tmp_path):
    options = moved(made, tmp_path)
    path = options.output / "table-5.json"
    table = read_reproduction(path)
    bounded = dataclasses.replace(Cell.of("5 directions", "share", {0: math.nan}), beyond=0.25, at_most=1.0)

    def changed(line):
        cells = tuple(bounded if cell.column == bounded.column and line.seeds else cell for cell in line.cells)
        return dataclasses.replace(line, cells=cells)

    panels = [dataclasses.replace(panel, lines=tuple(map(changed, panel.lines))) for panel in table.panels]
    write_reproduction(dataclasses.replace(table, panels=tuple(panels)), path)
    (again, *_) = reproduce(options, lambda text: None)
    (cell,) = [
        c for one in again.panels[1].lines if one.condition == "2-LR" for c in one.cells if c.column == "5 directions"
    ]
    assert (cell.mean, cell.beyond, cell.at_most) == (None, 0.25, 1.0)


def test_images_are_kept_where_they_fit():
    def strip(networks, shape=(1, 1, 1, 2), key="a"):
        rows = [results.StripRow(network=one, name="original", pixels=b"ab", captions=("",)) for one in networks]
        return results.Strip(key=key, title=f"DeepFool ({BASE})", shape=shape, rows=tuple(rows))

    run = {"model": "m", "data": "d", "train_images": 1, "epochs": 1, "clean_accuracy": 1.0, "seconds": 1.0}
    runs = [
        TrainedRun(folder=name, recipe=BASE, condition=name, seed=0, device="cpu", versions={}, **run)
        for name in ("N-LR", "1-LR", "2-LR")
    ]
    text = dict.fromkeys(("name", "title", "source", "scale", "notice", "command", "created"), "x")
    before = Reproduction(**text, versions={}, panels=(), strips=(strip(["N-LR", "1-LR", "2-LR"]),), runs=tuple(runs))
    kept = Kept(before, runs[1:2])
    assert [[row.network for row in one.rows] for one in kept.with_strips([strip(["1-LR"])])] == [
        ["N-LR", "1-LR", "2-LR"]
    ]
    assert kept.with_strips([]) == (strip(["N-LR", "2-LR"]),)
    larger = strip(["1-LR"], shape=(1, 1, 2, 2))
    assert kept.with_strips([larger]) == (larger,)
    assert Kept(None, runs).with_strips([larger]) == (larger,)


def test_a_scale_does_not_replace_another(made, tmp_path, monkeypatch, tiny):
    options = moved(made, tmp_path)
    monkeypatch.setitem(SCALES, "other", dataclasses.replace(tiny, name="other"))
    before = {path: path.read_bytes() for path in options.output.iterdir()}
    with pytest.raises(EvaluationError, match=r"figure-2.json holds the scale tiny, which other would replace: give"):
        reproduce(dataclasses.replace(options, names=("claim-noise", "figure-2"), scale="other"), lambda text: None)
    assert {path: path.read_bytes() for path in options.output.iterdir()} == before
    free = dataclasses.replace(options, names=("claim-relu-counter-example",), scale="other")
    assert reproduce(free, lambda text: None)[0].scale == "other"  # it is of no runs


def test_numbers_of_images_and_bounds_are_those_of_each_seed():
    column, row = Column("acc", "key"), Row(C10_R18, "2-LR")

    def line(cell, *seeds):
        return Line(row=C10_R18, condition="2-LR", recipe="r", network="m", seeds=seeds, cells=(cell,))

    def measured(seed, images, value=0.5, **options):
        return build_module._Measured(seed, value, {"images": images}, **options)

    def cell(*ones, old=None, seeds=()):
        return build_module._cell(column, row, 0, [*ones, *build_module._kept(column, old)], seeds)

    mixed = cell(measured(0, 1000), measured(1, 500))
    assert mixed.how == {"images": "500 or 1000"}
    again = cell(measured(1, 500), old=line(dataclasses.replace(mixed, values={0: 0.5}), 0))
    assert (again.how, again.images) == (mixed.how, mixed.images)
    anew = cell(measured(1, 1000), old=line(dataclasses.replace(mixed, values={0: 0.5}), 0))
    assert (anew.how, anew.images) == ({"images": 1000}, {})
    twin = cell(measured(1, 500, 0.25), measured(0, 500, 0.1))
    assert mixed.over(twin).gain == 0.25  # of seed 1 alone
    bounded = cell(measured(1, 10, math.nan, beyond=0.125), seeds=(1, 2))
    assert (bounded.beyond, bounded.unmeasured) == (0.125, (2,))
    assert cell(measured(1, 10, 0.05), old=line(bounded, 2), seeds=(1, 2)).beyond is None
    assert cell(measured(2, 10, 0.05), old=line(bounded, 1), seeds=(1, 2)).beyond == 0.125


def test_what_another_command_wrote_meanwhile_is_kept(made, tmp_path, monkeypatch):
    options = moved(made, tmp_path, **{"1_LR": "N-LR-seed4"})
    theirs = {path: path.read_bytes() for path in options.output.iterdir()}
    for path in theirs:
        path.unlink()

    class HoursOfTraining(Workers):
        def do(self, jobs):
            for path, content in theirs.items():
                path.write_bytes(content)

    monkeypatch.setattr(command_module, "Workers", HoursOfTraining)
    (table, *_) = reproduce(dataclasses.replace(options, existing=False), lambda text: None)
    (plain,) = [line for line in table.panels[1].lines if line.condition == "N-LR" and line.seeds]
    assert plain.seeds == (0, 4)


# --------------------------------------------------------------------------------------------- evaluations of all kinds


def seen_in(evaluation, twin="of the twin", layers=("layer3", "pre_logits")):
    return Seen(evaluation, evaluation.networks[0], layers, twin)


@pytest.mark.parametrize(
    ("crafted_on", "settings", "twin", "counts"),
    [
        ("plain", {"source plain": "of the twin"}, "of the twin", True),
        ("plain", {"source plain": "of another"}, "of the twin", False),
        ("plain", {"source plain": "of another"}, None, True),  # who knows
        ("1-LR", {}, None, False),
        ("1-LR", {}, "of the twin", False),
    ],
)
def test_black_boxes_that_were_crafted_elsewhere_do_not_count(made, crafted_on, settings, twin, counts):
    options, _, _ = made
    one = evaluation_of(options.runs / BASE / "2-LR-seed0", 0.5)
    attack = results.AttackProtocol(name="DeepFool", crafted_on={"2-LR": crafted_on})
    protocol = dataclasses.replace(one.figures[0].protocol, attack=attack)
    beside = results.NetworkInfo(title="1-LR", weights="of 1-LR", branches={"pre_logits": 4})
    values = {**one.figures[0].values, "1-LR": results.Value(0.1)}
    networks = (one.networks[0], beside)
    evaluation = dataclasses.replace(
        one, networks=networks, figures=(dataclasses.replace(one.figures[0], protocol=protocol, values=values),),
        settings=dataclasses.replace(one.settings, networks={**{n.title: n.weights for n in networks}, **settings}),
    )  # fmt: skip
    assert (seen_in(evaluation, twin).figure("compression-{inside}-10") is not None) == counts


def test_what_was_tried_without_the_twin_is_tried_again_with_it(made):
    options, _, _ = made
    one = evaluation_of(options.runs / BASE / "2-LR-seed0", 0.5)
    settings = dataclasses.replace(one.settings, measurements=(repr(COMPRESSION),))
    alone = dataclasses.replace(one, settings=settings)
    with_twin = dataclasses.replace(one, settings=dataclasses.replace(settings, networks={"source x": "of the twin"}))
    assert seen_in(alone, twin=None).has(COMPRESSION)
    assert not seen_in(alone).has(COMPRESSION)
    assert seen_in(with_twin).has(COMPRESSION)


def test_layers_are_those_of_the_run_whatever_stood_beside_it(made, tiny):
    options, _, _ = made
    one = evaluation_of(options.runs / BASE / "2-LR-seed0", 0.5)
    wide = dataclasses.replace(
        one, settings=dataclasses.replace(one.settings, layers=("layer2", "layer3", "pre_logits"))
    )
    assert seen_in(wide).layers == {"inside": "layer3", "last": "pre_logits"}
    assert seen_in(wide, layers=()).layers == {"inside": "layer2", "last": "pre_logits"}
    runs = Runs(options.runs, tiny)
    for condition in ("N-LR", "1-LR", "2-LR"):
        (run,) = runs.finished(tiny.bases[C10_R18][0], condition)
        assert {seen.own_layers for seen in runs.seen(run)} == {("layer3", "pre_logits")}


# ------------------------------------------------------------------------------------------------------- quoted tables


def test_pages_quote_what_the_results_say(made, tmp_path):
    options, (table_5, *_), _ = made
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table-5, panel 2 -->\nold\n<!-- end -->\nafter\n")
    arguments = ["reproduce", "--fill", str(page), "--output", str(options.output)]
    assert main(arguments) == 0
    filled = page.read_text()
    assert filled == f"before\n<!-- table-5, panel 2 -->\n\n{table(table_5.panels[1])}\n\n<!-- end -->\nafter\n"
    assert main(arguments) == 0
    assert page.read_text() == filled
    page.write_text("<!-- table-5, panel 3 -->\n<!-- end -->")
    assert main(arguments) == 1
    page.write_text("<!-- table-6, panel 1 -->\n<!-- end -->")
    assert main(arguments) == 1
    quote = "<!-- table-5, panel 1 -->\n"
    for text in (f"{quote}mine\n{quote}<!-- end -->", f"{quote}<!-- end -->\nmine\n{quote}", f"{quote}mine"):
        page.write_text(text)
        assert main(arguments) == 1
        assert page.read_text() == text


def test_the_committed_pages_quote_the_committed_results():
    root = Path(__file__).parents[1]
    for result in (root / "results").glob("*.json"):
        picture = result.with_suffix(".png")
        page = result.with_suffix(".md").read_text()
        assert page == markdown(read_reproduction(result), picture.name if picture.exists() else None), result.name
    for page in [*root.glob("*.md"), *(root / "docs").glob("*.md")]:
        assert fill(page.read_text(), root / "results") == page.read_text(), page.name


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_quick_measurements_make_the_figures_that_are_shown(entry):
    shown = [column.measurement for panel in entry.panels for column in panel.columns if column.measurement]
    shown += [plan.measurement for plan in entry.curves] + list(DIAGNOSES.values())
    for one in shown:
        quick = quickened(one)
        assert quick is None or quick.key == one.key


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say what: --table N"),
        (["--table", "11"], "there is no 'table-11'"),
        (["--claim", "target-ranks"], "Did you mean: claim-target-rank"),
        (["--figure", "2", "--data", "cifar10"], "write it as cifar10=PATH_OR_NAME"),
        (["--figure", "2", "--data", "mnist=x"], "not mnist="),
    ],
)
def test_mistakes_are_one_message(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", *arguments]) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("changes", [{"images": 0}, {"train_images": -5}, {"jobs": 0}])
def test_numbers_of_images_that_cannot_be_are_refused(changes):
    with pytest.raises(EvaluationError, match="must be at least 1"):
        Options(**changes).folder()


def test_a_damaged_result_says_so(made, tmp_path):
    options, _, _ = made
    content = json.loads((options.output / "table-5.json").read_text())
    for change, message in (({"format": 9}, "of format 9"), ({"panels": 3}, "panels=3 must be a list")):
        (tmp_path / "table-5.json").write_text(json.dumps(content | change))
        with pytest.raises(EvaluationError, match=message):
            read_reproduction(tmp_path / "table-5.json")


def test_a_recipe_that_is_not_there_is_said(tmp_path, tiny, monkeypatch):
    lost = dataclasses.replace(tiny, name="lost", bases={C10_R18: (Base("lost", "no-such-recipe"),)})
    monkeypatch.setitem(SCALES, "lost", lost)
    said: list[str] = []
    reproduce(Options(("figure-2",), "lost", tmp_path / "runs", tmp_path / "out"), said.append)
    assert any("lost/N-LR cannot be trained: there is no recipe 'no-such-recipe'" in text for text in said)
    assert "no-such-recipe" in overview(Options(("figure-2",), "lost", tmp_path / "runs"))
