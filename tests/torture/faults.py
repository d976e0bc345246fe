"""A forked process with a fault at one exact moment.

The moments are what a process changes below a folder: files that are opened for writing, renamed or removed, folders
that are made. Python reports each of them to audit hooks before it is done. What libraries write without Python
(safetensors does) has no moment of its own, but the rename behind it has, and random moments fall anywhere.
"""

from __future__ import annotations

import dataclasses
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Literal

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# Event of an audit hook -> which of its arguments is dir_fd; None where it has none.
DIR_FD_AT = {"os.remove": 1, "os.rmdir": 1, "os.mkdir": 2, "os.rename": 2, "os.truncate": None}
CONNECTIONS = "socket.connect"
PATIENCE = 300  # seconds until a process counts as hanging

Kind = Literal["kill", "terminate", "interrupt", "power", "full"]
SIGNALS: dict[str, signal.Signals] = {
    "kill": signal.SIGKILL,
    "terminate": signal.SIGTERM,
    "interrupt": signal.SIGINT,
}


@dataclasses.dataclass(frozen=True)
class Fault:
    """What happens to a process.

    Args:
        kind: a signal; "power", which is a kill after which every file is empty that was written and not synchronised;
            or "full", a file system on which no file gets longer than `at` bytes.
        at: before which file operation, from 1; a float is a moment, in seconds from the start.
    """

    kind: Kind
    at: int | float

    def __str__(self) -> str:
        if self.kind == "full":
            return f"no file above {self.at} bytes"
        when = f"operation {self.at}" if isinstance(self.at, int) else f"{self.at:.2f} s"
        return f"{self.kind} at {when}"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a process ended: its exit code (negative: the signal), the operations that it did, what it said."""

    code: int
    operations: int
    seconds: float
    said: str


def run(action: Callable[[], int], watched: Path, fault: Fault | None = None, log: Path | None = None) -> Outcome:
    """Runs `action` in a forked process, which may not outlast `PATIENCE`; its value is the exit code."""
    log = log or watched.with_name(f"{watched.name}.log")
    counted, counts = os.pipe()
    began = time.monotonic()
    process = os.fork()
    if process == 0:
        os.close(counted)
        _in_child(action, watched, fault, log, counts)
    os.close(counts)
    deadline = began + PATIENCE
    moment = began + fault.at if fault and isinstance(fault.at, float) else deadline
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            break
        now = time.monotonic()
        if now >= min(moment, deadline):
            os.kill(process, signal.SIGKILL if now >= deadline or fault is None else SIGNALS[fault.kind])
            moment = deadline
            if now >= deadline:
                os.waitpid(process, 0)
                raise TimeoutError(f"still running after {PATIENCE} s: {fault}")
        time.sleep(0.005)
    with os.fdopen(counted) as pipe:
        counted_text = pipe.read()
    code = os.waitstatus_to_exitcode(status)
    return Outcome(code, int(counted_text or 0), time.monotonic() - began, log.read_text(errors="replace"))


def _in_child(action: Callable[[], int], watched: Path, fault: Fault | None, log: Path, counts: int) -> None:
    """Never returns."""
    code = 99
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the parent made of it
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        # What the parent replaced these with, pytest's capture for example, is not what a process has.
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        if fault and fault.kind == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(fault.at), resource.RLIM_INFINITY))
        hook = _Hook(watched, fault if fault and fault.kind != "full" and isinstance(fault.at, int) else None)
        sys.addaudithook(hook)
        code = action()
        hook.busy = True
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        os.write(counts, str(hook.operations).encode())
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class _Hook:
    """Counts the operations below a folder, and strikes before one of them."""

    def __init__(self, watched: Path, fault: Fault | None) -> None:
        self.operations, self.busy = 0, False
        self._watched, self._fault = f"{watched.resolve()}{os.sep}", fault
        self._began, self._synced = time.time_ns(), set[str]()
        sync = os.fsync

        def noted(descriptor: int) -> None:
            sync(descriptor)
            self._synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))

        os.fsync = noted

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.busy or not (event == "open" or event in DIR_FD_AT or event == CONNECTIONS):
            return
        self.busy = True  # what is done here is not the process's own
        try:
            paths = self._changed(event, arguments)
            if paths is None:
                return
            self.operations += 1
            if self._fault and self.operations == self._fault.at:
                self._strike()
            self._follow(event, paths)
        finally:
            self.busy = False

    def _changed(self, event: str, arguments: tuple[object, ...]) -> list[str] | None:
        """The paths that an event is about; None if it changes nothing below the folder."""
        if event == CONNECTIONS:
            return []
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & WRITING:
                return None
            paths, folder = [path], -1
        else:
            place = DIR_FD_AT[event]
            paths = list(arguments[:2]) if event == "os.rename" else [arguments[0]]
            folder = -1 if place is None else arguments[place]
        named = [os.fsdecode(path) for path in paths if isinstance(path, str | bytes | os.PathLike)]
        if isinstance(folder, int) and folder >= 0:  # shutil.rmtree names things relative to an open folder
            named = [os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path) for path in named]
        named = [os.path.abspath(path) for path in named]
        return named if any(path.startswith(self._watched) for path in named) else None

    def _follow(self, event: str, paths: list[str]) -> None:
        """Keeps the names of what was synchronised up to date."""
        if event == "os.rename":
            old, new = paths
            moved = {path for path in self._synced if path == old or path.startswith(f"{old}{os.sep}")}
            self._synced = (self._synced - moved) | {new + path[len(old) :] for path in moved}
        elif event == "open":
            self._synced.difference_update(paths)

    def _strike(self) -> None:
        assert self._fault is not None
        if self._fault.kind == "power":
            for folder, _, names in os.walk(self._watched):
                for path in (os.path.join(folder, name) for name in names):
                    if os.path.islink(path):  # what it leads to has its own turn
                        continue
                    if path not in self._synced and os.stat(path).st_mtime_ns >= self._began:
                        os.truncate(path, 0)
            os.kill(os.getpid(), signal.SIGKILL)
        os.kill(os.getpid(), SIGNALS[self._fault.kind])
