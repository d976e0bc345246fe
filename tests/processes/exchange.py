"""What processes exchange at an update: draws, shares of other sizes, disagreement."""

import copy
import pickle

import torch
from torch import nn

import timm_lowrank as tlr
from timm_lowrank.core.views import View

from . import scenarios

COUNTS, DRAWS, TAKEN = (7, 5), 150, 3


def marker(rows, **settings):
    """A network whose output is its input, with one branch: what enters W can be read off W."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(rows, rows, bias=False))
    nn.init.eye_(network[1].weight)
    network.requires_grad_(False)
    printed = {"scale": "paper", "reconstruction_weight": 5.0, "norm_weight": 0.0}
    settings = {"step_rule": "fixed", **printed, "warmup_updates": 0, **settings}
    return tlr.wrap(
        network, tlr.LowRankConfig(branches={"1": 1}, **settings), example_input=torch.zeros(1, rows)
    ).train()


def draws(data, *, rank, world):
    """How often each row of the global batch entered W, (rows,): row i is the i-th unit vector, over the processes."""
    total = sum(COUNTS)
    start = sum(COUNTS[:rank])
    mine = torch.eye(total)[start : start + COUNTS[rank]]
    counts = torch.zeros(total)
    for seed in range(DRAWS):
        model = marker(total, update_rows=TAKEN, seed=seed)
        step(model, mine)
        counts += model.branches["1"].dense_weight().diagonal() > 0
    return {"counts": counts}


def unequal_numbers_of_batches(data, *, rank=0, world=1):
    """W and b where the last process has fewer batches at each update, and none at one of them."""
    images, _ = data
    model = marker(64, update_rows=4, step_size=0.001)
    for step in range(8):
        parts = images[20 * step : 20 * step + 20].split(5 if step % 2 else 1)  # up to 19 batches on one process
        first, second, *later = parts  # in their common order: the first of each process, then more of the first one
        if step == 5:
            second, later = None, (second, *later)
        if world == 1:
            batches = [torch.cat(parts)]
        else:
            batches = [first, *later] if rank == 0 else [second] if second is not None else []
        for batch in batches:
            model(batch)
            model.penalty()
        model.update()
    return {"outcome": scenarios.outcome(model)}


def step(model, images):
    model(images)
    model.penalty()
    model.update()


def trained(data, seed=0, updates=3):
    """A model that this process has trained by itself."""
    model = marker(64, step_size=0.001).train_within(
        torch.distributed.new_group([torch.distributed.get_rank()], use_local_synchronization=True)
    )
    for number in range(updates):
        step(model, data[0][20 * number + seed : 20 * number + seed + 12])
    return model


# What must fail: each gives the call that does.


def loaded_by_one(data, rank):
    """A checkpoint is loaded by the first process alone."""
    model = marker(64, step_size=0.001)
    if rank == 0:
        model.load_state_dict(trained(data).state_dict())
    return lambda: step(model, data[0][:12])


def loaded_by_one_later(data, rank):
    """In the middle of a run."""
    model = marker(64, step_size=0.001)
    step(model, data[0][:12])
    other = trained(data)
    if rank == 0:
        model.load_state_dict(other.state_dict())
    return lambda: step(model, data[0][:12])


def loaded_from_different_files(data, rank):
    """The checkpoints of two runs, equally long."""
    model = marker(64, step_size=0.001)
    model.load_state_dict(trained(data, seed=rank).state_dict())
    return lambda: step(model, data[0][:12])


def configured_differently(data, rank):
    model = marker(64, step_size=0.001, update_rows=4 + rank)
    return lambda: step(model, data[0][:12])


def viewed_differently(data, rank):
    """The branch of one process takes tokens for samples, that of the other means over tokens of the same width."""
    branch = tlr.LowRankBranch(64, 2).train()
    branch.name, branch.view = "blocks.1", View(("token", "pool")[rank], -1)
    return lambda: branch.penalty(data[0][:12].flatten(1))


def nothing_anywhere(data, rank):
    """An update without any batch on any process, after a good one."""
    model = marker(64, step_size=0.001)
    step(model, data[0][:12])
    return model.update


def _in_step(data, rank, extra, late=3):
    """Steps in DistributedDataParallel; at one of them the second process makes `extra` updates more."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Linear(16, 10))
    config = tlr.LowRankConfig(branches={"1": 2}, warmup_updates=0)
    model = tlr.wrap(network, config, example_input=torch.zeros(1, 1, 8, 8)).train()
    wrapped = nn.parallel.DistributedDataParallel(model)

    def run():
        for number in range(late + 2):
            images = data[0][24 * number + 12 * rank : 24 * number + 12 * rank + 12]
            for part in images.split(6):  # accumulated without no_sync(): the gradients are averaged twice
                (wrapped(part).square().mean() + model.penalty()).backward()
            for _ in range(1 + (extra if number == late and rank == 1 else 0)):
                model.update()

    return run


def left_out_an_update(data, rank):
    return _in_step(data, rank, -1)


def left_out_the_first_update(data, rank):
    return _in_step(data, rank, -1, late=0)


def made_an_update_more(data, rank):
    return _in_step(data, rank, 1)


def let_one_end_early(data, rank):
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Linear(16, 10))
    model = tlr.wrap(network, tlr.LowRankConfig(branches={"1": 2}), example_input=torch.zeros(1, 1, 8, 8)).train()
    wrapped = nn.parallel.DistributedDataParallel(model)

    def run():
        with wrapped.join():
            for images in data[0][: 24 - 12 * rank].split(12):
                (wrapped(images).square().mean() + model.penalty()).backward()
                model.update()

    return run


def refusal(job):
    """The job that returns the error of what `job` gives, in words."""

    def run(data, *, rank, world):
        call = job(data, rank)
        try:
            call()
        except Exception as error:
            return {"refused": f"{type(error).__name__}: {error}"}
        return {"refused": ""}

    return run


def copied(data, *, rank, world):
    """A copy, and one through pickle, share as the model does; a copy that only the first process has disturbs none."""
    model = marker(64, step_size=0.001, update_rows=5)
    step(model, data[0][12 * rank : 12 * rank + 12])
    twins = [model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    if rank == 0:  # what main processes do beside training
        with torch.no_grad():
            model.eval()(data[0][:4])
            model.train()(data[0][:4])
            model.penalty()
            copy.deepcopy(model).state_dict()
            model.branches["1"].effective_rank()
    for twin in twins:
        step(twin, data[0][30 + 12 * rank : 42 + 12 * rank])
    return {"outcomes": [scenarios.outcome(twin) for twin in twins]}


REFUSED = (loaded_by_one, loaded_by_one_later, loaded_from_different_files, configured_differently,
           viewed_differently, nothing_anywhere, left_out_an_update, left_out_the_first_update,
           made_an_update_more, let_one_end_early)  # fmt: skip
JOBS = {job.__name__: job for job in (draws, unequal_numbers_of_batches, copied)}
JOBS |= {job.__name__: refusal(job) for job in REFUSED}
