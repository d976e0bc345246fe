"""`Processes`: what the processes that train one model tell each other about their branches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import LowRankError

_MESSAGE = 16  # numbers in one message; longer lists take several

# Small numbers travel between the hosts: over the devices' own backend, reading them would make each host wait for its
# device. One extra group for each group of processes, for as long as the latter lives.
_host_groups: dict[dist.ProcessGroup, dist.ProcessGroup] = {}


class Processes:
    """The processes of one group of `torch.distributed`; a single one where that is not initialised.

    Every method but the properties must be called by all of them, in the same order.

    Args:
        group: None is the default group, whenever it comes to be.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.agreed = False  # whether they were found to be alike since they are several

    @property
    def alone(self) -> bool:
        """Whether there is nobody to talk to."""
        return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(self._group) == 1

    @property
    def rank(self) -> int:
        """The number of this process in the group."""
        return 0 if self.alone else dist.get_rank(self._group)

    def agree(self, layer: str, alike: Callable[[], Mapping[str, int]], numbers: Sequence[int] = ()) -> list[list[int]]:
        """The `numbers` of every process, once it is sure that what `alike` gives is the same on all of them.

        Raises:
            LowRankError: on every process, with what differs.
        """
        if self.alone:
            return [list(numbers)]
        own = alike()
        told = self.tell([*own.values(), *numbers])
        for rank, other in enumerate(told):
            differing = [name for name, one, two in zip(own, told[0], other, strict=False) if one != two]
            if differing:
                raise LowRankError(
                    f"the branches on layer {layer!r} of processes 0 and {rank} differ in {', '.join(differing)}. "
                    "Wrap the same configuration and load the same checkpoint on every process, and call enable(), "
                    "penalty() and update() on all of them"
                )
        self.agreed = True
        return [other[len(own) :] for other in told]

    def tell(self, numbers: Sequence[int]) -> list[list[int]]:
        """The numbers of every process, in the order of their ranks; they may be of different lengths."""
        if self.alone:
            return [list(numbers)]
        told = self._exchange([len(numbers), *numbers[: _MESSAGE - 1]])
        lengths = [message[0] for message in told]
        heard = [message[1:] for message in told]
        for start in range(_MESSAGE - 1, max(lengths), _MESSAGE):
            more = self._exchange(list(numbers[start : start + _MESSAGE]))
            heard = [one + two for one, two in zip(heard, more, strict=True)]
        return [one[:length] for one, length in zip(heard, lengths, strict=True)]

    def _exchange(self, numbers: list[int]) -> list[list[int]]:
        message = torch.zeros(_MESSAGE, dtype=torch.int64)
        message[: len(numbers)] = torch.tensor(numbers, dtype=torch.int64)
        group = self._host_group()
        messages = [torch.empty_like(message) for _ in range(dist.get_world_size(group))]
        dist.all_gather(messages, message, group=group)
        return [other.tolist() for other in messages]

    def _host_group(self) -> dist.ProcessGroup:
        group = self._group if self._group is not None else dist.group.WORLD
        assert group is not None  # `alone` would have been true
        if dist.get_backend(group) == dist.Backend.GLOO:
            return group
        if group not in _host_groups:
            ranks = dist.get_process_group_ranks(group)
            new = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
            assert isinstance(new, dist.ProcessGroup)  # this process is a member
            _host_groups[group] = new
        return _host_groups[group]

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

    # A group can be neither copied nor pickled. A copy in this process means the same one; elsewhere the default group
    # must do.
    def __deepcopy__(self, memo: dict[int, object]) -> Processes:
        return self

    def __getstate__(self) -> dict[str, object]:
        return {"_group": None, "agreed": False}


def fingerprint(*tensors: Tensor) -> int:
    """A number that equal tensors share: the sum of their bits, exact in whatever order a device adds. Waits for it."""
    return sum(int(tensor.detach().reshape(-1).view(torch.int16).sum(dtype=torch.int64)) for tensor in tensors)
