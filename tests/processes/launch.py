"""Starts the worker with `accelerate launch` on a machine that may have no accelerator."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

WORKER = Path(__file__).with_name("worker.py")
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]


def start(folder: Path, *groups: str, machine: tuple[int, int, int] | None = None) -> subprocess.Popen[str]:
    """One launcher. `machine`: number of this machine, how many there are, and the port at which they meet."""
    place = ["--main_process_port", "0"]
    if machine is not None:
        rank, count, port = machine
        place = ["--num_machines", str(count), "--machine_rank", str(rank)]
        place += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
    # Told by the environment, accelerate joins processes of a machine without GPUs; its --cpu starts one process alone.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(
        [*LAUNCH, *place, str(WORKER), str(folder), *groups],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(*launchers: subprocess.Popen[str]) -> None:
    """Waits for launchers that were started together; shows what they said if one of them failed."""
    try:
        said = [launcher.communicate(timeout=300)[0] for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.kill()
    for launcher, text in zip(launchers, said, strict=True):
        if launcher.returncode:
            raise RuntimeError(f"the processes stopped with {launcher.returncode}:\n{text[-6000:]}")


def results(folder: Path, count: int = 2) -> list[dict]:
    """What each process found, in the order of their ranks."""
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(count)]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
