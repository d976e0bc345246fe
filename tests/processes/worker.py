"""Several processes: `start` launches them, and each runs this file: worker.py FOLDER GROUP [GROUP ...].

FOLDER/data.pt holds images and labels. What a process found goes to FOLDER/rank<its number>.pt, by name.
"""

import datetime
import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from processes import exchange, fsdp, scenarios

torch.set_num_threads(1)


LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
LAUNCH += ["--main_process_port", "0"]


def start(folder: Path, *groups: str) -> subprocess.Popen[str]:
    """The launcher of two processes."""
    # Told by the environment, accelerate joins processes of a machine without GPUs; its --cpu starts one process alone.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(
        [*LAUNCH, __file__, str(folder), *groups],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(launcher: subprocess.Popen[str]) -> None:
    """Waits for a launcher; shows what it said if it failed."""
    try:
        said, _ = launcher.communicate(timeout=300)
    finally:
        launcher.kill()
    if launcher.returncode:
        raise RuntimeError(f"the processes stopped with {launcher.returncode}:\n{said[-6000:]}")


def results(folder: Path, count: int = 2) -> list[dict]:
    """What each process found, in the order of their ranks."""
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(count)]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def distributed(scenario, accelerator, data):
    """By torch's DistributedDataParallel, or through accelerate with its accumulation, `attach` and `LossHook`."""
    model = scenarios.build(scenario)
    ranks = {"rank": accelerator.process_index, "world": accelerator.num_processes}
    if scenario.loop == "accelerate":
        largest = scenarios.through_accelerate(scenario, model, accelerator, data)
    else:
        wrapped = nn.parallel.DistributedDataParallel(model)

        def sync(last):
            wrapped.require_backward_grad_sync = last

        optimizer = scenarios.optimizer_of(model)
        largest = scenarios.training(scenario, model, wrapped, optimizer, data, sync=sync, **ranks)
    return {"outcome": scenarios.outcome(model), "state": model.branches.state_dict(), "rows": largest}


def main(folder: Path, groups: list[str]) -> None:
    patience = InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=60))
    accelerator = Accelerator(kwargs_handlers=[patience])
    data = torch.load(folder / "data.pt")
    jobs = {}
    if "ddp" in groups:
        jobs |= {s.name: lambda s=s: distributed(s, accelerator, data) for s in (*scenarios.DDP, scenarios.OVERFLOW)}
    if "machines" in groups:
        jobs |= {s.name: lambda s=s: distributed(s, accelerator, data) for s in scenarios.MACHINES}
    if "resume" in groups:
        jobs["resume"] = lambda: scenarios.both_ways(folder, accelerator, data)
    if "exchange" in groups:
        ranks = {"rank": accelerator.process_index, "world": accelerator.num_processes}
        jobs |= {name: lambda job=job: job(data, **ranks) for name, job in exchange.JOBS.items()}
    if "fsdp" in groups:
        jobs |= {s.name: lambda s=s: fsdp.sharded(s, accelerator, data, folder) for s in scenarios.FSDP}
        jobs["fsdp-accelerate"] = lambda: fsdp.through_accelerate(data, folder)
    results = {"processes": accelerator.num_processes, "backend": torch.distributed.get_backend()}
    for name, job in jobs.items():
        try:
            results[name] = job()
        except Exception:
            results[name] = {"error": traceback.format_exc()}
    torch.save(results, folder / f"rank{torch.distributed.get_rank()}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
