"""Two processes that do the same runs together: `together` starts them, and each calls `main`.

FOLDER/data.pt holds images and labels. What a process found goes to FOLDER/rank<its number>.pt, by name.
"""

import datetime
import socket
import traceback
from collections.abc import Sequence
from pathlib import Path

import forked
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import nn

from . import exchange, fsdp, scenarios


def together(folder: Path, *groups: str, machines: int = 1) -> list[dict]:
    """What each of two processes found, in the order of their ranks; they share a machine or have one each."""
    logs = [folder / f"rank{rank}.log" for rank in range(2)]
    told = forked.ranks(2, free_port(), machines=machines)
    # Told by the environment, accelerate joins processes of a machine without GPUs.
    environments = [rank | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"} for rank in told]
    started = [
        forked.start(main, folder, groups, log=log, environment=environment)
        for log, environment in zip(logs, environments, strict=True)
    ]
    forked.finish(*started, logs=logs)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


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


def main(folder: Path, groups: Sequence[str]) -> None:
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
