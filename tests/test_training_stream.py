"""Training from shards: the order is right and known before reading, resuming is exact, damage is one clear error."""

from __future__ import annotations

import csv
import io
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
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from timm_lowrank.data import shards as shards_module
from timm_lowrank.data.augment import Transform
from timm_lowrank.data.decode import Decoder
from timm_lowrank.data.drawn import drawn_images
from timm_lowrank.data.loader import TrainBatches
from timm_lowrank.data.order import EpochOrder
from timm_lowrank.data.shards import _hub_files, find_split
from timm_lowrank.data.sources import Columns
from timm_lowrank.data.stream import StreamEvalBatches, StreamTrainBatches
from timm_lowrank.data.streamed import find_data
from timm_lowrank.errors import EvaluationError, StreamError
from timm_lowrank.suites.evaluation import Options, images_of
from timm_lowrank.training import DataError, Recipe, RecipeError, RunError, data, load_images, load_recipe, train
from timm_lowrank.training.run import RunFolder

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

ROOT = Path(__file__).parents[1]
DIGITS = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)
TARGET = load_digits().target
CPU = torch.device("cpu")
STATISTICS = {"mean": [0.3], "std": [0.37]}
PLAIN = Transform([0.0], [1.0], "none", CPU)


# Workers that are more than the cores of the machine are slow, and what this is about.
pytestmark = [
    pytest.mark.usefixtures("fresh_accelerate"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
]


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png")
    return buffer.getvalue()


def write(path: Path, rows: range, group: int = 25, statistics: bool = True, **columns: object) -> Path:
    """A shard of digits with row groups of `group` rows."""
    images = [{"bytes": png(DIGITS[row]), "path": None} for row in rows]
    columns = {"image": images, "label": TARGET[list(rows)].tolist(), **columns}
    columns = {name: column for name, column in columns.items() if column is not None}
    parquet.write_table(pyarrow.table(columns), path, row_group_size=group, write_statistics=statistics)
    return path


def shards(folder: Path) -> Path:
    """230 training images in three shards and ten row groups, and 55 test images in one shard."""
    folder.mkdir(exist_ok=True)
    for number, rows in enumerate((range(90), range(90, 180), range(180, 230))):
        write(folder / f"train-{number:05d}-of-00003.parquet", rows)
    write(folder / "validation-00000-of-00001.parquet", range(230, 285), group=20)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shards that nobody changes."""
    return shards(tmp_path_factory.mktemp("data"))


@pytest.fixture
def own(tmp_path):
    """Shards to damage."""
    return shards(tmp_path / "own")


def found(folder: Path, **options):
    return find_data(str(folder), test_split="validation", **options)


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
    assert order.batch % order.lanes == 0
    # Images of a batch come from all over the data: that of 32 of 1,000 in their order has a spread of 9.
    assert order.lanes == 1 or np.median(epochs[0].std(axis=1)) > 0.15 * rows


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_the_order_does_not_depend_on_who_reads_it_or_where_reading_begins(order):
    whole = order.indices(2, range(order.batch))
    cut = [range(low, high) for low, high in ((0, 3), (3, 4), (4, order.batch))]
    assert np.array_equal(np.concatenate([order.indices(2, places) for places in cut], axis=1), whole)
    assert np.array_equal(order.indices(2, range(order.batch), first=5), whole[5:])


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_no_more_is_held_than_the_buffer_allows(order):
    held = 0
    for lane in order.share(1, range(order.batch)):
        read = np.maximum.accumulate(lane.order + 1)  # images that have to be read for the first k to be delivered
        held += (read - np.arange(len(read))).max()
        assert sorted(lane.order) == list(range(len(lane.rows)))
    assert held <= order.buffer + order.lanes
    unshuffled = EpochOrder(order.groups, order.batch, order.batches, 1, 3)
    for lane in unshuffled.share(1, range(order.batch)):
        assert np.array_equal(lane.order, np.arange(len(lane.order)))


def test_processes_read_different_row_groups():
    order = EpochOrder(np.full(64, 100), batch=64, batches=100, buffer=100, seed=0)
    read = [
        {row // 100 for lane in order.share(0, range(p * 16, p * 16 + 16)) for row in lane.rows.tolist()}
        for p in range(4)
    ]
    assert sum(map(len, read)) < 64 + 3 * order.lanes  # each once, but those that a border divides


# --------------------------------------------------------------------------------------------------------- batches


def seen_by(batches, epoch: int, first: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(batches.epoch(epoch, first))


@pytest.mark.parametrize(("processes", "workers", "parts"), [(1, 0, 1), (1, 3, 1), (2, 2, 1), (4, 0, 2), (3, 9, 2)])
def test_all_processes_together_see_what_is_in_memory(folder, processes, workers, parts):
    streamed = found(folder)
    options = {"batch_size": 24, "parts": parts, "seed": 5, "processes": processes, "workers": workers, "buffer": 40}
    readers = [StreamTrainBatches(streamed, PLAIN, CPU, process=p, **options) for p in range(processes)]
    memory = load_images(str(folder), test_split="validation")
    everything = [seen_by(reader, 1) for reader in readers]
    assert {len(seen) for seen in everything} == {len(readers[0])} == {9 * parts}
    rows = [torch.stack(list(reader.indices(1))) for reader in readers]
    for seen, expected in zip(everything, rows, strict=True):
        for (images, labels), chosen in zip(seen, expected, strict=True):
            assert torch.equal((images * 255).round().to(torch.uint8), memory.train_images[chosen])
            assert torch.equal(labels, memory.train_labels[chosen])
    one = StreamTrainBatches(streamed, PLAIN, CPU, batch_size=24, seed=5, buffer=40)
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
    readers = [StreamEvalBatches(found(folder), PLAIN, CPU, process=p, **options) for p in range(processes)]
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
    seen = [seen_by(StreamTrainBatches(found(tmp_path), PLAIN, CPU, process=p, **options), 0) for p in range(2)]
    labels = torch.cat([labels for reader in seen for _, labels in reader])
    assert torch.equal(labels.sort().values, whole.train_labels.sort().values)


def test_a_batch_that_does_not_fit_is_an_error(folder):
    with pytest.raises(RecipeError, match="batch_size=24 cannot be divided among 5 processes"):
        StreamTrainBatches(found(folder), PLAIN, CPU, batch_size=24, processes=5)
    with pytest.raises(RecipeError, match="batch_size=231 is more than the 230 training images"):
        StreamTrainBatches(found(folder), PLAIN, CPU, batch_size=231)


# -------------------------------------------------------------------------------------------------- what is there


def test_what_the_footers_tell(folder, tmp_path):
    streamed = found(folder, mean=[0.25], std=[0.5])
    assert streamed.counts == (230, 55)
    assert streamed.class_names == tuple("0123456789")
    assert streamed.image_size == (1, 8, 8)
    assert (streamed.mean, streamed.std) == ((0.25,), (0.5,))
    assert streamed.train.groups.tolist() == [25, 25, 25, 15, 25, 25, 25, 15, 25, 25]
    items = list(streamed.train.read(np.array([95, 91, 3, 4])))
    assert [item.row for item in items] == [95, 91, 3, 4]
    assert [item.where for item in items[::2]] == [
        f"{folder}/train-00001-of-00003.parquet, row 5", f"{folder}/train-00000-of-00003.parquet, row 3",
    ]  # fmt: skip
    assert items[1].image == png(DIGITS[91])
    shutil.copytree(folder, tmp_path / "copy")
    assert found(tmp_path / "copy").fingerprint == streamed.fingerprint
    write(tmp_path / "copy" / "train-00001-of-00003.parquet", range(91, 181))
    assert found(tmp_path / "copy").fingerprint != streamed.fingerprint


def test_class_names_come_from_the_features(own):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("zyxwvutsrq"))})
    for path in own.glob("train-*"):
        table = parquet.read_table(path)
        datasets.Dataset.from_dict(table.to_pydict(), features=features).to_parquet(path)
    assert found(own).class_names == tuple("zyxwvutsrq")


def test_the_hub_path_finds_the_same(folder):
    datasets = pytest.importorskip("datasets")
    files = datasets.load_dataset_builder(str(folder)).config.data_files
    assert [Path(path).name for path in files["validation"]] == ["validation-00000-of-00001.parquet"]
    assert [Path(path).name for path in _hub_files(str(folder), None, "train")] == [
        f"train-0000{number}-of-00003.parquet" for number in range(3)
    ]
    with pytest.raises(StreamError, match="no files of a split 'test'; it has those of train, validation"):
        _hub_files(str(folder), None, "test")


def test_shards_elsewhere_are_read_through_their_address(folder, monkeypatch):
    files = pytest.importorskip("fsspec").filesystem("memory")
    addresses = []
    for path in sorted(folder.iterdir()):
        files.pipe(f"/data/{path.name}", path.read_bytes())
        addresses.append(f"memory://data/{path.name}")
    names = {"train": addresses[:3], "validation": addresses[3:]}
    monkeypatch.setattr(shards_module, "_hub_files", lambda source, config, name: names[name])
    remote, local = find_data("someone/images", test_split="validation"), found(folder)
    assert remote.fingerprint == local.fingerprint
    batches = [StreamTrainBatches(data, PLAIN, CPU, batch_size=46, workers=1) for data in (remote, local)]
    for one, two in zip(*(batch.epoch(0) for batch in batches), strict=True):
        assert torch.equal(one[0], two[0])
    files.pipe("/data/train-00000-of-00003.parquet", b"PAR1")
    with pytest.raises(StreamError, match=r"memory://data/train-00000-of-00003.parquet is truncated, damaged"):
        find_data("someone/images", test_split="validation")


def test_data_is_streamed_when_it_does_not_fit(folder, monkeypatch):
    def kind(**values):
        values = {"data": str(folder), "data_args": {"test_split": "validation"}, "epochs": 1, **values}
        return type(data.load_data(Recipe.from_dict({"model": "resnet10_cifar", **values}))).__name__

    assert kind() == "ImageData"
    assert kind(streaming=True) == kind(image_size=12) == "StreamedData"
    needed = 2 * 285 * 64  # twice what the decoded images take
    monkeypatch.setattr(data, "memory_of_a_process", lambda: needed - 1)
    assert kind() == "StreamedData"
    assert kind(streaming=False) == "ImageData"
    limited = {"test_split": "validation", "train_limit": 200}
    assert kind(data_args=limited) == "ImageData"
    monkeypatch.setattr(data, "memory_of_a_process", lambda: needed)
    assert kind() == "ImageData"


def test_memory_is_shared_by_the_processes_of_a_machine(monkeypatch):
    alone = data.memory_of_a_process()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert data.memory_of_a_process() == alone // 4 > 2**20


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
    drawn = [decode(encoded, "here", seed) for seed in range(8)]
    assert all(torch.equal(image, decode(encoded, "here", seed)) for seed, image in enumerate(drawn))
    assert len({tuple(image.flatten().tolist()) for image in drawn}) == 8
    assert random_stream()
    untouched = Decoder("RGB", (24, 24), resize=True, crop_pct=0.75, augment="none")
    assert torch.equal(untouched(encoded, "here", 3), shown)
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


def weights(run: Path) -> dict[str, torch.Tensor]:
    files = [run / "model" / "model.safetensors", run / "model" / "lowrank.safetensors"]
    return {f"{file.name} {key}": value for file in files if file.exists() for key, value in load_file(file).items()}


def figures(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return [
            {name: cell for name, cell in row.items() if name not in ("seconds", "images_per_second")}
            for row in csv.DictReader(file)
        ]


def assert_same_run(one: Path, two: Path) -> None:
    assert figures(one) == figures(two)
    first, second = weights(one), weights(two)
    assert first
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_the_same_images_in_the_same_order_give_the_same_weights(folder, tmp_path, monkeypatch):
    streamed = recipe(folder, augment="none", workers=1)
    summary = train(streamed, tmp_path / "streamed")
    assert summary.to_dict()["data"] == {
        "source": str(folder), "fingerprint": found(folder).fingerprint, "train_images": 230, "test_images": 55,
        "streamed": True, "image_size": [1, 8, 8], "classes": 10,
    }  # fmt: skip
    # In memory, with nothing changed but the order.
    batches = StreamTrainBatches(found(folder), PLAIN, CPU, batch_size=32, buffer=60)
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
    rows = figures(tmp_path / "run")
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])


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


# -------------------------------------------------------------------------------------------------------- mistakes


def test_damage_inside_an_epoch_names_file_and_row(own, tmp_path):
    images = [{"bytes": png(DIGITS[row]), "path": None} for row in range(90, 180)]
    images[57]["bytes"] = images[57]["bytes"][:50]
    write(own / "train-00001-of-00003.parquet", range(90, 180), image=images)
    for workers in (0, 2):
        with pytest.raises(DataError, match=r"^\S*train-00001-of-00003.parquet, row 57: the image cannot be decoded"):
            train(recipe(own, workers=workers), tmp_path / f"run{workers}")
    images[57] = None
    write(own / "train-00001-of-00003.parquet", range(90, 180), image=images)
    with pytest.raises(DataError, match=r"train-00001-of-00003.parquet, row 57: the image is missing"):
        train(recipe(own, workers=1), tmp_path / "run")
    images[57] = {"bytes": png(np.zeros((9, 8), dtype=np.uint8)), "path": None}
    write(own / "train-00001-of-00003.parquet", range(90, 180), image=images)
    message = (
        r"train-00001-of-00003.parquet, row 57: the image is 8 x 9 pixels and the first one is 8 x 8: set image_si"
    )
    with pytest.raises(DataError, match=message):
        train(recipe(own), tmp_path / "other")


@pytest.mark.parametrize("wrong", [10, -1])
def test_a_wrong_label_is_found_before_training_or_when_it_is_read(own, tmp_path, wrong):
    labels = TARGET[180:230].tolist()
    labels[33] = wrong
    write(own / "validation-00000-of-00001.parquet", range(180, 230), label=labels)
    message = rf"validation-00000-of-00001.parquet, row 33 has the label {wrong}, outside the 10 classes 0 to 9"
    with pytest.raises(DataError, match=message):
        train(recipe(own), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    write(own / "validation-00000-of-00001.parquet", range(180, 230), label=labels, statistics=False)
    with pytest.raises(DataError, match=message):
        train(recipe(own, workers=1), tmp_path / "run")


def test_a_shard_damaged_in_the_middle(own, tmp_path):
    path = own / "train-00002-of-00003.parquet"
    content = bytearray(path.read_bytes())
    content[4 : len(content) // 2] = np.random.default_rng(0).bytes(len(content) // 2 - 4)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"train-00002-of-00003.parquet.*(damaged|cannot be decoded)"):
        train(recipe(own, workers=1), tmp_path / "run")


def test_what_cannot_be_streamed_is_one_error(own, folder):
    path = own / "train-00001-of-00003.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"train-00001-of-00003.parquet is truncated, damaged or not parquet"):
        found(own)
    write(path, range(20), label=None, klass=[0] * 20)
    with pytest.raises(
        DataError, match=r"train-00001.*no column 'label'. It has image, klass. Set data_args.label_col"
    ):
        found(own)
    write(path, range(20), label=[0.5] * 20)
    with pytest.raises(DataError, match=r"train-00001.*labels must be integers"):
        found(own)
    write(path, range(20), statistics=False)
    with pytest.raises(DataError, match="neither names its classes nor notes the largest label"):
        found(own)
    path.write_bytes(whole)
    write(own / "validation-00000-of-00001.parquet", range(0))
    with pytest.raises(DataError, match=r"the validation split of .* is empty"):
        found(own)
    with pytest.raises(DataError, match=r"no test split .* It holds train-00000"):
        find_data(str(folder))
    with pytest.raises(DataError, match="a stream does not know"):
        found(folder, train_limit=20)
    with pytest.raises(DataError, match="must list a number for each of the 1 channels"):
        found(folder, mean=[0.5, 0.5, 0.5])


def test_images_of_different_sizes_need_a_size(own):
    images = [{"bytes": png(np.zeros((8 + row, 8), dtype=np.uint8)), "path": None} for row in range(20)]
    write(own / "train-00000-of-00003.parquet", range(20), image=images)
    with pytest.raises(DataError, match=r"different sizes \(8 x 8, 8 x 9, 8 x 10\): set image_size"):
        found(own)
    assert found(own, image_size=10).image_size == (1, 10, 10)


def test_a_hub_name_without_network(monkeypatch):
    datasets = pytest.importorskip("datasets")
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(StreamError, match=r"(?s)could not load 'nobody-here/no-such-images' from the Hub"):
        find_split("nobody-here/no-such-images", None, "train", Columns(None, "label"))


def test_a_part_is_held_in_memory_for_measurements(folder):
    found = find_data(str(folder), test_split="validation", **STATISTICS)
    whole = load_images(str(folder), test_split="validation")
    part = drawn_images(found, 40, 20)
    expected = load_images(str(folder), test_split="validation", train_limit=40, test_limit=20)
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        assert torch.equal(getattr(part, name), getattr(expected, name)), name
    assert part.train_labels.bincount(minlength=10).tolist() == [4] * 10
    assert part.fingerprint == found.fingerprint
    assert torch.equal(drawn_images(found, 10**6, 10**6).test_images, whole.test_images)
    small = drawn_images(find_data(str(folder), test_split="validation", image_size=6, augment="crop-flip"), 20, 10)
    assert small.train_images.shape == (20, 1, 6, 6)
    again = drawn_images(find_data(str(folder), test_split="validation", image_size=6, augment="crop-flip"), 20, 10)
    assert torch.equal(small.train_images, again.train_images), "no random part"


def test_an_evaluation_of_a_streamed_run_reads_a_part(folder):
    recipe = Recipe(
        model="resnet10_cifar", data=str(folder), data_args={"test_split": "validation"}, image_size=12, epochs=1
    )
    fingerprint = find_data(str(folder), test_split="validation", image_size=12).fingerprint
    network = SimpleNamespace(recipe=recipe)
    images = images_of(Options(network="runs/x"), [network], 30, 20)
    assert images.image_size == (1, 12, 12)
    assert (len(images.train_images), len(images.test_images)) == (30, 20)
    assert images.fingerprint == fingerprint
    with pytest.raises(EvaluationError, match="--other-labels needs images that fit into memory"):
        images_of(Options(network="runs/x", other_labels="coarse"), [network], 30, 20)


def test_a_label_that_is_missing_or_wrong_is_found_before_images_are_drawn(tmp_path):
    write(tmp_path / "train-0.parquet", range(60), statistics=False)
    labels = TARGET[60:80].tolist()
    write(tmp_path / "test-0.parquet", range(60, 80), statistics=False, label=[*labels[:-1], 12])
    with pytest.raises(DataError, match="neither names its classes"):
        find_data(str(tmp_path))
    write(tmp_path / "train-0.parquet", range(60))
    with pytest.raises(DataError, match="row 19 has the label 12, outside the 10 classes"):
        drawn_images(find_data(str(tmp_path)), 10, 10)
    write(tmp_path / "test-0.parquet", range(60, 80), label=[*labels[:-1], None])
    with pytest.raises(DataError, match="1 labels are missing"):
        drawn_images(find_data(str(tmp_path)), 10, 10)
