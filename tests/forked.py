"""Processes of their own without the seconds in which each would import torch, timm and what trains and evaluates.

They are forked from a server that has imported all this and has done nothing else, so they are as clean as a program
that was just started: none of a test's filters of warnings, no device in use, nothing of accelerate's state. The tests
of the command line, of `accelerate launch` and of torchrun start real programs.
"""

import multiprocessing
import os
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from timm_lowrank import cli

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["timm_lowrank.cli", "timm_lowrank.training", "timm_lowrank.suites", "matplotlib.pyplot", "sklearn.svm", "frozen"]
)


def start(function, *arguments, log: Path, errors: Path | None = None, environment=None) -> BaseProcess:
    """Calls a function of a module in a new process, whose exit code is what it returns.

    Args:
        log: gets what it says, and what it complains of, too, if that has no file of its own.
        environment: beside that of this process.
    """
    environment = {**os.environ, **(environment or {})}
    given = (function, arguments, (log, errors or log), environment, torch.get_num_threads())
    process = SERVER.Process(target=_call, args=given)
    process.start()
    return process


def command(*arguments, log: Path, environment=None) -> BaseProcess:
    """`timm-lowrank ARGUMENTS`."""
    return start(cli.main, list(map(str, arguments)), log=log, environment=environment)


def ranks(count: int, port: int, *, machines: int = 1) -> list[dict[str, str]]:
    """What torchrun tells each of `count` processes, which share their machine or have one each."""
    local = count // machines
    return [
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % local),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(local),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        for rank in range(count)
    ]


def finish(*processes: BaseProcess, logs: list[Path], seconds: float = 300) -> None:
    """Waits for processes that must end well; shows what they said if one does not."""
    try:
        for process in processes:
            process.join(seconds)
    finally:
        ended = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
    assert ended == [0] * len(processes), "\n".join([str(ended), *(log.read_text()[-6000:] for log in logs)])


def _call(function, arguments, logs, environment, threads) -> None:
    for stream, log in enumerate(logs, 1):
        with log.open("ab") as file:
            os.dup2(file.fileno(), stream)
    sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # of its own processes: the default again, no further server
    torch.set_num_threads(threads)
    sys.exit(function(*arguments))
