"""What a branch keeps of the batches since its last update: the rows that may enter W, and the moments of all rows.

The rows of an update stand in one common order: batch by batch (there are several under gradient accumulation), and
within a batch process by process. A random number is drawn for each position in this order, and the rows with the
lowest ones are taken. So the draw is even over all rows of all processes, and the same rows are drawn however an update
is cut into batches and processes, as long as the common order is the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .distributed import Processes
from .factored import pieces
from .scaling import finite_rows


@dataclasses.dataclass
class Rows:
    """Some rows of one batch."""

    positions: Tensor  # (n,) int64 on the CPU, ascending: in the batch, on the process that saw them
    values: Tensor  # (n, m) activations without a graph, of the network's dtype
    factors: Tensor  # (n,) that the scale of the loss multiplies the centred rows by
    products: Tensor | None  # (k, n) of B with the centred rows, where W is kept factored

    def select(self, indices: Tensor) -> Rows:
        """Those at `indices`, (q,) int64 on the CPU, as copies."""
        index = indices.to(self.values.device, non_blocking=True)  # else the host would wait for the device
        products = None if self.products is None else self.products[:, index]
        return Rows(self.positions[indices], self.values[index], self.factors[index], products)

    def split(self) -> Iterator[Rows]:
        """In pieces of some rows."""
        for some in pieces(len(self.values), self.values.shape[1], self.values.device):
            products = None if self.products is None else self.products[:, some]
            yield Rows(self.positions[some], self.values[some], self.factors[some], products)


@dataclasses.dataclass
class SampledRows:
    """The rows of one process among those that enter W."""

    count: int  # p, the rows that enter W from all processes together
    slots: Tensor  # (q,) int64 on the CPU, ascending: where this process's rows stand among them
    parts: list[Rows]  # q rows together

    def gather(
        self,
        bias: Tensor,  # b (m,)
        size: int,  # k, the rows of B
        processes: Processes,
        into: Tensor,  # (p, m), of the dtype of b
    ) -> Tensor:
        """Writes all rows that enter W, centred and scaled, and gives their products with B (k, p).

        Each process puts its own rows in their slots and zeros in the others: the sum is every row to the bit. Rows
        that are not finite become zeros.
        """
        products = bias.new_zeros(size, self.count)
        slots: Tensor | None = None  # alone, its rows fill them in their order
        if not processes.alone:
            slots = self.slots.to(bias.device, non_blocking=True)
            into.zero_()
        begin = 0
        for some in (some for part in self.parts for some in part.split()):
            end = begin + len(some.positions)
            own = slice(begin, end) if slots is None else slots[begin:end]
            into[own], factors = finite_rows(some.values.to(bias.dtype) + bias, some.factors)
            if some.products is not None:
                products[:, own] = torch.where(factors > 0, some.products * factors, 0)
            begin = end
        if slots is not None:
            rows, products = processes.sum(into, products)
            into.copy_(rows)
        return products


class ActivationBuffer:
    """The batches of one process since the last update, as far as their rows may enter W.

    Args:
        limit: p, how many rows of all processes may enter W; None takes all.
        seed: of the draw, the same on every process and another one for every update.
    """

    def __init__(self, limit: int | None, seed: int) -> None:
        self.limit, self._seed = limit, seed
        self.sizes: list[int] = []  # rows of each batch
        self._batches: list[Rows] = []
        self._drawn = True  # whether of all batches nothing but the drawn rows is kept

    def add(self, values: Tensor, *, alone: bool) -> Tensor:
        """Remember a batch (n, m). Gives the rows of it that may enter W, int64 on the CPU. `complete` must follow.

        Alone, rows that are certainly not drawn are dropped at once. Beside other processes, whose sizes are not known
        before the update, the batch is kept whole until then.
        """
        self.sizes.append(len(values))
        unknown = values.new_empty(len(values), dtype=torch.float32)
        self._batches.append(Rows(torch.arange(len(values)), values, unknown, None))
        self._drawn &= alone
        if alone:
            self._batches = self._draw([self.sizes], 0).parts
        return self._batches[-1].positions

    def complete(self, factors: Tensor, products: Tensor | None) -> None:
        """The factors (n,) and, where W is kept factored, the products (k, n) of the batch that was added last."""
        rows = self._batches[-1]
        whole = len(rows.positions) == len(factors)
        index = rows.positions.to(factors.device, non_blocking=True)
        rows.factors = factors if whole else factors[index]
        rows.products = products if whole or products is None else products[:, index]

    def sample(self, sizes: Sequence[Sequence[int]], process: int) -> SampledRows:
        """The rows that enter W.

        Args:
            sizes: for each process the rows of each of its batches.
            process: the number of this one.
        """
        if self._drawn and len(sizes) == 1:
            count = sum(len(rows.values) for rows in self._batches)
            return SampledRows(count, torch.arange(count), self._batches)
        return self._draw(sizes, process)

    def _draw(self, sizes: Sequence[Sequence[int]], process: int) -> SampledRows:
        sampled = self._lowest(sum(map(sum, sizes)))
        slots, parts = [], []
        for number, rows in enumerate(self._batches):
            before = sum(sum(own[:number]) for own in sizes)  # a process may have had fewer batches than another
            positions = before + sum(sum(own[number : number + 1]) for own in sizes[:process]) + rows.positions
            own = torch.isin(positions, sampled, assume_unique=True).nonzero().flatten()
            slots.append(torch.searchsorted(sampled, positions[own]))
            parts.append(rows.select(own))
        return SampledRows(len(sampled), torch.cat(slots) if slots else sampled[:0], parts)

    def _lowest(self, total: int) -> Tensor:
        """The positions of the `limit` lowest of `total` random numbers, ascending, int64.

        The numbers of fewer positions are the first ones of those of more: what is low among all is low in each part.
        """
        if self.limit is None or total <= self.limit:
            return torch.arange(total)
        generator = torch.Generator().manual_seed(self._seed)
        numbers = torch.rand(total, dtype=torch.float64, generator=generator)
        return numbers.topk(self.limit, largest=False).indices.sort().values

    def to(self, device: torch.device) -> None:
        for rows in self._batches:
            rows.values, rows.factors = rows.values.to(device), rows.factors.to(device)
            rows.products = None if rows.products is None else rows.products.to(device)


class Moments:
    """Mean and spread of rows (n, m) that were centred with one and the same b; b and the collapse check follow them.

    Everything stays on the device: adding a batch waits for nothing.

    Args:
        bias: b (m,), whose dtype and device the sums take.
    """

    def __init__(self, bias: Tensor) -> None:
        self._bias = bias
        self.total = torch.zeros_like(bias)  # sum of a
        self.squares = bias.new_zeros(())  # sum of ||a + b||^2
        self.count = bias.new_zeros(())

    def add(self, values: Tensor, norms: Tensor) -> None:
        """A batch: a (n, m), and ||a + b|| (n,). One that is not finite is left out: a gradient scaler will skip it."""
        columns = pieces(values.shape[1], len(values), values.device)
        total = torch.cat([values[:, some].to(self.total.dtype).sum(dim=0) for some in columns])
        finite = total.abs().amax() < torch.inf
        self.total = self.total + torch.where(finite, total, 0)
        self.squares = self.squares + torch.where(finite, norms.square().sum(), 0)
        self.count = self.count + finite * values.shape[0]

    def sum_over(self, processes: Processes) -> None:
        """From here on the moments of all processes' batches; each must have had the same b."""
        self.total, self.squares, self.count = processes.sum(self.total, self.squares, self.count)

    def empty(self) -> bool:
        """Whether no finite row was added. Waits for the device."""
        return not (self.count.is_meta or bool(self.count > 0))

    def mean(self) -> Tensor:
        """Of a, (m,); zero without rows."""
        return self.total / self.count.clamp_min(1)

    def variance(self) -> Tensor:
        """Mean of ||a - mean||^2, a scalar; the nearer b is to minus the mean, the more exactly."""
        share = self.squares / self.count.clamp_min(1)
        return (share - (self.mean() + self._bias).square().sum()).clamp_min(0)

    def to(self, device: torch.device) -> None:
        for name in ("_bias", "total", "squares", "count"):
            setattr(self, name, getattr(self, name).to(device))


class Streak:
    """How often in a row something was so, counted on the device. On a GPU the host learns it late, and never waits.

    A copy, and what is pickled, begins anew.
    """

    def __init__(self) -> None:
        self._length: Tensor | None = None
        self._on_its_way: tuple[Tensor, torch.cuda.Event] | None = None

    def extend(self, holds: Tensor) -> int:
        """One more time; `holds` is a boolean scalar. The length of the streak, as far as the host knows it."""
        if holds.is_meta:
            return 0
        before = 0 if self._length is None else self._length.to(holds.device)
        self._length = torch.where(holds, before + 1, 0)
        if holds.device.type != "cuda":
            return int(self._length)
        known = 0
        if self._on_its_way is not None and self._on_its_way[1].query():
            known = int(self._on_its_way[0])
        copy = torch.empty(self._length.shape, dtype=self._length.dtype, pin_memory=True)
        copy.copy_(self._length, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._on_its_way = (copy, arrived)
        return known

    def __reduce__(self) -> tuple[type[Streak], tuple[()]]:
        return Streak, ()
