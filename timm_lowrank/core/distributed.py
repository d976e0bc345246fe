"""Branches in data-parallel training: what processes share, the state of sharded models, and what is refused.

Processes that train one model keep their branches alike through `Processes`. FSDP2 shards parameters and saves such a
model in a form of its own, see `pack_where_sharded`. DeepSpeed is refused.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import LowRankError

# Small numbers travel between the hosts: over the devices' own backend, reading them would make each host wait for its
# device; and in a group with the gradients, those of a process that is a call behind would be taken for something else.
# One extra group for each group of processes, for as long as the latter lives.
_host_groups: dict[dist.ProcessGroup, dist.ProcessGroup] = {}


class Processes:
    """The processes of one group of `torch.distributed`; a single one where that is not initialised.

    Every method but the properties must be called by all of them, in the same order.

    Args:
        group: None is the default group, whenever it comes to be.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.agreed = False  # whether their branches were found to be alike since they are several

    @property
    def alone(self) -> bool:
        """Whether this is the only process."""
        return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(self._group) == 1

    @property
    def rank(self) -> int:
        """The number of this process in the group."""
        return 0 if self.alone else dist.get_rank(self._group)

    def agree(
        self, layer: str, common: Callable[[], Mapping[str, int]], numbers: Sequence[int] = ()
    ) -> list[list[int]]:
        """The `numbers` of every process, once it is sure that what `common` gives is the same on all of them.

        Raises:
            LowRankError: on every process, with what differs.
        """
        if self.alone:
            return [list(numbers)]
        own, group = common(), self._host_group()
        gathered: list[list[int]] = [[]] * dist.get_world_size(group)
        dist.all_gather_object(gathered, [*own.values(), *numbers], group=group)
        for rank, other in enumerate(gathered):
            differing = [name for name, one, two in zip(own, gathered[0], other, strict=False) if one != two]
            if differing:
                raise LowRankError(
                    f"the branches on layer {layer!r} of processes 0 and {rank} differ in {', '.join(differing)}. "
                    "Wrap the same configuration and load the same checkpoint on every process, and call enable(), "
                    "penalty() and update() on all of them"
                )
        self.agreed = True
        return [other[len(own) :] for other in gathered]

    def meet(self, call: str, penalties: int) -> None:
        """Waits until all processes are at a call of the same name, where each of them has to make it.

        A process that makes a call more or less than the others is then found as soon as these make another one; else
        each would wait for what the other does not do, one for an Update Step and one for gradients.

        Args:
            call: "penalty()" or "update()".
            penalties: how many penalties of this process wait for an update.

        Raises:
            LowRankError: on every process, with the numbers of those that differ.
        """
        if self.alone:
            return
        group = self._host_group()
        own = torch.tensor([int(call == "update()"), penalties], device="cpu")
        gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, own, group=group)
        found = [(bool(updates), waiting) for updates, waiting in (one.tolist() for one in gathered)]
        if len({updates for updates, _ in found}) == 1:
            return
        again = [rank for rank, (updates, waiting) in enumerate(found) if updates and not waiting]
        behind = [rank for rank, (updates, _) in enumerate(found) if not updates]
        raise LowRankError(
            f"{_counted(again)} called update() once more than the others, without a penalty() since the last one"
            if again
            else f"{_counted(behind)} went on to another batch without the update() that the others are making: "
            "call it on all processes after each optimizer step, or on none"
        )

    def sum(self, *tensors: Tensor) -> list[Tensor]:
        """The sums of tensors of one dtype and device over all processes, the same to the bit on each of them.

        Where all processes but one hold a zero, the sum is that one's number to the bit.
        """
        if self.alone:
            return list(tensors)
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat, group=self._group)
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

    def _host_group(self) -> dist.ProcessGroup:
        group = self._group if self._group is not None else dist.group.WORLD
        assert group is not None  # `alone` would have been true
        if group not in _host_groups:
            ranks = dist.get_process_group_ranks(group)
            new = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
            assert isinstance(new, dist.ProcessGroup)  # this process is a member
            _host_groups[group] = new
        return _host_groups[group]

    # A group can be neither copied nor pickled. A copy in this process means the same one; elsewhere the default group
    # must do.
    def __deepcopy__(self, memo: dict[int, object]) -> Processes:
        return self

    def __getstate__(self) -> dict[str, object]:
        return {"_group": None, "agreed": False}


def _counted(ranks: Sequence[int]) -> str:
    return f"process{'es' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def in_lockstep() -> bool:
    """Whether this is called in a forward of DistributedDataParallel whose backward averages the gradients.

    Raises:
        LowRankError: in a `join` that lets a process end before the others. It stands in for that one in torch's own
            exchanges and not in those of the branches, for which the others would wait.
    """
    if torch.compiler.is_compiling() or not (dist.is_available() and dist.is_initialized()):
        return False
    wrapper = getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)
    if wrapper is None or not torch.is_grad_enabled():
        return False
    join = getattr(wrapper, "_join_config", None)
    if join is not None and join.enable and not join.throw_on_early_termination:
        raise LowRankError(
            "the branches need every process at each step, and join() lets one end before the others, which would wait "
            "for it: give all processes as many batches, join(throw_on_early_termination=True) stops all with the "
            "first, or train this part without the branches, model.enable(False)"
        )
    return bool(wrapper.require_backward_grad_sync)


def fingerprint(*tensors: Tensor) -> int:
    """A number that equal tensors share: the sum of their bits, exact in whatever order a device adds. Waits for it."""
    return sum(int(tensor.detach().reshape(-1).view(torch.int16).sum(dtype=torch.int64)) for tensor in tensors)


# ------------------------------------------------------------------------------------------------- sharded parameters
#
# `torch.distributed.checkpoint` takes the state of a model with sharded parameters apart by parameters and buffers, and
# loads a tensor only into one of the same size. W and b are neither parameters nor buffers, and the factor grows
# between two saves. So where it asks for the state, and beside sharded parameters always, that of a branch is one piece
# of bytes, as the extra state of its module. Either form loads into either kind of model.

_EXTRA_STATE = "_extra_state"  # the key that torch gives to the extra state of a module


def pack(state: Mapping[str, Tensor]) -> bytes:
    """Tensors by name, as bytes."""
    file = io.BytesIO()
    torch.save({name: value.cpu() for name, value in state.items()}, file)
    return file.getvalue()


def unpack_into(state_dict: dict[str, Any], prefix: str) -> None:
    """Replace the extra state of the module at `prefix`, where there is one, by the tensors that it holds."""
    packed = state_dict.pop(prefix + _EXTRA_STATE, None)
    if isinstance(packed, bytes):  # else a placeholder of torch's, which found nothing to put there
        state = torch.load(io.BytesIO(packed), map_location="cpu", weights_only=True)
        state_dict.update({prefix + name: value for name, value in state.items()})


def pack_where_sharded(model: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: object) -> None:
    """A post hook of `LowRankModel.state_dict()`: one piece for each branch, if the parameters are sharded, or if
    `get_model_state_dict` or another function of `torch.distributed.checkpoint` asks."""
    sharded = any(hasattr(parameter, "device_mesh") for parameter in model.parameters())
    if not (sharded or called_from("torch.distributed.checkpoint")):
        return
    for name, branch in model.get_submodule("branches").named_children():
        own = f"{prefix}branches.{name}."
        for key in [key for key in state_dict if key.startswith(own)]:
            del state_dict[key]
        state_dict[own + _EXTRA_STATE] = branch.get_extra_state()


# ---------------------------------------------------------------------------------------------------------- DeepSpeed

_ADVICE = (
    "it steps and shards in an order of its own, which the branches are not made for; use DistributedDataParallel or "
    "FSDP2, for example `accelerate launch --multi_gpu` or `accelerate launch --use_fsdp --fsdp_version 2`"
)
_ENGINE = "deepspeed.runtime"  # not deepspeed.ops: its optimizers are torch's own kind and need no engine
_WRAPPERS = "accelerate.utils.deepspeed"


def refuse_deepspeed(model: nn.Module) -> None:
    """Raise if a DeepSpeed engine calls the forward of `model` in which this is called.

    Costs nothing where DeepSpeed was never imported, nor in a graph of torch.compile, where it does not look.

    Raises:
        LowRankError: with what to use instead.
    """
    if torch.compiler.is_compiling() or "deepspeed" not in sys.modules:
        return
    hooks = [*model._forward_pre_hooks.values(), *model._forward_hooks.values()]  # the engine leaves some on its module
    within = any(_is_within(getattr(hook, "__module__", None), _ENGINE) for hook in hooks)
    if within or called_from(_ENGINE):  # on a model inside the engine's module it leaves none
        raise LowRankError(f"the model runs in a DeepSpeed engine: {_ADVICE}")


def refuse_deepspeed_optimizer(optimizer: object) -> None:
    """Raise if `optimizer`, or one that it keeps as `.optimizer`, belongs to a DeepSpeed engine.

    Raises:
        LowRankError: with what to use instead.
    """
    inner: object | None = optimizer
    while inner is not None:
        classes = () if torch.optim.Optimizer in type(inner).__mro__ else type(inner).__mro__
        wraps = _is_within(type(inner).__module__, _WRAPPERS)
        if wraps or any(_is_within(kind.__module__, _ENGINE) for kind in classes):
            raise LowRankError(f"{type(inner).__name__} belongs to DeepSpeed: {_ADVICE}")
        inner = getattr(inner, "optimizer", None)


def called_from(package: str) -> bool:
    """Whether a function of a module or package is among those that are being called."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if _is_within(frame.f_globals.get("__name__"), package):
            return True
        frame = frame.f_back
    return False


def _is_within(module: object, package: str) -> bool:
    return isinstance(module, str) and (module == package or module.startswith(package + "."))
