"""The three views of a layer of tokens, beside the plain network: what each of them concentrates.

    python benchmarks/views.py [--seeds 3] [--epochs 40]

A small ViT (64 channels, 4 blocks, patches of 2 x 2) on scikit-learn's handwritten digits, a branch of rank 8 before
the last block, switched on after 6 epochs. For the plain network and each view: test accuracy, and for the layer seen
in every view the share of the test variance in 8 directions and the effective rank (99 %).
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator

import timm
import torch
from measure import write_json
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional

import timm_lowrank as tlr
from timm_lowrank.core.views import VIEWS, View

LAYER, RANK, PLAIN_EPOCHS, BATCH = "blocks.2", 8, 6, 128


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images (1437, 1, 8, 8) and labels, test images (360, 1, 8, 8) and labels; standardized."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 16
    labels = torch.from_numpy(digits.target)
    train, test = train_test_split(range(len(labels)), test_size=360, stratify=digits.target, random_state=0)
    images = (images - images[train].mean()) / images[train].std()
    return images[train], labels[train], images[test], labels[test]


def trained(view: str | None, seed: int, epochs: int, images: Tensor, labels: Tensor) -> tlr.LowRankModel:
    """A network with a branch in that view; None never switches it on."""
    torch.manual_seed(seed)
    options = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 4, "num_heads": 2}
    network = timm.create_model("vit_tiny_patch16_224", num_classes=10, **options)
    branches = {LAYER: {"rank": RANK, "view": view or "flatten"}}
    config = tlr.LowRankConfig(branches=branches, warmup_updates=50, seed=seed)
    model = tlr.wrap(network, config, example_input=images[:2])
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.05)
    steps = len(labels) // BATCH
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    for epoch in range(epochs):
        model.train().enable(view is not None and epoch >= PLAIN_EPOCHS)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1000 * seed + epoch))
        for rows in order.split(BATCH)[:steps]:
            loss = functional.cross_entropy(model(images[rows]), labels[rows]) + model.penalty(labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.update()
            schedule.step()
    return model.eval()


def measured(model: tlr.LowRankModel, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Shares in [0, 1], and effective ranks."""
    with torch.no_grad(), model.capture() as seen:
        logits = model(images)
    figures = {"accuracy": float((logits.argmax(dim=1) == labels).float().mean())}
    for kind in VIEWS:
        rows = View(kind, -1).rows(seen[LAYER])
        figures[f"{kind}: variance in {RANK}"] = tlr.spectrum.variance_ratio(rows, [RANK])[0]
        figures[f"{kind}: effective rank"] = float(tlr.spectrum.effective_rank(rows))
    return figures


def lines(found: dict[str, list[dict[str, float]]]) -> Iterator[str]:
    """A Markdown table: means and standard deviations over the seeds."""
    titles = list(found)
    yield "| | " + " | ".join(titles) + " |"
    yield "| --- |" + " ---: |" * len(titles)
    for name in found[titles[0]][0]:
        scale = 1 if "rank" in name else 100
        cells = []
        for title in titles:
            values = [scale * figures[name] for figures in found[title]]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        yield f"| {name} | " + " | ".join(cells) + " |"


def main() -> None:
    """Trains, measures, prints a table and writes benchmarks/results/views.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--output", default="benchmarks/results/views.json")
    arguments = parser.parse_args()
    train_images, train_labels, test_images, test_labels = data()
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(arguments.seeds):
        for view in (None, *VIEWS):
            model = trained(view, seed, arguments.epochs, train_images, train_labels)
            figures = measured(model, test_images, test_labels)
            found.setdefault(view or "plain", []).append(figures)
            print(json.dumps({"seed": seed, "view": view, **figures}), flush=True)
    print("\n".join(lines(found)))
    write_json(arguments.output, found)


if __name__ == "__main__":
    main()
