"""Loading, cutting, augmenting and batching images; every kind of damaged data is one clear error."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from timm_lowrank.data.augment import Transform, crop, flip
from timm_lowrank.data.loader import EvalBatches, TrainBatches
from timm_lowrank.data.sources import Columns, _from_hub
from timm_lowrank.training import DataError, RecipeError, load_images

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

DIGITS = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)
TARGET = load_digits().target
CIFAR10 = os.environ.get("TIMM_LOWRANK_CIFAR10")


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png")
    return buffer.getvalue()


def write(path: Path, rows: slice, image: str = "img", label: str = "label", /, **columns: list) -> Path:
    """A parquet file of digits in the layout of the Hub: the names of two columns, and columns given outright."""
    images = [{"bytes": png(pixels), "path": None} for pixels in DIGITS[rows]]
    columns = {image: images, label: TARGET[rows].tolist(), **columns}
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path)
    return path


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "train-00000-of-00002.parquet", slice(0, 60))
    write(tmp_path / "train-00001-of-00002.parquet", slice(60, 100))
    write(tmp_path / "test-00000-of-00001.parquet", slice(100, 150))
    return tmp_path


# ------------------------------------------------------------------------------------------------------- what loads


def test_digits_are_a_fixed_stratified_split():
    data = load_images()
    assert data.train_images.shape == (1437, 1, 8, 8)
    assert data.test_images.shape == (360, 1, 8, 8)
    assert data.train_images.dtype == torch.uint8
    assert data.train_labels.dtype == torch.int64
    assert data.test_labels.bincount().min() >= 34
    assert data.fingerprint == load_images().fingerprint
    pixels = data.train_images.double() / 255
    assert data.mean[0] == pytest.approx(pixels.mean().item(), abs=1e-4)
    assert data.std[0] == pytest.approx(pixels.std(correction=0).item(), abs=1e-4)
    together = torch.cat([data.train_images, data.test_images]).flatten(1).double()
    assert torch.equal(together.sum(0), torch.from_numpy(DIGITS.reshape(1797, -1).astype(np.float64)).sum(0))


def test_a_folder_of_parquet_files(folder):
    data = load_images(str(folder))
    assert np.array_equal(data.train_images[:, 0].numpy(), DIGITS[:100])
    assert np.array_equal(data.test_images[:, 0].numpy(), DIGITS[100:150])
    assert data.train_labels.tolist() == TARGET[:100].tolist()
    assert data.class_names == tuple("0123456789")


def test_colour_images_keep_their_channels(tmp_path):
    colour = np.stack([DIGITS[:20], 255 - DIGITS[:20], DIGITS[20:40]], axis=-1)
    for split in ("train", "test"):
        images = [{"bytes": png(pixels), "path": None} for pixels in colour]
        write(tmp_path / f"{split}.parquet", slice(0, 20), "image", image=images)
    data = load_images(str(tmp_path))
    assert np.array_equal(data.train_images.numpy(), colour.transpose(0, 3, 1, 2))
    assert len(data.mean) == 3
    assert data.image_size == (3, 8, 8)


def test_the_hub_path_reads_the_same(folder, tmp_path_factory, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    splits = _from_hub(str(folder), None, ["train", "test"], Columns(None, "label"))
    assert splits["train"].labels.tolist() == TARGET[:100].tolist()
    assert splits["train"].images[3].as_py() == png(DIGITS[3])


def test_a_label_column_of_choice_extra_images_and_subfolders(tmp_path):
    for config, start in (("full", 200), ("cropped", 0)):
        for split, rows in (("train", (0, 40)), ("test", (40, 60)), ("extra", (60, 90))):
            chosen = slice(start + rows[0], start + rows[1])
            coarse = (TARGET[chosen] // 5).tolist()
            write(tmp_path / config / f"{split}-0.parquet", chosen, "img", "fine_label", coarse_label=coarse)
    with pytest.raises(DataError, match=r"several places \(cropped, full\): name one with data_args.config"):
        load_images(str(tmp_path), label_column="coarse_label")
    data = load_images(str(tmp_path), config="cropped", label_column="coarse_label", extra=True)
    assert np.array_equal(data.train_images[:, 0].numpy(), np.concatenate([DIGITS[:40], DIGITS[60:90]]))
    assert data.train_labels.tolist() == (np.concatenate([TARGET[:40], TARGET[60:90]]) // 5).tolist()


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


def test_given_statistics_win(folder):
    data = load_images(str(folder), mean=[0.5], std=[0.25])
    assert (data.mean, data.std) == ((0.5,), (0.25,))
    with pytest.raises(DataError, match="must list a number for each of the 1 channels"):
        load_images(str(folder), mean=[0.5, 0.5, 0.5])


@pytest.mark.skipif(CIFAR10 is None, reason="set TIMM_LOWRANK_CIFAR10 to a folder of CIFAR-10 parquet files")
def test_cifar10():
    data = load_images(CIFAR10, train_limit=1000, test_limit=500)
    assert data.train_images.shape == (1000, 3, 32, 32)
    assert data.class_names[0] == "airplane"
    assert data.train_labels.bincount().tolist() == [100] * 10
    assert data.mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=0.02)


# -------------------------------------------------------------------------------------------------- what does not


def test_missing_columns(folder):
    write(folder / "test-00000-of-00001.parquet", slice(0, 20), "picture")
    with pytest.raises(
        DataError, match=r"no column 'img' or 'image'. It has picture, label. Set data_args.image_column"
    ):
        load_images(str(folder))
    write(folder / "test-00000-of-00001.parquet", slice(0, 20), "img", "fine_label")
    with pytest.raises(DataError, match=r"no column 'label'. It has img, fine_label. Set data_args.label_column"):
        load_images(str(folder))


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_truncated_file(folder, keep):
    path = folder / "train-00001-of-00002.parquet"
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(DataError, match=r"train-00001-of-00002.parquet is truncated, damaged or not parquet"):
        load_images(str(folder))


def test_a_file_damaged_in_the_middle(folder):
    path = folder / "train-00000-of-00002.parquet"
    content = bytearray(path.read_bytes())
    content[4 : len(content) // 2] = np.random.default_rng(0).bytes(len(content) // 2 - 4)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"damaged|cannot be decoded"):
        load_images(str(folder))


def test_an_image_that_cannot_be_decoded(folder):
    images = [{"bytes": png(pixels), "path": None} for pixels in DIGITS[:20]]
    images[7]["bytes"] = images[7]["bytes"][:40]
    write(folder / "test-00000-of-00001.parquet", slice(0, 20), img=images)
    with pytest.raises(DataError, match="the image in row 7 cannot be decoded"):
        load_images(str(folder))


@pytest.mark.parametrize("wrong", [10, -1])
def test_a_label_outside_the_classes(folder, wrong):
    labels = TARGET[:20].tolist()
    labels[3] = wrong
    write(folder / "test-00000-of-00001.parquet", slice(0, 20), label=labels)
    with pytest.raises(DataError, match=f"row 3 has the label {wrong}, outside the 10 classes 0 to 9"):
        load_images(str(folder))


@pytest.mark.parametrize("labels", [["a"] * 20, [0.5] * 20, [None] * 20, [None, *range(9), *range(10)]])
def test_labels_that_are_no_integers(folder, labels):
    write(folder / "test-00000-of-00001.parquet", slice(0, 20), label=labels)
    with pytest.raises(DataError, match="labels must be integers without gaps"):
        load_images(str(folder))


def test_images_that_are_not_bytes(folder):
    write(folder / "test-00000-of-00001.parquet", slice(0, 20), img=[f"{row}.png" for row in range(20)])
    with pytest.raises(DataError, match="must be stored as bytes"):
        load_images(str(folder))


def test_mixed_sizes(folder):
    images = [{"bytes": png(pixels), "path": None} for pixels in DIGITS[:20]]
    images[5]["bytes"] = png(np.zeros((9, 8), dtype=np.uint8))
    write(folder / "train-00001-of-00002.parquet", slice(0, 20), img=images)
    with pytest.raises(DataError, match="row 65 is 8 x 9 pixels and row 0 is 8 x 8"):
        load_images(str(folder))


def test_an_empty_split_and_a_single_class(folder):
    write(folder / "test-00000-of-00001.parquet", slice(0, 0), label=pyarrow.array([], pyarrow.int64()))
    with pytest.raises(DataError, match=r"the test split of .* (is empty|must be stored as bytes)"):
        load_images(str(folder))
    write(folder / "test-00000-of-00001.parquet", slice(0, 20), label=[0] * 20)
    for part, count in (("train-00000-of-00002", 60), ("train-00001-of-00002", 40)):
        write(folder / f"{part}.parquet", slice(0, count), label=[0] * count)
    with pytest.raises(DataError, match="holds a single class"):
        load_images(str(folder))


def test_folders_and_names_that_are_not_there(tmp_path, folder):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match=r"no train split .* It holds no parquet file at all"):
        load_images(str(empty))
    (folder / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(DataError, match=r"no test split \(test\*.parquet\). It holds train-00000"):
        load_images(str(folder))
    for wrong in ("/no/such/folder", "./here", "~nobody/x/y"):
        with pytest.raises(DataError, match="is not a folder"):
            load_images(wrong)
    with pytest.raises(DataError, match="cannot take limit=2000 of the 1437 images"):
        load_images(train_limit=2000)
    with pytest.raises(DataError, match="has no extra images"):
        load_images(extra=True)


def test_a_hub_name_without_network(monkeypatch):
    datasets = pytest.importorskip("datasets")
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = r"(?s)could not load 'nobody-here/no-such-images' from the Hub.*local folder of parquet files with --data"
    with pytest.raises(DataError, match=message):
        load_images("nobody-here/no-such-images")


# ------------------------------------------------------------------------------------------------------ augmentation


def test_a_crop_is_a_window_of_the_padded_image():
    images = torch.arange(1, 1 + 40 * 2 * 6 * 6).view(40, 2, 6, 6)
    cropped = crop(images, 2, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images, (2,) * 4)
    places = set()
    for before, after in zip(padded, cropped, strict=True):
        windows = [(y, x) for y in range(5) for x in range(5) if torch.equal(before[:, y : y + 6, x : x + 6], after)]
        assert len(windows) == 1
        places.add(windows[0])
    assert len(places) > 12  # 40 draws from 25 places


def test_a_flip_mirrors_about_half_of_the_images():
    images = torch.rand(400, 1, 3, 3)
    flipped = flip(images, torch.Generator().manual_seed(0))
    mirrored = [torch.equal(after, before.flip(-1)) for before, after in zip(images, flipped, strict=True)]
    same = [torch.equal(after, before) for before, after in zip(images, flipped, strict=True)]
    assert all(a != b for a, b in zip(mirrored, same, strict=True))
    assert 150 < sum(mirrored) < 250


def test_a_transform_normalises_and_depends_on_its_generator_alone():
    data = load_images()
    transform = Transform(data.mean, data.std, "crop-flip", torch.device("cpu"))
    plain = transform(data.train_images)
    assert plain.dtype == torch.float32
    assert abs(plain.mean().item()) < 1e-3
    assert abs(plain.std().item() - 1) < 1e-3
    state = torch.get_rng_state()
    one, two, other = (transform(data.train_images, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert not torch.equal(one, plain)
    assert torch.equal(state, torch.get_rng_state())
    untouched = Transform(data.mean, data.std, "none", torch.device("cpu"))
    assert torch.equal(untouched(data.train_images, torch.Generator()), plain)


# ----------------------------------------------------------------------------------------------------------- batches


def batches(**options) -> TrainBatches:
    images = torch.arange(100, dtype=torch.uint8).view(100, 1, 1, 1).expand(100, 1, 8, 8)
    transform = Transform([0.0], [1.0], "none", torch.device("cpu"))
    return TrainBatches(images, torch.arange(100), transform, **{"batch_size": 24, **options})


def test_an_epoch_is_a_permutation_of_its_own():
    loader = batches(seed=1)
    first = torch.cat(list(loader.indices(0)))
    assert len(loader) == 4
    assert len(first) == 96
    assert len(first.unique()) == 96
    assert torch.equal(first, torch.cat(list(batches(seed=1).indices(0))))
    assert not torch.equal(first, torch.cat(list(loader.indices(1))))
    assert not torch.equal(first, torch.cat(list(batches(seed=2).indices(0))))
    for images, labels in loader.epoch(0):
        assert torch.equal((images[:, 0, 0, 0] * 255).round().long(), labels)


@pytest.mark.parametrize("parts", [1, 3])
def test_processes_share_each_batch(parts):
    whole = torch.cat(list(batches().indices(5))).view(4, 24)
    shares = [torch.stack(list(batches(parts=parts, process=p, processes=4).indices(5))) for p in range(4)]
    assert {share.shape for share in shares} == {(4 * parts, 24 // 4 // parts)}
    together = torch.cat([share.view(4, -1) for share in shares], dim=1)
    assert torch.equal(together.sort(dim=1).values, whole.sort(dim=1).values)


def test_a_batch_that_does_not_fit_is_an_error():
    with pytest.raises(RecipeError, match="batch_size=24 cannot be divided among 5 processes"):
        batches(processes=5)
    with pytest.raises(RecipeError, match="batch_size=101 is more than the 100 training images"):
        batches(batch_size=101)


def test_every_test_image_is_seen_once():
    transform = Transform([0.0], [1.0], "none", torch.device("cpu"))
    images, labels = torch.zeros(101, 1, 8, 8, dtype=torch.uint8), torch.arange(101)
    seen = [
        label
        for process in range(3)
        for _, part in EvalBatches(images, labels, transform, batch_size=10, process=process, processes=3)
        for label in part.tolist()
    ]
    assert sorted(seen) == list(range(101))
