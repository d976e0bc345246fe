"""Comparing finished runs, on real digits."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState

from timm_lowrank.training import Recipe, RunError, train
from timm_lowrank.training.compare import measure_run

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run of a small network with its plain twin."""
    output = tmp_path_factory.mktemp("runs") / "low"
    recipe = {
        "name": "low",
        "model": "resnet10_cifar",
        "model_args": {"channels": [8, 8, 16, 16]},
        "data_args": {"train_limit": 450, "test_limit": 100},
        "lowrank": {"branches": {"layer3": 6, "pre_logits": 4}, "warmup_updates": 5},
        "epochs": 4,
        "pretrain_epochs": 1,
        "batch_size": 64,
        "schedule": "cosine",
        "augment": "crop",
        "twin": True,
    }
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    train(Recipe.from_dict(recipe), output)
    return output


def test_the_figures_are_those_of_the_run(run):
    figures = measure_run(run, (2, 5), noise=0.0, limit=300)
    summary = json.loads((run / "summary.json").read_text())
    ratios = summary["branches"]["layer3"]["variance_ratio"]
    assert list(figures)[:2] == ["clean", "noise 0"]
    assert figures["clean"] == pytest.approx(summary["clean_accuracy"], abs=1e-6)
    assert figures["noise 0"] == figures["clean"]
    assert figures["layer3 variance 5"] == pytest.approx(ratios["5"], abs=1e-4)
    assert figures["pre_logits variance 2"] < figures["pre_logits variance 5"] <= 1
    assert 0.1 < figures["pre_logits linear 5"] <= 1


def test_noise_is_noticed_and_repeats(run):
    first, second = (measure_run(run, (5,), noise=1.0, limit=100) for _ in range(2))
    assert first == second
    assert first["noise 1"] < first["clean"]


def test_the_script_puts_twins_side_by_side(run, tmp_path):
    # The plain run is asked for a layer that only the other one names.
    shutil.copytree(run / "twin", tmp_path / "plain")
    summary = json.loads((tmp_path / "plain" / "summary.json").read_text())
    del summary["branches"]["layer3"]
    (tmp_path / "plain" / "summary.json").write_text(json.dumps(summary))
    command = [
        sys.executable,
        ROOT / "recipes" / "compare.py",
        tmp_path / "plain",
        run,
        "--json",
        tmp_path / "figures.json",
    ]
    done = subprocess.run([*map(str, command), "--limit", "200"], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["run", "plain", "low"]
    assert next(line for line in lines if line.startswith("layer3 linear 10")).count(".") == 2  # a figure for each run
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert set(figures) == {str(run), str(tmp_path / "plain")}


def test_an_unfinished_run_is_named(tmp_path):
    with pytest.raises(RunError, match=r"it is no run"):
        measure_run(tmp_path, (5,), noise=0.4, limit=10)
