"""What a branch costs as one thing grows: features, rank, batch, processes or layers; and the formula for it.

    python benchmarks/growth.py                     # measure what docs/growth.json does not have
    python benchmarks/growth.py --only features     # one of the growths
    python benchmarks/growth.py --markdown          # the table of what is there
    python benchmarks/growth.py --picture docs/growth.png

Branches with their heads on layers that do nothing, one thread: an update is penalty, backward and update of all of
them, and a turn of ten updates holds one projection. Seconds are those of the processor, which other processes hardly
change: the fastest turn of up to three once W has its rank. Memory is what the resident set of the process grows by:
what is held in the end, and the most during ten updates, the gradient of the activations included. Each point has
processes of its own.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import itertools
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measure import machine, print_table
from torch import nn

import timm_lowrank as tlr
from timm_lowrank import drawing
from timm_lowrank.core.capture import Tap
from timm_lowrank.environment import require
from timm_lowrank.files import write_whole
from timm_lowrank.records import decode, encode
from timm_lowrank.text import markdown_table

CONFIG = tlr.LowRankConfig()
EVERY, ROWS = CONFIG.project_every, CONFIG.update_rows or 0
REFRESH = 20  # projections between two in which the Gram matrix is taken anew
CLASSES = 10
TURNS, ENOUGH = 3, 3.0  # turns that are timed, and after how many seconds of them no further one
FACTOR = 1.5  # by which the formula misses a measured time at most
MEMORY_FACTOR, KEPT_MIB = 1.3, 100.0  # likewise memory, which is less than so many times the formula's and this more

PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16}
GROWTHS: dict[str, tuple[int, ...]] = {
    "features": (512, 2_048, 16_384, 65_536, 200_704),
    "rank": (10, 100, 500, 2_000),
    "batch": (1, 16, 128, 512, 4_096),
    "processes": (1, 2, 4),
    "layers": (1, 2, 4, 8),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One setting: one number moved away from that of all others."""

    features: int = 16_384  # m
    rank: int = 100  # r
    batch: int = 128  # n, of each process
    processes: int = 1
    layers: int = 1
    precision: str = "float32"  # of the activations

    @property
    def entering(self) -> int:
        """p, the rows that enter W at an update."""
        return min(ROWS, self.batch * self.processes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured at a point: means over a turn and over the processes, for each update and process."""

    point: Point
    ms: float  # on the processor, the sum of the four below
    penalty_ms: float
    backward_ms: float
    update_ms: float  # without the projection
    projection_ms: float  # a tenth of one
    state_mib: float  # what the branches hold
    peak_mib: float  # the most while they train
    sent_mib: float  # by each process to others


def points(growths: Sequence[str] = tuple(GROWTHS)) -> list[Point]:
    """All of them, the cheap ones first."""
    found = {
        Point(**{"precision": precision, growth: value})  # type: ignore[arg-type]
        for growth in growths
        for value in GROWTHS[growth]
        for precision in PRECISIONS
    }
    return sorted(found, key=lambda point: (work(point) * point.layers * point.processes, point.precision))


# -------------------------------------------------------------------------------------------------------- the formula


@dataclasses.dataclass(frozen=True)
class Products:
    """Multiply-adds of one branch for an update, by the precision that they are made in."""

    single: float
    half: float = 0.0  # bfloat16: takes half the time of a single one
    double: float = 0.0  # takes twice the time
    decomposed: float = 0.0  # in eigendecompositions and the like, as their textbooks count them; single


def products(point: Point) -> Products:
    """From the code: W has its rank r, k runs from r to r + 9 p between two projections and is K = r + 10 p at one."""
    m, r, n, p = point.features, min(point.rank, point.features), point.batch, point.entering
    sizes = [r + step * p for step in range(EVERY)]
    k, k2 = statistics.mean(sizes), statistics.mean(size**2 for size in sizes)
    low = point.precision == "bf16"
    exact = p if low and point.processes == 1 else n  # beside other processes each row may turn out to enter W
    single = k * exact * m + (0 if low else k * n * m)  # P = B X^T, and B^T C for the gradient
    half = k * (n - exact) * m + (k * n * m if low else 0)
    single += p * p * m + 3 * k2 * n + k2 * p  # the new rows' part of G; y, G y - P, C; the border of M
    double = 2 * p**3  # the curvature
    # A tenth of a projection: the start, Ritz vectors in it, the new basis; now and then its Gram matrix.
    big = r + EVERY * p
    whole = big <= r + CONFIG.oversampling
    s = big if whole else r + CONFIG.oversampling
    at_projection = (0.0 if whole else CONFIG.oversampling * big * m) + big * big * s  # B times random columns, M start
    at_projection += big * big * s + big * s * s + big * s * r + r * big * m + r * r * m / REFRESH
    in_double = big * big * s + 2 * big * s * s + s * s * r + big * s * r
    decomposed = 4.5 * s**3 + 2 * (s**3 / 6 + s**3 / 2)  # eigenvectors; Cholesky and its inverse in double
    if min(r, EVERY * p) <= 8 * max(CONFIG.head_sizes):  # the directions of the head, see `head.leading`
        in_double += r * r * EVERY * p
        decomposed += 2 * 4.5 * r**3
    else:
        in_double += (2 * 4 + 1) * r * EVERY * p * 2 * max(CONFIG.head_sizes)
    return Products(single + at_projection / EVERY, half, double + in_double / EVERY, decomposed / EVERY)


def work(point: Point) -> float:
    """All multiply-adds of one branch for an update in units of the time that one in float32 takes."""
    made = products(point)
    return made.single + made.half / 2 + 2 * made.double + made.decomposed


@dataclasses.dataclass(frozen=True)
class Constants:
    """What a machine adds to the formula: ms = layers (per_update + per_product x work)."""

    per_product: float  # ms
    per_update: float  # ms, for the calls themselves

    def ms(self, point: Point) -> float:
        return point.layers * (self.per_update + self.per_product * work(point))


def fit(rows: Sequence[Row]) -> Constants:
    """The constants with the least squares of the relative errors."""
    lengths = torch.tensor([[row.point.layers * work(row.point), row.point.layers] for row in rows]).double()
    seconds = torch.tensor([row.ms for row in rows]).double()
    scales = lengths.amax(dim=0)
    relative = lengths / scales / seconds[:, None]
    solved = torch.linalg.lstsq(relative, torch.ones(len(rows), 1).double()).solution[:, 0] / scales
    return Constants(*solved.tolist())


def state_mib(point: Point) -> float:
    """B and its copy in bfloat16, M and G, with all rows of an interval."""
    big = point.rank + EVERY * point.entering
    return point.layers * big * (point.features * (6 if point.precision == "bf16" else 4) + 2 * 4 * big) / 2**20


def peak_mib(point: Point) -> float:
    """The state, and what comes on top of it: the gradient and the rows that wait, or the algebra of a projection."""
    number = 2 if point.precision == "bf16" else 4
    big, s = point.rank + EVERY * point.entering, point.rank + CONFIG.oversampling
    waiting = point.layers * min(ROWS if point.processes == 1 else point.batch, point.batch) * point.features * number
    gradient = point.batch * point.features * number * min(2, point.layers)
    batch = gradient + 5 * 4 * big * point.batch * point.layers
    if point.processes > 1:
        batch += 2 * 4 * point.entering * point.features  # the rows of all on their way
    batch += 4 * 4 * min(2**20, point.batch * point.features)  # the pieces that it is gone through in
    projection = 8 * (2 * big * big + 6 * big * s)
    return state_mib(point) + (waiting + max(batch, projection)) / 2**20


def sent_mib(point: Point) -> float:
    """The rows that enter W, their products and the mean, in a ring: each sends 2 (N - 1) / N of them."""
    k = point.rank + (EVERY - 1) / 2 * point.entering
    numbers = point.entering * (point.features + k) + point.features
    return 4 * point.layers * numbers * 2 * (point.processes - 1) / point.processes / 2**20


# ---------------------------------------------------------------------------------------------------------- measuring


class Layers(nn.Sequential):
    """Layers that do nothing, of a network with classes."""

    def __init__(self, count: int) -> None:
        super().__init__(*(nn.Identity() for _ in range(count)))


def model(point: Point) -> tlr.LowRankModel:
    """Branches alone."""
    names = [str(number) for number in range(point.layers)]
    config = dataclasses.replace(CONFIG, branches=dict.fromkeys(names, point.rank))
    taps = [Tap(name, name) for name in names]
    widths, ranks = dict.fromkeys(names, point.features), dict.fromkeys(names, point.rank)
    return tlr.LowRankModel(Layers(point.layers), config, taps, widths, ranks, CLASSES).train()


class Run:
    """Updates of branches on random activations with a decaying spectrum, new ones at each."""

    def __init__(self, point: Point, seed: int = 0) -> None:
        generator, dtype = torch.Generator().manual_seed(seed), PRECISIONS[point.precision]
        self.labels = torch.randint(CLASSES, (point.batch,), generator=generator)
        self.noise = torch.randn(point.batch, point.features + 4096, generator=generator).to(dtype)
        self.scales = (torch.arange(1, point.features + 1) ** -0.25).to(dtype)
        self.activations = torch.zeros(point.batch, point.features, dtype=dtype, requires_grad=True)
        self.updates = 0
        self.before = memory_mib("VmRSS")
        self.model = model(point)

    def update(self) -> tuple[float, ...]:
        """One update; the seconds of penalty, backward and update."""
        begin = 97 * self.updates % 4096
        with torch.no_grad():
            self.activations.copy_(self.noise[:, begin : begin + self.activations.shape[1]]).mul_(self.scales)
        self.activations.grad = None
        marks = [time.process_time()]
        self.model(self.activations)
        penalty = self.model.penalty(self.labels)
        marks.append(time.process_time())
        penalty.backward()  # type: ignore[no-untyped-call]
        marks.append(time.process_time())
        self.model.update()
        marks.append(time.process_time())
        self.updates += 1
        return tuple(after - before for before, after in itertools.pairwise(marks))


def memory_mib(name: str) -> float:
    """A line of /proc/self/status, once what is free has been given back."""
    if name == "VmRSS":
        ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


def peak_of(run: Run) -> float:
    """The most that the process holds during ten more updates, in MiB.

    What is freed goes back to the system at once. Otherwise the heap of a process that frees tensors of some MiB keeps
    holes between those that it still needs, at a batch of 4,096 some 200 MiB of them.
    """
    ctypes.CDLL(None).mallopt(-3, 2**18)  # M_MMAP_THRESHOLD, in bytes; not before, for new pages take time
    run.activations.grad = None
    memory_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    for _ in range(EVERY):
        run.update()
    return memory_mib("VmHWM")


def written() -> int:
    """Bytes that this process has written anywhere."""
    return int(Path("/proc/self/io").read_text().split("wchar: ")[1].split()[0])


def measure_here(point: Point, number: int = 0) -> Row:
    """In this process, which is the `number`-th."""
    run = Run(point, number)
    for _ in range(EVERY * -(-point.rank // (EVERY * point.entering))):  # until W has its rank
        run.update()
    turns: list[list[tuple[float, ...]]] = []
    begun = written()
    while len(turns) < (TURNS if point.processes == 1 else 2) and (
        sum(map(sum, itertools.chain(*turns))) < ENOUGH or point.processes > 1
    ):
        turns.append([run.update() for _ in range(EVERY)])
    sent = (written() - begun) / (EVERY * len(turns))
    turn = min(turns, key=lambda steps: sum(map(sum, steps)))
    between = statistics.median(step[2] for step in turn[:-1])
    penalty, backward = (1000 * statistics.mean(step[part] for step in turn) for part in (0, 1))
    total = 1000 * sum(map(sum, turn)) / EVERY
    projection = 1000 * (turn[-1][2] - between) / EVERY
    peak = peak_of(run) - run.before
    run.activations.grad = None
    return Row(
        point=point,
        ms=total,
        penalty_ms=penalty,
        backward_ms=backward,
        update_ms=total - penalty - backward - projection,
        projection_ms=projection,
        state_mib=memory_mib("VmRSS") - run.before,
        peak_mib=peak,
        sent_mib=sent / 2**20 if point.processes > 1 else 0.0,
    )


def _child(point: Point, number: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    small = Run(Point(features=64, rank=4, batch=8, precision=point.precision))
    for _ in range(EVERY):  # what the first calls load and keep is not the branch's
        small.update()
    if point.processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=point.processes)
        dist.all_reduce(torch.zeros(2**20))
    pipe.send(measure_here(point, number))
    if point.processes > 1:
        dist.destroy_process_group()


def measure(point: Point) -> Row:
    """In processes of its own; the mean over them."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        running, pipes = [], []
        for number in range(point.processes):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(point, number, f"{folder}/store", sender))
            process.start()
            sender.close()
            running.append(process)
            pipes.append(receiver)
        rows = [pipe.recv() for pipe in pipes]
        for process in running:
            process.join()
    names = [field.name for field in dataclasses.fields(Row) if field.name != "point"]
    return Row(point=point, **{name: statistics.mean(getattr(row, name) for row in rows) for name in names})


# ------------------------------------------------------------------------------------------------ what is made of it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Growth:
    """The whole of docs/growth.json."""

    machine: dict[str, Any]
    rows: tuple[Row, ...]


def read(path: Path) -> Growth:
    problems: list[str] = []
    growth = decode(Growth, json.loads(path.read_text()), path.name, problems)
    if problems:
        raise SystemExit("; ".join(problems))
    return growth


def table(rows: Sequence[Row]) -> str:
    """Markdown: measured and, in brackets, by the formula."""
    constants, have = fit(rows), {row.point: row for row in rows}
    lines = []
    for growth, values in GROWTHS.items():
        for value in values:
            pair = [have.get(Point(**{"precision": name, growth: value})) for name in PRECISIONS]  # type: ignore[arg-type]
            if not any(pair):
                continue
            cells = [f"{growth} {value:,}"]
            cells += ["" if row is None else f"{row.ms:.3g} ({constants.ms(row.point):.3g})" for row in pair]
            cells += ["" if row is None else f"{row.state_mib:.0f} ({state_mib(row.point):.0f})" for row in pair]
            cells += ["" if row is None else f"{row.peak_mib:.0f} ({peak_mib(row.point):.0f})" for row in pair]
            lines.append(cells)
    kinds = [f"{what}, {name}" for what in ("ms", "state, MiB", "peak, MiB") for name in PRECISIONS]
    return markdown_table(["", *kinds], lines, right=range(1, 7))


def picture(path: Path, rows: Sequence[Row]) -> None:
    """Time and memory against each of the numbers, points for what was measured and lines for the formula."""
    require("matplotlib.figure", "matplotlib")
    constants = fit(rows)
    figure = drawing.new_figure(12.5, 5.2)
    panels = figure.subplots(2, len(GROWTHS), sharey="row")
    for column, growth in enumerate(GROWTHS):
        for name, colour in zip(PRECISIONS, (drawing.PLAIN, drawing.LOWRANK), strict=True):
            mine = [
                row for row in rows if row.point == Point(**{"precision": name, growth: getattr(row.point, growth)})
            ]  # type: ignore[arg-type]
            mine.sort(key=lambda row: getattr(row.point, growth))
            values = [getattr(row.point, growth) for row in mine]
            if not mine:
                continue
            ends = torch.tensor([values[0], values[-1]]).double().log()
            between = sorted(
                {*torch.linspace(float(ends[0]), float(ends[1]), 40).exp().round().int().tolist(), *values}
            )
            way = [Point(**{"precision": name, growth: value}) for value in between]  # type: ignore[arg-type]
            for panel, measured, formula in (
                (panels[0][column], [row.ms for row in mine], [constants.ms(point) for point in way]),
                (panels[1][column], [row.peak_mib for row in mine], [peak_mib(point) for point in way]),
            ):
                panel.loglog(between, formula, color=colour, linewidth=1.2)
                panel.loglog(values, measured, "o", color=colour, markersize=4.5, label=name)
                drawing.dress(panel)
        panels[1][column].set_xlabel(growth, fontsize=9)
    panels[0][0].set_ylabel("ms an update, processor", fontsize=9)
    panels[1][0].set_ylabel("peak memory, MiB", fontsize=9)
    if panels[0][0].lines:
        panels[0][0].legend(fontsize=8, frameon=False)
    base = Point()
    figure.suptitle(
        f"A branch of rank {base.rank} on {base.features:,} features, batch {base.batch}, 1 process, 1 layer, and one "
        "of these changed; lines: the formula",
        fontsize=9,
    )
    drawing.write_png(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=GROWTHS, default=list(GROWTHS))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent.parent / "docs" / "growth.json")
    parser.add_argument("--markdown", action="store_true", help="print the table of what is there and stop")
    parser.add_argument("--picture", type=Path, help="draw what is there and stop")
    options = parser.parse_args()
    growth = read(options.output) if options.output.exists() else Growth(machine=machine(), rows=())
    if options.markdown or options.picture:
        if options.markdown:
            print(table(growth.rows))
        if options.picture:
            picture(options.picture, growth.rows)
        return
    for point in points(options.only):
        if any(row.point == point for row in growth.rows):
            continue
        row = measure(point)
        growth = dataclasses.replace(growth, rows=(*growth.rows, row))
        write_whole(options.output, json.dumps(encode(growth), indent=1) + "\n")
        values = {name: f"{value:.3g}" for name, value in vars(row).items() if name != "point"}
        print_table(str(point), list(values), [list(values.values())])


if __name__ == "__main__":
    main()
