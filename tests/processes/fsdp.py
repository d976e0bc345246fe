"""Training with parameters that are sharded by torch's `fully_shard`."""

import os

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, DistributedType, PartialState
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from . import scenarios


def shard(model):
    """The blocks of the backbone each, and what is left with the root."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for block in model.backbone.children():
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def sharded(scenario, accelerator, data, folder):
    model = shard(scenarios.build(scenario))
    ranks = {"rank": accelerator.process_index, "world": accelerator.num_processes}
    largest = scenarios.training(
        scenario, model, model, scenarios.optimizer_of(model), data, sync=model.set_requires_gradient_sync, **ranks
    )
    return {
        "outcome": scenarios.outcome(model),
        "state": model.branches.state_dict(),
        "rows": largest,
        "sharded": all(isinstance(parameter, DTensor) for parameter in model.parameters()),
        "loaded": {name: load(model, scenario, folder) for name, load in WAYS.items()},
    }


def from_shards(model, scenario, folder):
    """By a folder of shards, as accelerate's SHARDED_STATE_DICT does it."""
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder / scenario.name)
    other = shard(scenarios.build(scenario))
    state = {"model": get_model_state_dict(other)}
    dcp.load(state, checkpoint_id=folder / scenario.name)
    set_model_state_dict(other, state["model"])
    return scenarios.outcome(other)


def from_the_first_process(model, scenario, folder):
    """By a file that the first process alone reads, as accelerate's FULL_STATE_DICT does it."""
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=whole)
    if torch.distributed.get_rank() == 0:
        torch.save(state, folder / "whole.pt")
        state = torch.load(folder / "whole.pt", weights_only=True)
    other = shard(scenarios.build(scenario))
    whole = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(other, state, options=whole)
    return scenarios.outcome(other)


def into_one_that_is_not_sharded(model, scenario, folder):
    """And back: a state dict of either kind of model fits the other."""
    whole = StateDictOptions(full_state_dict=True)
    plain = scenarios.build(scenario)
    plain.load_state_dict(get_model_state_dict(model, options=whole))
    back = shard(scenarios.build(scenario))
    set_model_state_dict(back, plain.state_dict(), options=whole)
    return scenarios.outcome(back)


WAYS = {load.__name__: load for load in (from_shards, from_the_first_process, into_one_that_is_not_sharded)}


def through_accelerate(data, folder):
    """A run, and one that goes on from its checkpoint. Must come last: accelerate is put on another footing."""
    # accelerate has FSDP for accelerators only; it works on a CPU too, once accelerate thinks that there is one.
    AcceleratorState._reset_state()
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    os.environ.pop("ACCELERATE_USE_CPU")
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, state_dict_type="SHARDED_STATE_DICT", reshard_after_forward=True,
        auto_wrap_policy="size_based_wrap", min_num_params=1000, cpu_ram_efficient_loading=False,
    )  # fmt: skip
    accelerator = Accelerator(fsdp_plugin=plugin)
    scenario = scenarios.Scenario("fsdp-accelerate", {"update_rows": 10}, steps=22)
    model, other = scenarios.build(scenario), scenarios.build(scenario)
    scenarios.through_accelerate(scenario, model, accelerator, data, stop=12, save=folder / scenario.name)
    scenarios.through_accelerate(scenario, other, accelerator, data, start=12, load=folder / scenario.name)
    scenarios.through_accelerate(scenario, model, accelerator, data, start=12, load=folder / scenario.name)
    return {
        "kind": accelerator.distributed_type.name,
        "sharded": all(isinstance(parameter, DTensor) for parameter in other.parameters()),
        "continued": scenarios.outcome(model),
        "loaded": scenarios.outcome(other),
        "scenario": scenario,
    }
