"""Training from shards: the order is right and known before one is read, and resuming is exact."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from parquet_images import TARGET, png, write, write_shards
from runs import assert_same_run, metrics

from timm_lowrank.data import load_data, load_images
from timm_lowrank.data.augment import Transform
from timm_lowrank.data.batches import StreamEvalBatches, StreamTrainBatches, TrainBatches
from timm_lowrank.data.decode import Decoder
from timm_lowrank.data.order import EpochOrder
from timm_lowrank.errors import DataError, EvaluationError, RecipeError, RunError
from timm_lowrank.suites import evaluation
from timm_lowrank.training import Recipe, load_recipe, train
from timm_lowrank.training.run import RunFolder

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
STATISTICS = {"mean": [0.3], "std": [0.37]}
PLAIN = Transform([0.0], [1.0], "none", CPU)


# Workers that are more than the cores of the machine are slow, and what this is about.
pytestmark = [
    pytest.mark.usefixtures("fresh_accelerate"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shards that nobody changes."""
    return write_shards(tmp_path_factory.mktemp("data"), test="validation")


def streamed(folder, **options):
    return load_data(str(folder), test_split="validation", streaming=True, **options)


# ------------------------------------------------------------------------------------------------------- the order


ORDERS = {
    "many groups": EpochOrder(np.full(40, 25), batch=32, batches=31, buffer=200, seed=3),
    "uneven groups": EpochOrder(np.array([1, 300, 7, 25, 1, 90]), batch=12, batches=35, buffer=60, seed=3),
    "one group": EpochOrder(np.array([100]), batch=8, batches=12, buffer=1000, seed=3),
    "a prime batch": EpochOrder(np.full(10, 50), batch=7, batches=71, buffer=64, seed=3),
    "large groups": EpochOrder(np.full(8, 100), batch=16, batches=50, buffer=64, seed=3, group_bytes=2**30),
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_an_epoch_has_every_row_once_but_those_that_fill_no_batch(order):
    rows, used = order.groups.sum(), order.batch * order.batches
    epochs = [order.indices(epoch, range(order.batch)) for epoch in range(6)]
    for seen in epochs:
        assert seen.shape == (order.batches, order.batch)
        assert len(np.unique(seen)) == used
        assert (seen.min() >= 0, seen.max() < rows) == (True, True)
    assert not np.array_equal(epochs[0], epochs[1])
    assert np.array_equal(epochs[1], order.indices(1, range(order.batch)))
    left_out = [np.setdiff1d(np.arange(rows), seen) for seen in epochs]
    assert rows == used or len({tuple(left) for left in left_out}) > 3  # others in each epoch
    assert order.batch % order.segments == 0
    # Images of a batch come from all over the data: that of 32 of 1,000 in their order has a spread of 9.
    assert order.segments == 1 or np.median(epochs[0].std(axis=1)) > 0.15 * rows


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_the_order_does_not_depend_on_who_reads_it_or_where_reading_begins(order):
    whole = order.indices(2, range(order.batch))
    cut = [range(low, high) for low, high in ((0, 3), (3, 4), (4, order.batch))]
    assert np.array_equal(np.concatenate([order.indices(2, places) for places in cut], axis=1), whole)
    assert np.array_equal(order.indices(2, range(order.batch), first=5), whole[5:])


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_no_more_is_held_than_the_buffer_allows(order):
    held = 0
    for plan in order.share(1, range(order.batch)):
        read = np.maximum.accumulate(plan.order + 1)  # images that have to be read for the first k to be delivered
        held += (read - np.arange(len(read))).max()
        assert sorted(plan.order) == list(range(len(plan.rows)))
    assert held <= order.buffer + order.segments
    unshuffled = EpochOrder(order.groups, order.batch, order.batches, 1, 3)
    for plan in unshuffled.share(1, range(order.batch)):
        assert np.array_equal(plan.order, np.arange(len(plan.order)))


def test_processes_read_different_row_groups():
    order = EpochOrder(np.full(64, 100), batch=64, batches=100, buffer=100, seed=0)
    read = [
        {row // 100 for plan in order.share(0, range(p * 16, p * 16 + 16)) for row in plan.rows.tolist()}
        for p in range(4)
    ]
    assert sum(map(len, read)) < 64 + 3 * order.segments  # each once, but those that a border divides


# --------------------------------------------------------------------------------------------------------- batches


def seen_by(batches, epoch: int, first: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(batches.epoch(epoch, first))


@pytest.mark.parametrize(("processes", "workers", "parts"), [(1, 0, 1), (1, 3, 1), (2, 2, 1), (4, 0, 2), (3, 9, 2)])
def test_all_processes_together_see_what_is_in_memory(folder, processes, workers, parts):
    data = streamed(folder)
    options = {"batch_size": 24, "parts": parts, "seed": 5, "processes": processes, "workers": workers, "buffer": 40}
    readers = [StreamTrainBatches(data, PLAIN, CPU, process=p, **options) for p in range(processes)]
    memory = load_images(str(folder), test_split="validation")
    everything = [seen_by(reader, 1) for reader in readers]
    assert {len(seen) for seen in everything} == {len(readers[0])} == {9 * parts}
    rows = [torch.stack(list(reader.indices(1))) for reader in readers]
    for seen, expected in zip(everything, rows, strict=True):
        for (images, labels), chosen in zip(seen, expected, strict=True):
            assert torch.equal((images * 255).round().to(torch.uint8), memory.train_images[chosen])
            assert torch.equal(labels, memory.train_labels[chosen])
    one = StreamTrainBatches(data, PLAIN, CPU, batch_size=24, seed=5, buffer=40)
    steps = torch.cat(rows, dim=1).view(9, -1)
    assert len(steps.unique()) == 9 * 24
    if parts == 1:
        assert torch.equal(steps, torch.stack(list(one.indices(1))))  # each global batch, whoever reads it
    rest = seen_by(readers[-1], 1, first=4)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(rest, everything[-1][4:], strict=True))


@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (3, 2), (60, 1)])
def test_every_test_image_is_seen_once_and_in_order(folder, processes, workers):
    memory = load_images(str(folder), test_split="validation")
    options = {"batch_size": 4, "processes": processes, "workers": workers}
    readers = [StreamEvalBatches(streamed(folder), PLAIN, CPU, process=p, **options) for p in range(processes)]
    chosen = readers if processes < 10 else [readers[0], readers[1], readers[-1]]
    images, labels = zip(*(batch for reader in chosen for batch in reader), strict=True)
    if chosen is readers:
        assert torch.equal(torch.cat(labels), memory.test_labels)
        assert torch.equal((torch.cat(images) * 255).round().to(torch.uint8), memory.test_images)
    else:  # more processes than images
        assert sum(len(batch) for reader in readers for batch in reader.batches) == 55


def test_a_single_row_group_serves_many_readers(tmp_path):
    write(tmp_path / "train-0.parquet", range(50), group=50)
    write(tmp_path / "validation-0.parquet", range(50, 60))
    whole = load_images(str(tmp_path), test_split="validation")
    options = {"batch_size": 10, "processes": 2, "workers": 3}
    seen = [seen_by(StreamTrainBatches(streamed(tmp_path), PLAIN, CPU, process=p, **options), 0) for p in range(2)]
    labels = torch.cat([labels for reader in seen for _, labels in reader])
    assert torch.equal(labels.sort().values, whole.train_labels.sort().values)


def test_a_batch_that_does_not_fit_is_an_error(folder):
    with pytest.raises(RecipeError, match="batch_size=24 cannot be divided among 5 processes"):
        StreamTrainBatches(streamed(folder), PLAIN, CPU, batch_size=24, processes=5)
    with pytest.raises(RecipeError, match="batch_size=231 is more than the 230 training images"):
        StreamTrainBatches(streamed(folder), PLAIN, CPU, batch_size=231)


# ------------------------------------------------------------------------------------------------------- decoding


def test_large_images_are_cut_and_resized(random_stream):
    pixels = np.zeros((60, 90, 3), dtype=np.uint8)
    pixels[:, 30:60] = 200  # a grey square in the middle of black
    encoded = png(pixels)
    decode = Decoder("RGB", (24, 24), resize=True, crop_pct=0.75, augment="crop-flip")
    shown = decode(encoded, "here")
    assert shown.shape == (3, 24, 24)
    # Resized to 32 x 48 and cut from column 12 to 36: the square of columns 16 to 32 lies at 4 to 20.
    row = shown[0, 12].tolist()
    assert row[:3] == [0, 0, 0] == row[-3:]
    assert row[6:18] == [200] * 12
    cut = [decode(encoded, "here", seed) for seed in range(8)]
    assert all(np.array_equal(image, decode(encoded, "here", seed)) for seed, image in enumerate(cut))
    assert len({tuple(image.flatten().tolist()) for image in cut}) == 8
    assert random_stream()
    untouched = Decoder("RGB", (24, 24), resize=True, crop_pct=0.75, augment="none")
    assert np.array_equal(untouched(encoded, "here", 3), shown)
    assert Decoder("L", (24, 24), resize=True)(encoded, "here").shape == (1, 24, 24)


def test_mirroring_is_for_crop_flip_alone():
    pixels = np.tile(np.arange(0, 240, 4, dtype=np.uint8), (60, 1))  # brighter to the right
    rising = {
        augment: {
            bool(image[0, 8, -1] > image[0, 8, 0])
            for image in (Decoder("L", (16, 16), True, 1.0, augment)(png(pixels), "", seed) for seed in range(12))
        }
        for augment in ("crop", "crop-flip")
    }
    assert rising == {"crop": {True}, "crop-flip": {True, False}}


# ------------------------------------------------------------------------------------------------------ whole runs


SMALL = {
    "name": "small",
    "model": "resnet10_cifar",
    "model_args": {"channels": [4, 4, 8, 8]},
    "lowrank": {"branches": {"layer3": 4, "pre_logits": 3}, "warmup_updates": 3},
    "epochs": 3,
    "pretrain_epochs": 1,
    "batch_size": 32,
    "learning_rate": 0.05,
    "schedule": "cosine",
    "keep_checkpoints": 99,
    "streaming": True,
    "shuffle_buffer": 60,
    "workers": 0,
    "spectrum_images": 30,
}
LARGE = {"image_size": 16, "augment": "crop-flip", "save_every_steps": 3, "workers": 2}


def recipe(folder: Path, **values) -> Recipe:
    given = {"data": str(folder), "data_args": {"test_split": "validation", **STATISTICS}}
    return Recipe.from_dict({**SMALL, **given, **values})


def test_the_same_images_in_the_same_order_give_the_same_weights(folder, tmp_path, monkeypatch):
    summary = train(recipe(folder, augment="none", workers=1), tmp_path / "streamed")
    assert summary.to_dict()["data"] == {
        "source": str(folder), "fingerprint": streamed(folder).fingerprint, "train_images": 230, "test_images": 55,
        "streamed": True, "image_size": [1, 8, 8], "classes": 10,
    }  # fmt: skip
    # In memory, with nothing changed but the order.
    batches = StreamTrainBatches(streamed(folder), PLAIN, CPU, batch_size=32, buffer=60)
    monkeypatch.setattr(TrainBatches, "indices", lambda _, epoch: batches.indices(epoch))
    train(recipe(folder, augment="none", streaming=False), tmp_path / "memory")
    assert_same_run(tmp_path / "streamed", tmp_path / "memory")


def test_a_run_killed_inside_an_epoch_ends_as_if_it_had_not_been(folder, tmp_path):
    values = {**recipe(folder, **LARGE, epochs=6).to_dict(), "keep_checkpoints": 2, "ema_decay": 0.9}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(values))
    output = tmp_path / "killed"
    command = [sys.executable, str(ROOT / "recipes" / "train.py"), "--config", str(tmp_path / "small.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}
    killed = subprocess.Popen([*command, "--output", str(output)], env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    inside: list[Path] = []
    while not inside:
        assert killed.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
        inside = [path for path in output.glob("checkpoints/epoch_*_step_*") if path.name >= "epoch_0002"]
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    # Without workers now: what is read does not depend on who reads it.
    again = load_recipe(tmp_path / "small.yaml", ["workers=0"])
    train(again, output, resume=True)
    train(again, tmp_path / "whole")
    assert_same_run(output, tmp_path / "whole")
    assert [path.name for path in sorted((output / "checkpoints").iterdir())][-1] == "epoch_0006"


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ({**LARGE, "workers": 0, "gradient_accumulation": 2, "twin": True}, "epoch_0001_step_00000003"),
        ({"save_every_steps": 2, "streaming": "auto", "augment": "crop"}, "epoch_0002_step_00000004"),
        ({"save_every_steps": 5, "augment": "crop-flip", "ema_decay": 0.9}, "epoch_0000_step_00000005"),
    ],
    ids=["accumulation and twin", "in memory", "small images"],
)
def test_resuming_inside_an_epoch(folder, tmp_path, values, kept, capsys):
    train(recipe(folder, **values), tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        if path.name > kept:
            shutil.rmtree(path)
    train(recipe(folder, **values), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    epoch, step = int(kept[6:10]), int(kept[-8:])
    assert f"resumed after epoch {epoch}, step {step} of the next" in capsys.readouterr().out


def test_options_work_with_a_stream(folder, tmp_path):
    options = {"precision": "bf16", "channels_last": True, "ema_decay": 0.9, "optimizer": "adamw", "clip_norm": 1.0}
    small = {"learning_rate": 0.01, "weight_decay": 0.05, "augment": "none", "epochs": 5}
    summary = train(recipe(folder, **options, **small, image_size=12, gradient_accumulation=2), tmp_path / "run")
    assert summary.optimizer_steps == 35
    assert summary.data.image_size == (1, 12, 12)
    config = yaml.safe_load((tmp_path / "run" / "model" / "config.json").read_text())["pretrained_cfg"]
    assert (config["crop_pct"], config["interpolation"], config["mean"]) == (0.875, "bicubic", STATISTICS["mean"])
    rows = metrics(tmp_path / "run")
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])


def test_a_wrong_label_leaves_no_run(tmp_path):
    write_shards(tmp_path / "data", test="validation")
    labels = [*TARGET[230:284], 10]
    write(tmp_path / "data" / "validation-00000-of-00001.parquet", range(230, 285), label=labels, statistics=False)
    with pytest.raises(DataError, match=r"validation-00000-of-00001.parquet, row 54 has the label 10"):
        train(recipe(tmp_path / "data"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_how_the_data_is_read_may_change_but_not_the_data(folder, tmp_path):
    train(recipe(folder, epochs=2), tmp_path / "run")
    for path in ("summary.json", "checkpoints/epoch_0002"):
        target = tmp_path / "run" / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    with pytest.raises(RunError, match="that was streamed, so set streaming=true"):
        train(recipe(folder, epochs=2, streaming="auto"), tmp_path / "run", resume=True)
    with pytest.raises(RunError, match="shuffle_buffer was 60 and is 61"):
        train(recipe(folder, epochs=2, shuffle_buffer=61), tmp_path / "run", resume=True)
    newer = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    del newer["optimizer"]  # as in a run that is older than the key
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(newer))
    RunFolder(tmp_path / "run", recipe(folder, epochs=2, workers=3), resume=True)


def test_an_evaluation_of_a_streamed_run_reads_a_part(folder):
    recipe = Recipe(
        model="resnet10_cifar", data=str(folder), data_args={"test_split": "validation"}, image_size=12, epochs=1
    )
    network = SimpleNamespace(recipe=recipe)
    images = evaluation.images_of(evaluation.Options(network="runs/x"), [network], 30, 20)
    assert images.image_size == (1, 12, 12)
    assert (len(images.train_images), len(images.test_images)) == (30, 20)
    assert images.fingerprint == streamed(folder, image_size=12).fingerprint
    with pytest.raises(EvaluationError, match="--other-labels needs images that fit into memory"):
        evaluation.images_of(evaluation.Options(network="runs/x", other_labels="coarse"), [network], 30, 20)
