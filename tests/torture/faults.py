"""A forked process, or several that train together, with a fault at one exact moment.

The moments are what a process changes below a folder: files that are opened for writing, renamed or removed, folders
that are made. Python reports each of them to audit hooks before it is done. What libraries write without Python
(safetensors does) has no moment of its own, but the rename behind it has, and random moments fall anywhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import resource
import signal
import socket
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
PATIENCE = 180  # seconds until a process counts as hanging
CAUGHT = (signal.SIGINT, signal.SIGTERM)
WAIT = 15  # seconds that processes wait for one that has ended before they have met

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
        process: of several, whose operations are counted, and which is struck.
        together: strikes all processes at that moment, as a terminal does; loss of power and full disks always do.
    """

    kind: Kind
    at: int | float
    process: int = 0
    together: bool = False

    def __str__(self) -> str:
        if self.kind == "full":
            return f"no file above {self.at} bytes"
        when = f"operation {self.at}" if isinstance(self.at, int) else f"{self.at:.2f} s"
        return f"{self.kind} at {when}"

    @classmethod
    def parse(cls, kind: str, at: str) -> Fault:
        """From the command line: "85", "0.5", "85:1" of process 1, "85:1+" of it and all others with it."""
        moment, _, process = at.partition(":")
        where = int(process.rstrip("+") or 0)
        return cls(kind, float(moment) if "." in moment else int(moment), where, process.endswith("+"))  # type: ignore[arg-type]

    def written(self) -> str:
        """The inverse of `parse`."""
        at = f"{self.at:.3f}" if isinstance(self.at, float) else str(self.at)
        return f"{self.kind} {at}" + (f":{self.process}{'+' * self.together}" if self.process or self.together else "")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How processes ended: exit codes (negative: the signal), the operations of each, and what they said in turn."""

    codes: tuple[int, ...]
    operations: tuple[int, ...]
    seconds: float
    said: str

    @property
    def code(self) -> int:
        """The first that is not 0."""
        return next((code for code in self.codes if code), 0)


def run(
    action: Callable[[], int],
    watched: Path,
    fault: Fault | None = None,
    processes: int = 1,
    met: Callable[[], bool] = lambda: True,
) -> Outcome:
    """Runs `action` in forked processes; its value is the exit code.

    Args:
        action: what each of them does.
        watched: the folder whose operations count.
        fault: what happens to one of them, or to all.
        processes: how many there are; several find in the environment what torchrun would tell them.
        met: whether several have found each other. Until then each waits for the others, and when one has ended the
            rest is terminated, which is what a launcher does; later they must end by themselves.

    Raises:
        TimeoutError: one of them has not come to its end `PATIENCE` seconds after the start, and was killed.
    """
    logs = [watched.with_name(f"{watched.name}.{number}.log") for number in range(processes)]
    environments = [_environment(number, processes) for number in range(processes)] if processes > 1 else [{}]
    port = {"MASTER_PORT": str(_free_port())} if processes > 1 else {}
    began = time.monotonic()
    pipes, running = [], dict[int, int]()
    for number in range(processes):
        counted, counts = os.pipe()
        signal.pthread_sigmask(signal.SIG_BLOCK, CAUGHT)  # a signal waits until the process is what it will be
        process = os.fork()
        if process == 0:
            os.setpgid(0, next(iter(running), 0))
            os.environ.update(environments[number] | port)
            _in_child(action, watched, _of_process(fault, number), logs[number], counts)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, CAUGHT)
        with contextlib.suppress(OSError):  # it may have been faster
            os.setpgid(process, next(iter(running), 0))
        os.close(counts)
        pipes.append(counted)
        running[process] = number
    struck = next(process for process, number in running.items() if number == (fault.process if fault else 0))
    codes = [0] * processes
    alone = began
    deadline = began + PATIENCE
    moment = began + fault.at if fault and isinstance(fault.at, float) else deadline
    while running:
        for process in list(running):
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                codes[running.pop(process)] = os.waitstatus_to_exitcode(status)
        now = time.monotonic()
        if now >= deadline and running:
            left = sorted(running.values())
            for process in running:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
            raise TimeoutError(
                f"{f'processes {left}' if processes > 1 else 'it'} still ran after {PATIENCE} s: {fault}"
            )
        if now >= moment and fault:
            for process in running:
                if fault.together or process == struck:
                    os.kill(process, SIGNALS[fault.kind])
            moment = deadline
        if not any(codes):
            alone = now
        elif running and now > alone + WAIT and not met():
            for process in running:
                os.kill(process, signal.SIGTERM)
        time.sleep(0.005)
    operations = []
    for counted in pipes:
        with os.fdopen(counted) as pipe:
            operations.append(int(pipe.read() or 0))
    said = "".join(log.read_text(errors="replace") for log in logs)
    return Outcome(tuple(codes), tuple(operations), time.monotonic() - began, said)


def _of_process(fault: Fault | None, number: int) -> Fault | None:
    """What of a fault a process has to bring about itself."""
    if fault is None or fault.kind == "full":
        return fault
    return fault if isinstance(fault.at, int) and fault.process == number else None


def _environment(number: int, processes: int) -> dict[str, str]:
    """As torchrun makes it; told so, accelerate joins the processes of a machine without GPUs."""
    own = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    return {
        **{name: str(value) for name, value in own.items()},
        "MASTER_ADDR": "127.0.0.1",
        "ACCELERATE_USE_CPU": "true",
    }


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _in_child(action: Callable[[], int], watched: Path, fault: Fault | None, log: Path, counts: int) -> None:
    """Never returns."""
    code, begun = 99, False
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the parent made of these
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        # What the parent replaced these with, pytest's capture for example, is not what a process has.
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        if fault and fault.kind == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(fault.at), resource.RLIM_INFINITY))
        hook = _Hook(watched, fault if fault and fault.kind != "full" and isinstance(fault.at, int) else None)
        sys.addaudithook(hook)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, CAUGHT)
        begun = True
        code = action()
        hook.busy = True
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        os.write(counts, str(hook.operations).encode())
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and not begun:
            os._exit(130)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _content_of(about: os.stat_result) -> tuple[int, int, int]:
    """Another one after each write, and the same under every name that a file is given."""
    return about.st_ino, about.st_mtime_ns, about.st_size


class _Hook:
    """Counts the operations below a folder, and strikes before one of them."""

    def __init__(self, watched: Path, fault: Fault | None) -> None:
        self.operations, self.busy = 0, False
        self._watched, self._fault = f"{watched.resolve()}{os.sep}", fault
        self._began, self._synced = time.time_ns(), set[tuple[int, int, int]]()
        sync = os.fsync

        def noted(descriptor: int) -> None:
            sync(descriptor)
            self._synced.add(_content_of(os.fstat(descriptor)))

        os.fsync = noted

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.busy or not (event == "open" or event in DIR_FD_AT or event == CONNECTIONS):
            return
        self.busy = True  # what is done here is not the process's own
        try:
            if not self._changes(event, arguments):
                return
            self.operations += 1
            if self._fault and self.operations == self._fault.at:
                self._strike()
        finally:
            self.busy = False

    def _changes(self, event: str, arguments: tuple[object, ...]) -> bool:
        """Whether an event changes something below the folder, or elsewhere through the network."""
        if event == CONNECTIONS:
            return True
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & WRITING:
                return False
            paths, folder = [path], -1
        else:
            place = DIR_FD_AT[event]
            paths = list(arguments[:2]) if event == "os.rename" else [arguments[0]]
            folder = -1 if place is None else arguments[place]
        named = [os.fsdecode(path) for path in paths if isinstance(path, str | bytes | os.PathLike)]
        if isinstance(folder, int) and folder >= 0:  # shutil.rmtree names things relative to an open folder
            named = [os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path) for path in named]
        return any(os.path.abspath(path).startswith(self._watched) for path in named)

    def _strike(self) -> None:
        assert self._fault is not None
        if self._fault.kind == "power":
            for folder, _, names in os.walk(self._watched):
                for path in (os.path.join(folder, name) for name in names):
                    if os.path.islink(path):  # what it leads to has its own turn
                        continue
                    about = os.stat(path)
                    if _content_of(about) not in self._synced and about.st_mtime_ns >= self._began:
                        os.truncate(path, 0)
            os.killpg(0, signal.SIGKILL)
        (os.killpg if self._fault.together else os.kill)(
            0 if self._fault.together else os.getpid(), SIGNALS[self._fault.kind]
        )
