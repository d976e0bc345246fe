"""What a branch of rank 500 on a wide layer costs: memory and time of a whole training step beside the plain step.

    python benchmarks/wide.py                                   # the GPU if there is one (then with bf16 autocast)
    python benchmarks/wide.py --device cpu --batch 8 --cases resnet50-32px --rounds 2

Every variant has a second branch, of rank 100, before the classifier. A turn is ten steps, so that each holds one
rank projection, and the factor of the wide branch is full before the clock starts. Memory is measured in a process
of its own for each variant.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
from measure import (
    interleaved,
    median_ratio,
    own_peak_mib,
    peak_memory_mib,
    print_table,
    sgd_step,
    synchronize,
    write_json,
)
from torch import nn

import timm_lowrank as tlr

TURN = 10  # steps
POOL = 4  # different batches
ROWS = 64  # that an update adds to the factor at most
RANK = 500
PLAIN = "plain"


@dataclasses.dataclass(frozen=True)
class Case:
    """A network with one wide layer."""

    architecture: str
    pixels: int
    layer: str
    width: int  # of the flattened layer
    views: tuple[str, ...] = ("flatten",)


CASES = {
    "resnet50-32px": Case("resnet50_cifar", 32, "layer3", 65_536),
    "resnet50-224px": Case("resnet50", 224, "layer3", 200_704),
    "vit-b16-224px": Case("vit_base_patch16_224", 224, "blocks.10", 151_296, ("flatten", "token")),
}


def training_step(case: Case, variant: str, batch: int, device: torch.device) -> Callable[[], None]:
    """One step of SGD: forward, backward, optimizer and, wrapped, the Update Step.

    Args:
        variant: "plain" or the view of the branch on the wide layer.
    """
    torch.manual_seed(0)
    network: nn.Module = timm.create_model(case.architecture, num_classes=10)
    network = network.to(device).to(memory_format=torch.channels_last)
    images = torch.randn(POOL, batch, 3, case.pixels, case.pixels, device=device)
    labels = torch.randint(10, (POOL, batch), device=device)
    if variant != PLAIN:
        branches: dict[str, Any] = {case.layer: {"rank": RANK, "view": variant}, "pre_logits": 100}
        config = tlr.LowRankConfig(branches=branches, update_rows=ROWS, project_every=TURN, warmup_updates=0)
        network = tlr.wrap(network, config, example_input=images[0, :1])
        fill(network.train(), images[0])
        if variant == "flatten" and network.branches[case.layer].num_features != case.width:
            raise RuntimeError(f"{case.layer} has {network.branches[case.layer].num_features} features")
    return sgd_step(network, images, labels, 1e-3)


def fill(model: tlr.LowRankModel, images: torch.Tensor) -> None:
    """Two intervals of updates from noise about real activations, for a factor as full as that of a long training."""
    with torch.no_grad(), model.capture() as activations:
        model.backbone(images)
    for layer, branch in model.branches.items():
        rows = activations[layer].reshape(-1, branch.num_features)[:ROWS].float()
        mean, spread = rows.mean(dim=0), rows.std()
        for _ in range(2 * TURN):
            branch.penalty(mean + spread * torch.randn(ROWS, branch.num_features, device=rows.device))
            branch.update()


def turn(step: Callable[[], None], steps: int = TURN) -> None:
    for _ in range(steps):
        step()


def measure(name: str, batch: int, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """A row for each variant of a case; the time of the variants is taken in alternating turns.

    On a CPU the ratio is also taken in seconds on the processor, which other processes hardly change.
    """
    case = CASES[name]
    variants = (PLAIN, *case.views)
    steps = {variant: training_step(case, variant, batch, device) for variant in variants}
    for step in steps.values():
        turn(step, 2)
    processor: dict[str, list[float]] = {variant: [] for variant in variants}

    def run(variant: str) -> None:
        start = time.process_time()
        turn(steps[variant])
        processor[variant].append(time.process_time() - start)

    seconds = interleaved({variant: functools.partial(run, variant) for variant in variants}, rounds, device)
    return [
        {
            "case": name,
            "layer": case.layer,
            "variant": variant,
            "width": case.width if variant == "flatten" else None,
            "batch": batch,
            "ms": 1000 * statistics.median(seconds[variant]) / TURN,
            "ratio": median_ratio(seconds[variant], seconds[PLAIN]),
            "processor_ms": 1000 * statistics.median(processor[variant]) / TURN,
            "processor_ratio": median_ratio(processor[variant], processor[PLAIN]) if device.type == "cpu" else None,
        }
        for variant in variants
    ]


def memory_peak(name: str, variant: str, batch: int, device: torch.device) -> float:
    """Peak of a turn in MiB, in a process of its own: allocated on a GPU, resident on a CPU."""
    arguments = ["--only-run", variant, "--cases", name, "--batch", str(batch), "--device", str(device)]
    return peak_memory_mib([__file__, *arguments])


def only_run(case: Case, variant: str, batch: int, device: torch.device) -> float:
    """The process whose memory is measured: its own peak, MiB."""
    turn(training_step(case, variant, batch, device))
    synchronize(device)
    return torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else own_peak_mib()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--batch", type=int, help="images a step (default 8 on a CPU, 128 on a GPU)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each variant (default 3)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", default="benchmarks/results/wide.json")
    parser.add_argument("--only-run", metavar="VARIANT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = torch.device(options.device)
    batch = options.batch or (128 if device.type == "cuda" else 8)
    if options.only_run:
        print(only_run(CASES[options.cases[0]], options.only_run, batch, device))
        return
    names = [(name, variant) for name in options.cases for variant in (PLAIN, *CASES[name].views)]
    peaks = {pair: memory_peak(*pair, batch, device) for pair in names}
    rows: list[dict[str, Any]] = []
    for name in options.cases:
        rows += measure(name, batch, options.rounds, device)
    for row in rows:
        row["peak_mib"] = peaks[row["case"], row["variant"]]
    print_table(
        f"training step, batch {batch}, {device}",
        ("network", "layer", "branch", "ms", "x plain", "x plain on the processor", "peak MiB"),
        [
            (
                r["case"],
                r["layer"],
                r["variant"],
                f"{r['ms']:.1f}",
                f"{r['ratio']:.3f}",
                f"{r['processor_ratio']:.3f}" if r["processor_ratio"] else "-",
                f"{r['peak_mib']:.0f}",
            )
            for r in rows
        ],
    )
    write_json(options.output, {"batch": batch, "device": str(device), "rank": RANK, "rows": rows})


if __name__ == "__main__":
    main()
