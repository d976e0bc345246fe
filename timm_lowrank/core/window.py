"""What a branch remembers of the batches since its last update, and which of their rows enter W.

The rows of an update stand in one common order: batch by batch (there are several under gradient accumulation), and
within a batch process by process. Random numbers are drawn for the places in this order, and the rows with the lowest
ones are taken. So the draw is even over all rows of all processes, and the same rows are drawn however an update is cut
into batches and processes, as long as the common order is the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from .processes import Processes
from .scaling import finite_rows


@dataclasses.dataclass
class Rows:
    """Some rows of one batch."""

    places: Tensor  # (n,) int64 on the CPU, ascending: in the batch, on the process that saw them
    values: Tensor  # (n, m) activations without a graph, of the network's dtype
    factors: Tensor  # (n,) that the scale of the loss multiplies the centred rows by
    products: Tensor | None  # (k, n) of B with the centred rows, where W is kept factored

    def select(self, chosen: Tensor) -> Rows:
        """Those at the indices `chosen`, (q,) int64 on the CPU, as copies."""
        index = chosen.to(self.values.device)
        products = None if self.products is None else self.products[:, index]
        return Rows(self.places[chosen], self.values[index], self.factors[index], products)


@dataclasses.dataclass
class Drawn:
    """The rows of one process among those that enter W."""

    count: int  # p, the rows that enter W from all processes together
    slots: Tensor  # (q,) int64 on the CPU, ascending: where this process's rows stand among them
    parts: list[Rows]  # q rows together

    def join(
        self,
        bias: Tensor,  # b (m,)
        size: int,  # k, the rows of B
        processes: Processes,
    ) -> tuple[Tensor, Tensor]:
        """All rows that enter W, centred and scaled (p, m), and their products with B (k, p), of the dtype of b.

        Each process puts its own rows in their slots and zeros in the others: the sum is every row to the bit. Rows
        that are not finite become zeros.
        """
        rows = bias.new_zeros(self.count, bias.numel())
        products = bias.new_zeros(size, self.count)
        end = 0
        for part in self.parts:
            begin, end = end, end + len(part.values)
            slots = self.slots[begin:end].to(bias.device)
            rows[slots], factors = finite_rows(part.values.to(bias.dtype) + bias, part.factors)
            if part.products is not None:
                products[:, slots] = torch.where(factors > 0, part.products * factors, 0)
        joined_rows, joined_products = processes.sum(rows, products)
        return joined_rows, joined_products


class Window:
    """The batches of one process since the last update.

    Args:
        limit: p, how many rows of all processes may enter W; None takes all.
        seed: of the draw, the same on every process and another one for every update.
    """

    def __init__(self, limit: int | None, seed: int) -> None:
        self.limit, self._seed = limit, seed
        self.sizes: list[int] = []  # rows of each batch
        self._held: list[Rows] = []

    def add(self, values: Tensor, factors: Tensor, products: Tensor | None, *, alone: bool) -> None:
        """Remember a batch; values (n, m), factors (n,), products (k, n) or None.

        Alone, rows that are certainly not drawn are dropped at once. Beside other processes, whose sizes are not known
        before the update, the batch is kept whole until then.
        """
        self.sizes.append(len(values))
        self._held.append(Rows(torch.arange(len(values)), values, factors, products))
        if alone:
            self._held = self.draw([self.sizes], 0).parts

    def draw(self, sizes: Sequence[Sequence[int]], process: int) -> Drawn:
        """The rows that enter W.

        Args:
            sizes: for each process the rows of each of its batches.
            process: the number of this one.
        """
        chosen = self._lowest(sum(map(sum, sizes)))
        slots, parts = [], []
        for number, rows in enumerate(self._held):
            places = _first_place(sizes, number, process) + rows.places
            mine = torch.isin(places, chosen, assume_unique=True).nonzero().flatten()
            slots.append(torch.searchsorted(chosen, places[mine]))
            parts.append(rows.select(mine))
        return Drawn(len(chosen), torch.cat(slots) if slots else chosen[:0], parts)

    def _lowest(self, total: int) -> Tensor:
        """The places of the `limit` lowest of `total` random numbers, ascending, int64.

        The numbers of fewer places are the first ones of those of more: what is low among all is low in each part.
        """
        if self.limit is None or total <= self.limit:
            return torch.arange(total)
        generator = torch.Generator().manual_seed(self._seed)
        numbers = torch.rand(total, dtype=torch.float64, generator=generator)
        return numbers.topk(self.limit, largest=False).indices.sort().values

    def to(self, device: torch.device) -> None:
        for rows in self._held:
            rows.values, rows.factors = rows.values.to(device), rows.factors.to(device)
            rows.products = None if rows.products is None else rows.products.to(device)


def _first_place(sizes: Sequence[Sequence[int]], batch: int, process: int) -> int:
    """The place of a batch's first row in the common order; a process may have had fewer batches than another."""
    before = sum(sum(own[:batch]) for own in sizes)
    return before + sum(own[batch] for own in sizes[:process] if batch < len(own))
