"""When to switch the branch before the classifier of a transformer on, and what its loss is measured in.

    python benchmarks/switch_on.py [--seeds 3] [--epochs 25]

A small ViT (64 channels, 4 blocks, patches of 2 x 2) on scikit-learn's handwritten digits, a branch of rank 8 on the
input of the classifier, its class token. Until it was trained, that is nearly the same for all images: the spread at
switch-on, which the reference norm begins with, is a tenth of what it becomes. Test accuracy after 5 epochs and at
the end: with a reference norm that is taken once, with one that follows a layer that grows, as the package has it, and
with plain training first.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from pathlib import Path

import timm
import torch
from measure import write_json
from torch.nn import functional
from views import BATCH, data

import timm_lowrank as tlr
from timm_lowrank.core import branch
from timm_lowrank.text import markdown_table

WEIGHTS = {"0.05": (0.05, 0.0), "1": (1.0, 0.0), "0.05, head 1": (0.05, 1.0)}
WHEN = {"taken once, on at once": (0, 0.0), "on at once": (0, branch._FOLLOWS), "after 4 epochs": (4, branch._FOLLOWS)}
EARLY = 5


def accuracies(
    weight: float, head: float, start: int, follows: float, seed: int, epochs: int
) -> tuple[float, float, float]:
    """Shares in [0, 1] of the test images after `EARLY` epochs and at the end, and how the reference norm has grown.

    Args:
        start: epochs of plain training.
        follows: how far the reference norm follows a larger spread at each update.
    """
    images, labels, test_images, test_labels = data()
    torch.manual_seed(seed)
    options = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 4, "num_heads": 4}
    network = timm.create_model("vit_tiny_patch16_224", num_classes=10, **options)
    branches = {"pre_logits": {"rank": 8, "reconstruction_weight": weight, "head_weight": head}}
    model = tlr.wrap(network, tlr.LowRankConfig(branches=branches, seed=seed), example_input=images[:2])
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.05)
    batch = BATCH // 4
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (len(labels) // batch))
    early, first, branch._FOLLOWS = 0.0, 0.0, follows
    for epoch in range(epochs):
        model.train().enable(epoch >= start)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1000 * seed + epoch))
        for rows in order.split(batch)[: len(labels) // batch]:
            loss = functional.cross_entropy(model(images[rows]), labels[rows])
            if model.enabled:
                loss = loss + model.penalty(labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if model.enabled:
                model.update()
                first = first or float(model.branches["pre_logits"].reference_norm)
            schedule.step()
        with torch.no_grad():
            right = (model.eval()(test_images).argmax(dim=1) == test_labels).float().mean()
        early = float(right) if epoch + 1 == EARLY else early
    return early, float(right), float(model.branches["pre_logits"].reference_norm) / first


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Means and standard deviations over the seeds, in Markdown."""
    rows = []
    for case, runs in found.items():
        cells = [case]
        for name in runs[0]:
            values = [(1 if "times" in name else 100) * run[name] for run in runs]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        rows.append(cells)
    return markdown_table(["weight, reference norm, switch-on", *next(iter(found.values()))[0]], rows)


def main() -> None:
    """Trains, prints a table and writes benchmarks/results/switch_on.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--output", type=Path, default="benchmarks/results/switch_on.json")
    arguments = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {}
    cases = {"plain": (0.0, 0.0, *WHEN["on at once"])}
    cases |= {f"{w}, {t}": (*WEIGHTS[w], *WHEN[t]) for w, t in itertools.product(WEIGHTS, WHEN)}
    for seed, (name, case) in itertools.product(range(arguments.seeds), cases.items()):
        early, late, grown = accuracies(*case, seed, arguments.epochs)
        figures = {f"after {EARLY} epochs": early, "at the end": late, "reference norm, times": grown}
        found.setdefault(name, []).append(figures)
        print(json.dumps({"seed": seed, "case": name, **figures}), flush=True)
    print(table(found))
    write_json(arguments.output, found)


if __name__ == "__main__":
    main()
