"""Evaluations of real digits: what they leave, that kills and processes change no figure, and how they fail."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import json
import math
import os
import shutil
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import forked
import numpy as np
import pytest
import timm
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from evaluations import SHORT_DIAGNOSIS
from processes.worker import free_port
from publishable import REPO
from publishable import trained as network_with_a_branch

import timm_lowrank as tlr
from timm_lowrank.cli import main
from timm_lowrank.core import spectrum
from timm_lowrank.data import load_images
from timm_lowrank.data.images import balanced_rows
from timm_lowrank.errors import EvaluationError, RunError
from timm_lowrank.evaluation import (
    PixelModel,
    activations,
    attacks,
    deepfool_rho,
    layer_cushion,
    max_margin_classifiers,
    predictions,
    rho,
)
from timm_lowrank.evaluation.cushion import cushions_of_pass
from timm_lowrank.evaluation.masking import BUDGETS
from timm_lowrank.evaluation.results import (
    Kind,
    Protocol,
    Settings,
    Value,
    evaluation_from_json,
    evaluation_to_json,
    headline,
    read_evaluation,
    value_text,
)
from timm_lowrank.report import text_table
from timm_lowrank.suites import Options, evaluate, join_processes, plan
from timm_lowrank.suites import evaluation as evaluation_module
from timm_lowrank.suites.measurements import accuracy, perturbations
from timm_lowrank.suites.measurements import passes as test_passes
from timm_lowrank.suites.measurements.accuracy import PGD, AutoAttack, Clean, Diagnosis, PGDSteps
from timm_lowrank.suites.measurements.base import Context, Results
from timm_lowrank.suites.measurements.classifiers import (
    UNTIL_FOOLED,
    Compression,
    FooledHybrid,
    Hybrid,
    LeadingFeatures,
)
from timm_lowrank.suites.measurements.perturbations import AccuracyByNoise, AdversarialStrip, DeepFool
from timm_lowrank.suites.measurements.representations import (
    DIMENSION,
    Cushion,
    CutPreactivations,
    Plane,
    Sparsity,
    Spectrum,
    Stability,
)
from timm_lowrank.suites.networks import load_network, random_twin
from timm_lowrank.suites.runner import PartialResults, Unit, plan_units
from timm_lowrank.text import percent, phrases
from timm_lowrank.training import Recipe, train

RECIPE = {
    "name": "small",
    "model": "resnet10_cifar",
    "model_args": {"channels": [8, 8, 16, 16]},
    "data_args": {"test_limit": 100},
    "lowrank": {"branches": {"layer3": 6, "pre_logits": 4}, "warmup_updates": 3},
    "epochs": 4,
    "pretrain_epochs": 2,
    "batch_size": 32,
    "learning_rate": 0.1,
    "schedule": "cosine",
    "twin": True,
}
VARIES = {"created": "", "seconds": 0.0, "processes": 1, "command": None}

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module", autouse=True)
def short_diagnosis():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BUDGETS, "quick", SHORT_DIAGNOSIS)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A 2-LR run with its plain twin."""
    AcceleratorState._reset_state(True)
    output = tmp_path_factory.mktemp("runs") / "2-LR"
    train(Recipe.from_dict(RECIPE), output)
    return output


@pytest.fixture
def small(monkeypatch):
    """A suite of a second: one measurement of each kind, chunked and whole, with and without a second network.

    Its attacks have 3 steps in the place of 20.
    """
    wanted = ("clean", "pgd-madry-20-8-255", "transfer", "noise-standard-deviation-1", "spectrum", "compression")
    measurements = [
        dataclasses.replace(one, steps=3) if isinstance(one, PGD) else one
        for one in plan.SUITES["quick"].measurements(plan.Extent())
        if one.key.startswith(wanted)
    ]
    monkeypatch.setitem(plan.SUITES, "small", plan.Suite(lambda extent: measurements, 40, 200))
    return ("small",)


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    """The quick suite on 24 images, in pieces of 16, never interrupted."""
    AcceleratorState._reset_state(True)
    output = tmp_path_factory.mktemp("whole")
    return output, evaluated_in(trained, output)


def evaluated_in(run, output, **changes):
    settings = {"limit": 24, "train_limit": 200, "chunk": 16, "output": output, **changes}
    return evaluate(Options(str(run), **settings), PartialState())


def in_another_process(run, output, log, **environment):
    limits = ["--limit", "24", "--train-limit", "200", "--batch-size", "16"]
    arguments = ["evaluate", str(run), "--output", str(output), *limits]
    return forked.start(with_short_diagnosis, arguments, log=log, environment=environment)


def with_short_diagnosis(arguments):
    """The console command in a process of its own, where no fixture is."""
    BUDGETS["quick"] = SHORT_DIAGNOSIS
    return main(arguments)


def content(folder):
    """What must not depend on when and by how many processes it was measured."""
    return dataclasses.replace(read_evaluation(folder / "evaluation.json"), **VARIES)


# -------------------------------------------------------------------------------------------------- what is left there


def test_an_evaluation_leaves_report_plots_and_figures(evaluated):
    output, evaluation = evaluated
    assert read_evaluation(output / "evaluation.json") == evaluation
    assert (output / "report.html").read_text().lstrip().startswith("<!DOCTYPE html>")
    assert {path.suffix for path in (output / "plots").rglob("*.*")} == {".png"}
    assert not list(output.glob("*.partial*"))
    assert evaluation.titles == ("2-LR", "plain")
    assert evaluation.data.images == 24
    assert set(evaluation.verdicts) == {"2-LR", "plain"}
    for figure in evaluation.figures:
        spectral = figure.group == DIMENSION  # of twice as many images as features, here of all
        assert (figure.protocol.seed, figure.protocol.images) == (0, 100 if spectral else 24)
        assert set(figure.values) == {"2-LR", "plain"}
        assert figure.kind is not Kind.OTHER
    attack = evaluation.figure("pgd-madry-20-8-255").protocol.attack
    assert (attack.eps, attack.step_size, attack.steps, attack.restarts) == (8 / 255, 2 / 255, 20, 1)
    (transfer,) = evaluation.by_kind(Kind.TRANSFER)
    assert transfer.protocol.attack.crafted_on == {"2-LR": "plain", "plain": "2-LR"}
    assert [figure.directions for figure in evaluation.by_kind(Kind.COMPRESSION, layer="layer3")] == [5, 10, 20, None]
    table = text_table(evaluation)
    assert "PGD-20, 8/255" in table
    assert all(len(line) <= 100 for line in table.splitlines())


def test_every_class_has_its_picture(evaluated):
    (strip,) = evaluated[1].strips
    data = load_images(**RECIPE["data_args"])
    rows = torch.from_numpy(balanced_rows(data.test_labels.numpy(), 24, 10))
    images, labels = data.test_images[rows], data.test_labels[rows]
    first = torch.stack([images[labels == label][0] for label in range(10)])
    shown = [row for row in strip.rows if row.name == "original"]
    assert [row.network for row in shown] == ["2-LR", "plain"]
    assert all(row.pixels == first.numpy().tobytes() for row in shown)


@pytest.mark.parametrize(
    ("labels", "rows"),
    [
        ([0, 0, 1, 0, 1, 1, 2, 2, 0, 1], [0, 2, 6, 1, 3, 4, 5, 7]),  # of few classes more images
        ([*[5] * 90, *range(10)], [90, 91, 92, 93, 94, 0, 96, 97, 98, 99]),  # classes behind many of another one
        ([3, 1], [1, 0]),
        (list(range(150)), list(range(100))),
    ],
)
def test_a_picture_of_each_class_in_their_order(labels, rows):
    assert perturbations._one_of_each_class(torch.tensor(labels)).tolist() == rows


def test_axes_are_whole_phrases():
    """Of every curve that a measurement makes, as it stands in the source: f-strings by their fixed parts."""
    labels = []
    for path in sorted(Path(perturbations.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg in ("x_label", "y_label"):
                parts = node.value.values if isinstance(node.value, ast.JoinedStr) else [node.value]
                labels.append(" ".join(part.value for part in parts if isinstance(part, ast.Constant)))
    assert len(labels) >= 18
    assert not [label for label in labels if len(label.split()) < 3 or label.startswith("of ")]


def test_figures_are_those_of_the_networks(trained, evaluated):
    """Recomputed from the exported weights: clean accuracy, an image alone in its batch; the spectrum of a layer."""
    _, evaluation = evaluated
    data = load_images(**RECIPE["data_args"])
    rows = torch.from_numpy(balanced_rows(data.test_labels.numpy(), 24, 10))
    images, labels = data.test_images[rows].float() / 255, data.test_labels[rows]
    model = PixelModel(timm.create_model(f"local-dir:{trained / 'model'}", pretrained=True).eval())
    right = sum(int(model(image[None]).argmax()) == int(label) for image, label in zip(images, labels, strict=True))
    hits = {figure.key: figure.values["2-LR"].hits for figure in evaluation.figures}
    assert hits["clean"] == right >= 8
    radius = [hits[f"pgd-madry-20-{level}-255"] for level in (2, 4, 8)]
    assert right >= radius[0] >= radius[1] >= radius[2]
    assert evaluation.figure("noise-standard-deviation-0.4").values["2-LR"].of == 24
    values = activations(model, data.test_images.float() / 255, ["layer3"])["layer3"]
    ratios = {key: evaluation.figure(f"variance-layer3-{key}").values["2-LR"].value for key in (1, 5, 10)}
    assert list(ratios.values()) == pytest.approx(spectrum.variance_ratio(values, list(ratios)), rel=1e-4)
    assert evaluation.figure("effective-rank-layer3").values["2-LR"].value == spectrum.effective_rank(values)


def test_the_same_command_again_does_nothing_and_another_is_refused(trained, evaluated, capsys):
    output, evaluation = evaluated
    before = (output / "evaluation.json").stat().st_mtime_ns
    assert evaluated_in(trained, output) == evaluation
    assert "is complete" in capsys.readouterr().out
    with pytest.raises(EvaluationError, match="--overwrite"):
        evaluated_in(trained, output, seed=1)
    assert (output / "evaluation.json").stat().st_mtime_ns == before


def test_what_a_kill_left_beside_a_complete_evaluation_goes(trained, evaluated, tmp_path):
    output = shutil.copytree(evaluated[0], tmp_path / "out")
    partial = output / "evaluation.json.partial"
    PartialResults(partial, dataclasses.replace(evaluated[1].settings, seed=1)).recover()
    evaluated_in(trained, output)
    assert partial.exists(), "another evaluation, which was interrupted and can go on"
    partial.unlink()
    PartialResults(partial, evaluated[1].settings).recover()
    evaluated_in(trained, output)
    assert not partial.exists()


def test_what_is_continued_elsewhere_says_what_measured_the_rest(trained, tmp_path, small, monkeypatch):
    """The device and the versions in evaluation.json are those of the last go alone."""
    output, room = tmp_path / "out", [3]
    append = PartialResults.append

    def killed(self, *arguments):
        append(self, *arguments)
        room[0] -= 1
        if not room[0]:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PartialResults, "append", killed)
        patch.setattr(evaluation_module, "device_name", lambda device: "a GPU")
        with pytest.raises(KeyboardInterrupt):
            evaluated_in(trained, output, suites=small, pages=False)
    continued = evaluated_in(trained, output, suites=small, pages=False)
    (said,) = [each for each in continued.warnings if "interrupted" in each]
    assert "a GPU, python" in said
    assert f"then {continued.device}" in said
    whole = evaluated_in(trained, tmp_path / "new", suites=small, pages=False)
    assert not any("interrupted" in each for each in whole.warnings)


def test_several_networks_and_none(trained, tmp_path, small):
    alone = evaluated_in(trained, tmp_path / "alone", against=("none",), suites=small, pages=False)
    assert alone.titles == ("2-LR",)
    assert any("transfer-madry-3-8-255 was not measured" in text for text in alone.warnings)
    assert not alone.by_kind(Kind.TRANSFER)
    with pytest.raises(EvaluationError, match="same weights"):
        evaluated_in(trained, tmp_path / "same", against=(str(trained / "model"),))


def test_one_image_is_enough(trained, tmp_path, small):
    evaluation = evaluated_in(trained, tmp_path / "one", limit=1, spectrum_limit=1, suites=small, pages=False)
    keys = {figure.key for figure in evaluation.figures}
    assert {"clean", "pgd-madry-3-8-255", "compression-layer3-all"} <= keys
    assert any("spectrum was not measured" in text for text in evaluation.warnings)


def test_a_checkpoint_without_its_run_takes_data_by_name(trained, tmp_path, small):
    evaluation = evaluated_in(trained / "model", tmp_path, data="digits", limit=10, suites=small, pages=False)
    assert evaluation.data.source == "digits"
    assert evaluation.networks[0].branches == {"layer3": 6, "pre_logits": 4}


def test_chosen_measurements_against_a_source_that_is_not_measured(trained, tmp_path):
    measurements = (
        PGD("madry", 8 / 255, 2, black_box=True), Sparsity(), CutPreactivations(), LeadingFeatures((2, 5, 50)),
    )  # fmt: skip
    images = load_images(**RECIPE["data_args"])
    options = Options(
        str(trained), measurements=measurements, source=str(trained / "twin"), limit=30, train_limit=200, pages=False,
        output=tmp_path,
    )  # fmt: skip
    evaluation = evaluate(options, PartialState(), images)
    assert evaluation == read_evaluation(tmp_path / "evaluation.json")
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]
    assert evaluation.titles == ("2-LR",)
    transfer, *_ = evaluation.figures
    assert transfer.protocol.attack.crafted_on == {"2-LR": "plain"}
    assert evaluation.settings.networks.keys() == {"2-LR", "source plain"}

    rows = torch.from_numpy(balanced_rows(images.test_labels.numpy(), 30, 10))
    model = PixelModel(timm.create_model(f"local-dir:{trained / 'model'}", pretrained=True).eval())
    layers = activations(model, images.test_images[rows].float() / 255, ["layer3", "pre_logits"])
    value = {figure.key: figure.values["2-LR"].value for figure in evaluation.figures}
    for layer, values in layers.items():
        assert value[f"sparsity-{layer}"] == pytest.approx(float((values == 0).double().mean()), abs=1e-12)
    assert value["cut-preactivations-layer3-rank"] > 15  # 30 images, cut to 15
    assert 0 < value["cut-preactivations-layer3-share"] < 1
    assert value["cut-preactivations-layer3-next"] > 0
    assert [figure.directions for figure in evaluation.by_kind(Kind.LEADING_FEATURES)] == [2, 5]  # of 16 features
    assert not any("pre_logits" in key for key in value if key.startswith("cut"))


def test_a_network_on_the_hub_is_what_its_folder_is(hub, tmp_path):
    """Its branches, and so its title, its layers and what one sample of them is: it was taken for a plain one."""
    folder = tlr.save_pretrained(network_with_a_branch(), tmp_path / "checkpoint")
    tlr.push_to_hub(folder, REPO)
    here = load_network(str(folder))
    assert here.title == "1-LR"
    for where in (f"hf-hub:{REPO}", f"hf_hub:{REPO}@main"):
        there = load_network(where)
        for name in ("title", "branches", "layers", "views", "weights"):
            assert getattr(there, name) == getattr(here, name), name
    tlr.push_to_hub(tlr.save_pretrained(network_with_a_branch().unwrap(), tmp_path / "plain"), "alice/plain")
    assert load_network("hf-hub:alice/plain").title == "plain"


def test_layers_run_from_the_input_to_the_output_whatever_comes_first(trained):
    one, two = (SimpleNamespace(layers=layers) for layers in (("pre_logits",), ("layer3", "pre_logits")))
    assert evaluation_module._layers([one, two]) == evaluation_module._layers([two]) == ["layer3", "pre_logits"]
    assert evaluation_module._layers([SimpleNamespace(layers=())]) == ["pre_logits"]


# ------------------------------------------------------------------------------------- kills, processes, full disks


def test_a_kill_at_any_moment_changes_nothing(trained, evaluated, tmp_path):
    output = tmp_path / "killed"
    lines = 0
    for _ in range(60):
        process = in_another_process(trained, output, tmp_path / "log")
        grown = wait_for_more(process, output / "evaluation.json.partial", lines)
        if grown is None:
            break
        process.kill()
        process.join()
        assert grown > lines
        lines = grown + 22
    assert lines > 15  # it was killed more than once
    assert content(output) == content(evaluated[0])
    assert not list(output.glob("*.partial*"))


def wait_for_more(process, path, lines):
    """The number of lines of a file once it has more than `lines`; None if the process ends before that."""
    while process.is_alive():
        count = 0
        with contextlib.suppress(FileNotFoundError):  # not begun, or complete and removed
            count = path.read_bytes().count(b"\n")
        if count > lines:
            return count
        time.sleep(0.02)
    assert process.exitcode == 0
    return None


def test_two_processes_give_the_figures_of_one(trained, evaluated, tmp_path):
    output, logs = tmp_path / "out", [tmp_path / "first", tmp_path / "second"]
    both = zip(logs, forked.ranks(2, free_port()), strict=True)
    forked.finish(*(in_another_process(trained, output, log, **rank) for log, rank in both), logs=logs)
    assert read_evaluation(output / "evaluation.json").processes == 2
    assert content(output) == content(evaluated[0])
    assert not list(output.glob("*.partial*"))


def test_processes_that_form_no_group_stop(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr("timm_lowrank.suites.runner.Accelerator", lambda **settings: None)
    with pytest.raises(EvaluationError, match="torchrun --nproc_per_node"):
        join_processes()


def test_a_full_disk_keeps_what_is_finished(trained, tmp_path, monkeypatch, small):
    sync, left = os.fsync, iter(range(6))

    def full(descriptor):
        if next(left, None) is None:
            raise OSError(28, "No space left on device")
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(RunError, match=r"No space left.*same command"):
            evaluated_in(trained, tmp_path / "out", suites=small, pages=False)
    assert (tmp_path / "out" / "evaluation.json.partial").read_text().count("\n") >= 6
    evaluated_in(trained, tmp_path / "out", suites=small, pages=False)
    evaluated_in(trained, tmp_path / "whole", suites=small, pages=False)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


# --------------------------------------------------------------------------------- networks that differ in their layers


@pytest.fixture(scope="module")
def unlike(tmp_path_factory):
    """Networks that were not trained, wide and narrow, each with branches of its own."""
    folder = tmp_path_factory.mktemp("unlike")
    shapes = {"narrow": ((8, 8, 8, 16), "layer3"), "wide": ((8, 8, 16, 32), "layer2")}
    for name, (channels, inside) in shapes.items():
        torch.manual_seed(0)
        config = tlr.LowRankConfig(branches={inside: 4, "pre_logits": 3})
        model = tlr.wrap(
            "resnet10_cifar", config, in_chans=1, num_classes=10, channels=channels, stem_stride=2,
            example_input=torch.rand(2, 1, 8, 8),
        )  # fmt: skip
        tlr.save_pretrained(model, folder / name)
    return folder


@pytest.mark.parametrize("order", [("narrow", "wide"), ("wide", "narrow")])
def test_networks_of_other_widths_are_measured_each_as_far_as_it_goes(unlike, tmp_path, order):
    measurements = (Compression((5, 20)), LeadingFeatures((5, 20)), Spectrum())
    first, second = (str(unlike / name) for name in order)
    evaluation = evaluate(
        Options(
            first, against=(second,), data="digits", limit=25, train_limit=100, spectrum_limit=25, chunk=25,
            measurements=measurements, output=tmp_path, pages=False,
        ),
        PartialState(),
    )  # fmt: skip
    assert evaluation.settings.layers == ("layer2", "layer3", "pre_logits")  # from the input to the output
    values = {figure.key: set(figure.values) for figure in evaluation.figures}
    assert values["compression-pre_logits-5"] == values["compression-pre_logits-all"] == {"narrow", "wide"}
    assert values["compression-pre_logits-20"] == values["leading-features-pre_logits-20"] == {"wide"}
    assert evaluation.figure("compression-pre_logits-all").label == "pre_logits: max-margin on all features"
    assert "dimensions" not in evaluation.figure("compression-pre_logits-all").protocol.details
    assert evaluation.figure("compression-pre_logits-20").protocol.details["parameters"] == 32 * 10 + 10
    ranks = evaluation.figure("effective-rank-pre_logits").values
    assert {title: value.at_most for title, value in ranks.items()} == {"narrow": None, "wide": 24}


def test_of_several_views_of_a_layer_the_first_branch_decides(tmp_path):
    """And those that are measured in another view than their own are named."""
    networks = {}
    for view in ("pool", "token", "flatten"):
        branches = {"layer2": {"rank": 2, "view": view}}
        model = tlr.wrap("test_resnet", tlr.LowRankConfig(branches=branches), example_input=torch.zeros(2, 3, 32, 32))
        networks[view] = load_network(str(tlr.save_pretrained(model, tmp_path / view)))
    plain = dataclasses.replace(networks["token"], branches={})  # its run measured it beside one with branches

    def viewed(*titles):
        chosen = {title: {**networks, "plain": plain}[title] for title in titles}
        views = Context.views.fget(SimpleNamespace(networks=chosen))
        named = evaluation_module._other_views(SimpleNamespace(networks=chosen, views=views))
        return views["layer2"].kind if views else "flatten", [words.split()[0] for words in named]

    assert viewed("pool", "token", "plain") == ("pool", ["token"])
    assert viewed("plain", "flatten", "pool") == ("flatten", ["pool"])
    assert viewed("plain") == viewed("plain", "token") == ("token", [])


def test_a_black_box_is_crafted_on_the_plain_network_if_there_is_one(unlike):
    network = load_network(str(unlike / "wide"))
    kinds = {"2-LR": ({"a": 1}, None), "Bottle-LR": ({}, "Bottle-LR"), "plain": ({}, None), "1-LR": ({"a": 1}, None)}
    networks = {
        title: dataclasses.replace(network, title=title, branches=branches, comparator=comparator)
        for title, (branches, comparator) in kinds.items()
    }

    def other(title, *titles):
        chosen = {name: networks[name] for name in (title, *titles)}
        return Context.other(SimpleNamespace(source=None, networks=chosen), title)

    assert other("2-LR", "Bottle-LR", "plain").title == "plain"
    assert other("2-LR", "1-LR", "Bottle-LR").title == "Bottle-LR"
    assert other("plain", "1-LR").title == "1-LR"
    assert other("plain") is None


# ----------------------------------------------------------------------------------------------------- partial results

SETTINGS = Settings(
    seed=0, chunk=2, images=3, train_images=9, data="f", networks={"plain": "a"}, layers=("layer3",), torch="2",
    measurements=("Clean()",),
)  # fmt: skip
UNITS = {
    Unit("clean", "plain", 0): {"correct": [True, False]},
    Unit("clean", "plain", 1): {"correct": [True]},
    Unit("rho", "2-LR", 0): {"rho": [0.1, 1 / 3, math.nan]},
}


@pytest.fixture
def partial(tmp_path):
    partial = PartialResults(tmp_path / "evaluation.json.partial", SETTINGS)
    partial.recover()
    return partial


def fill(partial):
    for unit, columns in UNITS.items():
        partial.append(0, unit, columns)


def as_text(units):
    """To the bit, and with NaN equal to itself."""
    return json.dumps([[*unit, columns] for unit, columns in sorted(units.items())])


def test_a_kill_at_any_byte_keeps_every_unit_that_was_complete(partial):
    assert partial.units() == {}
    fill(partial)
    whole = partial.path.read_bytes()
    ends = [byte for byte, character in enumerate(whole) if character == ord("\n")]
    for cut in range(len(whole) + 1):
        partial.path.write_bytes(whole[:cut])
        again = PartialResults(partial.path, SETTINGS)
        again.recover()
        complete = max(0, sum(end < cut for end in ends) - 1)  # the first line holds the settings
        assert as_text(again.units()) == as_text(dict(list(UNITS.items())[:complete]))
        again.append(0, Unit("later", "plain", 0), {"x": [1]})
        assert len(again.units()) == complete + 1


def test_files_of_several_processes_become_one(partial):
    for process, (unit, columns) in enumerate(UNITS.items()):
        partial.append(process, unit, columns)
    assert len(list(partial.path.parent.iterdir())) == 3
    assert as_text(partial.units()) == as_text(UNITS)
    partial.recover()
    assert list(partial.path.parent.iterdir()) == [partial.path]
    assert as_text(partial.units()) == as_text(UNITS)
    partial.remove()
    assert list(partial.path.parent.iterdir()) == []


def test_another_evaluation_is_refused_and_left_alone(partial):
    fill(partial)
    before = partial.path.read_bytes()
    with pytest.raises(EvaluationError, match=r"\(seed was 0 and is 1\).*--output"):
        PartialResults(partial.path, dataclasses.replace(SETTINGS, seed=1)).recover()
    assert partial.path.read_bytes() == before


def test_bytes_that_are_no_partial_results_are_replaced(partial):
    partial.path.write_bytes(b"\x00\xff garbage\n{not json}\n")
    partial.recover()
    assert partial.units() == {}
    fill(partial)
    assert as_text(partial.units()) == as_text(UNITS)


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"suites": ("paper", "qick")}, r"no suite qick.*quick, paper, autoattack"),
        ({"chunk": 0}, "--batch-size must be at least 1"),
        ({"other_labels": "coarse_label"}, "the suite quick measures nothing with --other-labels: add --suite paper"),
        ({"radii": (0.0,)}, "--radii must be numbers of levels"),
        ({"table_limit": 0}, "--table-limit must be at least 1"),
        ({"radius_units": ("normalised",)}, "did you mean 'normalized'"),
        (
            {"radius_units": ("normalized",), "suites": ("quick", "autoattack"), "run": "nowhere/at/all"},
            "AutoAttack has one radius for all channels, .* --radius-unit pixel normalized",
        ),
        ({"seed": -1, "run": "nowhere/at/all"}, "--seed must be at least 0"),
        ({"limit": 0}, "--limit, --train-limit and --spectrum-limit must be"),
        ({"train_limit": -1, "run": "nowhere/at/all"}, "--limit, --train-limit and .* must be at least 1, not -1"),
        ({"run": "nowhere/at/all"}, "neither a folder here nor a network"),
        ({"run": "./nowhere"}, "is no run folder"),
        ({"against": ("./nowhere",)}, "is no run folder"),
    ],
)
def test_mistakes_are_one_error_before_anything_is_written(trained, tmp_path, changes, message):
    with pytest.raises(EvaluationError, match=message):
        evaluated_in(**{"run": trained, "output": tmp_path / "out", **changes})
    assert not (tmp_path / "out").exists()


def test_a_damaged_or_unfinished_run_says_so(trained, tmp_path):
    def refused(run, message):
        with pytest.raises(EvaluationError, match=message):
            evaluated_in(run, tmp_path / "out", against=("none",))

    run = shutil.copytree(trained, tmp_path / "run")
    weights = run / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(run, "cannot be loaded")
    (run / "summary.json").unlink()
    refused(run, "not finished")
    refused(run / "plots", "neither a finished run nor a checkpoint")
    refused(trained / "model", "give --data")


def test_too_few_images_for_a_verdict_are_a_warning(trained, tmp_path, monkeypatch):
    few = plan.Suite(lambda extent: [Clean(), Diagnosis(8 / 255, "quick")], 3, 10)
    monkeypatch.setitem(plan.SUITES, "verdict", few)
    evaluation = evaluated_in(trained, tmp_path, limit=3, suites=("verdict",), against=("none",))
    assert evaluation.verdicts == {}
    assert any("diagnosis gives no verdict on gradient masking" in text for text in evaluation.warnings)
    assert (tmp_path / "report.html").exists()


def test_a_measurement_that_fails_leaves_the_others(trained, tmp_path, monkeypatch, small):
    def broken(*arguments, **settings):
        raise EvaluationError("no noise today")

    monkeypatch.setattr(accuracy, "pixel_noise", broken)
    evaluation = evaluated_in(trained, tmp_path, limit=10, suites=small, pages=False)
    assert any("noise-standard-deviation-1 was not measured: no noise today" in text for text in evaluation.warnings)
    assert evaluation.figure("clean")


# --------------------------------------------------------------------------------------------------------------- suites


@pytest.mark.parametrize("suite", plan.SUITES)
def test_every_measurement_of_a_suite_has_a_name_of_its_own(suite):
    measurements = plan.SUITES[suite].measurements(plan.Extent(plan.SUITES[suite].radius_units))
    keys = [measurement.key for measurement in measurements]
    assert len(set(keys)) == len(keys)
    assert {measurement.key for measurement in plan.measurements_of(plan.chosen_suites([suite]))} == set(keys)
    assert len(set(map(repr, measurements))) == len(keys)  # the settings tell them apart as well


def test_the_effective_rank_counts_all_directions_and_says_what_bounds_it(trained, tmp_path, monkeypatch):
    """More than a thousand directions, against the spectrum computed anew; and fewer images than features."""
    draws = torch.Generator().manual_seed(0)
    values = torch.randn(1900, 1400, generator=draws)

    def context(rows):
        samples = ({"layer3": values[:rows]}, torch.arange(rows) % 10)
        names = tuple("abcdefghij")
        return SimpleNamespace(
            samples=lambda title: samples, class_names=names, layers=("layer3",), views={}, confidence=0.95,
            protocol=lambda **details: Protocol(images=1, details=details),
        )  # fmt: skip

    for rows, bound in ((1900, None), (1300, 1299)):
        measurement, results = Spectrum(uncentred=True), Results()
        columns = measurement.observe(context(rows), "a", range(1))
        measurement.report(context(rows), {"a": json.loads(json.dumps(columns))}, results)
        figures = {figure.key: figure for figure in results.figures}
        rank = figures["effective-rank-layer3"].values["a"]
        assert rank.value == spectrum.effective_rank(values[:rows]) > 1000
        assert (rank.at_most, rank.of) == (bound, rows)
        assert figures["effective-rank-layer3"].protocol.images == rows
        own = torch.linalg.svdvals(values[:rows].double()).square()
        shares = [figures[f"variance-layer3-{count}-uncentred"].values["a"].value for count in (1, 20)]
        assert shares == pytest.approx([float(own[:count].sum() / own.sum()) for count in (1, 20)], rel=1e-9)
        assert figures["variance-layer3-20"].kind is Kind.VARIANCE
        assert figures["variance-layer3-20-uncentred"].kind is Kind.RAW_VARIANCE
        whole, classes = results.curves
        assert (whole.lines[0].x[:3], whole.lines[0].x[-1]) == ((1, 2, 3), min(rows - 1, 1400) + (rows < 1400))
        assert len(whole.lines[0].x) < 400
        assert len(classes.lines[0].y) == 10
        energy = torch.linalg.svdvals(values[:rows][3::10].double()).square()
        assert classes.lines[0].y[3] == pytest.approx(float(energy[0] / energy.sum()), rel=1e-6)


def test_spectra_take_twice_as_many_images_as_features(trained, tmp_path):
    few = evaluated_in(trained, tmp_path / "few", measurements=(Spectrum(),), spectrum_limit=30)
    rank = few.figure("effective-rank-layer3").values["2-LR"]
    width = few.figure("effective-rank-layer3").protocol.details["features"]
    assert (rank.of, rank.at_most) == (30, 29)
    assert width > 30
    assert any("30 images allow 29 at most" in text for text in few.all_warnings())
    assert "30 images, which allow 29 at most" in (tmp_path / "few" / "report.html").read_text()
    assert "(at most 29)" in text_table(few)
    only = evaluated_in(
        trained, tmp_path / "last", measurements=(Spectrum(),), limit=10, against=("none",), pages=False
    )
    assert only.figure("effective-rank-layer3").values["2-LR"].of == min(100, 2 * width)
    assert only.settings.spectrum_images == min(100, 2 * width)


SHARING = (
    Clean(), Spectrum(uncentred=True), Compression((5,)), LeadingFeatures((2,)), Plane(), Sparsity(), Cushion(),
)  # fmt: skip


@pytest.fixture
def passes(monkeypatch):
    """Images in each forward pass without gradients and of more than one image, network by network."""
    seen = {}
    forward = PixelModel.forward

    def counting(model, images):
        if len(images) > 1 and not torch.is_grad_enabled():
            seen.setdefault(model, []).append(len(images))
        return forward(model, images)

    monkeypatch.setattr(PixelModel, "forward", counting)
    monkeypatch.setattr(evaluation_module, "_oddities", lambda context: [])
    return seen


def test_what_looks_at_representations_shares_one_pass_over_the_images(trained, tmp_path, passes):
    """24 test images in chunks of 16, 76 more for spectra, 200 training images."""
    together = evaluated_in(trained, tmp_path / "all", measurements=SHARING, pages=False)
    assert len(passes) == 2
    for sizes in passes.values():
        assert sizes[:2] == [16, 8]
        assert sum(sizes) == 24 + 76 + 200
    figures = {figure.key: figure for figure in together.figures}
    passes.clear()
    for one in SHARING:
        alone = evaluated_in(trained, tmp_path / one.key, measurements=(one,), pages=False)
        assert alone.figures or alone.curves
        assert [figures[figure.key] for figure in alone.figures] == list(alone.figures)
        assert all(curve in together.curves for curve in alone.curves)
    assert sum(map(sum, passes.values())) > 2 * 2 * 300, "alone they would have made as few"
    passes.clear()
    evaluated_in(trained, tmp_path / "moved", measurements=(*SHARING, Stability(8 / 255, 2)), pages=False)
    assert [sum(sizes) for sizes in passes.values()] == [300 + 24] * 2, "the moved images have a pass of their own"


def test_a_pass_takes_along_only_what_is_still_to_be_measured(trained, tmp_path, passes, monkeypatch):
    """Of an evaluation that was killed, and of layers that cannot be read, which leave the other readings alone."""
    measured = []
    monkeypatch.setattr(
        test_passes, "cushions_of_pass", lambda model: measured.append(model) or cushions_of_pass(model)
    )
    evaluated_in(trained, tmp_path / "some", measurements=(Clean(), Sparsity()), pages=False)
    assert not measured
    monkeypatch.setattr(evaluation_module, "_layers", lambda networks: ["layer9"])
    evaluation = evaluated_in(trained, tmp_path / "bad", measurements=(Clean(), Sparsity(), Cushion()), pages=False)
    assert evaluation.figure("clean").values["2-LR"].of == 24
    assert any(figure.kind is Kind.CUSHION for figure in evaluation.figures)
    assert len([text for text in evaluation.warnings if "sparsity was not measured: " in text]) == 2
    assert len(measured) == 4  # two chunks of two networks


def test_classifiers_of_all_layers_are_fitted_on_one_pass(trained, tmp_path, passes):
    evaluated_in(trained, tmp_path, measurements=(FooledHybrid("DeepFool", steps=2),), chunk=25, pages=False)
    trained_on = [sum(size for size in sizes if size == 25) for sizes in passes.values()]
    assert trained_on == [200, 200]


def test_a_radius_beyond_the_grid_is_said_to_be_so(trained, tmp_path):
    grid = tuple(level / 255 for level in (1, 2))
    chosen = plan.measurements_of(plan.chosen_suites(["paper"]), radii=grid)
    (few,) = (one for one in chosen if one.key == "minimum-iter-fgsm")
    assert (few.radii, few.steps) == (grid, 10)
    wide = dataclasses.replace(few, radii=(1 / 255, 1.0))
    assert wide.steps >= 255
    evaluation = evaluated_in(trained, tmp_path, measurements=(few,), against=("none",))
    figure = evaluation.figure("minimum-iter-fgsm")
    value = figure.values["2-LR"]
    assert (value.known, value.beyond) == (False, 2 / 255)
    assert "> 2/255" in text_table(evaluation)
    assert "not a number" not in text_table(evaluation)
    assert value_text(Value(math.nan, beyond=0.0333564), "number") == "> 0.0334"
    assert "<strong>&gt; 2/255</strong>" in (tmp_path / "report.html").read_text()
    assert any(
        text.endswith(f"misclassifies 99%: > 2/255 (of {value.of} images)") for text in evaluation.all_warnings()
    )
    assert read_evaluation(tmp_path / "evaluation.json") == evaluation


def test_noise_that_halves_accuracy(trained, tmp_path):
    measurements = (AccuracyByNoise(False, 0.5, 40), AccuracyByNoise(True, 0.5, 3, black_box=True), DeepFool())
    evaluation = evaluated_in(trained, tmp_path, measurements=measurements, limit=30, pages=False)
    network, other = load_network(str(trained / "twin")).model, load_network(str(trained)).model
    data = load_images(**RECIPE["data_args"])
    rows = torch.from_numpy(balanced_rows(data.test_labels.numpy(), 30, 10))
    images, labels = data.test_images[rows].float() / 255, data.test_labels[rows]
    curves = {curve.key: curve.lines[1] for curve in evaluation.curves}

    def after(steps, attack, source):
        points = attack(source, images, labels, eps=0.5, steps=steps)
        return float(rho(images, points).mean()), float((predictions(network, points) == labels).double().mean())

    line = curves["accuracy-by-noise-iter-fgsm"]
    assert len(line.x) == 41
    assert line.x[0] == 0
    for steps in (7, 40):
        assert (line.x[steps], line.y[steps]) == pytest.approx(after(steps, attacks.iterative_fgsm, network), abs=0.035)
    half = evaluation.figure("accuracy-by-noise-iter-fgsm-half").values["plain"].value
    assert line.y[0] > 0.5 > line.y[-1]
    assert half == pytest.approx(float(np.interp(-0.5, [-y for y in line.y], line.x)), rel=0.2)
    black = curves["accuracy-by-noise-transfer-iter-ll-fgsm"]
    expected = after(3, attacks.iterative_least_likely, other)
    assert (black.x[3], black.y[3]) == pytest.approx(expected, abs=0.035)
    assert evaluation.figure("accuracy-by-noise-transfer-iter-ll-fgsm-half").values["plain"].beyond == max(black.x)
    deepfool = deepfool_rho(network, images, labels)
    sizes = deepfool.rho.nan_to_num(nan=math.inf)
    own = curves["deepfool-accuracy-by-noise"]
    assert own.y[0] == pytest.approx(float((sizes > 0).double().mean()))
    for size, share in list(zip(own.x, own.y, strict=True))[::5]:
        assert share == pytest.approx(float((sizes > size * (1 + 1e-6)).double().mean()), abs=0.035)
    half = evaluation.figure("deepfool-half").values["plain"].value
    assert float(sizes.sort().values[13]) <= half <= float(sizes.sort().values[15]) * (1 + 1e-6)


@pytest.mark.parametrize("name", UNTIL_FOOLED)
def test_hybrids_on_images_that_were_changed_until_their_network_erred(name, trained, tmp_path):
    one = FooledHybrid(name, steps=15)
    evaluation = evaluated_in(trained, tmp_path, measurements=(one,), limit=20, chunk=20, pages=False)
    network, other = load_network(str(trained)).model, load_network(str(trained / "twin")).model
    data = load_images(**RECIPE["data_args"])
    rows = torch.from_numpy(balanced_rows(data.test_labels.numpy(), 20, 10))
    images, labels = data.test_images[rows].float() / 255, data.test_labels[rows]
    right = predictions(network, images) == labels
    white, black = images.clone(), images.clone()
    for source, into in ((network, white), (other, black)):
        if name == "DeepFool":
            alone = zip(images.split(1), labels.split(1), strict=True)
            into[:] = torch.cat([attacks.deepfool(source, *one, steps=15) for one in alone])
            continue
        for steps in range(1, 16):  # anew with one step more, those on which it does not err yet
            left = predictions(network, into) == labels
            if not left.any():
                break
            into[left] = UNTIL_FOOLED[name](source, images[left], labels[left], eps=32 / 255, steps=steps)
    for which, crafted in (("white", white), ("black", black), ("equal", black)):
        value = evaluation.figure(f"{one.key}-layer3-{which}").values["2-LR"]
        fooled = right & (predictions(network, crafted) != labels)
        assert abs(value.of - int(fooled.sum())) <= 1
        assert value.of >= (2 if which == "white" else 0)
    attack = evaluation.figure(f"{one.key}-layer3-equal").protocol.attack
    assert (attack.crafted_on, attack.stops_at_success) == ({"2-LR": "plain", "plain": "2-LR"}, True)
    # The other network's hybrid at the noise of this one, by its own classifier.
    train = torch.from_numpy(balanced_rows(data.train_labels.numpy(), 200, 10))
    seen = activations(other, data.train_images[train].float() / 255, ["layer3"])["layer3"]
    seed = zlib.crc32(b"0/max-margin/layer3") % 2**31
    (classifier,) = max_margin_classifiers(seen, data.train_labels[train], seed=seed)
    theirs = classifier.predict(activations(other, black, ["layer3"])["layer3"]) == labels
    fooled = right & (predictions(network, black) != labels)
    hits = evaluation.figure(f"{one.key}-layer3-equal").values["2-LR"].hits
    assert abs(hits - int((theirs & fooled).sum())) <= 1


def test_what_a_hybrid_withstands_does_not_depend_on_the_scale_of_its_scores(trained, tmp_path, monkeypatch):
    made, hits = Context.max_margin, {}
    for scale in (1, 1e5):  # cross-entropy has no gradient at the larger one: its attack would leave most images

        def scaled(context, title, layer, scale=scale):
            one = made(context, title, layer)
            return dataclasses.replace(one, weight=one.weight * scale, bias=one.bias * scale)

        monkeypatch.setattr(Context, "max_margin", scaled)
        evaluation = evaluated_in(
            trained, tmp_path / str(scale), measurements=(Hybrid(24 / 255, 5),), limit=40, chunk=40, pages=False
        )
        figure = evaluation.figure("hybrid-layer3-attacked")
        hits[scale] = figure.values["2-LR"].hits
        assert figure.protocol.attack.notes == ("margin", "last iterate")
        fooled, clean = (evaluation.figure(f"hybrid-layer3-{which}").protocol for which in ("fooled", "clean"))
        assert (fooled.attack.notes[0], clean.attack) == ("cross-entropy", None)
    assert hits[1] == hits[1e5] < 25


def test_the_cushion_has_its_minimum_and_a_network_that_was_never_trained(trained, tmp_path):
    evaluation = evaluated_in(trained, tmp_path, measurements=(Cushion(True),), against=("none",), chunk=9, pages=False)
    network = load_network(str(trained))
    data = load_images(**RECIPE["data_args"])
    rows = torch.from_numpy(balanced_rows(data.test_labels.numpy(), 24, 10))
    images = data.test_images[rows].float() / 255
    twin = random_twin(network, zlib.crc32(b"0/random network") % 2**31)
    for model, ending in ((network.model, ""), (twin, "-random")):
        for layer, values in layer_cushion(model, images).items():
            median, smallest = (evaluation.figure(f"cushion-{layer}{ending}{end}") for end in ("", "-mu"))
            assert median.values["2-LR"].value == pytest.approx(float(values.quantile(0.5)), rel=1e-6)
            assert smallest.values["2-LR"].value == pytest.approx(float(values.min()), rel=1e-6)
            assert (median.kind, smallest.kind) == (Kind.CUSHION, Kind.CUSHION_MU)
    curve = next(one for one in evaluation.curves if one.key == "cushion-layer3.0.conv1")
    assert [line.name for line in curve.lines] == ["layer3.0.conv1", "layer3.0.conv1, randomly initialised"]
    own, other = network.model.network.state_dict(), twin.network.state_dict()
    assert own.keys() == other.keys()
    assert not torch.equal(own["layer3.0.conv1.weight"], other["layer3.0.conv1.weight"])
    assert torch.equal(twin.mean, network.model.mean)


def test_of_two_suites_what_one_attack_gives_is_measured_once():
    keys = [one.key for one in plan.measurements_of(plan.chosen_suites(["quick", "paper", "autoattack"]))]
    assert "pgd-madry-7+20-8-255" in keys
    assert not {"pgd-madry-20-8-255", "transfer-madry-20-8-255"} & set(keys)
    assert len(set(keys)) == len(keys)


UNITS_OF_RADII = ("pixel", "normalized")


@pytest.fixture(scope="module")
def table(trained, tmp_path_factory):
    """A table like the first in both units on 15 of 24 images; and each of its cells by itself, on all of them."""
    AcceleratorState._reset_state(True)
    output = tmp_path_factory.mktemp("table")
    grid = [
        PGDSteps(setting, eps / 255, (2, 4), unit, 15)
        for unit in UNITS_OF_RADII
        for setting, eps in (("madry", 16), ("fixed", 40), ("paper", 40))
    ]
    cells = tuple(one.part(steps, black_box=box) for one in grid for steps in (2, 4) for box in (False, True))
    together = evaluated_in(trained, output / "grid", measurements=tuple(grid), limit=24, pages=False)
    return grid, together, evaluated_in(trained, output / "cells", measurements=cells, limit=24, pages=False)


def test_one_attack_gives_every_cell_of_the_table(table):
    grid, together, cells = table
    assert len(together.figures) == 24
    assert {figure.key for figure in together.figures} == {figure.key for figure in cells.figures}
    for figure in together.figures:
        alone = cells.figure(figure.key)
        assert (figure.label, figure.kind, figure.group) == (alone.label, alone.kind, alone.group)
        assert figure.protocol.attack == alone.protocol.attack
        assert (figure.protocol.images, alone.protocol.images) == (15, 24)
        for title, value in figure.values.items():
            assert value.of == 15
            assert value.hits <= alone.values[title].hits <= value.hits + 9
    whole = [dataclasses.replace(one, images=None) for one in grid]
    assert all(one.covers(PGD(one.setting, one.eps, 4, radius_unit=one.radius_unit)) for one in whole)


def test_all_images_give_the_same_as_each_attack_alone(table, trained, tmp_path):
    grid, _, cells = table
    whole = tuple(dataclasses.replace(one, images=None) for one in grid)
    evaluation = evaluated_in(trained, tmp_path, measurements=whole, limit=24, pages=False)
    for figure in evaluation.figures:
        assert figure == cells.figure(figure.key)
    black = evaluation.figure("transfer-madry-normalized-4-16-255")
    assert black.protocol.attack.crafted_on == {"2-LR": "plain", "plain": "2-LR"}
    assert black.values != evaluation.figure("pgd-madry-normalized-4-16-255").values
    # One network by itself, with a source that is not measured.
    against = {"source": str(trained / "twin"), "measurements": whole[:1], "limit": 24, "pages": False}
    one = evaluated_in(trained, tmp_path / "one", **against)
    assert [figure.values["2-LR"] for figure in one.figures] == [
        cells.figure(figure.key).values["2-LR"] for figure in one.figures
    ]
    assert len(one.figures) == 4
    alone = evaluated_in(trained, tmp_path / "alone", **against | {"source": None, "against": ("none",)})
    assert [figure.kind for figure in alone.figures] == [Kind.ATTACK] * 2
    assert any("was not measured as a black box" in text for text in alone.warnings)


def test_units_of_a_radius_share_neither_key_nor_headline(table):
    _, evaluation, _ = table
    for figure in evaluation.figures:
        normalized = figure.protocol.attack.radius_unit == "normalized"
        assert ("normalized" in figure.key) == ("normalised" in figure.label) == normalized
        words = " ".join(phrases(figure.protocol.entries()))
        assert f"/255 {'in normalised units' if normalized else 'of the pixel range'}" in words
    assert headline(evaluation).pgd.protocol.attack.radius_unit == "pixel"
    only = [figure for figure in evaluation.figures if figure.protocol.attack.radius_unit == "normalized"]
    assert headline(dataclasses.replace(evaluation, figures=tuple(only))).pgd is None
    assert read_evaluation_of(evaluation) == evaluation


def read_evaluation_of(evaluation):
    return evaluation_from_json(json.loads(evaluation_to_json(evaluation)))


def test_a_diagnosis_in_each_unit(trained, tmp_path):
    measurements = tuple(Diagnosis(8 / 255, "quick", unit) for unit in UNITS_OF_RADII)
    evaluation = evaluated_in(trained, tmp_path, measurements=measurements, limit=30, chunk=30)
    assert set(evaluation.verdicts) == set(evaluation.normalized_verdicts) == {"2-LR", "plain"}
    for title, verdict in evaluation.normalized_verdicts.items():
        assert "in normalised units" in verdict.checks[1].says
        assert "in normalised units" not in evaluation.verdicts[title].checks[1].says
    assert read_evaluation(tmp_path / "evaluation.json") == evaluation
    page = (tmp_path / "report.html").read_text()
    assert page.count(", radii in normalised units") >= 2
    assert "radii in normalised units" in text_table(evaluation)


def test_a_diagnosis_takes_in_autoattack_of_its_radius(trained, tmp_path):
    """Whichever is measured first, and of another radius or unit not. The radius is one at which its first attack is
    enough: where images withstand them all it takes minutes."""
    measurements = (Diagnosis(0.5, "quick"), Diagnosis(0.5, "quick", "normalized"), AutoAttack("linf", 0.5))
    evaluation = evaluated_in(trained, tmp_path, measurements=measurements, limit=6, pages=False)
    for title, verdict in evaluation.verdicts.items():
        (check,) = [one for one in verdict.checks if one.name == "AutoAttack"]
        (left,) = [one.values[title] for one in evaluation.figures if one.key.startswith("autoattack-linf")]
        assert f"AutoAttack {percent(left.value)} %" in check.says
        assert check.value is not None
        (other,) = [one for one in evaluation.normalized_verdicts[title].checks if one.name == "AutoAttack"]
        assert "was not run" in other.says


def test_units_cover_every_image_once():
    context = SimpleNamespace(networks=dict.fromkeys("ab"), images=range(7), chunk=3, other=lambda title: None)
    measurements = [Clean(), PGD("madry", 8 / 255, 2, black_box=True), AdversarialStrip("pgd")]
    units = plan_units(context, measurements)
    assert units == [(key, title, k) for title in "ab" for key, n in (("clean", 3), ("strip-pgd", 1)) for k in range(n)]
