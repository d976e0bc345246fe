"""What a low-rank branch costs: a whole training step with and without branches, and a branch alone at growing widths.

    python benchmarks/branch.py                     # CPU, or the GPU if there is one (then with bf16 autocast)
    python benchmarks/branch.py --rounds 2 --skip-dense

A turn is ten steps, so that each holds one rank projection. The dense twin runs without projections: at 16,384
features one would take longer than everything else here.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable
from typing import Any

import timm
import torch
from measure import interleaved, median_ratio, own_peak_mib, peak_memory_mib, print_table, sgd_step, write_json
from torch import nn

import timm_lowrank as tlr
from timm_lowrank.core.branch import LowRankBranch

BATCH = 128
TURN = 10  # steps
POOL = 8  # different batches: enough rows to fill a factor of rank 500
WIDTHS = (512, 2048, 16384, 65536, 200704)
NEVER = 10**9
VARIANTS = ("plain", "1-LR", "2-LR", "2-LR dense")


def training_step(variant: str, device: torch.device) -> Callable[[], None]:
    """One step of SGD on resnet18_cifar at batch 128: forward, backward, optimizer and, wrapped, the Update Step."""
    torch.manual_seed(0)
    network: nn.Module = timm.create_model("resnet18_cifar").to(device, memory_format=torch.channels_last)
    if variant != "plain":
        dense = variant.endswith("dense")
        config = tlr.LowRankConfig(
            branches=variant.split()[0],
            storage="dense" if dense else "factored",
            project_every=NEVER if dense else TURN,
        )
        network = tlr.wrap(network, config)
    images = torch.randn(POOL, BATCH, 3, 32, 32, device=device)
    labels = torch.randint(10, (POOL, BATCH), device=device)
    return sgd_step(network, images, labels, 0.01)


def turn(step: Callable[[], None], steps: int = TURN) -> Callable[[], None]:
    def run() -> None:
        for _ in range(steps):
            step()

    return run


def measure_steps(device: torch.device, rounds: int, skip_dense: bool) -> list[dict[str, Any]]:
    names = [name for name in VARIANTS if not (skip_dense and name.endswith("dense"))]
    steps = {name: training_step(name, device) for name in names}
    for name, step in steps.items():  # fill the factors: two intervals for the branches
        turn(step, 2 * TURN if "LR" in name and "dense" not in name else 2)()
    turns = {name: turn(step) for name, step in steps.items() if "dense" not in name}
    seconds = interleaved(turns, rounds, device)
    if not skip_dense:
        dense, plain = steps["2-LR dense"], steps["plain"]
        for name, values in interleaved({"2-LR dense": dense, "beside": plain}, max(1, rounds), device).items():
            seconds[name] = [value * TURN for value in values]
    rows: list[dict[str, Any]] = []
    for name in names:
        beside = seconds["beside"] if "dense" in name else seconds["plain"]
        rows.append(
            {
                "variant": name,
                "ms": 1000 * statistics.median(seconds[name]) / TURN,
                "ratio": median_ratio(seconds[name], beside),
                "peak_mib": memory_peak(name, device),
            }
        )
    return rows


def memory_peak(variant: str, device: torch.device) -> float:
    """Peak of fifteen steps, a projection among them: allocated on a GPU, resident on a CPU (a process of its own)."""
    if device.type == "cpu":
        return peak_memory_mib([__file__, "--only-run", variant])
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    turn(training_step(variant, device), 5 if "dense" in variant else 15)()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def branch_step(width: int, storage: str, device: torch.device) -> Callable[[], None]:
    """penalty, backward and update of one branch, without any network around it."""
    rank = min(500, width // 4)
    config = tlr.LowRankConfig(
        branches={"layer": rank}, storage=storage, project_every=TURN if storage == "factored" else NEVER
    )
    branch = LowRankBranch(width, rank, config, device)
    generator = torch.Generator(device).manual_seed(0)
    codes = torch.randn(POOL, BATCH, 1024, device=device, generator=generator)
    mixing = torch.randn(1024, width, device=device, generator=generator)
    mixing *= (
        torch.arange(1, 1025, device=device)[:, None] ** -0.5
    )  # a decaying spectrum of more than `rank` directions
    batches = itertools.cycle(
        [code @ mixing for code in codes] if width <= 65536 else [codes[0] @ mixing, codes[1] @ mixing]
    )

    def step() -> None:
        branch.penalty(next(batches).requires_grad_()).backward()
        branch.update()

    return step


def measure_widths(device: torch.device, rounds: int, skip_dense: bool) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for width in WIDTHS:
        factored = branch_step(width, "factored", device)
        turn(factored, 2 * TURN)()
        turns = {"factored": turn(factored)}
        if width <= 16384 and not skip_dense:
            dense = branch_step(width, "dense", device)
            turns["dense"] = turn(dense, 2)
            dense()
        seconds = interleaved(turns, rounds, device)
        ratio = None
        if "dense" in seconds:
            ratio = median_ratio([value * TURN / 2 for value in seconds["dense"]], seconds["factored"])
        ms = 1000 * statistics.median(seconds["factored"]) / TURN
        rows.append({"width": width, "ms": ms, "us_per_feature": 1000 * ms / width, "dense_over_factored": ratio})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each variant (default 5)")
    parser.add_argument("--skip-dense", action="store_true", help="leave the dense twin out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", default="benchmarks/results/branch.json")
    parser.add_argument("--only-run", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.only_run:  # the process whose memory is measured
        turn(training_step(options.only_run, device), 3 if "dense" in options.only_run else 15)()
        print(own_peak_mib())
        return
    steps = measure_steps(device, options.rounds, options.skip_dense)
    plain_peak = steps[0]["peak_mib"]
    print_table(
        f"training step, resnet18_cifar, batch {BATCH}, {device}",
        ("variant", "ms", "x plain", "peak MiB", "extra MiB"),
        [
            (
                r["variant"],
                f"{r['ms']:.1f}",
                f"{r['ratio']:.3f}",
                f"{r['peak_mib']:.0f}",
                f"{r['peak_mib'] - plain_peak:.0f}",
            )
            for r in steps
        ],
    )
    widths = measure_widths(device, options.rounds, options.skip_dense)
    print_table(
        f"branch alone, batch {BATCH}, {device}",
        ("features", "ms", "us per feature", "dense / factored"),
        [
            (
                f"{r['width']:,}",
                f"{r['ms']:.2f}",
                f"{r['us_per_feature']:.2f}",
                f"{r['dense_over_factored']:.1f}" if r["dense_over_factored"] else "-",
            )
            for r in widths
        ],
    )
    write_json(options.output, {"batch": BATCH, "device": str(device), "steps": steps, "widths": widths})


if __name__ == "__main__":
    main()
