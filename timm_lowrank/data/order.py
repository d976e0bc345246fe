"""The order of the images of a streamed epoch: a pure function of seed, epoch and shards, known before one is read.

A shuffle buffer that is filled while it is read loses its content when a run is interrupted, and one for each
process ties the order to the number of processes. Here the order that such a buffer would give is computed first,
as row numbers; how many processes and workers read it, and where they begin, changes nothing about it.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

MOST_SEGMENTS = 32
OPEN_BYTES = 2 << 30  # what the row groups that are open at once may hold together


def mix(*numbers: int) -> int:
    """Distinct seeds for distinct numbers such as (seed, epoch, stream), far apart even where they are small."""
    mixed = 0
    for value in numbers:
        mixed = ((mixed ^ value) * 0x9E3779B97F4A7C15 + 0x7F4A7C15) % 2**63
    return mixed


@dataclasses.dataclass(frozen=True)
class ReadPlan:
    """What one reader does in an epoch: it reads `rows` one after the other and delivers them in another order.

    Args:
        rows: (n,), int64, numbers of rows in the split, in the order of reading.
        order: (n,), int64: the k-th image to deliver is the one that was read as number `order[k]`.
        counts: (batches,), int64: how many images each batch takes from here; they add up to n.
    """

    rows: np.ndarray
    order: np.ndarray
    counts: np.ndarray


@dataclasses.dataclass(frozen=True)
class EpochOrder:
    """The training images of every epoch, in batches of one size.

    In each epoch the row groups of the shards come in an order of their own, as one long sequence that begins at a
    row of its own; it is cut into segments of one length, the images that do not fill a last batch are left out,
    and each batch takes the same number of images from every segment. Within a segment an image is delivered up to
    `buffer / segments` positions later than it is read, so that no more than `buffer` images are ever held. As
    segments do not depend on processes, processes that take different parts of a batch mostly read different row
    groups.

    Args:
        groups: (g,), int64, number of rows of each row group; none is empty.
        batch: images of a batch, over all processes.
        batches: batches of an epoch; `batch * batches` is at most the number of rows.
        buffer: images held for shuffling, over all processes; 1 keeps the order within a row group.
        seed: of the order.
        group_bytes: size of the largest row group, which bounds the number of segments.
    """

    groups: np.ndarray
    batch: int
    batches: int
    buffer: int
    seed: int
    group_bytes: int = 0

    @property
    def segments(self) -> int:
        """The largest divisor of `batch` that is not too many: each segment holds a row group open."""
        most = min(MOST_SEGMENTS, len(self.groups), max(1, OPEN_BYTES // max(1, self.group_bytes)))
        return next(count for count in range(min(most, self.batch), 0, -1) if self.batch % count == 0)

    def share(self, epoch: int, positions: range, first: int = 0) -> list[ReadPlan]:
        """What a reader of the images at `positions` of every batch reads, from batch `first` on.

        Args:
            epoch: from 0.
            positions: consecutive numbers below `batch`.
            first: batches that were delivered before.
        """
        width = self.batch // self.segments
        starts, begins, offset = self._sequence(epoch)
        plans = []
        for segment in range(positions.start // width, -(-positions.stop // width)):
            inside = slice(max(positions.start - segment * width, 0), min(positions.stop - segment * width, width))
            delivered = self._delivered(epoch, segment).reshape(self.batches, width)[first:, inside]
            read = np.sort(delivered, axis=None)
            # From positions in the sequence of the epoch to rows of the split.
            sequence = (read + segment * width * self.batches + offset) % self.groups.sum()
            group = np.searchsorted(begins, sequence, side="right") - 1
            counts = np.full(len(delivered), delivered.shape[1])
            order = np.searchsorted(read, delivered.reshape(-1))
            plans.append(ReadPlan(starts[group] + sequence - begins[group], order, counts))
        return plans

    def indices(self, epoch: int, positions: range, first: int = 0) -> np.ndarray:
        """(batches - first, len(positions)), int64: the rows of the split that `share` delivers."""
        parts = [plan.rows[plan.order].reshape(len(plan.counts), -1) for plan in self.share(epoch, positions, first)]
        return np.concatenate(parts, axis=1)

    def _sequence(self, epoch: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Of each row group, as they come: its first row in the split, and its position in the sequence; the offset."""
        generator = torch.Generator().manual_seed(mix(self.seed, epoch, 0))
        permutation = torch.randperm(len(self.groups), generator=generator).numpy()
        starts = (np.cumsum(self.groups) - self.groups)[permutation]
        begins = np.cumsum(self.groups[permutation]) - self.groups[permutation]
        offset = torch.randint(int(self.groups.sum()), (), generator=generator)
        return starts, begins, int(offset)

    def _delivered(self, epoch: int, segment: int) -> np.ndarray:
        """(n,), int64: the k-th image of a segment to be delivered is the one at this position of it."""
        length = self.batch // self.segments * self.batches
        generator = torch.Generator().manual_seed(mix(self.seed, epoch, 1 + segment))
        # Sorted by position plus a random delay of at most `reach`: when an image leaves, everything that is held was
        # read within the last `reach` positions.
        reach = max(1, self.buffer // self.segments) - 1
        delays = torch.rand(length, generator=generator, dtype=torch.float64).numpy() * reach
        return np.argsort(np.arange(length) + delays, kind="stable")
