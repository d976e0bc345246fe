"""Batches, held or streamed: their order is right and known before an image is read; augmentation is what it says."""

import numpy as np
import pytest
import torch
from parquet_images import write, write_shards

from timm_lowrank.data import load_data, load_images
from timm_lowrank.data.augment import Transform, crop, flip
from timm_lowrank.data.batches import EvalBatches, StreamEvalBatches, StreamTrainBatches, TrainBatches
from timm_lowrank.data.order import EpochOrder
from timm_lowrank.errors import RecipeError

CPU = torch.device("cpu")
PLAIN = Transform([0.0], [1.0], "none", CPU)

# Workers that are more than the cores of the machine are slow, and what this is about.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    """Shards that nobody changes."""
    return load_data(str(write_shards(tmp_path_factory.mktemp("data"))), streaming=True)


@pytest.fixture(scope="module")
def memory(streamed):
    """The same images in memory."""
    return load_images(streamed.name)


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


# -------------------------------------------------------------------------------------------------------- streamed


@pytest.mark.parametrize(("processes", "workers", "parts"), [(1, 0, 1), (1, 3, 1), (2, 2, 1), (4, 0, 2), (3, 9, 2)])
def test_all_processes_together_see_what_is_in_memory(streamed, memory, processes, workers, parts):
    options = {"batch_size": 24, "parts": parts, "seed": 5, "processes": processes, "workers": workers, "buffer": 40}
    readers = [StreamTrainBatches(streamed, PLAIN, CPU, process=p, **options) for p in range(processes)]
    everything = [list(reader.epoch(1)) for reader in readers]
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
    rest = readers[-1].epoch(1, first=4)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(rest, everything[-1][4:], strict=True))


@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (3, 2), (60, 1)])
def test_every_test_image_is_streamed_once_and_in_order(streamed, memory, processes, workers):
    options = {"batch_size": 4, "processes": processes, "workers": workers}
    readers = [StreamEvalBatches(streamed, PLAIN, CPU, process=p, **options) for p in range(processes)]
    assert sum(len(batch) for reader in readers for batch in reader.batches) == 55
    if processes > 55:  # there is nothing for some of them
        readers = [reader for reader in readers if not reader.batches][:1] + readers[:2]
    images, labels = zip(*(batch for reader in readers for batch in reader), strict=True)
    count = 55 if processes < 55 else len(labels)
    assert torch.equal(torch.cat(labels), memory.test_labels[:count])
    assert torch.equal((torch.cat(images) * 255).round().to(torch.uint8), memory.test_images[:count])


def test_a_single_row_group_serves_many_readers(tmp_path):
    write(tmp_path / "train-0.parquet", range(50), group=50)
    write(tmp_path / "test-0.parquet", range(50, 60))
    whole, streamed = load_images(str(tmp_path)), load_data(str(tmp_path), streaming=True)
    options = {"batch_size": 10, "processes": 2, "workers": 3}
    readers = [StreamTrainBatches(streamed, PLAIN, CPU, process=p, **options) for p in range(2)]
    labels = torch.cat([labels for reader in readers for _, labels in reader.epoch(0)])
    assert torch.equal(labels.sort().values, whole.train_labels.sort().values)


# ------------------------------------------------------------------------------------------------------ augmentation


def test_a_crop_is_a_window_of_the_padded_image():
    images = torch.arange(1, 1 + 40 * 2 * 6 * 6).view(40, 2, 6, 6)
    cropped = crop(images, 2, torch.randint(5, (2, 40, 1), generator=torch.Generator().manual_seed(0)))
    padded = torch.nn.functional.pad(images, (2,) * 4)
    places = set()
    for before, after in zip(padded, cropped, strict=True):
        windows = [(y, x) for y in range(5) for x in range(5) if torch.equal(before[:, y : y + 6, x : x + 6], after)]
        assert len(windows) == 1
        places.add(windows[0])
    assert len(places) > 12  # 40 draws from 25 places


def test_a_flip_mirrors_the_images_that_were_drawn():
    images = torch.rand(3, 1, 3, 3)
    flipped = flip(images, torch.tensor([True, False, True]))
    assert torch.equal(flipped, torch.stack([images[0].flip(-1), images[1], images[2].flip(-1)]))


def test_draws_cover_all_places_and_mirror_about_half():
    draws = Transform([0.0], [1.0], "crop-flip", CPU).draw(400, 16, torch.Generator().manual_seed(0))
    assert set(draws.offsets[0].flatten().tolist()) == set(draws.offsets[1].flatten().tolist()) == set(range(5))
    assert 150 < draws.mirrored.sum() < 250
    cut = Transform([0.0], [1.0], "crop", CPU).draw(400, 16, torch.Generator().manual_seed(0))
    assert torch.equal(cut.offsets, draws.offsets)
    assert cut.mirrored is None


def test_a_transform_normalises_and_depends_on_what_was_drawn_alone():
    data = load_images()
    transform = Transform(data.mean, data.std, "crop-flip", CPU)
    plain = transform(data.train_images)
    assert plain.dtype == torch.float32
    assert abs(plain.mean().item()) < 1e-3
    assert abs(plain.std().item() - 1) < 1e-3
    state = torch.get_rng_state()
    drawn = [transform.draw(len(plain), 8, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    one, two, other = (transform(data.train_images, draws) for draws in drawn)
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert not torch.equal(one, plain)
    assert torch.equal(state, torch.get_rng_state())
    untouched = Transform(data.mean, data.std, "none", CPU)
    assert torch.equal(untouched(data.train_images, untouched.draw(len(plain), 8, torch.Generator())), plain)


def test_batches_that_are_prepared_together_are_those_of_one_at_a_time(monkeypatch):
    data = load_images()
    loader = TrainBatches(
        data.train_images, data.train_labels, Transform(data.mean, data.std, "crop-flip", CPU), batch_size=64
    )
    alone = list(loader.epoch(3))
    monkeypatch.setattr(TrainBatches, "_prepared_together", lambda self, batch: 3)
    for first in (0, 4):
        together = list(loader.epoch(3, first))
        assert len(together) == len(alone) - first
        for (images, labels), (same_images, same_labels) in zip(alone[first:], together, strict=True):
            assert torch.equal(images, same_images)
            assert torch.equal(labels, same_labels)


# ----------------------------------------------------------------------------------------------------------- in memory


def batches(**options) -> TrainBatches:
    images = torch.arange(100, dtype=torch.uint8).view(100, 1, 1, 1).expand(100, 1, 8, 8)
    return TrainBatches(images, torch.arange(100), PLAIN, **{"batch_size": 24, **options})


def test_an_epoch_is_a_permutation_of_its_own():
    loader = batches(seed=1)
    first = torch.cat(list(loader.indices(0)))
    assert len(loader) == 4
    assert len(first) == 96
    assert len(first.unique()) == 96
    assert torch.equal(first, torch.cat(list(batches(seed=1).indices(0))))
    assert not torch.equal(first, torch.cat(list(loader.indices(1))))
    assert not torch.equal(first, torch.cat(list(batches(seed=2).indices(0))))
    for (images, labels), chosen in zip(loader.epoch(0), loader.indices(0), strict=True):
        assert torch.equal((images[:, 0, 0, 0] * 255).round().long(), labels)
        assert torch.equal(labels, chosen)
    assert torch.equal(torch.cat([labels for _, labels in loader.epoch(0, first=2)]), first[48:])


@pytest.mark.parametrize("parts", [1, 3])
def test_processes_share_each_batch(parts):
    whole = torch.cat(list(batches().indices(5))).view(4, 24)
    shares = [torch.stack(list(batches(parts=parts, process=p, processes=4).indices(5))) for p in range(4)]
    assert {share.shape for share in shares} == {(4 * parts, 24 // 4 // parts)}
    together = torch.cat([share.view(4, -1) for share in shares], dim=1)
    assert torch.equal(together.sort(dim=1).values, whole.sort(dim=1).values)


def test_a_batch_that_does_not_fit_is_an_error(streamed):
    def from_shards(**options):
        return StreamTrainBatches(streamed, PLAIN, CPU, **{"batch_size": 24, **options})

    for made, count in ((batches, 100), (from_shards, 230)):
        with pytest.raises(RecipeError, match="batch_size=24 cannot be divided among 5 processes"):
            made(processes=5)
        with pytest.raises(RecipeError, match="among 4 processes with gradient_accumulation=4"):
            made(processes=4, parts=4)
        with pytest.raises(RecipeError, match=f"batch_size={count + 1} is more than the {count} training images"):
            made(batch_size=count + 1)


def test_every_test_image_is_seen_once():
    images, labels = torch.zeros(101, 1, 8, 8, dtype=torch.uint8), torch.arange(101)
    seen = [
        label
        for process in range(3)
        for _, part in EvalBatches(images, labels, PLAIN, batch_size=10, process=process, processes=3)
        for label in part.tolist()
    ]
    assert sorted(seen) == list(range(101))
