"""Files that are there whole or not at all."""

import errno
import fcntl
import multiprocessing
import os

import pytest

from timm_lowrank.files import folder_aside, is_new, new_folder, sync, write_whole
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


@pytest.fixture(params=["new", "empty", "current", "link", "dangling"])
def place(request, tmp_path, monkeypatch):
    """A folder that is new or empty, by some name, and where its content then is."""
    folder = tmp_path / "parent" / "folder"
    if request.param in ("empty", "current", "link"):
        folder.mkdir(parents=True)
    if request.param == "current":
        monkeypatch.chdir(folder)
        return type(folder)(), folder
    if request.param in ("link", "dangling"):
        (tmp_path / "link").symlink_to(folder)
        return tmp_path / "link", folder
    return folder, folder


def filled(folder, fails=False):
    with new_folder(folder, last=["a.json"]) as new:
        assert not any(new.iterdir())
        (new / "inner").mkdir()
        for name in ("a.json", "b", "inner/c"):
            (new / name).write_text(name)
        if fails:
            raise OSError("full")


def test_a_new_or_empty_folder_gets_its_content_whatever_it_is(place):
    name, folder = place
    assert is_new(name)
    before = folder.stat().st_ino if folder.exists() else None
    filled(name)
    held = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    assert held == ["a.json", "b", "inner", "inner/c"]
    assert [path.name for path in folder.parent.iterdir()] == ["folder"], "nothing temporary is left"
    assert before in (None, folder.stat().st_ino)
    assert not is_new(name)


def test_after_an_error_a_folder_is_as_new_as_before(place, monkeypatch):
    name, folder = place
    there, replace = folder.exists(), os.replace
    with pytest.raises(OSError, match="full"):
        filled(name, fails=True)
    moved = []

    def failing(source, target):
        if os.path.basename(source) in ("a.json", "new"):
            moved.append([path.name for path in folder.iterdir()] if there else [])
            raise OSError("full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="full"):
        filled(name)
    assert {"b", "inner"} <= set(moved[0]) if there else moved == [[]], "a.json comes last"
    assert is_new(name)
    assert folder.exists() == there


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
