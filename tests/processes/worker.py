"""What each of several processes does: worker.py FOLDER GROUP [GROUP ...].

FOLDER/data.pt holds images and labels. What a process found goes to FOLDER/rank<its number>.pt, by name.
"""

import datetime
import os
import sys
import traceback
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from processes import exchange, fsdp, resume, scenarios

torch.set_num_threads(1)


def distributed(scenario, accelerator, data):
    """By torch's DistributedDataParallel, or through accelerate with its accumulation, `attach` and `LossHook`."""
    model = scenarios.build(scenario)
    ranks = {"rank": accelerator.process_index, "world": accelerator.num_processes}
    if scenario.loop == "accelerate":
        largest = resume.through_accelerate(scenario, model, accelerator, data)
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
        jobs["resume"] = lambda: resume.both_ways(folder, accelerator, data)
    if "exchange" in groups:
        ranks = {"rank": accelerator.process_index, "world": accelerator.num_processes}
        jobs |= {name: lambda job=job: job(data, **ranks) for name, job in exchange.JOBS.items()}
    if "fsdp" in groups:
        jobs |= {s.name: lambda s=s: fsdp.sharded(s, accelerator, data, folder) for s in scenarios.FSDP}
        jobs["fsdp-accelerate"] = lambda: fsdp.through_accelerate(data, folder)
    found = {"processes": accelerator.num_processes, "backend": torch.distributed.get_backend()}
    found["machine's processes"] = int(os.environ["LOCAL_WORLD_SIZE"])
    for name, job in jobs.items():
        try:
            found[name] = job()
        except Exception:
            found[name] = {"error": traceback.format_exc()}
    torch.save(found, folder / f"rank{torch.distributed.get_rank()}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
