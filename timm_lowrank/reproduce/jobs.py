"""Trainings and evaluations side by side, in processes of their own: small networks leave most of a machine idle."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Self

import torch
from accelerate import PartialState

from ..errors import EvaluationError
from ..files import disk_errors
from ..suites.measurements.base import Measurement
from ..text import counted
from ..training import Recipe
from .runs import FinishedRun, Runs
from .setups import Base

GPUS = "CUDA_VISIBLE_DEVICES"
# What has used threads or a GPU must not be forked. A server that has only imported this module can be (elsewhere than
# on Linux system libraries object): its processes start at once and share the memory of what it imported.
PROCESSES = (
    multiprocessing.get_context("forkserver") if sys.platform == "linux" else multiprocessing.get_context("spawn")
)


@dataclasses.dataclass(frozen=True)
class Training:
    """A run that is missing."""

    base: Base
    condition: str
    seed: int

    def recipe(self, runs: Runs) -> Recipe:
        return runs.recipe(self.base, self.condition, self.seed)

    def folder(self, runs: Runs) -> Path:
        return runs.path(self.base, self.condition, self.seed)

    def do(self, runs: Runs) -> None:
        runs.train(self.base, self.condition, self.seed)


@dataclasses.dataclass(frozen=True)
class Measuring:
    """What a run lacks."""

    run: FinishedRun
    measurements: tuple[Measurement, ...]
    other_labels: str | None = None

    def recipe(self, runs: Runs) -> Recipe:
        return runs.measured_recipe(self.run)

    def folder(self, runs: Runs) -> Path:
        return self.run.folder

    def do(self, runs: Runs) -> None:
        runs.measure(self.run, self.measurements, self.other_labels)


Job = Training | Measuring


class Workers:
    """Does jobs: here, one after the other and to the first error, or in several processes.

    Each process takes its share of this one's threads, and one of the GPUs in turn. The images of all jobs are read
    once and mapped by all. What a job prints goes to RUNS/RECIPE/CONDITION-seedK.log. A job that fails, or whose
    process dies, does not stop the others. Processes end with the block, and with this process if it is killed:

        with Workers(runs, 4) as workers:
            workers.do(trainings)
            workers.do(measurings)

    Args:
        runs: where they lie.
        processes: at a time.

    Raises:
        EvaluationError: several processes under `accelerate launch`.
    """

    def __init__(self, runs: Runs, processes: int = 1) -> None:
        if processes > 1 and PartialState().num_processes > 1:
            raise EvaluationError("--jobs starts processes of its own: call it without accelerate launch or torchrun")
        self._runs, self._processes = runs, processes
        self._idle: list[tuple[Connection, BaseProcess]] = []
        self._working: dict[Connection, tuple[BaseProcess, Job]] = {}
        self._images: dict[str, Path] = {}  # `Runs.images_name` -> file
        self._folder: tempfile.TemporaryDirectory[str] | None = None  # of these files

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for worker, _ in self._working.values():  # an interrupt: a training goes on from its last checkpoint
            worker.terminate()
            worker.join()
        for connection, process in self._idle:
            connection.close()  # which ends it
            process.join()
        if self._folder is not None:
            self._folder.cleanup()

    def do(self, jobs: Sequence[Job]) -> None:
        """Does all jobs.

        Raises:
            EvaluationError: of several processes, after the other jobs: those that failed.
            TrainingError, EvaluationError: in this process, as `Runs.train` and `Runs.measure`.
        """
        if min(self._processes, len(jobs)) <= 1:
            for job in jobs:
                job.do(self._runs)
            return
        self._store_images(jobs)
        self._start(min(self._processes, len(jobs)) - len(self._idle))
        failed = self._do(jobs)
        for job in jobs:
            self._runs.forget(job.folder(self._runs))
        if failed:
            lines = [f"  {_name(job, self._runs)}: {reason} ({_log(job, self._runs)})" for job, reason in failed]
            number = f"{len(failed)} of {counted(len(jobs), 'job')}"
            raise EvaluationError("\n".join([f"{number} failed; the same command tries them again:", *lines]))

    def _do(self, jobs: Sequence[Job]) -> list[tuple[Job, str]]:
        """Jobs that failed, and why."""
        failed: list[tuple[Job, str]] = []
        waiting = list(reversed(jobs))
        while self._working or (waiting and self._idle):
            while waiting and self._idle:
                connection, process = self._idle.pop()
                self._working[connection] = process, waiting.pop()
                with contextlib.suppress(ConnectionError):  # it has died: the pipe says so below
                    connection.send((self._working[connection][1], self._images))
            for ready in wait(list(self._working)):
                assert isinstance(ready, Connection)
                process, job = self._working.pop(ready)
                name = _name(job, self._runs)
                try:
                    reason = ready.recv()
                except (EOFError, ConnectionError):
                    process.join()
                    failed.append(
                        (job, f"its process ended ({process.exitcode}); if memory ran out, take fewer --jobs")
                    )
                    continue
                self._idle.append((ready, process))
                if reason is not None:
                    failed.append((job, reason))
                self._runs.say(f"done: {name}" if reason is None else f"failed: {name}: {reason}")
        return failed + [(job, "no process was left to do it") for job in reversed(waiting)]

    def _start(self, processes: int) -> None:
        PROCESSES.set_forkserver_preload([__name__])
        runs = self._runs
        settings = (runs.folder, runs.scale, runs.data, runs.seeds)
        threads = max(1, torch.get_num_threads() // self._processes)
        for device in _devices(processes):
            here, there = PROCESSES.Pipe()
            process = PROCESSES.Process(target=_work, args=(there, settings, threads, device), daemon=True)
            process.start()
            there.close()  # so that the pipe ends with the process
            self._idle.append((here, process))

    def _store_images(self, jobs: Sequence[Job]) -> None:
        """Writes the images of all jobs to files; those that are streamed are left out."""
        for recipe in (job.recipe(self._runs) for job in jobs):
            name = self._runs.images_name(recipe)
            if name in self._images or (images := self._runs.images(recipe)) is None:
                continue
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(prefix="timm-lowrank-")
            file = Path(self._folder.name) / f"{len(self._images)}.pt"
            with disk_errors(f"could not write the images to {file}", "Set TMPDIR.", EvaluationError):
                images.store(file)
            self._images[str(name)] = file


def _name(job: Job, runs: Runs) -> str:
    return str(job.folder(runs).relative_to(runs.folder))


def _log(job: Job, runs: Runs) -> Path:
    folder = job.folder(runs)
    return folder.with_name(f"{folder.name}.log")


def _devices(processes: int) -> list[str | None]:
    """A GPU for each process, in turn; None where there is no choice."""
    count = torch.cuda.device_count()
    if count < 2:
        return [None] * processes
    names = os.environ.get(GPUS, ",".join(map(str, range(count)))).split(",")[:count]
    return [names[number % count] for number in range(processes)]


def _work(connection: Connection, settings: tuple[Any, ...], threads: int, device: str | None) -> None:
    """The life of a process, which sees this GPU alone: jobs come, and for each goes back None, or why it failed."""
    if device is not None:
        os.environ[GPUS] = device  # before CUDA starts here, which is when it is read
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: who gives the jobs ends this process
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that it cleans up
    # A training may read its images in processes. They are started as those of any program, not by a further server,
    # and a process that is daemonic may have none.
    multiprocessing.set_start_method(None, force=True)
    multiprocessing.current_process().daemon = False
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(threads)
    runs = Runs(*settings)
    with contextlib.suppress(EOFError):
        while True:
            job, runs.stored = connection.recv()
            connection.send(_outcome(job, runs))


def _end_with(parent: BaseProcess) -> None:
    """The jobs of a command that was killed end with it: the next one trains in the same folders."""
    parent.join()
    os._exit(1)


def _outcome(job: Job, runs: Runs) -> str | None:
    """Does a job. None, or the type and first line of its error; its log has the traceback."""
    log = _log(job, runs)
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("a", encoding="utf-8", buffering=1) as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        try:
            job.do(runs)
        except Exception as error:  # of whatever kind: the other jobs go on
            traceback.print_exc()
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    return None
