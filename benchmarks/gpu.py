"""What a GPU of a few minutes can tell: the tests that need one, the time of a step and where it goes, a training.

    python benchmarks/gpu.py --minutes 9 --data FOLDER         # CIFAR-10 as parquet files; without it from the Hub
    python benchmarks/gpu.py --parts tests,steps --minutes 3
    python benchmarks/gpu.py --plan                            # what it would do, and how long each part may take
    python benchmarks/gpu.py --tiny --minutes 3 --output /tmp  # the same on a CPU, with networks that mean nothing

Each part runs in processes of its own and is ended when its time is up. results.json and results.md in the output
folder are rewritten after every figure, so that nothing is lost if the machine goes away.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from measure import median_ratio, sgd_step, synchronize
from torch import nn
from torch.profiler import ProfilerActivity, profile

import timm_lowrank as tlr
from timm_lowrank.environment import device_name
from timm_lowrank.files import write_whole

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("tests", "steps", "compiled", "profile", "train")
# The training takes what is left. To compile a network takes 40 to 75 s, and a cell compiles two.
MOST_SECONDS = {"tests": 75.0, "steps": 75.0, "compiled": 165.0, "profile": 30.0}
TURN = 10  # steps, the last of which projects W
POOL = 4  # different batches
VARIANTS = ("plain", "1-LR", "2-LR")
PROFILED = 4  # steps between two projections
OPERATIONS = 15  # that take most of the device, and as many that take most of the host
RUNS = {"N-LR": "lowrank.enabled=false", "2-LR": "lowrank.enabled=true"}
PROBE_EPOCHS, PROBE_IMAGES = 2, 12_800
RESERVE = 0.88  # of the time that the probe promises: what is planned must also be measured and exported

FAST = "cifar10-resnet18-fast"
TINY = (
    "model_args={channels: [8, 8, 16, 16]}", "lowrank.branches={layer3: 6, pre_logits: 4}", "lowrank.warmup_updates=3",
    "model=resnet10_cifar", "batch_size=64", "eval_batch_size=100", "spectrum_images=50", "precision='no'",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Cell:
    """One comparison of training steps."""

    network: str
    precision: str  # "bf16" or "float32"
    batch: int
    compiled: bool = False
    variants: tuple[str, ...] = VARIANTS

    @property
    def title(self) -> str:
        return f"{self.network}, batch {self.batch}, {self.precision}{', compiled' if self.compiled else ''}"


# In the order of their worth: those at the end are left out where the time does not suffice.
CELLS = (
    Cell("resnet18_cifar", "bf16", 128),
    Cell("resnet18_cifar", "float32", 128),
    Cell("resnet18_cifar", "bf16", 512),
    Cell("resnet50_cifar", "bf16", 128),
    Cell("resnet50_cifar", "bf16", 512),
    Cell("resnet18_cifar", "float32", 512),
    Cell("resnet50_cifar", "float32", 128),
)
COMPILED_CELLS = (Cell("resnet18_cifar", "bf16", 128, compiled=True, variants=("plain", "2-LR")),)
TINY_CELLS = (Cell("resnet10_cifar", "float32", 8), Cell("resnet10_cifar", "bf16", 8, variants=("plain", "2-LR")))


class Report:
    """results.json and results.md, whole at any time."""

    def __init__(self, folder: Path, machine: dict[str, Any], plan: dict[str, Any]) -> None:
        self.folder = folder
        self.content: dict[str, Any] = {
            "machine": machine,
            "plan": plan,
            "tests": None,
            "steps": [],
            "profile": [],
            "train": None,
        }
        folder.mkdir(parents=True, exist_ok=True)
        self.write()

    def write(self) -> None:
        write_whole(self.folder / "results.json", json.dumps(self.content, indent=1) + "\n")
        write_whole(self.folder / "results.md", self._markdown())

    def _markdown(self) -> str:
        machine, tests, train = self.content["machine"], self.content["tests"], self.content["train"]
        lines = [f"# {machine['device']}, torch {machine['torch']}", ""]
        if tests is not None:
            counts = ", ".join(f"{tests[kind]} {kind}" for kind in ("passed", "failed", "skipped"))
            cut = ", ended before all had run" if tests["cut"] else ""
            lines += [f"Tests: {counts} in {tests['seconds']:.0f} s{cut}.", ""]
            lines += [f"- failed: `{name}`" for name in tests["failures"]] + [""]
        if self.content["steps"]:
            lines += [
                "Milliseconds a training step, medians over turns of ten steps with one projection each; the ratio to",
                "the plain step is the median of the ratios within a round. Device: between events on the device, the",
                "gaps in which it waits for the host included; a step between two projections; what one adds.",
                "",
                "| step | variant | wall | device | x plain (wall) | x plain (device) | between | projection |",
                "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
            ]
            for row in self.content["steps"]:
                numbers = [f"{row[key]:.3f}" for key in ("wall_ms", "device_ms", "wall_ratio", "device_ratio")]
                numbers += [f"{row[key]:.3f}" for key in ("between_ms", "projection_ms")]
                lines.append(f"| {row['cell']} | {row['variant']} | {' | '.join(numbers)} |")
            lines.append("")
        for part in self.content["profile"]:
            lines += [
                f"Where the time goes: {part['cell']}, {part['variant']}, {part['phase']}:",
                f"{part['device_ms']:.3f} ms of the device and {part['host_ms']:.3f} ms of the host a step, what the",
                "recording takes included.",
                "",
                "| operation | calls a step | device, ms | host, ms |",
                "| --- | ---: | ---: | ---: |",
            ]
            for row in part["operations"]:
                lines.append(f"| `{row['name']}` | {row['calls']:g} | {row['device_ms']:.3f} | {row['host_ms']:.3f} |")
            lines.append("")
        if train is not None:
            lines += [
                f"{train['network']} on {train['data']}, {train['epochs']} epochs, both runs side by side:",
                train.get("problem", ""),
                "",
                "| run | epochs | test accuracy | best | images/s | seconds of training | state |",
                "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
            ]
            for run in train["runs"]:
                numbers = [f"{run['epochs']}", f"{run['test_accuracy']:.4f}", f"{run['best_test_accuracy']:.4f}"]
                numbers += [f"{run['images_per_second']:.0f}", f"{run['seconds']:.0f}"]
                lines.append(f"| {run['run']} | {' | '.join(numbers)} | {run['state']} |")
            lines.append("")
        return "\n".join(lines)


# -------------------------------------------------------------------------------------------------------------- tests


def run_tests(report: Report, seconds: float) -> None:
    """The tests that are marked `gpu`; without a GPU each of them is skipped."""
    command = ["-m", "pytest", "-o", "addopts=--strict-markers", "-v", "-m", "gpu", "-p", "no:cacheprovider"]
    log = report.folder / "tests.txt"
    began = time.perf_counter()
    process = start([*command, str(ROOT / "tests" / "test_gpu.py")], log)
    cut = not wait([process], seconds)
    lines = log.read_text(errors="replace").splitlines()
    verdicts = [
        match.groups() for line in lines if (match := re.match(r"(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)", line))
    ]
    report.content["tests"] = {
        "passed": sum(verdict == "PASSED" for _, verdict in verdicts),
        "failed": sum(verdict in ("FAILED", "ERROR") for _, verdict in verdicts),
        "skipped": sum(verdict == "SKIPPED" for _, verdict in verdicts),
        "failures": [name for name, verdict in verdicts if verdict in ("FAILED", "ERROR")],
        "seconds": time.perf_counter() - began,
        "cut": cut,
        "exit": process.returncode,
    }
    report.write()


# -------------------------------------------------------------------------------------------------------------- steps


def cells(part: str, tiny: bool) -> tuple[Cell, ...]:
    """Those of the part "steps", "compiled" or "profile"; for a trial nothing is compiled."""
    if part == "compiled":
        return () if tiny else COMPILED_CELLS
    chosen = TINY_CELLS if tiny else CELLS
    return chosen[:1] if part == "profile" else chosen


def run_steps(report: Report, seconds: float, part: str, tiny: bool) -> None:
    """Every cell that fits, or the profile of one, in a process that hands over its figures as it gets them."""
    if not cells(part, tiny):
        return
    into = "profile" if part == "profile" else "steps"
    before = report.content[into]
    rows = report.folder / f"{part}.jsonl"
    rows.unlink(missing_ok=True)
    options = ["--tiny"] if tiny else []
    process = start(
        [__file__, "--measure-steps", str(rows), "--parts", part, "--seconds", str(seconds - 3), *options],
        report.folder / f"{part}.txt",
    )

    def read() -> None:
        if rows.exists():
            report.content[into] = before + [json.loads(line) for line in rows.read_text().splitlines()]
            report.write()

    wait([process], seconds, read)


def measure_steps(path: Path, seconds: float, part: str, tiny: bool) -> None:
    device = torch.device("cpu" if tiny else "cuda")
    end = time.perf_counter() + seconds
    rows: list[dict[str, Any]] = []
    for cell in cells(part, tiny):
        left = end - time.perf_counter()
        if left < 5 and not tiny:
            print(f"left out, {left:.0f} s are left: {cell.title}", flush=True)
            continue
        try:
            if part == "profile":
                rows += profile_cell(cell, device, tiny)
            else:
                rows += measure_cell(cell, device, min(end, time.perf_counter() + (0.2 if tiny else 2.5)), tiny)
        except torch.OutOfMemoryError as error:
            print(f"{cell.title}: {error}", flush=True)
        write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
        print(f"{cell.title}: done, {end - time.perf_counter():.0f} s are left", flush=True)


def measure_cell(cell: Cell, device: torch.device, end: float, tiny: bool) -> list[dict[str, Any]]:
    """A row for each variant. The variants take turns until the time `end`, three times at least."""
    steps = {variant: _step(cell, variant, device, tiny) for variant in cell.variants}
    for step in steps.values():
        for _ in range(
            TURN if tiny else 2 * TURN
        ):  # fills the factors; whole turns, so that each ends with a projection
            step()
    turns: dict[str, list[_Turn]] = {variant: [] for variant in steps}
    while len(turns["plain"]) < (2 if tiny else 3) or (time.perf_counter() < end and len(turns["plain"]) < 40):
        for variant, step in steps.items():
            turns[variant].append(_turn(step, device))
    plain = turns["plain"]
    return [
        {
            "cell": cell.title,
            **dataclasses.asdict(cell),
            "variant": variant,
            "rounds": len(measured),
            "wall_ms": statistics.median(turn.wall for turn in measured) / TURN,
            "device_ms": statistics.median(sum(turn.steps) for turn in measured) / TURN,
            "wall_ratio": median_ratio([turn.wall for turn in measured], [turn.wall for turn in plain]),
            "device_ratio": median_ratio([sum(turn.steps) for turn in measured], [sum(turn.steps) for turn in plain]),
            "between_ms": statistics.median(ms for turn in measured for ms in turn.steps[:-1]),
            "projection_ms": statistics.median(
                turn.steps[-1] - statistics.median(turn.steps[:-1]) for turn in measured
            ),
        }
        for variant, measured in turns.items()
    ]


def profile_cell(cell: Cell, device: torch.device, tiny: bool) -> list[dict[str, Any]]:
    """A row for plain steps, for 2-LR steps between two projections, and for one with a projection."""
    rows = []

    def record(variant: str, phase: str, count: int) -> None:
        rows.append({"cell": cell.title, "variant": variant, "phase": phase, **_profile(step, count, device)})

    for variant in ("plain", "2-LR"):
        step = _step(cell, variant, device, tiny)
        for _ in range(3 * TURN):
            step()
        record(variant, "between two projections", PROFILED)
        if variant != "plain":
            for _ in range(TURN - 1 - PROFILED):
                step()
            record(variant, "with a projection", 1)
    return rows


def _profile(step: Callable[[], None], count: int, device: torch.device) -> dict[str, Any]:
    """Milliseconds of device and host for a step, and of the operations that take most of either."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    synchronize(device)
    with profile(activities=activities) as profiler:
        for _ in range(count):
            step()
        synchronize(device)
    events = profiler.key_averages()
    rows = [
        {
            "name": event.key[:80],
            "calls": event.count / count,
            "device_ms": event.self_device_time_total / 1000 / count,
            "host_ms": event.self_cpu_time_total / 1000 / count,
        }
        for event in events
    ]
    most = [sorted(rows, key=lambda row: -row[which])[:OPERATIONS] for which in ("device_ms", "host_ms")]
    chosen = {row["name"]: row for row in itertools.chain(*most) if row["device_ms"] + row["host_ms"] > 0}
    totals = {which: sum(row[which] for row in rows) for which in ("device_ms", "host_ms")}
    return {**totals, "operations": list(chosen.values())}


def _step(cell: Cell, variant: str, device: torch.device, tiny: bool) -> Callable[[], None]:
    torch.manual_seed(0)
    options: dict[str, Any] = {"channels": [4, 4, 8, 8]} if tiny else {}
    network: nn.Module = timm.create_model(cell.network, **options).to(device, memory_format=torch.channels_last)
    if variant != "plain":
        network = tlr.wrap(network, tlr.LowRankConfig(branches=_ranks(variant, tiny), project_every=TURN))
    generator = torch.Generator(device).manual_seed(0)
    images = torch.randn(POOL, cell.batch, 3, 32, 32, device=device, generator=generator)
    labels = torch.randint(10, (POOL, cell.batch), device=device, generator=generator)
    return sgd_step(network, images, labels, 1e-3, half=cell.precision == "bf16", compiled=cell.compiled)


def _ranks(variant: str, tiny: bool) -> str | dict[str, int]:
    if not tiny:
        return variant
    return {"pre_logits": 3} if variant == "1-LR" else {"layer3": 4, "pre_logits": 3}


@dataclasses.dataclass
class _Turn:
    wall: float  # ms
    steps: list[float]  # ms of each step between events on the device, which waits for the host in between, too


def _turn(step: Callable[[], None], device: torch.device) -> _Turn:
    cuda = device.type == "cuda"
    marks: list[Any] = []

    def mark() -> None:
        marks.append(torch.cuda.Event(enable_timing=True) if cuda else time.perf_counter())
        if cuda:
            marks[-1].record()

    synchronize(device)
    began = time.perf_counter()
    mark()
    for _ in range(TURN):
        step()
        mark()
    synchronize(device)
    wall = 1000 * (time.perf_counter() - began)
    pairs = itertools.pairwise(marks)
    return _Turn(wall, [one.elapsed_time(two) if cuda else 1000 * (two - one) for one, two in pairs])


# -------------------------------------------------------------------------------------------------------------- train


def run_training(report: Report, seconds: float, data: str, runs: Path, tiny: bool) -> None:
    """The network and its plain twin, side by side, for as many epochs as a probe of both says that fit."""
    end = time.perf_counter() + seconds
    recipe = "digits" if tiny else FAST

    def command(name: str, folder: Path, epochs: int, limit: int | None) -> list[str]:
        limits = {"train_limit": limit, "test_limit": 200 if limit else None}
        given = {key: value for key, value in limits.items() if value}
        chosen = [
            RUNS[name],
            f"epochs={epochs}",
            f"pretrain_epochs={0 if limit else epochs // 7}",
            *(TINY if tiny else ()),
        ]
        chosen += [f"data_args={json.dumps(given)}", f"save_every={max(1, epochs // 8)}", "twin=false"]
        sets = [word for each in chosen for word in ("--set", each)]
        where = ["--data", data, "--output", str(folder / name), "--resume", "auto"]
        return ["-m", "timm_lowrank", "train", recipe, *where, *sets]

    network = "resnet10_cifar" if tiny else "resnet18_cifar"
    content: dict[str, Any] = {"network": network, "data": Path(data).name, "epochs": 0}
    report.content["train"] = {**content, "runs": []}
    probe = runs / f"probe-{os.getpid()}"
    began = time.perf_counter()
    limit = 320 if tiny else None
    probes = {name: command(name, probe, PROBE_EPOCHS, limit or PROBE_IMAGES) for name in RUNS}
    wait([start(probes[name], report.folder / f"probe-{name}.txt") for name in RUNS], 0.3 * seconds)
    seen = [_rows(probe / name) for name in RUNS]
    if any(len(rows) < PROBE_EPOCHS for rows in seen):
        report.content["train"]["problem"] = "the probe failed or took too long: see probe-*.txt"
        report.write()
        return
    slowest = max(rows[-1]["seconds"] for rows in seen)  # of the second epoch, both side by side
    overhead = time.perf_counter() - began - PROBE_EPOCHS * slowest  # what is imported, decoded, measured, exported
    epoch = slowest * (1 if tiny else 50_000 / PROBE_IMAGES)
    epochs = max(2, int(RESERVE * (end - time.perf_counter() - 2 * overhead) / epoch))
    epochs = min(epochs, PROBE_EPOCHS) if tiny else epochs
    content.update({"epochs": epochs, "probe": {"epoch_seconds": epoch, "overhead_seconds": overhead}})
    folder = runs / f"{epochs}-epochs"
    running = {name: start(command(name, folder, epochs, limit), report.folder / f"train-{name}.txt") for name in RUNS}

    def read() -> None:
        read_runs = [_read_run(name, folder / name, process) for name, process in running.items()]
        report.content["train"] = {**content, "runs": [run for run in read_runs if run]}
        report.write()

    wait(list(running.values()), end - time.perf_counter(), read)


def _read_run(name: str, folder: Path, process: subprocess.Popen[bytes]) -> dict[str, Any] | None:
    rows = _rows(folder)
    if not rows:
        return None
    state = "finished" if (folder / "summary.json").exists() else "running" if process.poll() is None else "cut"
    return {
        "run": name,
        "epochs": len(rows),
        "test_accuracy": rows[-1]["test_accuracy"],
        "best_test_accuracy": max(row["test_accuracy"] for row in rows),
        "images_per_second": statistics.median(row["images_per_second"] for row in rows),
        "seconds": sum(row["seconds"] for row in rows),
        "state": state,
        "metrics": rows,
    }


def _rows(folder: Path) -> list[dict[str, float]]:
    """The rows of metrics.csv that are whole."""
    if not (folder / "metrics.csv").exists():
        return []
    with (folder / "metrics.csv").open(newline="") as file:
        return [
            {key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file) if row["seconds"]
        ]


# ---------------------------------------------------------------------------------------------------------- processes


def start(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """A Python process whose output goes into a file."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    # What one part compiled, the tests for example, the next one need not compile again.
    environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(log.parent / "compiled"))
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, *arguments], stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment
        )


def wait(
    processes: Sequence[subprocess.Popen[bytes]], seconds: float, each_second: Callable[[], None] | None = None
) -> bool:
    """Whether all of them ended in time; those that did not are ended here."""
    end = time.perf_counter() + seconds
    while (alive := [process for process in processes if process.poll() is None]) and time.perf_counter() < end:
        time.sleep(0.2)
        if each_second is not None and int(5 * time.perf_counter()) % 5 == 0:
            each_second()
    for process in alive:
        process.terminate()
    for process in alive:
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if each_second is not None:
        each_second()
    return not alive


def limits(parts: Sequence[str], seconds: float) -> dict[str, float]:
    """The seconds of each part: a sixth of the whole for tests, for steps and for the profile at most, a third for what
    is compiled, the rest for the training."""
    least = {"tests": 6, "steps": 6, "compiled": 3, "profile": 6}
    shares = {
        part: min(MOST_SECONDS[part], seconds / (least[part] if "train" in parts else len(parts)))
        for part in parts
        if part != "train"
    }
    if "train" in parts:
        shares["train"] = seconds - sum(shares.values())
    return {part: shares[part] for part in parts}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="time for everything (default 9)")
    parser.add_argument("--data", help="a folder with CIFAR-10 as parquet files (default: uoft-cs/cifar10 on the Hub)")
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results/gpu"), help="results.json and results.md"
    )
    parser.add_argument("--runs", type=Path, help="the folders of the trainings (default: OUTPUT/runs)")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)}, in any order")
    parser.add_argument("--plan", action="store_true", help="print what would be done")
    parser.add_argument(
        "--tiny", action="store_true", help="on a CPU, with tiny networks: a trial of this script alone"
    )
    parser.add_argument("--measure-steps", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    parts = list(dict.fromkeys(options.parts.split(",")))  # in the order that is asked for
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts {options.parts}: {', '.join(sorted(unknown))} is not one of {', '.join(PARTS)}")
    if options.measure_steps is not None:  # the process of `run_steps`
        measure_steps(options.measure_steps, options.seconds, parts[0], options.tiny)
        return
    seconds = limits(parts, 60 * options.minutes)
    data = options.data or ("digits" if options.tiny else "uoft-cs/cifar10")
    plan = {
        "minutes": options.minutes,
        "seconds": seconds,
        "cells": [cell.title for part in parts if part in ("steps", "compiled") for cell in cells(part, options.tiny)],
        "train": {"data": data, "recipe": "digits" if options.tiny else FAST} if "train" in parts else None,
    }
    if options.plan:
        print(json.dumps(plan, indent=1))
        return
    if not (options.tiny or torch.cuda.is_available()):
        parser.error("there is no CUDA device here; --plan says what would be done, --tiny tries it on a CPU")
    device = torch.device("cpu" if options.tiny else "cuda")
    machine: dict[str, Any] = {
        "device": device_name(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    machine |= {"cuda": torch.version.cuda, "tf32_convolutions": torch.backends.cudnn.allow_tf32}
    report = Report(options.output.resolve(), machine, plan)
    end = time.perf_counter() + 60 * options.minutes
    for number, part in enumerate(parts):
        later = sum(seconds[other] for other in parts[number + 1 :])
        allowed = end - time.perf_counter() - later if part == "train" else seconds[part]
        if part == "tests":
            run_tests(report, allowed)
        elif part in ("steps", "compiled", "profile"):
            run_steps(report, allowed, part, options.tiny)
        else:
            run_training(report, allowed, data, (options.runs or options.output / "runs").resolve(), options.tiny)
        print(report._markdown() if part == parts[-1] else f"{part}: done", flush=True)


if __name__ == "__main__":
    main()
