"""Files that are there whole or not at all."""

import multiprocessing

import pytest

from timm_lowrank.files import write_whole

FORK = multiprocessing.get_context("fork")


def write_many(path, letter):
    for _ in range(100):
        write_whole(path, letter * 300_000)
        content = path.read_text()
        assert content in ("a" * 300_000, "b" * 300_000), "torn"


def test_processes_that_write_one_file_wait_for_each_other(tmp_path):
    writers = [FORK.Process(target=write_many, args=(tmp_path / "file", letter)) for letter in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
        writer.kill()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_a_killed_one_left_is_written_over_and_an_error_leaves_the_old_file(tmp_path):
    path, partial = tmp_path / "file", tmp_path / ".file.partial"
    partial.write_bytes(b"much longer than what is written")
    write_whole(path, "new")
    assert (path.read_text(), partial.exists()) == ("new", False)
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "\ud800")
    assert (path.read_text(), partial.exists()) == ("new", False)
