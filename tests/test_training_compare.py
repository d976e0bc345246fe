"""Comparing evaluated runs."""

import dataclasses
import json
import statistics
from pathlib import Path

import pytest
import yaml

from timm_lowrank.cli import main
from timm_lowrank.errors import EvaluationError, RunError
from timm_lowrank.evaluation import results
from timm_lowrank.evaluation.results import Kind
from timm_lowrank.training.compare import compare_runs

PROTOCOL = results.Protocol(images=200)
ATTACK = results.Protocol(images=200, attack=results.AttackProtocol(name="PGD", eps=8 / 255, steps=20))
NORMALIZED = dataclasses.replace(ATTACK, attack=dataclasses.replace(ATTACK.attack, radius_unit="normalized"))
WEAKER = dataclasses.replace(NORMALIZED, attack=dataclasses.replace(NORMALIZED.attack, steps=7))


def figure(key, kind, values, **options):
    shares = {title: results.Value(value) for title, value in values.items()}
    return results.Figure(
        **{
            "key": key,
            "kind": kind,
            "group": "a group",
            "label": key,
            "values": shares,
            "protocol": PROTOCOL,
            **options,
        }
    )


def evaluated(folder, weights, rank=7.0, images=200, title="2-LR", twin="t", recipe=None, **hits):
    """A run with the evaluation of a network beside its plain twin: accuracies in per cent, 90 unless given."""
    hits = {"clean": 90, "linear": 60, **hits}
    values = {name: {title: share / 100, "plain": 0.5} for name, share in hits.items()}
    figures = [
        figure("clean", Kind.CLEAN, values["clean"]),
        figure("pgd-20", Kind.ATTACK, values.get("pgd", {}), protocol=ATTACK),
        figure("pgd-20-n", Kind.ATTACK, values.get("normalized", {}), protocol=NORMALIZED),
        figure("pgd-7-n", Kind.ATTACK, values.get("normalized", {}), protocol=WEAKER),
        figure("other", Kind.OTHER, values["clean"]),
        figure("compression-layer3-5", Kind.COMPRESSION, values["linear"], layer="layer3", directions=5),
        figure(
            "effective-rank-layer3", Kind.EFFECTIVE_RANK, {title: rank, "plain": 30.0}, unit="count", layer="layer3"
        ),
    ]
    evaluation = results.Evaluation(
        suite="quick", seed=0, chunk=100, confidence=0.95, device="cpu", created="2026-01-01T00:00:00+00:00",
        seconds=1.0, versions={}, curves=(), strips=(), verdicts={}, warnings=(), figures=tuple(figures),
        data=results.DataInfo(source="digits", split="test", images=images, image_size=(1, 8, 8), class_names=("a",)),
        networks=(results.NetworkInfo(title=title, weights=weights), results.NetworkInfo(title="plain", weights=twin)),
    )  # fmt: skip
    folder.mkdir(parents=True)
    values = {"model": "resnet10_cifar", "epochs": 3, **(recipe or {})}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    results.write_evaluation(evaluation, folder / "evaluation.json")
    return folder


@pytest.fixture
def runs(tmp_path):
    return [
        evaluated(tmp_path / "low-seed0", "a", rank=7.0, clean=90, linear=60, pgd=20),
        evaluated(tmp_path / "low-seed1", "b", rank=9.0, clean=94, linear=61, pgd=float("nan"), twin="another"),
        evaluated(tmp_path / "N-LR-seed0", "t", rank=30.0, clean=50, linear=50, title="plain run", twin="u"),
    ]


def test_runs_are_averaged_over_seeds_and_every_network_counts_once(runs):
    compared = compare_runs(runs)
    low, plain = ("low-seed0", "low-seed1"), ("plain", "plain")  # "t" is N-LR-seed0 itself
    assert {group: tuple(Path(name).name for name in names) for group, names in compared.groups.items()} == {
        "low": low, "N-LR": ("N-LR-seed0",), "plain": plain,
    }  # fmt: skip
    clean, pgd, linear, rank = compared.figures
    assert [one.key for one in compared.figures][::3] == ["clean", "effective-rank-layer3"]  # none of another kind
    assert clean.values["low"] == [0.90, 0.94]
    assert clean.cell("low") == f"92.0 ± {100 * statistics.stdev([0.90, 0.94]):.1f}"
    assert (linear.cell("low"), linear.cell("N-LR")) == ("60.5 ± 0.7", "50.0")
    assert (rank.cell("low"), rank.cell("N-LR")) == ("8.0 ± 1.4", "30")
    assert (pgd.cell("low"), pgd.cell("N-LR")) == ("20.0", "-")  # a number on one of two, and measured on none


OTHER = {"model_args": {"channels": [8, 8, 8, 8]}}
LOWER = {"lowrank": {"branches": {"layer3": 5}}, "pretrain_epochs": 1}
GROUPS = {
    "other folders": (
        {"x/2-LR-seed0": {}, "y/2-LR-seed0": OTHER},
        ["x/2-LR", "y/2-LR", "x/2-LR/plain", "y/2-LR/plain"],
    ),
    "seeds": ({"x/2-LR-seed0": {}, "x/2-LR-seed1": {"seed": 1}}, ["2-LR 2", "plain 2"]),
    "branches": ({"x/2-LR-seed0": {}, "x/1-LR-seed0": LOWER}, ["2-LR", "1-LR", "plain 2"]),
    "other twins": ({"c": {}, "b": OTHER}, ["c", "b", "c/plain", "b/plain"]),
    "no other name": ({"-seed1": {}}, ["-seed1", "plain"]),
    "no recipes": ({"a-seed0": None, "a-seed1": None, "b": None}, ["a 2", "b", "a/plain 2", "b/plain"]),
}


@pytest.mark.parametrize(("recipes", "expected"), GROUPS.values(), ids=GROUPS)
def test_only_what_differs_in_its_seed_alone_is_averaged(recipes, expected, tmp_path):
    for number, (name, recipe) in enumerate(recipes.items()):
        evaluated(tmp_path / name, f"own {number}", twin=f"twin {number}", recipe=recipe)
        if recipe is None:
            (tmp_path / name / "config.yaml").unlink()
    groups = compare_runs([tmp_path / name for name in recipes]).groups
    assert [name + (f" {len(runs)}" if len(runs) > 1 else "") for name, runs in groups.items()] == expected


def test_the_folder_one_stands_in_has_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(evaluated(tmp_path / "run-seed3", "a"))
    assert list(compare_runs(["."]).groups) == ["run", "plain"]


def test_a_figure_of_some_of_the_runs_says_of_how_many(tmp_path):
    folders = [
        evaluated(tmp_path / "2-LR-seed0", "a", pgd=20),
        evaluated(tmp_path / "2-LR-seed1", "b", pgd=40),
        evaluated(tmp_path / "2-LR-seed2", "c"),
    ]
    lines = {line.split("  ")[0]: line for line in compare_runs(folders).table().splitlines()}
    assert "30.0 ± 14.1 [2 of 3]" in lines["pgd-20"]
    assert "[" not in lines["clean"]


def test_both_units_of_a_radius_are_named(runs, tmp_path):
    assert compare_runs(runs).table().endswith("\n\nRadii are parts of the pixel range.")
    both = evaluated(tmp_path / "both", "d", rank=7.0, clean=90, linear=60, pgd=3, normalized=40)
    compared = compare_runs([both])
    assert [(one.key, one.radius_unit, one.values["both"]) for one in compared.figures[1:3]] == [
        ("pgd-20", "pixel", [0.03]), ("pgd-20-n", "normalized", [0.4]),
    ]  # fmt: skip
    assert "normalised are parts of the standard deviation of each channel." in compared.table()
    assert compared.to_dict()["figures"]["pgd-20-n"]["radius_unit"] == "normalized"


def test_figures_on_other_numbers_of_images_say_so(runs):
    assert "images" not in compare_runs(runs).to_dict()["figures"]["effective-rank-layer3"]
    path = runs[1] / "evaluation.json"
    evaluation = results.read_evaluation(path)
    more = dataclasses.replace(PROTOCOL, images=2500)
    figures = [
        dataclasses.replace(one, protocol=more) if one.kind is Kind.EFFECTIVE_RANK else one
        for one in evaluation.figures
    ]
    results.write_evaluation(dataclasses.replace(evaluation, figures=tuple(figures)), path)
    compared = compare_runs(runs)
    lines = {line.split("  ")[0]: line for line in compared.table().splitlines()}
    assert "[on 200 or 2,500 images]" in lines["effective-rank-layer3"]
    assert "images]" not in lines["clean"]
    assert [200, 2500] in compared.to_dict()["figures"]["effective-rank-layer3"]["images"].values()


def test_a_rank_that_the_images_bound_says_so(runs):
    """On as many images everywhere, too: two ranks near their bound may be any two ranks."""
    path = runs[1] / "evaluation.json"
    evaluation = results.read_evaluation(path)
    bounded = {"2-LR": results.Value(9.0, of=200, at_most=199), "plain": results.Value(30.0)}
    figures = [
        dataclasses.replace(one, values=bounded) if one.kind is Kind.EFFECTIVE_RANK else one
        for one in evaluation.figures
    ]
    results.write_evaluation(dataclasses.replace(evaluation, figures=tuple(figures)), path)
    compared = compare_runs(runs)
    line = next(line for line in compared.table().splitlines() if line.startswith("effective-rank-layer3"))
    assert line.count("at most") == line.count("8.0 ± 1.4 [at most 199]") == 1
    assert compared.to_dict()["figures"]["effective-rank-layer3"]["at_most"] == {"low": [199.0]}


def test_what_cannot_be_compared_is_named_at_once(runs, tmp_path):
    other = evaluated(tmp_path / "other", "c", rank=7.0, clean=90, linear=60, images=100)
    with pytest.raises(
        RunError, match=r"low-seed0 and .*other were evaluated on different images \(images 200 and 100"
    ):
        compare_runs([*runs, other])
    with pytest.raises(RunError, match="it is no run"):
        compare_runs([*runs, tmp_path])
    (runs[1] / "evaluation.json").write_text("{}")
    with pytest.raises(EvaluationError):
        compare_runs(runs)


def test_the_command_prints_a_column_for_each_group(runs, tmp_path, capsys):
    assert main(["compare", *map(str, runs), "--json", str(tmp_path / "figures.json")]) == 0
    heading, *rows = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert heading.split() == ["low", "(2)", "N-LR", "plain", "(2)"]
    assert [row.split()[0] for row in rows] == ["clean", "pgd-20", "compression-layer3-5", "effective-rank-layer3"]
    written = json.loads((tmp_path / "figures.json").read_text())
    assert written["figures"]["clean"]["groups"]["low"]["values"] == [0.9, 0.94]
    assert written == compare_runs(runs).to_dict()
