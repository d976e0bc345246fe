"""Files that are there whole or not at all."""

import errno
import fcntl
import multiprocessing
import os

import pytest

from timm_lowrank.files import folder_aside, sync, write_whole
from timm_lowrank.training.checkpoints import damage, seal

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


@pytest.fixture
def as_on_windows(monkeypatch):
    """os.fsync refuses what is open for reading alone."""

    def fsync(handle, wait=os.fsync):
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        wait(handle)

    monkeypatch.setattr(os, "fsync", fsync)


def test_what_is_waited_for_is_open_for_writing(tmp_path, as_on_windows):
    with folder_aside(tmp_path / "checkpoint") as new:
        write_whole(new / "file", "content")
    seal(tmp_path / "checkpoint")
    assert damage(tmp_path / "checkpoint") is None
    sync(tmp_path)


def test_a_file_that_nobody_may_write_to_is_waited_for(tmp_path, monkeypatch):
    waited = []

    def refused(path, flags, *rest, opened=os.open):
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, flags, *rest)

    (tmp_path / "file").write_text("content")
    monkeypatch.setattr(os, "open", refused)
    monkeypatch.setattr(os, "fsync", waited.append)
    sync(tmp_path / "file")
    assert len(waited) == 1
