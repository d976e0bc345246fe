"""Whole runs on real digits: what a run leaves, that it resumes bit for bit, and how it fails."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import resource
import shutil
import signal
import time
import types
from pathlib import Path

import forked
import numpy as np
import pytest
import timm
import torch
import yaml
from parquet_images import TARGET, write
from pictures import RUNS, undrawn
from processes.worker import free_port
from runs import assert_same_run, metrics
from safetensors.torch import load_file
from torch.nn import functional

import timm_lowrank
from timm_lowrank.core.views import FLATTEN, View
from timm_lowrank.data import load_data, load_images
from timm_lowrank.data.augment import Transform
from timm_lowrank.data.batches import StreamTrainBatches, TrainBatches
from timm_lowrank.environment import fast_precision
from timm_lowrank.errors import DataError, DivergedError, ProcessLostError, RecipeError, RunError, TrainingError
from timm_lowrank.files import exclusive
from timm_lowrank.suites.networks import load_network
from timm_lowrank.training import Recipe, Run, experiment, load_recipe, loop, report, train
from timm_lowrank.training import state as state_module
from timm_lowrank.training.checkpoints import damage, seal
from timm_lowrank.training.compare import compare_runs
from timm_lowrank.training.loop import Means, TrainedEpoch, check_alive, check_not_at_chance
from timm_lowrank.training.report import layer_spectra
from timm_lowrank.training.run import RunFolder, changed_settings, recipe_of, settings, unlike_twin
from timm_lowrank.training.state import build, seeded

CPU = torch.device("cpu")

# Seven steps an epoch and a projection every ten updates: epochs end between two projections.
SMALL = {
    "name": "small",
    "model": "resnet10_cifar",
    "model_args": {"channels": [8, 8, 16, 16]},
    "data_args": {"train_limit": 230, "test_limit": 100},
    "lowrank": {"branches": {"layer3": 6, "pre_logits": 4}, "warmup_updates": 3},
    "epochs": 5,
    "pretrain_epochs": 2,
    "batch_size": 32,
    "learning_rate": 0.05,
    "schedule": "cosine",
    "augment": "crop",
    "keep_checkpoints": 9,
}
# With batches of 16 and 115 images in shards, seven steps an epoch again.
STREAMED = {
    "epochs": 3,
    "pretrain_epochs": 1,
    "batch_size": 16,
    "keep_checkpoints": 99,
    "streaming": True,
    "shuffle_buffer": 30,
    "workers": 0,
    "spectrum_images": 20,
}
LARGE = {"image_size": 16, "augment": "crop-flip", "save_every_steps": 3, "workers": 2}
VIT = {
    "model": "vit_tiny_patch16_224",
    "model_args": {"img_size": 8, "patch_size": 4, "depth": 2, "embed_dim": 24},
    "lowrank": {"branches": {"blocks.0": 6}, "warmup_updates": 3},
    "optimizer": "adamw",
    "weight_decay": 0.05,
}
# Three steps an epoch, where what is tested does not depend on what is learned.
SHORT = {
    "data_args": {"train_limit": 100, "test_limit": 40},
    "lowrank": SMALL["lowrank"] | {"warmup_updates": 1},
    "epochs": 2,
    "pretrain_epochs": 0,
}

pytestmark = pytest.mark.usefixtures("fresh_accelerate", "undrawn_pictures")


def recipe(**values) -> Recipe:
    return Recipe.from_dict({**SMALL, **values})


@pytest.fixture
def undrawn_pictures(monkeypatch):
    """Those of `finished` are drawn."""
    monkeypatch.setattr(RUNS, undrawn)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Shards that nobody changes: 115 training images in ten row groups, and 28 test images."""
    folder = tmp_path_factory.mktemp("data")
    for number, rows in enumerate((range(45), range(45, 90), range(90, 115))):
        write(folder / f"train-{number:05d}-of-00003.parquet", rows, group=13)
    write(folder / "validation-00000-of-00001.parquet", range(230, 258), group=10)
    return folder


def streamed(shards: Path, **values) -> Recipe:
    statistics = {"test_split": "validation", "mean": [0.3], "std": [0.37]}
    return recipe(**{"data": str(shards), "data_args": statistics, **STREAMED, **values})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that was never interrupted, with its twin and an average of its weights."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    return output, train(recipe(twin=True, ema_decay=0.9), output)


def copy(finished, tmp_path: Path) -> Path:
    """The finished run in a folder of its own."""
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


def normalised_test_images() -> tuple[torch.Tensor, torch.Tensor]:
    data = load_images(**SMALL["data_args"])
    return (data.test_images.float() / 255 - data.mean[0]) / data.std[0], data.test_labels


# ------------------------------------------------------------------------------------------------ a run and its twin


def test_a_run_leaves_what_it_promises(finished):
    output, summary = finished
    names = "config.yaml metrics.csv summary.json spectrum.json plots/spectrum.png model/config.json"
    assert all((run / name).is_file() for name in names.split() for run in (output, output / "twin"))
    assert json.loads((output / "summary.json").read_text()) == summary.to_dict()
    assert yaml.safe_load((output / "config.yaml").read_text())["lowrank"] == SMALL["lowrank"]
    assert (output / "plots" / "spectrum.png").read_bytes()[1:4] == b"PNG"
    assert [path.name for path in sorted((output / "checkpoints").iterdir())] == [f"epoch_000{n}" for n in range(1, 6)]
    assert (summary.optimizer_steps, summary.epochs, summary.weights, summary.seed) == (35, 5, "averaged", 0)
    assert min(summary.seconds, summary.images_per_second) > 0
    assert summary.data.fingerprint == load_images(**SMALL["data_args"]).fingerprint
    assert summary.versions["torch"] == torch.__version__
    assert not list(output.rglob("*.partial"))


def test_two_processes_train_a_run_after_its_twin_and_test_the_network_that_is_exported(tmp_path):
    """Each of them has seen other images, and its BatchNorms other statistics."""
    data_args = SMALL["data_args"] | {"train_limit": 96}
    values = {"epochs": 2, "pretrain_epochs": 1, "batch_size": 32, "data_args": data_args, "twin": True}
    made, output = recipe(**values, lowrank=SMALL["lowrank"] | {"warmup_updates": 0}), tmp_path / "run"
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(made.to_dict()))
    trained = ("train", "--config", tmp_path / "small.yaml", "--output", output)
    joined = {"ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_MULTI_GPU": "true"}
    logs = [tmp_path / "log0", tmp_path / "log1"]
    both = zip(logs, forked.ranks(2, free_port()), strict=True)
    forked.finish(*(forked.command(*trained, log=log, environment=told | joined) for log, told in both), logs=logs)
    data = load_images(**data_args)
    images, labels = (data.test_images.float() / 255 - data.mean[0]) / data.std[0], data.test_labels
    for folder in (output, output / "twin"):
        run = Run.open(folder)
        with torch.no_grad():
            logits = timm_lowrank.from_pretrained(run.model, lowrank=False).eval()(images)
        assert run.summary.processes == 2
        assert run.summary.losses.test == pytest.approx(float(functional.cross_entropy(logits, labels)), abs=2e-5)
        assert run.summary.clean_accuracy == pytest.approx(float((logits.argmax(1) == labels).float().mean()))


def test_the_summary_measures_the_exported_network(finished):
    output, summary = finished
    config = json.loads((output / "model" / "config.json").read_text())
    assert config["label_names"] == list("0123456789")
    assert config["pretrained_cfg"]["input_size"] == [1, 8, 8]
    assert config["pretrained_cfg"]["mean"] == list(load_images(**SMALL["data_args"]).mean)
    network = timm.create_model("resnet10_cifar", num_classes=config["num_classes"], **config["model_args"]).eval()
    network.load_state_dict(load_file(output / "model" / "model.safetensors"))
    images, labels = normalised_test_images()
    model = timm_lowrank.wrap(network, recipe().lowrank_config(), example_input=images[:2])
    with torch.no_grad(), model.capture() as activations:
        accuracy = (model(images).argmax(1) == labels).float().mean().item()
    assert summary.clean_accuracy == pytest.approx(accuracy, abs=1e-6)
    for layer, branch in summary.branches.items():
        values = activations[layer].flatten(1).double()
        held = torch.linalg.svdvals(values - values.mean(0)).square().cumsum(0)
        held = held / held[-1]
        for count in (1, 5, 10):
            assert branch.variance_ratio[count] == pytest.approx(held[count - 1].item(), abs=1e-5)
        assert branch.variance_ratio[500] == 1.0
        assert branch.effective_rank == int((held < 0.99).sum()) + 1
        assert (branch.features, branch.target_rank) == (values.shape[1], SMALL["lowrank"]["branches"][layer])


def test_sketched_spectra_agree_with_the_exact_ones(finished):
    model, images = timm_lowrank.from_pretrained(finished[0]), normalised_test_images()
    batches = list(zip(*(part.split(30) for part in images), strict=True))
    exact = layer_spectra(model, batches, None)
    assert exact.keys() == finished[1].branches.keys()
    # Nothing may be held: layer3 has 64 features, and a sketch of 5 is too small to certify its effective rank.
    for size, tolerance in ((64, 1e-5), (5, 0.05)):
        sketched = layer_spectra(model, batches, None, held_bytes=0, sketch_size=size)
        for layer, spectrum in exact.items():
            for count, ratio in spectrum.variance_ratio.items():
                assert 0 <= ratio - sketched[layer].variance_ratio[count] + 1e-6 <= tolerance
            assert sketched[layer].shares[:5] == pytest.approx(spectrum.shares[:5], abs=tolerance)
            assert 0 <= sketched[layer].effective_rank - spectrum.effective_rank <= 2


def test_metrics_have_a_row_an_epoch_and_empty_cells_while_the_branch_is_off(finished):
    rows = metrics(finished[0])
    assert [row["epoch"] for row in rows] == list("12345")
    for row in rows:
        on = int(row["epoch"]) > 2
        assert bool(row["penalty"]) is on
        assert all(bool(row[f"layer3.{part}"]) is on for part in ("reconstruction", "outside", "rank"))
        assert row["penalty_weight"] == ("1" if on else "0")
        assert float(row["ema_test_accuracy"]) >= 0
    summary = finished[1].branches["layer3"].losses
    assert summary.keys() >= {"reconstruction", "gradient_share", "outside"}
    assert 0 < summary["outside"] < 1
    assert summary["rank"] >= SMALL["lowrank"]["branches"]["layer3"]  # the last epoch ends between two projections
    assert summary == {part: float(rows[-1][f"layer3.{part}"]) for part in summary}


def test_the_twin_starts_alike_and_has_no_branch(finished):
    output, summary = finished
    both, twin = (metrics(output), metrics(output / "twin")), summary.twin
    shared = ("learning_rate", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "ema_test_accuracy")
    for name in shared:
        assert [row[name] for row in both[0][:2]] == [row[name] for row in both[1][:2]]
    assert both[0][2]["train_loss"] != both[1][2]["train_loss"]
    assert "penalty" not in both[1][0]
    assert not (output / "twin" / "model" / "lowrank.json").exists()
    assert (twin.lowrank, twin.branches["layer3"].target_rank) == (False, None)
    assert twin.branches.keys() == summary.branches.keys()
    for layer, branch in summary.branches.items():
        assert branch.variance_ratio[5] > twin.branches[layer].variance_ratio[5]


def test_the_twin_of_a_network_of_tokens_is_measured_on_tokens_too(tmp_path, capsys):
    values = {**VIT, "epochs": 3, "pretrain_epochs": 1, "learning_rate": 0.002}
    summary = train(recipe(**values, twin=True), tmp_path / "run")
    table = capsys.readouterr().out
    assert "blocks.0: 24 features of each token, target rank 6" in table
    tokens = View("token", -1)
    assert summary.branches["blocks.0"].view == summary.twin.branches["blocks.0"].view == tokens
    assert Run.open(tmp_path / "run").summary == summary
    # Alone, too: an evaluation of the twin knows of no branch.
    twin, run = load_network(str(tmp_path / "run" / "twin")), load_network(str(tmp_path / "run"))
    assert not twin.branches
    assert twin.views == run.views == {"blocks.0": tokens}
    # Figures of other samples are not set side by side: runs of earlier versions do not say which theirs are of.
    flattened = dataclasses.replace(summary.twin.branches["blocks.0"], view=FLATTEN)
    other = dataclasses.replace(summary.twin, branches={"blocks.0": flattened})
    lines = report.table({"plain": other, "low rank": summary}).splitlines()
    rank = next(line for line in lines if "effective" in line)
    assert rank.split()[2:] == ["-", str(summary.branches["blocks.0"].effective_rank)]


def test_an_existing_plain_run_serves_as_twin(finished, tmp_path, capsys):
    output, whole = finished
    plain = str(output / "twin")
    summary = train(recipe(twin=plain, ema_decay=0.9), tmp_path / "run")
    assert (summary.twin, summary.twin_folder) == (whole.twin, plain)
    assert_same_run(tmp_path / "run", output)
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    shown = [f"{100 * run.clean_accuracy:.1f}" for run in (whole.twin, summary)]
    heading = printed.index(["plain", "low", "rank"])
    assert printed[heading + 1] == ["test", "accuracy", shown[0], "%", shown[1], "%"]
    for twin, changed, message in [
        (plain, {"epochs": 9}, r"was not trained alike, so it is no twin \(epochs was \d and is 9\): set twin=true"),
        (plain, {"ema_decay": None, "seed": 1}, "no twin .ema_decay was 0.9 and is None; seed was 0 and is 1."),
        (plain, {"data_args": {"train_limit": 400}}, "no twin .data_args was "),
        (str(output), {}, "is not a plain run"),
        (str(tmp_path), {}, "holds no finished run"),
    ]:
        with pytest.raises(RunError, match=message):
            train(recipe(twin=twin, **{"ema_decay": 0.9, **changed}), tmp_path / "other")
    with pytest.raises(RunError, match="was trained on other data"):
        train(recipe(twin=plain, ema_decay=0.9), tmp_path / "other", data=load_data("digits", train_limit=400))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("keys", "differ"),
    [
        ({"name": "other", "save_every": 7, "workers": 0, "lowrank": {"branches": "1-LR"}, "pretrain_epochs": 1}, []),
        ({"image_size": 16}, ["image_size was 32 and is 16"]),
        ({"data_args": {"mode": "grey"}}, ["data_args was {} and is {'mode': 'grey'}"]),
        ({"model_args": {"channels": [8]}}, ["model_args was {} and is {'channels': [8]}"]),
        ({"comparator": "snip", "comparator_args": {"sparsity": 0.5}}, []),
    ],
)
def test_a_twin_is_trained_by_the_same_recipe_without_branches(keys, differ):
    made = {"model": "resnet18", "data": "a/b", "epochs": 4, "image_size": 32}
    plain = Recipe.from_dict({**made, "data": "a copy", "lowrank": {"enabled": False}})
    assert unlike_twin(Recipe.from_dict({**made, "twin": True, **keys}), plain) == differ
    assert unlike_twin(Recipe.from_dict(made), Recipe.from_dict(made)) == ["lowrank.enabled was true and is false"]


def test_settings_are_what_decides_a_training_and_is_not_at_its_default():
    made = {"model": "resnet10_cifar", "epochs": 3, "lowrank": {"branches": {"layer3": 8}}}
    aside = {"name": "mine", "data": "there", "seed": 4, "workers": 2, "compile": True, "save_every": 2}
    recipe = Recipe.from_dict({**made, **aside, "milestones": [2], "weight_decay": 5e-4})
    assert settings(recipe) == {**made, "milestones": [2]}
    assert changed_settings(recipe, Recipe.from_dict({**made, "milestones": [2], "momentum": 0.8})) == [
        "momentum was 0.9 and is 0.8"
    ]
    on = Recipe.from_dict({**made, "lowrank": {**made["lowrank"], "enabled": True}, "pretrain_epochs": 1})
    assert changed_settings(on, Recipe.from_dict(made)) == ["pretrain_epochs was 1 and is 0"]
    assert changed_settings(on.plain(), Recipe.from_dict(made).plain()) == []  # no plain network has them
    assert changed_settings(on.plain(), on) != []


def test_settings_that_mean_the_same_do_not_differ_and_ranks_of_bottlenecks_do():
    made = {"model": "resnet10_cifar", "epochs": 3, "seed": 4}
    lowrank = {"branches": {"layer3": 8, "pre_logits": {"rank": 4, "head_weight": 1.0}}}
    recipe = Recipe.from_dict({**made, "lowrank": lowrank})
    branches = {"layer3": {"rank": 8, "view": None}, "pre_logits": lowrank["branches"]["pre_logits"]}
    said = {"branches": branches, "strength": "standard", "enabled": True, "seed": 4}
    assert changed_settings(Recipe.from_dict({**made, "lowrank": said}), recipe) == []
    said = {**lowrank, "seed": 3, "strength": "light"}
    assert changed_settings(Recipe.from_dict({**made, "lowrank": said}), recipe) == [
        "lowrank.strength was 'light' and is 'standard'",
        "lowrank.seed was 3 and is None",
    ]
    spelled = Recipe.from_dict({**made, "lowrank": {"branches": {"pre_logits": 100}}})
    assert changed_settings(spelled, Recipe.from_dict({**made, "lowrank": {"branches": "1-LR"}})) == []
    bottled = Recipe.from_dict({**made, "lowrank": lowrank, "comparator": "bottleneck"})
    narrow = {**made, "lowrank": {"branches": {"layer3": 2}}}
    (changed,) = changed_settings(Recipe.from_dict({**narrow, "comparator": "bottleneck"}), bottled)
    assert changed.startswith("comparator_args.branches was {'layer3': 2} and is {'layer3': 8, ")
    pruned = Recipe.from_dict({**narrow, "comparator": "snip", "comparator_args": {"sparsity": 0.7}})  # its default
    assert changed_settings(pruned, Recipe.from_dict({**made, "lowrank": lowrank, "comparator": "snip"})) == []
    for one in (recipe, bottled, pruned):
        assert changed_settings(recipe_of(settings(one)), one) == []


def test_what_of_a_schedule_has_no_effect_is_said(tmp_path, capsys):
    train(recipe(**SHORT | {"epochs": 1}, milestones=[1], schedule="step"), tmp_path / "run")
    assert "note: milestones 1 have no effect in epochs=1" in capsys.readouterr().out


def test_the_home_of_a_twin_is_found(finished, monkeypatch):
    monkeypatch.setenv("HOME", str(finished[0]))
    assert experiment._plain_run(recipe(twin="~/twin", ema_decay=0.9), "~/twin")[0] == finished[1].twin


def test_the_same_images_in_the_same_order_give_the_same_weights(shards, tmp_path, monkeypatch):
    made = streamed(shards, epochs=2, augment="none", workers=1)
    data = load_data(made.data, **made.data_options())
    summary = train(made, tmp_path / "streamed")
    assert summary.to_dict()["data"] == {
        "source": str(shards), "fingerprint": data.fingerprint, "train_images": 115, "test_images": 28,
        "streamed": True, "image_size": [1, 8, 8], "classes": 10, "origin": "folder",
    }  # fmt: skip
    # In memory, with nothing changed but the order.
    transform = Transform([0.0], [1.0], "none", torch.device("cpu"))
    batches = StreamTrainBatches(data, transform, torch.device("cpu"), batch_size=16, buffer=30)
    monkeypatch.setattr(TrainBatches, "indices", lambda _, epoch: batches.indices(epoch))
    train(streamed(shards, epochs=2, augment="none", streaming=False), tmp_path / "memory")
    assert_same_run(tmp_path / "streamed", tmp_path / "memory")


def test_sums_of_one_process_are_taken_up_by_two():
    before, (one, two) = Means(CPU, 3), (Means(CPU, 3), Means(CPU, 3))
    before.add({"layer.gradient_share": torch.tensor(0.5)}, 4)  # what the first step of an epoch alone adds
    before.add({"loss": torch.tensor(2.0), "accuracy": torch.tensor(0.25)}, 4)
    before.count(torch.tensor([0, 2, 2, 2]))
    one.add_state_dict(before.state_dict())
    two.add_state_dict(before.state_dict(), names_alone=True)
    for means, loss in ((one, 1.0), (two, 3.0)):
        means.add({"loss": torch.tensor(loss), "accuracy": torch.tensor(1.0)}, 2)
        means.count(torch.tensor([0, 1]))
    assert one.now("loss", "penalty") == {"loss": (2.0 * 4 + 1.0 * 2) / 6}
    given: list[torch.Tensor] = []
    recording = types.SimpleNamespace(reduce=lambda tensor, _: given.append(tensor) or torch.ones_like(tensor))
    names = [list(means.over_processes(recording)) for means in (one, two)]
    together = types.SimpleNamespace(reduce=lambda tensor, _: given[0] + given[1])
    assert names[0] == names[1]
    assert one.over_processes(together) == {"accuracy": 0.625, "layer.gradient_share": 0.5, "loss": 2.0}
    assert (one.state_dict()["labels"], two.state_dict()["labels"]) == ([2, 1, 3], [1, 1, 0])


# ------------------------------------------------------------------------------------------- a finished run, read


def test_a_finished_run_reads_as_what_was_written(finished):
    output, summary = finished
    run = Run.open(output)
    assert run.recipe == recipe(twin=True, ema_decay=0.9)
    assert run.summary == summary
    assert (run.summary.twin, run.summary.twin_folder) == (Run.open(run.twin).summary, "twin")
    assert list(timm_lowrank.from_pretrained(run.model).branches) == list(run.summary.branches)
    for layer, shares in run.spectrum().items():
        assert sum(shares[:5]) == pytest.approx(summary.branches[layer].variance_ratio[5], abs=1e-4)
    last = run.metrics()[-1]
    assert (last.epoch, last.train_loss, last.penalty) == (5, summary.losses.train, summary.losses.penalty)
    assert last.branches["layer3"] == summary.branches["layer3"].losses
    assert run.metrics()[0].branches["layer3"] == dict.fromkeys(last.branches["layer3"])
    assert Run.open(run.twin).metrics()[-1].branches == {}


def test_what_is_no_finished_run_or_damaged_is_one_clear_error(finished, tmp_path):
    output = copy(finished, tmp_path)
    for name, content, message in [
        ("metrics.csv", "epoch\nx\n", "metrics.csv is damaged"),
        ("metrics.csv", b"epoch\n\xff\n", "metrics.csv is damaged: 'utf-8' codec can't decode byte 0xff"),
        ("spectrum.json", '{"layer3": 1}', r"spectrum.json\['layer3'\]=1 must be a list: run the training again"),
        ("summary.json", '{"name": "x"}', r"summary.json lacks model, lowrank.*, versions: run the training again"),
        ("summary.json", "{", r"summary.json is not valid JSON"),
        ("config.yaml", "epoch: 1", r"(?s)the recipe of the run in .*run cannot be read.*no key 'epoch'"),
        ("config.yaml", "a: [", r"config.yaml is not valid YAML"),
    ]:
        before = (output / name).read_text()
        (output / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(RunError, match=message):
            [read(Run.open(output)) for read in (Run.metrics, Run.spectrum)]
        (output / name).write_text(before)
    for name, message in [
        ("model/config.json", "holds no model/config.json: the network of this run is gone"),
        ("summary.json", "has not come to its end"),
        ("config.yaml", "holds no config.yaml, so it is no run"),
    ]:
        (output / name).unlink()
        with pytest.raises(RunError, match=message):
            Run.open(output)
    with pytest.raises(RunError, match="does not exist"):
        Run.open(tmp_path / "none")


def test_a_run_that_was_not_evaluated_cannot_be_compared(finished):
    with pytest.raises(RunError, match=r"not evaluated yet: .*whole .*: timm-lowrank evaluate .*whole"):
        compare_runs([finished[0]])


# --------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("epochs", [1, 2, 4], ids=["in pretraining", "at switch-on", "between projections"])
def test_resuming_gives_the_run_that_was_never_interrupted(finished, tmp_path, epochs):
    output = copy(finished, tmp_path)
    (output / "summary.json").unlink()
    for later in range(epochs + 1, 6):
        shutil.rmtree(output / "checkpoints" / f"epoch_{later:04d}")
    leftover = output / "checkpoints" / f".epoch_{epochs + 1:04d}.partial"
    leftover.mkdir()
    with (output / "metrics.csv").open("a") as file:
        file.write("6,0.0")  # a row that a kill cut off
    shutil.rmtree(output / "model")
    train(recipe(twin=True, ema_decay=0.9), output, resume=True)
    assert_same_run(output, finished[0])
    assert not leftover.exists()


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ({"epochs": 9, "pretrain_epochs": 1}, "epoch_0003*"),
        ({"streaming": True, **LARGE, "epochs": 4, "ema_decay": 0.9}, "epoch_0002_step_*"),
    ],
    ids=["between epochs", "inside an epoch of a stream"],
)
def test_a_killed_run_resumes_to_the_same_figures_and_weights(shards, tmp_path, values, kept):
    config, output = tmp_path / "small.yaml", tmp_path / "killed"
    made = streamed(shards, **values) if "streaming" in values else recipe(**values)
    config.write_text(yaml.safe_dump({**made.to_dict(), "keep_checkpoints": 2}))
    trained = ("train", "--config", config, "--output", output)
    killed = forked.command(*trained, log=tmp_path / "log")
    deadline = time.monotonic() + 120
    while not list(output.glob(f"checkpoints/{kept}")):
        assert killed.is_alive(), "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    killed.kill()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert not (output / "summary.json").exists()
    # Without workers now: what is read does not depend on who reads it.
    log = tmp_path / "log of the second"
    forked.finish(forked.command(*trained, "--resume", "auto", "--set", "workers=0", log=log), logs=[log])
    assert "resumed after epoch" in log.read_text()
    train(load_recipe(config, ["workers=0"]), tmp_path / "whole")
    assert_same_run(output, tmp_path / "whole")
    assert max(path.name for path in (output / "checkpoints").iterdir()) == f"epoch_{made.epochs:04d}"


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ({**LARGE, "workers": 0, "gradient_accumulation": 2, "twin": True}, "epoch_0001_step_00000003"),
        ({"save_every_steps": 2, "streaming": "auto", "augment": "crop"}, "epoch_0001_step_00000004"),
        ({"save_every_steps": 5, "augment": "crop-flip", "ema_decay": 0.9}, "epoch_0000_step_00000005"),
    ],
    ids=["accumulation and twin", "in memory", "small images"],
)
def test_resuming_inside_an_epoch(shards, tmp_path, values, kept, capsys):
    made = streamed(shards, epochs=2, **values)
    train(made, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        if path.name > kept:
            shutil.rmtree(path)
    train(made, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    epoch, step = int(kept[6:10]), int(kept[-8:])
    assert f"resumed after epoch {epoch}, step {step} of the next" in capsys.readouterr().out


def test_resuming_needs_no_initial_weights_any_more(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(finished[0] / "twin" / "model", tmp_path / "begun" / "model")
    for source, name in (("~/begun/model", "folder"), ("~/begun/model/model.safetensors", "file")):
        made = recipe(**SHORT, init_from=source)
        train(made, tmp_path / name / "whole")
        shutil.copytree(tmp_path / name / "whole", tmp_path / name / "run")
        (tmp_path / name / "run" / "summary.json").unlink()
        shutil.rmtree(tmp_path / name / "run" / "checkpoints" / "epoch_0002")
    shutil.rmtree(tmp_path / "begun")
    for source, name in (("~/begun/model", "folder"), ("~/begun/model/model.safetensors", "file")):
        made = recipe(**SHORT, init_from=source)
        train(made, tmp_path / name / "run", resume=True)
        assert_same_run(tmp_path / name / "run", tmp_path / name / "whole")
        with pytest.raises(RecipeError, match="init_from='~/begun"):
            train(made, tmp_path / name / "new", resume=True)


@pytest.mark.parametrize("comparator", ["spectral-norm", "snip"])
def test_resuming_asks_nothing_of_weights_that_the_checkpoint_replaces(comparator, tmp_path):
    """Without those that it began with, the classifier of this network is zero: it can neither be normalised, nor be
    pruned by its gradient."""
    plain = VIT | {"model_args": VIT["model_args"] | {"weight_init": "jax"}, "epochs": 1, "pretrain_epochs": 0}
    train(recipe(**plain | {"lowrank": VIT["lowrank"] | {"enabled": False}}), tmp_path / "plain")
    values = {"comparator": comparator, "init_from": str(tmp_path / "plain"), "lowrank": VIT["lowrank"], "epochs": 2}
    made = recipe(**plain | values)
    train(made, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "epoch_0002")
    train(made, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_resuming_needs_no_pretrained_weights_any_more(tmp_path):
    """They may be a download of gigabytes, and the machine may be offline by then. The first convolution of these has
    three channels, which timm sums up for images of one."""
    weights = tmp_path / "pretrained.pth"
    torch.save(timm.create_model(SMALL["model"], **{**SMALL["model_args"], "in_chans": 3}).state_dict(), weights)
    origin = {"file": str(weights), "num_classes": 1000, "first_conv": "conv1", "classifier": "fc"}
    arguments = {**SMALL["model_args"], "pretrained": True, "pretrained_cfg": origin}
    made = recipe(**SHORT, model_args=arguments)
    train(made, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "epoch_0002")
    weights.unlink()
    train(made, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert (tmp_path / "run/model/config.json").read_bytes() == (tmp_path / "whole/model/config.json").read_bytes()
    with pytest.raises(RecipeError, match=r"pretrained\.pth"):
        train(made, tmp_path / "new", resume=True)


def test_a_checkpoint_that_was_counted_on_and_goes_away_is_an_error(finished, tmp_path):
    made, output = recipe(twin=True, ema_decay=0.9), copy(finished, tmp_path)
    folder = RunFolder(output, made, resume=True)
    state = build(made, load_images(**SMALL["data_args"]), output)
    assert folder.has_whole_checkpoint()
    shutil.rmtree(folder.checkpoint_folder)
    with pytest.raises(RunError, match=r"the checkpoints in .* went away"):
        folder.load_newest(state.accelerator)


def test_what_cannot_be_measured_is_exported_all_the_same(tmp_path, monkeypatch):
    def unmeasurable(*arguments):
        raise DivergedError("no variance")

    made = recipe(**SHORT | {"epochs": 1})
    with monkeypatch.context() as patched:
        patched.setattr(experiment, "layer_spectra", unmeasurable)
        with pytest.raises(DivergedError, match="no variance"):
            train(made, tmp_path / "run")
    assert timm_lowrank.from_pretrained(tmp_path / "run" / "model").branches
    train(made, tmp_path / "run", resume=True)
    train(made, tmp_path / "whole")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_run_whose_recipe_has_tuples_inside_is_resumed(tmp_path):
    made = Recipe(**{**SMALL, **SHORT, "epochs": 1, "model_args": {"channels": (8, 8, 16, 16)}})
    summary = train(made, tmp_path / "run")
    assert train(made, tmp_path / "run", resume=True) == summary


@pytest.mark.parametrize("streaming", [False, True], ids=["held", "streamed"])
def test_spectra_are_of_all_classes_where_the_test_images_are_sorted(tmp_path, streaming):
    write(tmp_path / "train.parquet", range(230))
    rows = np.arange(230, 630)
    write(tmp_path / "test.parquet", rows[np.argsort(TARGET[rows], kind="stable")])
    data = load_data(str(tmp_path), streaming=streaming)
    state = build(recipe(data=str(tmp_path), data_args={}, batch_size=32, workers=0), data, tmp_path / "run")
    batches = experiment._test_batches(state, data, 100)
    labels = torch.cat([labels for _, labels in batches])
    assert len(labels) == 100
    assert labels.bincount(minlength=10).tolist() == [10] * 10
    assert sum(len(labels) for _, labels in experiment._test_batches(state, data, 999)) == 400


def test_a_finished_run_is_not_trained_again(finished, tmp_path):
    output = copy(finished, tmp_path)
    shutil.rmtree(output / "checkpoints")
    assert train(recipe(twin=True, ema_decay=0.9), output, resume=True) == finished[1]
    assert not (output / "checkpoints").exists()


def test_resume_refuses_another_recipe_other_data_and_other_folders(finished, tmp_path):
    output = copy(finished, tmp_path)
    with pytest.raises(RunError, match=r"another recipe \(learning_rate was 0.05 and is 0.1; seed was 0 and is 1\)"):
        train(recipe(twin=True, ema_decay=0.9, seed=1, learning_rate=0.1), output, resume=True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"")
    with pytest.raises(RunError, match="is not a run that could be resumed"):
        train(recipe(), tmp_path / "photos", resume=True)
    # The same recipe, but the data behind its name is not what it was.
    plain = recipe(twin=True, ema_decay=0.9).plain()
    state = build(plain, load_images(train_limit=400, test_limit=100), output / "twin")
    with pytest.raises(RunError, match="the data is not what this run was started with"):
        RunFolder(output / "twin", plain, resume=True).load_newest(state.accelerator)


def test_how_the_data_is_read_may_change_but_not_the_data(shards, tmp_path):
    train(streamed(shards, epochs=2), tmp_path / "run")
    for path in ("summary.json", "checkpoints/epoch_0002"):
        target = tmp_path / "run" / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    with pytest.raises(RunError, match="that was streamed, so set streaming=true"):
        train(streamed(shards, epochs=2, streaming="auto"), tmp_path / "run", resume=True)
    with pytest.raises(RunError, match="shuffle_buffer was 30 and is 31"):
        train(streamed(shards, epochs=2, shuffle_buffer=31), tmp_path / "run", resume=True)
    newer = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    del newer["optimizer"]  # as in a run that is older than the key
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(newer))
    RunFolder(tmp_path / "run", streamed(shards, epochs=2, workers=3), resume=True)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("harm", [Path.unlink, cut, lambda path: path.write_bytes(b"")], ids=["gone", "half", "empty"])
@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.bin", "random_states_0.pkl", "checkpoint.json", "all"]
)
def test_a_damaged_checkpoint_is_passed_over(finished, tmp_path, file, harm):
    assert set(os.listdir(finished[0] / "checkpoints" / "epoch_0005")) == {
        "model.safetensors", "optimizer.bin", "random_states_0.pkl", "checkpoint.json", "progress.json",
        "average.safetensors", "metrics.csv",
    }  # fmt: skip
    checkpoint = Path(shutil.copytree(finished[0] / "checkpoints" / "epoch_0005", tmp_path / "epoch_0005"))
    assert damage(checkpoint) is None
    for path in list(checkpoint.iterdir()) if file == "all" else [checkpoint / file]:
        harm(path)
    assert ("checkpoint.json" if file == "all" else file) in damage(checkpoint)


def test_the_checkpoint_before_a_damaged_one_gives_the_same_run(finished, tmp_path, capsys):
    output = copy(finished, tmp_path)
    (output / "summary.json").unlink()
    cut(output / "metrics.csv")
    cut(output / "checkpoints" / "epoch_0005" / "optimizer.bin")
    (output / "checkpoints" / "epoch_0004" / "random_states_0.pkl").unlink()
    for stray in (".DS_Store", "checkpoints/.DS_Store", "checkpoints/epoch_0004 copy", "checkpoints/epoch_best"):
        (output / stray).mkdir() if "epoch" in stray else (output / stray).touch()
    for leftover in (".writing-x", "model/.writing-x", "checkpoints/.epoch_0001.old"):
        (output / leftover).mkdir()
    train(recipe(twin=True, ema_decay=0.9), output, resume=True)
    assert_same_run(output, finished[0])
    said = capsys.readouterr().out
    assert "epoch_0005 is left out and removed: its optimizer.bin was cut off or changed" in said
    assert "epoch_0004 is left out and removed: its random_states_0.pkl is missing" in said
    assert "resumed after epoch 3" in said
    assert not [*output.rglob(".writing-*"), *output.rglob(".epoch*"), *output.glob(".lock")]
    assert (output / "checkpoints" / ".DS_Store").exists()
    # Without any that is whole, nothing is begun anew behind one's back.
    (output / "summary.json").unlink()
    for checkpoint in output.glob("checkpoints/epoch_0*"):
        (checkpoint / "checkpoint.json").unlink(missing_ok=True)
    with pytest.raises(RunError, match=r"none of the checkpoints .*epoch_0001: it has no checkpoint.json.*delete that"):
        train(recipe(twin=True, ema_decay=0.9), output, resume=True)


class Touch:
    """What makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "file", ["optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl", "pytorch_model.bin"]
)
def test_nothing_is_unpickled_that_a_run_folder_brings(finished, tmp_path, file):
    output = copy(finished, tmp_path) / "twin"
    (output / "summary.json").unlink()
    newest, canary = output / "checkpoints" / "epoch_0005", tmp_path / "ran"
    torch.save(Touch(canary), newest / file)
    if file == "pytorch_model.bin":
        (newest / "model.safetensors").unlink()
    seal(newest)  # whoever made it could do so, too
    with pytest.raises(RunError, match="epoch_0005 cannot be loaded"):
        train(recipe(twin=True, ema_decay=0.9).plain(), output, resume=True)
    assert not canary.exists()


@pytest.mark.parametrize("left", [(), ("checkpoints/",), (".config.yaml.partial",), ("config.yaml",), (".DS_Store",)])
def test_a_run_that_was_killed_before_it_began_is_a_new_one(tmp_path, left):
    made = recipe(epochs=1, pretrain_epochs=0)
    for name in left:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).write_text("name: sm")
    folder = RunFolder(tmp_path, made, resume=True)
    with folder.exclusive():
        assert Recipe.from_dict(yaml.safe_load(folder.config.read_text())) == made
    if left != ("config.yaml",):
        return
    folder.checkpoint_folder.joinpath("epoch_0001").mkdir()
    folder.config.write_bytes(b"\0\xff")
    with pytest.raises(RunError, match=r"cannot be resumed, since its recipe cannot be read"):
        RunFolder(tmp_path, made, resume=True)


@pytest.mark.parametrize(
    "raised",
    [
        RuntimeError("[/src/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:22"),
        torch.distributed.DistNetworkError("The client socket has timed out"),
    ],
)
def test_a_process_that_is_gone_is_not_a_full_disk(raised, tmp_path, monkeypatch):
    """What really happens to processes: tests/torture."""
    folder = RunFolder(tmp_path / "run", recipe())
    folder.create()
    state = build(recipe(), load_images(**SMALL["data_args"]), folder.folder)

    def gone():
        raise raised

    monkeypatch.setattr(state.accelerator, "wait_for_everyone", gone)
    with pytest.raises(ProcessLostError, match=r"another process of this training .* --resume auto"):
        folder.save(state.accelerator, 1)
    assert not list(folder.checkpoint_folder.iterdir())


def wait_in(folder: Path, inside: Path) -> None:
    """Has the folder to itself until it is killed."""
    with exclusive(folder, ValueError()):
        inside.touch()
        time.sleep(600)


def test_two_runs_cannot_share_a_folder(tmp_path):
    folder, inside, log = tmp_path / "run", tmp_path / "inside", tmp_path / "log"
    folder.mkdir()
    other = forked.start(wait_in, folder, inside, log=log)
    while not inside.exists():
        assert other.is_alive(), log.read_text()
        time.sleep(0.002)
    with (
        pytest.raises(RunError, match=r"another process is training into .*--output"),
        RunFolder(folder, recipe(), resume=True).exclusive(),
    ):
        pass
    other.kill()
    other.join()
    with RunFolder(folder, recipe(), resume=True).exclusive():
        assert (folder / "config.yaml").exists()
    assert not (folder / ".lock").exists()


# --------------------------------------------------------------------------------------------------- output folders


def test_an_output_folder_that_cannot_be_used(finished, tmp_path):
    before = sorted(path for path in finished[0].rglob("*"))
    (tmp_path / "file").write_text("")
    for output, message in [
        (finished[0], r"exists and is not empty: continue that run with --resume auto"),
        (tmp_path / "file", "is a file"),
        # A folder inside a file: not even root can make it.
        (tmp_path / "file" / "run", r"cannot (read|write to) the output folder .*: Not a directory"),
    ]:
        with pytest.raises(RunError, match=message):
            train(recipe(epochs=1, pretrain_epochs=0), output)
    assert sorted(path for path in finished[0].rglob("*")) == before


def test_a_full_disk_is_one_error_and_loses_nothing(finished, tmp_path):
    folder = RunFolder(tmp_path / "run", recipe())
    folder.create()
    state = build(recipe(), load_images(**SMALL["data_args"]), folder.folder)
    folder.save(state.accelerator, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # the kernel refuses to let any file grow beyond
    try:
        with pytest.raises(RunError, match=r"could not write the checkpoint of epoch 2 .*the checkpoint of epoch 1 is"):
            folder.save(state.accelerator, 2)
        with pytest.raises(RunError, match=r"could not write .*summary.json: File too large"):
            folder.write_results({}, dataclasses.replace(finished[1], name="x" * 4000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in folder.checkpoint_folder.iterdir()] == ["epoch_0001"]
    assert not (folder.folder / "summary.json").exists()
    assert not list(folder.folder.glob(".*"))
    assert folder.load_newest(state.accelerator) == 1


def test_old_checkpoints_go_and_the_global_generators_are_left_alone(tmp_path):
    before, drawn = torch.get_rng_state(), []
    train(recipe(**SHORT | {"epochs": 4, "pretrain_epochs": 2}, save_every=2, keep_checkpoints=1), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["epoch_0004"]
    for _ in range(2):
        with seeded(3):
            drawn.append(torch.rand(2))
    assert torch.equal(*drawn)
    assert torch.equal(before, torch.get_rng_state())


# --------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "resnet10_cifr"}, r"resnet10_cifar"),
        ({"model_args": {"chanels": 3}}, r"chanels"),
        ({"lowrank": {"branches": {"layr3": 4}, "warmup_updates": 3}}, r"layr3.*layer3"),
        ({"lowrank": {"branches": {"pre_logits": 4000}, "warmup_updates": 3}}, r"4000"),
        ({"model_args": {"in_chans": 3}}, r"in_chans=3, but the images have 1"),
        (
            {"model_args": {"features_only": True}, "lowrank": {"branches": {"layer3": 4}, "warmup_updates": 3}},
            r"gives a list and no logits \(batch, 10 classes\)",
        ),
        (VIT | {"model_args": VIT["model_args"] | {"global_pool": ""}}, r"gives \(2, 5, 10\) and no logits"),
        ({"batch_size": 500}, r"more than the 230 training images"),
        (
            {"lowrank": {**SMALL["lowrank"], "warmup_updates": 20}},
            r"warmup_updates=20 is too long for the 21",
        ),
        ({"data_args": {"train_limit": 2000}}, r"cannot take limit=2000 of the 1437 images"),
        ({"data_args": {"test_limit": 1}}, r"the test split of digits has a single image, of which no spectrum"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(values, message, tmp_path):
    with pytest.raises(TrainingError, match=message):
        train(recipe(twin=True, **values), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_faster_precision_is_taken_once(tmp_path, monkeypatch, capsys):
    assert fast_precision(CPU) in ("bf16", "no")
    monkeypatch.setattr("timm_lowrank.training.experiment.fast_precision", lambda device: "bf16")
    few = {**SHORT, "pretrain_epochs": 1, "precision": "auto"}
    summary = train(recipe(**few), tmp_path / "run")
    assert (summary.precision, Run.open(tmp_path / "run").recipe.precision) == ("bf16", "bf16")
    assert "precision=auto: bf16 is the faster one here" in capsys.readouterr().out
    (tmp_path / "run" / "summary.json").unlink()
    monkeypatch.setattr("timm_lowrank.training.experiment.fast_precision", lambda device: "no")
    assert train(recipe(**few), tmp_path / "run", resume=True).precision == "bf16"
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("precision: bf16", "precision: auto"))  # a recipe in its place
    with pytest.raises(RunError, match="says precision=auto, and not which the run took: write there the one"):
        train(recipe(**few), tmp_path / "run", resume=True)


def test_one_process_holds_one_precision(tmp_path):
    build(recipe(), load_images(**SMALL["data_args"]), tmp_path)
    with pytest.raises(RecipeError, match="precision=bf16 cannot be used here"):
        train(recipe(precision="bf16"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(DivergedError, match=r"train_loss is (nan|inf).*Lower learning_rate \(now 1e\+30\)"):
        train(recipe(learning_rate=1e30, pretrain_epochs=1), tmp_path / "run")
    assert not (tmp_path / "run" / "summary.json").exists()


def test_an_accuracy_that_falls_back_to_chance_stops_the_run(tmp_path):
    state = build(recipe(pretrain_epochs=0), load_images(**SMALL["data_args"]), tmp_path)
    check_not_at_chance(state, 0.11, 0.1)  # at chance from the beginning: it may still learn
    check_not_at_chance(state, 0.60, 0.1)
    check_not_at_chance(state, 0.30, 0.1)
    with pytest.raises(DivergedError, match=r"fell to chance \(10.5%\) after 60.0%.*lowrank.reconstruction_weight"):
        check_not_at_chance(state, 0.105, 0.1)


@pytest.mark.parametrize(
    ("loss", "accuracy", "test", "epoch", "message"),
    [
        (
            2.31,
            0.12,
            2.4,
            3,
            r"epoch 3: nothing was learned in 60 .*\(12.0%\) and loss \(2.31\).*\(10.0%, 2.3\)",
        ),
        (2.31, 0.12, 2.4, 2, None),  # not yet
        (2.20, 0.12, 2.4, 3, None),  # the loss says that it begins to learn
        (2.31, 0.30, 2.4, 3, None),
        (
            1.00,
            0.60,
            1e19,
            1,
            "the test loss is 1e[+]19, though the training loss is 1: what the network gives in eval",
        ),
        (1.00, 0.60, float("nan"), 1, "the test loss is nan"),
        (1.00, 0.60, 50.0, 1, None),
    ],
)
def test_a_dead_run_stops_with_a_reason(tmp_path, loss, accuracy, test, epoch, message):
    state = build(recipe(pretrain_epochs=0), load_images(**SMALL["data_args"]), tmp_path)
    state.progress.epoch, state.progress.step = epoch, 20 * epoch
    means = {"train_loss": loss, "train_accuracy": accuracy}
    trained = TrainedEpoch(0.1, 1.0, means, loop.Tested(math.log(10), 0.1), 1.0, 1.0)
    refused = contextlib.nullcontext() if message is None else pytest.raises(DivergedError, match=message)
    with refused:
        check_alive(state, trained, loop.Tested(test, 0.5))


def test_what_fails_before_the_switch_on_is_not_laid_to_the_branches(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "MOST_LOSS", 0.0)
    message = r"^epoch 1: the test loss .*, and \d+ optimizer steps are few: .* or set clip_norm; then start a new run"
    with pytest.raises(DivergedError, match=message):
        train(recipe(pretrain_epochs=1), tmp_path / "run")


@pytest.mark.parametrize("parts", [1, 4])
def test_batchnorm_needs_more_than_one_image(tmp_path, parts):
    limits = {"train_limit": 40, "test_limit": 20}
    with pytest.raises(RecipeError, match="BatchNorm cannot train on a single image at a time: raise batch_size"):
        train(recipe(data_args=limits, batch_size=parts, gradient_accumulation=parts), tmp_path / "run")


def test_guessing_is_what_frequencies_alone_give(tmp_path):
    state = build(recipe(), load_images(**SMALL["data_args"]), tmp_path)
    means = Means(CPU, 4)
    means.count(torch.tensor([0, 1, 1, 3]))
    assert means.guessing(state.accelerator) == pytest.approx((1.5 * math.log(2), 0.5))
    one = TrainedEpoch(0.1, 1.0, {"train_loss": 0.0, "train_accuracy": 1.0}, loop.Tested(0.0, 1.0), 1.0, 1.0)
    with pytest.raises(DataError, match="all training images of the epoch are of one class"):
        check_alive(state, one, loop.Tested(0.0, 1.0))


# ---------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16", "channels_last": True},
        {"precision": "fp16"},
        {"gradient_accumulation": 2, "clip_norm": 1.0, "nesterov": True, "ramp_epochs": 1, "ema_decay": 0.9},
        {**VIT, "augment": "crop-flip", "spectrum_images": 30, "learning_rate": 0.002},
        {
            "streaming": True, "image_size": 12, "precision": "bf16", "channels_last": True, "gradient_accumulation": 2,
            "optimizer": "adamw", "clip_norm": 1.0, "ema_decay": 0.9, "learning_rate": 0.01, "weight_decay": 0.05,
        },
    ],
    ids=["bf16", "fp16", "accumulation", "a ViT with AdamW", "a stream"],
)  # fmt: skip
def test_options_train_and_update_once_a_step(options, shards, tmp_path):
    values = {"epochs": 3, "pretrain_epochs": 1, **options}
    summary = train(streamed(shards, **values) if "streaming" in values else recipe(**values), tmp_path / "run")
    assert summary.optimizer_steps == 21
    saved = load_file(tmp_path / "run" / "model" / "lowrank.safetensors")
    counters = [value for name, value in saved.items() if name.endswith("counters")]
    assert [int(counter[0]) for counter in counters] == [14] * len(summary.branches)
    first, *_, last = metrics(tmp_path / "run")
    assert float(last["train_loss"]) < float(first["train_loss"])


def test_a_compiled_network_trains_like_any_other(monkeypatch, tmp_path):
    # The eager backend: what the wrapper does is traced as ever, and no C++ compiler is needed.
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled(module, backend="eager"))
    values = {"epochs": 3, "pretrain_epochs": 1}
    train(recipe(**values, compile=True), tmp_path / "compiled")
    torch.compiler.reset()
    train(recipe(**values), tmp_path / "plain")
    assert_same_run(tmp_path / "compiled", tmp_path / "plain", but="gradient_share")  # not measured when compiled


def test_adamw_decays_weights_but_neither_biases_norms_nor_positions(tmp_path):
    state = build(recipe(**VIT, momentum=0.8), load_images(**SMALL["data_args"]), tmp_path)
    groups = {group["weight_decay"]: group for group in state.optimizer.param_groups}
    assert groups.keys() == {0.0, 0.05}
    assert all(group["betas"] == (0.8, 0.999) for group in groups.values())
    names = {id(parameter): name for name, parameter in state.lowrank.backbone.named_parameters()}
    decayed = [names[id(parameter)] for parameter in groups[0.05]["params"]]
    assert decayed
    assert all(name.endswith("weight") and "norm" not in name for name in decayed)
    assert "pos_embed" in {names[id(parameter)] for parameter in groups[0.0]["params"]}


def test_the_recipe_decides_whatever_accelerate_was_launched_with(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.warns(UserWarning, match="accelerate was launched with") as warned:
        state = build(recipe(gradient_accumulation=2), load_images(**SMALL["data_args"]), tmp_path)
    assert (state.accelerator.gradient_accumulation_steps, state.accelerator.mixed_precision) == (2, "no")
    said = [str(one.message) for one in warned if "accelerate was launched" in str(one.message)]
    assert [message.partition("; ")[0].partition("with ")[2] for message in said] == [
        "mixed precision bf16", "gradient accumulation steps 4",
    ]  # fmt: skip


def test_processes_that_accelerate_does_not_join_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(state_module, "Accelerator", lambda **_: types.SimpleNamespace(num_processes=1))
    with pytest.raises(RunError, match="2 processes were launched, but accelerate does not join them"):
        train(recipe(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_trackers_get_every_epoch(tmp_path):
    pytest.importorskip("tensorboard")
    train(recipe(**SHORT | {"pretrain_epochs": 1}, trackers=["tensorboard"]), tmp_path / "run")
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))


def test_the_line_of_an_epoch_says_how_far_the_branches_are(tmp_path, capsys):
    train(recipe(**SHORT | {"epochs": 3, "pretrain_epochs": 1}), tmp_path / "run")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert ["outside" in line for line in lines] == [False, True, True]
    last = metrics(tmp_path / "run")[-1]
    shown = [
        f"{layer} {float(last[f'{layer}.outside']):.1%} (rank {last[f'{layer}.rank']}, target {target})"
        for layer, target in SMALL["lowrank"]["branches"].items()
    ]
    assert lines[-1].endswith(f"outside W: {', '.join(shown)}")


@pytest.mark.parametrize(("penalty", "shown"), [(0.0, "warming up"), (0.25, "0.250")])
def test_the_bar_says_while_the_penalty_has_no_weight(penalty, shown):
    means = {"train_loss": 1.0, "train_accuracy": 0.5, "penalty": penalty}
    assert loop._postfix(means, 10, 1.0)["penalty"] == shown
    assert loop._postfix({**means, "a.outside": 0.25, "b.0.outside": 0.5}, 10, 1.0)["outside"] == "a 25%, b.0 50%"
