"""The command; see the package."""

from __future__ import annotations

import argparse
import contextlib
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the other tests have their helpers
sys.path.insert(1, str(Path(__file__).parents[2]))

import matplotlib.pyplot
import sklearn.svm
import torch

from .faults import SIGNALS, Fault, Outcome, run
from .scenarios import SCENARIOS, Scenario, Training, damages

IMPORTED = (matplotlib.pyplot, sklearn.svm)  # once, before the forks
SIZES = [round(2 ** (k / 2)) for k in range(14, 41)]  # 128 bytes to 1 MiB, 27 of them


class Tally:
    """What held and what did not."""

    def __init__(self) -> None:
        self.tried: dict[str, int] = {}
        self.failed: list[str] = []

    def add(self, name: str, problem: str | None, fault: object) -> None:
        self.tried[name] = self.tried.get(name, 0) + 1
        if problem is not None:
            self.failed.append(f"{name}, {fault}: {problem}")
            print(f"FAILED {self.failed[-1]}", flush=True)
        elif self.tried[name] % 20 == 0:
            print(f"{name}: {self.tried[name]} tried", flush=True)

    def report(self) -> str:
        lines = []
        for name, tried in self.tried.items():
            failed = sum(text.startswith(f"{name}, ") for text in self.failed)
            lines.append(f"{name}: {tried - failed} of {tried} held")
        return "\n".join(lines)


def faults_of(scenario: Scenario, undisturbed: Outcome, every: int, moments: int, seed: int) -> Iterator[Fault]:
    """The faults that a scenario is tried with, each kind beginning at another operation if some are left out."""
    draw = random.Random(seed)
    processes = range(len(undisturbed.operations))
    number = 0
    for kind in scenario.faults:
        if kind == "full":
            yield from (Fault("full", size) for size in SIZES[::every])
            continue
        # Of several processes each by itself, and all at the moment of one of them.
        struck = [
            (one, together) for one in processes for together in ((False, True) if len(processes) > 1 else (False,))
        ]
        for process, together in struck if kind in SIGNALS else [(one, True) for one in processes]:
            operations = range(1 + number % every, undisturbed.operations[process] + 1, every)
            yield from (Fault(kind, at, process, together) for at in operations)
            number += 1
        for count in range(moments if kind in SIGNALS else 0):
            process, together = struck[count % len(struck)]
            yield Fault(kind, draw.uniform(0, undisturbed.seconds), process, together)


def problem_of(scenario: Scenario, folder: Path, whole: Path, faults: list[Fault]) -> str | None:
    """What is wrong after faults, one after the other, and the same command undisturbed; None if all is well."""
    said: list[str] = []
    try:
        scenario.prepare(folder)
        for fault in faults:
            outcome = run(lambda: scenario.act(folder), folder, fault, scenario.processes, lambda: scenario.met(folder))
            said.append(outcome.said)
            if "Traceback (most recent call last)" in outcome.said and scenario.says_all:
                return f"it ended in a traceback\n{outcome.said}"
            scenario.after_fault(folder)
        again = run(lambda: scenario.act(folder), folder, None, scenario.processes)
        if again.code != 0:
            return f"the same command did not go on\n{again.said}\nand before\n{said}"
        scenario.check(folder, whole)
    except Exception as error:
        return "\n".join([_described(error), *said])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return None


def _described(error: Exception) -> str:
    """An error with the line that raised it."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {where.name}, {where.line}: {str(error)[:600]}"


def torture(
    name: str,
    scratch: Path,
    every: int,
    moments: int,
    seed: int,
    tally: Tally,
    chosen: Sequence[Fault] = (),
    only: Sequence[str] = (),
) -> None:
    """Tries one scenario with all of its faults, then with two in a row."""
    scenario = SCENARIOS[name](scratch / name)
    with scenario.around():
        whole = scenario.scratch / "whole"
        scenario.prepare(whole)
        undisturbed = run(lambda: scenario.act(whole), whole, None, scenario.processes)
        assert undisturbed.code == 0, undisturbed.said
        operations = " and ".join(map(str, undisturbed.operations))
        print(f"{name}: {operations} operations in {undisturbed.seconds:.1f} s", flush=True)
        scenario.faults = tuple(kind for kind in scenario.faults if not only or kind in only)
        faults = chosen or list(faults_of(scenario, undisturbed, every, moments, seed))
        for number, fault in enumerate(faults):
            problem = problem_of(scenario, scenario.scratch / f"{name}-{number}", whole, [fault])
            tally.add(f"{name}: {fault.kind}", problem, fault.written())
        draw = random.Random(seed)
        for number in range(moments if "kill" in scenario.faults and any(undisturbed.operations) else 0):
            pair = [Fault("kill", draw.randint(1, undisturbed.operations[0]), together=True) for _ in range(2)]
            problem = problem_of(scenario, scenario.scratch / f"{name}-twice-{number}", whole, pair)
            tally.add(f"{name}: killed twice", problem, f"{pair[0].written()}, {pair[1].written()}")


def damage(scratch: Path, every: int, tally: Tally) -> None:
    """Damages each file of an interrupted run: it falls back to the same result, or one line says what to do."""
    scenario = Training(scratch / "damage")
    whole = scenario.scratch / "whole"
    scenario.prepare(whole)
    assert run(lambda: scenario.act(whole), whole).code == 0
    interrupted = scenario.scratch / "interrupted"
    shutil.copytree(whole, interrupted)
    for name in ("summary.json", "spectrum.json"):
        (interrupted / "run" / name).unlink()
    shutil.rmtree(interrupted / "run" / "model")
    for one in damages(interrupted / "run")[::every]:
        folder = scenario.scratch / "damaged"
        shutil.copytree(interrupted, folder)
        one.do(folder / "run")
        outcome = run(lambda folder=folder: scenario.act(folder), folder)
        problem = None
        if outcome.code == 0:
            try:
                scenario.check(folder, whole)
            except Exception as error:
                problem = f"another result without a word: {_described(error)}"
        elif "Traceback" in outcome.said or Path(one.path).name not in outcome.said:
            problem = f"no line that names the file: {outcome.said[-300:]}"
        tally.add("damage", problem, one)
        shutil.rmtree(folder)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    names = [*SCENARIOS, "damage"]
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=f"{', '.join(names)} (default: all)")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="try each Nth moment (default: all)")
    parser.add_argument("--moments", type=int, default=20, metavar="N", help="random moments of each signal")
    parser.add_argument(
        "--fault",
        nargs=2,
        action="append",
        default=[],
        metavar=("KIND", "AT"),
        help="instead of all: kill 85, full 512; of several processes kill 85:1, and kill 85:1+ of all at that moment",
    )
    parser.add_argument("--only", nargs="+", metavar="KIND", help="faults of these kinds alone, such as kill and full")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list", action="store_true", help="print the scenarios and stop")
    given = parser.parse_args()
    if given.list:
        print("\n".join(f"{name:<12}{SCENARIOS[name].__doc__}" for name in SCENARIOS))
        return 0
    if unknown := [name for name in given.scenarios if name not in names]:
        parser.error(f"there is no scenario {unknown[0]!r}; there are {', '.join(names)}")
    chosen = [Fault.parse(kind, at) for kind, at in given.fault]
    torch.set_num_threads(1)  # a forked process cannot use the threads of its parent
    tally = Tally()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was counted until then is said
    with tempfile.TemporaryDirectory() as scratch, contextlib.suppress(KeyboardInterrupt):
        for name in given.scenarios or names:
            if name == "damage":
                damage(Path(scratch), given.every, tally)
            else:
                torture(name, Path(scratch), given.every, given.moments, given.seed, tally, chosen, given.only or ())
    print(tally.report())
    return 1 if tally.failed else 0


if __name__ == "__main__":
    sys.exit(main())
