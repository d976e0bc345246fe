"""What the numbers of an `Embedder` tell, beside the principal components of all features.

    python benchmarks/embedding.py cifar10-resnet10-2lr --data CIFAR10

For each branch of a checkpoint, and 5, 10 and 20 numbers: the accuracy of the package's linear classifier (hinge loss),
fitted on training images and tested on test images, on the embedding as training left it, on the one whose directions
were taken from the training images, and on the principal components of the whole layer.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from measure import write_json
from torch import Tensor

import timm_lowrank as tlr
from timm_lowrank.data import ImageData, load_data
from timm_lowrank.evaluation import PixelModel
from timm_lowrank.evaluation.maxmargin import linear_accuracy
from timm_lowrank.evaluation.representations import activations
from timm_lowrank.text import markdown_table

SIZES = (5, 10, 20)


def embedded(embed: tlr.Embedder, images: Tensor) -> Tensor:
    """(n, size) of images that the network takes."""
    with torch.no_grad():
        return torch.cat([embed(batch) for batch in images.split(500)])


def main() -> None:
    """Prints a table and writes benchmarks/results/embedding.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="name, folder or repository of a network with branches")
    parser.add_argument("--data", required=True, help="folder or name of its data set")
    parser.add_argument("--images", type=int, default=5000, help="of each split")
    parser.add_argument("--output", type=Path, default="benchmarks/results/embedding.json")
    options = parser.parse_args()
    model = tlr.from_pretrained(options.checkpoint)
    assert isinstance(model, tlr.LowRankModel)
    model.eval()
    pixels = PixelModel(model)
    data = load_data(options.data)
    assert isinstance(data, ImageData)
    train, test = (part[: options.images].float() / 255 for part in (data.train_images, data.test_images))
    labels, test_labels = data.train_labels[: options.images], data.test_labels[: options.images]
    inputs = [(part - pixels.mean) / pixels.std for part in (train, test)]  # what the network itself takes
    found: dict[str, dict[str, float | None]] = {}
    for layer, branch in model.branches.items():
        whole = [activations(pixels, part, [layer])[layer] for part in (train, test)]
        components = linear_accuracy(whole[0], labels, whole[1], test_labels, [*SIZES])
        for size, component in zip(SIZES, components, strict=True):
            row: dict[str, float | None] = {}
            for name, images in (("as trained", None), ("from images", inputs[0].split(500))):
                if images is None and (branch.head is None or len(branch.head.directions) < size):
                    row[name] = None  # which directions lead is not known
                    continue
                embed = tlr.Embedder(model, layer, size, images=images)
                seen, unseen = (embedded(embed, part) for part in inputs)
                row[name] = linear_accuracy(seen, labels, unseen, test_labels, [None])[0]
            found[f"{layer}, {size}"] = {**row, "principal components of all features": component}
            print(layer, size, found[f"{layer}, {size}"], flush=True)
    head = list(next(iter(found.values())))
    print(
        markdown_table(
            ["", *head],
            [
                [name, *("-" if value is None else f"{100 * value:.1f}" for value in row.values())]
                for name, row in found.items()
            ],
        )
    )
    write_json(options.output, found)


if __name__ == "__main__":
    main()
