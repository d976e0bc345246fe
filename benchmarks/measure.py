"""What the benchmarks share: a training step, interleaved timing, memory peaks of subprocesses, table and JSON file."""

from __future__ import annotations

import itertools
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from timm_lowrank import LowRankModel


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each variant in each round. The variants take turns, so that drift of the machine hits all alike.

    With `time.process_time` as the clock they are the processor's, which other processes disturb less.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            synchronize(device)
            start = clock()
            run()
            synchronize(device)
            seconds[name].append(clock() - start)
    return seconds


def sgd_step(
    network: nn.Module,
    images: Tensor,  # (pool, batch, channels, height, width): each step takes the next batch
    labels: Tensor,  # (pool, batch)
    learning_rate: float,
    *,
    half: bool | None = None,  # whether the forward runs in bf16; None: on a GPU
    compiled: bool = False,  # whether torch.compile compiles the network
) -> Callable[[], None]:
    """A step of training, channels last: forward, backward, SGD and, wrapped, the Update Step."""
    optimizer = torch.optim.SGD(network.parameters(), lr=learning_rate, momentum=0.9)
    turns = itertools.cycle(range(len(images)))
    kind = images.device.type
    half = kind == "cuda" if half is None else half
    forward = torch.compile(network) if compiled else network
    network.train()

    def step() -> None:
        now = next(turns)
        batch = images[now].to(memory_format=torch.channels_last)
        with torch.autocast(kind, torch.bfloat16, enabled=half):
            loss = nn.functional.cross_entropy(forward(batch), labels[now])
        if isinstance(network, LowRankModel):
            loss = loss + network.penalty(labels[now])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if isinstance(network, LowRankModel):
            network.update()

    return step


def median_ratio(of: Sequence[float], to: Sequence[float]) -> float:
    """The median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(of, to, strict=True))


def peak_memory_mib(arguments: Sequence[str]) -> float:
    """Largest resident set, MiB, of a Python script run in a process of its own; it prints `own_peak_mib()` last."""
    command = [sys.executable, *arguments]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def own_peak_mib() -> float:
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss begins at the peak of the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print(f"\n{title}")
    for row in cells:
        print(
            "  "
            + "  ".join(
                cell.rjust(width) if i else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
        )


def machine() -> dict[str, Any]:
    """What figures were measured on."""
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": platform.processor(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def write_json(path: str | Path, figures: Mapping[str, Any]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps({"machine": machine(), **figures}, indent=2) + "\n")
    print(f"\nwritten to {path}")
