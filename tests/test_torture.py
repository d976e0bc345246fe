"""The short form of tests/torture: a few faults of each scenario, one after the other in a process of their own."""

import sys

import forked
import pytest
from evaluations import SHORT_DIAGNOSIS

from timm_lowrank.evaluation.masking import BUDGETS


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
def test_what_was_written_holds(scenario, faults, tmp_path):
    given = [word for fault in faults for word in ("--fault", *fault.split())]
    log = tmp_path / "log"
    forked.finish(forked.start(torture, scenario, "--moments", "0", *given, log=log), logs=[log], seconds=600)
    assert sum(int(line.split()[-4]) for line in log.read_text().splitlines() if line.endswith("held")) == len(faults)


def torture(*arguments):
    """`python -m tests.torture ARGUMENTS`, with a diagnosis of masking that takes a moment."""
    from torture.__main__ import main

    BUDGETS["quick"] = SHORT_DIAGNOSIS
    sys.argv[1:] = arguments
    return main()
