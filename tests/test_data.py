"""Loading and decoding images: held or streamed, one reader with one set of checks."""

import io
import multiprocessing
import os
import shutil
import struct
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow
import pytest
import torch
from parquet_images import DIGITS, TARGET, encoded, png, write, write_shards
from PIL import Image, ImageOps
from pyarrow import parquet
from torchvision.transforms.v2 import functional

from timm_lowrank import data as data_module
from timm_lowrank.data import decode as decode_module
from timm_lowrank.data import load_data, load_images, sources
from timm_lowrank.data.augment import Transform
from timm_lowrank.data.batches import StreamTrainBatches
from timm_lowrank.data.decode import Decoder
from timm_lowrank.data.images import decoded
from timm_lowrank.data.sources import Files, Shard, Source, Split
from timm_lowrank.data.stream import stream
from timm_lowrank.errors import DataError, EvaluationError
from timm_lowrank.suites import evaluation
from timm_lowrank.training import Recipe

CIFAR10 = os.environ.get("TIMM_LOWRANK_CIFAR10")
CPU = torch.device("cpu")
PLAIN = Transform([0.0], [1.0], "none", CPU)
BOTH = pytest.mark.parametrize("streaming", [False, True], ids=["held", "streamed"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shards that nobody changes."""
    return write_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture
def own(tmp_path):
    """Shards to damage."""
    return write_shards(tmp_path / "own")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Folders are names on the Hub: `datasets` finds their files, and its cache is empty."""
    monkeypatch.setattr(sources, "local_folder", lambda source: None)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def same_images(one, two):
    names = ("train_images", "train_labels", "test_images", "test_labels")
    return all(torch.equal(getattr(one, name), getattr(two, name)) for name in names)


# ------------------------------------------------------------------------------------------------------- what loads


def test_digits_are_a_fixed_stratified_split():
    data = load_images()
    assert data.train_images.shape == (1437, 1, 8, 8)
    assert data.test_images.shape == (360, 1, 8, 8)
    assert data.train_images.dtype == torch.uint8
    assert data.train_labels.dtype == torch.int64
    assert data.test_labels.bincount().min() >= 34
    pixels = data.train_images.double() / 255
    assert data.mean[0] == pytest.approx(pixels.mean().item(), abs=1e-4)
    assert data.std[0] == pytest.approx(pixels.std(correction=0).item(), abs=1e-4)
    together = torch.cat([data.train_images, data.test_images]).flatten(1).double()
    assert torch.equal(together.sum(0), torch.from_numpy(DIGITS.reshape(1797, -1).astype(np.float64)).sum(0))


def test_fingerprints_stay_what_they_were(folder):
    """Runs that were begun with an older version are resumed."""
    expected = [
        ({}, "5db4d5a06c4217c8c6f4cfdf2759cf5d210e9668cba8949fbeb3dfc2347e44b8"),
        ({"train_limit": 57, "test_limit": 33}, "8975c1d51c5cc94a46a9df5bfca23d10b4ea3f42c789574b43b8d5d627bd76eb"),
        ({"source": str(folder)}, "b8d2944131343fd609e39854155c63d63cc387507501b2d617b7c52e6bc96343"),
    ]
    assert [load_images(**options).fingerprint for options, _ in expected] == [digest for _, digest in expected]
    shards = tuple(
        Shard(f"/anywhere/{n}.parquet", 1000 + n, "image", "label", [(25, 10 * n), (5, 3)], None) for n in range(3)
    )
    source = Source("x", Split("train", shards[:2]), Split("test", shards[2:]), ("cat", "dog"))
    expected = "shards:cda36fb3ecd396d3004b65e369b3ff14a415df34402300d78e5e73600fc73b44"
    assert stream(source, Decoder("L", (8, 8))).fingerprint == expected


def test_a_folder_of_parquet_files(folder):
    data = load_images(str(folder))
    assert np.array_equal(data.train_images[:, 0].numpy(), DIGITS[:230])
    assert np.array_equal(data.test_images[:, 0].numpy(), DIGITS[230:285])
    assert data.train_labels.tolist() == TARGET[:230].tolist()
    assert data.class_names == tuple("0123456789")
    assert same_images(load_images(str(folder), mean=[0.5], std=[0.25]), data)


def test_what_the_footers_tell(folder, tmp_path):
    streamed = load_data(str(folder), streaming=True, mean=[0.25], std=[0.5])
    assert streamed.counts == (230, 55)
    assert streamed.class_names == tuple("0123456789")
    assert streamed.image_size == (1, 8, 8)
    assert streamed.train.group_rows.tolist() == [25, 25, 25, 15, 25, 25, 25, 15, 25, 25]
    items = list(streamed.train.read(np.array([95, 91, 3, 4])))
    assert [item.row for item in items] == [95, 91, 3, 4]
    assert [item.where for item in items[::2]] == [
        f"{folder}/train-00001-of-00003.parquet, row 5", f"{folder}/train-00000-of-00003.parquet, row 3",
    ]  # fmt: skip
    assert items[1].image == png(DIGITS[91])
    shutil.copytree(folder, tmp_path / "copy")
    assert load_data(str(tmp_path / "copy"), streaming=True).fingerprint == streamed.fingerprint
    write(tmp_path / "copy" / "train-00001-of-00003.parquet", range(91, 181))
    assert load_data(str(tmp_path / "copy"), streaming=True).fingerprint != streamed.fingerprint


@BOTH
def test_colour_images_and_class_names_from_the_features(tmp_path, streaming):
    colour = np.stack([DIGITS[:40], 255 - DIGITS[:40], DIGITS[40:80]], axis=-1)
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=list("zyxwvutsrq"))})
    for split in ("train", "test"):
        columns = {"img": encoded(colour), "label": TARGET[:40].tolist()}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / f"{split}.parquet")
    data = load_data(str(tmp_path), streaming=streaming)
    assert data.class_names == tuple("zyxwvutsrq")
    assert data.image_size == (3, 8, 8)
    assert len(data.mean) == 3
    images = data.subset(40, 40) if streaming else data
    assert np.array_equal(images.train_images.numpy(), colour.transpose(0, 3, 1, 2))


@BOTH
def test_a_name_on_the_hub_is_read_as_a_folder_is(folder, hub, streaming, monkeypatch):
    data = load_data(str(folder), streaming=streaming)
    with pytest.raises(DataError, match="has no split 'validation'; it has train, test"):
        load_data(str(folder), streaming=streaming, test_split="validation")
    monkeypatch.undo()
    local = load_data(str(folder), streaming=streaming)
    assert data.fingerprint == local.fingerprint
    assert (data.origin, local.origin, load_data("digits").origin) == ("hub", "folder", "built-in")
    assert not streaming or data.subset(230, 55).origin == "hub"
    assert same_images(data.subset(230, 55), local.subset(230, 55)) if streaming else same_images(data, local)


@BOTH
def test_what_is_not_stored_as_parquet_is_read_from_the_cache_of_datasets(folder, tmp_path, hub, streaming):
    for split in ("train", "test"):
        table = pyarrow.concat_tables([parquet.read_table(path) for path in sorted(folder.glob(f"{split}*"))])
        (tmp_path / "arrow").mkdir(exist_ok=True)
        with pyarrow.ipc.new_stream(tmp_path / "arrow" / f"{split}-0.arrow", table.schema) as file:
            file.write_table(table, max_chunksize=50)
    data = load_data(str(tmp_path / "arrow"), streaming=streaming)
    held = data.subset(230, 55) if streaming else data
    assert np.array_equal(held.train_images[:, 0].numpy(), DIGITS[:230])
    assert held.test_labels.tolist() == TARGET[230:285].tolist()


# ------------------------------------------------------------------------------------------------- folders of images


CLASSES = ("0", "test tube", "train-set")  # names that `datasets` would take for those of splits


def write_images(root, splits=("train", "test"), classes=CLASSES, images=range(12)):
    """PNGs of digits, each of class `number % 3`, as SPLIT/CLASS/NUMBER.png."""
    for split in splits:
        for number in images:
            path = root / split / classes[number % len(classes)] / f"{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(DIGITS[number]))
    return root


@pytest.fixture
def image_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


BY_CLASS = [DIGITS[number] for label in range(3) for number in range(label, 12, 3)]


@BOTH
@pytest.mark.parametrize("place", ["plain", "a [b] *c ü"])
@pytest.mark.parametrize(
    ("folders", "options"),
    [
        (("train", "test"), {}),
        (("train", "val"), {}),
        (("Train", "Validation"), {"test_split": "validation"}),
        (("train", "test", "val"), {"test_split": "val"}),
        (("unlabeled", "dev"), {"train_split": "unlabeled"}),
    ],
)
def test_a_folder_of_images(tmp_path, image_cache, streaming, place, folders, options):
    root = write_images(tmp_path / place, folders)
    (root / folders[0] / ".DS_Store").write_bytes(b"x")
    data = load_data(str(root), streaming=streaming, **options)
    assert (data.counts, data.class_names, data.image_size) == ((12, 12), CLASSES, (1, 8, 8))
    held = data.subset(12, 12) if streaming else data
    assert np.array_equal(held.train_images[:, 0].numpy(), BY_CLASS)
    assert held.test_labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4


@BOTH
def test_images_on_the_hub_that_are_files_of_their_own(tmp_path, hub, streaming):
    root = write_images(tmp_path / "images", classes=("a", "b", "c"))
    data = load_data(str(root), streaming=streaming)
    held = data.subset(12, 12) if streaming else data
    assert np.array_equal(held.train_images[:, 0].numpy(), BY_CLASS)
    assert (held.class_names, held.train_labels.tolist()) == (("a", "b", "c"), [0] * 4 + [1] * 4 + [2] * 4)


@pytest.mark.parametrize("ending", ["jfif", "jpe", "JPEG"])
def test_rare_endings_of_images_are_known(tmp_path, image_cache, ending):
    for split in ("train", "test"):
        for name in "ab":
            path = tmp_path / split / name / f"1.{ending}"
            path.parent.mkdir(parents=True)
            path.write_bytes(jpeg(HALVES, 1))
    assert load_images(str(tmp_path)).counts == (2, 2)


def test_images_with_their_labels_in_a_table(tmp_path, image_cache):
    root = write_images(tmp_path / "images")
    for split in ("train", "test"):
        rows = [f"{CLASSES[n % 3]}/{n:02d}.png,{n % 2}" for n in range(12)]
        (root / split / "metadata.csv").write_text("\n".join(["file_name,odd", *rows]))
    data = load_images(str(root), label_column="odd")
    assert sorted(data.train_labels.tolist()) == [0] * 6 + [1] * 6
    with pytest.raises(DataError, match="have no 'label': a class is a folder of its own"):
        load_images(str(root))
    for split in ("train", "test"):
        table = root / split / "metadata.csv"
        table.write_text(table.read_text().replace(",1", ",yes").replace(",0", ",no"))
    with pytest.raises(DataError, match=r"'odd' of metadata.csv in .*images holds \w*string, and labels must be"):
        load_images(str(root), label_column="odd")


LINKED = {
    "classes": [f"{split}/{name}" for split in ("train", "test") for name in CLASSES],
    "one class": ["train/0"],
    "splits": ["train", "test"],
    "everything": ["."],
}


@BOTH
@pytest.mark.parametrize("linked", LINKED.values(), ids=LINKED)
def test_links_to_folders_of_images_are_followed(tmp_path, image_cache, streaming, linked):
    root = write_images(tmp_path / "images")
    for number, place in enumerate(linked):
        shutil.move(root / place, tmp_path / f"elsewhere {number}")
        (root / place).symlink_to(tmp_path / f"elsewhere {number}", target_is_directory=True)
    (root / "train" / "circle").symlink_to(root, target_is_directory=True)
    data = load_data(str(root), streaming=streaming)
    assert (data.counts, data.class_names) == ((12, 12), CLASSES)
    images = (data.subset(12, 12) if streaming else data).train_images
    assert sorted(map(bytes, images.numpy())) == sorted(map(bytes, BY_CLASS))


def test_a_folder_above_the_classes_is_none(tmp_path, image_cache):
    write_images(tmp_path / "own" / "train", ("animals",))
    write_images(tmp_path / "own" / "test", ("animals",))
    assert load_images(str(tmp_path / "own")).class_names == CLASSES


def test_a_copy_of_streamed_images_is_the_same_data_and_a_change_is_seen(tmp_path, image_cache):
    one, two = (load_data(str(write_images(tmp_path / place)), streaming=True) for place in ("a", "longer/name"))
    assert one.fingerprint == two.fingerprint
    changed = tmp_path / "a" / "train" / "0" / "00.png"
    changed.write_bytes(png(DIGITS[40]) + b"longer" * 20)
    os.utime(changed, (1, 1))
    assert load_data(str(tmp_path / "a"), streaming=True).fingerprint != one.fingerprint


@BOTH
def test_workers_read_images_that_are_files_of_their_own(tmp_path, image_cache, streaming):
    root = write_images(tmp_path / "images", images=range(150))
    data = load_data(str(root), streaming=streaming)
    assert data.counts == (150, 150)
    if streaming:
        assert len(data.train.row_groups) > 1
        batches = StreamTrainBatches(data, PLAIN, CPU, batch_size=30, workers=1, buffer=20)
        pixels = torch.cat([images for images, _ in batches.epoch(0)]).double().sum(0)[0].numpy()
        assert pixels == pytest.approx(DIGITS[:150].sum(0) / 255, rel=1e-6)


def test_images_that_are_files_of_their_own_are_shuffled_all_together(tmp_path, image_cache):
    """They lie class behind class, and a buffer would give a batch of the few classes that it holds."""
    for split, copies in (("train", 40), ("test", 1)):
        for label in range(10):
            for number in range(copies):
                path = tmp_path / "images" / split / str(label) / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(png(DIGITS[number]))
    data = load_data(str(tmp_path / "images"), streaming=True)
    batches = StreamTrainBatches(data, PLAIN, CPU, batch_size=40, workers=0, buffer=4)
    labels = [labels for _, labels in batches.epoch(0)]
    assert torch.cat(labels).bincount().tolist() == [40] * 10
    assert min(len(of_batch.unique()) for of_batch in labels) >= 8
    assert [of_batch.tolist() for _, of_batch in batches.epoch(0, 6)] == [of_batch.tolist() for of_batch in labels[6:]]


WRONG_FOLDERS = {
    "no classes": (
        lambda root: [(root / s / "1.png", png(DIGITS[0])) for s in ("train", "test")], "a folder of its own"
    ),
    "no splits": (lambda root: [(root / c / "1.png", png(DIGITS[0])) for c in "ab"], "no split 'test' or 'validation'"),
    "only a test split": (
        lambda root: [(root / "test" / c / "1.png", png(DIGITS[0])) for c in "ab"], "no split 'train'; it has test"
    ),
    "damaged": (
        lambda root: [(root / s / c / "1.png", b"\x89PNG") for s in ("train", "test") for c in "ab"],
        r"train/a/1.png: the image cannot be decoded",
    ),
    "levels": (
        lambda root: [
            (root / s / c / "1.png", png(DIGITS[0])) for s in ("train", "test") for c in ("a", "b/c", "d")
        ], "all on the same level",
    ),
    "folders in classes": (
        lambda root: [
            (root / s / c / day / "1.png", png(DIGITS[0])) for s in ("train", "test") for c in "ab" for day in "12"
        ],
        r"^t\w+/a/1 and t\w+/b/1 in \S*own would be one class, 1: a class is a folder of its own",
    ),
    "a single class": (
        lambda root: [(root / s / "a" / "1.png", png(DIGITS[0])) for s in ("train", "test")],
        "own are of a single class, a: there is nothing to learn",
    ),
    "images that are left out": (
        lambda root: [
            (root / s / c / f"1.{kind}", png(DIGITS[0]))
            for s in ("train", "test") for c, kind in (("a", "png"), ("b", "png"), ("b", "HEIC"), ("c", "avif"))
        ],
        r"test/b/1\.HEIC, and 1 others like it: the datasets library leaves images of this kind out",
    ),
    "a table that is wrong": (
        lambda root: [
            *((root / s / c / "1.png", png(DIGITS[0])) for s in ("train", "test") for c in "ab"),
            (root / "train" / "a" / "metadata.csv", b"name,label\n1.png,0\n"),
        ],
        "cannot be read: ValueError: .*file_name",
    ),
    "two splits": (
        lambda root: [(root / "all" / "test-train" / c / "1.png", png(DIGITS[0])) for c in "ab"],
        "stands in two splits",
    ),
}  # fmt: skip


@BOTH
@pytest.mark.parametrize(("files", "message"), WRONG_FOLDERS.values(), ids=WRONG_FOLDERS)
def test_folders_of_images_that_are_wrong_are_one_error(tmp_path, image_cache, streaming, files, message):
    for path, content in files(tmp_path / "own"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_data(str(tmp_path / "own"), streaming=streaming)


def test_an_image_that_goes_away_is_named(tmp_path, image_cache):
    root = write_images(tmp_path / "images")
    data = load_data(str(root), streaming=True)
    (root / "train" / "0" / "03.png").unlink()
    with pytest.raises(DataError, match=r"train/0/03\.png: the image cannot be read: FileNotFoundError"):
        data.subset(12, 12)


def test_files_elsewhere_are_read_through_their_address(folder, hub, monkeypatch):
    files = pytest.importorskip("fsspec").filesystem("memory")
    addresses = []
    for path in sorted(folder.iterdir()):
        files.pipe(f"/data/{path.name}", path.read_bytes())
        addresses.append(f"memory://data/{path.name}")
    local_files = [Files(name, sorted(map(str, folder.glob(f"{name}*")))) for name in ("train", "test")]
    monkeypatch.setattr(sources, "_hub_files", lambda *_: [Files("train", addresses[1:]), Files("test", addresses[:1])])
    monkeypatch.setattr(sources, "_cached_files", lambda *_: local_files)
    remote = load_data("someone/images", streaming=True)
    assert type(load_data("someone/images")).__name__ == "ImageData"  # from files that were fetched
    files.pipe("/data/train-00000-of-00003.parquet", b"PAR1")
    with pytest.raises(DataError, match=r"memory://data/train-00000-of-00003.parquet is truncated, damaged"):
        load_data("someone/images", streaming=True)
    files.pipe("/data/train-00000-of-00003.parquet", (folder / "train-00000-of-00003.parquet").read_bytes())
    monkeypatch.undo()
    local = load_data(str(folder), streaming=True)
    assert remote.fingerprint == local.fingerprint
    batches = [StreamTrainBatches(data, PLAIN, CPU, batch_size=46, workers=1) for data in (remote, local)]
    for one, two in zip(*(batch.epoch(0) for batch in batches), strict=True):
        assert torch.equal(one[0], two[0])


def test_a_label_column_of_choice_extra_images_and_subfolders(tmp_path):
    for config, start in (("full", 200), ("cropped", 0)):
        for split, (first, last) in {"train": (0, 40), "test": (40, 60), "extra": (60, 90)}.items():
            rows = range(start + first, start + last)
            coarse = (TARGET[list(rows)] // 5).tolist()
            write(tmp_path / config / f"{split}-0.parquet", rows, label=None, fine_label=[0] * len(rows), coarse=coarse)
    with pytest.raises(DataError, match=r"several places \(cropped, full\): name one with data_args.config"):
        load_images(str(tmp_path), label_column="coarse")
    options = {"config": "cropped", "label_column": "coarse", "extra": True}
    data = load_images(str(tmp_path), **options)
    rows = [*range(40), *range(60, 90)]
    assert np.array_equal(data.train_images[:, 0].numpy(), DIGITS[rows])
    assert data.train_labels.tolist() == (TARGET[rows] // 5).tolist()
    assert load_data(str(tmp_path), **options, streaming=True).counts == (70, 20)
    # The limit is of both together.
    part = load_images(str(tmp_path), **options, train_limit=66)
    assert len(part.train_labels) == 66
    assert abs(part.train_labels.bincount() - 33).max() <= 1 + max(0, 33 - int(data.train_labels.bincount().min()))
    assert set(map(bytes, part.train_images.numpy())) <= set(map(bytes, data.train_images.numpy()))


def test_limits_take_the_same_number_of_each_class_from_the_front(folder):
    whole, part = load_images(str(folder)), load_images(str(folder), train_limit=30, test_limit=20)
    assert part.train_labels.bincount().tolist() == [3] * 10
    expected = sorted(
        row for label in range(10) for row in (whole.train_labels == label).nonzero().flatten()[:3].tolist()
    )
    assert torch.equal(part.train_images, whole.train_images[expected])
    assert part.fingerprint != whole.fingerprint
    odd = load_images(train_limit=57)
    assert len(odd.train_labels) == 57
    assert set(odd.train_labels.bincount().tolist()) == {5, 6}
    with pytest.raises(DataError, match="cannot take limit=2000 of the 1437 images"):
        load_images(train_limit=2000)
    with pytest.raises(DataError, match="a stream does not know"):
        load_data(str(folder), train_limit=20, streaming=True)


def test_a_part_of_what_is_streamed_is_held_for_measurements(folder):
    streamed = load_data(str(folder), streaming=True)
    part = streamed.subset(40, 20)
    assert same_images(part, load_images(str(folder), train_limit=40, test_limit=20))
    assert part.train_labels.bincount(minlength=10).tolist() == [4] * 10
    assert (part.fingerprint, part.mean, part.std) == (streamed.fingerprint, streamed.mean, streamed.std)
    assert same_images(streamed.subset(10**6, 10**6), load_images(str(folder)))
    resized = load_data(str(folder), image_size=6, augment="crop-flip")
    small = resized.subset(20, 10)
    assert small.train_images.shape == (20, 1, 6, 6)
    assert torch.equal(small.train_images, resized.subset(20, 10).train_images), "no random part"


def test_data_is_streamed_when_it_does_not_fit(folder, monkeypatch):
    def kind(data_args=None, **values):
        values = {"data": str(folder), "data_args": data_args or {}, "epochs": 1, "model": "resnet10_cifar", **values}
        recipe = Recipe.from_dict(values)
        return type(load_data(recipe.data, **recipe.data_options())).__name__

    assert kind() == "ImageData"
    assert kind(streaming=True) == kind(image_size=12) == "StreamedData"
    needed = 2 * 285 * 64  # twice what the decoded images take
    monkeypatch.setattr(data_module, "memory_of_a_process", lambda: needed - 1)
    assert kind() == "StreamedData"
    assert kind(streaming=False) == "ImageData"
    assert kind({"train_limit": 200}) == "ImageData"
    with pytest.raises(DataError, match="a stream does not know"):
        kind({"train_limit": 230})
    monkeypatch.setattr(data_module, "memory_of_a_process", lambda: needed)
    assert kind() == "ImageData"


def test_memory_is_shared_by_the_processes_of_a_machine(monkeypatch):
    alone = data_module.memory_of_a_process()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert data_module.memory_of_a_process() == alone // 4 > 2**20


@pytest.mark.skipif(CIFAR10 is None, reason="set TIMM_LOWRANK_CIFAR10 to a folder of CIFAR-10 parquet files")
def test_cifar10():
    data = load_images(CIFAR10, train_limit=1000, test_limit=500)
    assert data.train_images.shape == (1000, 3, 32, 32)
    assert data.class_names[0] == "airplane"
    assert data.train_labels.bincount().tolist() == [100] * 10
    assert data.mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=0.02)


# -------------------------------------------------------------------------------------------------- what does not

GREY = encoded(DIGITS[:20])
SIZE = "the image is 8 x 9 pixels and the first one is 8 x 8: set image_size, so that they are brought to one size"
GAPS = "labels must be integers without gaps"
MISSING = {
    "inside": ([0, 2], "no label 1 below the largest, 2, and " + GAPS),
    "from 1": ([1, 2], "no label 0 below the largest, 2, and " + GAPS),
    "many": ([0, 99], r"no label 1, 2, 3, 4, 5, ... 98 in all below the largest, 99, and " + GAPS),
}
WRONG_FILES = {
    "no image column": (
        {"image": None, "picture": GREY}, "no column 'img' or 'image'. It has label, picture. Set data_args.image_col",
    ),
    "no label column": (
        {"label": None, "klass": [0] * 20}, "no column 'label'. It has image, klass. Set data_args.label_column",
    ),
    "label too large": (
        {"label": [0] * 19 + [10]}, r"test-\S*parquet, row 19 has the label 10, outside the 10 classes 0 to 9$",
    ),
    "label negative": ({"label": [-1] + [3] * 19}, r"test-\S*parquet, row 0 has the label -1, outside the 10 classes"),
    "two labels": ({"label": [3, 10, 11] + [3] * 17}, r"row 1 has the label 10, .* \(2 such rows\)"),
    "labels of text": ({"label": ["a"] * 20}, GAPS),
    "fractions": ({"label": [0.5] * 20}, GAPS),
    "no labels": ({"label": [None] * 20}, GAPS),
    "a gap": ({"label": [None, *range(9), *range(10)], "group": 5}, GAPS + ", and 1 are missing"),
    "paths": ({"image": [f"{row}.png" for row in range(20)]}, "must be stored as bytes"),
    "first image missing": ({"image": [None, *GREY[1:]]}, r"test-\S*parquet, row 0: the image is missing"),
    "colours": (
        {"image": encoded(np.stack([DIGITS[:20]] * 3, axis=-1))}, "training images are grey and test images are not",
    ),
    "another size": ({"image": encoded(np.zeros((20, 9, 8), np.uint8))}, f"row 0: {SIZE}"),
}  # fmt: skip


@BOTH
@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize(("columns", "message"), WRONG_FILES.values(), ids=WRONG_FILES)
def test_wrong_files_are_one_error_before_training(own, streaming, statistics, columns, message):
    write(own / "test-00000-of-00001.parquet", range(20), statistics=statistics, **columns)
    with pytest.raises(DataError, match=message):
        load_data(str(own), streaming=streaming)


@BOTH
@pytest.mark.parametrize(("labels", "message"), MISSING.values(), ids=MISSING)
def test_a_label_that_no_training_image_has_needs_a_name(tmp_path, streaming, labels, message):
    for split in ("train", "test"):
        write(tmp_path / f"{split}.parquet", range(100), label=labels * 50)
    with pytest.raises(DataError, match=message):
        load_data(str(tmp_path), streaming=streaming)
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(num_classes=100)})
    for split in ("train", "test"):
        columns = {"img": encoded(DIGITS[:100]), "label": labels * 50}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / f"{split}.parquet")
    assert len(load_data(str(tmp_path), streaming=streaming).class_names) == 100


@BOTH
def test_classes_are_known_without_statistics(own, streaming):
    for path, rows in zip(sorted(own.glob("train*")), (range(90), range(90, 180), range(180, 230)), strict=True):
        write(path, rows, statistics=False)
    assert load_data(str(own), streaming=streaming).class_names == tuple("0123456789")


@BOTH
def test_empty_splits_single_classes_and_sizes_that_differ(own, streaming):
    write(own / "test-00000-of-00001.parquet", range(0))
    with pytest.raises(DataError, match=r"the test split of .* is empty"):
        load_data(str(own), streaming=streaming)
    write_shards(own)
    write(
        own / "train-00000-of-00003.parquet",
        range(20),
        image=encoded(np.zeros((8 + n, 8), np.uint8) for n in range(20)),
    )
    with pytest.raises(DataError, match=r"different sizes \(8 x 8, 8 x 9, 8 x 10\): set image_size"):
        load_data(str(own), streaming=streaming)
    assert load_data(str(own), streaming=streaming, image_size=10).image_size == (1, 10, 10)
    for path in own.iterdir():
        write(path, range(20), label=[0] * 20)
    with pytest.raises(DataError, match="holds a single class, 0: there is nothing to learn"):
        load_data(str(own), streaming=streaming)


@BOTH
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_truncated_file(own, streaming, keep):
    path = own / "train-00001-of-00003.parquet"
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(DataError, match=r"train-00001-of-00003.parquet is truncated, damaged or not parquet"):
        load_data(str(own), streaming=streaming)


def read_all(folder, streaming, workers):
    """Every training image, held or streamed."""
    data = load_data(str(folder), streaming=streaming)
    for _ in StreamTrainBatches(data, PLAIN, CPU, batch_size=23, workers=workers).epoch(0) if streaming else ():
        pass


DAMAGED = {
    "cut off": ({"bytes": png(DIGITS[0])[:50], "path": None}, "the image cannot be decoded"),
    "missing": (None, "the image is missing"),
    "another size": (encoded(np.zeros((1, 9, 8), np.uint8))[0], SIZE),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("streaming", "workers"), [(False, 0), (True, 0), (True, 2)])
@pytest.mark.parametrize(("image", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damage_names_file_and_row(own, streaming, workers, image, message):
    images = encoded(DIGITS[90:180])
    images[57] = image
    write(own / "train-00001-of-00003.parquet", range(90, 180), image=images)
    with pytest.raises(DataError, match=rf"^\S*train-00001-of-00003.parquet, row 57: {message}") as found:
        read_all(own, streaming, workers)
    assert not multiprocessing.active_children(), f"workers wait for the end of {found}"


@pytest.mark.parametrize(("streaming", "workers"), [(False, 0), (True, 1)])
def test_a_file_damaged_in_the_middle(own, streaming, workers):
    path = own / "train-00002-of-00003.parquet"
    content = bytearray(path.read_bytes())
    content[4 : len(content) // 2] = np.random.default_rng(0).bytes(len(content) // 2 - 4)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"train-00002-of-00003.parquet.*(damaged|cannot be decoded)"):
        read_all(own, streaming, workers)


@BOTH
def test_folders_names_and_numbers_that_are_not_there(tmp_path, own, streaming):
    with pytest.raises(DataError, match="must list a number for each of the 1 channels"):
        load_data(str(own), streaming=streaming, mean=[0.5, 0.5, 0.5])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no train split .* It holds neither parquet files nor images"):
        load_data(str(tmp_path / "empty"), streaming=streaming)
    (own / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(
        DataError, match=r"no test split \(test.parquet, test-00000-of-00001.parquet\). It holds train-00000"
    ):
        load_data(str(own), streaming=streaming)
    for wrong in ("/no/such/folder", "./here", "~nobody/x/y"):
        with pytest.raises(DataError, match="is not a folder"):
            load_data(wrong, streaming=streaming)
    with pytest.raises(DataError, match="has no extra images"):
        load_images(extra=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config": "x"}, "has no config 'x': drop data_args.config"),
        ({"label_column": "coarse"}, "has no label_column 'coarse'"),
        ({"image_column": "img"}, "has no image_column 'img'"),
        ({"train_split": "all"}, "has no split 'all'; it has train, test"),
        ({"test_split": "validation"}, "has no split 'validation'; it has train, test"),
    ],
)
def test_the_digits_are_what_they_are(options, message):
    with pytest.raises(DataError, match=message):
        load_images(**options)


def test_a_configuration_that_is_no_subfolder(tmp_path, own, image_cache):
    assert load_data(str(own), config="default").fingerprint == load_data(str(own), config="none").fingerprint
    with pytest.raises(DataError, match=r"has no subfolder 'none', it holds shards in own: change data_args.config"):
        load_data(str(tmp_path), config="none")
    assert load_data(str(tmp_path), config="default").counts == (230, 55)
    with pytest.raises(DataError, match="images has no subfolder 'none', it holds images"):
        load_data(str(write_images(tmp_path / "images")), config="none")


def test_test_images_are_never_those_of_the_training_by_default(own):
    with pytest.raises(DataError, match=r"no validation split .* It holds test-00000"):
        load_data(str(own), train_split="test")


@pytest.mark.parametrize("streaming", [True, False, "auto"])
def test_a_hub_name_without_network(monkeypatch, streaming):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = r"(?s)could not load 'nobody-here/no-such-images' from the Hub.*folder of parquet files or images with"
    with pytest.raises(DataError, match=message):
        load_data("nobody-here/no-such-images", streaming=streaming)


# ------------------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
@pytest.mark.parametrize("shape", [(1, 8000), (8000, 1), (40, 1500)])
def test_a_line_of_pixels_takes_no_more_than_its_centre(shape, crop_pct, monkeypatch):
    waves = np.sin(np.add.outer(*(np.arange(side) / 8 for side in shape)))
    pixels = (128 + 100 * waves).astype(np.uint8)
    decode = Decoder("L", (24, 24), resize=True, crop_pct=crop_pct)
    made, resize = [], functional.resize

    def watched(image, size, *arguments, **options):
        made.append(size)
        return resize(image, size, *arguments, **options)

    monkeypatch.setattr(functional, "resize", watched)
    small = decode(png(pixels), "here").astype(int)
    monkeypatch.setattr(decode_module, "LONGEST", 10**6)
    whole = decode(png(pixels), "here").astype(int)
    assert np.prod(made[0]) <= 10 * 24 * 24 / crop_pct**2 + 1000
    assert np.prod(made[1]) > 2 * np.prod(made[0])
    assert np.abs(small - whole).max() <= 16  # the sides are rounded to whole pixels, and the centre with them


def test_numbers_are_checked_before_memory_is_taken(own):
    write(own / "train-00002-of-00003.parquet", range(180, 230), label=[2**40] * 50)
    with pytest.raises(DataError, match=r"has the label 1099511627776 among 230 images, and labels must be integers"):
        load_data(str(own))
    huge = Decoder("L", (10**7, 10**7))
    with pytest.raises(DataError, match=r"55 images of 10000000 x 10000000 pixels do not fit into .*set image_size"):
        decoded(sources.open_source(str(write_shards(own / "other"))).test, None, 10, huge)


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
    assert Decoder("L", (24, 24), resize=True)(png(pixels[..., 0]), "here").shape == (1, 24, 24)


def written(image, kind, orientation=1, **options):
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    image.save(buffer, format=kind, exif=exif.tobytes(), **options)
    return buffer.getvalue()


def jpeg(pixels, orientation):
    return written(Image.fromarray(pixels), "jpeg", orientation, quality=100)


HALVES = np.repeat(np.array([255, 0], dtype=np.uint8), 32).reshape(8, 8)  # white above black
DEEP = (np.arange(64).reshape(8, 8) * 1040).astype(np.uint16)
DECODED = {
    "16 bit": (png(DEEP), DEEP >> 8),
    "upright": (jpeg(HALVES, 1), HALVES),
    "turned": (jpeg(HALVES, 6), np.rot90(HALVES, -1)),
    "upside down": (jpeg(HALVES, 3), HALVES[::-1]),
    "16 bit greymap": (b"P5 8 8 65535\n" + DEEP.astype(">u2").tobytes(), DEEP >> 8),
    "transparency": (written(Image.fromarray(HALVES).convert("LA"), "png"), HALVES),
    "palette of greys": (written(Image.fromarray(HALVES).convert("P"), "png"), HALVES),
}


@BOTH
@pytest.mark.parametrize(("image", "expected"), DECODED.values(), ids=DECODED)
def test_depth_and_orientation_are_read_as_they_were_meant(own, streaming, image, expected):
    for shard in own.glob("train-*"):
        shard.unlink()
    write(own / "train.parquet", range(10), image=[{"bytes": image, "path": None}] * 10)
    data = load_data(str(own), streaming=streaming)
    pixels = (data.subset(10, 10) if streaming else data).train_images[0]
    assert pixels.shape == (1, 8, 8)
    assert np.abs(pixels[0].numpy().astype(int) - expected).max() <= 8


def test_an_image_is_turned_though_its_other_tags_cannot_be_written_again():
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = io.BytesIO()
    Image.fromarray(HALVES).save(upright, format="jpeg", exif=exif, quality=100)
    # Behind the orientation the unit of the resolution, which should be a number, as four letters.
    tags = b"II*\0\x08\0\0\0" + b"\x02\0" + b"\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"
    tags += b"\x28\x01\x02\0\x04\0\0\0inc\0" + bytes(4)
    exif_of = upright.getvalue().index(b"Exif\0\0")
    length = int.from_bytes(upright.getvalue()[exif_of - 2 : exif_of], "big")
    segment = (len(tags) + 8).to_bytes(2, "big") + b"Exif\0\0" + tags
    image = upright.getvalue()[: exif_of - 2] + segment + upright.getvalue()[exif_of - 2 + length :]
    with pytest.raises(struct.error):
        ImageOps.exif_transpose(Image.open(io.BytesIO(image)))
    pixels = Decoder("L", (8, 8))(image, "here")[0]
    assert np.abs(pixels.astype(int) - np.rot90(HALVES, -1)).max() <= 8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_that_of_pillow(orientation):
    image = written(Image.fromarray(DIGITS[3]), "png", orientation)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(image))))
    assert np.array_equal(Decoder("L", (8, 8))(image, "here")[0], expected)


@BOTH
@pytest.mark.parametrize("kind", ["png", "jpeg", "tiff"])
def test_sizes_are_those_of_upright_images(own, streaming, kind):
    image = written(Image.fromarray(np.repeat(HALVES, 2, axis=0)), kind, 6)
    for split in ("train-00000-of-00003", "train-00001-of-00003", "train-00002-of-00003", "test-00000-of-00001"):
        write(own / f"{split}.parquet", range(10), image=[image] * 10)
    assert load_data(str(own), streaming=streaming).image_size == (1, 8, 16)


@pytest.mark.parametrize(
    ("kind", "pixels"),
    [
        ("tiff", DEEP.astype(np.int32) % 256),
        ("tiff", DEEP.astype(np.int32) - 500),
        ("tiff", DEEP.astype(np.int32) * 9),
        ("tiff", DEEP.astype(np.float32)),
        ("ppm", DEEP.astype(np.float32)),
    ],
    ids=["small", "negative", "large", "fractions", "fractions in a pixmap"],
)
def test_values_of_32_bits_are_refused_whatever_they_are(kind, pixels):
    image = written(Image.fromarray(pixels), kind)
    with pytest.raises(DataError, match="here: the image has values of 32 bits, whose range is not known: store 8 or"):
        Decoder("L", (8, 8), declared=True)(image, "here")


@BOTH
@pytest.mark.parametrize("row", [0, 40])
def test_one_coloured_image_makes_a_data_set_coloured(own, streaming, row):
    images = encoded(DIGITS[:90])
    images[row] = {"bytes": png(np.stack([DIGITS[0], 255 - DIGITS[0], DIGITS[1]], axis=-1)), "path": None}
    write(own / "train-00000-of-00003.parquet", range(90), image=images)
    assert load_data(str(own), streaming=streaming).image_size == (3, 8, 8)


COLOUR = np.stack([DIGITS[0], 255 - DIGITS[0], DIGITS[1]], axis=-1)


@BOTH
@pytest.mark.parametrize(("mode", "pillow"), [("rgb", "RGB"), ("grey", "L")])
@pytest.mark.parametrize("coloured", [[], [0], [40], range(90)], ids=["none", "first", "one", "all"])
def test_a_declared_mode_is_what_all_images_are_made(own, streaming, mode, pillow, coloured):
    pixels = [COLOUR if row in coloured else DIGITS[row] for row in range(90)]
    write(own / "train-00000-of-00003.parquet", range(90), image=[{"bytes": png(p), "path": None} for p in pixels])
    write(own / "test-00000-of-00001.parquet", range(10), image=encoded(np.stack([COLOUR] * 10)))
    data = load_data(str(own), streaming=streaming, mode=mode)
    images = (data.subset(230, 10) if streaming else data).train_images[:90].numpy()
    wanted = [np.asarray(Image.fromarray(p).convert(pillow)).reshape(8, 8, -1).transpose(2, 0, 1) for p in pixels]
    assert np.array_equal(images, np.stack(wanted))


def test_an_unknown_mode_is_refused(own):
    with pytest.raises(DataError, match=r"data_args\.mode='gray' is not one of rgb, grey, or null"):
        load_data(str(own), mode="gray")


@BOTH
@pytest.mark.parametrize("row", [0, 7, 19])
def test_one_coloured_test_image_behind_grey_training_images_names_the_key(own, streaming, row):
    images = [{"bytes": png(COLOUR if number == row else DIGITS[number]), "path": None} for number in range(20)]
    write(own / "test-00000-of-00001.parquet", range(20), image=images)
    with pytest.raises(DataError, match=rf"test images are not \(.*, row {row}\): set data_args.mode=rgb"):
        load_data(str(own), streaming=streaming)


@pytest.mark.parametrize(("row", "channels"), [(3, 3), (100, 1), (229, 3)])
def test_a_coloured_image_that_was_not_looked_at_is_one_error_that_names_the_key(own, hub, monkeypatch, row, channels):
    """On the Hub, where the images at either end are looked at before."""
    for path, rows in zip(sorted(own.glob("train*")), (range(90), range(90, 180), range(180, 230)), strict=True):
        images = [{"bytes": png(COLOUR if number == row else DIGITS[number]), "path": None} for number in rows]
        write(path, rows, image=images)
    memory = pytest.importorskip("fsspec").filesystem("memory")
    for path in own.iterdir():
        memory.pipe(f"/colours/{path.name}", path.read_bytes())
    local = [Files(name, sorted(map(str, own.glob(f"{name}*")))) for name in ("train", "test")]
    remote = [Files(f.split, [f"memory://colours/{os.path.basename(p)}" for p in f.paths]) for f in local]
    monkeypatch.setattr(sources, "_hub_files", lambda *_: remote)
    monkeypatch.setattr(sources, "_cached_files", lambda *_: local)
    data = load_data("someone/images", streaming=True)
    assert data.image_size[0] == channels
    if channels == 1:
        with pytest.raises(
            DataError, match=r"row 10: the image is coloured.*data_args.mode=rgb or data_args.mode=grey"
        ):
            data.subset(230, 10)
    assert load_data("someone/images").image_size[0] == 3  # held in memory after all: all are looked at
    declared = load_data("someone/images", streaming=True, mode="grey")
    assert declared.subset(230, 10).train_images.shape == (230, 1, 8, 8)


@BOTH
def test_a_split_is_its_name(own, streaming):
    counts = load_data(str(own), streaming=streaming).counts
    for other in ("train_unlabeled", "training_holdout", "train-extra-00000-of-00001", "test_corrupted"):
        write(own / f"{other}.parquet", range(7))
    assert load_data(str(own), streaming=streaming).counts == counts == (230, 55)


@BOTH
@pytest.mark.parametrize("names", ["ab", "bac"])
def test_class_names_that_do_not_agree(tmp_path, streaming, names):
    for split, own_names in (("train", "abc"), ("test", names)):
        features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=list(own_names))})
        columns = {"img": encoded(DIGITS[:10]), "label": [0, 1] * 5}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(
        DataError, match=r"class names in .*test.parquet \(.*\) are not those in .*train.parquet \(a, b, c\)"
    ):
        load_data(str(tmp_path), streaming=streaming)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mean": [123.7]}, "divide what is in 0 to 255"),
        ({"mean": [float("nan")]}, "in \\[0, 1\\]"),
        ({"std": [58.4]}, "in 0 to 255"),
        ({"mean": ["a half"]}, "mean=\\['a half'\\] must list a number for each of the 1 channels"),
        ({"std": [None]}, "std=\\[None\\] must list a number for each of the 1 channels"),
    ],
)
def test_statistics_of_another_scale(own, values, message):
    with pytest.raises(DataError, match=message):
        load_data(str(own), **values)


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


def test_an_evaluation_of_a_streamed_run_reads_a_part(folder):
    recipe = Recipe(model="resnet10_cifar", data=str(folder), image_size=12, epochs=1)
    network = SimpleNamespace(recipe=recipe)
    images = evaluation.images_of(evaluation.Options(network="runs/x"), [network], 30, 20)
    assert (images.image_size, images.counts) == ((1, 12, 12), (30, 20))
    streamed = load_data(str(folder), streaming=True, image_size=12)
    assert images.fingerprint == streamed.fingerprint
    assert streamed.data_config == {
        "input_size": (1, 12, 12), "mean": (0.449,), "std": (0.226,), "crop_pct": 0.875, "interpolation": "bicubic"
    }  # fmt: skip
    with pytest.raises(EvaluationError, match="--other-labels needs images that fit into memory"):
        evaluation.images_of(evaluation.Options(network="runs/x", other_labels="coarse"), [network], 30, 20)


def test_other_labels_are_those_of_the_images_that_a_limit_takes(tmp_path):
    for split, rows in (("train", range(400)), ("test", range(400, 600))):
        write(tmp_path / f"{split}.parquet", rows, coarse=(TARGET[rows] >= 7).astype(int).tolist())
    limits = {"train_limit": 50, "test_limit": 40}
    network = SimpleNamespace(recipe=Recipe(model="resnet10_cifar", data=str(tmp_path), data_args=limits, epochs=1))
    options = evaluation.Options(network="runs/x", other_labels="coarse")
    images = evaluation.images_of(options, [network], 30, 20)
    train, test = evaluation._load_other_labels(options, [network])
    assert train.tolist() == (images.train_labels >= 7).tolist()
    assert test.tolist() == (images.test_labels >= 7).tolist()
