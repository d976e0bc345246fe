"""Images per second of the package's training loop beside a bare loop with the same network, in one run.

    python benchmarks/recipe.py --data CIFAR10               # a folder of its parquet files, or a name on the Hub
    python benchmarks/recipe.py --data digits --rounds 3     # without a download

The recipe trains its plain twin, so that what is compared is the loop: reading, augmentation, metrics, accelerate. One
bare loop has tensors that are in memory and no augmentation, which nothing can be much faster than; the other is
timm's: `timm.data.create_loader` with random crops and flips of PIL images, in the main process or in --workers. Each
turn is an epoch.
On a CPU the ratios are of processor seconds, which other processes on the machine disturb less; seconds
on the clock stand beside them.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import timm.data
import torch
from accelerate.state import AcceleratorState
from measure import print_table, synchronize, write_json
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from timm_lowrank.data import ImageData, load_data
from timm_lowrank.environment import device_name
from timm_lowrank.training.loop import train_epoch
from timm_lowrank.training.recipe import Recipe, load_recipe
from timm_lowrank.training.state import build

Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]


@dataclasses.dataclass(frozen=True)
class Measured:
    """One loop in one precision: seconds of each round, of the processor and on the clock."""

    loop: str
    precision: str
    processor: list[float]
    clock: list[float]


class Pictures(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """The images as timm's transforms want them."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.transform: Callable[[Image.Image], Tensor] | None = None  # create_loader sets it
        mode = "L" if images.shape[1] == 1 else "RGB"
        self._images = [Image.fromarray(i[0].numpy() if mode == "L" else i.permute(1, 2, 0).numpy()) for i in images]
        self._labels = labels.tolist()

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        assert self.transform is not None
        return self.transform(self._images[index]), self._labels[index]


def bare_epoch(network: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches, device: str, half: bool) -> None:
    """What a loop cannot do without."""
    network.train()
    for images, labels in batches():
        images = images.to(device).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device, torch.bfloat16, enabled=half):
            logits = network(images)
        loss = functional.cross_entropy(logits.float(), labels.to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def loops(recipe: Recipe, data: ImageData, folder: Path, workers: int) -> dict[str, Callable[[], None]]:
    """Name -> an epoch of it."""
    AcceleratorState._reset_state()
    state = build(recipe, data, folder)
    device, half, size = state.accelerator.device.type, recipe.precision == "bf16", recipe.batch_size
    count = len(data.train_images) // size * size
    epochs = iter(range(1, 10_000))

    def ours() -> None:
        train_epoch(state, next(epochs) % recipe.epochs, lambda epoch, step: None)

    images = data.train_images[:count].float().div(255).sub(0.5).to(device)
    labels = data.train_labels[:count].to(device)

    def in_memory() -> Iterable[tuple[Tensor, Tensor]]:
        order = torch.randperm(count, device=device)
        return ((images[part], labels[part]) for part in order.split(size))

    loader = timm.data.create_loader(
        Pictures(data.train_images[:count], data.train_labels[:count]), tuple(data.image_size), size, is_training=True,
        train_crop_mode="rkrc", hflip=0.5, color_jitter=None, auto_augment=None, num_workers=workers,
        use_prefetcher=False, mean=(0.5,) * data.image_size[0], std=(1.0,) * data.image_size[0],
        device=torch.device(device),
    )  # fmt: skip

    def bare(batches: Batches) -> Callable[[], None]:
        network = build(recipe, data, folder).lowrank.backbone
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, nesterov=True)
        return lambda: bare_epoch(network, optimizer, batches, device, half)

    return {"recipe": ours, "bare, in memory": bare(in_memory), "bare, timm's loader": bare(lambda: loader)}


def measure(recipe: Recipe, data: ImageData, rounds: int, workers: int) -> list[Measured]:
    """All loops of one precision, taking turns; the first turn is not counted."""
    with tempfile.TemporaryDirectory() as folder:
        made = loops(recipe, data, Path(folder), workers)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        measured = {name: Measured(name, recipe.precision, [], []) for name in made}
        for turn in range(rounds + 1):
            for name, epoch in made.items():
                synchronize(device)
                clock, processor = time.perf_counter(), time.process_time()
                epoch()
                synchronize(device)
                if turn:
                    measured[name].processor.append(time.process_time() - processor)
                    measured[name].clock.append(time.perf_counter() - clock)
    return list(measured.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="a folder or a name on the Hub (default: digits)")
    parser.add_argument("--model", default="resnet10_cifar")
    parser.add_argument("--images", type=int, default=1280, help="of an epoch")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0, help="of timm's loader; their processor seconds do not count")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = load_data(options.data, train_limit=options.images, test_limit=options.batch_size, streaming=False)
    assert isinstance(data, ImageData)
    measured = []
    for precision in ("no", "bf16"):
        recipe = Recipe.from_dict(
            load_recipe("cifar10-fast").to_dict()
            | {"data": options.data, "model": options.model, "batch_size": options.batch_size, "precision": precision}
            | {"lowrank": {"branches": {"layer3": 20}, "enabled": False}}
        )
        measured += measure(recipe, data, options.rounds, options.workers)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = len(data.train_images) // options.batch_size * options.batch_size
    rows = []
    for one in measured:
        (ours,) = [other for other in measured if (other.loop, other.precision) == ("recipe", one.precision)]
        pairs = {"processor": (one.processor, ours.processor), "clock": (one.clock, ours.clock)}
        if device.type == "cuda":
            del pairs["processor"]
        ratios = [statistics.median(b / o for b, o in zip(*pair, strict=True)) for pair in pairs.values()]
        speed = images / statistics.median(one.clock)
        rows.append([one.loop, one.precision, f"{speed:,.0f}", *(f"{ratio:.2f}" for ratio in ratios)])
    kinds = ["clock"] if device.type == "cuda" else ["processor seconds", "clock"]
    title = f"{options.model}, {device_name(device)}, {images} images an epoch, {options.rounds} rounds"
    print_table(title, ["loop", "precision", "images/s", *(f"recipe is x as fast, {kind}" for kind in kinds)], rows)
    if options.json:
        write_json(options.json, {
            "model": options.model, "images": images, "measured": [dataclasses.asdict(one) for one in measured],
        })  # fmt: skip


if __name__ == "__main__":
    main()
