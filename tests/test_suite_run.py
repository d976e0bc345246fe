"""Whole evaluations on real digits: what they leave, that kills and processes change no figure, and how they fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState

from timm_lowrank.errors import EvaluationError
from timm_lowrank.evaluation.results import evaluation_from_json
from timm_lowrank.report import text_table
from timm_lowrank.suites import Options, evaluate, join_processes
from timm_lowrank.suites.measurements.accuracy import PGD, Clean
from timm_lowrank.suites.measurements.base import median, radius_text, share
from timm_lowrank.suites.measurements.diagnosis import Diagnosis
from timm_lowrank.suites.plan import SUITES, chosen_suites, measurements_of
from timm_lowrank.suites.runner import plan_units
from timm_lowrank.training import Recipe, RunError, train

ROOT = Path(__file__).parents[1]
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
VARIES = ("created", "seconds", "processes", "command")


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A 2-LR run with its plain twin."""
    AcceleratorState._reset_state(True)
    output = tmp_path_factory.mktemp("runs") / "2-LR"
    train(Recipe.from_dict(RECIPE), output)
    return output


@pytest.fixture
def small(monkeypatch):
    """A suite of a second: one measurement of each kind, chunked and whole, with and without a second network."""
    from timm_lowrank.suites import plan

    def measurements():
        quick = plan.SUITES["quick"].measurements()
        wanted = ("clean", "pgd-madry-20-8-255", "transfer", "noise-standard-deviation-1", "spectrum", "compression")
        return [measurement for measurement in quick if measurement.key.startswith(wanted)]

    monkeypatch.setitem(plan.SUITES, "small", plan.Suite(measurements, 40, 200))
    return ("small",)


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    """The quick suite on 24 images, in pieces of 16, never interrupted."""
    AcceleratorState._reset_state(True)
    output = tmp_path_factory.mktemp("whole")
    return output, evaluate(options(trained, output), PartialState())


def options(run, output, **changes):
    return Options(str(run), **{"limit": 24, "train_limit": 200, "chunk": 16, "output": output, **changes})


def command(run, output, *more):
    return [
        str(ROOT / "recipes" / "evaluate.py"), str(run), "--output", str(output), "--limit", "24",
        "--train-limit", "200", "--batch-size", "16", *more,
    ]  # fmt: skip


def figures(folder):
    content = json.loads((folder / "evaluation.json").read_text())
    return {key: value for key, value in content.items() if key not in VARIES}


# -------------------------------------------------------------------------------------------------- what is left there


def test_an_evaluation_leaves_report_plots_and_figures(evaluated):
    output, content = evaluated
    assert json.loads((output / "evaluation.json").read_text()) == content
    assert (output / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert {path.suffix for path in (output / "plots").rglob("*.*")} == {".png"}
    assert not list(output.glob("*.partial*"))
    assert [network["title"] for network in content["networks"]] == ["2-LR", "plain"]
    assert content["data"]["images"] == 24
    assert set(content["verdicts"]) == {"2-LR", "plain"}
    found = {figure["key"]: figure for figure in content["figures"]}
    assert len(found) == len(content["figures"])
    for figure in content["figures"]:
        assert figure["protocol"]["seed"] == 0
        assert figure["protocol"]["images"] == 24
        assert set(figure["values"]) == {"2-LR", "plain"}
    attack = found["pgd-madry-20-8-255"]["protocol"]
    assert attack["eps"] == "8/255"
    assert attack["step_size"] == "2/255"
    assert attack["steps"] == 20
    assert attack["restarts"] == 1
    assert found["transfer-madry-20-8-255"]["protocol"]["crafted_on"] == "plain for 2-LR; 2-LR for plain"
    table = text_table(evaluation_from_json(content))
    assert "PGD-20, 8/255" in table
    assert all(len(line) <= 100 for line in table.splitlines())


def test_figures_are_those_of_the_networks(trained, evaluated):
    """Recomputed by hand from the exported weights: clean accuracy and PGD, an image alone in its batch."""
    import timm

    import timm_lowrank as tlr
    from timm_lowrank.data.images import balanced_rows
    from timm_lowrank.training import load_images

    _, content = evaluated
    data = load_images(**RECIPE["data_args"])
    rows = torch.from_numpy(balanced_rows(data.test_labels.numpy(), 24, 10))
    images, labels = data.test_images[rows].float() / 255, data.test_labels[rows]
    network = timm.create_model(f"local-dir:{trained / 'model'}", pretrained=True).eval()
    model = tlr.evaluation.PixelModel(network)
    right = [int(model(image[None]).argmax()) == int(label) for image, label in zip(images, labels, strict=True)]
    values = {figure["key"]: figure["values"]["2-LR"] for figure in content["figures"]}
    assert values["clean"]["hits"] == sum(right)
    assert sum(right) >= 8
    radius = [values[f"pgd-madry-20-{level}-255"]["hits"] for level in (2, 4, 8)]
    assert sum(right) >= radius[0] >= radius[1] >= radius[2]
    assert values["noise-standard-deviation-0.4"]["of"] == 24


def test_the_same_command_again_does_nothing_and_another_is_refused(trained, evaluated, capsys):
    output, content = evaluated
    before = (output / "evaluation.json").stat().st_mtime_ns
    assert evaluate(options(trained, output), PartialState()) == content
    assert "is complete" in capsys.readouterr().out
    with pytest.raises(EvaluationError, match="--overwrite"):
        evaluate(options(trained, output, seed=1), PartialState())
    assert (output / "evaluation.json").stat().st_mtime_ns == before


def test_several_networks_and_none(trained, tmp_path, small):
    alone = evaluate(options(trained, tmp_path / "alone", against=("none",), suites=small), PartialState())
    assert [network["title"] for network in alone["networks"]] == ["2-LR"]
    assert any("transfer-madry-20-8-255 was not measured" in text for text in alone["warnings"])
    assert not any(figure["key"].startswith("transfer") for figure in alone["figures"])
    with pytest.raises(EvaluationError, match="same weights"):
        evaluate(options(trained, tmp_path / "same", against=(str(trained / "model"),)), PartialState())


def test_one_image_is_enough(trained, tmp_path, small):
    content = evaluate(options(trained, tmp_path / "one", limit=1, suites=small), PartialState())
    keys = {figure["key"] for figure in content["figures"]}
    assert {"clean", "pgd-madry-20-8-255", "compression-layer3-all"} <= keys
    assert any("spectrum was not measured" in text for text in content["warnings"])


# ------------------------------------------------------------------------------------- kills, processes, full disks


def test_a_kill_at_any_moment_changes_nothing(trained, evaluated, tmp_path):
    output = tmp_path / "killed"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    units = 0
    for _ in range(60):
        process = subprocess.Popen(
            [sys.executable, *command(trained, output)], env=environment,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        grown = _wait_for_more(process, output / "evaluation.json.partial", units)
        if grown is None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert grown > units
        units = grown + 22
    assert units > 15  # it was killed more than once
    assert figures(output) == figures(evaluated[0])
    assert not list(output.glob("*.partial*"))


def _wait_for_more(process, journal, units):
    """The number of lines of the journal once it has more than `units`; None if the process ends before that."""
    while process.poll() is None:
        lines = journal.read_bytes().count(b"\n") if journal.exists() else 0
        if lines > units:
            return lines
        time.sleep(0.02)
    assert process.returncode == 0
    return None


def test_two_processes_give_the_figures_of_one(trained, evaluated, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    result = subprocess.run(
        [*launch, "--main_process_port", "0", *command(trained, tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "evaluation.json").read_text())["processes"] == 2
    assert figures(tmp_path) == figures(evaluated[0])
    assert not list(tmp_path.glob("*.partial*"))


def test_processes_that_form_no_group_stop(trained, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr("timm_lowrank.suites.runner.Accelerator", lambda **settings: None)
    with pytest.raises(EvaluationError, match="torchrun --nproc_per_node"):
        join_processes()


def test_a_full_disk_keeps_what_is_finished(trained, tmp_path, monkeypatch, small):
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 6:
            raise OSError(28, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(RunError, match="No space left"):
            evaluate(options(trained, tmp_path / "out", suites=small), PartialState())
    assert (tmp_path / "out" / "evaluation.json.partial").read_text().count("\n") >= 6
    evaluate(options(trained, tmp_path / "out", suites=small), PartialState())
    evaluate(options(trained, tmp_path / "whole", suites=small), PartialState())
    assert figures(tmp_path / "out") == figures(tmp_path / "whole")


# ---------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"suites": ("paper", "qick")}, r"no suite qick.*quick, paper, autoattack"),
        ({"chunk": 0}, "--batch-size must be at least 1"),
        ({"limit": 0}, "--limit and --train-limit must be at least 1"),
        ({"network": "nowhere/at/all"}, "neither a folder here nor a network"),
        ({"network": "./nowhere"}, "is no run folder"),
        ({"against": ("./nowhere",)}, "is no run folder"),
    ],
)
def test_mistakes_are_one_error_before_anything_is_written(trained, tmp_path, changes, message):
    settings = {"network": str(trained), "limit": 5, "output": tmp_path / "out", **changes}
    with pytest.raises(EvaluationError, match=message):
        evaluate(Options(**settings), PartialState())
    assert not (tmp_path / "out").exists()


def test_a_damaged_or_unfinished_run_says_so(trained, tmp_path):
    import shutil

    unfinished = shutil.copytree(trained, tmp_path / "unfinished")
    (unfinished / "summary.json").unlink()
    with pytest.raises(EvaluationError, match="not finished"):
        evaluate(options(unfinished, tmp_path / "out"), PartialState())
    damaged = shutil.copytree(trained, tmp_path / "damaged")
    weights = damaged / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(EvaluationError, match="cannot be loaded"):
        evaluate(options(damaged, tmp_path / "out"), PartialState())
    (tmp_path / "empty").mkdir()
    with pytest.raises(EvaluationError, match="neither a finished run nor a checkpoint"):
        evaluate(options(tmp_path / "empty", tmp_path / "out"), PartialState())
    with pytest.raises(EvaluationError, match="give --data"):
        evaluate(options(trained / "model", tmp_path / "out", against=("none",)), PartialState())


def test_a_checkpoint_without_its_run_takes_data_by_name(trained, tmp_path, small):
    content = evaluate(options(trained / "model", tmp_path, data="digits", limit=10, suites=small), PartialState())
    assert content["data"]["source"] == "digits"
    assert content["networks"][0]["branches"] == {"layer3": 6, "pre_logits": 4}


def test_a_command_line_mistake_is_one_line(tmp_path):
    result = subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "evaluate.py"), str(tmp_path / "nothing")],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 1
    assert result.stderr.strip().startswith("error:")
    assert "Traceback" not in result.stderr


# -------------------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("suite", SUITES)
def test_every_measurement_of_a_suite_has_a_name_of_its_own(suite):
    measurements = SUITES[suite].measurements()
    keys = [measurement.key for measurement in measurements]
    assert len(set(keys)) == len(keys)
    assert {measurement.key for measurement in measurements_of(chosen_suites([suite]))} == set(keys)
    json.dumps([measurement.settings() for measurement in measurements])


def test_units_cover_every_image_once(trained):
    class Fake:
        subjects = {"a": None, "b": None}
        images = torch.zeros(7, 1, 1, 1)
        chunk = 3

        def other(self, title):
            return None

    measurements = [Clean(), PGD("madry", 8 / 255, 2, black_box=True), SUITES["quick"].measurements()[-1]]
    units = plan_units(Fake(), measurements)
    assert units == [(key, title, k) for title in "ab" for key, n in (("clean", 3), ("strip-pgd", 1)) for k in range(n)]


def test_figures_are_counts_medians_and_radii():
    assert share([True, True, False])["hits"] == 2
    assert share([])["of"] == 0
    assert share([True] * 50)["high"] == pytest.approx(1.0)
    middle = median([float(k) for k in range(101)])
    assert middle["value"] == 50
    assert middle["low"] < 50 < middle["high"]
    assert median([float("nan"), 2.0])["of"] == 1
    assert [radius_text(eps) for eps in (8 / 255, 0.5, 1.5 / 255, 0.0)] == ["8/255", "0.5", "1.5/255", "0"]


def test_too_few_images_for_a_verdict_are_a_warning(trained, tmp_path, monkeypatch):
    from timm_lowrank.suites import plan

    monkeypatch.setitem(plan.SUITES, "verdict", plan.Suite(lambda: [Clean(), Diagnosis(8 / 255, "quick")], 3, 10))
    content = evaluate(options(trained, tmp_path, limit=3, suites=("verdict",), against=("none",)), PartialState())
    assert content["verdicts"] == {}
    assert any("no verdict on gradient masking" in text for text in content["warnings"])
    assert (tmp_path / "report.html").exists()


def test_a_measurement_that_fails_leaves_the_others(trained, tmp_path, monkeypatch, small):
    from timm_lowrank.suites.measurements import noise

    def broken(*arguments, **settings):
        raise EvaluationError("no noise today")

    monkeypatch.setattr(noise, "pixel_noise", broken)
    content = evaluate(options(trained, tmp_path, limit=10, suites=small), PartialState())
    assert any("noise-standard-deviation-1 was not measured: no noise today" in text for text in content["warnings"])
    assert any(figure["key"] == "clean" for figure in content["figures"])
