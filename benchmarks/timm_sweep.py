"""Every architecture of timm with "1-LR" and "2-LR": a training step, checkpointing, unwrapping, equality to the plain.

    python benchmarks/timm_sweep.py                                 # all of them: an hour or more
    python benchmarks/timm_sweep.py --models "resnet*" --workers 2
    python benchmarks/timm_sweep.py --retry                         # once more what did not pass
    python benchmarks/timm_sweep.py --write docs/timm.md            # the table of what was found so far

Weights are random, batches hold two images of 64 pixels, or of the next size that the network takes. One process per
network, so that a crash, a network without end or one that eats the memory costs one row. Rows are lines of JSON; a
killed sweep goes on where it was. The smallest member of every family comes first.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import multiprocessing
import resource
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import model_entrypoint
from timm_sweep_build import build, family
from timm_sweep_check import META_ABOVE, check
from timm_sweep_table import document, totals

STALLED = 20  # times as long on the clock as on the processor, and a process is given up
OUTPUT = "benchmarks/results/timm_sweep.jsonl"


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of earlier runs by name; of several with one name the last. A line that a kill cut short is skipped."""
    rows = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows[row["name"]] = row
    return rows


def in_order(names: list[str], path: Path) -> list[str]:
    """The smallest member of every family, then all others, small ones first. Counts are kept in `path`."""
    sizes: dict[str, int] = json.loads(path.read_text()) if path.exists() else {}
    for name in set(names) - set(sizes):
        sizes[name] = sum(p.numel() for p in build(name, device="meta").parameters())
    path.write_text(json.dumps(sizes))
    names = sorted(names, key=lambda name: (sizes[name], name))
    first = {family(name): name for name in reversed(names)}
    return sorted(names, key=lambda name: first[family(name)] != name)


def work(name: str, meta_above: int, memory: float, seconds: int, threads: int, answer: Connection) -> None:
    """One network, in a process of its own."""
    torch.set_num_threads(threads)
    limit = int(memory * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))  # ends it, also when the sweep itself was killed
    row = check(name, meta_above)
    row["peak_mib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    answer.send(row)


def sweep(names: list[str], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each network, in the order in which they finish."""
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["timm_sweep_check"])
    waiting = list(reversed(names))
    running: dict[Connection, tuple[str, Any, float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < options.workers:
                name = waiting.pop()
                ours, theirs = context.Pipe(duplex=False)
                settings = (int(options.meta_above * 1e6), options.memory, options.timeout, options.threads)
                process = context.Process(target=work, args=(name, *settings, theirs))
                process.start()
                theirs.close()
                running[ours] = (name, process, time.monotonic())
            ready = wait(list(running), timeout=1)
            for ours, (name, process, started) in list(running.items()):
                late = time.monotonic() - started > STALLED * options.timeout
                if ours not in ready and not late:
                    continue
                del running[ours]
                yield result(name, process, ours if ours in ready else None, options.timeout)
    finally:  # interrupted
        for _, process, _ in running.values():
            process.kill()


def result(name: str, process: Any, answer: Connection | None, timeout: int) -> dict[str, Any]:
    """What a process answered, or how it ended without an answer."""
    why = f"no answer within {STALLED * timeout} s"
    if answer is not None:
        try:
            row: dict[str, Any] = answer.recv()
            process.join()
            return row
        except EOFError:
            process.join()
            why = f"the process ended with exit code {process.exitcode}"
            if process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL):
                why = f"not done after {timeout} s on the processor, or killed for memory"
    process.kill()
    process.join()
    return {"name": name, "family": family(name), "status": "fail", "why": why}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="*", help="pattern of names, as timm.list_models takes it; commas separate")
    parser.add_argument("--limit", type=int, help="at most so many networks in this run")
    parser.add_argument("--workers", type=int, default=1, help="networks at the same time (default 1)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each (default 1)")
    parser.add_argument("--timeout", type=int, default=300, help="processor seconds for one network (default 300)")
    parser.add_argument("--memory", type=float, default=8, help="GiB for one network (default 8)")
    parser.add_argument(
        "--meta-above",
        type=float,
        default=META_ABOVE / 1e6,
        help="million parameters above which a network is built on the meta device (default %(default).0f)",
    )
    parser.add_argument("--retry", action="store_true", help="again what did not pass in earlier runs")
    parser.add_argument("--again", action="store_true", help="again what passed, too")
    parser.add_argument("--output", default=OUTPUT, help=f"rows, JSON lines (default {OUTPUT})")
    parser.add_argument("--write", metavar="FILE", help="only write the table of the rows so far, as Markdown")
    options = parser.parse_args()
    path = Path(options.output)
    rows = read(path)
    listed = [name for name in timm.list_models() if model_entrypoint(name).__module__.startswith("timm.")]
    if options.write:
        versions = (timm.__version__, torch.__version__.split("+")[0])
        text = document(list(rows.values()), len(listed), *versions, int(options.meta_above))
        Path(options.write).write_text(text)
        return
    patterns = options.models.split(",")
    names = [name for name in listed if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    if not options.again:
        done = {name for name, row in rows.items() if row["status"] == "pass" or not options.retry}
        names = [name for name in names if name not in done]
    path.parent.mkdir(parents=True, exist_ok=True)
    names = in_order(names, path.with_suffix(".sizes.json"))[: options.limit]
    with path.open("a") as file:
        for count, row in enumerate(sweep(names, options), start=1):
            file.write(json.dumps(row) + "\n")
            file.flush()
            rows[row["name"]] = row
            print(f"{count}/{len(names)} {row['name']}: {row['status']} {row['why']}".rstrip(), flush=True)
    print(totals(list(rows.values())))


if __name__ == "__main__":
    main()
