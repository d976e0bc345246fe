"""The short form of tests/torture: a few faults of each scenario, one after the other in a process of their own."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("scenario", "faults"),
    [
        ("training", ["power 124", "kill 85", "full 4096"]),
        ("processes", ["kill 9:1"]),
        ("adding", ["kill 22", "power 26"]),
        ("saving", ["kill 5", "kill 16", "power 20", "interrupt 18", "full 512"]),
        ("evaluation", ["kill 4"]),
        ("push", ["kill 2"]),
    ],
)
def test_what_was_written_holds(scenario, faults):
    given = [word for fault in faults for word in ("--fault", *fault.split())]
    command = [sys.executable, "-m", "tests.torture", scenario, "--moments", "0", *given]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sum(int(line.split()[-4]) for line in done.stdout.splitlines() if line.endswith("held")) == len(faults)
