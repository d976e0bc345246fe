"""The journal of an evaluation: what a kill at any byte leaves behind must be usable."""

import json
import math

import pytest

from timm_lowrank.errors import EvaluationError
from timm_lowrank.suites.journal import Journal
from timm_lowrank.training import RunError

HEADER = {"format": 1, "seed": 0, "layers": ("layer3",), "measurements": [{"class": "Clean"}]}
UNITS = {
    ("clean", "plain", 0): {"correct": [True, False]},
    ("clean", "plain", 1): {"correct": [True]},
    ("rho", "2-LR", 0): {"rho": [0.1, 1 / 3, math.nan]},
}


@pytest.fixture
def journal(tmp_path):
    journal = Journal(tmp_path / "evaluation.json.partial", HEADER)
    journal.recover()
    return journal


def fill(journal, process=0):
    for unit, columns in UNITS.items():
        journal.append(process, unit, columns)


def same(left, right):
    return json.dumps([[*unit, value] for unit, value in sorted(left.items())]) == json.dumps(
        [[*unit, value] for unit, value in sorted(right.items())]
    )


def test_what_was_appended_is_read_back_to_the_bit(journal):
    assert journal.units() == {}
    fill(journal)
    assert same(journal.units(), UNITS)
    again = Journal(journal.path, HEADER)
    again.recover()
    assert same(again.units(), UNITS)


def test_a_kill_at_any_byte_keeps_every_unit_that_was_complete(journal):
    fill(journal)
    whole = journal.path.read_bytes()
    ends = [place for place, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole)):
        journal.path.write_bytes(whole[:cut])
        again = Journal(journal.path, HEADER)
        again.recover()
        complete = max(0, sum(end < cut for end in ends) - 1)  # the first line is the header
        assert same(again.units(), dict(list(UNITS.items())[:complete]))
        again.append(0, ("later", "plain", 0), {"x": [1]})
        assert len(again.units()) == complete + 1


def test_files_of_several_processes_become_one(journal):
    for process, (unit, columns) in enumerate(UNITS.items()):
        journal.append(process, unit, columns)
    assert len(list(journal.path.parent.iterdir())) == 3
    assert same(journal.units(), UNITS)
    journal.recover()
    assert [path.name for path in journal.path.parent.iterdir()] == [journal.path.name]
    assert same(journal.units(), UNITS)
    journal.remove()
    assert list(journal.path.parent.iterdir()) == []


def test_another_evaluation_is_refused_and_left_alone(journal):
    fill(journal)
    before = journal.path.read_bytes()
    with pytest.raises(EvaluationError, match=r"seed was 0 and is 1.*--output"):
        Journal(journal.path, {**HEADER, "seed": 1}).recover()
    assert journal.path.read_bytes() == before


def test_bytes_that_are_no_journal_are_replaced(journal):
    journal.path.write_bytes(b"\x00\xff garbage\n{not json}\n")
    journal.recover()
    assert journal.units() == {}
    fill(journal)
    assert same(journal.units(), UNITS)


def test_a_full_disk_is_one_error_and_loses_nothing(journal, monkeypatch):
    fill(journal)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(RunError, match=r"No space left.*same command"):
            journal.append(0, ("late", "plain", 0), {"x": [1]})
    assert UNITS.keys() <= journal.units().keys()
