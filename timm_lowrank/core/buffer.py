"""What a branch keeps of the batches since its last update: the rows that may enter W, and the moments of all rows.

The rows of an update stand in one common order: batch by batch (there are several under gradient accumulation), and
within a batch process by process. A random number is drawn for each position in this order, and the rows with the
lowest ones are taken. So the draw is even over all rows of all processes, and the same rows are drawn however an update
is cut into batches and processes, as long as the common order is the same.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .device import moved
from .distributed import Processes
from .factored import centred, pieces

_MOST = 2.0**58  # norm of a row that enters W: products of such rows, and sums of some thousand of them, fit float32


@dataclasses.dataclass
class Rows:
    """Some rows of one batch."""

    positions: Sequence[int]  # n, ascending: in the batch, on the process that saw them
    values: Tensor  # (n, m) activations without a graph, of the network's dtype
    index: Tensor | None = None  # (n,) int64 beside `values`: where they stood in what they were taken from; None: all
    factors: Tensor | None = None  # (n,) that the scale of the loss multiplies the centred rows by, or one for all
    products: Tensor | None = None  # (k, n) of B with the centred rows, where W is kept factored

    def select(self, chosen: Sequence[int]) -> Rows:
        """Those at `chosen`, ascending, as copies."""
        if len(chosen) == len(self.positions):
            return dataclasses.replace(self, values=self.values.clone(), index=None)
        host = torch.tensor(chosen, dtype=torch.int64, device="cpu")
        index = host.to(self.values.device, non_blocking=True)  # else the host would wait for the device
        some = Rows([self.positions[one] for one in chosen], self.values[index], index)
        if self.factors is not None:
            some.complete(self.factors, self.products)
        return some

    def complete(self, factors: Tensor, products: Tensor | None) -> None:
        """Their factors and products, from those of what they were taken from."""
        whole, index = self.index is None, self.index
        self.factors = factors if whole or factors.dim() == 0 else factors[index]
        self.products = products if whole or products is None else products[:, index]

    def write(self, bias: Tensor, rows: Tensor, products: Tensor) -> None:
        """The centred and scaled rows into (n, m), and their products into (k, n); zeros for rows that are not finite,
        or whose squares may not be.

        A gradient scaler skips the step of an overflowing batch, but its rows were remembered by then: as zeros they do
        not enter W.
        """
        assert self.factors is not None
        most = _MOST / self.values.shape[1] ** 0.5
        zero = bias.new_zeros(())
        for some in pieces(len(self.values), self.values.shape[1], self.values.device):
            factors = self.factors[some] if self.factors.dim() else self.factors
            taken = centred(self.values[some], bias).mul_(factors[:, None] if factors.dim() else factors)
            finite = taken.abs().amax(dim=1) < most  # NaN is not; ten times as fast as isfinite() on a CPU
            torch.where(finite[:, None], taken, zero, out=rows[some])
            if self.products is not None:
                torch.where(finite, self.products[:, some] * factors, zero, out=products[:, some])


@dataclasses.dataclass
class SampledRows:
    """The rows of one process among those that enter W."""

    count: int  # p, the rows that enter W from all processes together
    slots: Sequence[int]  # q, ascending: where this process's rows stand among them
    parts: list[Rows]  # q rows together

    def gather(
        self,
        bias: Tensor,  # b (m,)
        rows: Tensor,  # (p, m), of the dtype of b
        products: Tensor,  # (k, p)
        processes: Processes,
    ) -> None:
        """Writes all rows that enter W, centred and scaled, and their products with B.

        Each process puts its own rows in their slots and zeros in the others: the sum is every row to the bit. Rows
        that are not finite become zeros.
        """
        own_rows, own_products = rows, products  # alone, its rows fill them in their order
        if not processes.alone:
            own_rows = rows.new_empty(len(self.slots), rows.shape[1])
            own_products = products.new_empty(len(products), len(self.slots))
        begin = 0
        for part in self.parts:
            end = begin + len(part.positions)
            part.write(bias, own_rows[begin:end], own_products[:, begin:end])
            begin = end
        if not processes.alone:
            slots = torch.tensor(self.slots, dtype=torch.int64, device="cpu").to(bias.device, non_blocking=True)
            rows.zero_()[slots] = own_rows
            products.zero_()[:, slots] = own_products
            for target, total in zip((rows, products), processes.sum(rows, products), strict=True):
                target.copy_(total)


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

    def add(self, values: Tensor, *, alone: bool) -> Sequence[int]:
        """Remember a batch (n, m). Gives the rows of it that may enter W, ascending. `complete` must follow.

        Alone, rows that are certainly not drawn are dropped at once. Beside other processes, whose sizes are not known
        before the update, the batch is kept whole until then.
        """
        self.sizes.append(len(values))
        self._batches.append(Rows(range(len(values)), values))
        self._drawn &= alone
        if alone:
            self._batches = self._draw([self.sizes], 0).parts
        return self._batches[-1].positions

    def complete(self, factors: Tensor, products: Tensor | None) -> None:
        """The factors (n,), or one for all, and, where W is kept factored, the products (k, n) of the batch that was
        added last."""
        self._batches[-1].complete(factors, products)

    def renew(self, products: Callable[[Tensor], Tensor | None]) -> None:
        """Other products, of another B: `products` gives (k, n) of values (n, m), or None where W is not factored."""
        for rows in self._batches:
            rows.products = products(rows.values)

    def sample(self, sizes: Sequence[Sequence[int]], process: int) -> SampledRows:
        """The rows that enter W.

        Args:
            sizes: for each process the rows of each of its batches.
            process: the number of this one.
        """
        if self._drawn and len(sizes) == 1:
            count = sum(len(rows.positions) for rows in self._batches)
            return SampledRows(count, range(count), self._batches)
        return self._draw(sizes, process)

    def _draw(self, sizes: Sequence[Sequence[int]], process: int) -> SampledRows:
        sampled = self._lowest(sum(map(sum, sizes)))
        slots: list[int] = []
        parts = []
        for number, rows in enumerate(self._batches):
            before = sum(sum(own[:number]) for own in sizes)  # a process may have had fewer batches than another
            before += sum(sum(own[number : number + 1]) for own in sizes[:process])
            own, some = _common(sampled, before, rows.positions)
            slots += some
            parts.append(rows.select(own))
        return SampledRows(len(sampled), slots, parts)

    def _lowest(self, total: int) -> Sequence[int]:
        """The positions of the `limit` lowest of `total` random numbers, ascending.

        The numbers of fewer positions are the first ones of those of more: what is low among all is low in each part.
        """
        if self.limit is None or total <= self.limit:
            return range(total)
        generator = torch.Generator("cpu").manual_seed(self._seed)
        numbers = torch.rand(total, dtype=torch.float64, generator=generator, device="cpu")
        lowest: list[int] = numbers.topk(self.limit, largest=False).indices.tolist()
        return sorted(lowest)

    def to(self, device: torch.device) -> None:
        for rows in self._batches:
            for name in ("values", "index", "factors", "products"):
                held = getattr(rows, name)
                setattr(rows, name, None if held is None else moved(held, device))


def _common(sampled: Sequence[int], before: int, positions: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    """Where the numbers stand that are in `sampled` and, `before` added, in `positions`: in these, and in `sampled`."""
    begin = bisect.bisect_left(sampled, before)
    end = bisect.bisect_right(sampled, before + positions[-1]) if positions else begin
    if isinstance(positions, range):  # a whole batch
        if end - begin == len(positions):
            return positions, range(begin, end)
        return [one - before for one in sampled[begin:end]], range(begin, end)
    place = {position: index for index, position in enumerate(positions)}
    slots = [slot for slot in range(begin, end) if sampled[slot] - before in place]
    return [place[sampled[slot] - before] for slot in slots], slots


class Moments:
    """Mean and spread of rows (n, m) that were centred with one and the same b; b and the collapse check follow them.

    Everything stays on the device: adding a batch waits for nothing.

    Args:
        bias: b (m,), whose dtype and device the sums take.
    """

    def __init__(self, bias: Tensor) -> None:
        self._bias = bias
        self._added: Tensor | None = None  # None while nothing was: most updates are of one batch

    @property
    def _sums(self) -> Tensor:
        """Of a, of ||a + b||^2, and of ones, (m + 2,): three small tensors would be three times the operations."""
        return self._bias.new_zeros(len(self._bias) + 2) if self._added is None else self._added

    @property
    def total(self) -> Tensor:
        """The sum of a, (m,)."""
        return self._sums[:-2]

    @property
    def squares(self) -> Tensor:
        """The sum of ||a + b||^2, a scalar."""
        return self._sums[-2]

    @property
    def count(self) -> Tensor:
        """How many rows, a scalar."""
        return self._sums[-1]

    def of(self, values: Tensor) -> Tensor:
        """What `add` takes of a batch a (n, m): (m + 2,), the sum of a, and room for two more."""
        own = self._bias.new_full((len(self._bias) + 2,), float(len(values)))
        for some in pieces(values.shape[1], len(values), values.device):
            torch.sum(values[:, some], dim=0, dtype=own.dtype, out=own[:-2][some])
        return own

    def add(self, own: Tensor, norms: Tensor) -> None:
        """A batch: what `of` gave, and ||a + b|| (n,). One that is not finite, or whose squares are not, is left out: a
        gradient scaler will skip it."""
        torch.dot(norms, norms, out=own[-2])
        finite = torch.linalg.vector_norm(own[:-1], math.inf) < torch.inf
        if self._added is None:
            self._added = torch.where(finite, own, 0)
        else:
            self._added = torch.where(finite, own + self._added, self._added)

    def sum_over(self, processes: Processes) -> None:
        """From here on the moments of all processes' batches; each must have had the same b."""
        (self._added,) = processes.sum(self._sums)

    def empty(self) -> bool:
        """Whether no finite row was added. Waits for the device."""
        return not (self._sums.is_meta or bool(self.count > 0))

    def mean(self) -> Tensor:
        """Of a, (m,); zero without rows."""
        return self.total / self.count.clamp_min(1)

    def moved(self, bias: Tensor, share: float) -> Tensor:
        """b (m,), moved by this share of the way to minus the mean; b itself without rows."""
        way = torch.addcmul(self.total, self.count, bias)  # the sum of a + b
        return torch.addcdiv(bias, way, self.count.clamp_min(1), value=-share)

    def spread(self, otherwise: Tensor) -> Tensor:
        """Root mean square of ||a + b||, a scalar; `otherwise` without rows."""
        return torch.where(self.count > 0, (self.squares / self.count.clamp_min(1)).sqrt(), otherwise)

    def variance(self) -> Tensor:
        """Mean of ||a - mean||^2, a scalar; the nearer b is to minus the mean, the more exactly."""
        share = self.squares / self.count.clamp_min(1)
        return (share - (self.mean() + self._bias).square().sum()).clamp_min(0)

    def to(self, device: torch.device) -> None:
        self._bias = moved(self._bias, device)
        self._added = None if self._added is None else moved(self._added, device)


class Streak:
    """How many updates in a row had no finite row. On a GPU the host learns it late, and never waits.

    A copy, and what is pickled, begins anew.
    """

    def __init__(self) -> None:
        self._length = 0
        self._on_their_way: collections.deque[tuple[Tensor, torch.cuda.Event]] = collections.deque()

    def extend(self, count: Tensor) -> int:
        """One more update, of so many finite rows (a scalar). The length of the streak, as far as the host knows it."""
        if count.is_meta:
            return 0
        if count.device.type != "cuda":
            return self._take(count)
        copy = torch.empty(count.shape, dtype=count.dtype, device="cpu", pin_memory=True)
        copy.copy_(count, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._on_their_way.append((copy, arrived))
        while self._on_their_way and self._on_their_way[0][1].query():
            self._take(self._on_their_way.popleft()[0])
        return self._length

    def _take(self, count: Tensor) -> int:
        self._length = 0 if float(count) > 0 else self._length + 1
        return self._length

    def __reduce__(self) -> tuple[type[Streak], tuple[()]]:
        return Streak, ()
